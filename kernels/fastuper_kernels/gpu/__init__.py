"""The operations' Triton kernels, one file an operation. Imported where the first of them is called."""

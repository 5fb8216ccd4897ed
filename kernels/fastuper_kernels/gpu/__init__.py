"""The operations' Triton kernels, a file an operation; each is imported at the operation's first call."""

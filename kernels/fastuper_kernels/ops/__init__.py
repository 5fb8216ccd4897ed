"""The operations: signature, checks, definition (`reference`), and the way that each call takes."""

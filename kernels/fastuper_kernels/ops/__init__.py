"""The operations: signature, checks, definition (`reference`), and which way each call takes."""

"""The operations UPerNet is made of. Imports torch, and never fastuper."""

"""Checkpoints' names and files: state dict -> state dict, one file a dialect. Nothing here imports a model."""

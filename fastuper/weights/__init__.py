"""Weights: files and names of checkpoints, state dict -> state dict. No file here imports a model.

A dialect is a file: it maps the names of another library or repository to the Hub's names, which our modules have.
`transformers.py` and `official.py` (Unified Perceptual Parsing's official code) are the two.
"""

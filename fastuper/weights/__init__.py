"""Weights: files and names of checkpoints, state dict -> state dict. No file here imports a model.

A dialect is a file: it turns a state dict of another library or repository into one with the Hub's names, which our
modules have. `transformers.py` is the first.
"""

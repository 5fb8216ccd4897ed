"""Benchmarks: what is timed and compared, the committed results, and the tables and plots drawn from them.

Commands, each `python -m bench.NAME`: run (time and memory beside the peers), training (a training step), accuracy
(distance from float64), gpu (everything on a GPU), compiled (kernels compiled ahead of time), roofline (least times
from data sheets), memory (peak memory alone), tables and plots (pages drawn from bench/results).

Shared by them: pairs (the same model in both libraries), peers and variants (the models that are timed), timing
(alternating turns), numerics (errors and precisions), truth (float64 outputs), machine, names and results.
"""

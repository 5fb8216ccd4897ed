"""`pooling_asks`: if a traced max pooling, and so a traced ResNet, is restricted to odd or even sizes."""

from __future__ import annotations

import functools

import torch
from torch import nn


@functools.cache
def pooling_asks() -> bool:
    """Return True if an exported max pooling accepts only sizes as odd or even as its example's, as in PyTorch 2.11."""
    pool, auto = nn.MaxPool2d(3, 2, 1), torch.export.Dim.AUTO
    pooled = torch.export.export(pool, (torch.ones(1, 1, 8, 8),), dynamic_shapes=({2: auto, 3: auto},)).module()
    try:
        pooled(torch.ones(1, 1, 9, 9))
    except (AssertionError, RuntimeError):
        return True
    return False

"""What PyTorch's max pooling, and so a ResNet, can have traced."""

from __future__ import annotations

import functools

import torch
from torch import nn


@functools.cache
def pooling_asks() -> bool:
    """Return whether this PyTorch (2.11 does) takes a pooled map's size for odd, or even, as it is in the example."""
    pool, auto = nn.MaxPool2d(3, 2, 1), torch.export.Dim.AUTO
    pooled = torch.export.export(pool, (torch.ones(1, 1, 8, 8),), dynamic_shapes=({2: auto, 3: auto},)).module()
    try:
        pooled(torch.ones(1, 1, 9, 9))
    except (AssertionError, RuntimeError):
        return True
    return False

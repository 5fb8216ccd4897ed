"""Errors against a float64 result, and the precision of float32 convolutions."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch


def error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Return ||result - truth|| / ||truth||, computed in float64. The two shapes must be equal."""
    assert result.shape == truth.shape, f"{tuple(result.shape)} is not {tuple(truth.shape)}"
    result, truth = result.detach().double(), truth.detach().double()
    scale = truth.norm().item()
    assert math.isfinite(scale)
    assert scale > 0
    return (result - truth).norm().item() / scale


def root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))


@contextlib.contextmanager
def float32_as(kind: str) -> Iterator[None]:
    """Set cuDNN's precision of float32 convolutions: "tf32" (PyTorch's default) or "ieee", which is full float32."""
    conv: Any = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = kind
    try:
        yield
    finally:
        conv.fp32_precision = before

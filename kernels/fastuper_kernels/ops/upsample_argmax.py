"""From logits on a coarse grid to a label for every pixel."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from fastuper_kernels.cpu.argmax import argmax, finite
from fastuper_kernels.dispatch.backend import takes_triton
from fastuper_kernels.dispatch.modes import is_eager, is_ordinary


def upsample_argmax(
    logits: torch.Tensor,
    sizes: Sequence[tuple[int, int]],
    *,
    dtype: torch.dtype = torch.int64,
    backend: str = "auto",
) -> torch.Tensor:
    """Resample logits through each size in turn (bilinear, align_corners=False) and return the best class.

    The chain of resamplings is one linear map of the rows and one of the columns. It is applied block by block, in
    float32 at least: the resampled logits of an image are never held whole. Each block leaves out the classes that
    cannot be the best anywhere in it.

    Args:
        logits: (B, classes, H, W).
        sizes: [(height, width), ...], applied in turn; the labels have the last size.
        dtype: an integer dtype that holds the classes; `label_dtype` returns the smallest.
        backend: "auto", "triton" or "torch"; see `fastuper_kernels.dispatch.backend`.

    Returns:
        Labels (B, height, width). If classes tie, the label is the first of them. Infinite logits count as half of the
        dtype's largest number (of float32's for float16), with their sign; NaN counts as +inf, as in `argmax`. So a
        class that is -inf everywhere is never a label. A logit that is not finite changes only the pixels that are
        resampled from it. (In PyTorch infinity times a weight of zero is NaN, for example at the border, and `argmax`
        takes NaN for the largest value.)

    Raises:
        ValueError: no logits, no sizes, sizes that are not pairs of positive integers, a dtype that is not an integer
            or too small for the classes, or a backend that cannot take the logits.
    """
    if logits.ndim != 4 or min(logits.shape[1:]) < 1 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be (B, classes, H, W) of floating-point numbers, got {tuple(logits.shape)} of {logits.dtype}"
        )
    sizes = check_sizes(sizes)
    integer = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    if not integer or torch.iinfo(dtype).max < logits.shape[1] - 1:
        raise ValueError(f"{dtype} does not hold the labels of {logits.shape[1]} classes")
    if takes_triton(backend, logits):
        from fastuper_kernels.gpu.upsample_argmax import upsample_argmax as kernel

        heights, widths = (list(side) for side in zip(*sizes, strict=True))
        return kernel(logits, heights, widths, dtype)
    if is_eager() and is_ordinary(logits):
        return argmax(logits, sizes, dtype)
    return reference(finite(logits), sizes, dtype=dtype)


def label_dtype(classes: int) -> torch.dtype:
    """Return the smallest dtype of labels of this many classes: uint8, uint16 or, above 65,536 classes, int32."""
    return torch.uint8 if classes <= 1 << 8 else torch.uint16 if classes <= 1 << 16 else torch.int32


def reference(
    logits: torch.Tensor, sizes: Sequence[tuple[int, int]], *, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """The definition of `upsample_argmax`, for finite logits."""
    for size in sizes:
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    return logits.argmax(dim=1).to(dtype)


def check_sizes(sizes: Any) -> list[tuple[int, int]]:
    """Return the sizes as a list of pairs; integers that a tracer follows stay as they are.

    Raises:
        ValueError: there are no sizes, or they are not pairs of positive integers.
    """
    try:
        pairs = [(_integer(height), _integer(width)) for height, width in sizes]
    except (TypeError, ValueError):  # not pairs, or not integers
        pairs = []
    if not pairs or any(height < 1 or width < 1 for height, width in pairs):
        raise ValueError(f"sizes must be one or more positive (height, width), got {sizes}")
    return pairs


def _integer(value: Any) -> Any:
    if torch.compiler.is_compiling() or isinstance(value, torch.SymInt):  # `index` would fix the size in the graph
        return value
    traced = isinstance(value, torch.Tensor) and torch.jit.is_tracing()
    return value if traced else operator.index(value)

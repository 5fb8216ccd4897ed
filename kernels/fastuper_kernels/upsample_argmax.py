"""From logits on a coarse grid to a label for every pixel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

# About this many resampled logits exist at a time (256 MB of float32) however many classes and images there are, or
# those of one class where one has more.
MAX_RESAMPLED = 1 << 26


def upsample_argmax(
    logits: torch.Tensor, sizes: Sequence[tuple[int, int]], *, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """Resample logits through each size in turn (bilinear, align_corners=False) and return the best class.

    Args:
        logits: (B, classes, H, W).
        sizes: [(height, width), ...], applied in turn; the labels have the last.
        dtype: an integer type that holds the classes.

    Returns:
        Labels (B, height, width). Where classes tie, the first of them.

    Raises:
        ValueError: no sizes, an empty size, or a dtype that is no integer or too small for the classes.
    """
    if not sizes or any(height < 1 or width < 1 for height, width in sizes):
        raise ValueError(f"sizes must be one or more positive (height, width), got {list(sizes)}")
    integer = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    if not integer or torch.iinfo(dtype).max < logits.shape[1] - 1:
        raise ValueError(f"{dtype} does not hold the labels of {logits.shape[1]} classes")
    step = max(1, MAX_RESAMPLED // max(height * width for height, width in sizes))
    return torch.cat([_labels_of_one(image, sizes, step, dtype) for image in logits.split(1)])


def _labels_of_one(
    image: torch.Tensor, sizes: Sequence[tuple[int, int]], step: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return the labels (1, height, width) of one image, `step` classes at a time, with a running maximum."""
    best, labels = None, None
    # PyTorch may resample some classes and all of them by different kernels, which round differently: labels of a whole
    # (step >= classes) are those of `interpolate(...).argmax(1)`, labels of parts are where no two classes tie.
    for start, part in enumerate(image.contiguous().split(step, dim=1)):
        for size in sizes:
            part = F.interpolate(part, size=size, mode="bilinear", align_corners=False)
        values, indices = part.max(dim=1)
        indices = indices.to(dtype)
        if best is None or labels is None:
            best, labels = values, indices
        else:
            better = values > best  # not >=: the first of equal classes wins, as in argmax
            best = torch.where(better, values, best)
            labels = torch.where(better, indices + start * step, labels)
    assert labels is not None
    return labels

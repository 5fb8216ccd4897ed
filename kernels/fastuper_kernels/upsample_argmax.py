"""From logits on a coarse grid to a label for every pixel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F


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
    if dtype.is_floating_point or dtype.is_complex or torch.iinfo(dtype).max < logits.shape[1] - 1:
        raise ValueError(f"{dtype} does not hold the labels of {logits.shape[1]} classes")
    # An image at a time: the full-size logits of a whole batch never exist together.
    labels = []
    for image in logits.split(1):
        for size in sizes:
            image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
        labels.append(image.argmax(dim=1).to(dtype))
    return torch.cat(labels)

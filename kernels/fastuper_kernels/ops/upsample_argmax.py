"""From logits on a coarse grid to a label for every pixel."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from fastuper_kernels.cpu.band import bilinear_chain, blocks_of
from fastuper_kernels.dispatch.backend import takes_triton
from fastuper_kernels.dispatch.modes import is_eager, is_ordinary, without_autocast

# Rows and columns of labels that are made at a time, and bytes of resampled logits: they stay in a core's own cache.
ROWS, COLUMNS = 64, 64
BLOCK_BYTES = 2 << 20


def upsample_argmax(
    logits: torch.Tensor,
    sizes: Sequence[tuple[int, int]],
    *,
    dtype: torch.dtype = torch.int64,
    backend: str = "auto",
) -> torch.Tensor:
    """Resample logits through each size in turn (bilinear, align_corners=False) and return the best class.

    The chain of resamplings is one linear map of the rows and one of the columns: it is applied block by block, in
    float32 at least, and no image's resampled logits are ever held whole. Each block leaves out the classes that can be
    the best nowhere in it.

    Args:
        logits: (B, classes, H, W).
        sizes: [(height, width), ...], applied in turn; the labels have the last.
        dtype: an integer type that holds the classes.
        backend: "auto", "triton" or "torch"; see `fastuper_kernels.dispatch.backend`.

    Returns:
        Labels (B, height, width). Where classes tie, the first of them. Infinite logits count as half of the dtype's
        largest number (of float32's for float16), with their sign, and NaN, as `argmax` has it, as infinity: a class
        that is -inf everywhere is the label nowhere, and what is not finite tells on the pixels alone that are
        resampled from it. (In PyTorch an infinity times a weight of zero is NaN, at the border say, and NaN is the
        best.)

    Raises:
        ValueError: no logits, no sizes, sizes that are not pairs of integers from 1, or a dtype that is no integer or
            too small for the classes; or a backend that cannot take them.
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
    if logits.dtype == torch.float16:  # whose numbers end where logits may be
        logits = logits.float()
    logits = _finite(logits)
    if not is_eager() or not is_ordinary(logits):
        return reference(logits, sizes, dtype=dtype)
    labels = logits.new_empty((len(logits), *sizes[-1]), dtype=dtype)
    with torch.no_grad(), without_autocast(logits):
        for image, result in zip(logits, labels, strict=True):
            _label(image, sizes, result)
    return labels


def reference(
    logits: torch.Tensor, sizes: Sequence[tuple[int, int]], *, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """The definition of `upsample_argmax`, for finite logits."""
    for size in sizes:
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    return logits.argmax(dim=1).to(dtype)


def check_sizes(sizes: Any) -> list[tuple[int, int]]:
    """Return the sizes; those of a tracer as they are.

    Raises:
        ValueError: they are not pairs of integers from 1.
    """
    try:
        pairs = [(_integer(height), _integer(width)) for height, width in sizes]
    except (TypeError, ValueError):  # no pairs, or not of integers
        pairs = []
    if not pairs or any(height < 1 or width < 1 for height, width in pairs):
        raise ValueError(f"sizes must be one or more positive (height, width), got {sizes}")
    return pairs


def _integer(value: Any) -> Any:
    return value if isinstance(value, int | torch.SymInt) else operator.index(value)


def _finite(logits: torch.Tensor) -> torch.Tensor:
    """Return the logits with numbers in the place of infinities and NaN: zero times those would be NaN."""
    if is_eager() and is_ordinary(logits) and logits.device.type == "cpu":
        # Looked at before they are copied: a sum takes next to no time, and one that overflows costs the copy alone.
        total = logits.sum(dtype=torch.promote_types(logits.dtype, torch.float32))
        if total.isfinite():
            return logits
    # Half, so that weights that add up to a little more than one do not make infinities of them again.
    limit = torch.finfo(logits.dtype).max / 2
    return logits.nan_to_num(nan=limit, posinf=limit, neginf=-limit)


def _label(image: torch.Tensor, sizes: Sequence[tuple[int, int]], labels: torch.Tensor) -> None:
    """Write the labels of one image (classes, H, W)."""
    classes, h, w = image.shape
    # The classes last: the best of neighbouring values is found several times faster than that of distant ones.
    x = image.permute(1, 2, 0).contiguous()
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()
    rows = blocks_of(bilinear_chain, ((h, *(size[0] for size in sizes)),), x.dtype, x.device, size=ROWS)
    columns = blocks_of(bilinear_chain, ((w, *(size[1] for size in sizes)),), x.dtype, x.device, size=COLUMNS)
    everyone = torch.arange(classes, device=x.device)
    for block in rows:
        lines = x[block.first : block.last]
        for part in columns:
            # The columns of the few rows that the block reads, then its rows.
            source = lines[:, part.first : part.last]
            # On a GPU the host would have to wait for how many they are.
            rivals = _rivals(source) if x.device.type == "cpu" else everyone
            if len(rivals) < classes:
                source = source.index_select(2, rivals)
            wide = torch.bmm(part.matrix.expand(len(lines), -1, -1), source).flatten(1)
            step = max(1, BLOCK_BYTES // (wide.shape[1] * wide.element_size()))
            for start in range(block.start, block.stop, step):
                stop = min(start + step, block.stop)
                full = block.matrix[start - block.start : stop - block.start] @ wide
                best = full.view(stop - start, -1, len(rivals)).argmax(dim=-1)
                labels[start:stop, part.start : part.stop] = rivals[best]


def _rivals(source: torch.Tensor) -> torch.Tensor:
    """Return, in order, the classes that may be the best somewhere between the pixels of `source` (H, W, classes).

    What is resampled bilinearly is a mean of these pixels: a class that is below another one's least value in all of
    them is the best nowhere. What rounding may change is left to be decided as it is.
    """
    pixels = source.flatten(0, 1)
    most, least = pixels.amax(0), pixels.amin(0)
    rounding = 32 * torch.finfo(source.dtype).eps * torch.maximum(most.max().abs(), least.min().abs())
    return (most >= least.max() - rounding).nonzero().squeeze(1)

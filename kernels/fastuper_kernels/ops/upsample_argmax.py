"""From logits on a coarse grid to a label for every pixel."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from fastuper_kernels.cpu.argmax import argmax, argmax_in_slices, finite, slice_table
from fastuper_kernels.cpu.band import interpolate_chain
from fastuper_kernels.dispatch.backend import takes_triton
from fastuper_kernels.dispatch.modes import is_eager, is_ordinary

ALIGNED = "the kernels resample with align_corners=False only"


def upsample_argmax(
    logits: torch.Tensor,
    sizes: Sequence[tuple[int, int]],
    *,
    dtype: torch.dtype = torch.int64,
    first: int = 0,
    groups: torch.Tensor | None = None,
    slices: Sequence[tuple[int, int]] | None = None,
    align_corners: bool | Sequence[bool] = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Resample logits through each size in turn (bilinear) and return the best class.

    The chain of resamplings is one linear map of the rows and one of the columns. It is applied block by block, in
    float32 at least: the resampled logits of an image are never held whole. Each block leaves out the classes that
    cannot be the best anywhere in it.

    With groups, only the classes in the slice of a pixel's group compete there. Logits are resampled only for groups
    that occur, only where they occur.

    Args:
        logits: (B, classes, H, W).
        sizes: [(height, width), ...], applied in turn; the labels have the last size.
        dtype: an integer dtype that holds the classes; `label_dtype` returns the smallest.
        first: the first class that competes: classes before it are never a label.
        groups: (B, height, width), integers: places in `slices`. Other groups, negative or larger, have empty slices.
        slices: the classes [start, stop) of each group; with groups only.
        align_corners: as for `F.interpolate`, of all steps or of each. Triton's kernels take False only.
        backend: "auto", "triton" or "torch"; see `fastuper_kernels.dispatch.backend`.

    Returns:
        Labels (B, height, width). With groups they count from the slice's first class, and are 0 in empty slices. If
        classes tie, the label is the first of them. Infinite logits count as half of the
        dtype's largest number (of float32's for float16), with their sign; NaN counts as +inf, as in `argmax`. So a
        class that is -inf everywhere is never a label. A logit that is not finite changes only the pixels that are
        resampled from it. (In PyTorch infinity times a weight of zero is NaN, for example at the border, and `argmax`
        takes NaN for the largest value.)

    Raises:
        TypeError: `dtype` is no `torch.dtype`.
        ValueError: no logits, no sizes, sizes that are not pairs of positive integers, another number of
            `align_corners` than of sizes, a dtype that is not an integer or too small for the classes, a first class
            that does not exist, groups of another shape or dtype, slices that are not ranges of classes, or a backend
            that cannot take the logits.
    """
    if logits.ndim != 4 or min(logits.shape[1:]) < 1 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be (B, classes, H, W) of floating-point numbers, got {tuple(logits.shape)} of {logits.dtype}"
        )
    sizes = check_sizes(sizes)
    corners = check_corners(align_corners, len(sizes))
    if groups is not None or slices is not None:
        groups, slices = check_groups(groups, slices, first, logits, sizes[-1])
    classes = logits.shape[1] if slices is None else max(1, *(stop - start for start, stop in slices))
    if not holds_labels(dtype, classes):
        raise ValueError(f"{dtype} does not hold the labels of {classes} classes")
    if not 0 <= first < logits.shape[1]:
        raise ValueError(f"first must be one of the {logits.shape[1]} classes, got {first}")
    if groups is None or slices is None:
        if takes_triton(backend, logits, obstacle=ALIGNED if corners else None):
            from fastuper_kernels.gpu.upsample_argmax import upsample_argmax as kernel

            return kernel(logits, *_sides(sizes), dtype, first)
        if is_eager() and is_ordinary(logits):
            return argmax(logits, sizes, dtype, first, corners)
        return reference(finite(logits), sizes, dtype=dtype, first=first, align_corners=align_corners)
    if takes_triton(backend, logits, groups, obstacle=ALIGNED if corners else None):
        from fastuper_kernels.gpu.upsample_argmax import upsample_argmax_in_slices

        starts, stops = _sides(slices)
        return upsample_argmax_in_slices(logits, *_sides(sizes), groups, starts, stops, dtype)
    if is_eager() and is_ordinary(logits, groups):
        return argmax_in_slices([logits], sizes, groups, slices, dtype, corners)
    return reference(finite(logits), sizes, dtype=dtype, groups=groups, slices=slices, align_corners=align_corners)


def label_dtype(classes: int) -> torch.dtype:
    """Return the smallest dtype of labels of this many classes: uint8, uint16 or, above 65,536 classes, int32."""
    return torch.uint8 if classes <= 1 << 8 else torch.uint16 if classes <= 1 << 16 else torch.int32


def holds_labels(dtype: Any, classes: int) -> bool:
    """Return whether `dtype` is an integer dtype that holds the labels of this many classes.

    Raises:
        TypeError: it is no dtype of PyTorch.
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, such as torch.int64, got {dtype!r}")
    integer = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    return integer and torch.iinfo(dtype).max >= classes - 1


def reference(
    logits: torch.Tensor,
    sizes: Sequence[tuple[int, int]],
    *,
    dtype: torch.dtype = torch.int64,
    first: int = 0,
    groups: torch.Tensor | None = None,
    slices: Sequence[tuple[int, int]] | None = None,
    align_corners: bool | Sequence[bool] = False,
) -> torch.Tensor:
    """The definition of `upsample_argmax`, for finite logits."""
    logits = interpolate_chain(logits, sizes, check_corners(align_corners, len(sizes)))
    if groups is None or slices is None:
        labels = logits[:, first:].argmax(dim=1)
        return (labels + first if first else labels).to(dtype)
    return in_slices(logits, groups, slices).argmax(dim=1).to(dtype)


def in_slices(x: torch.Tensor, groups: torch.Tensor, slices: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Return the channels of each pixel's slice, (B, longest slice, H, W), padded by -inf; 0 if the slice is empty.

    Args:
        x: (B, channels, H, W).
        groups: (B, H, W), an integer for each pixel. Groups without a slice have empty ones.
        slices: the channels [start, stop) of each group.
    """
    table, valid = (kept.permute(0, 3, 1, 2) for kept in slice_table(slices, groups))
    return x.gather(1, table).masked_fill(~valid, -torch.inf)


def check_groups(
    groups: Any, slices: Any, first: int, logits: torch.Tensor, size: tuple[int, int]
) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Return the groups, and the slices as a list of pairs.

    Raises:
        ValueError: see `upsample_argmax`.
    """
    if groups is None or slices is None or first:
        raise ValueError("groups and slices go together, without first")
    shape = (logits.shape[0], *size)
    if groups.dtype.is_floating_point or groups.dtype.is_complex or groups.dtype == torch.bool or groups.shape != shape:
        raise ValueError(f"groups must be integers of shape {shape}, got {tuple(groups.shape)} of {groups.dtype}")
    try:
        pairs = [(operator.index(start), operator.index(stop)) for start, stop in slices]
    except (TypeError, ValueError):  # not pairs, or not integers
        pairs = []
    if not pairs or any(not 0 <= start <= stop <= logits.shape[1] for start, stop in pairs):
        raise ValueError(f"slices must be (start, stop) within {logits.shape[1]} classes, got {slices}")
    return groups, pairs


def _sides(pairs: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


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


def check_corners(align_corners: Any, count: int) -> tuple[bool, ...]:
    """Return `align_corners` of each of `count` steps; empty if it is False for all.

    Raises:
        ValueError: it is neither a truth value nor one for each step.
    """
    corners = tuple(align_corners) if isinstance(align_corners, list | tuple) else (align_corners,) * count
    if len(corners) != count or not all(isinstance(aligned, bool) for aligned in corners):
        raise ValueError(f"align_corners must be True or False, once or for each of {count} sizes, got {align_corners}")
    return corners if any(corners) else ()


def _integer(value: Any) -> Any:
    if torch.compiler.is_compiling() or isinstance(value, torch.SymInt):  # `index` would fix the size in the graph
        return value
    traced = isinstance(value, torch.Tensor) and torch.jit.is_tracing()
    return value if traced else operator.index(value)

"""Label maps of a photo's size from coarse logits, without logits or probabilities of that size.

The maps are computed tile by tile. Several maps of logits, from the same photo at several scales, vote: a label has the
largest mean of their probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch.nn import functional as F

from fastuper_kernels import upsample_argmax
from fastuper_kernels.cpu.argmax import argmax_in_slices, finite, vote
from fastuper_kernels.dispatch.modes import is_eager, is_ordinary
from fastuper_kernels.ops.upsample_argmax import check_groups, check_sizes, holds_labels, in_slices

# Rows of a part map whose ids are looked up at a time: the look-up needs int64.
ROWS = 256


def class_map(
    logits: Sequence[torch.Tensor], size: tuple[int, int], *, first: int = 0, dtype: torch.dtype
) -> torch.Tensor:
    """Return the best class of each pixel.

    Args:
        logits: (B, classes, h, w) for each scale, of any h and w, before the softmax.
        size: (height, width) of the label map. Each scale's logits are resampled to it in one step (bilinear,
            align_corners=False).
        first: classes before it are never a label. They do take part in the softmax.
        dtype: an integer dtype that holds the classes.

    Returns:
        Labels (B, height, width): the argmax of one scale's logits, or of the mean over several scales of the softmax
        over all classes, in float32 at least. Ties, infinite logits and NaN: as in `upsample_argmax`.

    Raises:
        ValueError: no scale, scales of different images or classes, or what `upsample_argmax` refuses.
    """
    _check_scales(logits)
    if len(logits) == 1:
        return upsample_argmax(logits[0], [size], first=first, dtype=dtype)
    _check_dtype(dtype, logits[0].shape[1])
    (size,) = check_sizes([size])
    if not 0 <= first < logits[0].shape[1]:
        raise ValueError(f"first must be one of the {logits[0].shape[1]} classes, got {first}")
    if is_eager() and is_ordinary(*logits):
        return vote(logits, size, dtype, first)
    votes = reduce(torch.add, (_resampled(scale, size).softmax(1) for scale in logits))
    return (votes[:, first:].argmax(1) + first).to(dtype)


def part_map(
    logits: Sequence[torch.Tensor],
    objects: torch.Tensor,
    slices: Mapping[int, slice],
    object_parts: Mapping[int, Sequence[int]],
    *,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the part of each pixel, by the parts of the object there.

    Logits are resampled only for objects of the map, only in the tiles where they are.

    Args:
        logits: (B, channels, h, w) of the part head for each scale, before the softmax.
        objects: (B, height, width), the object of each pixel, an integer; the part map has its size. Numbers that are
            not objects, such as -1 or 255, have no parts.
        slices: the channels of each object that has parts: "other", then one channel for each of its parts.
        object_parts: the ids of each object's parts, in the order of its channels.
        dtype: an integer dtype that holds the parts' ids.

    Returns:
        Part ids (B, height, width); 0 for "other", and where the object has no parts. The best channel of the object's
        slice counts: of one scale's logits, or of the mean over several scales of the softmax over the slice.

    Raises:
        ValueError: no scale, scales of different images or channels, or a slice that does not hold the object's parts.
    """
    _check_scales(logits)
    for name, parts in object_parts.items():
        own = slices.get(name)
        if own is None or own.stop - own.start != 1 + len(parts):
            raise ValueError(f"object {name} needs a slice of {1 + len(parts)} channels for its parts, got {own}")
    ids = [[0, *object_parts.get(name, ())] for name in range(max(object_parts, default=0) + 1)]
    _check_dtype(dtype, 1 + max(map(max, ids)))
    owns = [slices[name] if name in object_parts else slice(0, 0) for name in range(len(ids))]
    spans = [(own.start, own.stop) for own in owns]
    positions = _positions(logits, objects, spans, dtype)
    longest = max(map(len, ids))
    table = torch.tensor([parts + [0] * (longest - len(parts)) for parts in ids], device=objects.device)
    if not is_eager():
        return _named(positions, objects, table)
    for start in range(0, positions.shape[1], ROWS):
        rows = slice(start, start + ROWS)
        positions[:, rows] = _named(positions[:, rows], objects[:, rows], table)
    return positions


def _positions(
    logits: Sequence[torch.Tensor], objects: torch.Tensor, spans: list[tuple[int, int]], dtype: torch.dtype
) -> torch.Tensor:
    """Return the best position in the slice of each pixel's object, (B, height, width); 0 without a slice."""
    height, width = objects.shape[-2:]
    size = (height, width)
    if len(logits) == 1:
        return upsample_argmax(logits[0], [size], groups=objects, slices=spans, dtype=dtype)
    check_groups(objects, spans, 0, logits[0], size)
    if is_eager() and is_ordinary(*logits, objects):
        return argmax_in_slices(logits, [size], objects, spans, dtype)
    votes = reduce(torch.add, (in_slices(_resampled(scale, size), objects, spans).softmax(1) for scale in logits))
    return votes.argmax(1).to(dtype)


def _named(positions: torch.Tensor, objects: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return the ids in a table (objects, positions). Objects beyond it have position 0, whose id is always 0."""
    return table[objects.long().clamp(0, len(table) - 1), positions.long()].to(positions.dtype)


def _resampled(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return logits of full size, in float32 at least: for tracers, which cannot follow tiles."""
    wide = finite(logits).to(torch.promote_types(logits.dtype, torch.float32))
    return F.interpolate(wide, size=size, mode="bilinear", align_corners=False)


def _check_scales(logits: Sequence[torch.Tensor]) -> None:
    if not logits or any(scale.ndim != 4 or scale.shape[:2] != logits[0].shape[:2] for scale in logits):
        shapes = [tuple(scale.shape) for scale in logits]
        raise ValueError(f"each scale needs logits (B, classes, h, w) of the same B and classes, got {shapes}")


def _check_dtype(dtype: torch.dtype, count: int) -> None:
    if not holds_labels(dtype, count):
        raise ValueError(f"{dtype} does not hold labels up to {count - 1}")

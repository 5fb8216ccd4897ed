"""`upsample_argmax` on a GPU: each program finds the best class of each pixel of a tile.

A resampled logit is a mean of the logits that its pixel reads. So a class is never the best in a tile if its largest
logit in the tile's input is less than the least logit of another class. This rule leaves out most classes. The
remaining few, the rivals, are resampled one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastuper_kernels.cpu.argmax import argmax as argmax_in_tiles
from fastuper_kernels.cpu.argmax import argmax_in_slices as slices_in_tiles
from fastuper_kernels.gpu.layout import nhwc, on_its_device
from fastuper_kernels.gpu.tiles import TAPS, band, taps_of_chain


@triton.jit
def _finite(value, LIMIT: tl.constexpr):
    """Return float32 values with LIMIT in place of NaN and +inf, and -LIMIT in place of -inf."""
    return tl.maximum(tl.minimum(value.to(tl.float32), LIMIT), -LIMIT)  # minimum(NaN, LIMIT) is LIMIT


@triton.jit
def argmax_kernel(
    logits,
    labels,
    heights,
    widths,
    CLASSES: tl.constexpr,
    FIRST: tl.constexpr,
    N: tl.constexpr,
    ROW_TAPS: tl.constexpr,
    COLUMN_TAPS: tl.constexpr,
    BY: tl.constexpr,
    BX: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    LIMIT: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """Write the best class of each pixel.

    Program: a tile of BY x BX labels of an image.

    logits: pointer to (B, heights[0], widths[0], CLASSES), dense.
    labels: pointer to (B, heights[N], widths[N]) of an integer type, dense; written.
    heights, widths: tuples of N + 1 sizes, the logits' first, the labels' last.
    CLASSES: classes.
    FIRST: the first class that competes.
    N: the number of resamplings.
    ROW_TAPS, COLUMN_TAPS: neighbouring logits that a label reads along each axis; see `taps_of_chain`.
    BY, BX: rows and columns of a tile.
    BP: logit pixels per step of the search for rivals.
    BC: classes per step.
    LIMIT: half of float32's largest number, in place of infinities.
    EPSILON: the relative rounding error of a resampled logit, at most.
    """
    h, w, H, W = heights[0], widths[0], heights[N], widths[N]
    y, x = tl.program_id(1) * BY + tl.arange(0, BY), tl.program_id(0) * BX + tl.arange(0, BX)
    ok = (y < H)[:, None] & (x < W)[None, :]
    first_row, rows, row_weights = band(tl.minimum(y, H - 1), heights, N, ROW_TAPS)
    first_column, columns, column_weights = band(tl.minimum(x, W - 1), widths, N, COLUMN_TAPS)
    image = logits + tl.program_id(2).to(tl.int64) * h * w * CLASSES
    # The box of logit pixels that the tile reads.
    top, left = tl.min(first_row), tl.min(first_column)
    down = tl.minimum(tl.max(first_row) + ROW_TAPS, h) - top
    across = tl.minimum(tl.max(first_column) + COLUMN_TAPS, w) - left
    p, c = tl.arange(0, BP), tl.arange(0, BC)

    bars = tl.full((BC,), -LIMIT, dtype=tl.float32)
    for start in range(FIRST, CLASSES, BC):
        least = tl.full((BP, BC), float("inf"), dtype=tl.float32)
        for pixel in range(0, down * across, BP):
            place = (top + (pixel + p) // across).to(tl.int64) * w + left + (pixel + p) % across
            mask = (pixel + p < down * across)[:, None] & (start + c < CLASSES)[None, :]
            value = tl.load(image + place[:, None] * CLASSES + (start + c)[None, :], mask=mask, other=float("inf"))
            least = tl.minimum(least, value.to(tl.float32))
        least = _finite(tl.min(least, 0), LIMIT)
        bars = tl.maximum(bars, tl.where(start + c < CLASSES, least, -LIMIT))
    bar = tl.max(bars)

    best = tl.full((BY, BX), -float("inf"), dtype=tl.float32)
    label = tl.zeros((BY, BX), dtype=tl.int32)
    for start in range(FIRST, CLASSES, BC):
        most = tl.full((BP, BC), -float("inf"), dtype=tl.float32)
        for pixel in range(0, down * across, BP):
            place = (top + (pixel + p) // across).to(tl.int64) * w + left + (pixel + p) % across
            mask = (pixel + p < down * across)[:, None] & (start + c < CLASSES)[None, :]
            value = tl.load(image + place[:, None] * CLASSES + (start + c)[None, :], mask=mask, other=-float("inf"))
            most = tl.maximum(most, tl.where(value != value, float("inf"), value.to(tl.float32)))
        most = _finite(tl.max(most, 0), LIMIT)
        rival = (start + c < CLASSES) & (most >= bar - EPSILON * tl.maximum(tl.abs(most), tl.abs(bar)))
        for _ in range(tl.sum(rival.to(tl.int32))):
            k = tl.min(tl.where(rival, c, BC))
            rival = rival & (c != k)
            acc = tl.zeros((BY, BX), dtype=tl.float32)
            for i in tl.static_range(ROW_TAPS):
                for j in tl.static_range(COLUMN_TAPS):
                    place = rows[i].to(tl.int64)[:, None] * w + columns[j][None, :]
                    value = _finite(tl.load(image + place * CLASSES + (start + k)), LIMIT)
                    acc += value * (row_weights[i][:, None] * column_weights[j][None, :])
            label = tl.where(acc > best, start + k, label)
            best = tl.maximum(best, acc)
    at = (tl.program_id(2).to(tl.int64) * H + y)[:, None] * W + x[None, :]
    tl.store(labels + at, label.to(labels.dtype.element_ty), mask=ok)


@on_its_device
def argmax(
    logits: torch.Tensor, heights: Sequence[int], widths: Sequence[int], dtype: torch.dtype, first: int = 0
) -> torch.Tensor:
    """Return labels (B, heights[-1], widths[-1]) of logits (B, classes, H, W), resampled through all sizes in turn."""
    batch, classes, h, w = logits.shape
    height, width = heights[-1], widths[-1]
    labels = logits.new_empty(batch, height, width, dtype=dtype)
    if labels.numel() == 0:
        return labels
    row_taps, column_taps = taps_of_chain([h, *heights]), taps_of_chain([w, *widths])
    if max(row_taps, column_taps) > TAPS:
        sizes = list(zip(heights, widths, strict=True))
        return argmax_in_tiles(logits, sizes, dtype, first)
    by, bx = 16, 32
    # Pixels of the box that a tile away from the borders reads.
    box = (-(-by * h // height) + row_taps) * (-(-bx * w // width) + column_taps)
    argmax_kernel[(triton.cdiv(width, bx), triton.cdiv(height, by), batch)](
        nhwc(logits),
        labels,
        (h, *heights),
        (w, *widths),
        CLASSES=classes,
        FIRST=first,
        N=len(heights),
        ROW_TAPS=row_taps,
        COLUMN_TAPS=column_taps,
        BY=by,
        BX=bx,
        BP=max(16, min(triton.next_power_of_2(box), 64)),
        BC=min(triton.next_power_of_2(classes), 32),
        LIMIT=torch.finfo(torch.float32).max / 2,
        EPSILON=32 * torch.finfo(torch.float32).eps,
        num_warps=8,
    )
    return labels


@triton.jit
def slice_kernel(
    logits,
    groups,
    bounds,
    labels,
    heights,
    widths,
    GROUPS: tl.constexpr,
    CLASSES: tl.constexpr,
    N: tl.constexpr,
    ROW_TAPS: tl.constexpr,
    COLUMN_TAPS: tl.constexpr,
    BY: tl.constexpr,
    BX: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Write the best class of each pixel within the slice of its group, counted from the slice's first class.

    Program: a tile of BY x BX labels of an image.

    logits: pointer to (B, heights[0], widths[0], CLASSES), dense.
    groups: pointer to (B, heights[N], widths[N]) of an integer type, dense.
    bounds: pointer to int32 (GROUPS, 2), each group's first class and the class after its last.
    labels: as `groups`; written.
    GROUPS: the number of slices. Other groups, negative or larger, have no classes.
    Other arguments: as in `argmax_kernel`.
    """
    h, w, H, W = heights[0], widths[0], heights[N], widths[N]
    y, x = tl.program_id(1) * BY + tl.arange(0, BY), tl.program_id(0) * BX + tl.arange(0, BX)
    ok = (y < H)[:, None] & (x < W)[None, :]
    _, rows, row_weights = band(tl.minimum(y, H - 1), heights, N, ROW_TAPS)
    _, columns, column_weights = band(tl.minimum(x, W - 1), widths, N, COLUMN_TAPS)
    image = logits + tl.program_id(2).to(tl.int64) * h * w * CLASSES
    at = (tl.program_id(2).to(tl.int64) * H + y)[:, None] * W + x[None, :]
    group = tl.load(groups + at, mask=ok, other=0).to(tl.int64)
    known = ok & (group >= 0) & (group < GROUPS)
    first = tl.load(bounds + 2 * group, mask=known, other=0)
    length = tl.load(bounds + 2 * group + 1, mask=known, other=0) - first

    best = tl.full((BY, BX), -float("inf"), dtype=tl.float32)
    label = tl.zeros((BY, BX), dtype=tl.int32)
    for k in range(tl.max(length)):
        acc = tl.zeros((BY, BX), dtype=tl.float32)
        for i in tl.static_range(ROW_TAPS):
            for j in tl.static_range(COLUMN_TAPS):
                place = rows[i].to(tl.int64)[:, None] * w + columns[j][None, :]
                value = _finite(tl.load(image + place * CLASSES + first + k, mask=k < length, other=0.0), LIMIT)
                acc += value * (row_weights[i][:, None] * column_weights[j][None, :])
        better = (k < length) & (acc > best)
        label = tl.where(better, k, label)
        best = tl.where(better, acc, best)
    tl.store(labels + at, label.to(labels.dtype.element_ty), mask=ok)


@on_its_device
def argmax_in_slices(
    logits: torch.Tensor,
    heights: Sequence[int],
    widths: Sequence[int],
    groups: torch.Tensor,
    starts: Sequence[int],
    stops: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return labels (B, heights[-1], widths[-1]) of the best class in the slice of each pixel's group."""
    batch, classes, h, w = logits.shape
    height, width = heights[-1], widths[-1]
    labels = logits.new_empty(batch, height, width, dtype=dtype)
    if labels.numel() == 0:
        return labels
    slices = list(zip(starts, stops, strict=True))
    row_taps, column_taps = taps_of_chain([h, *heights]), taps_of_chain([w, *widths])
    if max(row_taps, column_taps) > TAPS:
        return slices_in_tiles([logits], list(zip(heights, widths, strict=True)), groups, slices, dtype)
    by, bx = 16, 32
    slice_kernel[(triton.cdiv(width, bx), triton.cdiv(height, by), batch)](
        nhwc(logits),
        groups.contiguous(),
        torch.tensor(slices, dtype=torch.int32, device=logits.device),
        labels,
        (h, *heights),
        (w, *widths),
        GROUPS=len(slices),
        CLASSES=classes,
        N=len(heights),
        ROW_TAPS=row_taps,
        COLUMN_TAPS=column_taps,
        BY=by,
        BX=bx,
        LIMIT=torch.finfo(torch.float32).max / 2,
        num_warps=8,
    )
    return labels


@torch.library.custom_op("fastuper::upsample_argmax", mutates_args=())
def upsample_argmax(
    logits: torch.Tensor, heights: Sequence[int], widths: Sequence[int], dtype: torch.dtype, first: int = 0
) -> torch.Tensor:
    """The operator of `fastuper_kernels.ops.upsample_argmax`, for the sizes zip(heights, widths)."""
    return argmax(logits, heights, widths, dtype, first)


@upsample_argmax.register_fake
def _(
    logits: torch.Tensor, heights: Sequence[int], widths: Sequence[int], dtype: torch.dtype, first: int = 0
) -> torch.Tensor:
    return logits.new_empty(logits.shape[0], heights[-1], widths[-1], dtype=dtype)


@torch.library.custom_op("fastuper::upsample_argmax_in_slices", mutates_args=())
def upsample_argmax_in_slices(
    logits: torch.Tensor,
    heights: Sequence[int],
    widths: Sequence[int],
    groups: torch.Tensor,
    starts: Sequence[int],
    stops: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The operator of `fastuper_kernels.ops.upsample_argmax` with groups, for the slices zip(starts, stops)."""
    return argmax_in_slices(logits, heights, widths, groups, starts, stops, dtype)


@upsample_argmax_in_slices.register_fake
def _(
    logits: torch.Tensor,
    heights: Sequence[int],
    widths: Sequence[int],
    groups: torch.Tensor,
    starts: Sequence[int],
    stops: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    return logits.new_empty(logits.shape[0], heights[-1], widths[-1], dtype=dtype)

"""`upsample_argmax` on a GPU: each program resamples the logits of a tile of pixels, and keeps the best class.

The classes go by in blocks. What is resampled bilinearly is a mean of the logits that it reads, so that a block none of
whose classes reaches, anywhere in what the tile reads, the largest of the classes' least values is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastuper_kernels.band import bilinear_chain_on
from fastuper_kernels.gpu.layout import nhwc, on_its_device


@triton.jit
def _finite(value, LIMIT: tl.constexpr):
    """Return numbers in the place of NaN (the largest, as argmax has it) and infinities."""
    value = value.to(tl.float32)
    return tl.where(value != value, LIMIT, tl.minimum(tl.maximum(value, -LIMIT), LIMIT))


@triton.jit
def argmax_kernel(
    logits,
    labels,
    row_first,
    row_weights,
    column_first,
    column_weights,
    h,
    w,
    H,
    W,
    CLASSES: tl.constexpr,
    ROW_TAPS: tl.constexpr,
    COLUMN_TAPS: tl.constexpr,
    BY: tl.constexpr,
    BX: tl.constexpr,
    BC: tl.constexpr,
    LIMIT: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """Write labels (B, H, W) of logits (B, h, w, CLASSES) through bands of the rows and of the columns."""
    y0, x0 = tl.program_id(1) * BY, tl.program_id(0) * BX
    i = tl.arange(0, BY * BX)
    y, x = y0 + i // BX, x0 + i % BX
    ok = (y < H) & (x < W)
    y, x = tl.minimum(y, H - 1), tl.minimum(x, W - 1)
    image = logits + tl.program_id(2).to(tl.int64) * h * w * CLASSES
    c = tl.arange(0, BC)
    first_row, first_column = tl.load(row_first + y), tl.load(column_first + x)
    # Every pixel that the tile reads.
    top, bottom = tl.min(first_row), tl.minimum(tl.max(first_row) + ROW_TAPS, h)
    left, right = tl.min(first_column), tl.minimum(tl.max(first_column) + COLUMN_TAPS, w)
    count = (bottom - top) * (right - left)

    bar = -LIMIT
    for start in range(0, CLASSES, BC):
        least = tl.full((BC,), LIMIT, dtype=tl.float32)
        for k in range(count):
            at = image + ((top + k // (right - left)) * w + left + k % (right - left)) * CLASSES
            value = _finite(tl.load(at + start + c, mask=start + c < CLASSES, other=-LIMIT), LIMIT)
            least = tl.minimum(least, value)
        bar = tl.maximum(bar, tl.max(least))

    best = tl.full((BY * BX,), -float("inf"), dtype=tl.float32)
    label = tl.zeros((BY * BX,), dtype=tl.int32)
    for start in range(0, CLASSES, BC):
        some = start + c < CLASSES
        most = -LIMIT + bar * 0
        for k in range(count):
            at = image + ((top + k // (right - left)) * w + left + k % (right - left)) * CLASSES
            value = _finite(tl.load(at + start + c, mask=some, other=-LIMIT), LIMIT)
            most = tl.maximum(most, tl.max(value))
        if most >= bar - EPSILON * tl.maximum(tl.abs(most), tl.abs(bar)):
            acc = tl.zeros((BY * BX, BC), dtype=tl.float32)
            for ky in range(ROW_TAPS):
                down = tl.load(row_weights + y * ROW_TAPS + ky)
                row = tl.minimum(first_row + ky, h - 1) * w
                for kx in range(COLUMN_TAPS):
                    along = tl.load(column_weights + x * COLUMN_TAPS + kx)
                    column = tl.minimum(first_column + kx, w - 1)
                    at = image + ((row + column) * CLASSES)[:, None] + (start + c)[None, :]
                    value = _finite(tl.load(at, mask=some[None, :], other=-LIMIT), LIMIT)
                    acc += value * (down * along)[:, None]
            acc = tl.where(some[None, :], acc, -float("inf"))
            value, place = tl.max(acc, axis=1, return_indices=True)
            label = tl.where(value > best, start + place, label)
            best = tl.maximum(best, value)
    at = (tl.program_id(2).to(tl.int64) * H + y) * W + x
    tl.store(labels + at, label.to(labels.dtype.element_ty), mask=ok)


@on_its_device
def argmax(logits: torch.Tensor, heights: Sequence[int], widths: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return labels (B, height, width) of logits (B, classes, H, W) resampled through sizes (height, width)."""
    batch, classes, h, w = logits.shape
    labels = logits.new_empty(batch, heights[-1], widths[-1], dtype=dtype)
    if labels.numel() == 0:
        return labels
    rows = bilinear_chain_on((h, *heights), logits.device)
    columns = bilinear_chain_on((w, *widths), logits.device)
    by, bx = 4, 16
    argmax_kernel[(triton.cdiv(widths[-1], bx), triton.cdiv(heights[-1], by), batch)](
        nhwc(logits),
        labels,
        rows.first,
        rows.weights,
        columns.first,
        columns.weights,
        h,
        w,
        heights[-1],
        widths[-1],
        CLASSES=classes,
        ROW_TAPS=rows.weights.shape[1],
        COLUMN_TAPS=columns.weights.shape[1],
        BY=by,
        BX=bx,
        BC=min(triton.next_power_of_2(classes), 32),
        LIMIT=torch.finfo(logits.dtype).max / 2,
        EPSILON=32 * torch.finfo(torch.float32).eps,
        num_warps=4,
    )
    return labels


@torch.library.custom_op("fastuper::upsample_argmax", mutates_args=())
def upsample_argmax(
    logits: torch.Tensor, heights: Sequence[int], widths: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """Return what the public function of this name says, for sizes (height, width)."""
    return argmax(logits, heights, widths, dtype)


@upsample_argmax.register_fake
def _(logits: torch.Tensor, heights: Sequence[int], widths: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return logits.new_empty(logits.shape[0], heights[-1], widths[-1], dtype=dtype)

"""`pyramid_pool` on a GPU: the product of the cells' weights, of all scales, with the map, in one read of the map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from fastuper_kernels.gpu.layout import from_nhwc, nhwc, on_its_device


@triton.jit
def _cells(number, SCALES: tl.constexpr):
    """Return (scale, row, column) of cells; row and column are -1 beyond the last cell, whose weights are zero.

    number: (N,) int32, numbers of cells, scale by scale, row by row.
    SCALES: a tuple of the numbers s of cells along each side.
    """
    scale = tl.zeros_like(number) + 1
    place = tl.zeros_like(number)
    start = 0
    found = number < 0
    for i in tl.static_range(len(SCALES)):
        s = SCALES[i]
        here = (number >= start) & (number < start + s * s)
        scale = tl.where(here, s, scale)
        place = tl.where(here, number - start, place)
        found = found | here
        start += s * s
    return scale, tl.where(found, place // scale, -1), tl.where(found, place % scale, -1)


@triton.jit
def _tent_integral(t):
    """Return the integral from minus infinity to t of max(0, 1 - |s|)."""
    t = tl.minimum(tl.maximum(t, -1.0), 1.0)
    return tl.where(t < 0, 0.5 * (t + 1) * (t + 1), 1 - 0.5 * (1 - t) * (1 - t))


@triton.jit
def _shares(i, part, scale, size, PRECISE: tl.constexpr):
    """Return the shares of positions in parts of an axis, not yet divided by the parts' lengths.

    i: positions of the axis.
    part: numbers of the parts, below scale; the shares in part -1 are zero.
    scale: numbers of parts of the whole axis.
    size: positions of the axis.
    PRECISE: the parts are equal, a position spreads as a tent, and its share is in float32; else the parts are whole
        positions, and the share is a boolean.
    """
    if PRECISE:
        # The edge part * size / scale, less its whole positions: float32 keeps all digits of the rest.
        low, high = part * size, (part + 1) * size
        below = (low // scale - i).to(tl.float32) + (low % scale).to(tl.float32) / scale
        above = (high // scale - i).to(tl.float32) + (high % scale).to(tl.float32) / scale
        share = tl.where(part < 0, 0.0, _tent_integral(above) - _tent_integral(below))
    else:
        share = (i >= part * size // scale) & (i < ((part + 1) * size + scale - 1) // scale) & (part >= 0)
    return share


@triton.jit
def _length(part, scale, size, PRECISE: tl.constexpr):
    """Return the lengths of parts of an axis in float32; see `_shares`."""
    if PRECISE:
        length = (part * 0 + size).to(tl.float32) / scale
    else:
        length = (((part + 1) * size + scale - 1) // scale - part * size // scale).to(tl.float32)
    return length


@triton.jit
def pool_kernel(
    x,
    out,
    H,
    W,
    C: tl.constexpr,
    CELLS: tl.constexpr,
    SCALES: tl.constexpr,
    PRECISE: tl.constexpr,
    BCELL: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Write the means of x over each cell, added up in float32.

    Program: BC channels of BCELL cells of an image; it reads all pixels of the image.

    x: pointer to (B, H, W, C), dense.
    out: pointer to (B, CELLS, C), dense; written.
    H, W: the size of the map.
    C: channels.
    CELLS: cells of all scales.
    SCALES: a tuple of the numbers s of cells along each side.
    PRECISE: the cells are those of precise RoI pooling; else those of adaptive average pooling.
    BCELL, BC: cells and channels of a program.
    BP: pixels per step.
    """
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    cell = tl.program_id(1) * BCELL + tl.arange(0, BCELL)
    b = tl.program_id(2).to(tl.int64)
    scale, row, column = _cells(cell, SCALES)
    p = tl.arange(0, BP)
    acc = tl.zeros((BCELL, BC), dtype=tl.float32)
    for first in range(0, H * W, BP):
        pixel = first + p
        down = _shares((pixel // W)[None, :], row[:, None], scale[:, None], H, PRECISE)
        across = _shares((pixel % W)[None, :], column[:, None], scale[:, None], W, PRECISE)
        at = x + ((b * H * W + pixel) * C)[:, None] + c[None, :]
        value = tl.load(at, mask=(pixel < H * W)[:, None] & (c < C)[None, :], other=0.0)
        if PRECISE:
            acc = tl.dot(down * across, value.to(tl.float32), acc, input_precision="ieee")
        else:
            # Zeros and ones are exact in every dtype: nothing is rounded before the sum. (Through float32: Triton's
            # interpreter casts booleans to the bits of bfloat16 as if these were integers.)
            inside = (down & across).to(tl.float32).to(value.dtype)
            acc = tl.dot(inside, value, acc, input_precision="ieee")
    area = _length(row, scale, H, PRECISE) * _length(column, scale, W, PRECISE)
    at = out + ((b * CELLS + cell) * C)[:, None] + c[None, :]
    value = acc / tl.where(row < 0, 1.0, area)[:, None]
    tl.store(at, value.to(out.dtype.element_ty), mask=(cell < CELLS)[:, None] & (c < C)[None, :])


@triton.jit
def pool_backward_kernel(
    grad,
    out,
    H,
    W,
    C: tl.constexpr,
    CELLS: tl.constexpr,
    SCALES: tl.constexpr,
    PRECISE: tl.constexpr,
    BCELL: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Write the map's gradient: for each pixel the sum over the cells of its share of the cell's gradient / area.

    Program: BC channels of BP pixels of an image; it reads all cells of the image.

    grad: pointer to (B, CELLS, C), dense.
    out: pointer to (B, H, W, C), dense; written.
    H, W: the size of the map.
    C: channels.
    CELLS: cells of all scales.
    SCALES: a tuple of the numbers s of cells along each side.
    PRECISE: as for `pool_kernel`.
    BCELL: cells per step.
    BP, BC: pixels and channels of a program.
    """
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    pixel = tl.program_id(1) * BP + tl.arange(0, BP)
    b = tl.program_id(2).to(tl.int64)
    acc = tl.zeros((BP, BC), dtype=tl.float32)
    for first in range(0, CELLS, BCELL):
        cell = first + tl.arange(0, BCELL)
        scale, row, column = _cells(cell, SCALES)
        down = _shares((pixel // W)[:, None], row[None, :], scale[None, :], H, PRECISE)
        across = _shares((pixel % W)[:, None], column[None, :], scale[None, :], W, PRECISE)
        area = tl.where(row < 0, 1.0, _length(row, scale, H, PRECISE) * _length(column, scale, W, PRECISE))
        at = grad + ((b * CELLS + cell) * C)[:, None] + c[None, :]
        value = tl.load(at, mask=(cell < CELLS)[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
        share = down * across if PRECISE else (down & across).to(tl.float32)
        acc = tl.dot(share, value / area[:, None], acc, input_precision="ieee")
    at = out + ((b * H * W + pixel) * C)[:, None] + c[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(pixel < H * W)[:, None] & (c < C)[None, :])


@on_its_device
def pool(x: torch.Tensor, scales: Sequence[int], pooling: str) -> torch.Tensor:
    """Return the means (B, cells, C) of x (B, C, H, W) over the cells of each scale."""
    batch, channels, height, width = x.shape
    cells = sum(scale * scale for scale in scales)
    out = x.new_empty(batch, cells, channels)
    if out.numel() == 0:
        return out
    grid = (triton.cdiv(channels, 32), triton.cdiv(cells, 64), batch)
    # IEEE float32 products do not use tensor cores: their operands are in registers.
    pixels = 16 if x.dtype == torch.float32 or pooling == "precise_roi" else 64
    pool_kernel[grid](
        nhwc(x), out, height, width,
        C=channels, CELLS=cells, SCALES=tuple(scales), PRECISE=pooling == "precise_roi",
        BCELL=64, BP=pixels, BC=32, num_warps=4,
    )  # fmt: skip
    return out


@torch.library.custom_op("fastuper::pyramid_pool", mutates_args=())
def pyramid_pool(x: torch.Tensor, scales: Sequence[int], pooling: str) -> torch.Tensor:
    """The operator of `fastuper_kernels.ops.pyramid_pool`."""
    return pool(x, scales, pooling)


@pyramid_pool.register_fake
def _(x: torch.Tensor, scales: Sequence[int], pooling: str) -> torch.Tensor:
    return x.new_empty(x.shape[0], sum(scale * scale for scale in scales), x.shape[1])


@on_its_device
def pool_backward(grad: torch.Tensor, scales: Sequence[int], pooling: str, height: int, width: int) -> torch.Tensor:
    """Return the map's gradient (B, C, height, width) in channels_last memory, from the cells' (B, cells, C)."""
    batch, cells, channels = grad.shape
    out = grad.new_empty(batch, height, width, channels)
    if out.numel() == 0:
        return from_nhwc(out)
    grid = (triton.cdiv(channels, 32), triton.cdiv(height * width, 64), batch)
    pool_backward_kernel[grid](
        grad.contiguous(), out, height, width,
        C=channels, CELLS=cells, SCALES=tuple(scales), PRECISE=pooling == "precise_roi",
        BCELL=64, BP=64, BC=32, num_warps=4,
    )  # fmt: skip
    return from_nhwc(out)


@torch.library.custom_op("fastuper::pyramid_pool_backward", mutates_args=())
def pyramid_pool_backward(
    grad: torch.Tensor, scales: Sequence[int], pooling: str, height: int, width: int
) -> torch.Tensor:
    """The operator of `pyramid_pool`'s backward pass; see `pool_backward`."""
    return pool_backward(grad, scales, pooling, height, width)


@pyramid_pool_backward.register_fake
def _(grad: torch.Tensor, scales: Sequence[int], pooling: str, height: int, width: int) -> torch.Tensor:
    return from_nhwc(grad.new_empty(grad.shape[0], height, width, grad.shape[2]))


def _save_size(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, ctx.scales, ctx.pooling = inputs
    ctx.size = x.shape[2:]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return pyramid_pool_backward(grad, ctx.scales, ctx.pooling, *ctx.size), None, None


def _save_scales(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, ctx.scales, ctx.pooling, *_ = inputs


def _double_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
    return pyramid_pool(grad, ctx.scales, ctx.pooling), None, None, None, None


pyramid_pool.register_autograd(_backward, setup_context=_save_size)
pyramid_pool_backward.register_autograd(_double_backward, setup_context=_save_scales)

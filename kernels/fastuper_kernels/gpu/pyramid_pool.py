"""`pyramid_pool` on a GPU: the product of the cells' masks, of all scales, with the map, in one read of the map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from fastuper_kernels.gpu.layout import from_nhwc, nhwc, on_its_device


@triton.jit
def _edges(cell, H, W, SCALES: tl.constexpr):
    """Return (top, bottom, left, right) of cells: rows [top, bottom) and columns [left, right).

    cell: (N,) int32, numbers of cells, scale by scale, row by row. A number beyond the last cell has no pixels.
    H, W: the size of the map.
    SCALES: a tuple of the numbers s of cells along each side.
    """
    scale = tl.zeros_like(cell) + 1
    place = tl.zeros_like(cell)
    start = 0
    found = cell < 0
    for i in tl.static_range(len(SCALES)):
        s = SCALES[i]
        here = (cell >= start) & (cell < start + s * s)
        scale = tl.where(here, s, scale)
        place = tl.where(here, cell - start, place)
        found = found | here
        start += s * s
    row, column = place // scale, place % scale
    top, left = row * H // scale, column * W // scale
    bottom, right = ((row + 1) * H + scale - 1) // scale, ((column + 1) * W + scale - 1) // scale
    return top, tl.where(found, bottom, top), left, tl.where(found, right, left)


@triton.jit
def pool_kernel(
    x,
    out,
    H,
    W,
    C: tl.constexpr,
    CELLS: tl.constexpr,
    SCALES: tl.constexpr,
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
    BCELL, BC: cells and channels of a program.
    BP: pixels per step.
    """
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    cell = tl.program_id(1) * BCELL + tl.arange(0, BCELL)
    b = tl.program_id(2).to(tl.int64)
    top, bottom, left, right = _edges(cell, H, W, SCALES)
    p = tl.arange(0, BP)
    acc = tl.zeros((BCELL, BC), dtype=tl.float32)
    for first in range(0, H * W, BP):
        pixel = first + p
        y, column = (pixel // W)[None, :], (pixel % W)[None, :]
        inside = (y >= top[:, None]) & (y < bottom[:, None]) & (column >= left[:, None]) & (column < right[:, None])
        at = x + ((b * H * W + pixel) * C)[:, None] + c[None, :]
        value = tl.load(at, mask=(pixel < H * W)[:, None] & (c < C)[None, :], other=0.0)
        # Zeros and ones are exact in every dtype: nothing is rounded before the sum. (Through float32: Triton's
        # interpreter casts booleans to the bits of bfloat16 as if these were integers.)
        acc = tl.dot(inside.to(tl.float32).to(value.dtype), value, acc, input_precision="ieee")
    area = tl.maximum((bottom - top) * (right - left), 1).to(tl.float32)
    at = out + ((b * CELLS + cell) * C)[:, None] + c[None, :]
    tl.store(at, (acc / area[:, None]).to(out.dtype.element_ty), mask=(cell < CELLS)[:, None] & (c < C)[None, :])


@triton.jit
def pool_backward_kernel(
    grad,
    out,
    H,
    W,
    C: tl.constexpr,
    CELLS: tl.constexpr,
    SCALES: tl.constexpr,
    BCELL: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Write the map's gradient: for each pixel the sum over its cells of the cell's gradient / the cell's area.

    Program: BC channels of BP pixels of an image; it reads all cells of the image.

    grad: pointer to (B, CELLS, C), dense.
    out: pointer to (B, H, W, C), dense; written.
    H, W: the size of the map.
    C: channels.
    CELLS: cells of all scales.
    SCALES: a tuple of the numbers s of cells along each side.
    BCELL: cells per step.
    BP, BC: pixels and channels of a program.
    """
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    pixel = tl.program_id(1) * BP + tl.arange(0, BP)
    b = tl.program_id(2).to(tl.int64)
    y, column = (pixel // W)[:, None], (pixel % W)[:, None]
    acc = tl.zeros((BP, BC), dtype=tl.float32)
    for first in range(0, CELLS, BCELL):
        cell = first + tl.arange(0, BCELL)
        top, bottom, left, right = _edges(cell, H, W, SCALES)
        inside = (y >= top[None, :]) & (y < bottom[None, :]) & (column >= left[None, :]) & (column < right[None, :])
        area = tl.maximum((bottom - top) * (right - left), 1).to(tl.float32)
        at = grad + ((b * CELLS + cell) * C)[:, None] + c[None, :]
        value = tl.load(at, mask=(cell < CELLS)[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
        acc = tl.dot(inside.to(tl.float32), value / area[:, None], acc, input_precision="ieee")
    at = out + ((b * H * W + pixel) * C)[:, None] + c[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(pixel < H * W)[:, None] & (c < C)[None, :])


@on_its_device
def pool(x: torch.Tensor, scales: Sequence[int]) -> torch.Tensor:
    """Return the means (B, cells, C) of x (B, C, H, W) over the cells of each scale."""
    batch, channels, height, width = x.shape
    cells = sum(scale * scale for scale in scales)
    out = x.new_empty(batch, cells, channels)
    if out.numel() == 0:
        return out
    grid = (triton.cdiv(channels, 32), triton.cdiv(cells, 64), batch)
    # IEEE float32 products do not use tensor cores: their operands are in registers.
    pixels = 16 if x.dtype == torch.float32 else 64
    pool_kernel[grid](
        nhwc(x), out, height, width,
        C=channels, CELLS=cells, SCALES=tuple(scales), BCELL=64, BP=pixels, BC=32, num_warps=4,
    )  # fmt: skip
    return out


@torch.library.custom_op("fastuper::pyramid_pool", mutates_args=())
def pyramid_pool(x: torch.Tensor, scales: Sequence[int]) -> torch.Tensor:
    """The operator of `fastuper_kernels.ops.pyramid_pool`."""
    return pool(x, scales)


@pyramid_pool.register_fake
def _(x: torch.Tensor, scales: Sequence[int]) -> torch.Tensor:
    return x.new_empty(x.shape[0], sum(scale * scale for scale in scales), x.shape[1])


@on_its_device
def pool_backward(grad: torch.Tensor, scales: Sequence[int], height: int, width: int) -> torch.Tensor:
    """Return the map's gradient (B, C, height, width) in channels_last memory, from the cells' (B, cells, C)."""
    batch, cells, channels = grad.shape
    out = grad.new_empty(batch, height, width, channels)
    if out.numel() == 0:
        return from_nhwc(out)
    grid = (triton.cdiv(channels, 32), triton.cdiv(height * width, 64), batch)
    pool_backward_kernel[grid](
        grad.contiguous(), out, height, width,
        C=channels, CELLS=cells, SCALES=tuple(scales), BCELL=64, BP=64, BC=32, num_warps=4,
    )  # fmt: skip
    return from_nhwc(out)


@torch.library.custom_op("fastuper::pyramid_pool_backward", mutates_args=())
def pyramid_pool_backward(grad: torch.Tensor, scales: Sequence[int], height: int, width: int) -> torch.Tensor:
    """The operator of `pyramid_pool`'s backward pass; see `pool_backward`."""
    return pool_backward(grad, scales, height, width)


@pyramid_pool_backward.register_fake
def _(grad: torch.Tensor, scales: Sequence[int], height: int, width: int) -> torch.Tensor:
    return from_nhwc(grad.new_empty(grad.shape[0], height, width, grad.shape[2]))


def _save_size(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, ctx.scales = inputs
    ctx.size = x.shape[2:]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    return pyramid_pool_backward(grad, ctx.scales, *ctx.size), None


def _save_scales(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.scales = inputs[1]


def _double_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    return pyramid_pool(grad, ctx.scales), None, None, None


pyramid_pool.register_autograd(_backward, setup_context=_save_size)
pyramid_pool_backward.register_autograd(_double_backward, setup_context=_save_scales)

"""`pyramid_pool` on a GPU: the cells of all scales as one product of their masks with the map, in one read of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from fastuper_kernels.gpu.layout import from_nhwc, nhwc, on_its_device


@triton.jit
def _edges(cell, H, W, SCALES: tl.constexpr):
    """Return (first row, end, first column, end) of cells, numbered scale by scale; none has pixels beyond the last."""
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
    """Write out (B, CELLS, C): the means of x (B, H, W, C) over each cell, added up in float32."""
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
        # Zeros and ones are exact in every dtype, so that nothing is rounded before it is added up. (By way of float32:
        # the interpreter makes integers of bfloat16 otherwise.)
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
    """Write out (B, H, W, C): each pixel's share of the gradient (B, CELLS, C) of the cells that it is in."""
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
    """Return the cells (B, cells, C) of x (B, C, H, W)."""
    batch, channels, height, width = x.shape
    cells = sum(scale * scale for scale in scales)
    out = x.new_empty(batch, cells, channels)
    if out.numel() == 0:
        return out
    grid = (triton.cdiv(channels, 32), triton.cdiv(cells, 64), batch)
    # Float32 goes without tensor cores, through registers.
    pixels = 16 if x.dtype == torch.float32 else 64
    pool_kernel[grid](
        nhwc(x), out, height, width,
        C=channels, CELLS=cells, SCALES=tuple(scales), BCELL=64, BP=pixels, BC=32, num_warps=4,
    )  # fmt: skip
    return out


@torch.library.custom_op("fastuper::pyramid_pool", mutates_args=())
def pyramid_pool(x: torch.Tensor, scales: Sequence[int]) -> torch.Tensor:
    """Return what the public function of this name says."""
    return pool(x, scales)


@pyramid_pool.register_fake
def _(x: torch.Tensor, scales: Sequence[int]) -> torch.Tensor:
    return x.new_empty(x.shape[0], sum(scale * scale for scale in scales), x.shape[1])


@on_its_device
def pool_backward(grad: torch.Tensor, scales: Sequence[int], height: int, width: int) -> torch.Tensor:
    """Return the gradient (B, C, height, width) of a map for that of its cells (B, cells, C)."""
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
    """Return the gradient of `pyramid_pool`'s map."""
    return pool_backward(grad, scales, height, width)


@pyramid_pool_backward.register_fake
def _(grad: torch.Tensor, scales: Sequence[int], height: int, width: int) -> torch.Tensor:
    return from_nhwc(grad.new_empty(grad.shape[0], height, width, grad.shape[2]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, ctx.scales = inputs
    ctx.size = x.shape[2:]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    return pyramid_pool_backward(grad, ctx.scales, *ctx.size), None


def _keep_scales(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.scales = inputs[1]


def _backward_twice(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    return pyramid_pool(grad, ctx.scales), None, None, None


pyramid_pool.register_autograd(_backward, setup_context=_keep)
pyramid_pool_backward.register_autograd(_backward_twice, setup_context=_keep_scales)

"""Bands applied to maps, a few rows or columns at a time, by small dense matrices."""

from __future__ import annotations

from typing import Any

import torch

from fastuper_kernels.cpu.band import Band, blocks_of, inputs_of
from fastuper_kernels.dispatch.modes import is_eager, without_autocast
from fastuper_kernels.dispatch.torch_private import is_batched


def apply(x: torch.Tensor, kind: Any, sizes: tuple[int, ...]) -> torch.Tensor:
    """Apply the band `kind(*sizes)` to the middle axis of x (A, n, B), with gradients: -> (A, m, B)."""
    return _apply(x, kind, sizes, False)


def _apply(x: torch.Tensor, kind: Any, sizes: tuple[int, ...], transposed: bool) -> torch.Tensor:
    # A backward pass may be transformed although the forward pass was not: for several gradients at once, say.
    if is_eager() and not is_batched(x):
        result: torch.Tensor = _Apply.apply(x, kind, sizes, transposed)
        return result
    band = kind(*sizes)
    return (band.T if transposed else band).gather(x, 1)


class _Apply(torch.autograd.Function):
    """A linear map: its backward pass is the transpose, and needs no saved tensor."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kind: Any, sizes: tuple[int, ...], transposed: bool) -> torch.Tensor:
        ctx.kind, ctx.sizes, ctx.transposed = kind, sizes, transposed
        blocks = blocks_of(kind, sizes, x.dtype, x.device, transposed)
        x = x.contiguous()
        out = x.new_empty(x.shape[0], blocks[-1].stop, x.shape[2])
        with without_autocast(x):
            for block in blocks:
                source, target = x[:, block.first : block.last], out[:, block.start : block.stop]
                if len(x) == 1:
                    torch.mm(block.matrix, source[0], out=target[0])
                else:
                    target.copy_(torch.matmul(block.matrix, source))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        return _apply(grads[0], ctx.kind, ctx.sizes, not ctx.transposed), None, None, None


def columns(x: torch.Tensor, kind: Any, sizes: tuple[int, int]) -> torch.Tensor:
    """Apply the band `kind(*sizes)` to the middle axis of x (H, n, C), without gradients: -> (H, m, C)."""
    out = x.new_empty(x.shape[0], sizes[1], x.shape[2])
    for block in blocks_of(kind, sizes, x.dtype, x.device):
        out[:, block.start : block.stop] = torch.matmul(block.matrix, x[:, block.first : block.last])
    return out


def add_rows_(
    out: torch.Tensor, x: torch.Tensor, kind: Any, sizes: tuple[int, int], start: int, first: int, beta: float = 1.0
) -> None:
    """Set `out` to beta * out + rows [start, start + len(out)) of the band `kind(*sizes)` applied to the rows of x.

    Args:
        out: (H, ...), contiguous; changed in place.
        x: (n, ...), contiguous: input rows [first, first + n).
        kind: makes the band.
        sizes: (input rows, output rows) of the whole map.
        start: the output row that out[0] is.
        first: the input row that x[0] is.
        beta: 0 to overwrite `out`.
    """
    x, flat = x.flatten(1), out.flatten(1)
    for block in blocks_of(kind, sizes, x.dtype, x.device):
        i, j = max(block.start, start), min(block.stop, start + len(out))
        # Input rows of the block outside x belong to output rows outside [start, start + len(out)).
        a, b = max(block.first, first), min(block.last, first + len(x))
        if i < j:
            matrix = block.matrix[i - block.start : j - block.start, a - block.first : b - block.first]
            flat[i - start : j - start].addmm_(matrix, x[a - first : b - first], beta=beta)


def add_upsampled_(y: torch.Tensor, coarser: torch.Tensor, strip: tuple[int, int, int]) -> None:
    """Resample a coarser map to (height, W) and add its rows [start, stop) to y.

    Args:
        y: (B, C, stop - start, W) in channels_last memory; changed in place.
        coarser: (B, C, h, w).
        strip: (start, stop, height).
    """
    start, stop, height = strip
    sizes = (coarser.shape[2], height)
    first, last = inputs_of(Band.bilinear, sizes, start, stop)
    for target, source in zip(y.permute(0, 2, 3, 1), coarser.permute(0, 2, 3, 1), strict=True):
        wide = columns(source[first:last], Band.bilinear, (source.shape[1], target.shape[1]))
        add_rows_(target, wide, Band.bilinear, sizes, start, first)

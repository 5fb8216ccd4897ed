"""Bands applied to maps on a CPU, a few rows or columns at a time, each by a small dense matrix."""

from __future__ import annotations

from typing import Any

import torch

from fastuper_kernels.cpu.band import Band, blocks_of, inputs_of
from fastuper_kernels.dispatch.modes import is_eager, without_autocast


def apply(x: torch.Tensor, kind: Any, sizes: tuple[int, ...]) -> torch.Tensor:
    """Apply the band `kind(*sizes)` to the middle axis of x (A, n, B), with gradients: -> (A, m, B)."""
    return _apply(x, kind, sizes, False)


def _apply(x: torch.Tensor, kind: Any, sizes: tuple[int, ...], transposed: bool) -> torch.Tensor:
    # A backward pass may be transformed where the forward pass was not: several gradients at once, say.
    if is_eager() and not torch._C._functorch.is_legacy_batchedtensor(x):
        result: torch.Tensor = _Apply.apply(x, kind, sizes, transposed)
        return result
    band = kind(*sizes)
    return (band.T if transposed else band).gather(x, 1)


class _Apply(torch.autograd.Function):
    """A linear map: what goes back is its transpose, and nothing is kept for it."""

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
    """Apply a band along the columns of x (rows, n, C), without gradients: -> (rows, m, C)."""
    out = x.new_empty(x.shape[0], sizes[1], x.shape[2])
    for block in blocks_of(kind, sizes, x.dtype, x.device):
        out[:, block.start : block.stop] = torch.matmul(block.matrix, x[:, block.first : block.last])
    return out


def add_rows_(
    out: torch.Tensor, x: torch.Tensor, kind: Any, sizes: tuple[int, int], start: int, first: int, beta: float = 1.0
) -> None:
    """Add a band's rows, of which `out` holds those from `start` on, to beta times what `out` holds.

    Args:
        out: (rows, ...), contiguous.
        x: (n, ...), contiguous, input rows from `first` on.
        kind: the band is `kind(*sizes)`.
        sizes: of the whole axis.
        start: which row of the band the first of `out` is.
        first: which input row the first of x is.
        beta: 0 where what `out` holds is to be overwritten.
    """
    x, flat = x.flatten(1), out.flatten(1)
    for block in blocks_of(kind, sizes, x.dtype, x.device):
        i, j = max(block.start, start), min(block.stop, start + len(out))
        # Beyond what x holds there are rows that only outputs of this block need that are not asked for.
        a, b = max(block.first, first), min(block.last, first + len(x))
        if i < j:
            matrix = block.matrix[i - block.start : j - block.start, a - block.first : b - block.first]
            flat[i - start : j - start].addmm_(matrix, x[a - first : b - first], beta=beta)


def add_upsampled_(y: torch.Tensor, coarser: torch.Tensor, rows: tuple[int, int, int]) -> None:
    """Add rows [start, stop) of a coarser map, resampled to (height, y's width), to y.

    Args:
        y: (B, C, stop - start, W) in channels_last memory; changed in place.
        coarser: (B, C, h, w).
        rows: (start, stop, height).
    """
    start, stop, height = rows
    sizes = (coarser.shape[2], height)
    first, last = inputs_of(Band.bilinear, sizes, start, stop)
    for target, source in zip(y.permute(0, 2, 3, 1), coarser.permute(0, 2, 3, 1), strict=True):
        wide = columns(source[first:last], Band.bilinear, (source.shape[1], target.shape[1]))
        add_rows_(target, wide, Band.bilinear, sizes, start, first)

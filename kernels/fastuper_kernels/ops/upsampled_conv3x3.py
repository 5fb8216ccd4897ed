"""3x3 convolutions of resampled maps, with every product of channels at the maps' own resolution.

A convolution is a sum over its taps of "shift the grid, then mix channels", and resampling acts on each channel alone,
so the two change places: `conv3x3(R x) = sum_t S_t R (W_t x)`, S_t being the shift by tap t with zero padding. For a
map f times smaller in each direction that is f * f times fewer multiplications, and R x never exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from fastuper_kernels.cpu.band import BLOCK, bilinear_tap, bilinear_taps, blocks_of
from fastuper_kernels.cpu.linear import linear
from fastuper_kernels.cpu.packs import packed
from fastuper_kernels.cpu.resample import apply
from fastuper_kernels.dispatch.backend import takes_triton
from fastuper_kernels.dispatch.modes import (
    autocast,
    check_dtypes,
    is_eager,
    is_eager_inference,
    is_ordinary,
    without_autocast,
)

# Positions whose products are computed at a time: enough for a GEMM at full rate; 5 MB of float32 for 512 channels.
CHUNK_POSITIONS = 256
# Columns of the result that are made at a time, of BLOCK rows: 1 MB for 512 channels.
COLUMNS = 32


def upsampled_conv3x3(
    levels: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    size: tuple[int, int],
    *,
    strip: tuple[int, int] | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Return `sum_l conv3x3(bilinear(levels[l] to size), weights[l])`, zero padding, align_corners=False.

    Args:
        levels: maps (B, C_l, H_l, W_l) of any sizes, smaller or larger than `size`.
        weights: (C_out, C_l, 3, 3) for each level; slices of one weight will do.
        size: (H, W) of the result.
        strip: (start, stop): compute these rows of the result alone.
        backend: "auto", "triton" or "torch"; see `fastuper_kernels.dispatch.backend`.

    Returns:
        (B, C_out, H, W), or with `strip` (B, C_out, stop - start, W), of the levels' dtype (under autocast: of its
        dtype). In channels_last memory; where something traces, as PyTorch's own convolution leaves it.

    Raises:
        ValueError: no levels, shapes that do not fit, empty maps, several dtypes, or a backend that cannot take them.
    """
    _check(levels, weights, size, strip)
    levels = autocast(*levels)
    start, stop = (0, size[0]) if strip is None else strip
    if takes_triton(backend, *levels, *weights):
        from fastuper_kernels.gpu.upsampled_conv3x3 import upsampled_conv3x3 as kernel

        whole: torch.Tensor = kernel(list(levels), list(autocast(*weights)), *size)
        return whole if strip is None else whole[:, :, start:stop]
    if levels[0].device.type == "cpu" and is_eager_inference(*levels, *weights):
        return UpsampledConv3x3(levels, weights, size, stop).rows(start, stop)
    weights = autocast(*weights)
    if is_eager() and not is_ordinary(*levels, *weights):
        return reference(levels, weights, size)[:, :, start:stop]
    total = None
    for level, weight in zip(levels, weights, strict=True):
        part = _eager(level, weight, size) if is_eager() else _traced(level, weight, size)
        total = part if total is None else total + part
    assert total is not None
    return total if strip is None else total[:, :, start:stop]


def reference(levels: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    """The definition of `upsampled_conv3x3`: what everyone else computes, one level at a time."""
    total = None
    for level, weight in zip(levels, weights, strict=True):
        part = F.conv2d(F.interpolate(level, size=size, mode="bilinear", align_corners=False), weight, padding=1)
        total = part if total is None else total + part
    assert total is not None
    return total


def _check(
    levels: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    size: tuple[int, int],
    strip: tuple[int, int] | None,
) -> None:
    if not levels or len(levels) != len(weights):
        raise ValueError(f"there must be a weight for each level, and one at least: {len(levels)} and {len(weights)}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be a positive (height, width), got {tuple(size)}")
    batch, channels = levels[0].shape[0], weights[0].shape[0]
    for level, weight in zip(levels, weights, strict=True):
        fits = level.ndim == 4 and level.shape[0] == batch and weight.shape == (channels, level.shape[1], 3, 3)
        if not fits or min(level.shape[2:]) < 1:
            raise ValueError(
                f"levels must be ({batch}, C, h, w) and weights ({channels}, C, 3, 3), "
                f"got {tuple(level.shape)} and {tuple(weight.shape)}"
            )
    named = {f"{name}[{i}]": t for name, ts in (("levels", levels), ("weights", weights)) for i, t in enumerate(ts)}
    check_dtypes(**named)
    if strip is not None and not 0 <= strip[0] < strip[1] <= size[0]:
        raise ValueError(f"strip {strip} is not (start, stop) of rows of a map of size {tuple(size)}")


def _taps(weight: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return, for each row of taps, the matrix (3 C_out, C) of its three: the channels' products of every tap."""
    taps = weight.to(dtype).permute(2, 3, 0, 1).flatten(1, 2)
    return [taps[y].clone(memory_format=torch.contiguous_format) for y in range(3)]


def _traced(level: torch.Tensor, weight: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The identity in a few of PyTorch's operators, so that a graph stays small: the columns' taps, then the rows'."""
    channels = weight.shape[0]
    lines = []
    for x in range(3):
        taps = weight[:, :, :, x].permute(2, 0, 1).flatten(0, 1)  # those of a row of taps together
        products = F.conv2d(level, taps[:, :, None, None])
        wide = F.interpolate(products, size=(level.shape[2], size[1]), mode="bilinear", align_corners=False)
        lines.append(F.pad(wide, (1 - x, x - 1)))
    line = lines[0] + lines[1] + lines[2]
    sums = []
    for y, part in enumerate(line.split(channels, dim=1)):
        tall = F.interpolate(part, size=size, mode="bilinear", align_corners=False)
        sums.append(F.pad(tall, (0, 0, 1 - y, y - 1)))
    return sums[0] + sums[1] + sums[2]


def _eager(level: torch.Tensor, weight: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The identity with gradients: what is kept for the backward pass is the level and the weight."""
    (batch, _, h, w), (height, width), channels = level.shape, size, weight.shape[0]
    flat = level.permute(0, 2, 3, 1).reshape(batch * h * w, level.shape[1])
    total = None
    for y, taps in enumerate(_taps(weight, level.dtype)):
        products = F.linear(flat, taps).view(batch, h, w * 3 * channels)
        part = apply(products, bilinear_tap, (h, height, y - 1))
        total = part if total is None else total + part
    assert total is not None
    out = apply(total.view(batch * height, w * 3, channels), bilinear_taps, (w, width))
    return out.view(batch, height, width, channels).permute(0, 3, 1, 2)


class UpsampledConv3x3:
    """`upsampled_conv3x3` for inference on a CPU, some rows after others: each level's products are computed once.

    Args:
        levels: see `upsampled_conv3x3`; of one dtype.
        weights: see there.
        size: (H, W) of the whole result.
        stop: no row from this one on will be asked for.
    """

    def __init__(
        self,
        levels: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        size: tuple[int, int],
        stop: int | None = None,
    ):
        self.like, self.size, self.channels = levels[0], size, weights[0].shape[0]
        packs = [packed(weight, _taps, self.like.dtype) for weight in weights]
        self.images = [
            [
                _Products(level[image].permute(1, 2, 0), pack, size, size[0] if stop is None else stop)
                for level, pack in zip(levels, packs, strict=True)
            ]
            for image in range(len(self.like))
        ]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of the result, (B, C_out, stop - start, W) in channels_last; calls go down."""
        out = self.like.new_empty(len(self.images), stop - start, self.size[1], self.channels)
        with without_autocast(out):
            for result, products in zip(out, self.images, strict=True):
                self._fill(result, products, start, stop)
        return out.permute(0, 3, 1, 2)

    def _fill(self, result: torch.Tensor, products: list[_Products], start: int, stop: int) -> None:
        for low in range(start // BLOCK * BLOCK, stop, BLOCK):
            high = min(low + BLOCK, stop)
            low = max(low, start)
            for product in products:
                product.compute(low, high)
            for left in range(0, self.size[1], COLUMNS):
                right = min(left + COLUMNS, self.size[1])
                # Added up where it stays in a core's own cache, and rounded once.
                block = result.new_empty(high - low, right - left, self.channels, dtype=products[0].dtype)
                for i, product in enumerate(products):
                    product.add_to(block, low, left, beta=float(i > 0))
                result[low - start : high - start, left:right] = block


class _Products:
    """The products of a level's channels with the nine taps, a few rows of the level at a time.

    Args:
        x: the level, (H, W, C).
        taps: three matrices (3 C_out, C), from `_taps`.
        size: (H, W) of the result.
        stop: which of its rows comes last.
    """

    def __init__(self, x: torch.Tensor, taps: list[torch.Tensor], size: tuple[int, int], stop: int):
        self.x, self.taps = x, taps
        self.dtype = torch.promote_types(x.dtype, torch.float32)  # what narrower products are resampled in
        height, width = x.shape[:2]
        kind = (self.dtype, x.device)
        self.rows = [blocks_of(bilinear_tap, (height, size[0], tap), *kind) for tap in (-1, 0, 1)]
        self.columns = blocks_of(bilinear_taps, (width, size[1]), *kind, size=COLUMNS)
        self.limit = max(blocks[(stop - 1) // BLOCK].last for blocks in self.rows)
        self.channels = taps[0].shape[0] // 3
        self.chunks: list[_Chunk] = []

    def add_to(self, block: torch.Tensor, start: int, left: int, beta: float) -> None:
        """Add a block of the result to beta times what `block` holds: the rows' three taps first, then the columns'.

        Args:
            block: (rows, columns, C_out), from row `start` and column `left` on, inside one block of either band.
            start: see there.
            left: see there.
            beta: 0 where what is there is to be overwritten.
        """
        column = self.columns[left // COLUMNS]
        inputs = slice(column.first * self.channels, column.last * self.channels)
        lines = block.new_empty(len(block), (column.last - column.first) * self.channels)
        lines_beta = 0.0
        for y, blocks in enumerate(self.rows):
            row = blocks[start // BLOCK]
            matrix = row.matrix[start - row.start : start - row.start + len(block)]
            for chunk in self.chunks:
                a, b = max(chunk.start, row.first), min(chunk.stop, row.last)
                if a < b:
                    source = chunk.products[y][a - chunk.start : b - chunk.start, inputs]
                    lines.addmm_(matrix[:, a - row.first : b - row.first], source, beta=lines_beta)
                    lines_beta = 1.0
        lines = lines.view(len(block), -1, self.channels)
        block.baddbmm_(column.matrix.expand(len(block), -1, -1), lines, beta=beta)

    def compute(self, start: int, stop: int) -> None:
        """Hold what rows [start, stop) of the result read, and forget what only those before did."""
        needed = [blocks[start // BLOCK] for blocks in self.rows]
        first, last = min(row.first for row in needed), max(row.last for row in needed)
        done = self.chunks[-1].stop if self.chunks else first
        self.chunks = [chunk for chunk in self.chunks if chunk.stop > first]
        while done < min(last, self.limit):
            rows = self.x[done : min(done + max(1, CHUNK_POSITIONS // self.x.shape[1]), self.limit)]
            flat = rows.reshape(-1, rows.shape[2])
            products = [linear(flat, taps).to(self.dtype).view(len(rows), -1) for taps in self.taps]
            self.chunks.append(_Chunk(done, done + len(rows), products))
            done += len(rows)


class _Chunk(NamedTuple):
    """Rows [start, stop) of a level's products, for each row of taps (rows, W * 3 * C_out)."""

    start: int
    stop: int
    products: list[torch.Tensor]

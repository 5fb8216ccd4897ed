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

from fastuper_kernels.band import BLOCK, Block, bilinear_tap, bilinear_taps, blocks_of
from fastuper_kernels.linear import linear
from fastuper_kernels.modes import autocast, check_dtypes, is_eager, is_eager_inference, is_plain, without_autocast
from fastuper_kernels.packs import packed
from fastuper_kernels.resample import apply

# Positions whose products are computed at a time: enough for a GEMM at full rate; 19 MB of float32 for 512 channels.
CHUNK_POSITIONS = 1024


def upsampled_conv3x3(
    levels: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    size: tuple[int, int],
    *,
    rows: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Return `sum_l conv3x3(bilinear(levels[l] to size), weights[l])`, zero padding, align_corners=False.

    Args:
        levels: maps (B, C_l, H_l, W_l) of any sizes, smaller or larger than `size`.
        weights: (C_out, C_l, 3, 3) for each level; slices of one weight will do.
        size: (H, W) of the result.
        rows: (start, stop): compute these rows of the result alone.

    Returns:
        (B, C_out, H, W), or with `rows` (B, C_out, stop - start, W), of the levels' dtype (under autocast: of its
        dtype). In channels_last memory; where something traces, as PyTorch's own convolution leaves it.

    Raises:
        ValueError: no levels, shapes that do not fit, empty maps, or several dtypes.
    """
    _check(levels, weights, size, rows)
    levels = autocast(*levels)
    start, stop = (0, size[0]) if rows is None else rows
    if levels[0].device.type == "cpu" and is_eager_inference(*levels, *weights):
        with without_autocast(levels[0]):
            return _inference(levels, weights, size, start, stop)
    weights = autocast(*weights)
    if is_eager() and not is_plain(*levels, *weights):
        return reference(levels, weights, size)[:, :, start:stop]
    total = None
    for level, weight in zip(levels, weights, strict=True):
        part = _eager(level, weight, size) if is_eager() else _traced(level, weight, size)
        total = part if total is None else total + part
    assert total is not None
    return total if rows is None else total[:, :, start:stop]


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
    rows: tuple[int, int] | None,
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
    if rows is not None and not 0 <= rows[0] < rows[1] <= size[0]:
        raise ValueError(f"rows {rows} are not rows of a map of size {tuple(size)}")


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


def _inference(
    levels: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], size: tuple[int, int], start: int, stop: int
) -> torch.Tensor:
    """The identity a block of rows at a time, in cache, each level's products computed once."""
    like, (height, width), channels = levels[0], size, weights[0].shape[0]
    packs = [packed(weight, _taps, like.dtype) for weight in weights]
    out = like.new_empty(like.shape[0], stop - start, width, channels)
    for image, result in enumerate(out):
        products = [
            _Products(level[image].permute(1, 2, 0), pack, height, stop)
            for level, pack in zip(levels, packs, strict=True)
        ]
        for low in range(start // BLOCK * BLOCK, stop, BLOCK):
            high = min(low + BLOCK, stop)
            low = max(low, start)
            target = result[low - start : high - start]
            for i, level in enumerate(products):
                lines = level.resampled_rows(low, high)
                for block in blocks_of(bilinear_taps, (level.width, width), like.dtype, like.device):
                    matrix = block.matrix.expand(high - low, -1, -1)
                    part = target[:, block.start : block.stop]
                    part.baddbmm_(matrix, lines[:, block.first : block.last], beta=float(i > 0))
    return out.permute(0, 3, 1, 2)


class _Products:
    """The products of a level's channels with the nine taps, a few rows of the level at a time.

    Args:
        x: the level, (H, W, C).
        taps: three matrices (3 C_out, C), from `_taps`.
        size: rows of the result.
        stop: which of them comes last.
    """

    def __init__(self, x: torch.Tensor, taps: list[torch.Tensor], size: int, stop: int):
        self.x, self.taps, self.size = x, taps, size
        self.limit = self.blocks(stop - 1)[-1].last
        self.width = x.shape[1]
        self.channels = taps[0].shape[0] // 3
        self.chunks: list[_Chunk] = []

    def blocks(self, row: int) -> list[Block]:
        """Return the blocks of the three bands, one a row of taps, that hold a row of the result."""
        sizes, x = (self.x.shape[0], self.size), self.x
        return [blocks_of(bilinear_tap, (*sizes, tap), x.dtype, x.device)[row // BLOCK] for tap in (-1, 0, 1)]

    def resampled_rows(self, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of the products, resampled, the three rows of taps added up.

        Args:
            start: within the same block of the band as `stop`; calls go down the map.
            stop: see `start`.

        Returns:
            (stop - start, W * 3, C_out): the three taps of a row take turns.
        """
        lines = self.x.new_empty(stop - start, self.width * 3 * self.channels)
        blocks = self.blocks(start)
        self.compute(min(block.first for block in blocks), max(block.last for block in blocks))
        beta = 0.0
        for y, block in enumerate(blocks):
            matrix = block.matrix[start - block.start : stop - block.start]
            for chunk in self.chunks:
                a, b = max(chunk.start, block.first), min(chunk.stop, block.last)
                if a < b:
                    source = chunk.products[y][a - chunk.start : b - chunk.start]
                    lines.addmm_(matrix[:, a - block.first : b - block.first], source, beta=beta)
                    beta = 1.0
        return lines.view(stop - start, self.width * 3, self.channels)

    def compute(self, first: int, last: int) -> None:
        """Hold the products of rows [first, last), and forget those of the rows before."""
        done = self.chunks[-1].stop if self.chunks else first
        self.chunks = [chunk for chunk in self.chunks if chunk.stop > first]
        while done < last:
            rows = self.x[done : min(done + max(1, CHUNK_POSITIONS // self.width), self.limit)]
            flat = rows.reshape(-1, rows.shape[2])
            products = [linear(flat, taps).view(len(rows), -1) for taps in self.taps]
            self.chunks.append(_Chunk(done, done + len(rows), products))
            done += len(rows)


class _Chunk(NamedTuple):
    """Rows [start, stop) of a level's products, for each row of taps (rows, W * 3 * C_out)."""

    start: int
    stop: int
    products: list[torch.Tensor]

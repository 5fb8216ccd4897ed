"""`upsampled_conv3x3` by bands: with gradients, and for inference on a CPU a few rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from fastuper_kernels.cpu.band import BLOCK, bilinear_tap, bilinear_taps, blocks_of
from fastuper_kernels.cpu.linear import linear
from fastuper_kernels.cpu.packs import packed
from fastuper_kernels.cpu.resample import apply
from fastuper_kernels.dispatch.modes import without_autocast

# Positions per GEMM of the products: enough for its full rate; 5 MB of float32 for 512 channels.
CHUNK_POSITIONS = 256
# Columns of the result per block of BLOCK rows: 1 MB of float32 for 512 channels.
COLUMNS = 32


def _taps(weight: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the three taps of each row of a weight (C_out, C, 3, 3) as one matrix (3 C_out, C): three matrices."""
    taps = weight.to(dtype).permute(2, 3, 0, 1).flatten(1, 2)
    return [taps[y].clone(memory_format=torch.contiguous_format) for y in range(3)]


def with_gradients(level: torch.Tensor, weight: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return `conv3x3(bilinear(level to size), weight)` of eager tensors; saves only the level and the weight.

    Args:
        level: (B, C, h, w).
        weight: (C_out, C, 3, 3).
        size: (H, W) of the result.

    Returns:
        (B, C_out, H, W) in channels_last memory.
    """
    (batch, _, h, w), (height, width), channels = level.shape, size, weight.shape[0]
    positions = level.permute(0, 2, 3, 1).reshape(batch * h * w, level.shape[1])
    total = None
    for y, taps in enumerate(_taps(weight, level.dtype)):
        products = F.linear(positions, taps).view(batch, h, w * 3 * channels)
        part = apply(products, bilinear_tap, (h, height, y - 1))
        total = part if total is None else total + part
    assert total is not None
    out = apply(total.view(batch * height, w * 3, channels), bilinear_taps, (w, width))
    return out.view(batch, height, width, channels).permute(0, 3, 1, 2)


class UpsampledConv3x3:
    """`upsampled_conv3x3` for inference on a CPU, strip by strip: each level's products are computed once.

    Args:
        levels: maps (B, C_l, H_l, W_l) of one dtype, of any sizes.
        weights: (C_out, C_l, 3, 3) for each level.
        size: (H, W) of the whole result.
        stop: the last strip ends before this row of the result; None for H.
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
        """Return rows [start, stop) of the result, (B, C_out, stop - start, W) in channels_last memory.

        Each call starts at or below the last call's `stop`: products of rows above are freed.
        """
        out = self.like.new_empty(len(self.images), stop - start, self.size[1], self.channels)
        with without_autocast(out):
            for result, products in zip(out, self.images, strict=True):
                self._fill(result, products, start, stop)
        return out.permute(0, 3, 1, 2)

    def _fill(self, result: torch.Tensor, products: list[_Products], start: int, stop: int) -> None:
        """Write rows [start, stop) of one image to result (stop - start, W, C_out)."""
        for low in range(start // BLOCK * BLOCK, stop, BLOCK):
            high = min(low + BLOCK, stop)
            low = max(low, start)
            for product in products:
                product.compute(low, high)
            for left in range(0, self.size[1], COLUMNS):
                right = min(left + COLUMNS, self.size[1])
                # The sum over the levels stays in a core's own cache, and is rounded once.
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
        stop: the result's rows from this one on are not computed.
    """

    def __init__(self, x: torch.Tensor, taps: list[torch.Tensor], size: tuple[int, int], stop: int):
        self.x, self.taps = x, taps
        self.dtype = torch.promote_types(x.dtype, torch.float32)  # narrower products are resampled in float32
        height, width = x.shape[:2]
        kind = (self.dtype, x.device)
        self.rows = [blocks_of(bilinear_tap, (height, size[0], tap), *kind) for tap in (-1, 0, 1)]
        self.columns = blocks_of(bilinear_taps, (width, size[1]), *kind, size=COLUMNS)
        self.limit = max(blocks[(stop - 1) // BLOCK].last for blocks in self.rows)
        self.channels = taps[0].shape[0] // 3
        self.chunks: list[_Chunk] = []

    def add_to(self, block: torch.Tensor, start: int, left: int, beta: float) -> None:
        """Set `block` to beta * block + this level's part of the result.

        The taps of the rows are applied first, then the taps of the columns.

        Args:
            block: (rows, columns, C_out) of the result, inside one block of the rows' bands and of the columns' band.
            start: the first row of `block` in the result.
            left: the first column of `block` in the result.
            beta: 0 to overwrite `block`.
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
        """Compute the products that rows [start, stop) of the result read; free products that only rows above read."""
        needed = [blocks[start // BLOCK] for blocks in self.rows]
        first, last = min(row.first for row in needed), max(row.last for row in needed)
        done = self.chunks[-1].stop if self.chunks else first
        self.chunks = [chunk for chunk in self.chunks if chunk.stop > first]
        while done < min(last, self.limit):
            rows = self.x[done : min(done + max(1, CHUNK_POSITIONS // self.x.shape[1]), self.limit)]
            positions = rows.reshape(-1, rows.shape[2])
            products = [linear(positions, taps).to(self.dtype).view(len(rows), -1) for taps in self.taps]
            self.chunks.append(_Chunk(done, done + len(rows), products))
            done += len(rows)


class _Chunk(NamedTuple):
    """The products of a level's rows [start, stop): for each row of taps (stop - start, W * 3 * C_out)."""

    start: int
    stop: int
    products: list[torch.Tensor]

"""3x3 convolutions of resampled maps, with every product of channels at the maps' own resolution.

A convolution is a sum over its taps of "shift the grid, then mix channels", and resampling acts on each channel alone,
so the two change places: `conv3x3(R x) = sum_t S_t R (W_t x)`, S_t being the shift by tap t with zero padding. For a
map f times smaller in each direction that is f * f times fewer multiplications, and R x never exists.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from fastuper_kernels.band import Band, bilinear_taps, inputs_of
from fastuper_kernels.linear import linear
from fastuper_kernels.modes import autocast, check_dtypes, is_eager, is_eager_inference, is_plain, without_autocast
from fastuper_kernels.packs import packed
from fastuper_kernels.resample import add_rows_, apply, columns

# Output rows at a time: what they need of a level twice as coarse, 19 rows of 128 columns and three taps of 512
# channels, is 15 MB of float32.
BLOCK_ROWS = 32


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
    """The identity in plain operators: nine products, then the columns' band, then the rows'."""
    channels, (height, width) = weight.shape[0], size
    total = None
    for y in range(3):
        line = None
        for x in range(3):
            band = Band.bilinear(level.shape[3], width, offset=x - 1, device=level.device)
            part = band.gather(F.conv2d(level, weight[:, :, y : y + 1, x : x + 1]), 3)
            line = part if line is None else line + part
        assert line is not None
        band = Band.bilinear(level.shape[2], height, offset=y - 1, device=level.device)
        part = band.gather(line, 2)
        total = part if total is None else total + part
    assert total is not None
    assert total.shape[1] == channels
    return total


def _eager(level: torch.Tensor, weight: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The identity with gradients: what is kept for the backward pass is the level and the weight."""
    (batch, _, h, w), (height, width), channels = level.shape, size, weight.shape[0]
    flat = level.permute(0, 2, 3, 1).reshape(batch * h * w, level.shape[1])
    lines = []
    for taps in _taps(weight, level.dtype):
        products = F.linear(flat, taps).view(batch * h, w * 3, channels)
        lines.append(apply(products, bilinear_taps, (w, width)).view(batch, h, 1, width * channels))
    stacked = torch.cat(lines, dim=2).view(batch, h * 3, width * channels)
    out = apply(stacked, bilinear_taps, (h, height))
    return out.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _inference(
    levels: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], size: tuple[int, int], start: int, stop: int
) -> torch.Tensor:
    """The identity a few rows at a time, each level's products computed once."""
    dtype, width, channels = levels[0].dtype, size[1], weights[0].shape[0]
    packs = [packed(weight, _taps, dtype) for weight in weights]
    out = levels[0].new_empty(levels[0].shape[0], stop - start, width, channels)
    for image, result in enumerate(out):
        maps = [level[image].permute(1, 2, 0) for level in levels]
        lines = [_Lines(x, pack, width) for x, pack in zip(maps, packs, strict=True)]
        for low in range(start, stop, BLOCK_ROWS):
            high = min(low + BLOCK_ROWS, stop)
            for i, (x, line) in enumerate(zip(maps, lines, strict=True)):
                sizes = (x.shape[0], size[0])
                first, last = inputs_of(bilinear_taps, sizes, low, high)
                first, last = first // 3, -(-last // 3)
                products = line.rows(first, last).flatten(0, 1)
                target = result[low - start : high - start]
                add_rows_(target, products, bilinear_taps, sizes, low, 3 * first, beta=0.0 if i == 0 else 1.0)
    return out.permute(0, 3, 1, 2)


class _Lines:
    """Rows of a level's products, each already resampled along its columns; the last few are kept for the next block.

    Args:
        x: the level, (H, W, C).
        taps: three matrices (3 C_out, C), from `_taps`.
        width: columns of the result.
    """

    def __init__(self, x: torch.Tensor, taps: list[torch.Tensor], width: int):
        self.x, self.taps, self.width = x, taps, width
        self.first, self.kept = 0, x.new_empty(0)

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Return rows [first, last): (rows, 3, width, C_out). `first` never goes back."""
        channels = self.taps[0].shape[0] // 3
        lines = self.x.new_empty(last - first, 3, self.width, channels)
        have = max(0, min(self.first + len(self.kept), last) - first)
        if have:
            lines[:have] = self.kept[first - self.first : first - self.first + have]
        new = self.x[first + have : last]
        if len(new):
            height, width, dim = new.shape
            flat = new.reshape(-1, dim)
            for y, taps in enumerate(self.taps):
                products = linear(flat, taps).view(height, width * 3, channels)
                lines[have:, y] = columns(products, bilinear_taps, (width, self.width))
        self.first, self.kept = first, lines
        return lines

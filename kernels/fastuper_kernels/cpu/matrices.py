"""Operations for the graphs that ONNX Runtime and OpenVINO run (`dispatch.modes.writing_for`).

These runtimes multiply matrices and convolve at full speed. Resampling, padding and additions take them longer than
their arithmetic is worth. In a graph of one size these are products with matrices, which are constants there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from fastuper_kernels.cpu.band import Band
from fastuper_kernels.cpu.winograd import DOWN
from fastuper_kernels.dispatch.modes import as_written, written_dtype, written_for

# The transforms of `cpu.winograd` as matrices, at the same points.
INPUTS = [[1, 1.5, -2, -1.5, 1, 0], [0, -1, -2.5, -0.5, 1, 0], [0, 1, 0.5, -2.5, 1, 0]]
INPUTS += [[0, -0.5, -1, 0.5, 1, 0], [0, 2, -1, -2, 1, 0], [0, 1, 1.5, -2, -1.5, 1]]
OUTPUTS: list[list[float]] = [
    [1, 1, 1, 1, 1, 0],
    [0, 1, -1, 2, -0.5, 0],
    [0, 1, 1, 4, 0.25, 0],
    [0, 1, -1, 8, -0.125, 1],
]


LARGEST = 256
"""The largest side of a map that matrices resample: the products for a position grow with the side."""


def are_constant(*sizes: Sequence[Any]) -> bool:
    """Return True if the sizes of maps are fixed, and small enough for matrices."""
    return all(isinstance(side, int) and side <= LARGEST for size in sizes for side in size)


def resample(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return x (B, C, h, w), resampled (bilinear, align_corners=False) to a size (height, width)."""
    before, size = as_written(x.shape[2:]), as_written(size)
    if written_for() == "openvino" or not are_constant(before, size):  # OpenVINO's own is fast in its own layout
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    rows, columns = (Band.bilinear(*sides, device=x.device).matrix(x.dtype) for sides in zip(before, size, strict=True))
    return torch.matmul(torch.matmul(rows, x), columns.t())


def full_size(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return x (B, C, h, w), resampled (bilinear, align_corners=False) to the size of the images, contiguous.

    In bfloat16 OpenVINO resamples the rows. A product resamples the columns, and writes float32 in the output's layout.
    """
    (_, before), (height, width) = as_written(x.shape[2:]), as_written(size)
    if written_dtype() != torch.bfloat16 or not are_constant([before]) or not isinstance(width, int):
        return F.interpolate(x, size=list(size), mode="bilinear", align_corners=False)
    rows = F.interpolate(x, size=[height, before], mode="bilinear", align_corners=False)
    return F.linear(rows, Band.bilinear(before, width, device=x.device).matrix(x.dtype))


def upsampled_conv3x3(
    levels: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], size: tuple[int, int]
) -> torch.Tensor:
    """Return `ops.upsampled_conv3x3` by a product for the columns of each level, and one for the rows of all levels.

    The three taps of an axis lie beside it. So a matrix resamples, shifts and adds up the taps at once.
    """
    if written_for() == "openvino":
        return _channels_last(levels, weights, size)
    channels = weights[0].shape[0]
    lines, rows = [], []
    for level, weight in zip(levels, weights, strict=True):
        height, width = as_written(level.shape[2:])
        taps = weight.permute(3, 0, 2, 1).flatten(1, 2)  # (3, C_out * 3, C): for each column, the taps of all rows
        products = [F.conv2d(level, tap[:, :, None, None]) for tap in taps.unbind()]
        line = torch.matmul(torch.cat(products, dim=3), _taps(width, size[1], level).t())
        lines.append(line.view(-1, channels, 3 * height, size[1]))
        rows.append(_taps(height, size[0], level))
    return torch.matmul(torch.cat(rows, dim=1), torch.cat(lines, dim=2))


def _channels_last(
    levels: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], size: tuple[int, int]
) -> torch.Tensor:
    """Return `upsampled_conv3x3` with the channels last in all steps: the rows of each level, then all columns.

    OpenVINO convolves in this layout. To change it takes longer than the products.
    """
    dtype, channels = levels[0].dtype, weights[0].shape[0]
    if written_dtype() == torch.bfloat16:  # OpenVINO multiplies by a constant from the left in the constant's dtype
        levels, weights = ([x.bfloat16() for x in tensors] for tensors in (levels, weights))
    parts, columns = [], []
    for level, weight in zip(levels, weights, strict=True):
        height, width = as_written(level.shape[2:])
        pixels = level.permute(0, 2, 3, 1).reshape(-1, width, weight.shape[1])
        taps = weight.permute(2, 3, 0, 1).flatten(1, 2)  # (3, 3 * C_out, C): for each row, the taps of all columns
        products = [F.linear(pixels, tap).view(-1, height, width * 3 * channels) for tap in taps.unbind()]
        part = torch.matmul(_taps(height, size[0], level), torch.cat(products, dim=1))
        parts.append(part.view(-1, size[0], width * 3, channels))
        columns.append(_taps(width, size[1], level).unflatten(1, (3, width)).transpose(1, 2).flatten(1))
    total = torch.matmul(torch.cat(columns, dim=1), torch.cat(parts, dim=2))
    return total.to(dtype).permute(0, 3, 1, 2)


def _taps(size_in: int, size_out: int, like: torch.Tensor) -> torch.Tensor:
    """Return the matrix (size_out, 3 * size_in) from the products of an axis's three taps to their resampled sum."""
    bands = [Band.bilinear(size_in, size_out, offset=tap, device=like.device) for tap in (-1, 0, 1)]
    return torch.cat([band.matrix(like.dtype) for band in bands], dim=1)


WINOGRAD_CHANNELS = 256
"""The fewest channels with which `winograd_conv3x3` is faster in the runtimes than their own convolution."""
WINOGRAD_POSITIONS = 32 * 32
"""The fewest positions of a map with which it is faster in OpenVINO."""


def takes_winograd(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return True if the runtime takes less time by `winograd_conv3x3` than by its own convolution, in float32."""
    wide = weight.shape[2:] == (3, 3) and min(weight.shape[:2]) >= WINOGRAD_CHANNELS
    if not wide or x.dtype != torch.float32 or written_dtype() != torch.float32:
        return False
    if written_for() == "onnxruntime":
        return True
    height, width = as_written(x.shape[2:])
    return _divides(len(DOWN) - 2, height, width) and height * width >= WINOGRAD_POSITIONS


def winograd_conv3x3(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return a 3x3 convolution with zero padding by Winograd's F(4x4, 3x3): 36 products for every 144.

    A convolution of stride 4 computes the 36 points of all tiles, one product multiplies the channels, and a transposed
    convolution of stride 4 computes the tiles' outputs.

    Args:
        x: (B, C, H, W).
        weight: (C_out, C, 3, 3).
    """
    if written_for() == "openvino":
        return _winograd_of_maps(x, weight)
    batch, channels, (height, width) = x.shape[0], weight.shape[1], as_written(x.shape[2:])
    points, size = len(DOWN), len(DOWN) - 2
    rows, columns = (height + size - 1) // size, (width + size - 1) // size
    inputs, outputs = (torch.tensor(matrix, dtype=x.dtype, device=x.device) for matrix in (INPUTS, OUTPUTS))
    margin = 1
    if not _divides(size, height, width):
        # Zeros before each tile's inputs: the padding can be as large on the left as the right needs it.
        inputs, margin = F.pad(inputs, (size - 1, 0)), size
    tiles = F.conv2d(x.reshape(batch * channels, 1, height, width), _both_axes(inputs), stride=size, padding=margin)
    tiles = tiles.view(batch, channels, points * points, rows * columns).permute(2, 0, 1, 3)
    products = torch.matmul(_transformed(weight, x.dtype), tiles).permute(1, 2, 0, 3)
    products = products.reshape(batch * weight.shape[0], points * points, rows, columns)
    y = F.conv_transpose2d(products, _both_axes(outputs.t()), stride=size)
    y = y.view(batch, weight.shape[0], size * rows, size * columns)
    return y if _divides(size, height, width) else y[:, :, :height, :width]


def _winograd_of_maps(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return `winograd_conv3x3` with a map (B, C, H / 4, W / 4) for each of the 36 points of all tiles.

    All steps are in the layout in which OpenVINO convolves, and it fuses the sums. Both sides are multiples of 4.
    """
    channels, (height, width), size = weight.shape[1], as_written(x.shape[2:]), len(DOWN) - 2
    inputs = torch.tensor(INPUTS, dtype=x.dtype, device=x.device).unbind()
    kernels = iter(_transformed(weight, x.dtype).permute(0, 2, 3, 1)[..., None].unbind())  # (C_out, C, 1, 1)
    lines = []
    for down in inputs:
        rows = F.conv2d(x, down.view(1, 1, -1, 1).repeat(channels, 1, 1, 1), None, (size, 1), (1, 0), groups=channels)
        line = []
        for along in inputs:
            taps = along.view(1, 1, 1, -1).repeat(channels, 1, 1, 1)
            line.append(F.conv2d(F.conv2d(rows, taps, None, (1, size), (0, 1), groups=channels), next(kernels)))
        lines.append(_outputs(line))
    columns = [_outputs(line) for line in zip(*lines, strict=True)]
    tall = []
    for row in range(size):
        wide = torch.stack([column[row].permute(0, 2, 3, 1) for column in columns], dim=3)
        tall.append(wide.view(-1, height // size, 1, width, weight.shape[0]))
    return torch.cat(tall, dim=2).view(-1, height, width, weight.shape[0]).permute(0, 3, 1, 2)


def _outputs(products: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the four outputs along an axis, from the maps of its six points."""
    found = []
    for values in OUTPUTS:
        terms = [x if value == 1 else x * value for value, x in zip(values, products, strict=True) if value != 0]
        found.append(functools.reduce(torch.add, terms))
    return found


def _divides(size: int, height: int, width: int) -> bool:
    """Return True if both sides are fixed, and multiples of `size`."""
    return all(isinstance(side, int) and side % size == 0 for side in (height, width))


def _both_axes(matrix: torch.Tensor) -> torch.Tensor:
    """Return the kernels (points * points, 1, n, n) that apply a matrix (points, n) to both axes."""
    return (matrix[:, None, :, None] * matrix[:, None]).flatten(0, 1)[:, None]


def _transformed(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the transformed weight, (points * points, 1, C_out, C), computed in float64."""
    kernels = _both_axes(torch.tensor(DOWN, dtype=torch.float64, device=weight.device))
    taps = weight.double().permute(2, 3, 0, 1).reshape(9, -1)
    return (kernels.flatten(1) @ taps).to(dtype).view(-1, 1, *weight.shape[:2])

"""3x3 convolutions of resampled maps, with every product of channels at the maps' own resolution.

A convolution is a sum over its taps of "shift the grid, then mix channels". Resampling acts on each channel alone, so
the two operations change places: `conv3x3(R x) = sum_t S_t R (W_t x)`, S_t being the shift by tap t with zero padding.
For a map f times smaller in each direction that is f * f times fewer multiplications, and R x is never held.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from fastuper_kernels.cpu import matrices
from fastuper_kernels.cpu.upsampled_conv import UpsampledConv3x3, with_gradients
from fastuper_kernels.dispatch.backend import takes_triton
from fastuper_kernels.dispatch.modes import (
    as_written,
    autocast,
    check_dtypes,
    is_eager,
    is_eager_inference,
    is_ordinary,
    written_for,
)


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
        weights: (C_out, C_l, 3, 3) for each level; may be slices of one weight.
        size: (H, W) of the result.
        strip: (start, stop): compute only these rows of the result, whose height is size[0].
        backend: "auto", "triton" or "torch"; see `fastuper_kernels.dispatch.backend`.

    Returns:
        (B, C_out, H, W), or with `strip` (B, C_out, stop - start, W), in the levels' dtype (autocast's, where autocast
        is on). In channels_last memory; if something traces, in the layout of PyTorch's own convolution.

    Raises:
        ValueError: no levels, shapes that do not fit, empty maps, several dtypes, or a backend that cannot take the
            operands.
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
    if written_for() is not None and strip is None:
        sizes = [as_written(side) for side in (size, *(level.shape[2:] for level in levels))]
        if matrices.are_constant(*sizes):
            return matrices.upsampled_conv3x3(levels, weights, sizes[0])
    total = None
    for level, weight in zip(levels, weights, strict=True):
        part = with_gradients(level, weight, size) if is_eager() else _traced(level, weight, size)
        total = part if total is None else total + part
    assert total is not None
    return total if strip is None else total[:, :, start:stop]


def reference(levels: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    """The definition of `upsampled_conv3x3`: each level resampled, then convolved."""
    total = None
    for level, weight in zip(levels, weights, strict=True):
        part = F.conv2d(F.interpolate(level, size=size, mode="bilinear", align_corners=False), weight, padding=1)
        total = part if total is None else total + part
    assert total is not None
    return total


def _traced(level: torch.Tensor, weight: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return one level's part by few of PyTorch's operators, for a small graph: the columns' taps, then the rows'.

    A tap's map is padded on both sides, and the sum of the maps is cropped. To crop each map would make a map of one
    column empty, which tracers refuse.
    """
    channels = weight.shape[0]
    lines = []
    for x in range(3):
        taps = weight[:, :, :, x].permute(2, 0, 1).flatten(0, 1)  # (3 C_out, C): the taps of one column
        products = F.conv2d(level, taps[:, :, None, None])
        wide = F.interpolate(products, size=(level.shape[2], size[1]), mode="bilinear", align_corners=False)
        lines.append(F.pad(wide, (2 - x, x)))
    line = (lines[0] + lines[1] + lines[2]).narrow(3, 1, size[1])
    sums = []
    for y, part in enumerate(line.split(channels, dim=1)):
        tall = F.interpolate(part, size=size, mode="bilinear", align_corners=False)
        sums.append(F.pad(tall, (0, 0, 2 - y, y)))
    return (sums[0] + sums[1] + sums[2]).narrow(2, 1, size[0])


def _check(
    levels: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    size: tuple[int, int],
    strip: tuple[int, int] | None,
) -> None:
    if not levels or len(levels) != len(weights):
        raise ValueError(
            f"there must be at least one level, and a weight for each level: got {len(levels)} and {len(weights)}"
        )
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

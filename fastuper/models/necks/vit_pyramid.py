"""Necks that make the maps of a vision transformer, all of one scale, the levels of a pyramid.

There are two, both mmsegmentation's: `TransposedPyramid` (its Feature2Pyramid, BEiT's neck) scales maps by transposed
convolutions and pooling, `ResizedPyramid` (its MultiLevelNeck) by resampling between convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from fastuper.models.backbones.layers import activation, is_free, lacking, pad_to
from fastuper.models.norms import batch_norm

TRANSPOSED_SCALES = ([4, 2, 1, 0.5], [2, 1, 0.5, 0.25])
"""The scales that a `TransposedPyramid` can have: those of patches of 16 and of 8 pixels."""


def build_neck(
    kind: str,
    in_channels: Sequence[int],
    scales: Sequence[float],
    channels: int,
    *,
    norm: bool = False,
    hidden_act: str = "linear",
) -> TransposedPyramid | ResizedPyramid:
    """Build a neck.

    Args:
        kind: "transposed" or "resized".
        in_channels: channels of each map.
        scales: the factor of each level's height and width.
        channels: channels of each level of a `ResizedPyramid`; a `TransposedPyramid` keeps those of its maps.
        norm: see `ResizedPyramid`.
        hidden_act: see `ResizedPyramid`.
    """
    if kind == "transposed":
        return TransposedPyramid(in_channels, scales)
    return ResizedPyramid(in_channels, scales, channels, norm=norm, hidden_act=hidden_act)


class TransposedPyramid(nn.Module):
    """Scale each map by transposed convolutions or by max pooling, without a change of its channels.

    Args:
        in_channels: channels of the four maps.
        scales: the factor of each level's height and width; one of `TRANSPOSED_SCALES`.

    Attributes:
        channels: channels of each level.
    """

    def __init__(self, in_channels: Sequence[int], scales: Sequence[float]):
        super().__init__()
        self.channels = list(in_channels)
        self.levels = nn.ModuleList(
            _transposed_level(channels, scale) for channels, scale in zip(in_channels, scales, strict=True)
        )

    def forward(self, maps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Map four (B, C, H, W) to (B, C, scale * H, scale * W), rounded down, but at least one pixel."""
        return tuple(level(x) for level, x in zip(self.levels, maps, strict=True))


def _transposed_level(channels: int, scale: float) -> nn.Module:
    if scale == 4:
        return Upsample4x(channels)
    if scale == 2:
        return nn.ConvTranspose2d(channels, channels, 2, stride=2)
    return nn.Identity() if scale == 1 else Pool(round(1 / scale))


class Upsample4x(nn.Module):
    """Two transposed convolutions with BatchNorm and GELU between them."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.batch_norm = nn.BatchNorm2d(channels)
        self.activation = nn.GELU()
        self.second = nn.ConvTranspose2d(channels, channels, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to (B, C, 4 H, 4 W)."""
        return self.second(self.activation(batch_norm(self.batch_norm, self.first(x))))


class Pool(nn.Module):
    """Max pooling whose stride is its side; what is over is cut off, unless nothing would remain."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to (B, C, max(H // side, 1), max(W // side, 1))."""
        height, width = x.shape[2:]
        if is_free(height, width):  # the smallest number is never the largest of a square
            return F.max_pool2d(pad_to(x, self.side, self.side, torch.finfo(x.dtype).min), self.side)
        return F.max_pool2d(x, (min(self.side, height), min(self.side, width)))

    def extra_repr(self) -> str:
        """Show the side."""
        return f"side={self.side}"


class ResizedPyramid(nn.Module):
    """Convolve each map (1x1), resample it, and convolve each level (3x3).

    Args:
        in_channels: channels of the maps: one for each level, or of one map for all levels.
        scales: the factor of each level's height and width.
        channels: channels of each level.
        norm: True for BatchNorm after each convolution, which then has no bias.
        hidden_act: the activation after each convolution; "linear" for none.

    Attributes:
        channels: channels of each level.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        scales: Sequence[float],
        channels: int,
        *,
        norm: bool = False,
        hidden_act: str = "linear",
    ):
        super().__init__()
        self.channels = [channels] * len(scales)
        self.lateral_convs = nn.ModuleList(NeckConv(dim, channels, 1, norm, hidden_act) for dim in in_channels)
        self.rescales = nn.ModuleList(nn.Identity() if scale == 1 else Rescale(scale) for scale in scales)
        self.convs = nn.ModuleList(NeckConv(channels, channels, 3, norm, hidden_act) for _ in scales)

    def forward(self, maps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Map (B, C_l, H, W) to (B, channels, scale * H, scale * W), rounded down, but at least one pixel."""
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        if len(laterals) == 1:
            laterals *= len(self.rescales)
        return tuple(conv(rescale(x)) for conv, rescale, x in zip(self.convs, self.rescales, laterals, strict=True))


class NeckConv(nn.Module):
    """A convolution with "same" padding; BatchNorm and an activation are optional."""

    def __init__(self, dim_in: int, dim: int, kernel_size: int, norm: bool, hidden_act: str):
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim, kernel_size, padding=kernel_size // 2, bias=not norm)
        self.batch_norm = nn.BatchNorm2d(dim) if norm else nn.Identity()
        self.activation = activation(hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C_in, H, W) to (B, C, H, W)."""
        return self.activation(batch_norm(self.batch_norm, self.conv(x)))


class Rescale(nn.Module):
    """Resample a map (bilinear) by a factor: coordinates are divided by it, and the size is rounded down.

    To resample to the rounded size would give other coordinates: with the factor 0.5, 5 rows become 2 rows, which lie
    2 rows apart, not 2.5. A traced network is valid for all sizes if the factor is a whole number or 0.5, 0.25, ...;
    with other factors it can be limited to sizes like the example's.

    Args:
        scale: the factor.
    """

    def __init__(self, scale: float):
        super().__init__()
        self.scale = float(scale)
        # Whole numbers need no rounding, which a tracer could not follow. Powers of 2 alone have an exact inverse.
        self.times = int(scale) if float(scale).is_integer() else 0
        step = 1 / scale
        self.step = int(step) if step.is_integer() and int(step).bit_count() == 1 else 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to (B, C, floor(scale * H), floor(scale * W)), each side at least 1."""
        height, width = x.shape[2:]
        if self.times:
            return _resized(x, self.times * height, self.times * width)
        if self.step and is_free(height, width):
            return self.means(self.means(x, 2), 3)
        if self.step and height >= self.step and width >= self.step:
            # A position lies in the middle of `step` rows, half-way between two of them: bilinear is their mean.
            cut = self.step // 2 - 1
            middle = x[:, :, cut : height - cut, cut : width - cut] if cut else x
            return F.avg_pool2d(middle, 2, self.step)
        if height * self.scale < 1 or width * self.scale < 1:
            return _resized(x, max(int(height * self.scale), 1), max(int(width * self.scale), 1))
        return F.interpolate(x, scale_factor=self.scale, mode="bilinear", align_corners=False)

    def means(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Return the means of the two middle lines of each `step` lines of x; of all lines, if there are fewer."""
        size = x.shape[dim]
        count, lines = size // self.step, self.step - lacking(size, self.step)
        first = torch.arange(count + lacking(count, 1), device=x.device) * self.step
        low, high = first + (lines - 1) // 2, first + lines // 2
        return 0.5 * (x.index_select(dim, low) + x.index_select(dim, high))

    def extra_repr(self) -> str:
        """Show the factor."""
        return f"scale={self.scale}"


def _resized(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)

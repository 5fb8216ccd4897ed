"""Convolution, BatchNorm, ReLU: the block both heads are made of, and its fused form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fastuper.models.untouched import batch_norm, fold, is_exactly, is_fixed_norm, is_supported_conv
from fastuper_kernels import conv_bn_relu, upsample_add, upsampled_conv3x3


class ConvModule(nn.Module):
    """Convolution without bias and with "same" padding, BatchNorm, ReLU."""

    def __init__(self, dim_in: int, dim: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim, kernel_size, padding=kernel_size // 2, bias=False)
        self.batch_norm = nn.BatchNorm2d(dim)
        self.activation = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C_in, H, W) to (B, C, H, W)."""
        return self.fused(x) if self.is_fusible() else self.activation(batch_norm(self.batch_norm, self.conv(x)))

    def is_fusible(self) -> bool:
        """Return whether `fused` is the same function: a matter of the convolution, as it calls the other two."""
        return is_supported_conv(self.conv) and self.conv.bias is None

    def fused(
        self,
        x: torch.Tensor,
        coarser: Sequence[torch.Tensor] = (),
        *,
        upsampled: torch.Tensor | None = None,
        strip: tuple[int, int, int] | None = None,
    ) -> torch.Tensor:
        """Return the module's result for [x, *coarser resampled to x's size], plus `upsampled`, resampled.

        Nothing is resampled before it is convolved, and nothing is concatenated.

        Args:
            x: (B, C, H, W), for the convolution's first C input channels.
            coarser: maps (B, C_l, H_l, W_l) for its other ones.
            upsampled: (B, C_out, h, w), added at the end.
            strip: see `conv_bn_relu`; in evaluation alone.
        """
        weight, *weights = self.conv.weight.split([x.shape[1], *(level.shape[1] for level in coarser)], dim=1)
        addend = None
        if coarser:
            height, part = (x.shape[2], None) if strip is None else (strip[2], strip[:2])
            addend = upsampled_conv3x3(coarser, weights, (height, x.shape[3]), strip=part)
        if self.is_folding():
            scale, shift = fold(self.batch_norm)
            return conv_bn_relu(x, weight, scale, shift, addend=addend, upsampled=upsampled, strip=strip)
        y = self.activation(batch_norm(self.batch_norm, conv_bn_relu(x, weight, addend=addend, relu=False)))
        return y if upsampled is None else upsample_add(upsampled, y)

    def is_folding(self) -> bool:
        """Return whether the norm is a fixed scale and shift here and the activation ReLU, so that none is called.

        The norm is one in evaluation with gradients off, where it is a BatchNorm that nobody has touched.
        """
        return is_fixed_norm(self.batch_norm) and is_exactly(self.activation, nn.ReLU)


def is_fusible(module: Any, kernel_size: tuple[int, int] | None = None) -> bool:
    """Return whether a module is a `ConvModule` that may be `fused`, and its kernel of the size that is given."""
    fusible = is_exactly(module, ConvModule) and module.is_fusible()
    return fusible and kernel_size in (None, module.conv.kernel_size)


def convolve_levels(module: Any, levels: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a module's result for its levels, resampled to the size of the first and concatenated."""
    if is_fusible(module, (3, 3)):
        return module.fused(levels[0], levels[1:])
    return module(concatenate_at_first_size(levels))


def concatenate_at_first_size(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Resample maps (bilinear) to the size of the first, and concatenate their channels."""
    first, *others = maps
    size = first.shape[2:]
    resampled = [F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in others]
    return torch.cat([first, *resampled], dim=1)

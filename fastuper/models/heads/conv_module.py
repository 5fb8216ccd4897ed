"""ConvModule, the block of both heads: a convolution, BatchNorm and ReLU, and its fused form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fastuper.models.norms import batch_norm, fold, is_fixed_norm
from fastuper.models.untouched import is_exactly, is_supported_conv, is_untouched
from fastuper_kernels import conv_bn_relu, upsample_add, upsampled_conv3x3
from fastuper_kernels.dispatch.modes import written_for


class FusedConv(nn.Module):
    """The fused form of a block of a convolution, a norm and an activation: the base of `ConvModule`.

    A subclass has the three modules. It may be a block of another library, which names them otherwise.

    Attributes:
        conv: the convolution.
        batch_norm: the norm.
        activation: the activation.
    """

    conv: Any
    batch_norm: Any
    activation: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C_in, H, W) to (B, C, H, W)."""
        if self.is_fusible():
            return self.fused(x)
        return self.activation(batch_norm(self.batch_norm, self.conv(x)))

    def is_fusible(self) -> bool:
        """Return True if `fused` computes the same function.

        This depends only on the convolution: `fused` calls a norm or an activation that it cannot fold.
        """
        return is_supported_conv(self.conv) and self.conv.bias is None

    def is_foldable(self) -> bool:
        """Return True if `fused` folds the norm and the activation into the convolution, and calls neither.

        The norm must be an untouched BatchNorm in evaluation with gradients off, the activation an untouched ReLU.
        """
        return is_fixed_norm(self.batch_norm) and is_exactly(self.activation, nn.ReLU)

    def fused(
        self,
        x: torch.Tensor,
        coarser: Sequence[torch.Tensor] = (),
        *,
        upsampled: torch.Tensor | None = None,
        strip: tuple[int, int, int] | None = None,
    ) -> torch.Tensor:
        """Return the module's result for [x, *coarser], concatenated at x's size, plus `upsampled`, resampled to it.

        Each map is convolved at its own resolution and then resampled (docs/idea.md); no concatenation is made.

        Args:
            x: (B, C, H, W), for the first C input channels of the convolution.
            coarser: maps (B, C_l, H_l, W_l) for its other input channels; the kernel must be 3 x 3.
            upsampled: (B, C_out, h, w), resampled (bilinear) and added after the activation.
            strip: (start, stop, height), the rows to compute, see `conv_bn_relu`; only where `is_foldable()`.

        Returns:
            (B, C_out, H, W); with `strip`, (B, C_out, stop - start, W).
        """
        channels = [level.shape[1] for level in (x, *coarser)]
        if written_for() is not None:  # constants, so that the runtime rearranges the weights once
            channels = [int(count) for count in channels]
        weight, *weights = self.conv.weight.split(channels, dim=1)
        if coarser and written_for() is not None and self.is_foldable():
            # The weights are constants of the graph: the scale costs nothing there, and a pass over the sum here.
            scale, shift = fold(self.batch_norm)
            weight, *weights = ((w * scale[:, None, None, None]).to(x.dtype) for w in (weight, *weights))
            coarse = upsampled_conv3x3(coarser, weights, (x.shape[2], x.shape[3]))
            return conv_bn_relu(x, weight, shift=shift, addend=coarse, upsampled=upsampled)
        addend = None
        if coarser:
            height, rows = (x.shape[2], None) if strip is None else (strip[2], strip[:2])
            addend = upsampled_conv3x3(coarser, weights, (height, x.shape[3]), strip=rows)
        if self.is_foldable():
            scale, shift = fold(self.batch_norm)
            return conv_bn_relu(x, weight, scale, shift, addend=addend, upsampled=upsampled, strip=strip)
        y = self.activation(batch_norm(self.batch_norm, conv_bn_relu(x, weight, addend=addend, relu=False)))
        return y if upsampled is None else upsample_add(upsampled, y)


class ConvModule(FusedConv):
    """Convolution without bias and with "same" padding, BatchNorm, ReLU.

    Args:
        dim_in: input channels.
        dim: output channels.
        kernel_size: odd.
    """

    def __init__(self, dim_in: int, dim: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim, kernel_size, padding=kernel_size // 2, bias=False)
        self.batch_norm = nn.BatchNorm2d(dim)
        self.activation = nn.ReLU()


def is_fusible(module: Any, kernel_size: tuple[int, int] | None = None) -> bool:
    """Return True if a module is an untouched `FusedConv` that is fusible and, if given, has this kernel size."""
    fusible = isinstance(module, FusedConv) and is_untouched(module) and module.is_fusible()
    return fusible and kernel_size in (None, module.conv.kernel_size)


def channels_of_maps(module: Any) -> int | None:
    """Return the number of channels that a module takes; None if it is not an untouched `FusedConv`."""
    return module.conv.in_channels if is_fusible(module) else None


def classify(classifier: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the logits (B, classes, H, W) of a map (B, C, H, W) by a convolution, or by a user's module."""
    if is_supported_conv(classifier):
        return conv_bn_relu(x, classifier.weight, shift=classifier.bias, relu=False)
    result: torch.Tensor = classifier(x)
    return result


def convolve_levels(module: Any, levels: Sequence[torch.Tensor], align_corners: bool = False) -> torch.Tensor:
    """Return a module's result for levels (B, C_l, H_l, W_l), concatenated at the size of the first.

    Args:
        module: a `ConvModule`, or any module that a user put in its place.
        levels: the maps.
        align_corners: of the resampling (bilinear).
    """
    # If the channels do not fit, the module is called: PyTorch's error says what its convolution expects.
    if not align_corners and is_fusible(module, (3, 3)) and sum(x.shape[1] for x in levels) == module.conv.in_channels:
        return module.fused(levels[0], levels[1:])
    return module(concatenate_at_first_size(levels, align_corners))


def concatenate_at_first_size(maps: Sequence[torch.Tensor], align_corners: bool = False) -> torch.Tensor:
    """Resample maps (bilinear) to the size of the first, and concatenate their channels."""
    first, *others = maps
    return torch.cat([first, *(resample(x, first, align_corners) for x in others)], dim=1)


def resample(x: torch.Tensor, like: torch.Tensor, align_corners: bool = False) -> torch.Tensor:
    """Resample a map (bilinear) to the size of another."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=align_corners)

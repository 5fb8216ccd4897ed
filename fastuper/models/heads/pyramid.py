"""The feature pyramid of UPerNet's heads: pyramid pooling, top-down path and fusion, without a classifier.

The fused convolutions never upsample a level before its convolution. They mix a level's channels at the level's own
resolution and resample the result (docs/idea.md). A module that was replaced or hooked is called, on the same input as
in the textbook network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fastuper.models.gradient_checkpointing import Checkpointed
from fastuper.models.heads.conv_module import ConvModule, channels_of_maps, convolve_levels, is_fusible, resample
from fastuper.models.heads.pooling import PyramidPooling, is_pooling_branch
from fastuper.models.untouched import is_exactly
from fastuper_kernels import upsample_add


class Pyramid(NamedTuple):
    """The result of the top-down path.

    Attributes:
        levels: (B, hidden_size, H_l, W_l), finest first, each but the coarsest after its 3x3 convolution.
        merged: the finest level before its 3x3 convolution.
    """

    levels: list[torch.Tensor]
    merged: torch.Tensor


class PyramidHead(Checkpointed):
    """Base of the heads over a feature pyramid (https://arxiv.org/abs/1807.10221); parameters are named as on the Hub.

    Args:
        in_channels: channels of the backbone's feature maps, finest first.
        dim: channels of every level, the configuration's `hidden_size`.
        pool_scales: the pyramid pooling averages the coarsest map over s x s cells, for each s in this list.
        classifiers: modules of the subclass, by name. They are registered first, as in Transformers: the state of an
            optimizer belongs to parameters by their order.

    Attributes:
        in_channels: channels of the feature maps.
        channels: channels of every level.
        pool_scales: scales of the pyramid pooling.
        align_corners: of the resampling (bilinear) of levels; True excludes the fused convolutions.
    """

    def __init__(self, in_channels: Sequence[int], dim: int, pool_scales: Sequence[int], **classifiers: nn.Module):
        super().__init__()
        self.in_channels = list(in_channels)
        self.channels = dim
        self.pool_scales = pool_scales
        self.align_corners = False
        for name, classifier in classifiers.items():
            self.add_module(name, classifier)
        *lower, top = self.in_channels
        self.psp_modules = PyramidPooling(pool_scales, top, dim)
        self.bottleneck = ConvModule(top + len(pool_scales) * dim, dim, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(channels, dim, 1) for channels in lower)
        self.fpn_convs = nn.ModuleList(ConvModule(dim, dim, 3) for _ in lower)
        self.fpn_bottleneck = ConvModule(len(self.in_channels) * dim, dim, 3)

    def check(self, feature_maps: Sequence[torch.Tensor]) -> None:
        """Refuse feature maps that do not fit the modules that read them; a touched module decides for itself.

        Raises:
            ValueError: the number of maps, their number of dimensions or of channels is wrong.
        """
        branches: Any = self.psp_modules if is_exactly(self.psp_modules, PyramidPooling) else []
        top = branches[0][1] if len(branches) and is_pooling_branch(branches[0]) else None
        expected = [channels_of_maps(module) for module in (*self.lateral_convs, top)]
        fits = len(feature_maps) == len(expected) and all(
            x.ndim == 4 and channels in (None, x.shape[1]) for x, channels in zip(feature_maps, expected, strict=True)
        )
        if not fits:
            raise ValueError(
                f"feature maps must be (B, C, H, W) with in_channels={expected} channels, finest first, "
                f"got {[tuple(x.shape) for x in feature_maps]}"
            )

    def psp_forward(self, feature_maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Pyramid pooling: fuse the last map with its averages over s x s cells.

        Args:
            feature_maps: (B, C_l, H_l, W_l), finest first; only the last is read.

        Returns:
            (B, hidden_size, H, W), H and W being the last map's.
        """
        x, pooling = feature_maps[-1], self.psp_modules
        # An untouched pooling is not called: `convolve_levels` resamples its cells without maps at full size.
        fused = is_exactly(pooling, PyramidPooling) and pooling.align_corners == self.align_corners
        return convolve_levels(self.bottleneck, [x, *(pooling.cells(x) if fused else pooling(x))], self.align_corners)

    def top_down(self, maps: Sequence[torch.Tensor], pooled: torch.Tensor) -> Pyramid:
        """Add each level, upsampled, to the next finer one, and smooth the sums by 3x3 convolutions.

        [1/4, 1/8, 1/16] and the pooled 1/32 -> [1/4, 1/8, 1/16, 1/32]

        Args:
            maps: (B, C_l, H_l, W_l), finest first, the coarsest excluded. Finer maps may be left out, and their levels
                are then missing.
            pooled: the coarsest level, from `psp_forward`.
        """
        left_out = len(self.lateral_convs) - len(maps)
        laterals, convs = self.lateral_convs[left_out:], self.fpn_convs[left_out:]
        merged, levels = pooled, [pooled]
        for x, lateral, conv in reversed(list(zip(maps, laterals, convs, strict=True))):
            merged = add_lateral(lateral, x, merged, self.align_corners)
            levels.insert(0, conv(merged))
        return Pyramid(levels, merged)

    def fuse(self, levels: Sequence[torch.Tensor]) -> torch.Tensor:
        """Convolve all levels, concatenated at the size of the finest. Returns (B, hidden_size, H, W)."""
        return convolve_levels(self.fpn_bottleneck, levels, self.align_corners)


def add_lateral(lateral: Any, x: torch.Tensor, above: torch.Tensor, align_corners: bool = False) -> torch.Tensor:
    """Return `lateral(x)` plus the level above it, (B, hidden_size, h, w), upsampled to x's size."""
    if align_corners:
        y: torch.Tensor = lateral(x)
        return y + resample(above, y, align_corners)
    if is_fusible(lateral):
        return lateral.fused(x, upsampled=above)
    return upsample_add(above, lateral(x))

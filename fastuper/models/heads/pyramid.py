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
from fastuper.models.heads.conv_module import ConvModule, convolve_levels, is_fusible
from fastuper.models.norms import fold
from fastuper.models.untouched import is_exactly
from fastuper_kernels import pool_conv_bn_relu, pyramid_pool, upsample_add
from fastuper_kernels.ops.pyramid_pool import grids


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
    """

    def __init__(self, in_channels: Sequence[int], dim: int, pool_scales: Sequence[int]):
        super().__init__()
        self.in_channels = list(in_channels)
        self.channels = dim
        *lower, top = self.in_channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvModule(top, dim, 1)) for scale in pool_scales
        )
        self.bottleneck = ConvModule(top + len(pool_scales) * dim, dim, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(channels, dim, 1) for channels in lower)
        self.fpn_convs = nn.ModuleList(ConvModule(dim, dim, 3) for _ in lower)
        self.fpn_bottleneck = ConvModule(len(self.in_channels) * dim, dim, 3)

    def check(self, feature_maps: Sequence[torch.Tensor]) -> None:
        """Refuse feature maps that do not fit `in_channels`.

        Raises:
            ValueError: the number of maps, their number of dimensions or of channels is wrong.
        """
        if [x.shape[1] if x.ndim == 4 else None for x in feature_maps] != self.in_channels:
            raise ValueError(
                f"feature maps must be (B, C, H, W) with in_channels={self.in_channels} channels, finest first, "
                f"got {[tuple(x.shape) for x in feature_maps]}"
            )

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Pyramid pooling: fuse x with its averages over s x s cells. (B, C, H, W) -> (B, hidden_size, H, W)."""
        return convolve_levels(self.bottleneck, [x, *self.pooled(x)])

    def pooled(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the result (B, hidden_size, s, s) of each branch of the pyramid pooling, for x (B, C, H, W)."""
        branches: Any = list(self.psp_modules)
        if not branches or not all(_is_pooling_branch(branch) for branch in branches):
            return [branch(x) for branch in branches]
        scales, modules = [branch[0].output_size for branch in branches], [branch[1] for branch in branches]
        widths = {module.conv.out_channels for module in modules}
        if not all(module.is_foldable() for module in modules) or len(widths) > 1:
            means = grids(pyramid_pool(x, scales), scales)
            return [module(grid) for module, grid in zip(modules, means, strict=True)]
        norms = [fold(module.batch_norm) for module in modules]
        weights = [module.conv.weight for module in modules]
        cells = pool_conv_bn_relu(x, scales, weights, [scale for scale, _ in norms], [shift for _, shift in norms])
        return grids(cells, scales)

    def top_down(self, maps: Sequence[torch.Tensor], pooled: torch.Tensor) -> Pyramid:
        """Add each level, upsampled, to the next finer one, and smooth the sums by 3x3 convolutions.

        [1/4, 1/8, 1/16] and the pooled 1/32 -> [1/4, 1/8, 1/16, 1/32]

        Args:
            maps: (B, C_l, H_l, W_l), finest first, the coarsest excluded. Finer maps may be left out, and their levels
                are then missing.
            pooled: the coarsest level, from `pool`.
        """
        left_out = len(self.lateral_convs) - len(maps)
        laterals, convs = self.lateral_convs[left_out:], self.fpn_convs[left_out:]
        merged, levels = pooled, [pooled]
        for x, lateral, conv in reversed(list(zip(maps, laterals, convs, strict=True))):
            merged = add_lateral(lateral, x, merged)
            levels.insert(0, conv(merged))
        return Pyramid(levels, merged)

    def fuse(self, levels: Sequence[torch.Tensor]) -> torch.Tensor:
        """Convolve all levels, concatenated at the size of the finest. Returns (B, hidden_size, H, W)."""
        return convolve_levels(self.fpn_bottleneck, levels)


def add_lateral(lateral: Any, x: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
    """Return `lateral(x)` plus the level above it, (B, hidden_size, h, w), upsampled to x's size."""
    if is_fusible(lateral):
        return lateral.fused(x, upsampled=above)
    return upsample_add(above, lateral(x))


def _is_pooling_branch(branch: Any) -> bool:
    """Return True if a branch is an untouched average pooling over s x s cells and a fusible 1x1 ConvModule."""
    return (
        is_exactly(branch, nn.Sequential)
        and len(branch) == 2
        and is_exactly(branch[0], nn.AdaptiveAvgPool2d)
        and isinstance(branch[0].output_size, int)
        and is_fusible(branch[1], (1, 1))
    )

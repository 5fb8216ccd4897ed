"""Pyramid pooling (https://arxiv.org/abs/1612.01105): averages of a map over grids, each with a convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastuper.models.heads.conv_module import ConvModule, is_fusible, resample
from fastuper.models.norms import fold
from fastuper.models.untouched import is_exactly
from fastuper_kernels import pool_conv_bn_relu, pyramid_pool
from fastuper_kernels.ops.pyramid_pool import grids


class PoolingBranch(nn.Sequential):
    """The average over s x s cells, and a 1x1 `ConvModule`.

    Args:
        scale: s.
        dim_in: channels of the map.
        dim: channels of the result.
    """

    def __init__(self, scale: int, dim_in: int, dim: int):
        super().__init__(nn.AdaptiveAvgPool2d(scale), ConvModule(dim_in, dim, 1))

    @property
    def layers(self) -> list[nn.Module]:
        """Both modules; Transformers' name of the list."""
        return list(self)


class PyramidPooling(nn.ModuleList):
    """The branches of the pyramid pooling.

    Args:
        scales: s of each branch.
        dim_in: channels of the map.
        dim: channels of each branch's result.

    Attributes:
        pool_scales: the scales.
        in_channels: channels of the map.
        channels: channels of each branch's result.
        align_corners: of the resampling (bilinear) to the map's size.
    """

    def __init__(self, scales: Sequence[int], dim_in: int, dim: int):
        super().__init__(PoolingBranch(scale, dim_in, dim) for scale in scales)
        self.pool_scales, self.in_channels, self.channels = scales, dim_in, dim
        self.align_corners = False

    @property
    def blocks(self) -> list[nn.Module]:
        """The branches; Transformers' name of the list."""
        return list(self)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return each branch's result for a map (B, C, H, W), resampled to its size: (B, dim, H, W)."""
        return [resample(cells, x, self.align_corners) for cells in self.cells(x)]

    def cells(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return each branch's result for a map (B, C, H, W) at its own size: (B, dim, s, s)."""
        branches: list[Any] = list(self)
        if not branches or not all(is_pooling_branch(branch) for branch in branches):
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


def is_pooling_branch(branch: Any) -> bool:
    """Return True if a branch is an untouched average pooling over s x s cells and a fusible 1x1 ConvModule."""
    return (
        is_exactly(branch, PoolingBranch)
        and len(branch) == 2
        and is_exactly(branch[0], nn.AdaptiveAvgPool2d)
        and isinstance(branch[0].output_size, int)
        and is_fusible(branch[1], (1, 1))
    )

"""Pyramid pooling (https://arxiv.org/abs/1612.01105): means of a map over grids, each with a convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastuper.models.heads.conv_module import ConvModule, is_fusible, resample
from fastuper.models.norms import batch_norm, fold
from fastuper.models.untouched import is_exactly, is_untouched
from fastuper_kernels import conv_bn_relu, pool_conv_bn_relu, pyramid_pool
from fastuper_kernels.ops.pyramid_pool import grids


class PreciseRoIPool2d(nn.Module):
    """Precise RoI pooling (https://arxiv.org/abs/1807.11590) of a whole map into s x s cells.

    Args:
        output_size: s.
    """

    def __init__(self, output_size: int):
        super().__init__()
        self.output_size = output_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to (B, C, s, s); see `pyramid_pool`."""
        (cells,) = grids(pyramid_pool(x, [self.output_size], pooling="precise_roi"), [self.output_size])
        return cells

    def extra_repr(self) -> str:
        """Return the size, for the module's text."""
        return f"output_size={self.output_size}"


# The ways to pool, by the name of the configuration.
POOLS: dict[str, type[nn.Module]] = {"adaptive": nn.AdaptiveAvgPool2d, "precise_roi": PreciseRoIPool2d}


class BranchParts(nn.Module):
    """A branch whose modules run one after the other: the base of `PoolingBranch`."""

    def parts(self) -> Sequence[Any]:
        """Return the pooling and the convolution; none if the branch must be called as a whole."""
        raise NotImplementedError


class PoolingBranch(BranchParts, nn.Sequential):
    """The means over s x s cells, and a 1x1 `ConvModule`.

    Args:
        scale: s.
        dim_in: channels of the map.
        dim: channels of the result.
        pooling: a key of `POOLS`.
        resample_first: True to resample the means to the map's size before the convolution.

    Attributes:
        align_corners: of this resampling (bilinear).
    """

    def __init__(
        self, scale: int, dim_in: int, dim: int, pooling: str = "adaptive", resample_first: bool = False
    ) -> None:
        super().__init__(POOLS[pooling](scale), ConvModule(dim_in, dim, 1))
        self.resample_first, self.align_corners = resample_first, False

    @property
    def layers(self) -> list[nn.Module]:
        """Both modules; Transformers' name of the list."""
        return list(self)

    def parts(self) -> Sequence[Any]:
        """Return both modules."""
        return list(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to (B, dim, s, s), or with `resample_first` to (B, dim, H, W)."""
        cells = self[0](x)
        return self[1](resample(cells, x, self.align_corners) if self.resample_first else cells)


class PooledCells(nn.Module):
    """The steps of a pyramid pooling: the base of `PyramidPooling`.

    A subclass has `branches()`. It may be a module of another library.

    Attributes:
        pooling: see `PyramidPooling`.
        resample_first: see `PyramidPooling`.
        align_corners: of the resampling (bilinear) to the map's size.
    """

    pooling = "adaptive"
    resample_first = False
    align_corners: Any = False

    def branches(self) -> list[Any]:
        """Return the branches: a pooling and a 1x1 `FusedConv`, or any modules that a user put in their place."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return each branch's result for a map (B, C, H, W), resampled to its size: (B, dim, H, W)."""
        if self.resample_first:
            return self._resampled_first(x)
        return [resample(cells, x, self.align_corners) for cells in self.cells(x)]

    def cells(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return each branch's result for a map (B, C, H, W) at its own size: (B, dim, s, s); not resampled first."""
        if not self._is_fusible():
            return self.called(x)
        if self._is_foldable():
            return self._convolved(x, relu=True)
        return [module(grid) for module, grid in zip(self._modules_1x1(), self._means(x), strict=True)]

    def _resampled_first(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return each branch's result (B, dim, H, W) of its means, resampled to x's size before its convolution.

        A 1x1 convolution and a BatchNorm in evaluation commute with the resampling. So they run on the cells, and only
        the ReLU runs at x's size; in training BatchNorm too, because it takes the statistics of the resampled map.
        """
        if not self._is_fusible():
            return self.called(x)
        if self._is_foldable():
            return [resample(cells, x, self.align_corners).relu() for cells in self._convolved(x, relu=False)]
        results = []
        for module, grid in zip(self._modules_1x1(), self._means(x), strict=True):
            y = resample(conv_bn_relu(grid, module.conv.weight, relu=False), x, self.align_corners)
            results.append(module.activation(batch_norm(module.batch_norm, y)))
        return results

    def called(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the result of each branch, called as a module."""
        return [branch(x) for branch in self.branches()]

    def _is_fusible(self) -> bool:
        """Return True if `_means` and the 1x1 convolutions compute what the branches, called one by one, would."""
        branches = self.branches()
        return len(branches) > 0 and all(_pools_by(branch, POOLS[self.pooling]) for branch in branches)

    def _is_foldable(self) -> bool:
        modules = self._modules_1x1()
        return all(module.is_foldable() for module in modules) and len({m.conv.out_channels for m in modules}) == 1

    def _modules_1x1(self) -> list[Any]:
        return [parts_of(branch)[1] for branch in self.branches()]

    def _scales(self) -> list[int]:
        return [parts_of(branch)[0].output_size for branch in self.branches()]

    def _means(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the means (B, C, s, s) of each branch."""
        scales = self._scales()
        return grids(pyramid_pool(x, scales, pooling=self.pooling), scales)

    def _convolved(self, x: torch.Tensor, relu: bool) -> list[torch.Tensor]:
        """Return each branch's convolved and normalised means (B, dim, s, s)."""
        modules, scales = self._modules_1x1(), self._scales()
        weights = [module.conv.weight for module in modules]
        scale, shift = zip(*(fold(module.batch_norm) for module in modules), strict=True)
        return grids(pool_conv_bn_relu(x, scales, weights, scale, shift, pooling=self.pooling, relu=relu), scales)


class PyramidPooling(PooledCells, nn.ModuleList):
    """The branches of the pyramid pooling.

    Args:
        scales: s of each branch.
        dim_in: channels of the map.
        dim: channels of each branch's result.
        pooling: "adaptive" or "precise_roi", the kind of cells; see `pyramid_pool`.
        resample_first: True to resample the means to the map's size before each branch's convolution, as the official
            code of Unified Perceptual Parsing does; False to resample the results, as PSPNet does.

    Attributes:
        pool_scales: the scales.
        in_channels: channels of the map.
        channels: channels of each branch's result.

    Raises:
        ValueError: there is no such pooling.
    """

    def __init__(
        self, scales: Sequence[int], dim_in: int, dim: int, pooling: str = "adaptive", resample_first: bool = False
    ) -> None:
        if pooling not in POOLS:
            raise ValueError(f"pooling must be one of {', '.join(POOLS)}, got {pooling!r}")
        super().__init__(PoolingBranch(scale, dim_in, dim, pooling, resample_first) for scale in scales)
        self.pool_scales, self.in_channels, self.channels = scales, dim_in, dim
        self.pooling, self.resample_first = pooling, resample_first
        self.align_corners = False

    @property
    def align_corners(self) -> bool:
        """Of the resampling (bilinear) to the map's size, in the branches too."""
        return self._align_corners

    @align_corners.setter
    def align_corners(self, value: bool) -> None:
        self._align_corners = value
        for branch in self:
            if isinstance(branch, PoolingBranch):
                branch.align_corners = value

    @property
    def blocks(self) -> list[nn.Module]:
        """The branches; Transformers' name of the list."""
        return list(self)

    def branches(self) -> list[Any]:
        """Return the branches."""
        return list(self)


def parts_of(branch: Any) -> Sequence[Any]:
    """Return the modules of a branch that run one after the other; none if only the branch itself knows."""
    if is_exactly(branch, nn.Sequential):
        return list(branch)
    return branch.parts() if isinstance(branch, BranchParts) and is_untouched(branch) else ()


def is_pooling_branch(branch: Any) -> bool:
    """Return True if a branch is an untouched pooling over s x s cells and a fusible 1x1 `FusedConv`."""
    return any(_pools_by(branch, kind) for kind in POOLS.values())


def _pools_by(branch: Any, kind: type[nn.Module]) -> bool:
    """Return True if a branch is an untouched pooling of a class, over s x s cells, and a fusible 1x1 `FusedConv`."""
    parts = parts_of(branch)
    return (
        len(parts) == 2
        and is_exactly(parts[0], kind)
        and isinstance(parts[0].output_size, int)
        and is_fusible(parts[1], (1, 1))
    )

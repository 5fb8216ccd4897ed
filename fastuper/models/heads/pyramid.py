"""The feature pyramid of UPerNet's heads: pyramid pooling, top-down path and fusion, without a classifier.

The fused convolutions never upsample a level before its convolution. They mix a level's channels at the level's own
resolution and resample the result (docs/idea.md). A module that was replaced or hooked is called, on the same input as
in the textbook network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastuper.models.gradient_checkpointing import Checkpointed
from fastuper.models.heads.conv_module import ConvModule, channels_of_maps, convolve_levels, is_fusible, resample
from fastuper.models.heads.pooling import PooledCells, PyramidPooling, is_pooling_branch, parts_of
from fastuper.models.untouched import is_untouched
from fastuper_kernels import upsample_add


class PyramidSteps(nn.Module):
    """The steps of the heads over a feature pyramid (https://arxiv.org/abs/1807.10221): the base of `PyramidHead`.

    A subclass has the modules. It may be a head of another library, which names them otherwise.

    Attributes:
        psp_modules: the pyramid pooling, a `PooledCells`.
        bottleneck: the 3x3 `FusedConv` that fuses the coarsest map and its pooled cells.
        lateral_convs: a 1x1 `FusedConv` for each finer map.
        fpn_convs: a 3x3 `FusedConv` for each finer level.
        fpn_bottleneck: the 3x3 `FusedConv` that fuses all levels.
        align_corners: of the resampling (bilinear) of levels; True excludes the fused convolutions.
    """

    psp_modules: Any
    bottleneck: Any
    lateral_convs: Any
    fpn_convs: Any
    fpn_bottleneck: Any
    align_corners: Any = False

    def check(self, feature_maps: Sequence[torch.Tensor]) -> None:
        """Refuse feature maps that do not fit the modules that read them; a touched module decides for itself.

        Raises:
            ValueError: the number of maps, their number of dimensions or of channels is wrong.
        """
        branches = self.psp_modules.branches() if _is_own_pooling(self.psp_modules) else []
        top = parts_of(branches[0])[1] if len(branches) and is_pooling_branch(branches[0]) else None
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
        if isinstance(pooling, PooledCells) and pooling.resample_first:
            return self.bottleneck(torch.cat([x, *pooling(x)], dim=1))
        # An untouched pooling is not called: `convolve_levels` resamples its cells without maps at full size.
        fused = _is_own_pooling(pooling) and pooling.align_corners == self.align_corners
        return convolve_levels(self.bottleneck, [x, *(pooling.cells(x) if fused else pooling(x))], self.align_corners)

    def top_down(self, maps: Sequence[torch.Tensor], pooled: torch.Tensor) -> list[torch.Tensor]:
        """Add each level, upsampled, to the next finer one.

        [1/4, 1/8, 1/16] and the pooled 1/32 -> [1/4, 1/8, 1/16, 1/32]

        Args:
            maps: (B, C_l, H_l, W_l), finest first, the coarsest excluded. Finer maps may be left out, and their levels
                are then missing.
            pooled: the coarsest level, from `psp_forward`.

        Returns:
            (B, hidden_size, H_l, W_l) for each level, finest first, before its 3x3 convolution.
        """
        merged = [pooled]
        laterals = self.lateral_convs[len(self.lateral_convs) - len(maps) :]
        for x, lateral in reversed(list(zip(maps, laterals, strict=True))):
            merged.insert(0, add_lateral(lateral, x, merged[0], self.align_corners))
        return merged

    def smooth(self, merged: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Convolve each level from `top_down` but the coarsest (3x3). Returns the levels, of the same shapes."""
        *finer, coarsest = merged
        convs = self.fpn_convs[len(self.fpn_convs) - len(finer) :]
        return [*(conv(x) for conv, x in zip(convs, finer, strict=True)), coarsest]

    def fuse(self, levels: Sequence[torch.Tensor]) -> torch.Tensor:
        """Convolve all levels, concatenated at the size of the finest. Returns (B, hidden_size, H, W)."""
        return convolve_levels(self.fpn_bottleneck, levels, self.align_corners)


class PyramidHead(PyramidSteps, Checkpointed):
    """Base of the heads over a feature pyramid (https://arxiv.org/abs/1807.10221); parameters are named as on the Hub.

    Args:
        in_channels: channels of the backbone's feature maps, finest first.
        dim: channels of every level, the configuration's `hidden_size`.
        pool_scales: the pyramid pooling averages the coarsest map over s x s cells, for each s in this list.
        pool_channels: channels of each branch of the pyramid pooling; None for `dim`.
        pooling: the kind of cells, see `PyramidPooling`.
        resample_first: the order of the pooling's steps, see `PyramidPooling`.
        classifiers: modules of the subclass, by name. They are registered first, as in Transformers: the state of an
            optimizer belongs to parameters by their order.

    Attributes:
        in_channels: channels of the feature maps.
        channels: channels of every level.
        pool_scales: scales of the pyramid pooling.
        align_corners: of the resampling (bilinear) of levels; True excludes the fused convolutions.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        dim: int,
        pool_scales: Sequence[int],
        *,
        pool_channels: int | None = None,
        pooling: str = "adaptive",
        resample_first: bool = False,
        **classifiers: nn.Module,
    ):
        super().__init__()
        self.in_channels = list(in_channels)
        self.channels = dim
        self.pool_scales = pool_scales
        self.align_corners = False
        for name, classifier in classifiers.items():
            self.add_module(name, classifier)
        *lower, top = self.in_channels
        width = dim if pool_channels is None else pool_channels
        self.psp_modules = PyramidPooling(pool_scales, top, width, pooling, resample_first)
        self.bottleneck = ConvModule(top + len(pool_scales) * width, dim, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(channels, dim, 1) for channels in lower)
        self.fpn_convs = nn.ModuleList(ConvModule(dim, dim, 3) for _ in lower)
        self.fpn_bottleneck = ConvModule(len(self.in_channels) * dim, dim, 3)


def _is_own_pooling(pooling: Any) -> bool:
    return isinstance(pooling, PooledCells) and is_untouched(pooling)


def add_lateral(lateral: Any, x: torch.Tensor, above: torch.Tensor, align_corners: bool = False) -> torch.Tensor:
    """Return `lateral(x)` plus the level above it, (B, hidden_size, h, w), upsampled to x's size."""
    if align_corners:
        y: torch.Tensor = lateral(x)
        return y + resample(above, y, align_corners)
    if is_fusible(lateral):
        return lateral.fused(x, upsampled=above)
    return upsample_add(above, lateral(x))

"""The heads: UPerNet's (https://arxiv.org/abs/1807.10221) and the auxiliary one; parameters are named as on the Hub."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from fastuper.configuration import UperNetConfig
from fastuper_kernels import upsample_add


class ConvModule(nn.Module):
    """Convolution without bias and with "same" padding, BatchNorm, ReLU."""

    def __init__(self, dim_in: int, dim: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim, kernel_size, padding=kernel_size // 2, bias=False)
        self.batch_norm = nn.BatchNorm2d(dim)
        self.activation = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C_in, H, W) to (B, C, H, W)."""
        return self.activation(self.batch_norm(self.conv(x)))


class UperNetHead(nn.Module):
    """A feature pyramid with pyramid pooling on top, all of its levels fused at the finest one's size.

    Args:
        config: `hidden_size`, `pool_scales` and `num_labels`.
        in_channels: channels of the backbone's feature maps, finest first.
    """

    def __init__(self, config: UperNetConfig, in_channels: Sequence[int]):
        super().__init__()
        self.in_channels = list(in_channels)
        self.channels = dim = config.hidden_size
        *lower, top = self.in_channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvModule(top, dim, 1)) for scale in config.pool_scales
        )
        self.bottleneck = ConvModule(top + len(config.pool_scales) * dim, dim, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(channels, dim, 1) for channels in lower)
        self.fpn_convs = nn.ModuleList(ConvModule(dim, dim, 3) for _ in lower)
        self.fpn_bottleneck = ConvModule(len(self.in_channels) * dim, dim, 3)
        self.classifier = nn.Conv2d(dim, config.num_labels, kernel_size=1)

    def forward(self, feature_maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return logits (B, num_labels, H, W) at the first map's size.

        Args:
            feature_maps: (B, C_l, H_l, W_l) for each level, finest first; at strides 4, 8, 16, 32 of the image.
        """
        levels = [conv(x) for conv, x in zip(self.lateral_convs, feature_maps, strict=False)]
        levels.append(self.pyramid_pooling(feature_maps[-1]))
        for i in range(len(levels) - 1, 0, -1):  # top-down: [1/4, 1/8, 1/16] each receive the level above
            levels[i - 1] = upsample_add(levels[i], levels[i - 1])
        levels[:-1] = [conv(x) for conv, x in zip(self.fpn_convs, levels, strict=False)]
        return self.classifier(self.fpn_bottleneck(concatenate_at_first_size(levels)))

    def pyramid_pooling(self, x: torch.Tensor) -> torch.Tensor:
        """Return the top level (B, hidden_size, H, W): x (B, C, H, W) beside its averages over grids of each scale."""
        return self.bottleneck(concatenate_at_first_size([x, *(branch(x) for branch in self.psp_modules)]))


def concatenate_at_first_size(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Resample maps (bilinear) to the size of the first, and concatenate their channels."""
    first, *others = maps
    size = first.shape[2:]
    resampled = [F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in others]
    return torch.cat([first, *resampled], dim=1)


class FCNHead(nn.Module):
    """The auxiliary head (https://arxiv.org/abs/1411.4038): a few 3x3 convolutions on one of the feature maps.

    Args:
        config: the `auxiliary_*` options and `num_labels`.
        in_channels: channels of the backbone's feature maps, finest first.
        in_index: which of the maps it reads.

    Raises:
        ValueError: there is no such map, or the options do not fit its channels.
    """

    def __init__(self, config: UperNetConfig, in_channels: Sequence[int], in_index: int = 2):
        super().__init__()
        if in_index >= len(in_channels):
            raise ValueError(
                f"the auxiliary head reads feature map {in_index + 1}, the backbone gives {len(in_channels)}: name "
                "more stages in out_features, or set use_auxiliary_head=False"
            )
        given, dim = config.auxiliary_in_channels, config.auxiliary_channels
        dim_in = in_channels[in_index] if given is None else given
        if dim_in != in_channels[in_index]:
            raise ValueError(
                f"auxiliary_in_channels={given}, but the map that it reads has {in_channels[in_index]} channels"
            )
        if config.auxiliary_num_convs == 0 and dim_in != dim:
            raise ValueError(
                f"without convolutions (auxiliary_num_convs=0) the {dim_in} channels of the feature map must be "
                f"auxiliary_channels, which is {dim}"
            )
        self.in_index = in_index
        self.convs: nn.Module = nn.Sequential(
            *(ConvModule(dim if i else dim_in, dim, 3) for i in range(config.auxiliary_num_convs))
        )
        self.conv_cat = ConvModule(dim_in + dim, dim, 3) if config.auxiliary_concat_input else None
        self.classifier = nn.Conv2d(dim, config.num_labels, kernel_size=1)

    def forward(self, feature_maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return logits (B, num_labels, H, W) at the size of the map that it reads."""
        x = feature_maps[self.in_index]
        out = self.convs(x)
        if self.conv_cat is not None:
            out = self.conv_cat(torch.cat([x, out], dim=1))
        return self.classifier(out)

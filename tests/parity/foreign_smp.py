"""segmentation_models_pytorch's UPerNet as version 0.6 has it, stated again in plain PyTorch; its encoders are timm's.

Modules have smp's names, and each forward follows smp's steps. smp's own ResNets have the names of timm's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Conv2dReLU(nn.Sequential):
    def __init__(self, dim_in: int, dim: int, kernel: int):
        conv = nn.Conv2d(dim_in, dim, kernel, padding=kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(dim), nn.ReLU())


class PSPModule(nn.Module):
    def __init__(self, dim_in: int, dim: int):
        super().__init__()
        sizes = (1, 2, 3, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), Conv2dReLU(dim_in, dim, 1)) for size in sizes
        )
        self.out_conv = Conv2dReLU(dim_in + len(sizes) * dim, dim, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = [F.interpolate(block(x), size=x.shape[2:], mode="bilinear") for block in self.blocks]
        return self.out_conv(torch.cat([x, *pooled], dim=1))


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FPNLateralBlock(nn.Module):
    def __init__(self, dim_in: int, dim: int):
        super().__init__()
        self.conv_norm_relu = Conv2dReLU(dim_in, dim, 1)

    def forward(self, state: torch.Tensor, lateral: torch.Tensor) -> torch.Tensor:
        lateral = self.conv_norm_relu(lateral)
        return F.interpolate(state, size=lateral.shape[2:], mode="bilinear") + lateral


class UPerNetDecoder(nn.Module):
    def __init__(self, channels: Sequence[int], dim: int):
        super().__init__()
        self.feature_norms = nn.ModuleList(LayerNorm2d(width, eps=1e-6) for width in channels)
        self.psp = PSPModule(channels[-1], dim)
        self.fpn_lateral_blocks = nn.ModuleList(FPNLateralBlock(width, dim) for width in channels[-2::-1])
        self.fpn_conv_blocks = nn.ModuleList(Conv2dReLU(dim, dim, 3) for _ in channels[1:])
        self.fusion_block = Conv2dReLU(len(channels) * dim, dim, 3)

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        normed = [norm(x) for norm, x in zip(self.feature_norms, features, strict=True)]
        levels = [self.psp(normed[-1])]  # coarsest first
        for block, lateral in zip(self.fpn_lateral_blocks, normed[-2::-1], strict=True):
            levels.append(block(levels[-1], lateral))
        levels[1:] = [conv(x) for conv, x in zip(self.fpn_conv_blocks, levels[1:], strict=True)]
        levels = [F.interpolate(x, size=levels[-1].shape[2:], mode="bilinear") for x in levels]
        return self.fusion_block(torch.cat(levels[::-1], dim=1))


class TimmEncoder(nn.Module):
    """smp's encoder "tu-..."; timm's module is its attribute `model`."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return self.model(x)


class UPerNet(nn.Module):
    """smp's UPerNet over one of timm's models of `features_only=True`.

    Args:
        features: timm's model with four maps.
        channels_last: whether its maps are (B, H, W, C), as Swin's are.
        own: True for the names of smp's own ResNets, False for those of "tu-" encoders.
        classes: the number of classes.
        dim: smp's decoder_channels.
    """

    def __init__(self, features: Any, channels_last: bool = False, own: bool = False, classes: int = 5, dim: int = 8):
        super().__init__()
        self.channels_last = channels_last
        self.encoder = features if own else TimmEncoder(features)
        self.decoder = UPerNetDecoder(features.feature_info.channels(), dim)
        head = nn.Conv2d(dim, classes, 1)
        self.segmentation_head = nn.Sequential(
            head, nn.Upsample(mode="bilinear", scale_factor=4, align_corners=True), nn.Identity()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.encoder(x)
        if self.channels_last:
            features = [x.permute(0, 3, 1, 2) for x in features]
        return self.segmentation_head(self.decoder(features))

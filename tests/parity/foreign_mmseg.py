"""UPerNets as mmsegmentation has them, stated again in plain PyTorch: modules with its names, forwards with its steps.

The library cannot be a development dependency: mmcv is built for other versions of PyTorch. The statements follow
mmsegmentation 1.2.2 and mmpretrain 1.2.0, which `make test-foreign` runs itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.parity.foreign_authors import WindowAttention, shift_mask, window_partition, window_reverse

# Swin: mmseg/models/backbones/swin.py and mmseg/models/utils/embed.py -------------------------------------------------


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, dim: int, patch: int):
        super().__init__()
        self.patch = patch
        self.projection = nn.Conv2d(channels, dim, patch, patch)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        x = self.projection(F.pad(x, (0, -x.shape[3] % self.patch, 0, -x.shape[2] % self.patch)))
        return self.norm(x.flatten(2).transpose(1, 2)), (x.shape[2], x.shape[3])


class PatchMerging(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.sampler = nn.Unfold(2, stride=2)
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, tuple[int, int]]:
        x = x.transpose(1, 2).unflatten(2, size)
        x = F.pad(x, (0, size[1] % 2, 0, size[0] % 2))
        merged = (x.shape[2] // 2, x.shape[3] // 2)
        return self.reduction(self.norm(self.sampler(x).transpose(1, 2))), merged


class ShiftWindowMSA(nn.Module):
    def __init__(self, dim: int, heads: int, window: int, shift: int, **attention: Any):
        super().__init__()
        self.window, self.shift = window, shift
        self.w_msa = WindowAttention(dim, window, heads, **attention)

    def forward(self, query: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        batch, _, channels = query.shape
        query = query.view(batch, *size, channels)
        query = F.pad(query, (0, 0, 0, -size[1] % self.window, 0, -size[0] % self.window))
        height, width = query.shape[1:3]
        mask = None
        if self.shift > 0:
            query = query.roll((-self.shift, -self.shift), (1, 2))
            mask = shift_mask(height, width, self.window, self.shift)
        windows = self.w_msa(window_partition(query, self.window), mask)
        x = window_reverse(windows, self.window, height, width)
        x = x.roll((self.shift, self.shift), (1, 2))
        return x[:, : size[0], : size[1]].reshape(batch, -1, channels)


class FFN(nn.Module):
    def __init__(self, dim: int, hidden: int, act: type[nn.Module]):
        super().__init__()
        self.layers = nn.Sequential(nn.Sequential(nn.Linear(dim, hidden), act()), nn.Linear(hidden, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class SwinBlock(nn.Module):
    def __init__(self, dim: int, heads: int, window: int, shift: int, hidden: int, act: type[nn.Module], **more: Any):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = ShiftWindowMSA(dim, heads, window, shift, **more)
        self.ffn = FFN(dim, hidden, act)

    def forward(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), size)
        return x + self.ffn(self.norm2(x))


class SwinStage(nn.Module):
    def __init__(self, blocks: Sequence[SwinBlock], downsample: PatchMerging | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class Swin(nn.Module):
    """SwinTransformer; `norm0`, `norm1`, ... are the norms of the maps in `out_indices`."""

    def __init__(
        self,
        dim: int = 8,
        depths: Sequence[int] = (1, 2, 1, 1),
        heads: Sequence[int] = (1, 2, 2, 4),
        window: int = 3,
        *,
        channels: int = 3,
        patch: int = 4,
        mlp_ratio: float = 4,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        positions: int = 0,
        act: type[nn.Module] = nn.GELU,
        **attention: Any,
    ):
        super().__init__()
        self.out_indices = out_indices
        self.patch_embed = PatchEmbed(channels, dim, patch)
        if positions:
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, positions, dim))
        self.stages = nn.ModuleList()
        for i, depth in enumerate(depths):
            width = dim * 2**i
            hidden = int(mlp_ratio * width)
            blocks = [
                SwinBlock(width, heads[i], window, window // 2 if j % 2 else 0, hidden, act, **attention)
                for j in range(depth)
            ]
            self.stages.append(SwinStage(blocks, PatchMerging(width) if i + 1 < len(depths) else None))
            if i in out_indices:
                self.add_module(f"norm{i}", nn.LayerNorm(width))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        maps = []
        x, size = self.patch_embed(x)
        if hasattr(self, "absolute_pos_embed"):
            x = x + self.absolute_pos_embed
        for i, stage in enumerate(self.stages):
            for block in stage.blocks:
                x = block(x, size)
            if i in self.out_indices:
                maps.append(getattr(self, f"norm{i}")(x).transpose(1, 2).unflatten(2, size))
            if stage.downsample is not None:
                x, size = stage.downsample(x, size)
        return maps


# ConvNeXt: mmpretrain/models/backbones/convnext.py --------------------------------------------------------------------


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GRN(nn.Module):
    def __init__(self, dim: int, channels_last: bool):
        super().__init__()
        self.channels_last = channels_last
        self.gamma, self.beta = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.channels_last else x.permute(0, 2, 3, 1)
        norms = x.norm(dim=(1, 2), keepdim=True)
        x = self.gamma * x * (norms / (norms.mean(-1, keepdim=True) + 1e-6)) + self.beta + x
        return x if self.channels_last else x.permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    def __init__(self, dim: int, linear: bool, scaled: bool, grn: bool):
        super().__init__()
        self.linear_pw_conv = linear
        self.depthwise_conv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = LayerNorm2d(dim, eps=1e-6)
        self.pointwise_conv1: nn.Module = nn.Linear(dim, 4 * dim) if linear else nn.Conv2d(dim, 4 * dim, 1)
        self.pointwise_conv2: nn.Module = nn.Linear(4 * dim, dim) if linear else nn.Conv2d(4 * dim, dim, 1)
        self.gamma = nn.Parameter(torch.ones(dim)) if scaled else None
        self.grn = GRN(4 * dim, channels_last=linear) if grn else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.norm(self.depthwise_conv(x))
        out = out.permute(0, 2, 3, 1) if self.linear_pw_conv else out
        out = self.pointwise_conv2(self.grn(F.gelu(self.pointwise_conv1(out))))
        out = out.permute(0, 3, 1, 2) if self.linear_pw_conv else out
        return x + (out if self.gamma is None else out * self.gamma.view(1, -1, 1, 1))


class ConvNext(nn.Module):
    """ConvNeXt with `gap_before_final_norm=False`, as under a head."""

    def __init__(
        self,
        widths: Sequence[int] = (8, 12, 16, 24),
        depths: Sequence[int] = (1, 1, 2, 1),
        *,
        channels: int = 3,
        patch: int = 4,
        linear: bool = True,
        scaled: bool = True,
        grn: bool = False,
    ):
        super().__init__()
        self.downsample_layers, self.stages = nn.ModuleList(), nn.ModuleList()
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if i == 0:
                layer = nn.Sequential(nn.Conv2d(channels, width, patch, patch), LayerNorm2d(width, eps=1e-6))
            else:
                layer = nn.Sequential(
                    LayerNorm2d(widths[i - 1], eps=1e-6), nn.Conv2d(widths[i - 1], width, 2, stride=2)
                )
            self.downsample_layers.append(layer)
            self.stages.append(nn.Sequential(*(ConvNextBlock(width, linear, scaled, grn) for _ in range(depth))))
            self.add_module(f"norm{i}", LayerNorm2d(width, eps=1e-6))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(self.downsample_layers[i](x))
            maps.append(getattr(self, f"norm{i}")(x))
        return maps


# ResNet: mmseg/models/backbones/resnet.py and mmseg/models/utils/res_layer.py -----------------------------------------


def convolution(dim_in: int, dim: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(dim_in, dim, kernel, stride, kernel // 2 * dilation, dilation, bias=False)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, dim_in: int, dim: int, stride: int, dilation: int, style: str, downsample: nn.Module | None):
        super().__init__()
        self.conv1, self.bn1 = convolution(dim_in, dim, 3, stride, dilation), nn.BatchNorm2d(dim)
        self.conv2, self.bn2 = convolution(dim, dim, 3), nn.BatchNorm2d(dim)  # never dilated
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (out + (x if self.downsample is None else self.downsample(x))).relu()


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, dim_in: int, dim: int, stride: int, dilation: int, style: str, downsample: nn.Module | None):
        super().__init__()
        first, second = (1, stride) if style == "pytorch" else (stride, 1)
        self.conv1, self.bn1 = convolution(dim_in, dim, 1, first), nn.BatchNorm2d(dim)
        self.conv2, self.bn2 = convolution(dim, dim, 3, second, dilation), nn.BatchNorm2d(dim)
        self.conv3, self.bn3 = convolution(dim, 4 * dim, 1), nn.BatchNorm2d(4 * dim)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return (self.bn3(self.conv3(out)) + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet(nn.Module):
    """ResNet; with `deep_stem` it is ResNetV1c, with `avg_down` too it is ResNetV1d."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck] = Bottleneck,
        depths: Sequence[int] = (1, 2, 1, 2),
        *,
        channels: int = 3,
        stem: int = 8,
        base: int = 4,
        strides: Sequence[int] = (1, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 1, 1),
        style: str = "pytorch",
        deep_stem: bool = False,
        avg_down: bool = False,
        contract_dilation: bool = False,
        multi_grid: Sequence[int] | None = None,
    ):
        super().__init__()
        if deep_stem:
            widths, layers = [channels, stem // 2, stem // 2, stem], []
            for i in range(3):
                layers += [convolution(widths[i], widths[i + 1], 3, 1 if i else 2), nn.BatchNorm2d(widths[i + 1])]
                layers.append(nn.ReLU())
            self.stem = nn.Sequential(*layers)
        else:
            self.conv1, self.bn1 = convolution(channels, stem, 7, 2), nn.BatchNorm2d(stem)
        dim_in = stem
        for i, (depth, stride, dilation) in enumerate(zip(depths, strides, dilations, strict=True)):
            dim, grid = base * 2**i, multi_grid if i == len(depths) - 1 else None
            blocks = []
            for j in range(depth):
                first = dilation // 2 if dilation > 1 and contract_dilation and j == 0 else dilation
                own, downsample = stride if j == 0 else 1, None
                if own != 1 or dim_in != dim * block.expansion:
                    pool = [nn.AvgPool2d(own, own, ceil_mode=True, count_include_pad=False)] if avg_down else []
                    shortcut = convolution(dim_in, dim * block.expansion, 1, 1 if avg_down else own)
                    downsample = nn.Sequential(*pool, shortcut, nn.BatchNorm2d(dim * block.expansion))
                blocks.append(block(dim_in, dim, own, first if grid is None else grid[j], style, downsample))
                dim_in = dim * block.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.stem(x) if hasattr(self, "stem") else self.bn1(self.conv1(x)).relu()
        x, maps = F.max_pool2d(x, 3, 2, 1), []
        for i in range(4):
            x = getattr(self, f"layer{i + 1}")(x)
            maps.append(x)
        return maps


# Heads: mmseg/models/decode_heads/uper_head.py, psp_head.py and fcn_head.py -------------------------------------------


class ConvModule(nn.Module):
    def __init__(self, dim_in: int, dim: int, kernel: int, dilation: int = 1):
        super().__init__()
        self.conv, self.bn = convolution(dim_in, dim, kernel, 1, dilation), nn.BatchNorm2d(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x)).relu()


class UPerHead(nn.Module):
    def __init__(
        self,
        channels: Sequence[int],
        dim: int = 16,
        classes: int = 7,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        in_index: Sequence[int] = (0, 1, 2, 3),
        align_corners: bool = False,
    ):
        super().__init__()
        self.in_index, self.align_corners = in_index, align_corners
        self.conv_seg = nn.Conv2d(dim, classes, 1)
        *lower, top = channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvModule(top, dim, 1)) for scale in pool_scales
        )
        self.bottleneck = ConvModule(top + len(pool_scales) * dim, dim, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(width, dim, 1) for width in lower)
        self.fpn_convs = nn.ModuleList(ConvModule(dim, dim, 3) for _ in lower)
        self.fpn_bottleneck = ConvModule(len(channels) * dim, dim, 3)

    def resize(self, x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        return F.interpolate(x, tuple(size), mode="bilinear", align_corners=self.align_corners)

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        maps = [maps[i] for i in self.in_index]
        top = maps[-1]
        pooled = [self.resize(module(top), top.shape[2:]) for module in self.psp_modules]
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps[:-1], strict=True)]
        laterals.append(self.bottleneck(torch.cat([top, *pooled], 1)))
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + self.resize(laterals[i], laterals[i - 1].shape[2:])
        outs = [conv(x) for conv, x in zip(self.fpn_convs, laterals[:-1], strict=True)] + [laterals[-1]]
        size = outs[0].shape[2:]
        return self.conv_seg(self.fpn_bottleneck(torch.cat([self.resize(x, size) for x in outs], 1)))


class FCNHead(nn.Module):
    def __init__(
        self,
        channels: int,
        dim: int = 8,
        classes: int = 7,
        in_index: int = 2,
        num_convs: int = 1,
        concat_input: bool = False,
        kernel: int = 3,
    ):
        super().__init__()
        self.in_index = in_index
        self.conv_seg = nn.Conv2d(dim, classes, 1)
        self.convs = nn.Sequential(*(ConvModule(dim if i else channels, dim, kernel) for i in range(num_convs)))
        self.conv_cat = ConvModule(channels + dim, dim, kernel) if concat_input else None

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        x = maps[self.in_index]
        out = self.convs(x)
        return self.conv_seg(out if self.conv_cat is None else self.conv_cat(torch.cat([x, out], 1)))


class EncoderDecoder(nn.Module):
    def __init__(self, backbone: Any, decode_head: UPerHead, auxiliary_head: nn.Module | None = None):
        super().__init__()
        self.backbone, self.decode_head, self.auxiliary_head = backbone, decode_head, auxiliary_head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of the image's size, as `encode_decode` does."""
        return self.decode_head.resize(self.decode_head(self.backbone(x)), x.shape[2:])

"""Swin and ConvNeXt as their authors' repositories have them, stated again in plain PyTorch.

The repositories cannot be installed. Modules have the authors' names, and each forward follows the authors' steps:

- microsoft/Swin-Transformer, models/swin_transformer.py: `SwinClassifier`;
- SwinTransformer/Swin-Transformer-Semantic-Segmentation, mmseg/models/backbones/swin_transformer.py: `SwinBackbone`;
- facebookresearch/ConvNeXt, models/convnext.py and semantic_segmentation/backbone/convnext.py: `ConvNext`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

# Swin -----------------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


def window_partition(x: torch.Tensor, window: int) -> torch.Tensor:
    b, h, w, c = x.shape
    x = x.view(b, h // window, window, w // window, window, c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window * window, c)


def window_reverse(windows: torch.Tensor, window: int, h: int, w: int) -> torch.Tensor:
    x = windows.view(-1, h // window, w // window, window, window, windows.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, h, w, windows.shape[-1])


def shift_mask(h: int, w: int, window: int, shift: int) -> torch.Tensor:
    image = torch.zeros(1, h, w, 1, dtype=torch.float64)
    slices = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    count = 0
    for rows in slices:
        for columns in slices:
            image[:, rows, columns, :] = count
            count += 1
    windows = window_partition(image, window).squeeze(-1)
    mask = windows.unsqueeze(1) - windows.unsqueeze(2)
    return mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)


class WindowAttention(nn.Module):
    relative_position_index: torch.Tensor

    def __init__(self, dim: int, window: int, heads: int, qkv_bias: bool = True, qk_scale: float | None = None):
        super().__init__()
        self.num_heads, self.scale = heads, qk_scale or (dim // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        coords = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0) + window - 1
        self.register_buffer("relative_position_index", relative[:, :, 0] * (2 * window - 1) + relative[:, :, 1])
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(n, n, -1)
        attn = attn + bias.permute(2, 0, 1).unsqueeze(0)
        if mask is not None:
            count = mask.shape[0]
            attn = attn.view(b // count, count, self.num_heads, n, n) + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, self.num_heads, n, n)
        return self.proj((attn.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


class SwinBlock(nn.Module):
    """A block of either repository; with `resolution` it is the classifier's, which registers its mask."""

    attn_mask: torch.Tensor | None

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int,
        shift: int,
        mlp_ratio: float,
        resolution: tuple[int, int] | None = None,
        **attention: object,
    ):
        super().__init__()
        if resolution is not None and min(resolution) <= window:
            shift, window = 0, min(resolution)
        self.window_size, self.shift_size = window, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, heads, **attention)  # type: ignore[arg-type]
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        if resolution is not None:
            self.register_buffer("attn_mask", shift_mask(*resolution, window, shift) if shift else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, C) to the same shape."""
        _, h, w, _ = x.shape
        window, shift = self.window_size, self.shift_size
        shortcut, x = x, self.norm1(x)
        x = F.pad(x, (0, 0, 0, -w % window, 0, -h % window))  # the segmentation code pads; the classifier need not
        hp, wp = x.shape[1:3]
        mask = None
        if shift > 0:
            x = torch.roll(x, shifts=(-shift, -shift), dims=(1, 2))
            mask = shift_mask(hp, wp, window, shift).to(x.dtype)
        x = window_reverse(self.attn(window_partition(x, window), mask), window, hp, wp)
        if shift > 0:
            x = torch.roll(x, shifts=(shift, shift), dims=(1, 2))
        x = shortcut + x[:, :h, :w, :]
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, h, w, _ = x.shape
        if h % 2 == 1 or w % 2 == 1:
            x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
        parts = [x[:, 0::2, 0::2, :], x[:, 1::2, 0::2, :], x[:, 0::2, 1::2, :], x[:, 1::2, 1::2, :]]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class BasicLayer(nn.Module):
    def __init__(self, blocks: Sequence[SwinBlock], downsample: PatchMerging | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, channels: int, dim: int, norm: bool):
        super().__init__()
        self.patch_size = patch
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)
        self.norm = nn.LayerNorm(dim) if norm else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map an image (B, C, H, W) to (B, h, w, dim)."""
        h, w = x.shape[2:]
        x = self.proj(F.pad(x, (0, -w % self.patch_size, 0, -h % self.patch_size))).permute(0, 2, 3, 1)
        return x if self.norm is None else self.norm(x)


class Swin(nn.Module):
    """What both repositories' Swins share.

    Args:
        image: the classifier's image size, which fixes the shift of each stage; None for the backbone of a UPerNet.
    """

    def __init__(
        self,
        image: tuple[int, int] | None,
        dim: int = 8,
        depths: Sequence[int] = (2, 2, 2, 2),
        heads: Sequence[int] = (1, 2, 4, 8),
        window: int = 4,
        patch: int = 4,
        channels: int = 3,
        mlp_ratio: float = 4.0,
        patch_norm: bool = True,
        **attention: object,
    ):
        super().__init__()
        self.patch_embed = PatchEmbed(patch, channels, dim, patch_norm)
        layers = []
        for i, depth in enumerate(depths):
            grid = None if image is None else (image[0] // patch // 2**i, image[1] // patch // 2**i)
            blocks = [
                SwinBlock(dim * 2**i, heads[i], window, 0 if j % 2 == 0 else window // 2, mlp_ratio, grid, **attention)
                for j in range(depth)
            ]
            layers.append(BasicLayer(blocks, PatchMerging(dim * 2**i) if i < len(depths) - 1 else None))
        self.layers = nn.ModuleList(layers)

    def maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the map (B, h, w, C) of each stage, before its patch merging, of embedded patches."""
        found = []
        for layer in self.layers:
            for block in layer.blocks:  # type: ignore[union-attr]
                x = block(x)
            found.append(x)
            x = x if layer.downsample is None else layer.downsample(x)  # type: ignore[operator]
        return found


class SwinClassifier(Swin):
    """microsoft/Swin-Transformer's network; `features` gives its maps, which it does not return itself."""

    def __init__(self, image: tuple[int, int], classes: int = 5, ape: bool = False, **values: object):
        super().__init__(image, **values)  # type: ignore[arg-type]
        dim, patch = self.patch_embed.proj.out_channels, self.patch_embed.patch_size
        positions = (image[0] // patch) * (image[1] // patch)
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1, positions, dim)) if ape else None
        self.norm = nn.LayerNorm(dim * 2 ** (len(self.layers) - 1))
        self.head = nn.Linear(self.norm.normalized_shape[0], classes)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.patch_embed(x)
        if self.absolute_pos_embed is not None:
            x = x + self.absolute_pos_embed.view(1, *x.shape[1:])
        return [y.permute(0, 3, 1, 2) for y in self.maps(x)]


class SwinBackbone(Swin):
    """The backbone of Swin-Transformer-Semantic-Segmentation."""

    def __init__(
        self, out_indices: Sequence[int] = (0, 1, 2, 3), ape: bool = False, pretrained: int = 32, **values: object
    ):
        super().__init__(None, **values)  # type: ignore[arg-type]
        dim, grid = self.patch_embed.proj.out_channels, pretrained // self.patch_embed.patch_size
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1, dim, grid, grid)) if ape else None
        self.out_indices = out_indices
        for i in out_indices:
            self.add_module(f"norm{i}", nn.LayerNorm(dim * 2**i))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.patch_embed(x)
        if self.absolute_pos_embed is not None:
            table = F.interpolate(self.absolute_pos_embed, size=x.shape[1:3], mode="bicubic")
            x = x + table.permute(0, 2, 3, 1)
        found = self.maps(x)
        return [getattr(self, f"norm{i}")(found[i]).permute(0, 3, 1, 2).contiguous() for i in self.out_indices]


# ConvNeXt -------------------------------------------------------------------------------------------------------------


class LayerNorm(nn.Module):
    def __init__(self, dim: int, channels_first: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.channels_first = channels_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.channels_first:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-6)
        u = x.mean(1, keepdim=True)
        x = (x - u) / torch.sqrt((x - u).pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class GRN(nn.Module):
    """The layer of ConvNeXt V2, in its authors' names, by the paper's algorithm 1."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gx = x.square().sum((1, 2), keepdim=True).sqrt()
        nx = gx / (gx.mean(-1, keepdim=True) + 1e-6)
        return self.gamma * (x * nx) + self.beta + x


class ConvNextBlock(nn.Module):
    def __init__(self, dim: int, scale: bool, grn: bool = False):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = LayerNorm(dim)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(1e-6 * torch.ones(dim)) if scale else None
        self.grn = GRN(4 * dim) if grn else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        out = self.pwconv2(self.grn(F.gelu(self.pwconv1(out))))
        out = out if self.gamma is None else self.gamma * out
        return x + out.permute(0, 3, 1, 2)


class ConvNext(nn.Module):
    """facebookresearch/ConvNeXt's network.

    Args:
        classes: of the classifier; None for the backbone of a UPerNet, which has a norm for each stage.
        depths: blocks of each stage.
        dims: channels of each stage.
        channels: of an image.
        scale: False for blocks without LayerScale.
        grn: True for ConvNeXt V2's blocks; `scale` is then False.
        out_indices: the stages whose maps the backbone of a UPerNet returns.
    """

    def __init__(
        self,
        classes: int | None,
        depths: Sequence[int] = (1, 2, 1, 1),
        dims: Sequence[int] = (8, 12, 16, 24),
        channels: int = 3,
        scale: bool = True,
        grn: bool = False,
        out_indices: Sequence[int] = (0, 1, 2, 3),
    ):
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(channels, dims[0], kernel_size=4, stride=4), LayerNorm(dims[0], True))
        downs = [
            nn.Sequential(LayerNorm(dims[i], True), nn.Conv2d(dims[i], dims[i + 1], kernel_size=2, stride=2))
            for i in range(3)
        ]
        self.downsample_layers = nn.ModuleList([stem, *downs])
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvNextBlock(dim, scale, grn) for _ in range(depth)))
            for dim, depth in zip(dims, depths, strict=True)
        )
        self.out_indices = out_indices
        if classes is None:
            for i in range(4):
                self.add_module(f"norm{i}", LayerNorm(dims[i], True))
        else:
            self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
            self.head = nn.Linear(dims[-1], classes)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the map of each stage."""
        found = []
        for i in range(4):
            x = self.stages[i](self.downsample_layers[i](x))
            found.append(x)
        return found

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the normed maps of the backbone of a UPerNet."""
        found = self.features(x)
        return [getattr(self, f"norm{i}")(found[i]) for i in self.out_indices]

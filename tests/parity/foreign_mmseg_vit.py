"""mmsegmentation's vision transformers and necks in plain PyTorch, with its names of modules: for checkpoints of tests.

The library is https://github.com/open-mmlab/mmsegmentation (1.2.2): mmseg/models/backbones/vit.py, beit.py and mae.py,
mmseg/models/necks/featurepyramid.py and multilevel_neck.py.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


class PatchEmbed(nn.Module):
    def __init__(self, channels, dim, patch, corner, norm, bias):
        super().__init__()
        self.projection, self.corner = nn.Conv2d(channels, dim, patch, patch, bias=bias), corner
        self.norm = nn.LayerNorm(dim) if norm else None

    def forward(self, x):
        if self.corner:
            height, width = (
                math.ceil(side / self.projection.stride[0]) * self.projection.stride[0] for side in x.shape[2:]
            )
            x = F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))
        x = self.projection(x)
        size, x = x.shape[2:], x.flatten(2).transpose(1, 2)
        return x if self.norm is None else self.norm(x), size


class SelfAttention(nn.Module):
    def __init__(self, dim, heads, bias):
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, heads, bias=bias, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x)[0]


class FFN(nn.Module):
    def __init__(self, dim, hidden, depth):
        super().__init__()
        steps = [
            nn.Sequential(nn.Linear(hidden if i else dim, hidden), nn.GELU(), nn.Dropout(0)) for i in range(depth - 1)
        ]
        self.layers = nn.Sequential(*steps, nn.Linear(hidden, dim), nn.Dropout(0))

    def forward(self, x):
        return self.layers(x)


class Layer(nn.Module):
    def __init__(self, dim, heads, hidden, depth, bias):
        super().__init__()
        self.ln1, self.attn = nn.LayerNorm(dim), SelfAttention(dim, heads, bias)
        self.ln2, self.ffn = nn.LayerNorm(dim), FFN(dim, hidden, depth)

    def forward(self, x):
        x = x + self.attn(self.ln1(x))
        return x + self.ffn(self.ln2(x))


def maps_of(blocks, x, size, final, indices, has_token):
    maps = []
    for i, layer in enumerate(blocks):
        x = layer(x)
        if i == len(blocks) - 1 and final is not None:
            x = final(x)
        if i in indices:
            patches = x[:, 1:] if has_token else x
            maps.append(patches.transpose(1, 2).reshape(len(x), -1, *size))
    return maps


class VisionTransformer(nn.Module):
    def __init__(
        self,
        img_size,
        patch_size=8,
        in_channels=3,
        embed_dims=16,
        num_layers=4,
        num_heads=4,
        mlp_ratio=2,
        out_indices=(0, 1, 2, 3),
        qkv_bias=True,
        with_cls_token=True,
        patch_norm=False,
        patch_bias=True,
        pre_norm=False,
        final_norm=False,
        num_fcs=2,
    ):
        super().__init__()
        self.grid = [side // patch_size for side in img_size]
        self.patch_embed = PatchEmbed(in_channels, embed_dims, patch_size, True, patch_norm, patch_bias)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dims))
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(self.grid) + 1, embed_dims))
        if pre_norm:
            self.ln_pre = nn.LayerNorm(embed_dims)
        self.layers = nn.ModuleList(
            Layer(embed_dims, num_heads, mlp_ratio * embed_dims, num_fcs, qkv_bias) for _ in range(num_layers)
        )
        if final_norm:
            self.ln1 = nn.LayerNorm(embed_dims)
        self.with_cls_token, self.out_indices = with_cls_token, out_indices

    def positions(self, x, size):
        table = self.pos_embed
        if x.shape[1] == table.shape[1]:
            return table
        patches = table[:, 1:].reshape(1, *self.grid, -1).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, size, mode="bicubic", align_corners=False)
        return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, image):
        x, size = self.patch_embed(image)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.positions(x, size)
        if not self.with_cls_token:
            x = x[:, 1:]
        if hasattr(self, "ln_pre"):
            x = self.ln_pre(x)
        return maps_of(self.layers, x, size, getattr(self, "ln1", None), self.out_indices, self.with_cls_token)


class RelativeAttention(nn.Module):
    def __init__(self, dim, heads, grid, bias):
        super().__init__()
        self.heads, self.bias, (height, width) = heads, bias, grid
        if bias == "qv_bias":
            self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        count = (2 * height - 1) * (2 * width - 1) + 3
        self.relative_position_bias_table = nn.Parameter(torch.zeros(count, heads))
        place = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).flatten(1)
        relative = place[:, :, None] - place[:, None, :]
        index = torch.zeros((height * width + 1,) * 2, dtype=torch.long)
        index[1:, 1:] = (relative[0] + height - 1) * (2 * width - 1) + relative[1] + width - 1
        index[0, :], index[:, 0], index[0, 0] = count - 3, count - 2, count - 1
        self.register_buffer("relative_position_index", index)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=bias is True), nn.Linear(dim, dim)

    def forward(self, x):
        batch, length, dim = x.shape
        bias = self.qkv.bias
        if self.bias == "qv_bias":
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv
        table = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        scores = q * (dim // self.heads) ** -0.5 @ k.transpose(-2, -1) + table
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, dim))


class RelativeLayer(nn.Module):
    def __init__(self, dim, heads, hidden, depth, grid, bias, init_values):
        super().__init__()
        self.ln1, self.attn = nn.LayerNorm(dim), RelativeAttention(dim, heads, grid, bias)
        self.ln2, self.ffn = nn.LayerNorm(dim), FFN(dim, hidden, depth)
        self.gamma_1 = nn.Parameter(init_values * torch.ones(dim))
        self.gamma_2 = nn.Parameter(init_values * torch.ones(dim))

    def forward(self, x):
        x = x + self.gamma_1 * self.attn(self.ln1(x))
        return x + self.gamma_2 * self.ffn(self.ln2(x))


class BEiT(nn.Module):
    def __init__(
        self,
        img_size,
        patch_size=8,
        embed_dims=16,
        num_layers=4,
        num_heads=4,
        mlp_ratio=2,
        out_indices=(0, 1, 2, 3),
        qv_bias=True,
        patch_norm=False,
        final_norm=False,
        num_fcs=2,
        init_values=0.1,
        bias=None,
    ):
        super().__init__()
        self.grid = [side // patch_size for side in img_size]
        self.patch_embed = PatchEmbed(3, embed_dims, patch_size, False, patch_norm, True)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dims))
        bias = ("qv_bias" if qv_bias else False) if bias is None else bias
        self.layers = nn.ModuleList(
            RelativeLayer(embed_dims, num_heads, mlp_ratio * embed_dims, num_fcs, self.grid, bias, init_values)
            for _ in range(num_layers)
        )
        if final_norm:
            self.ln1 = nn.LayerNorm(embed_dims)
        self.out_indices = out_indices

    def forward(self, image):
        x, size = self.patch_embed(image)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        if hasattr(self, "pos_embed"):
            x = x + self.pos_embed
        return maps_of(self.layers, x, size, getattr(self, "ln1", None), self.out_indices, True)


class MAE(BEiT):
    def __init__(self, img_size, embed_dims=16, **values):
        super().__init__(img_size, embed_dims=embed_dims, bias=True, **values)
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(self.grid) + 1, embed_dims))


class Feature2Pyramid(nn.Module):
    def __init__(self, embed_dim=16, rescales=(4, 2, 1, 0.5)):
        super().__init__()
        double = [nn.ConvTranspose2d(embed_dim, embed_dim, 2, 2) for _ in range(3)]
        self.steps = [nn.Sequential(double[0]), nn.Identity(), nn.MaxPool2d(2)]
        self.upsample_2x = self.steps[0]
        if 4 in rescales:
            self.upsample_4x = nn.Sequential(double[1], nn.BatchNorm2d(embed_dim), nn.GELU(), double[2])
            self.steps.insert(0, self.upsample_4x)
        else:
            self.steps.append(nn.MaxPool2d(4))

    def forward(self, maps):
        return [step(x) for step, x in zip(self.steps, maps, strict=True)]


class ConvModule(nn.Module):
    def __init__(self, dim_in, dim, kernel, norm, act):
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim, kernel, padding=kernel // 2, bias=not norm)
        if norm:
            self.bn = nn.BatchNorm2d(dim)
        self.act = act

    def forward(self, x):
        x = self.bn(self.conv(x)) if hasattr(self, "bn") else self.conv(x)
        return x.relu() if self.act else x


class MultiLevelNeck(nn.Module):
    def __init__(self, in_channels, out_channels, scales=(0.5, 1, 2, 4), norm_cfg=None, act_cfg=None):
        super().__init__()
        options = norm_cfg is not None, act_cfg is not None
        self.lateral_convs = nn.ModuleList(ConvModule(dim, out_channels, 1, *options) for dim in in_channels)
        self.convs = nn.ModuleList(ConvModule(out_channels, out_channels, 3, *options) for _ in scales)
        self.scales = scales

    def forward(self, maps):
        maps = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        maps = maps * len(self.scales) if len(maps) == 1 else maps
        return [
            conv(F.interpolate(x, scale_factor=scale, mode="bilinear"))
            for conv, x, scale in zip(self.convs, maps, self.scales, strict=True)
        ]


NETWORKS = {"VisionTransformer": VisionTransformer, "BEiT": BEiT, "MAE": MAE}
NECKS = {"Feature2Pyramid": Feature2Pyramid, "MultiLevelNeck": MultiLevelNeck}


class Model(nn.Module):
    """A backbone and its neck, with random weights and statistics; `settings` are those of the library's config."""

    def __init__(self, backbone, neck=None):
        super().__init__()
        self.settings = {"backbone": {"num_heads": 4, "out_indices": [0, 1, 2, 3], **backbone}, "neck": neck}
        own = {name: value for name, value in backbone.items() if name not in ("type", "norm_cfg")}
        torch.manual_seed(0)
        self.backbone = NETWORKS[backbone["type"]](**own)
        self.neck = NECKS[neck["type"]](**{k: v for k, v in neck.items() if k != "type"}) if neck else None
        eps = backbone.get("norm_cfg", {}).get("eps", 1e-5)
        for module in self.backbone.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = eps
        for name, tensor in self.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point():
                tensor.normal_(1.0 if tensor.ndim == 1 and name.endswith("weight") else 0.0, 0.3)
        self.double().eval()

    def forward(self, image):
        maps = self.backbone(image)
        return maps if self.neck is None else self.neck(maps)

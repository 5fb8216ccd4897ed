"""Unified Perceptual Parsing as papers write it, in PyTorch's modules: what bench.parsing times beside fastuper.

The network is that of the official code (CSAILVision/unifiedparsing): pooled maps and levels are resampled before the
convolutions that read them. Logits are resampled to the photo's size, and a softmax gives the probabilities of every
class, and of every part of every object, at every pixel; labels are their argmax. Modules have fastuper's names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.models.resnet.modeling_resnet import ResNetConvLayer


class ConvModule(nn.Module):
    """Convolution without bias, BatchNorm, ReLU."""

    def __init__(self, dim_in: int, dim: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim, kernel_size, padding=kernel_size // 2, bias=False)
        self.batch_norm = nn.BatchNorm2d(dim)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.batch_norm(self.conv(x)))


class PreciseRoIPool(nn.Module):
    """Precise RoI pooling (https://arxiv.org/abs/1807.11590) of the whole map into s x s cells: two matrix products."""

    def __init__(self, scale: int):
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = (self.matrix(length).to(x) for length in x.shape[2:])
        return rows @ x @ columns.T

    def matrix(self, length: int) -> torch.Tensor:
        """Return (scale, length): integrals of the linear interpolation between cells, which ends in zero."""
        edges = torch.arange(self.scale + 1, dtype=torch.float64)[:, None] * length / self.scale
        t = (edges - torch.arange(length)).clamp(-1, 1)
        integral = torch.where(t < 0, (t + 1) ** 2 / 2, 0.5 + t - t**2 / 2)
        return integral.diff(dim=0) * self.scale / length


class TaskHead(nn.Module):
    """A 3x3 convolution module and a classifier; for scenes, with the mean over the map between them."""

    def __init__(self, dim: int, classes: int, mean: bool = False):
        super().__init__()
        self.mean = mean
        self.conv = ConvModule(dim, dim, 3)
        self.classifier = nn.Conv2d(dim, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return self.classifier(F.adaptive_avg_pool2d(x, 1) if self.mean else x)


class TextureHead(nn.Module):
    """Two 3x3 convolution modules and a classifier."""

    def __init__(self, dim_in: int, dim: int, classes: int):
        super().__init__()
        self.convs = nn.Sequential(ConvModule(dim_in, dim, 3), ConvModule(dim, dim, 3))
        self.classifier = nn.Conv2d(dim, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.convs(x))


class Decoder(nn.Module):
    """Pyramid pooling, top-down path, fusion, and a head for each task."""

    def __init__(self, config: Any, channels: Sequence[int]):
        super().__init__()
        dim, width = config.hidden_size, config.pool_channels
        *lower, top = channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(PreciseRoIPool(scale), ConvModule(top, width, 1)) for scale in config.pool_scales
        )
        self.bottleneck = ConvModule(top + len(config.pool_scales) * width, dim, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(channels, dim, 1) for channels in lower)
        self.fpn_convs = nn.ModuleList(ConvModule(dim, dim, 3) for _ in lower)
        self.fpn_bottleneck = ConvModule(len(channels) * dim, dim, 3)
        self.scene_head = TaskHead(dim, config.num_channels_of("scene"), mean=True)
        self.object_head = TaskHead(dim, config.num_channels_of("object"))
        self.part_head = TaskHead(dim, config.num_channels_of("part"))
        self.material_head = TaskHead(dim, config.num_channels_of("material"))
        self.texture_head = TextureHead(channels[0], config.texture_channels, config.num_channels_of("texture"))

    def forward(self, maps: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the logits of each task, from four maps."""
        top = maps[-1]
        pooled = [conv(resize(pool(top), top.shape[2:])) for pool, conv in self.psp_modules]
        level = self.bottleneck(torch.cat([top, *pooled], 1))
        levels = [level]
        logits = {"scene": self.scene_head(level).flatten(1)}
        for x, lateral, conv in zip(maps[-2::-1], self.lateral_convs[::-1], self.fpn_convs[::-1], strict=True):
            level = lateral(x) + resize(level, x.shape[2:])
            levels.insert(0, conv(level))
        size = levels[0].shape[2:]
        fused = self.fpn_bottleneck(torch.cat([levels[0], *(resize(x, size) for x in levels[1:])], 1))
        logits["object"] = self.object_head(fused)
        logits["part"] = self.part_head(fused)
        logits["material"] = self.material_head(levels[0])
        logits["texture"] = self.texture_head(maps[0])
        return logits


class Textbook(nn.Module):
    """The network over Transformers' backbone, from a configuration of fastuper's with all five tasks."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.backbone = backbone_of(config.backbone_config)
        self.decode_head = Decoder(config, self.backbone.channels)

    def probabilities(self, pixels: torch.Tensor, size: tuple[int, int]) -> dict[str, Any]:
        """Return each task's probabilities (B, classes, *size), for parts a list with those of each object's slice."""
        logits = self.decode_head(self.backbone(pixels).feature_maps)
        found: dict[str, Any] = {"scene": logits.pop("scene").softmax(1)}
        for task, coarse in logits.items():
            full = resize(coarse, size)
            if task == "part":
                found[task] = [full[:, channels].softmax(1) for channels in self.config.part_slices.values()]
            else:
                found[task] = full.softmax(1)
        return found

    def forward(self, pixels: torch.Tensor, size: tuple[int, int]) -> dict[str, Any]:
        """Return the five best scenes' probabilities and numbers, and label maps (B, *size) of the other tasks."""
        probabilities = self.probabilities(pixels, size)
        scenes = probabilities["scene"].topk(5)
        found = {task: probabilities[task].argmax(1) for task in ("object", "material", "texture")}
        found["part"] = torch.zeros_like(found["object"])
        for part, (number, parts) in zip(probabilities["part"], self.config.object_parts.items(), strict=True):
            inside = found["object"] == number
            if inside.any():
                ids = torch.tensor([0, *parts])[part.argmax(1)]
                found["part"] = torch.where(inside, ids, found["part"])
        return {"scene": scenes, **found}


def resize(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resample a map (bilinear)."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def backbone_of(config: Any) -> Any:
    """Return Transformers' backbone of a configuration of fastuper's; a deep stem is put into its ResNet."""
    values = config.to_dict()
    deep = values.pop("model_type") == "resnet_deep_stem"
    kind = "ResNet" if deep else {"convnext": "ConvNext"}[config.model_type]
    backbone = getattr(transformers, f"{kind}Backbone")(getattr(transformers, f"{kind}Config")(**values))
    if deep:
        first, second, third = config.stem_widths
        backbone.embedder.embedder = nn.Sequential(
            ResNetConvLayer(config.num_channels, first, kernel_size=3, stride=2),
            ResNetConvLayer(first, second, kernel_size=3),
            ResNetConvLayer(second, third, kernel_size=3),
        )
    return backbone

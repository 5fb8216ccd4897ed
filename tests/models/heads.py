"""Small heads with random weights, and their result when every module is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastuper import UperNetConfig
from fastuper.models.heads.conv_module import ConvModule, concatenate_at_first_size, resample
from fastuper.models.heads.upernet import UperNetHead

CHANNELS = [8, 12, 16, 24]
SIZES = [(17, 22), (9, 11), (5, 6), (3, 3)]


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter and running statistic at random, so that none is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.ndim == 1:
            tensor.uniform_(-0.3, 0.3, generator=generator)
        elif tensor.is_floating_point():
            bound = (3 / tensor[0].numel()) ** 0.5
            tensor.uniform_(-bound, bound, generator=generator)
    return module


def head(hidden_size: int = 12, seed: int = 0, channels: Sequence[int] = CHANNELS, **values: Any) -> Any:
    """Return a head in evaluation mode with random weights."""
    config = UperNetConfig(**{"hidden_size": hidden_size, "num_labels": 5, **values})
    return randomize(UperNetHead(config, channels), seed).eval()


def feature_maps(
    batch: int = 2,
    sizes: Sequence[tuple[int, int]] = SIZES,
    channels: Sequence[int] = CHANNELS,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, c, *size) for c, size in zip(channels, sizes, strict=True)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


class Listed(nn.Module):
    """A head that takes its maps as separate arguments, as tracers require."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, *maps: torch.Tensor) -> torch.Tensor:
        return self.head(maps)


class Unfused:
    """A context in which every ConvModule calls its children."""

    def __enter__(self) -> None:
        self.kept = ConvModule.is_fusible
        ConvModule.is_fusible = lambda self: False  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        ConvModule.is_fusible = self.kept  # type: ignore[method-assign]


def as_written(head: Any, maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a head's logits by the steps of the paper, mmsegmentation and Transformers."""
    with Unfused():
        *_, fused = levels_as_written(head, maps)
        return head.classifier(fused)


def parsing_as_written(head: Any, maps: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the logits of a parsing head by the steps of the official code; one task after the other."""
    with Unfused():
        pooled, finest, fused = levels_as_written(head, maps)
        scene, texture = head.scene_head, head.texture_head
        logits = {"scene": scene.classifier(scene.conv(pooled).mean((2, 3), keepdim=True))[:, :, 0, 0]}
        for task, level in {"object": fused, "part": fused, "material": finest}.items():
            reads = getattr(head, f"{task}_head")
            logits[task] = reads.classifier(reads.conv(level))
        logits["texture"] = texture.classifier(texture.convs[1](texture.convs[0](maps[0].detach())))
        return logits


def levels_as_written(head: Any, maps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the coarsest level, the finest level and the fusion of all levels."""
    *lower, top = maps
    levels = [head.bottleneck(torch.cat([top, *head.psp_modules(top)], dim=1))]
    for x, lateral in reversed(list(zip(lower, head.lateral_convs, strict=True))):
        y = lateral(x)
        levels.insert(0, y + resample(levels[0], y, head.align_corners))
    fine = [conv(x) for conv, x in zip(head.fpn_convs, levels, strict=False)]
    fused = concatenate_at_first_size([*fine, levels[-1]], head.align_corners)
    return levels[-1], [*fine, levels[-1]][0], head.fpn_bottleneck(fused)


def error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Return ||result - truth|| / ||truth||."""
    assert result.shape == truth.shape
    result, truth = result.detach().double(), truth.detach().double()
    assert truth.isfinite().all()
    return ((result - truth).norm() / truth.norm()).item()

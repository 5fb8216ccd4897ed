"""The waterfall from Transformers' model to fastuper's: each row of VARIANTS adds one technique to the row before.

The rows are built here from Transformers' modules and fastuper's operations: the package needs no switches.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

from bench.peers import CHANNELS_LAST, CONTIGUOUS, Peer, Task, World, transformers_eager
from fastuper.models.norms import fold
from fastuper_kernels import conv_bn_relu, pool_conv_bn_relu, upsampled_conv3x3
from fastuper_kernels.ops.pyramid_pool import grids


class StepwiseHead(nn.Module):
    """Transformers' head with some of its steps replaced.

    Args:
        head: Transformers' `UperNetHead`.
        fusion: whether the fusion convolution mixes channels before it upsamples its levels.
        pooling: whether pyramid pooling works on its 50 cells instead of upsampled maps.
        convolutions: whether convolution, BatchNorm and ReLU are one operation, with Winograd where it is faster.
    """

    def __init__(self, head: Any, *, fusion: bool = False, pooling: bool = False, convolutions: bool = False):
        super().__init__()
        self.head, self.fusion, self.pooling, self.convolutions = head, fusion, pooling, convolutions

    def forward(self, feature_maps: Any) -> torch.Tensor:
        head = self.head
        levels = [self.convolve(conv, x) for conv, x in zip(head.lateral_convs, feature_maps, strict=False)]
        levels.append(self.pyramid(feature_maps[-1]) if self.pooling else head.psp_forward(feature_maps))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + _resize(levels[i], levels[i - 1].shape[2:])
        levels[:-1] = [self.convolve(conv, x) for conv, x in zip(head.fpn_convs, levels, strict=False)]
        if self.fusion:
            fused = self.convolve_parts(head.fpn_bottleneck, levels[0], levels[1:])
        else:
            size = levels[0].shape[2:]
            fused = self.convolve(
                head.fpn_bottleneck, torch.cat([levels[0], *(_resize(x, size) for x in levels[1:])], dim=1)
            )
        return head.classifier(fused)

    def pyramid(self, x: torch.Tensor) -> torch.Tensor:
        head = self.head
        scales = [scale if isinstance(scale, int) else scale[0] for scale in head.pool_scales]
        convs = [branch.layers[1] for branch in head.psp_modules.blocks]
        scale, shift = zip(*(fold(conv.batch_norm) for conv in convs), strict=True)
        pooled = pool_conv_bn_relu(x, scales, [conv.conv.weight for conv in convs], list(scale), list(shift))
        return self.convolve_parts(head.bottleneck, x, grids(pooled, scales))

    def convolve_parts(self, module: Any, x: torch.Tensor, coarser: list[torch.Tensor]) -> torch.Tensor:
        """Return `module` of x and upsampled coarser maps, concatenated; their channels are mixed before upsampling."""
        weights = module.conv.weight.split([x.shape[1], *(part.shape[1] for part in coarser)], dim=1)
        addend = upsampled_conv3x3(coarser, list(weights[1:]), tuple(x.shape[2:]))
        if self.convolutions:
            scale, shift = fold(module.batch_norm)
            return conv_bn_relu(x, weights[0], scale, shift, addend=addend)
        return module.activation(module.batch_norm(F.conv2d(x, weights[0], padding=1) + addend))

    def convolve(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        if not self.convolutions:
            return module(x)
        scale, shift = fold(module.batch_norm)
        return conv_bn_relu(x, module.conv.weight, scale, shift)


def _resize(x: torch.Tensor, size: Any) -> torch.Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def _with(change: Callable[[Any, World, Task], None]) -> Callable[[World, Task], Callable[[], Any]]:
    """Return a builder of Transformers' model, channels_last and without auxiliary head, after a change."""

    def build(world: World, task: Task) -> Callable[[], Any]:
        model = copy.copy(world.theirs(task.dtype, CHANNELS_LAST, auxiliary=False))
        model._modules = dict(model._modules)
        change(model, world, task)
        pixels = world.pixels(task, CHANNELS_LAST)
        return lambda: model(pixels).logits

    return build


def _head(**steps: bool) -> Callable[[World, Task], Callable[[], Any]]:
    def change(model: Any, world: World, task: Task) -> None:
        model.decode_head = StepwiseHead(model.decode_head, **steps)

    return _with(change)


def _without_winograd(
    builder: Callable[[World, Task], Callable[[], Any]],
) -> Callable[[World, Task], Callable[[], Any]]:
    def build(world: World, task: Task) -> Callable[[], Any]:
        call = builder(world, task)

        def run() -> Any:
            with mock.patch.dict(os.environ, FASTUPER_CHOICES="conv3x3=direct"):
                return call()

        return run

    return build


def _our_head(model: Any, world: World, task: Task) -> None:
    model.decode_head = world.ours(task.dtype).decode_head


def _our_head_and_backbone(world: World, task: Task) -> Callable[[], Any]:
    model, pixels = world.ours(task.dtype), world.pixels(task)
    return lambda: _resize(model.decode_head(model.backbone(pixels).feature_maps), pixels.shape[2:])


def _ours(world: World, task: Task) -> Callable[[], Any]:
    model, pixels = world.ours(task.dtype), world.pixels(task)
    return lambda: model(pixels).logits


VARIANTS: dict[str, Peer] = {
    "Transformers": Peer(transformers_eager(CONTIGUOUS)),
    "channels_last": Peer(transformers_eager(CHANNELS_LAST)),
    "no auxiliary head": Peer(transformers_eager(CHANNELS_LAST, auxiliary=False)),
    "channels mixed before upsampling": Peer(_head(fusion=True)),
    "pyramid pooling on 50 cells": Peer(_head(fusion=True, pooling=True)),
    "norm and ReLU fused": Peer(_without_winograd(_head(fusion=True, pooling=True, convolutions=True))),
    "Winograd": Peer(_head(fusion=True, pooling=True, convolutions=True)),
    "our head as it is": Peer(_with(_our_head)),
    "our backbone": Peer(_our_head_and_backbone),
    "the rest: fastuper": Peer(_ours),
}

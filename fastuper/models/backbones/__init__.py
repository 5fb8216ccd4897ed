"""The backbones, and `build_backbone`, which makes the one that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastuper.models.backbones.convnext import ConvNextBackbone
from fastuper.models.backbones.foreign import TimmBackbone, transformers_backbone
from fastuper.models.backbones.layers import Backbone
from fastuper.models.backbones.resnet import ResNetBackbone
from fastuper.models.backbones.swin import SwinBackbone
from fastuper.models.configuration import BackboneConfig, ForeignBackboneConfig

__all__ = ["Backbone", "ConvNextBackbone", "ResNetBackbone", "SwinBackbone", "build_backbone"]

BACKBONES: dict[str, Callable[[Any], Backbone]] = {
    "convnext": ConvNextBackbone,
    "resnet": ResNetBackbone,
    "swin": SwinBackbone,
}


def build_backbone(config: BackboneConfig | ForeignBackboneConfig | None) -> Any:
    """Build a backbone with random weights: ours where we have the type, timm's or Transformers' otherwise.

    Returns:
        A module with `channels`, whose `forward(pixel_values, output_hidden_states, output_attentions)` returns a
        `BackboneOutput`.

    Raises:
        ValueError: there is no configuration.
        ImportError: the library that has it is not installed; the message names the extra.
    """
    if config is None:
        raise ValueError("the configuration has no backbone_config")
    if isinstance(config, BackboneConfig):
        return BACKBONES[config.model_type](config)
    return TimmBackbone(config) if config.model_type == "timm_backbone" else transformers_backbone(config)

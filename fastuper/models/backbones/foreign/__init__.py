"""Backbones that are not ours, with the interface of our own: timm's, Transformers' `AutoBackbone`, a user's module.

Each library is imported when one of its backbones is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastuper.models.backbones.foreign.custom import CUSTOM, CustomBackbone, custom_config
from fastuper.models.backbones.foreign.depths import count_layers, foreign_depth
from fastuper.models.backbones.foreign.measuring import Maps, Sizes
from fastuper.models.backbones.foreign.pyramids import measured_maps, neck_of
from fastuper.models.backbones.foreign.timm import TIMM, TimmBackbone, arguments_for_timm
from fastuper.models.backbones.foreign.transformers import (
    NAMES,
    pretrained_transformers_backbone,
    transformers_backbone,
    transformers_model_types,
)
from fastuper.models.configuration import ForeignBackboneConfig

__all__ = [
    "CUSTOM",
    "NAMES",
    "TIMM",
    "Maps",
    "Sizes",
    "TimmBackbone",
    "build",
    "custom_config",
    "foreign_depth",
    "is_only_here",
    "measured_maps",
    "neck_of",
    "pretrained_transformers_backbone",
    "transformers_model_types",
]


def build(config: ForeignBackboneConfig, module: nn.Module | None = None) -> nn.Module:
    """Build a backbone of timm or Transformers, with random weights unless the configuration asks timm for its own.

    Args:
        config: the configuration.
        module: the user's module, for the configuration of `custom_config`; None for all others.

    Raises:
        ImportError: the library is not installed; the message names the extra.
        ValueError: timm has no such model, or the model no such levels; or the user's module is missing.
    """
    if config.model_type == CUSTOM:
        return CustomBackbone(config, module)
    backbone: Any = TimmBackbone(config) if config.model_type == TIMM else transformers_backbone(config)
    is_flat = backbone.measured_maps.is_flat
    config.layers = count_layers([name for name, _ in backbone.named_parameters()], is_flat)
    return backbone


def is_only_here(values: Mapping[str, Any]) -> bool:
    """Return True if Transformers would read the values of a backbone's configuration as another network.

    It overlooks the neck and the arguments of timm's function, and takes maps (B, H, W, C) for (B, C, H, W).
    """
    if values.get("neck", "none") != "none" or "output_fmt" in values:
        return True
    return values.get("model_type") == TIMM and any(x is not None for x in arguments_for_timm(values).values())

"""A user's module as the backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from fastuper.io.messages import reason, shown
from fastuper.models.backbones.foreign.measuring import MAPS, black_image, evaluating
from fastuper.models.configuration import ForeignBackboneConfig
from fastuper.models.outputs import BackboneOutput
from fastuper_kernels.dispatch.modes import is_eager

CUSTOM = "custom"  # the model type of a user's module


def custom_config(module: nn.Module, channels: Sequence[int] | None = None) -> ForeignBackboneConfig:
    """Return the configuration of a user's module: the channels of its maps, and the name of its class.

    Args:
        module: its `forward` takes images (B, 3, H, W) and returns four maps; see `feature_maps_of`.
        channels: the channels of its maps. If None, the module sees a black image of 64 x 64, in evaluation mode and
            without gradients; its modes come back.

    Raises:
        TypeError: `module` is no module.
        ValueError: it refuses the image, or does not return four maps, finest first.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"the backbone must be a torch.nn.Module, got {type(module).__name__}")
    if channels is None:
        channels = [x.shape[1] for x in _maps_of_a_small_image(module)]
    return ForeignBackboneConfig(CUSTOM, channels=list(channels), class_name=type(module).__name__)


def _maps_of_a_small_image(module: nn.Module) -> tuple[torch.Tensor, ...]:
    try:
        with evaluating(module):
            output = module(black_image(module, 3, (64, 64)))
    except Exception as error:
        raise ValueError(
            f"{type(module).__name__} refuses an image of (1, 3, 64, 64): {reason(error)}; give channels=, the "
            "channels of its four maps, and no image is tried"
        ) from error
    maps = feature_maps_of(output, type(module).__name__)
    _check_order(maps, type(module).__name__)
    return maps


def feature_maps_of(output: Any, name: str) -> tuple[torch.Tensor, ...]:
    """Return the four maps in the output of a user's module.

    Args:
        output: a list or tuple of tensors (B, C_l, H_l, W_l), a dictionary of them in this order, or an object that has
            them as `feature_maps`.
        name: the module's name, for the message of an error.

    Raises:
        ValueError: it holds something else.
    """
    maps = getattr(output, "feature_maps", None)
    if maps is None:
        maps = list(output.values()) if isinstance(output, Mapping) else output
    if not isinstance(maps, list | tuple):
        raise ValueError(
            f"{name} must return four feature maps: a list, tuple or dictionary of tensors, or an object with "
            f"feature_maps; it returns {type(output).__name__}"
        )
    if len(maps) != MAPS:
        raise ValueError(f"{name} must return four feature maps, finest first; it returns {len(maps)}")
    for x in maps:
        if not isinstance(x, torch.Tensor) or x.ndim != 4:
            found = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"{name} must return feature maps (B, C, H, W); one of its maps is {found}")
    return tuple(maps)


def _check_order(maps: Sequence[torch.Tensor], name: str) -> None:
    """Raise ValueError if a map is larger than the map before it."""
    sizes = [tuple(x.shape[2:]) for x in maps]
    if any(fine[side] < coarse[side] for fine, coarse in pairwise(sizes) for side in (0, 1)):
        raise ValueError(f"{name} must return its feature maps finest first; their sizes are {sizes}")


class CustomBackbone(nn.Module):
    """A user's module as a backbone. Its tensors are named `backbone.module...`; nothing initialises them.

    Args:
        config: its values are `channels`, the channels of each map, and `class_name`, the name of the module's class.
        module: the module; see `custom_config`.

    Attributes:
        channels: channels of each returned map.

    Raises:
        ValueError: the module is missing, or `channels` are not four numbers.
    """

    def __init__(self, config: ForeignBackboneConfig, module: nn.Module | None):
        super().__init__()
        name, channels = config.values.get("class_name"), config.values.get("channels")
        if module is None:
            raise ValueError(
                f"the backbone is a user's module of the class {shown(name)}, which a configuration cannot build: pass "
                "backbone=, the module"
            )
        if (
            not isinstance(channels, list | tuple)
            or len(channels) != MAPS
            or not all(type(number) is int and 1 <= number <= 65_536 for number in channels)
        ):
            raise ValueError(f"channels must be four whole numbers, the channels of each map, got {shown(channels)}")
        self.config = config
        self.channels = list(channels)
        self.module = module

    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool = False, output_attentions: bool = False
    ) -> BackboneOutput:
        """Return the feature maps of an image (B, C, H, W), each (B, C_l, H_l, W_l), also as the hidden states.

        Raises:
            ValueError: `output_attentions` is True, or the module does not return the maps that it should.
        """
        if output_attentions:
            raise ValueError("a user's module gives no attentions; leave output_attentions out")
        name = type(self.module).__name__
        maps = feature_maps_of(self.module(pixel_values), name)
        if is_eager():
            if (found := [x.shape[1] for x in maps]) != self.channels:
                raise ValueError(f"{name} returns maps of {found} channels; the model was built for {self.channels}")
            _check_order(maps, name)
        return BackboneOutput(maps, maps if output_hidden_states else None)

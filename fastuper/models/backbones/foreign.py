"""Backbones that are not ours, with the interface of our own: timm's, Transformers' `AutoBackbone`, a user's module.

Each library is imported when one of its backbones is built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from fastuper.io.messages import listed, reason, shown
from fastuper.models.configuration import ForeignBackboneConfig
from fastuper.models.outputs import BackboneOutput
from fastuper.weights.errors import CheckpointError
from fastuper.weights.transformers import OUTPUT_NORMS, Names
from fastuper_kernels.dispatch.modes import is_eager

TIMM = "timm_backbone"  # the model type of all of timm's models, in Transformers too
CUSTOM = "custom"  # the model type of a user's module

# Transformers' windowed backbones, such as MaskFormer's Swin, name their computed buffer as Swin does.
NAMES = Names(computed=("relative_position_index",))


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
    return TimmBackbone(config) if config.model_type == TIMM else transformers_backbone(config)


class TimmBackbone(nn.Module):
    """A timm model that returns its feature maps; its tensors have Transformers' names (`backbone._backbone...`).

    Args:
        config: its values are `backbone`, the model's name; `out_indices`, the levels to return (the last four if
            None); `num_channels`, the channels of an image (3 if missing); `use_pretrained_backbone`, True if timm
            loads its weights; `freeze_batch_norm_2d`, True to fix the statistics of BatchNorm.

    Attributes:
        channels: channels of each returned map.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm has no such model, or the model no such levels.
    """

    def __init__(self, config: ForeignBackboneConfig):
        try:
            import timm
            import timm.utils.model
        except ImportError:
            raise ImportError("a timm backbone needs timm: pip install 'fastuper[timm]'") from None
        super().__init__()
        values = config.values
        if not isinstance(values.get("backbone"), str) or not timm.is_model(values["backbone"]):
            raise ValueError(f"timm {timm.__version__} has no model {values.get('backbone')!r}; see timm.list_models()")
        # By default Transformers returns only the last level, from which it cannot build a UPerNet with an auxiliary
        # head. The levels are written to the configuration: a saved model is the same network in Transformers.
        if values.get("out_indices") in (None, [-1], (-1,)):
            values["out_indices"] = [-4, -3, -2, -1]
        if not isinstance(values["out_indices"], list | tuple):
            raise ValueError(f"out_indices must be a list of levels, got {shown(values['out_indices'])}")
        indices = tuple(values["out_indices"])
        # A model on the meta device takes its weights from a checkpoint.
        pretrained = bool(values.get("use_pretrained_backbone")) and torch.get_default_device().type != "meta"
        with torch.device("cpu"):  # timm computes with the tensors that it creates, which the meta device cannot
            try:
                model: Any = timm.create_model(
                    values["backbone"],
                    pretrained=pretrained,
                    features_only=True,
                    in_chans=values.get("num_channels", 3),
                    out_indices=indices,
                )
            except (IndexError, AssertionError):
                raise ValueError(
                    f"timm's {values['backbone']} has no levels {list(indices)}; give other out_indices"
                ) from None
            except TypeError as error:
                raise ValueError(
                    f"timm cannot build {values['backbone']} of its configuration: {reason(error)}"
                ) from error
        if values.get("freeze_batch_norm_2d"):
            timm.utils.model.freeze_batch_norm_2d(model)
        self.config = config
        self.channels: list[int] = model.feature_info.channels()
        self._backbone = model

    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool = False, output_attentions: bool = False
    ) -> BackboneOutput:
        """Return the feature maps of an image (B, C, H, W), each (B, C_l, H_l, W_l), also as the hidden states.

        Raises:
            ValueError: `output_attentions` is True.
        """
        if output_attentions:
            raise ValueError("a timm backbone gives no attentions; leave output_attentions out")
        feature_maps = tuple(self._backbone(pixel_values))
        return BackboneOutput(feature_maps, feature_maps if output_hidden_states else None)

    def forward_with_filtered_kwargs(self, *args: Any, **kwargs: Any) -> BackboneOutput:
        """Call the backbone without the arguments that it does not have; Transformers' name."""
        known = ("output_hidden_states", "output_attentions")
        return self(*args, **{name: value for name, value in kwargs.items() if name in known})


MAPS = 4
"""The number of maps that a user's module returns."""


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
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    image = tensors[0].new_zeros(1, 3, 64, 64) if tensors else torch.zeros(1, 3, 64, 64)
    modes = {part: part.training for part in module.modules()}
    try:
        with torch.no_grad():
            output = module.eval()(image)
    except Exception as error:
        raise ValueError(
            f"{type(module).__name__} refuses an image of (1, 3, 64, 64): {reason(error)}; give channels=, the "
            "channels of its four maps, and no image is tried"
        ) from error
    finally:
        for part, mode in modes.items():
            part.training = mode
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


def transformers_backbone(config: ForeignBackboneConfig) -> nn.Module:
    """Return a backbone of Transformers' `AutoBackbone`, unwrapped: a wrapper would change its parameters' names.

    Args:
        config: `model_type`, and the values of Transformers' configuration of that type.

    Raises:
        ImportError: Transformers is not installed.
        ValueError: Transformers cannot build the backbone; the message gives its reason.
    """
    try:
        from transformers import AutoBackbone, AutoConfig
    except ImportError:
        raise ImportError(
            f"a {config.model_type!r} backbone needs Transformers: pip install 'fastuper[transformers]'"
        ) from None
    with torch.device("cpu"):
        try:
            return AutoBackbone.from_config(AutoConfig.for_model(config.model_type, **config.values))
        except (ImportError, RuntimeError, MemoryError):  # a missing library; no memory
            raise
        except Exception as error:  # each model type checks its values in its own way, or not at all
            raise ValueError(
                f"Transformers cannot build a {config.model_type!r} backbone of its configuration: {reason(error)}"
            ) from error


ADDED = (OUTPUT_NORMS, "fpn", "layernorm.", "norm.")
"""Parts of Transformers' backbones that a classifier may lack, each as a whole."""


def pretrained_transformers_backbone(backbone: nn.Module, source: str) -> nn.Module:
    """Return a backbone of Transformers with the weights of a checkpoint, usually a classifier's.

    Args:
        backbone: a backbone of the same configuration, as `transformers_backbone` returns it.
        source: a folder or the id of a Hub repository.

    Raises:
        CheckpointError: the checkpoint has only a part of the backbone's tensors.
    """
    network: Any = type(backbone)  # AutoBackbone of Transformers 5.24 loads no folder
    loaded, info = network.from_pretrained(source, config=backbone.config, output_loading_info=True)
    own = [name for name in loaded.state_dict() if not NAMES.is_computed(name)]
    missing = {name for name in info["missing_keys"] if not NAMES.is_computed(name)}
    for part in ADDED:
        whole = {name for name in own if name.startswith(part)}
        if whole <= missing:
            missing -= whole
    if missing:
        raise CheckpointError(
            f"{source} lacks {len(missing)} of the {len(own)} tensors of a {type(backbone).__name__}, such as "
            f"{listed(sorted(missing), 2)}; it belongs to another model, or to another version of Transformers"
        )
    return loaded


def transformers_model_types() -> frozenset[str]:
    """Return the model types of Transformers' `AutoBackbone`; none if Transformers is not installed."""
    if find_spec("transformers") is None:
        return frozenset()
    from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

    return frozenset(MODEL_FOR_BACKBONE_MAPPING_NAMES)

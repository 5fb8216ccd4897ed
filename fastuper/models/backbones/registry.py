"""The registry of backbone families, and `build_backbone`, which builds the network of a configuration.

A family is one file beside this one. It defines a configuration and a network, and passes both to `register`, with the
family's presets, layer depths and names in checkpoints. All code that depends on a family's `model_type` reads it here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import nn

from fastuper.models.backbones import foreign
from fastuper.models.backbones.layers import Backbone
from fastuper.models.configuration import BackboneConfig, ForeignBackboneConfig
from fastuper.weights.transformers import Names

Preset: TypeAlias = Callable[[], BackboneConfig]
Depths: TypeAlias = Callable[[str, Any], int]
RecipeName: TypeAlias = Callable[[Any], str]


@dataclass(frozen=True)
class Family:
    """A family of backbones: all that the rest of the library has to read about it.

    Args:
        model_type: the family's name in config.json, the `model_type` of its configuration class.
        config: its configuration class.
        network: its network; `network(config)` builds it.
        presets: functions that return a configuration, by the preset's name ("convnext-tiny").
        depths: returns how many times layer-wise learning rate decay applies to a parameter, from the parameter's name
            in the network and the backbone's configuration; see `stage_depths`. None if the family does not support the
            decay.
        names: the names of its tensors in the checkpoints of Transformers, where they are not the network's.
        recipe: returns the name of the training recipe, in `fastuper.recipes`, from the backbone's configuration. None
            if the family has one recipe for all sizes, which has the name of the family, or none.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: `model_type` is empty, another library's, or not that of the configuration class.
    """

    model_type: str
    config: type[BackboneConfig]
    network: type[Backbone]
    presets: Mapping[str, Preset] = field(default_factory=dict)
    depths: Depths | None = None
    names: Names = field(default_factory=Names)
    recipe: RecipeName | None = None

    def __post_init__(self) -> None:
        for argument, base in (("config", BackboneConfig), ("network", Backbone)):
            given = getattr(self, argument)
            if not (isinstance(given, type) and issubclass(given, base)):
                raise TypeError(f"backbone {self.model_type!r}: {given!r} is not a subclass of {base.__name__}")
        if not self.model_type or self.model_type != self.config.model_type:
            raise ValueError(
                f"backbone {self.model_type!r}: {self.config.__name__}.model_type is {self.config.model_type!r}; "
                "both must be the same name"
            )
        if self.model_type in (foreign.TIMM, foreign.CUSTOM):
            owner = "the models of timm" if self.model_type == foreign.TIMM else "users' modules"
            raise ValueError(f"model_type {self.model_type!r} is reserved for {owner}; choose another name")
        for name, preset in self.presets.items():
            if not callable(preset):
                raise TypeError(f"preset {name!r} must be a function that returns a configuration, got {preset!r}")
        if self.depths is not None and not callable(self.depths):
            raise TypeError(
                f"backbone {self.model_type!r}: depths must be a function of a name and a configuration, got "
                f"{self.depths!r}"
            )
        if self.recipe is not None and not callable(self.recipe):
            raise TypeError(
                f"backbone {self.model_type!r}: recipe must be a function of a configuration, got {self.recipe!r}"
            )
        if not isinstance(self.names, Names):
            raise TypeError(f"backbone {self.model_type!r}: names must be a Names, got {self.names!r}")


FAMILIES: dict[str, Family] = {}
"""The registered families, by `model_type`."""

PRESETS: dict[str, Preset] = {}
"""The presets of all registered families, by name. Each call returns a new configuration; weights are random."""


def register(
    model_type: str,
    config: type[BackboneConfig],
    network: type[Backbone],
    *,
    presets: Mapping[str, Preset] | None = None,
    depths: Depths | None = None,
    names: Names | None = None,
    recipe: RecipeName | None = None,
) -> Family:
    """Register a family of backbones, so that configurations, checkpoints, recipes and `fastuper train` support it.

    Args:
        model_type: see `Family` for this and all other arguments.
        config: the configuration class.
        network: the network.
        presets: configurations by name.
        depths: layer depths for the decay of learning rates.
        names: names in checkpoints; the network's names if None.
        recipe: the name of the training recipe.

    Returns:
        The family. `unregister(model_type)` removes it.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the model type or the name of a preset is not valid or already registered.
    """
    names = Names() if names is None else names
    family = Family(model_type, config, network, dict(presets or {}), depths, names, recipe)
    if model_type in FAMILIES:
        raise ValueError(f"a backbone {model_type!r} is already registered: {FAMILIES[model_type].network.__name__}")
    for name in family.presets:
        if name in PRESETS:
            owner = next(other.model_type for other in FAMILIES.values() if name in other.presets)
            raise ValueError(f"backbone {model_type!r}: the preset {name!r} is already registered, for {owner!r}")
    FAMILIES[model_type] = family
    PRESETS.update(family.presets)
    return family


def unregister(model_type: str) -> None:
    """Remove a family and its presets from the registry; models that exist keep working.

    Raises:
        ValueError: there is no such family.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"no backbone {model_type!r} is registered; there are {', '.join(sorted(FAMILIES))}")
    for name in FAMILIES.pop(model_type).presets:
        del PRESETS[name]


def build_backbone(config: BackboneConfig | ForeignBackboneConfig | None, module: nn.Module | None = None) -> Any:
    """Build a backbone with random weights: a network of a registered family, or one of timm or Transformers.

    Args:
        config: its configuration.
        module: a user's module, if the configuration is that of `foreign.custom_config`.

    Returns:
        A module with the attribute `channels`, the channels of each returned map. Its
        `forward(pixel_values, output_hidden_states, output_attentions)` returns a `BackboneOutput`.

    Raises:
        ValueError: `config` is None, or the family of its `model_type` is not registered; or `module` is given, and the
            configuration describes another backbone.
        ImportError: the backbone's library is not installed; the message names the extra.
    """
    if config is None:
        raise ValueError("the configuration has no backbone_config")
    if module is not None and config.model_type != foreign.CUSTOM:
        raise ValueError(
            f"the configuration describes a {config.model_type!r} backbone, which is built from it: leave out the "
            "module, or build the model with over(module)"
        )
    if isinstance(config, ForeignBackboneConfig):
        return foreign.build(config, module)
    if config.model_type not in FAMILIES:
        raise ValueError(f"no backbone {config.model_type!r} is registered; there are {', '.join(sorted(FAMILIES))}")
    network: Callable[[BackboneConfig], Backbone] = FAMILIES[config.model_type].network
    return network(config)


def checkpoint_names(model_type: str) -> Names:
    """Return the checkpoint names of a family, or the checkpoint names of other libraries' backbones."""
    return FAMILIES[model_type].names if model_type in FAMILIES else foreign.NAMES


def layer_depths(model_type: str) -> Depths:
    """Return a family's function of layer depths; see `Family.depths`. For backbones of other libraries it counts.

    Raises:
        ValueError: there is no such family, or it has no layer depths.
    """
    if model_type == foreign.TIMM or (model_type not in FAMILIES and model_type in foreign.transformers_model_types()):
        return foreign.foreign_depth
    family = FAMILIES.get(model_type)
    if family is None or family.depths is None:
        known = ", ".join(sorted(name for name, other in FAMILIES.items() if other.depths is not None))
        raise ValueError(f"layer_decay needs a backbone with layer depths ({known}); {model_type!r} has none")
    return family.depths


def stage_depths(blocks: str) -> Depths:
    """Return the layer depths of ConvNeXt's authors (https://arxiv.org/abs/2201.03545), for networks of four stages.

    Norms of the returned maps (`hidden_states_norms`) have depth 0, like the heads. Blocks have depth 3 in the last
    stage, and one more in each stage before it. The stem, and the layers between two stages, have depth 7.

    Args:
        blocks: a regular expression that matches the beginning of the name of a block's parameter. Its group is the
            number of the stage, from 0.
    """
    pattern = re.compile(blocks)

    def depth(name: str, config: Any) -> int:
        if name.startswith("hidden_states_norms."):
            return 0
        match = pattern.match(name)
        return 7 if match is None else 6 - int(match[1])

    return depth

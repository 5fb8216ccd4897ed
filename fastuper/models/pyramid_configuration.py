"""`PyramidConfig`, the base of the configurations of models over a backbone, and conversions of backbones' own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from fastuper.io.messages import shown
from fastuper.models.backbones.foreign import CUSTOM, TIMM, transformers_model_types
from fastuper.models.backbones.registry import FAMILIES
from fastuper.models.configuration import BackboneConfig, Config, ForeignBackboneConfig

MARK = "fastuper_"
"""What a backbone's `model_type` begins with, in the config.json of a model that Transformers must refuse."""


class PyramidConfig(Config):
    """Base of the configurations of models with a backbone and a feature pyramid: `backbone_config`.

    A subclass has the attribute `pool_scales` and sets `backbone_config` last in its constructor.
    """

    sub_configs = {"backbone_config": Config}  # noqa: RUF012

    def check(self) -> None:
        """Check all values, the backbone's too; see `Config.check`."""
        super().check()
        backbone = getattr(self, "_backbone_config", None)  # the constructor sets it last
        if backbone is not None:
            backbone.check()

    @property
    def backbone_config(self) -> Any:
        """The backbone's configuration, in a class of ours and with all the stages that the heads need.

        Our configurations, Transformers' and dictionaries may be assigned; each assignment makes a copy.
        """
        return self._backbone_config

    @backbone_config.setter
    def backbone_config(self, config: Any) -> None:
        self._backbone_config = config = None if config is None else backbone_config_from(config)
        if config is not None and self._reads_all_stages:
            config.read_all_stages()

    @property
    def _reads_all_stages(self) -> bool:
        """Whether a backbone configuration that names no stages, or only the last, returns all of them."""
        return True

    def to_dict(self) -> dict[str, Any]:
        """Return all values, in types that JSON supports."""
        values = super().to_dict()
        values["backbone_config"] = None if self.backbone_config is None else self.backbone_config.to_dict()
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the values that define the network: all but those that every configuration has by default."""
        values = super().to_diff_dict()
        if self.backbone_config is not None:
            values["backbone_config"] = self.backbone_config.to_diff_dict()
        return values


def backbone_config_from(config: Any) -> BackboneConfig | ForeignBackboneConfig:
    """Return a copy of a backbone's configuration, in a class of ours.

    Args:
        config: our configuration, Transformers', or a dictionary with "model_type", which may begin with `MARK`.

    Raises:
        TypeError: `config` is neither a configuration nor a dictionary.
        ValueError: no family of ours and no backbone of an installed Transformers has its `model_type`; the message
            lists the known types.
    """
    if isinstance(config, BackboneConfig | ForeignBackboneConfig):
        return copy.deepcopy(config)
    values = as_dict(config)
    if values is None:
        raise TypeError(f"expected a backbone's configuration or its dictionary, got {type(config).__name__}")
    model_type = values.pop("model_type", None)
    if not isinstance(model_type, str):
        raise ValueError(f"the backbone's model_type must be a text, got {shown(model_type)}")
    model_type = model_type.removeprefix(MARK)
    if model_type in FAMILIES:
        return FAMILIES[model_type].config(**values)
    if model_type in (CUSTOM, TIMM) or model_type in transformers_model_types():
        return ForeignBackboneConfig(model_type, **values)
    known = [*sorted(FAMILIES), TIMM]
    hint = "" if find_spec("transformers") else "; with Transformers installed, those of its AutoBackbone"
    raise ValueError(f"backbone type {shown(model_type)} is not known; known are {', '.join(known)}{hint}")


def as_dict(config: Any) -> dict[str, Any] | None:
    """Return the values of a configuration or a dictionary; None for anything else."""
    if isinstance(config, Mapping):
        return dict(config)
    return config.to_dict() if hasattr(config, "to_dict") else None

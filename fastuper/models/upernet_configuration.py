"""`UperNetConfig`, and conversions of Transformers' configurations and of dictionaries to it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastuper.io.files import read_json
from fastuper.io.hub import CONFIG_NAME, find_file
from fastuper.io.messages import listed, shown
from fastuper.models.backbones.foreign import TIMM, is_only_here
from fastuper.models.backbones.registry import FAMILIES
from fastuper.models.backbones.resnet import ResNetConfig
from fastuper.models.configuration import BackboneConfig, ForeignBackboneConfig, as_list, overridden
from fastuper.models.pyramid_configuration import MARK, PyramidConfig, as_dict, backbone_config_from

WITH_OPTIONS = "fastuper_upernet"
"""The `model_type` in the config.json of a model with options that Transformers lacks."""

OPTIONS: Mapping[str, Any] = {"align_corners": False, "output_align_corners": None, "feature_norms": False}
"""The options that Transformers lacks, and their defaults."""


class UperNetConfig(PyramidConfig):
    """UPerNet (https://arxiv.org/abs/1807.10221): a backbone, the head over its feature maps, an auxiliary head.

    Arguments and defaults equal Transformers 4.56's, except two defaults with which Transformers cannot build a model:

    - the auxiliary head needs three maps; a backbone configuration without a selection of stages gives all stages, not
      only the last;
    - a timm backbone without `out_indices` gives its last four levels.

    Args:
        backbone_config: the backbone's configuration, ours or Transformers', or its dictionary; ResNet-50 if None.
        backbone: instead of `backbone_config`, a timm model's name (with `use_timm_backbone`), or a folder or Hub id
            with the backbone's config.json.
        use_pretrained_backbone: True to load the weights of `backbone`.
        use_timm_backbone: True if `backbone` is a timm model.
        backbone_kwargs: overrides of the configuration of `backbone`, such as `out_indices`.
        hidden_size: channels of the head.
        initializer_range: standard deviation of the heads' initial weights.
        pool_scales: sides of the grids of the pyramid pooling module.
        use_auxiliary_head: True for an auxiliary head, which runs only if labels are given.
        auxiliary_loss_weight: the weight of the auxiliary head's loss.
        auxiliary_in_channels: channels of the auxiliary head's input, the third feature map; the backbone's if None.
        auxiliary_channels: channels of the auxiliary head.
        auxiliary_num_convs: the number of 3x3 convolutions before the auxiliary head's classifier.
        auxiliary_concat_input: True to concatenate the auxiliary head's input before its classifier.
        loss_ignore_index: the label of pixels that the loss leaves out.
        align_corners: of every resampling (bilinear) of the head and of the logits, the auxiliary head's too, as for
            `F.interpolate`. With True the head's fused convolutions do not run.
        output_align_corners: of the resampling of the logits alone; None for `align_corners`.
        feature_norms: True for a LayerNorm over the channels (epsilon 1e-6) of each feature map before the head. The
            auxiliary head reads the map before its norm.
        **extra: see `Config`.

    Raises:
        ValueError: arguments contradict each other, or the type of backbone is unknown.
    """

    model_type = "upernet"
    other_model_types = (WITH_OPTIONS,)

    def __init__(
        self,
        backbone_config: Any = None,
        backbone: str | None = None,
        use_pretrained_backbone: bool = False,
        use_timm_backbone: bool = False,
        backbone_kwargs: Mapping[str, Any] | None = None,
        hidden_size: int = 512,
        initializer_range: float = 0.02,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        use_auxiliary_head: bool = True,
        auxiliary_loss_weight: float = 0.4,
        auxiliary_in_channels: int | None = None,
        auxiliary_channels: int = 256,
        auxiliary_num_convs: int = 1,
        auxiliary_concat_input: bool = False,
        loss_ignore_index: int = 255,
        align_corners: bool = False,
        output_align_corners: bool | None = None,
        feature_norms: bool = False,
        **extra: Any,
    ):
        if backbone_config is not None:
            for name, value in {
                "backbone": backbone,
                "use_timm_backbone": use_timm_backbone,
                "backbone_kwargs": backbone_kwargs,
            }.items():
                if value:
                    raise ValueError(f"give either backbone_config or {name}, not both")
        if use_timm_backbone and backbone is None:
            raise ValueError("use_timm_backbone=True needs backbone, the name of a timm model")
        if use_pretrained_backbone and backbone is None:
            raise ValueError("use_pretrained_backbone=True needs backbone, the name of the model to load")
        if not isinstance(backbone_kwargs, Mapping | None):
            raise ValueError(f"backbone_kwargs must map names to values, got {shown(backbone_kwargs)}")
        super().__init__(**extra)
        self.backbone = backbone
        self.use_pretrained_backbone = use_pretrained_backbone
        self.use_timm_backbone = use_timm_backbone
        self.backbone_kwargs = None if backbone_kwargs is None else dict(backbone_kwargs)
        self.hidden_size = hidden_size
        self.initializer_range = initializer_range
        self.pool_scales = as_list(pool_scales)
        self.use_auxiliary_head = use_auxiliary_head
        self.auxiliary_loss_weight = auxiliary_loss_weight
        self.auxiliary_in_channels = auxiliary_in_channels
        self.auxiliary_channels = auxiliary_channels
        self.auxiliary_num_convs = auxiliary_num_convs
        self.auxiliary_concat_input = auxiliary_concat_input
        self.loss_ignore_index = loss_ignore_index
        self.align_corners = align_corners
        self.output_align_corners = output_align_corners
        self.feature_norms = feature_norms
        self.check()
        if backbone_config is None and backbone is None:
            backbone_config = ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
        self.backbone_config = backbone_config

    @classmethod
    def _from_file(cls, values: dict[str, Any]) -> dict[str, Any]:
        return _of_transformers(values)

    @classmethod
    def _check_file(cls, path: Path, values: Mapping[str, Any]) -> None:
        """Refuse another kind of model, options that Transformers would overlook, and a folder outside the file's."""
        super()._check_file(path, values)
        if fault := _overlooked(values):
            raise ValueError(f"{path}: {fault}")
        named = values.get("backbone")
        if values.get("use_timm_backbone") or not isinstance(named, str):
            return
        if os.path.isdir(named) and not Path(named).resolve().is_relative_to(path.parent.resolve()):
            raise ValueError(
                f"{path} names the backbone {shown(named)}, a folder outside its own, which is not read; give the file "
                "a backbone_config, or pass config=UperNetConfig(backbone=...)"
            )

    @property
    def aligns_output(self) -> bool:
        """`align_corners` of the resampling of the logits."""
        return bool(self.align_corners if self.output_align_corners is None else self.output_align_corners)

    def to_dict(self) -> dict[str, Any]:
        """Return all values, in types that JSON supports.

        Options that Transformers lacks are left out at their defaults. With another value of one, and over a backbone
        that Transformers would read as another network (`is_only_here`), "model_type" is "fastuper_upernet" and the
        backbone's begins with "fastuper_": Transformers refuses both, and cannot load another network than this.
        """
        return _marked(super().to_dict())

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the values that define the network: all but those that every configuration has by default."""
        return _marked(super().to_diff_dict())

    @property
    def _reads_all_stages(self) -> bool:
        # The auxiliary head reads the third map: with one stage alone Transformers fails with an IndexError.
        return self.use_auxiliary_head


def upernet_config_from(config: Any) -> UperNetConfig:
    """Return a `UperNetConfig`: the given object itself, or a copy of Transformers' configuration or a dictionary.

    Raises:
        TypeError: `config` is not a UPerNet's configuration.
        ValueError: a value is out of its bounds.
    """
    if isinstance(config, UperNetConfig):
        config.check()  # attributes may have been set since the configuration was made
        return config
    values = as_dict(config)
    if values is None or not UperNetConfig.reads(values.get("model_type", UperNetConfig.model_type)):
        raise TypeError(f"expected a UperNetConfig, ours or Transformers', got {type(config).__name__}")
    if fault := _overlooked(values):
        raise ValueError(fault)
    return UperNetConfig.from_dict(_of_transformers(values))


def _of_transformers(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a configuration; of one that Transformers has written, without a neck that it lacks.

    In Transformers the heads read the maps of a vision transformer as they are, and a checkpoint has no neck. Where
    Transformers can build no network (the auxiliary head reads the third map), the backbone is read as one of ours.
    """
    backbone = values.get("backbone_config")
    given = values.get("backbone_kwargs") if backbone is None else backbone
    given = dict(given) if isinstance(given, Mapping) else {}
    named = given.get("out_features") or given.get("out_indices") or [None]
    is_built = not values.get("use_auxiliary_head", True) or not isinstance(named, Sequence) or len(named) >= 3
    if "transformers_version" not in values or given.get("model_type") in FAMILIES or "neck" in given or not is_built:
        return values
    if backbone is not None:
        return {**values, "backbone_config": {**given, "neck": "none"}}
    return {**values, "backbone_kwargs": {**given, "neck": "none"}} if values.get("backbone") else values


def _marked(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a config.json without options at their defaults, and with model types by `to_dict`."""
    values = {name: value for name, value in values.items() if name not in OPTIONS or value != OPTIONS[name]}
    backbone = values.get("backbone_config")
    is_foreign = backbone is not None and backbone["model_type"] not in FAMILIES
    if OPTIONS.keys().isdisjoint(values) and not (is_foreign and is_only_here(backbone or {})):
        return values
    if backbone is not None:
        values["backbone_config"] = {**backbone, "model_type": MARK + backbone["model_type"]}
    return {**values, "model_type": WITH_OPTIONS}


def _overlooked(values: Mapping[str, Any]) -> str:
    """Return what is wrong with options in a config.json that Transformers would read without them; "" if nothing."""
    given = [name for name, default in OPTIONS.items() if values.get(name, default) != default]
    if not given or values.get("model_type") != UperNetConfig.model_type:
        return ""
    return f"Transformers would overlook {listed(given)}: a model with such options has the model_type {WITH_OPTIONS!r}"


def named_backbone_config(config: UperNetConfig) -> BackboneConfig | ForeignBackboneConfig:
    """Return the configuration of the backbone that `config.backbone` names: a timm model, a folder or a Hub id.

    Raises:
        OSError: the folder or the repository has no config.json, or cannot be reached.
        TypeError: the configuration has no value of a name in `backbone_kwargs`.
    """
    assert config.backbone is not None
    overrides = config.backbone_kwargs or {}
    if config.use_timm_backbone:
        overrides = {"use_pretrained_backbone": config.use_pretrained_backbone, **overrides}
        return ForeignBackboneConfig(TIMM, backbone=config.backbone, **overrides)
    path = find_file(config.backbone, CONFIG_NAME)
    if path is None:
        raise FileNotFoundError(f"backbone={config.backbone!r} has no {CONFIG_NAME}")
    saved = backbone_config_from(read_json(path))
    if isinstance(saved, BackboneConfig):
        if overrides.get("neck") == "none" and not hasattr(saved, "neck"):  # of a checkpoint of Transformers
            overrides = {name: value for name, value in overrides.items() if name != "neck"}
        return type(saved).from_dict(saved.to_dict(), **overrides)
    return ForeignBackboneConfig(saved.model_type, **overridden(saved.values, overrides))

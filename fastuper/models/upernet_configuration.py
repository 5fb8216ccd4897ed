"""`UperNetConfig`, and conversions of Transformers' configurations and of dictionaries to it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastuper.io.files import read_json
from fastuper.io.hub import CONFIG_NAME, find_file
from fastuper.io.messages import shown
from fastuper.models.backbones.foreign import TIMM
from fastuper.models.backbones.resnet import ResNetConfig
from fastuper.models.configuration import BackboneConfig, ForeignBackboneConfig, as_list, overridden
from fastuper.models.pyramid_configuration import PyramidConfig, as_dict, backbone_config_from


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
        **extra: see `Config`.

    Raises:
        ValueError: arguments contradict each other, or the type of backbone is unknown.
    """

    model_type = "upernet"

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
        self.check()
        if backbone_config is None and backbone is None:
            backbone_config = ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
        self.backbone_config = backbone_config

    @classmethod
    def _check_file(cls, path: Path, values: Mapping[str, Any]) -> None:
        """Refuse the config.json of another kind of model, and one that has a folder outside its own read."""
        super()._check_file(path, values)
        named = values.get("backbone")
        if values.get("use_timm_backbone") or not isinstance(named, str):
            return
        if os.path.isdir(named) and not Path(named).resolve().is_relative_to(path.parent.resolve()):
            raise ValueError(
                f"{path} names the backbone {shown(named)}, a folder outside its own, which is not read; give the file "
                "a backbone_config, or pass config=UperNetConfig(backbone=...)"
            )

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
    if values is None or values.get("model_type", "upernet") != "upernet":
        raise TypeError(f"expected a UperNetConfig, ours or Transformers', got {type(config).__name__}")
    return UperNetConfig.from_dict(values)


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
        return type(saved).from_dict(saved.to_dict(), **overrides)
    return ForeignBackboneConfig(saved.model_type, **overridden(saved.values, overrides))

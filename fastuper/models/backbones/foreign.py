"""Backbones of other libraries behind the interface of ours; they are imported only when one is built."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastuper.models.configuration import ForeignBackboneConfig
from fastuper.models.outputs import BackboneOutput


class TimmBackbone(nn.Module):
    """A timm model that gives features, named as Transformers names it (`backbone._backbone...`).

    Args:
        config: `backbone` is the model's name, `out_indices` its levels (the last four where nothing is said),
            `num_channels` the image's channels, `use_pretrained_backbone` whether timm loads its weights.

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
        if not timm.is_model(values.get("backbone") or ""):
            raise ValueError(f"timm {timm.__version__} has no model {values.get('backbone')!r}; see timm.list_models()")
        # Transformers' default, the last level alone, gives an UPerNet that it cannot build (with an auxiliary head).
        # The levels go into the configuration, so that what is saved means the same network there.
        if values.get("out_indices") in (None, [-1], (-1,)):
            values["out_indices"] = [-4, -3, -2, -1]
        indices = tuple(values["out_indices"])
        # A model that is built on the meta device gets its weights from a checkpoint.
        pretrained = bool(values.get("use_pretrained_backbone")) and torch.get_default_device().type != "meta"
        with torch.device("cpu"):  # timm computes with what it creates, so that it cannot be on the meta device
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
        if values.get("freeze_batch_norm_2d"):
            timm.utils.model.freeze_batch_norm_2d(model)
        self.config = config
        self.channels: list[int] = model.feature_info.channels()
        self._backbone = model

    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool = False, output_attentions: bool = False
    ) -> BackboneOutput:
        """Return the feature maps of an image (B, C, H, W), each (B, C_l, H_l, W_l); they are the hidden states too.

        Raises:
            ValueError: attentions are asked for.
        """
        if output_attentions:
            raise ValueError("a timm backbone gives no attentions; leave output_attentions out")
        feature_maps = tuple(self._backbone(pixel_values))
        return BackboneOutput(feature_maps, feature_maps if output_hidden_states else None)


def transformers_backbone(config: ForeignBackboneConfig) -> nn.Module:
    """Return a backbone of Transformers' `AutoBackbone` itself: a wrapper would change the names of its parameters.

    Args:
        config: `model_type`, and the values of Transformers' configuration of that type.
    """
    try:
        from transformers import AutoBackbone, AutoConfig
    except ImportError:
        raise ImportError(
            f"a {config.model_type!r} backbone needs Transformers: pip install 'fastuper[transformers]'"
        ) from None
    with torch.device("cpu"):
        return AutoBackbone.from_config(AutoConfig.for_model(config.model_type, **config.values))

"""Backbones of other libraries, with the interface of our own: timm's models, and Transformers' `AutoBackbone`.

Each library is imported when one of its backbones is built.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from fastuper.io.messages import reason, shown
from fastuper.models.configuration import ForeignBackboneConfig
from fastuper.models.outputs import BackboneOutput
from fastuper.weights.transformers import Names

TIMM = "timm_backbone"  # the model type of all of timm's models, in Transformers too
CUSTOM = "custom"  # the model type of a user's module

# Transformers' windowed backbones, such as MaskFormer's Swin, name their computed buffer as Swin does.
NAMES = Names(computed=("relative_position_index",))


def build(config: ForeignBackboneConfig) -> nn.Module:
    """Build a backbone of timm or Transformers, with random weights unless the configuration asks timm for its own.

    Raises:
        ImportError: the library is not installed; the message names the extra.
        ValueError: timm has no such model, or the model no such levels.
    """
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


def transformers_model_types() -> frozenset[str]:
    """Return the model types of Transformers' `AutoBackbone`; none if Transformers is not installed."""
    if find_spec("transformers") is None:
        return frozenset()
    from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

    return frozenset(MODEL_FOR_BACKBONE_MAPPING_NAMES)

"""timm's models as backbones."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from fastuper.io.messages import listed, reason, shown
from fastuper.models.backbones.foreign.measuring import Maps, measure
from fastuper.models.backbones.foreign.pyramids import KEYS, chosen_blocks, complete
from fastuper.models.configuration import ForeignBackboneConfig
from fastuper.models.outputs import BackboneOutput
from fastuper_kernels.dispatch.modes import is_eager

TIMM = "timm_backbone"  # the model type of all of timm's models, in Transformers too

_OWN = """
backbone num_channels features_only freeze_batch_norm_2d out_indices out_features use_pretrained_backbone
use_timm_backbone output_stride stage_names initializer_range
"""
OWN = frozenset(_OWN.split())
"""The values of Transformers' TimmBackboneConfig. All others but those of every configuration are timm's arguments."""

_COMMON = """
add_cross_attention architectures attn_implementation bad_words_ids begin_suppress_tokens bos_token_id
chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
forced_bos_token_id forced_eos_token_id id2label is_decoder is_encoder_decoder label2id length_penalty max_length
min_length model_type name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
output_attentions output_hidden_states output_scores pad_token_id prefix problem_type pruned_heads
remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p
torch_dtype torchscript transformers_version typical_p use_bfloat16 use_return_dict
"""
COMMON = frozenset(_COMMON.split())
"""The values of every configuration of Transformers, 4 and 5."""

FLEXIBLE: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
"""Arguments by which timm's models take images of other sizes than their own; the first that a model has is given."""


TRAINING_ONLY = frozenset({"attn_drop_rate", "drop_path_rate", "drop_rate", "pos_drop_rate", "proj_drop_rate"})
"""Arguments of timm's function without which a model computes the same in evaluation."""


def arguments_for_timm(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a configuration that timm's function gets as they are, such as `img_size`."""
    return {
        name: value
        for name, value in values.items()
        if name not in OWN and name not in COMMON and name not in KEYS and not name.startswith("_")
    }


class TimmBackbone(nn.Module):
    """A timm model that returns its feature maps; its tensors have Transformers' names (`backbone._backbone...`).

    Args:
        config: its values are `backbone`, the model's name; `out_indices`, the levels to return (if None the last four,
            or of a vision transformer four blocks, see `chosen_blocks`); `num_channels`, the channels of an image (3 if
            missing); `use_pretrained_backbone`, True if timm loads its weights; `freeze_batch_norm_2d`, True to fix the
            statistics of BatchNorm; `neck`, see `fastuper.models.backbones.foreign.pyramids`. All others, such as
            `img_size`, are arguments of timm's function.

    Attributes:
        channels: channels of each returned map.
        measured_maps: what the maps are, as one forward has shown it.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm has no such model, refuses an argument, or the model has no such levels.
    """

    def __init__(self, config: ForeignBackboneConfig):
        try:
            import timm
            import timm.utils.model
        except ImportError:
            raise ImportError("a timm backbone needs timm: pip install 'fastuper[timm]'") from None
        super().__init__()
        values = config.values
        name = values.get("backbone")
        if not isinstance(name, str) or not timm.is_model(name):
            close = get_close_matches(name, timm.list_models(), 3) if isinstance(name, str) else []
            hint = f"like {listed(close)}?" if close else "see timm.list_models()"
            raise ValueError(f"timm {timm.__version__} has no model {shown(name)}; {hint}")
        # By default Transformers returns only the last level, from which it cannot build a UPerNet with an auxiliary
        # head. The levels are written to the configuration: a saved model is the same network in Transformers.
        is_default = values.get("out_indices") in (None, [-1], (-1,))
        if is_default:
            values["out_indices"] = [-4, -3, -2, -1]
        if not isinstance(values["out_indices"], list | tuple):
            raise ValueError(f"out_indices must be a list of levels, got {shown(values['out_indices'])}")
        # A model on the meta device takes its weights from a checkpoint.
        pretrained = bool(values.get("use_pretrained_backbone")) and torch.get_default_device().type != "meta"
        with torch.device("cpu"):  # timm computes with the tensors that it creates, which the meta device cannot
            model = _create(timm.create_model, values, pretrained)
        if values.get("freeze_batch_norm_2d"):
            timm.utils.model.freeze_batch_norm_2d(model)
        self.config = config
        self._backbone = model
        maps = self._measured()
        if is_default and maps.is_flat and hasattr(model, "out_indices"):
            # Four blocks at a distance, not the last four; the model has all blocks up to the last one already.
            values["out_indices"] = chosen_blocks(len(model.feature_info), name.startswith("beit"))
            model.out_indices = list(values["out_indices"])
        is_default = is_default and values.get("output_stride") is None
        self.measured_maps = complete(maps, model, values, is_default)
        if maps.channels_last:
            values["output_fmt"] = "NHWC"  # Transformers would read the maps as (B, C, H, W)
        self.channels = list(maps.channels)

    def _measured(self) -> Maps:
        model: Any = self._backbone
        values = self.config.values
        native = None
        body = getattr(model, "model", model)
        for source in (values.get("img_size"), getattr(body, "img_size", None), _published_size(values["backbone"])):
            side = source if isinstance(source, list | tuple) else (source, source)
            if len(side) == 2 and all(type(number) is int for number in side):
                native = (side[0], side[1])
                break
        return measure(
            model,
            model,
            name=f"timm's {values['backbone']}",
            channels=values.get("num_channels", 3),
            unit=max(model.feature_info.reduction()),
            native=native,
            remedy="resize it, or build the backbone for larger images with backbone_kwargs={'img_size': ...}",
        )

    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool = False, output_attentions: bool = False
    ) -> BackboneOutput:
        """Return the feature maps of an image (B, C, H, W), each (B, C_l, H_l, W_l), also as the hidden states.

        Raises:
            ValueError: `output_attentions` is True, or timm's model refuses the image.
        """
        if output_attentions:
            raise ValueError("a timm backbone gives no attentions; leave output_attentions out")
        try:
            maps: Sequence[torch.Tensor] = self._backbone(pixel_values)
        except (AssertionError, IndexError) as error:  # by which timm's models refuse an image
            if not is_eager():
                raise
            raise ValueError(
                f"timm's {self.config.values['backbone']} refuses images of {tuple(pixel_values.shape)}: "
                f"{reason(error)}; {self.measured_maps.sizes.remedy}"
            ) from error
        feature_maps = tuple(x.permute(0, 3, 1, 2) for x in maps) if self.measured_maps.channels_last else tuple(maps)
        return BackboneOutput(feature_maps, feature_maps if output_hidden_states else None)

    def forward_with_filtered_kwargs(self, *args: Any, **kwargs: Any) -> BackboneOutput:
        """Call the backbone without the arguments that it does not have; Transformers' name."""
        known = ("output_hidden_states", "output_attentions")
        return self(*args, **{name: value for name, value in kwargs.items() if name in known})


def _create(create_model: Callable[..., Any], values: Mapping[str, Any], pretrained: bool) -> Any:
    """Return timm's model of a configuration, for images of all sizes if the model can be built so.

    Raises:
        ValueError: the model has no such levels, or refuses an argument.
    """
    name, indices = values["backbone"], tuple(values["out_indices"])
    given = {name: value for name, value in arguments_for_timm(values).items() if value is not None}
    if values.get("output_stride") is not None:
        given["output_stride"] = values["output_stride"]
    for flexible in _flexible_arguments(name):
        if not given.keys().isdisjoint(flexible):
            continue
        try:
            return create_model(
                name,
                pretrained=pretrained,
                features_only=True,
                in_chans=values.get("num_channels", 3),
                out_indices=indices,
                **flexible,
                **given,
            )
        except (IndexError, AssertionError) as error:
            if given and not isinstance(error, IndexError) and "index" not in str(error):
                raise _refused(name, given, error) from error
            raise ValueError(
                f"timm's {name} has no levels {list(indices)}; give other out_indices, or a backbone with four"
            ) from None
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            if any(argument in str(error) for argument in flexible):
                continue
            raise _refused(name, given, error) from error
    raise AssertionError("the last arguments are none")


def _flexible_arguments(name: str) -> list[dict[str, Any]]:
    """Return those of `FLEXIBLE` that a class in the file of a timm model has, and none as the last."""
    from timm.models import model_entrypoint

    file = sys.modules[model_entrypoint(name).__module__]
    classes = [value for value in vars(file).values() if isinstance(value, type) and issubclass(value, nn.Module)]
    known = {argument for cls in classes for argument in inspect.signature(cls.__init__).parameters}
    return [arguments for arguments in FLEXIBLE if known.issuperset(arguments)]


def _refused(name: str, given: Mapping[str, Any], error: Exception) -> ValueError:
    hint = f" (the arguments are {listed(given, 6)})" if given else ""
    return ValueError(f"timm cannot build {name} of its configuration{hint}: {reason(error)}")


def _published_size(name: str) -> tuple[int, int] | None:
    """Return the size of the images on which timm's weights were trained, (height, width)."""
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(name)
    return None if config is None else (config.input_size[1], config.input_size[2])

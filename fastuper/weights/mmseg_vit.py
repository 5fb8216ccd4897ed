"""mmsegmentation's vision transformers and their necks: VisionTransformer (ViT, DeiT), BEiT, MAE.

Each can have the neck Feature2Pyramid, MultiLevelNeck or none; all become a `ViTPyramidConfig`, whose networks are
mmsegmentation's. Transformers' BEiT with its own neck is another function: for an image of another form with as many
patches it resamples the relative position bias, which mmsegmentation reads unchanged, and it mixes rows with columns of
a table that is not square.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastuper.io.messages import shown
from fastuper.weights.config_text import Unread
from fastuper.weights.conversion import Choices, Rule, translate
from fastuper.weights.errors import CheckpointError
from fastuper.weights.mmseg_backbones import (
    BATCH_NORMS,
    STATISTICS,
    BackboneDialect,
    BackbonePart,
    Settings,
    Tensors,
    activation,
    check_norm,
    integers,
    kind_of,
    shape,
    split,
    stored,
)

BACKBONE = "backbone."
FIRST = BACKBONE + "layers.0."
PATCHES = BACKBONE + "patch_embed.projection.weight"
ATTENTION = FIRST + "attn.attn.in_proj_weight"
TABLE = FIRST + "attn.relative_position_bias_table"
POSITIONS = BACKBONE + "pos_embed"

LAYER, OURS = r"backbone\.layers\.(\d+)\.", r"encoder.layers.\1."
QKV = tuple(rf"{OURS}attention.{part}.\2" for part in ("query", "key", "value"))
ONLY_FASTUPER = "Transformers has no vision transformer with such a neck"

BLOCKS = [
    Rule(r"backbone\.patch_embed\.(projection|norm)\.(weight|bias)", (r"embeddings.patch_embeddings.\1.\2",)),
    Rule(rf"{LAYER}ln1\.(weight|bias)", (rf"{OURS}layernorm_before.\2",)),
    Rule(rf"{LAYER}ln2\.(weight|bias)", (rf"{OURS}layernorm_after.\2",)),
    Rule(rf"{LAYER}ffn\.layers\.(\d+)(?:\.0)?\.(weight|bias)", (rf"{OURS}mlp.layers.\2.\3",)),
    Rule(r"backbone\.ln1\.(weight|bias)", (r"encoder.layernorm.\1",)),
]
VIT = [
    *BLOCKS,
    Rule(r"backbone\.ln_pre\.(weight|bias)", (r"embeddings.norm.\1",)),
    Rule(rf"{LAYER}attn\.attn\.in_proj_(weight|bias)", QKV, "split into query, key and value", split()),
    Rule(rf"{LAYER}attn\.attn\.out_proj\.(weight|bias)", (rf"{OURS}attention.output.\2",)),
]
BEIT = [
    *BLOCKS,
    Rule(rf"{LAYER}attn\.qkv\.(weight|bias)", QKV, "split into query, key and value", split()),
    Rule(rf"{LAYER}attn\.q_bias", (rf"{OURS}attention.query.bias",)),
    Rule(rf"{LAYER}attn\.v_bias", (rf"{OURS}attention.value.bias",)),
    Rule(rf"{LAYER}attn\.proj\.(weight|bias)", (rf"{OURS}attention.output.\2",)),
    Rule(rf"{LAYER}attn\.(relative_position_bias_table)", (rf"{OURS}attention.\2",)),
    Rule(rf"{LAYER}attn\.relative_position_index", (), "computed from the image size"),
    Rule(rf"{LAYER}gamma_1", (rf"{OURS}layer_scale_attention",)),
    Rule(rf"{LAYER}gamma_2", (rf"{OURS}layer_scale_mlp",)),
]
WITH_TOKEN = [
    Rule(r"backbone\.cls_token", ("embeddings.cls_token",)),
    Rule(r"backbone\.pos_embed", ("embeddings.position_embeddings",)),
]
# The class token passes no block if `with_cls_token` is False: mmsegmentation adds its position, and removes it.
WITHOUT_TOKEN = [
    Rule(r"backbone\.cls_token", (), "with_cls_token=False: it is removed before the first block"),
    Rule(
        r"backbone\.pos_embed",
        ("embeddings.position_embeddings",),
        "without the position of the class token",
        lambda table: [table[:, 1:].contiguous()],
    ),
]

# Necks ----------------------------------------------------------------------------------------------------------------

FEATURE_2_PYRAMID = [
    Rule(r"neck\.upsample_4x\.0\.(weight|bias)", (r"neck.levels.0.first.\1",)),
    Rule(rf"neck\.upsample_4x\.1\.{STATISTICS}", (r"neck.levels.0.batch_norm.\1",)),
    Rule(r"neck\.upsample_4x\.3\.(weight|bias)", (r"neck.levels.0.second.\1",)),
]
MULTI_LEVEL_NECK = [
    Rule(r"neck\.(lateral_convs|convs)\.(\d+)\.conv\.(weight|bias)", (r"neck.\1.\2.conv.\3",)),
    Rule(rf"neck\.(lateral_convs|convs)\.(\d+)\.bn\.{STATISTICS}", (r"neck.\1.\2.batch_norm.\3",)),
]


@dataclass(frozen=True)
class NeckPart:
    """The neck of a checkpoint.

    Attributes:
        config: the neck's values of the configuration.
        rules: what becomes of its tensors.
        maps: the number of maps that it reads; None if it is not decided.
        words: the neck in words; "" without a neck.
    """

    config: dict[str, Any]
    rules: list[Rule]
    maps: int | None
    words: str = ""


def read_neck(tensors: Tensors, settings: Settings, choices: Choices, place: str) -> NeckPart:
    """Return the neck of a checkpoint, by its tensors `neck.` and the settings `neck` of the model.

    Args:
        tensors: the whole model's.
        settings: the whole model's.
        choices: `neck_scales`.
        place: the file.

    Raises:
        CheckpointError: it is another neck, or it has another norm or activation than ours.
    """
    own = _part_of(settings, "neck")
    kind = kind_of(own)
    if any(name.startswith("neck.upsample_2x.") for name in tensors) and kind in ("", "Feature2Pyramid"):
        return _feature_2_pyramid(tensors, own, place)
    if any(name.startswith("neck.lateral_convs.") for name in tensors) and kind in ("", "MultiLevelNeck"):
        return _multi_level_neck(tensors, own, choices, place)
    if kind or any(name.startswith("neck.") for name in tensors):
        raise CheckpointError(
            f"{place}: its neck is {shown(kind) if kind else 'an unknown one'}; of necks over a vision transformer, "
            "Feature2Pyramid and MultiLevelNeck can be converted"
        )
    return NeckPart({"neck": "none"}, [], None)


def _feature_2_pyramid(tensors: Tensors, own: Settings, place: str) -> NeckPart:
    check_norm(own, BATCH_NORMS, 1e-5, place, "its neck")
    by_four = "neck.upsample_4x.0.weight" in tensors
    if by_four and "neck.upsample_4x.1.running_mean" not in tensors:
        raise CheckpointError(f"{place}: the norm of its neck is no BatchNorm; it cannot be converted")
    # The library chooses a level's step by its place alone: steps for 4, 2, 1 and 0.5, or for 2, 1, 0.5 and 0.25. The
    # order of its `rescales` has no effect.
    doubled = Rule(r"neck\.upsample_2x\.0\.(weight|bias)", (rf"neck.levels.{int(by_four)}.\1",))
    config = {"neck": "transposed", "neck_scales": [4, 2, 1, 0.5] if by_four else [2, 1, 0.5, 0.25]}
    return NeckPart(config, [*FEATURE_2_PYRAMID, doubled], 4, "Feature2Pyramid")


def _multi_level_neck(tensors: Tensors, own: Settings, choices: Choices, place: str) -> NeckPart:
    check_norm(own, BATCH_NORMS, 1e-5, place, "its neck")
    levels = len(_numbers(tensors, r"neck\.convs\.(\d+)\."))
    default = [4, 2, 1, 0.5] if levels == 4 else None
    scales = choices.settle("neck_scales", stored(own, "scales", [0.5, 1, 2, 4]), default)
    if len(scales) != levels:
        raise CheckpointError(f"{place}: its neck has {levels} levels, and neck_scales={shown(scales)}")
    config = {
        "neck": "resized",
        "neck_scales": scales,
        "neck_channels": len(tensors["neck.convs.0.conv.weight"]),
        "neck_norm": any(name.startswith("neck.convs.0.bn.") for name in tensors),
        "neck_act": activation(own, place, "its neck") if own.get("act_cfg") else "linear",
    }
    return NeckPart(config, MULTI_LEVEL_NECK, len(_numbers(tensors, r"neck\.lateral_convs\.(\d+)\.")), "MultiLevelNeck")


# Blocks ---------------------------------------------------------------------------------------------------------------


def convert_vit(tensors: Tensors, settings: Settings, choices: Choices, place: str, prefix: str) -> BackbonePart:
    """Convert mmsegmentation's VisionTransformer, and its neck if it has one.

    Args:
        tensors: the whole model's, with "backbone." and "neck.".
        settings: the whole model's; `backbone` and `neck` are read.
        choices: `num_heads`, `out_indices`, `image_size`, `neck_scales`.
        place: the file.
        prefix: the beginning of the names in the file.

    Raises:
        CheckpointError: it is a network that ours cannot be, or its tensors disagree.
    """
    own = _part_of(settings, "backbone")
    _check_kind(own, ("VisionTransformer",), place)
    if _value(own, "output_cls_token", False, place):
        raise CheckpointError(f"{place}: output_cls_token=True cannot be converted: UPerNet reads maps alone")
    padding = own.get("patch_pad", "corner")
    if padding not in ("corner", 0):
        raise CheckpointError(f"{place}: patch_pad={shown(padding)} cannot be converted; 'corner' and 0 can")
    patch = _patch(tensors, place, prefix)
    _, tokens, width = shape(tensors, POSITIONS, 3, place, prefix)
    side = round((tokens - 1) ** 0.5)
    size = _image_size(own, choices, place, side * patch if side * side == tokens - 1 else None)
    if (size[0] // patch) * (size[1] // patch) != tokens - 1:
        raise CheckpointError(
            f"{place}: {prefix}{POSITIONS} has {tokens} rows, but a class token and the patches of an image of "
            f"{size[0]} x {size[1]} (height x width) are {(size[0] // patch) * (size[1] // patch) + 1}"
        )
    has_token = _value(own, "with_cls_token", True, place)
    biased = f"{FIRST}attn.attn.in_proj_bias" in tensors
    config = {
        "image_size": size,
        "num_attention_heads": _heads(choices, stored(own, "num_heads", 12), max(width // 64, 1)),
        "pad_patches": padding == "corner",
        "use_class_token": has_token,
        "interpolation": _value(own, "interpolate_mode", "bicubic", place),
        "pre_norm": f"{BACKBONE}ln_pre.weight" in tensors,
        "qkv_bias": biased,
        "key_bias": biased,
        "proj_bias": f"{FIRST}attn.attn.out_proj.bias" in tensors,
        "hidden_dropout_prob": _value(own, "drop_rate", 0.0, place),
    }
    rules = [*VIT, *(WITH_TOKEN if has_token else WITHOUT_TOKEN)]
    return _part("ViT", config, rules, tensors, settings, choices, place, prefix)


def convert_beit(tensors: Tensors, settings: Settings, choices: Choices, place: str, prefix: str) -> BackbonePart:
    """Convert mmsegmentation's BEiT or MAE, and its neck if it has one; see `convert_vit`.

    Raises:
        CheckpointError: it is a network that ours cannot be, or its tensors disagree.
    """
    own, has_positions = _part_of(settings, "backbone"), POSITIONS in tensors
    _check_kind(own, ("BEiT", "MAE"), place)
    patch = _patch(tensors, place, prefix)
    rows, heads = shape(tensors, TABLE, 2, place, prefix)
    side = (round(max(rows - 3, 1) ** 0.5) + 1) // 2
    size = _image_size(own, choices, place, side * patch if (2 * side - 1) ** 2 == rows - 3 else None)
    height, width = size[0] // patch, size[1] // patch
    if (2 * height - 1) * (2 * width - 1) != rows - 3:
        raise CheckpointError(
            f"{place}: {prefix}{TABLE} has {rows} rows, but an image of {size[0]} x {size[1]} (height x width) has "
            f"{(2 * height - 1) * (2 * width - 1) + 3} relative positions"
        )
    _check_index(tensors, height, width, place, prefix)
    config = {
        "image_size": size,
        "num_attention_heads": _heads(choices, heads, None),
        "pad_patches": False,
        "use_absolute_embeddings": has_positions,
        "use_relative_position_bias": True,
        "qkv_bias": f"{FIRST}attn.q_bias" in tensors or f"{FIRST}attn.qkv.bias" in tensors,
        "key_bias": f"{FIRST}attn.qkv.bias" in tensors,
        "layer_scale_init_value": (_value(own, "init_values", 0.1, place) or 0.1)
        if f"{FIRST}gamma_1" in tensors
        else 0.0,
    }
    words = "MAE" if has_positions else "BEiT"
    return _part(words, config, [*BEIT, *WITH_TOKEN], tensors, settings, choices, place, prefix)


def _part(
    words: str,
    config: dict[str, Any],
    rules: Sequence[Rule],
    tensors: Tensors,
    settings: Settings,
    choices: Choices,
    place: str,
    prefix: str,
) -> BackbonePart:
    """Return the backbone with the values that all kinds of blocks have, and with the neck."""
    own, neck = _part_of(settings, "backbone"), read_neck(tensors, settings, choices, place)
    width, channels, *_ = shape(tensors, PATCHES, 4, place, prefix)
    layers = len(_numbers(tensors, r"backbone\.layers\.(\d+)\."))
    norm, eps = _part_of(own, "norm_cfg"), 1e-6
    if own:
        eps = norm.get("eps", 1e-5)
        check_norm(own, ("LN",), eps, place, f"its {words}")
    else:
        choices.notes.append(f"layer_norm_eps: {eps} (the default; the checkpoint does not say)")
    values = {
        "model_type": "vit_pyramid",
        "patch_size": _patch(tensors, place, prefix),
        "num_channels": channels,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": shape(tensors, f"{FIRST}ffn.layers.0.0.weight", 2, place, prefix)[0],
        "mlp_depth": len(_numbers(tensors, r"backbone\.layers\.0\.ffn\.layers\.(\d+)\.")),
        "hidden_act": activation(own, place, f"its {words}"),
        "layer_norm_eps": eps,
        "patch_bias": f"{BACKBONE}patch_embed.projection.bias" in tensors,
        "patch_norm": f"{BACKBONE}patch_embed.norm.weight" in tensors,
        "final_norm": f"{BACKBONE}ln1.weight" in tensors,
        "attention_probs_dropout_prob": _value(own, "attn_drop_rate", 0.0, place),
        "drop_path_rate": _value(own, "drop_path_rate", 0.0, place),
        **config,
        **neck.config,
        "out_indices": _out_indices(
            own, choices, layers, neck, (3, 6, 9, 12) if words == "ViT" else (4, 6, 8, 12), place
        ),
    }
    translated = translate(tensors, [*rules, *neck.rules], place, prefix)
    name = f"{words} + {neck.words}" if neck.words else words
    return BackbonePart(values, translated, name, ONLY_FASTUPER)


def _part_of(settings: Settings, name: str) -> Settings:
    part = settings.get(name)
    return part if isinstance(part, Mapping) else {}


def _check_kind(own: Settings, kinds: Sequence[str], place: str) -> None:
    library, _, name = str(own.get("type", kinds[0])).rpartition(".")
    if name not in kinds or library not in ("", "mmseg"):
        raise CheckpointError(
            f"{place}: its backbone is {shown(own['type'])}; with such tensors, mmsegmentation's own "
            f"{' and '.join(kinds)} can be converted"
        )


def _numbers(tensors: Tensors, pattern: str) -> set[int]:
    """Return the numbers in names whose beginning a regular expression matches."""
    return {int(match[1]) for name in tensors if (match := re.match(pattern, name))}


def _patch(tensors: Tensors, place: str, prefix: str) -> int:
    height, width = shape(tensors, PATCHES, 4, place, prefix)[2:]
    if height != width:
        raise CheckpointError(
            f"{place}: its patches of {height} x {width} pixels are not square; it cannot be converted"
        )
    return height


def _value(own: Settings, name: str, default: Any, place: str) -> Any:
    """Return a value of the settings, of its default's type; a whole number may stand for a number.

    Raises:
        CheckpointError: it is of another type, such as an expression that was not read.
    """
    value = own.get(name, default)
    number = isinstance(default, float) and type(value) is int
    if type(value) is not type(default) and not number:
        raise CheckpointError(f"{place}: {name}={shown(value)} in its settings cannot be read")
    return value


def _image_size(own: Settings, choices: Choices, place: str, square: int | None) -> list[int]:
    """Return (height, width) of the image that tables were made for; `square` is the side of a square that fits."""
    known = stored(own, "img_size", 224)
    if known is not None and not isinstance(known, Unread):
        known = _pair(integers({"img_size": known}, "img_size", place) or [])
    size = _pair(choices.settle("image_size", known, square and [square, square]))
    if len(size) != 2 or min(size) < 1:
        raise CheckpointError(f"{place}: its image size is {shown(size)}, which is no height and width")
    return size


def _pair(size: list[int]) -> list[int]:
    return size * 2 if len(size) == 1 else size


def _heads(choices: Choices, known: Any, default: int | None) -> int:
    """Return the number of attention heads; the option is a list, of one number here."""
    known = known if known is None or isinstance(known, Unread) else [known]
    heads = choices.settle("num_heads", known, default and [default])
    if len(heads) != 1:
        raise ValueError(f"num_heads={shown(heads)} must be one number: all blocks have as many attention heads")
    return heads[0]


def _out_indices(
    own: Settings, choices: Choices, layers: int, neck: NeckPart, twelfths: Sequence[int], place: str
) -> list[int]:
    """Return the stages of the maps: 0 for the patches, i + 1 for the block i.

    By default they lie after `twelfths` of the blocks, as in mmsegmentation's configurations.
    """
    known: Any = None
    if own:
        known = own.get("out_indices", -1)
        if not isinstance(known, Unread):
            known = [layers - 1] if known == -1 else sorted(set(integers(own, "out_indices", place) or []))
    default = [layers - 1] if neck.maps == 1 else [layers * part // 12 - 1 for part in twelfths]
    distinct = default[0] >= 0 and default == sorted(set(default))
    indices: list[int] = choices.settle("out_indices", known, default if distinct else None)
    if not all(type(index) is int and 0 <= index < layers for index in indices):
        raise CheckpointError(f"{place}: out_indices={shown(indices)} must be numbers of its {layers} blocks, from 0")
    stages = [index + 1 for index in indices]
    return [0, *stages] if _value(own, "out_origin", False, place) else stages


def _check_index(tensors: Tensors, height: int, width: int, place: str, prefix: str) -> None:
    """Refuse a buffer of relative positions that is not mmsegmentation's for this grid of patches.

    The patch (y, x) reads, for the patch (v, u), the row (y - v + height - 1) (2 width - 1) + x - u + width - 1 of the
    table; the last three rows are for the class token: to a patch, from a patch, to itself.
    """
    y, x = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    last = (2 * height - 1) * (2 * width - 1)
    index = torch.full((height * width + 1,) * 2, last + 1)
    index[1:, 1:] = (y[:, None] - y + height - 1) * (2 * width - 1) + x[:, None] - x + width - 1
    index[0], index[0, 0] = last, last + 2
    for name, tensor in tensors.items():
        if name.endswith(".relative_position_index") and not torch.equal(tensor.long().cpu(), index):
            raise CheckpointError(f"{place}: {prefix}{name} has another order of relative positions than a BEiT's")


VISION_TRANSFORMER = BackboneDialect("ViT or DeiT", lambda tensors: ATTENTION in tensors, convert_vit, with_neck=True)
BEIT_OR_MAE = BackboneDialect("BEiT or MAE", lambda tensors: TABLE in tensors, convert_beit, with_neck=True)

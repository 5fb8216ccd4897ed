"""mmsegmentation's checkpoints of UPerNet, 0.x and 1.x: UPerHead, and FCNHead as the auxiliary head.

Both versions have the same names. Backbones are in `mmseg_backbones.py`, the rest of the settings in
`mmseg_settings.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastuper.io.messages import listed, shown
from fastuper.weights import authors
from fastuper.weights.conversion import Choices, Conversion, Dialect, Row, Rule, Source, Translated, translate
from fastuper.weights.errors import CheckpointError
from fastuper.weights.mmseg_backbones import (
    BATCH_NORMS,
    CONVNEXT,
    RESNET,
    STATISTICS,
    SWIN,
    BackboneDialect,
    BackbonePart,
    Settings,
    Tensors,
    check_norm,
    integers,
    kind_of,
    shape,
    short_types,
    stored,
)
from fastuper.weights.mmseg_settings import classes_of, preprocessing_of, tests_of
from fastuper.weights.mmseg_vit import BEIT_OR_MAE, VISION_TRANSFORMER

BACKBONES: tuple[BackboneDialect, ...] = (
    SWIN,
    CONVNEXT,
    RESNET,
    VISION_TRANSFORMER,
    BEIT_OR_MAE,
    authors.SWIN,
    authors.CONVNEXT,
)
"""The backbones that can be converted."""

LEVELS = 4
"""Feature maps that a UPerNet's head reads."""

POOL_SCALES = [1, 2, 3, 6]
HEAD, AUXILIARY, BACKBONE, NECK = "decode_head.", "auxiliary_head.", "backbone.", "neck."

# Only one kind of head has tensors whose names begin so.
OTHER_HEADS = (
    (r"\d+\.", "a cascade of heads"),
    (r"(pixel_decoder|transformer_decoder|query_embed|cls_embed|mask_embed)\b", "MaskFormer's or Mask2Former's head"),
    (r"(c1_bottleneck|sep_bottleneck)\.", "DepthwiseSeparableASPPHead, of DeepLabV3+"),
    (r"(image_pool|aspp_modules)\.", "ASPPHead, of DeepLabV3"),
    (r"fusion_conv\.", "SegformerHead"),
    (r"scale_heads\.", "FPNHead, of Semantic FPN"),
    (r"(mask_norm|dec_proj|layers)\b", "SegmenterMaskTransformerHead"),
    (r"psp_modules\.", "PSPHead, of PSPNet"),
    (r"convs?\.", "FCNHead or a head like it"),
)

NORMS = {"gn": "GroupNorm", "ln": "LayerNorm", "in": "InstanceNorm"}
"""Norms by their names in a ConvModule."""

CONVS = (
    Rule(r"(.+)\.conv\.weight", (r"\1.conv.weight",)),
    Rule(rf"(.+)\.bn\.{STATISTICS}", (r"\1.batch_norm.\2",)),
    Rule(r"conv_seg\.(weight|bias)", (r"classifier.\1",)),
)
"""A ConvModule's convolution and BatchNorm, and the classifier: in both heads."""


def recognises(source: Source) -> bool:
    """Return True for every segmentor of mmsegmentation; `convert` refuses those that are no UPerNet, by name."""
    names = source.tensors
    has_head = any(name.startswith(HEAD) for name in names) and any(name.startswith(BACKBONE) for name in names)
    return has_head and not any(name.startswith(f"{HEAD}classifier.") or ".batch_norm." in name for name in names)


def convert(source: Source, choices: Choices) -> Conversion:
    """Convert a UPerNet of mmsegmentation.

    Args:
        source: the checkpoint.
        choices: what names and shapes do not decide; it gets the notes too.

    Returns:
        The conversion of the whole model, with a row for each tensor.

    Raises:
        CheckpointError: it is another network, or a UPerNet that ours cannot be; the message names what.
        ValueError: a choice contradicts the checkpoint, or is missing.
    """
    place, model = source.place, short_types(_mapping(source.settings.get("model")))
    head = _inside(source.tensors, HEAD)
    _check_head(head, model, place)
    settings = _mapping(model.get("decode_head"))
    part = _backbone(source.tensors, model, choices, place)
    read = _maps_read(settings, part, place)
    backbone_config, backbone = _of_levels(part, read, place)

    classes, hidden, *_ = shape(head, "conv_seg.weight", 4, place, HEAD)
    align_corners = choices.settle("align_corners", stored(settings, "align_corners", False), False)
    config: dict[str, Any] = {
        "backbone_config": backbone_config,
        "hidden_size": hidden,
        "pool_scales": _pool_scales(head, settings, choices, place),
        "loss_ignore_index": 255 if settings.get("ignore_index") is None else settings["ignore_index"],
        "align_corners": align_corners,
        **classes_of(source, classes, choices),
        **tests_of(source.settings, model, choices),
    }
    if not align_corners:
        del config["align_corners"]
    rows = list(backbone.rows)
    converted = translate(head, CONVS, place, HEAD, HEAD)
    tensors = {**backbone.tensors, **converted.tensors}
    rows += converted.rows

    third = shape(head, "lateral_convs.2.conv.weight", 4, place, HEAD)[1]
    fault, prefix, auxiliary = _auxiliary(source.tensors, model, part, read, classes, third)
    config["use_auxiliary_head"] = not fault
    if fault:
        rules: Sequence[Rule] = (Rule(".*", (), f"{fault}; only training needs it"),)
    else:
        rules = CONVS
        config |= _auxiliary_options(source.tensors, prefix, auxiliary)
    inside = _inside(source.tensors, prefix)
    if inside:
        added = translate(inside, rules, place, prefix, AUXILIARY)
        tensors |= added.tensors
        rows += added.rows
        if fault:
            choices.notes.append(f"the auxiliary head is left out: {fault}; only training needs it")
    known = (HEAD, AUXILIARY, BACKBONE, NECK)
    rows += translate(
        {name: tensor for name, tensor in source.tensors.items() if not name.startswith(known)}, (), place
    ).rows

    reasons = [part.only_fastuper] if part.only_fastuper else []
    if align_corners:
        reasons.append("Transformers resamples with align_corners=False")
    return Conversion(
        dialect=f"mmsegmentation's UPerHead over {part.words}",
        kind="upernet",
        config=config,
        tensors=tensors,
        rows=rows,
        preprocessing=preprocessing_of(source.settings, model, part.config.get("num_channels", 3), choices),
        only_fastuper="; ".join(reasons),
    )


DIALECT = Dialect("mmsegmentation's UPerNet", recognises, convert, library="mmseg")


# The head -------------------------------------------------------------------------------------------------------------


def _check_head(head: Tensors, model: Settings, place: str) -> None:
    """Refuse another head than UPerHead, and a UPerHead that ours cannot be."""
    settings = model.get("decode_head")
    whole = all(any(name.startswith(part) for name in head) for part in ("fpn_bottleneck.", "lateral_convs."))
    kind = "a cascade of heads" if isinstance(settings, list | tuple) else kind_of(_mapping(settings))
    if not whole or "conv_seg.weight" not in head or kind not in ("", "UPerHead"):
        if kind in ("", "UPerHead"):
            found = (words for pattern, words in OTHER_HEADS for name in head if re.match(pattern, name))
            kind = next(found, "another head") if not whole else "a UPerHead without conv_seg"
        raise CheckpointError(f"{place} is a network of mmsegmentation with {kind}; only UPerHead can be converted")
    settings = _mapping(settings)
    if settings:
        check_norm(settings, BATCH_NORMS, 1e-5, place, "its head")
    convs = {name.removesuffix(".conv.weight") for name in head if name.endswith(".conv.weight")}
    for name in head:
        module, _, part = name.rpartition(".conv.") if ".conv." in name else name.rpartition(".")
        norm = module.rpartition(".")[2]
        if part == "bias" and module in convs:
            raise CheckpointError(f"{place}: the convolutions of its head have no norm; fastuper's have BatchNorm")
        if not re.fullmatch(rf".+\.conv\.weight|.+\.bn\.{STATISTICS}|conv_seg\.(weight|bias)", name):
            raise CheckpointError(
                f"{place}: its head has the module {NORMS.get(norm, norm)} ({HEAD}{name}); it cannot be converted: "
                "fastuper's has convolutions and BatchNorm"
            )
    if bare := sorted(name for name in convs if f"{name}.bn.weight" not in head):
        raise CheckpointError(f"{place}: {HEAD}{bare[0]} has no BatchNorm; it cannot be converted: fastuper's has one")
    for name, expected in (("conv_cfg", "Conv2d"), ("act_cfg", "ReLU")):
        value = settings.get(name)
        given = value.get("type") if isinstance(value, Mapping) else value
        if given not in (None, expected) or (name == "act_cfg" and name in settings and value is None):
            raise CheckpointError(
                f"{place}: its head has {name}={shown(value)}; it cannot be converted: {expected} can"
            )
    levels = 1 + len({match[1] for name in head if (match := re.match(r"lateral_convs\.(\d+)\.", name))})
    if levels != LEVELS:
        raise CheckpointError(f"{place} is a UPerNet over {levels} feature maps; fastuper's head reads {LEVELS}")


def _maps(part: BackbonePart) -> int:
    """Return the number of maps that a backbone returns: of its stages, or of the levels of its neck."""
    config = part.config
    if "out_features" in config:
        return len(config["out_features"])
    return len(config["out_indices"] if config.get("neck") == "none" else config["neck_scales"])


def _maps_read(settings: Settings, part: BackbonePart, place: str) -> list[int]:
    """Return the numbers of the backbone's maps that the head reads, in its order."""
    count = _maps(part)
    chosen = integers(settings, "in_index", place)
    if chosen is None:
        chosen = list(range(count))
    if any(not -count <= i < count for i in chosen):
        raise CheckpointError(f"{place}: its head reads the maps {chosen}, its backbone returns {count}")
    if len(chosen) != LEVELS:
        raise CheckpointError(
            f"{place}: its backbone returns {len(chosen)} feature maps to a head over {LEVELS}; "
            "its settings contradict its tensors"
        )
    return [i % count for i in chosen]


def _pool_scales(head: Tensors, settings: Settings, choices: Choices, place: str) -> list[int]:
    """Return the scales of the pyramid pooling; the checkpoint's tensors give their number alone."""
    count = len({match[1] for name in head if (match := re.match(r"psp_modules\.(\d+)\.", name))})
    known = integers(settings, "pool_scales", place)
    if settings and known is None:
        known = POOL_SCALES
    scales: list[int] = choices.settle("pool_scales", known, POOL_SCALES if count == len(POOL_SCALES) else None)
    if len(scales) != count:
        raise CheckpointError(f"{place}: its pyramid pooling has {count} branches, not those of pool_scales={scales}")
    return scales


# The auxiliary head ---------------------------------------------------------------------------------------------------


def _auxiliary(
    tensors: Tensors, model: Settings, part: BackbonePart, read: list[int], classes: int, channels: int
) -> tuple[str, str, Settings]:
    """Return why the auxiliary head is left out ("" if it is not), the beginning of its names, and its settings."""
    settings = model.get("auxiliary_head")
    head = _inside(tensors, AUXILIARY)
    numbers = {match[1] for name in head if (match := re.match(r"(\d+)\.", name))}
    if not head:
        return "the checkpoint has none", AUXILIARY, {}
    if len(numbers) > 1:
        return f"there are {len(numbers)} auxiliary heads, fastuper has one", AUXILIARY, {}
    prefix = f"{AUXILIARY}{numbers.pop()}." if numbers else AUXILIARY
    if isinstance(settings, list | tuple):
        settings = settings[0] if settings else {}
    settings, head = _mapping(settings), _inside(tensors, prefix)
    return _auxiliary_fault(head, settings, part, read, classes, channels), prefix, settings


def _auxiliary_fault(
    head: Tensors, settings: Settings, part: BackbonePart, read: list[int], classes: int, channels: int
) -> str:
    """Return why an auxiliary head is none of ours, which reads the third map, of so many channels; "" if it is."""
    if kind_of(settings) not in ("", "FCNHead"):
        return f"it is a {kind_of(settings)}, fastuper's an FCNHead"
    own = r"(convs\.\d+|conv_cat)\.(conv\.weight|bn\.\w+)|conv_seg\.(weight|bias)"
    if other := next((name for name in head if not re.fullmatch(own, name)), None):
        return f"fastuper's FCNHead has no {other}"
    try:
        check_norm(settings, BATCH_NORMS, 1e-5, "", "it")
    except CheckpointError:
        return f"its norm is {shown(settings.get('norm_cfg'))}, fastuper's BatchNorm with eps=1e-5"
    if settings.get("conv_cfg") not in (None, {"type": "Conv2d"}):
        return f"its convolutions are {shown(settings['conv_cfg'])}"
    act = _mapping(settings.get("act_cfg", {"type": "ReLU"}))
    if act.get("type") != "ReLU":
        return f"its activation is {shown(settings['act_cfg'])}, fastuper's ReLU"
    weight = head.get("conv_seg.weight")
    if weight is None or weight.ndim != 4 or len(weight) != classes:
        return "it has other classes than the head"
    convs = [tensor for name, tensor in head.items() if name.endswith(".conv.weight")]
    if sizes := {tuple(conv.shape[2:]) for conv in convs} - {(3, 3)}:
        return f"it has convolutions of {sizes.pop()}, fastuper's are 3 x 3"
    if any(name.startswith("convs.") for name in head) and settings.get("dilation", 1) != 1:
        return f"its convolutions have the dilation {settings['dilation']}"
    first = head.get("convs.0.conv.weight", weight)
    if first.ndim != 4 or first.shape[1] != channels:
        return f"it reads a feature map of {first.shape[1]} channels, fastuper's the third, of {channels}"
    if not settings:
        return ""
    index, count = settings.get("in_index", -1), _maps(part)
    if type(index) is not int or not -count <= index < count or index % count != read[2]:
        return f"it reads the backbone's map {shown(index)}, fastuper's the third that the head reads"
    return ""


def _auxiliary_options(tensors: Tensors, prefix: str, settings: Settings) -> dict[str, Any]:
    head = _inside(tensors, prefix)
    loss = settings.get("loss_decode")
    weight = _mapping(loss).get("loss_weight") if settings else None
    return {
        "auxiliary_channels": head["conv_seg.weight"].shape[1],
        "auxiliary_num_convs": len({name.split(".")[1] for name in head if name.startswith("convs.")}),
        "auxiliary_concat_input": "conv_cat.conv.weight" in head,
        **({"auxiliary_loss_weight": weight} if isinstance(weight, int | float) else {}),
    }


# The backbone ---------------------------------------------------------------------------------------------------------


def _backbone(tensors: Tensors, model: Settings, choices: Choices, place: str) -> BackbonePart:
    """Convert the backbone, with its neck if it has one."""
    bare = _inside(tensors, BACKBONE)
    both = {name: tensor for name, tensor in tensors.items() if name.startswith((BACKBONE, NECK))}
    necked = len(both) > len(bare) or bool(model.get("neck"))
    settings = _mapping(model.get("backbone"))
    for dialect in BACKBONES:
        if dialect.with_neck and dialect.recognises(both):
            return dialect.convert(both, model, choices, place, "")
        if not dialect.with_neck and not necked and dialect.recognises(bare):
            return dialect.convert(bare, settings, choices, place, BACKBONE)
    what = shown(kind_of(settings)) if settings else f"of unknown kind (its names are {listed(bare, 2)})"
    if necked:
        neck = kind_of(_mapping(model.get("neck")))
        what += f" with the neck {shown(neck)}" if neck else " with a neck"
    raise CheckpointError(
        f"{place}: its backbone is {what}; it cannot be converted: {listed([d.name for d in BACKBONES], 12)} can"
    )


def _of_levels(part: BackbonePart, read: list[int], place: str) -> tuple[dict[str, Any], Translated]:
    """Return the backbone's configuration and tensors, by their names in a UPerNet, for the maps that the head reads.

    A stage's map that the head does not read is not returned, and its norm is left out.
    """
    config, unread = dict(part.config), []
    if "out_features" in config:
        if read != sorted(set(read)):
            raise CheckpointError(
                f"{place}: its head reads the maps {read} in this order; fastuper's reads the finest first"
            )
        names = config["out_features"]
        config["out_features"] = [names[i] for i in read]
        unread = [f"hidden_states_norms.{name}." for name in names if name not in config["out_features"]]
    elif read != list(range(_maps(part))):
        config["out_levels"] = read
    tensors = {
        BACKBONE + name: tensor
        for name, tensor in part.translated.tensors.items()
        if not name.startswith(tuple(unread))
    }
    rows = []
    for row in part.translated.rows:
        if row.targets and all(target.startswith(tuple(unread)) for target in row.targets):
            rows.append(Row(row.source, (), "a norm of a feature map that the head does not read"))
        else:
            rows.append(Row(row.source, tuple(BACKBONE + target for target in row.targets), row.note))
    return config, Translated(tensors, rows)


def _inside(tensors: Tensors, prefix: str) -> Tensors:
    """Return the tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _mapping(value: Any) -> Settings:
    """Return a part of the settings; {} if it is missing or no dictionary."""
    return value if isinstance(value, Mapping) else {}

"""segmentation_models_pytorch's UPerNet, as in version 0.6: state dicts, and folders of `save_pretrained`.

Its network is a UPerNet with a LayerNorm of each feature map before the head, and logits that are resampled with
`align_corners=True`; all other resampling has `align_corners=False`. Encoders are torchvision's ResNets under smp's own
names, or timm's networks ("tu-").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastuper.io.messages import listed, shown
from fastuper.weights.conversion import Choices, Conversion, Dialect, Row, Rule, Source, translate
from fastuper.weights.errors import CheckpointError
from fastuper.weights.families import Tensors, preprocessing, refuse
from fastuper.weights.timm import FAMILIES, Part, convert_family, size_of
from fastuper.weights.transformers import BACKBONE, OUTPUT_NORMS

LEVELS = 4
"""The maps that the head reads, of smp's encoder_depth=5."""

COLOURS = ("mean", "std")
"""Buffers of smp's own example for Lightning, which normalises images with them."""

OTHERS = ((r"^decoder\.(fpn_stages|fpn_bottleneck)\.", "is of an older smp, whose UPerNet is another network"),)

# Models of smp's encoders that share names and shapes of tensors with a ResNet, or that this file must name.
NOT_RESNET = {
    "resnext": "ResNeXt's convolutions have groups",
    "se_": "SENet has an attention over channels",
    "wide_resnet": "Wide ResNet's bottlenecks are wider",
}


def wrapper_of(tensors: Tensors) -> str | None:
    """Return what stands before smp's names: "", or the attribute of a LightningModule ("model." in smp's example).

    None if the names are not those of smp's UPerNet.
    """
    last = "segmentation_head.0.weight"
    prefixes = (name.removesuffix(last) for name in tensors if name.endswith(last))
    return next((prefix for prefix in prefixes if prefix + "decoder.psp.out_conv.0.weight" in tensors), None)


def has_config(settings: Mapping[str, Any]) -> bool:
    """Return True for smp's config.json, which has all values; the hyperparameters of Lightning may lack some."""
    return settings.get("_model_class") == "UPerNet" and "encoder_name" in settings


def is_smp(source: Source) -> bool:
    """Return True for the names of smp's UPerNet, or for its config.json."""
    return has_config(source.settings) or wrapper_of(source.tensors) is not None


def convert(source: Source, choices: Choices) -> Conversion:
    """Convert smp's UPerNet.

    Raises:
        CheckpointError: its encoder or its decoder is one that our networks cannot be, or tensors disagree with the
            config.json.
    """
    place, settings = source.place, source.settings
    prefix = wrapper_of(source.tensors) or ""
    bare = {name.removeprefix(prefix): tensor for name, tensor in source.tensors.items() if name.startswith(prefix)}
    colours = {name: source.tensors[name] for name in COLOURS if prefix and name in source.tensors}
    if strange := [n for n in source.tensors if not n.startswith(prefix) and n not in colours]:
        raise CheckpointError(f"{place} has tensors beside smp's UPerNet, such as {listed(strange, 2)}")
    refuse(bare, OTHERS, place, prefix)
    _check_levels(bare, settings, place)
    _check_settings(settings, place)
    encoder = {name.removeprefix("encoder."): t for name, t in bare.items() if name.startswith("encoder.")}
    others = {name: tensor for name, tensor in bare.items() if not name.startswith("encoder.")}
    part = _convert_encoder(encoder, settings, choices, place, prefix + "encoder.")
    own_norms = part.config["model_type"] in ("convnext", "convnextv2")
    head = translate(others, _head_rules(own_norms), place, prefix)
    _check_norms(head.tensors, place)
    classes, width = _shape(head.tensors, "decode_head.classifier.weight", place)[:2]
    channels = part.config["num_channels"]
    for name, found in (("classes", classes), ("decoder_channels", width), ("in_channels", channels)):
        if has_config(settings) and settings.get(name, found) != found:
            raise CheckpointError(
                f"{place}: its config.json has {name}={shown(settings[name])}, and its tensors have {found}"
            )
    rows = [Row(row.source, tuple(BACKBONE + t for t in row.targets), row.note) for row in part.translated.rows]
    rows += [Row(name, (), f"the {name} of smp's example, in preprocessor_config.json") for name in colours]
    config: dict[str, Any] = {
        "backbone_config": part.config,
        "hidden_size": width,
        "pool_scales": [1, 2, 3, 6],
        "use_auxiliary_head": False,
        "output_align_corners": True,
        **({} if own_norms else {"feature_norms": True}),
        **_labels(source, classes),
    }
    return Conversion(
        f"segmentation_models_pytorch's UPerNet over {part.words}",
        "upernet",
        config,
        {**{BACKBONE + name: tensor for name, tensor in part.translated.tensors.items()}, **head.tensors},
        [*rows, *head.rows],
        _preprocessing(colours, choices, channels),
        [*part.notes, *_notes(settings, bare, channels)],
        only_fastuper=(
            "Transformers' UPerNet resamples logits with align_corners=False"
            + ("" if own_norms else ", and has no norms of the feature maps before the head")
        ),
    )


# Settings -------------------------------------------------------------------------------------------------------------


def _check_settings(settings: Mapping[str, Any], place: str) -> None:
    """Refuse what config.json shows and no tensor: another depth, norm, size of the logits, or encoder."""
    if settings.get("encoder_depth", 5) != 5:
        raise CheckpointError(
            f"{place} has encoder_depth={shown(settings['encoder_depth'])}; it cannot be converted: fastuper's UPerNet "
            f"has {LEVELS} levels, those of encoder_depth=5"
        )
    norm = settings.get("decoder_use_norm", "batchnorm")
    options = {**norm} if isinstance(norm, Mapping) else {"type": "batchnorm" if norm is True else norm}
    kind, eps = options.get("type"), options.get("eps", 1e-5)
    fits = isinstance(kind, str) and kind.lower() == "batchnorm" and options.get("affine", True) is True
    if not fits or options.get("track_running_stats", True) is not True:
        raise CheckpointError(
            f"{place} has decoder_use_norm={shown(norm)}; it cannot be converted: fastuper's head has BatchNorm"
        )
    if eps != 1e-5:
        raise CheckpointError(
            f"{place}: its BatchNorm has eps={shown(eps)}; it cannot be converted: fastuper's has 1e-5"
        )
    if settings.get("upsampling", 4) != 4:
        raise CheckpointError(
            f"{place} has upsampling={shown(settings['upsampling'])}; it cannot be converted: fastuper's logits have "
            "the image's size, those of upsampling=4"
        )


def _check_levels(bare: Tensors, settings: Mapping[str, Any], place: str) -> None:
    levels = {match[1] for name in bare if (match := re.match(r"decoder\.feature_norms\.(\d+)\.", name))}
    laterals = {match[1] for name in bare if (match := re.match(r"decoder\.fpn_lateral_blocks\.(\d+)\.", name))}
    if len(levels) != LEVELS or len(laterals) != LEVELS - 1:
        depth = settings.get("encoder_depth")
        words = f" (encoder_depth={shown(depth)})" if depth is not None else ""
        raise CheckpointError(
            f"{place} is a UPerNet over {len(levels)} levels{words}; it cannot be converted: fastuper's has {LEVELS}, "
            "those of smp's encoder_depth=5"
        )


def _notes(settings: Mapping[str, Any], bare: Tensors, channels: int) -> list[str]:
    """Return sentences about what is not converted, or not known."""
    notes = []
    activation = settings.get("activation")
    if activation not in (None, "identity"):
        notes.append(f"logits are those before the activation {shown(activation)}, which smp's model applies to them")
    if not has_config(settings):
        notes.append(
            "there is no config.json of smp: upsampling=4, output_stride=32, and the epsilons, activations and "
            "poolings of smp's and timm's defaults; no tensor shows another choice"
        )
    if any(name.startswith("classification_head.") for name in bare):
        notes.append("the classification head is left out: fastuper's UPerNet has none")
    if channels != 3:
        notes.append(
            f"mean and std of {channels} channels are not known: set image_mean and image_std in "
            "preprocessor_config.json"
        )
    notes.append("images are divided by 255 and keep their size, as smp's preprocessing leaves it")
    return notes


def _labels(source: Source, classes: int) -> dict[str, Any]:
    names = source.classes
    if names is not None and len(names) == classes:
        return {"id2label": {str(number): name for number, name in enumerate(names)}}
    return {"num_labels": classes}


def _preprocessing(colours: Tensors, choices: Choices, channels: int) -> dict[str, Any]:
    known = {
        name: [float(value) for value in tensor.flatten()]
        for name, tensor in colours.items()
        if tensor.numel() == channels and tensor.is_floating_point()
    }
    return {"do_resize": False, **preprocessing(choices, channels, known.get("mean"), known.get("std"))}


# The encoder ----------------------------------------------------------------------------------------------------------


def _convert_encoder(tensors: Tensors, settings: Mapping[str, Any], choices: Choices, place: str, prefix: str) -> Part:
    """Return the backbone, with tensors by the names of our module.

    Args:
        tensors: by the names after "encoder.".
        settings: smp's; arguments of timm's model stand among them.
        choices: the caller's options.
        place: the file.
        prefix: what stands before the names in the file.
    """
    name = settings.get("encoder_name")
    name = name if isinstance(name, str) else ""
    for beginning, why in NOT_RESNET.items():
        if name.removeprefix("tu-").startswith(beginning):
            raise CheckpointError(f"{place} is over {shown(name)}; it cannot be converted: {why}, ResNet's do not")
    if all(key.startswith("model.") for key in tensors):
        tensors = {key.removeprefix("model."): tensor for key, tensor in tensors.items()}
        prefix += "model."
    family = next((family for family in FAMILIES if family.recognises(tensors)), None)
    if family is None:
        what = shown(name) if name else f"an encoder with {listed((prefix + key for key in tensors), 2)}"
        raise CheckpointError(
            f"{place} is over {what}; ResNets, and timm's ConvNeXt, ResNet and Swin (tu-), can be converted"
        )
    arguments = _arguments(settings)
    # smp's config.json has all arguments: without img_size the network is built for the size that its name ends with.
    size = arguments.get("img_size") or (size_of(name) if has_config(settings) else None)
    timm_settings = {"architecture": name.removeprefix("tu-"), "model_args": arguments, "image_size": size}
    part = convert_family(family, tensors, Source(place, tensors, timm_settings), choices, prefix)
    if len(part.config["depths"]) != LEVELS:
        raise CheckpointError(
            f"{place}: its encoder has {len(part.config['depths'])} stages; it cannot be converted: fastuper's UPerNet "
            f"reads {LEVELS}"
        )
    if part.config.get("patch_size", 4) != 4:
        raise CheckpointError(
            f"{place}: its encoder has patches of {shown(part.config['patch_size'])} pixels; it cannot be converted: "
            "smp's logits have the image's size with patches of 4 only"
        )
    return part


# The arguments of smp's own constructor; all others are timm's.
OWN = {
    "encoder_name", "encoder_depth", "encoder_weights", "decoder_channels", "decoder_use_norm", "in_channels",
    "classes", "activation", "upsampling", "aux_params", "kwargs", "_model_class",
}  # fmt: skip


def _arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of timm's model: `**kwargs` of smp's, which config.json has beside or under "kwargs"."""
    nested = settings.get("kwargs")
    beside = {name: value for name, value in settings.items() if name not in OWN}
    return {**beside, **(nested if isinstance(nested, Mapping) else {})}


# The head -------------------------------------------------------------------------------------------------------------


def _head_rules(own_norms: bool) -> list[Rule]:
    """Return the rules of all names but the encoder's.

    smp's lateral blocks and convolutions count from the coarsest level, ours from the finest. The pooled maps and the
    levels are concatenated in our order: the map, then its means; the finest level first.

    Args:
        own_norms: whether the backbone has the same norms of its maps (ConvNeXt's, with the same epsilon of 1e-6).
    """
    rules = [Rule(r"classification_head\..*", (), "the classification head, which fastuper's UPerNet does not have")]
    for level in range(LEVELS):
        norm = f"{BACKBONE}{OUTPUT_NORMS}stage{level + 1}" if own_norms else f"decode_head.feature_norms.{level}"
        note = "the backbone's own norm of this map is the same function" if own_norms else ""
        rules.append(Rule(rf"decoder\.feature_norms\.{level}\.(weight|bias)", (rf"{norm}.\1",), note))
    blocks = [
        (r"psp\.blocks\.(\d)\.1", r"psp_modules.\1.1"),
        (r"psp\.out_conv()", "bottleneck"),
        (r"fusion_block()", "fpn_bottleneck"),
    ]
    for place in range(LEVELS - 1):
        level = LEVELS - 2 - place
        blocks += [
            (rf"fpn_lateral_blocks\.{place}\.conv_norm_relu()", f"lateral_convs.{level}"),
            (rf"fpn_conv_blocks\.{place}()", f"fpn_convs.{level}"),
        ]
    for theirs, ours in blocks:
        rules.append(Rule(rf"decoder\.{theirs}\.0\.weight", (f"decode_head.{ours}.conv.weight",)))
        rules.append(Rule(rf"decoder\.{theirs}\.1\.(\w+)", (rf"decode_head.{ours}.batch_norm.\2",)))
    rules.append(Rule(r"segmentation_head\.0\.(weight|bias)", (r"decode_head.classifier.\1",)))
    return rules


def _check_norms(tensors: Tensors, place: str) -> None:
    """Refuse a head whose blocks have another norm than BatchNorm, which its tensors show."""
    for name in tensors:
        if name.endswith(".conv.weight") and (
            name.removesuffix("conv.weight") + "batch_norm.running_mean" not in tensors
        ):
            raise CheckpointError(
                f"{place}: {name.removesuffix('.conv.weight')} would have no BatchNorm; it cannot be converted: the "
                "blocks of fastuper's head have BatchNorm"
            )


def _shape(tensors: Tensors, name: str, place: str) -> tuple[int, ...]:
    if name not in tensors or tensors[name].ndim != 4:
        raise CheckpointError(f"{place} lacks its classifier, or its shape is wrong; it is incomplete")
    return tuple(tensors[name].shape)


DIALECT = Dialect("segmentation_models_pytorch's UPerNet over ResNet, ConvNeXt and Swin", is_smp, convert, "smp")

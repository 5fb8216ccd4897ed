"""timm's ConvNeXt, ResNet and Swin, to our backbones and back; names of torchvision's ResNet are the same as timm's.

A file has the names of a classifier ("stages.0.blocks.0"), or those of `features_only=True` ("stages_0.blocks.0"). A
folder of the Hub has them with a config.json that names the "architecture". A UPerNet over a "timm_backbone" has them
after "backbone._backbone.".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastuper.io.files import read_json
from fastuper.io.messages import listed, shown
from fastuper.weights.authors import NOT_SWIN, QKV, swin_pairs, swin_rules
from fastuper.weights.conversion import Choices, Conversion, Dialect, Row, Rule, Source, Translated, translate
from fastuper.weights.errors import CheckpointError
from fastuper.weights.families import (
    HEAD,
    Tensors,
    convnext_values,
    named,
    preprocessing,
    refuse,
    resnet_values,
    stages_of,
    swin_values,
    timm_swin_values,
)
from fastuper.weights.mmseg_backbones import grn_rules
from fastuper.weights.transformers import BACKBONE, OUTPUT_NORMS, Names, backbone_state_dict

WRAPPERS = ("backbone._backbone.", "_backbone.", "timm_model.", "model.", "body.", "")
"""What libraries put before timm's names: a UPerNet, backbone and classifier of Transformers, timm's own wrappers."""

IN_UPERNET = "backbone._backbone."
FROZEN = "the backbone's BatchNorms were fixed (freeze_batch_norm_2d=True); they would train here"
NAMED_BACKBONE = ("backbone", "use_timm_backbone", "use_pretrained_backbone", "backbone_kwargs")

Settings = Mapping[str, Any]
Pairs = Iterator[tuple[str, str]]


# Names ----------------------------------------------------------------------------------------------------------------


def convnext_pairs(joint: str = ".") -> Pairs:
    """Yield the names of a ConvNeXt's tensors, timm's and ours.

    Args:
        joint: "." for a classifier's names, "_" for those of `features_only=True`: "stages.0" or "stages_0".
    """
    yield f"stem{joint}0.*", "embeddings.patch_embeddings.*"
    yield f"stem{joint}1.*", "embeddings.layernorm.*"
    yield f"stages{joint}#.downsample.#.*", "encoder.stages.#.downsampling_layer.#.*"
    for theirs, ours in (
        ("conv_dw.*", "dwconv.*"),
        ("norm.*", "layernorm.*"),
        ("mlp.fc1.*", "pwconv1.*"),
        ("mlp.fc2.*", "pwconv2.*"),
        ("gamma", "layer_scale_parameter"),
    ):
        yield f"stages{joint}#.blocks.#.{theirs}", f"encoder.stages.#.layers.#.{ours}"


def resnet_pairs(stages: int, deep: bool, avg_down: bool) -> Pairs:
    """Yield the names of a ResNet's tensors, timm's and ours.

    Args:
        stages: the number of stages.
        deep: True for a stem of three convolutions.
        avg_down: True if shortcuts begin with a pooling, which takes the number 0.
    """
    if deep:
        for place, (convolution, norm) in enumerate(
            (("conv1.0", "conv1.1"), ("conv1.3", "conv1.4"), ("conv1.6", "bn1"))
        ):
            yield f"{convolution}.*", f"embedder.embedder.{place}.convolution.*"
            yield f"{norm}.*", f"embedder.embedder.{place}.normalization.*"
    else:
        yield "conv1.*", "embedder.embedder.convolution.*"
        yield "bn1.*", "embedder.embedder.normalization.*"
    for stage in range(stages):
        theirs, ours = f"layer{stage + 1}.#.", f"encoder.stages.{stage}.layers.#."
        for place in range(3):
            yield f"{theirs}conv{place + 1}.*", f"{ours}layer.{place}.convolution.*"
            yield f"{theirs}bn{place + 1}.*", f"{ours}layer.{place}.normalization.*"
        yield f"{theirs}downsample.{int(avg_down)}.*", f"{ours}shortcut.convolution.*"
        yield f"{theirs}downsample.{int(avg_down) + 1}.*", f"{ours}shortcut.normalization.*"


# What is refused by name ----------------------------------------------------------------------------------------------

ANTIALIASING = r"resnex?t(aa|blur)\d"
"""The names of ResNets whose pooling before strides leaves no trace among the tensors."""

OTHER_NORMS = {
    ((1, 2, 4, 2), (24, 32, 48, 64)): "test_convnext",
    ((1, 1, 1, 1), (32, 64, 96, 128)): "test_convnext2",
    ((3, 4, 30, 3), (384, 768, 1536, 3072)): "convnext_xxlarge",
}
"""timm's ConvNeXts with an epsilon of 1e-5, by depths and channels; no tensor shows it."""

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu6": "relu6",
    "silu": "silu",
    "swish": "silu",
    "mish": "mish",
    "leaky_relu": "leaky_relu",
}
"""timm's names of activations, and ours."""

NOT_CONVNEXT = ((r"\.shortcut\.", "is of a shortcut with a convolution, which ConvNeXt does not have"),)
NOT_RESNET = (
    (r"\.se\.", "is of an attention over channels (SE, ECA), which ResNet does not have"),
    (r"^maxpool\.", "is of a stem that convolves in place of the pooling, as ResNet-RS's"),
    (r"\.conv2\.(conv|bn|fc|radix)", "is of a convolution with split attention, which ResNet does not have"),
    (r"\.aa\.", "is of an anti-aliasing layer, which ResNet does not have"),
    (r"^conv[23]\.", "is of a stem that is not timm's"),
)

# Arguments of timm's models that change the network without a trace among its tensors, and the values that fit ours.
INVISIBLE: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "convnext": {
        "output_stride": (None, 32),
        "norm_eps": (None, 1e-6),
        "norm_layer": (None, "layernorm", "layernorm2d"),
        "act_layer": (None, *ACTIVATIONS),
    },
    "resnet": {
        "output_stride": (None, 32),
        "act_layer": (None, "relu"),
        "norm_layer": (None, "batchnorm", "batchnorm2d"),
        "aa_layer": (None, ""),
    },
    "swin": {"norm_layer": (None, "layernorm"), "head_dim": (None,)},
}


def _check_settings(settings: Settings, family: str, place: str) -> None:
    """Raise CheckpointError if config.json describes a network that ours is not."""
    arguments = settings.get("model_args")
    arguments = arguments if isinstance(arguments, Mapping) else {}
    for name, fits in INVISIBLE[family].items():
        if arguments.get(name) not in fits:
            raise CheckpointError(
                f"{place}: its config.json has {name}={shown(arguments[name])}, and fastuper's {family} has "
                f"{shown(fits[-1])}; it cannot be converted"
            )


# To ours --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A converted network of timm: the values of its configuration, its tensors, and notes."""

    config: dict[str, Any]
    translated: Translated
    words: str
    notes: tuple[str, ...] = ()


def _linear(weight: torch.Tensor) -> list[torch.Tensor]:
    """Return the weight of a linear layer (C_out, C_in) of a 1x1 convolution's (C_out, C_in, 1, 1).

    The layer has the same function at each position. Another kernel keeps its shape, and is refused by it.
    """
    return [weight.flatten(1) if tuple(weight.shape[2:]) == (1, 1) else weight]


def convert_convnext(tensors: Tensors, settings: Settings, choices: Choices, place: str, prefix: str) -> Part:
    """Convert timm's ConvNeXt; see `convert`."""
    refuse(tensors, NOT_CONVNEXT, place, prefix)
    joint = "_" if "stem_0.weight" in tensors else "."
    if any(tensors.get(f"stem{joint}{i}.weight", torch.empty(0)).ndim == 4 for i in (1, 2)):
        raise CheckpointError(
            f"{place}: its stem has overlapping convolutions (timm's stem_type 'overlap'), and fastuper's ConvNeXt has "
            "patches; it cannot be converted"
        )
    rules = [named(*pair) for pair in convnext_pairs(joint)]
    rules += grn_rules(rf"stages{re.escape(joint)}(\d{{1,3}})\.blocks\.(\d{{1,3}})\.mlp\.", "weight", "bias")
    if any(name.endswith(".mlp.fc1.weight") and tensor.ndim == 4 for name, tensor in tensors.items()):
        block = rf"stages{re.escape(joint)}(\d+)\.blocks\.(\d+)\.mlp\.fc([12])\.weight"
        target = r"encoder.stages.\1.layers.\2.pwconv\3.weight"
        rules.insert(0, Rule(block, (target,), "a 1x1 convolution as a linear layer", _linear))
    translated = translate(tensors, [*rules, Rule(r"(head|norm_pre)\..*", (), HEAD)], place, prefix)
    config = convnext_values(translated.tensors, place)
    arguments = settings.get("model_args")
    architecture = _architecture(settings)
    act = arguments.get("act_layer") if isinstance(arguments, Mapping) else None
    if act is not None:
        config["hidden_act"] = ACTIVATIONS[act]
    known = architecture or OTHER_NORMS.get((tuple(config["depths"]), tuple(config["hidden_sizes"])))
    if known in OTHER_NORMS.values() and not (isinstance(arguments, Mapping) and arguments.get("norm_eps")):
        raise CheckpointError(
            f"{place} has the name or the shapes of timm's {known}, whose norms have an epsilon of 1e-5, and "
            "fastuper's have 1e-6; it cannot be converted"
        )
    return Part(config, translated, "ConvNeXt")


def convert_resnet(tensors: Tensors, settings: Settings, choices: Choices, place: str, prefix: str) -> Part:
    """Convert timm's or torchvision's ResNet; see `convert`.

    timm's bottleneck has its stride in the 3x3 convolution, as ours does by default. A "d" variant averages 2x2 squares
    before the convolution of a shortcut (`avg_down`): this pooling is part 0 of the shortcut.
    """
    refuse(tensors, NOT_RESNET, place, prefix)
    deep = "conv1.0.weight" in tensors
    avg_down = any(re.fullmatch(r"layer\d+\.\d+\.downsample\.2\.weight", name) for name in tensors)
    pairs = resnet_pairs(stages_of(tensors, r"layer(\d{1,2})\.") - 1, deep, avg_down)
    translated = translate(tensors, [*(named(*pair) for pair in pairs), Rule(r"fc\..*", (), HEAD)], place, prefix)
    config = resnet_values(translated.tensors, place)
    if avg_down:
        stem = config.get("stem_widths", [config.pop("embedding_size", None)])
        config = {**config, "model_type": "resnet_deep_stem", "stem_widths": stem, "avg_down": True}
    return Part(config, translated, "ResNet")


RULES = (
    "windows are those of the authors' UPerNets: every second block shifts, and maps are padded before the shift; timm "
    "does not shift where a map is no larger than a window, and pads after the shift: give image_size for these rules"
)
"""What differs between timm's Swin and ours, unless the conversion is by timm's rules."""


def convert_swin(tensors: Tensors, settings: Settings, choices: Choices, place: str, prefix: str) -> Part:
    """Convert timm's Swin; see `convert`.

    Since timm 0.9 a stage begins with its patch merging; before it, a stage ends with it. Both merge in our order:
    `reshape(B, H / 2, 2, W / 2, 2, C).permute(0, 1, 3, 4, 2, 5)` has the channel c of the position (row y, column x) of
    a square at (2 x + y) C + c.

    timm builds a Swin for an image size. A map no larger than the window is then one window, which is not shifted, and
    whose table has the size of the map. If all tables have one size, the result is a Swin that always shifts, unless
    the option image_size says what the model was built for. If tables differ, the result is built for the image size
    of config.json, of the option, or that they follow from.
    """
    refuse(tensors, NOT_SWIN, place, prefix)
    layers = "layers_" if any(name.startswith("layers_0.") for name in tensors) else "layers."
    stages = stages_of(tensors, re.escape(layers) + r"(\d{1,2})\.")
    first = 0 if f"{layers}0.downsample.reduction.weight" in tensors else 1
    rules = [*swin_rules(stages, layers, first), Rule(r"(head|norm)\..*", (), HEAD)]
    translated = translate(tensors, rules, place, prefix)
    arguments = settings.get("model_args")
    arguments = dict(arguments) if isinstance(arguments, Mapping) else {}
    tables = {tensor.shape[:1] for name, tensor in tensors.items() if name.endswith(".relative_position_bias_table")}
    if "image_size" in settings:  # of a UPerNet, whose backbone has one image size, and timm's rules
        arguments["img_size"] = settings["image_size"]
    elif len(tables) == 1:
        if not choices.has("image_size"):
            return Part(swin_values(translated.tensors, place), translated, "Swin", (RULES,))
        arguments.pop("img_size", None)
    return Part(timm_swin_values(translated.tensors, arguments, choices, place), translated, "Swin")


@dataclass(frozen=True)
class Family:
    """A family of timm's models: our model type, a test of bare names, and the conversion."""

    model_type: str
    recognises: Callable[[Tensors], bool]
    convert: Callable[[Tensors, Settings, Choices, str, str], Part]


def _is_swin(names: Tensors) -> bool:
    # A stage that ends with its patch merging is of the authors' checkpoints too, and `authors.py` converts it.
    block = any(f"layers{joint}0.blocks.0.norm1.weight" in names for joint in "._")
    return block and "patch_embed.proj.weight" in names and "layers.0.downsample.reduction.weight" not in names


FAMILIES = (
    Family(
        "convnext",
        lambda names: any(
            f"stem{joint}0.weight" in names and f"stages{joint}0.blocks.0.conv_dw.weight" in names for joint in "._"
        ),
        convert_convnext,
    ),
    Family(
        "resnet",
        lambda names: (
            "layer1.0.conv1.weight" in names
            and "bn1.weight" in names
            and ("conv1.weight" in names or "conv1.0.weight" in names)
        ),
        convert_resnet,
    ),
    Family("swin", _is_swin, convert_swin),
)


def size_of(name: str) -> list[int] | None:
    """Return [height, width] of the images that timm builds a model for, which its name ends with; None if it does not.

    Args:
        name: timm's name, with or without the tag of weights: "swin_tiny_patch4_window7_224.ms_in22k".
    """
    match = re.search(r"_(\d{2,4})$", name.partition(".")[0])
    return [int(match[1])] * 2 if match else None


def _architecture(settings: Settings) -> str:
    """Return timm's name of the model in a config.json, without the tag of its weights; "" if there is none."""
    value = settings.get("architecture")
    return value.partition(".")[0] if isinstance(value, str) else ""


def _bare(tensors: Tensors) -> tuple[str, dict[str, torch.Tensor], Family | None]:
    """Return what a library puts before timm's names, the tensors without it, and their family."""
    for prefix in WRAPPERS:
        bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if len(bare) == len(tensors) or prefix == IN_UPERNET:
            for family in FAMILIES:
                if family.recognises(bare):
                    return prefix, bare, family
    return "", dict(tensors), None


def is_timm(source: Source) -> bool:
    """Return True for the names of timm's ConvNeXt, ResNet or Swin, or for a config.json of timm."""
    if isinstance(source.settings.get("architecture"), str) and "pretrained_cfg" in source.settings:
        return True
    prefix, _, family = _bare(source.tensors)
    return family is not None and prefix != IN_UPERNET


def is_upernet_over_timm(source: Source) -> bool:
    """Return True for a UPerNet of Transformers or fastuper over a timm backbone."""
    return any(name.startswith(IN_UPERNET) for name in source.tensors)


def convert(source: Source, choices: Choices) -> Conversion:
    """Convert timm's ConvNeXt, ResNet or Swin to a backbone.

    A Swin becomes one that shifts windows in every second block, as in the authors' UPerNets; see `convert_swin`. timm
    does so too, if a model is built for an image whose maps exceed the windows (`img_size=`), or with
    `always_partition=True`.

    Raises:
        CheckpointError: it is another model, or one that our networks cannot be.
    """
    prefix, bare, family = _bare(source.tensors)
    if family is None:
        raise CheckpointError(
            f"{source.place} is timm's {shown(source.settings.get('architecture'))}; ConvNeXt, ResNet and Swin can be "
            "converted, and UperNetConfig(backbone=NAME, use_timm_backbone=True) takes other models as they are"
        )
    part = convert_family(family, bare, source, choices, prefix)
    colours = source.settings.get("pretrained_cfg")
    mean, std = (_numbers(colours, name, part.config["num_channels"]) for name in ("mean", "std"))
    return Conversion(
        f"timm's {part.words}",
        "backbone",
        part.config,
        part.translated.tensors,
        part.translated.rows,
        preprocessing(choices, part.config["num_channels"], mean, std),
        part.notes,
        (OUTPUT_NORMS,) if part.config["model_type"] in ("convnext", "convnextv2", "swin") else (),
        ONLY_FASTUPER.get(part.config["model_type"], ""),
    )


def convert_family(family: Family, bare: Tensors, source: Source, choices: Choices, prefix: str) -> Part:
    """Convert one of timm's networks.

    Args:
        family: that recognises the tensors.
        bare: the tensors by timm's names.
        source: the place and the settings: "architecture", "model_args", and for the backbone of a UPerNet
            "image_size", timm's `img_size` (None if it is not known).
        choices: the caller's options.
        prefix: what stands before the names in the file.

    Raises:
        CheckpointError: our networks cannot be this one; the message names the reason.
    """
    architecture = _architecture(source.settings) or Path(source.place).name
    if family.model_type == "resnet" and re.search(ANTIALIASING, architecture):
        raise CheckpointError(
            f"{source.place}: timm's {shown(architecture)} has anti-aliasing layers, which fastuper's ResNet does not "
            "have; it cannot be converted"
        )
    _check_settings(source.settings, family.model_type, source.place)
    return family.convert(bare, source.settings, choices, source.place, prefix)


ONLY_FASTUPER = {
    "resnet_deep_stem": "Transformers has no ResNet with a deep stem or averaged shortcuts",
    "swin_timm": "Transformers has no Swin whose windows shrink to small maps, as timm's do",
}
"""Why Transformers cannot load a backbone, by its model type."""


def _numbers(settings: Any, name: str, count: int) -> list[float] | None:
    """Return a list of `count` numbers of a config.json; None if it has none."""
    value = settings.get(name) if isinstance(settings, Mapping) else None
    if not isinstance(value, list | tuple) or len(value) != count:
        return None
    return [float(number) for number in value] if all(isinstance(n, int | float) for n in value) else None


def convert_upernet(source: Source, choices: Choices) -> Conversion:
    """Convert a UPerNet over a timm backbone to the same UPerNet over our own backbone.

    timm's features have no norms. Neither have the maps of our ResNet and of our Swin by timm's rules: these maps are
    timm's. Our ConvNeXt norms each map, which no values of a LayerNorm undo: it is refused.

    Raises:
        CheckpointError: the backbone is another one, or the head reads the map of a ResNet's stem.
    """
    place, settings = source.place, source.settings
    backbone = settings.get("backbone_config")
    backbone = backbone if isinstance(backbone, Mapping) else {}
    name = str(backbone.get("backbone") or settings.get("backbone"))
    prefix, bare, family = _bare(source.tensors)
    if family is None or family.model_type == "convnext":
        raise CheckpointError(
            f"{place} is a UPerNet over timm's {shown(name)}, and loads as it is; only timm's ResNets and Swins give "
            "the maps of a backbone of fastuper's own (ConvNeXt norms its maps here, and does not in timm)"
        )
    own_settings: dict[str, Any] = {"architecture": name}
    if family.model_type == "swin":  # timm builds a model for the size that its name ends with
        own_settings["image_size"] = size_of(name)
    part = convert_family(family, bare, replace(source, settings=own_settings), choices, prefix)
    depth = len(part.config["depths"])
    stem = int(family.model_type == "resnet")  # timm counts the map of a ResNet's stem as level 0
    levels = backbone.get("out_indices") or settings.get("out_indices") or [-4, -3, -2, -1]
    indices = [level % (depth + stem) + 1 - stem for level in levels]
    if min(indices) < 1 or max(indices) > depth:
        raise CheckpointError(
            f"{place}: its head reads timm's levels {listed(levels, 5)}, and fastuper's ResNet has the maps of stages "
            f"1 to {depth} alone (its stem halves the image twice, timm's map of the stem once)"
        )
    config = {
        key: value for key, value in settings.items() if key not in ("backbone", "use_timm_backbone", "backbone_kwargs")
    }
    own = {**part.config, "out_features": [f"stage{i}" for i in indices]}
    tensors = {BACKBONE + key: tensor for key, tensor in part.translated.tensors.items()}
    rows = [
        Row(row.source, tuple(BACKBONE + target for target in row.targets), row.note) for row in part.translated.rows
    ]
    for key, tensor in source.tensors.items():
        if not key.startswith(IN_UPERNET):
            tensors[key] = tensor
            rows.append(Row(key, (key,)))
    return Conversion(
        f"a UPerNet over timm's {part.words}",
        "upernet",
        {**config, "backbone_config": own},
        tensors,
        rows,
        _own_preprocessing(place),
        (FROZEN,) if backbone.get("freeze_batch_norm_2d") else (),
        only_fastuper=ONLY_FASTUPER.get(own["model_type"], ""),
    )


def _own_preprocessing(place: str) -> dict[str, Any]:
    """Return the preprocessor_config.json beside a model's weights; none if there is no such file."""
    path = Path(place) if Path(place).is_dir() else Path(place).parent
    path = path / "preprocessor_config.json"
    return dict(read_json(path)) if path.is_file() else {}


DIALECTS = (
    Dialect("UPerNets over a timm backbone", is_upernet_over_timm, convert_upernet),
    Dialect("timm's ConvNeXt, ResNet and Swin (also torchvision's ResNet)", is_timm, convert, "timm"),
)
"""The dialects of this file."""


# Back -----------------------------------------------------------------------------------------------------------------

IN_TIMM = ("convnext", "convnextv2", "resnet", "resnet_deep_stem", "swin", "swin_timm")
"""The model types that timm has too."""

FINAL_NORMS = {"convnext": "head.norm", "convnextv2": "head.norm", "swin": "norm", "swin_timm": "norm"}
"""timm's norm between the last map and the classifier."""


def to_timm(
    config: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor],
    names: Names | None = None,
    features_only: bool = False,
    conv_mlp: bool = False,
) -> Translated:
    """Return a backbone's tensors by timm's names, with a row for each tensor of the backbone.

    `timm.create_model(NAME, num_classes=0).load_state_dict(result.tensors)` takes them, or the model of
    `features_only=True`. Our Swin ("swin") shifts windows in every second block: build timm's with
    `always_partition=True`. timm shifts a map before it pads it to whole windows, and ours pads it first: the results
    are equal if all maps are multiples of the window. "swin_timm" follows timm's rules.

    Args:
        config: the values of the backbone's configuration (`to_dict()`), ours or Transformers'.
        state_dict: of a backbone or of a UPerNet; tensors outside the backbone are left alone.
        names: the names that Transformers has in memory, `checkpoint_names(model_type)`; None for our own names.
        features_only: True for the names of `features_only=True`. Norms of maps are left out, as timm has none there.
            With a classifier's names the norm of the last map becomes timm's last norm.
        conv_mlp: True for timm's ConvNeXts with 1x1 convolutions in their MLPs, such as convnext_nano.

    Raises:
        CheckpointError: the state dict is not the configuration's.
        ValueError: timm has no such backbone.
    """
    kind = config.get("model_type")
    if kind not in IN_TIMM:
        raise ValueError(f"model_type={shown(kind)} has no names in timm; {', '.join(IN_TIMM)} have them")
    parts = ("embeddings", "embedder", "encoder", "hidden_states_norms")
    names = Names(parts=parts) if names is None else names
    tensors = backbone_state_dict(state_dict, kind, names)
    depths = config["depths"]
    joint = "_" if features_only else "."
    rules = []
    if kind in ("convnext", "convnextv2"):
        grn = r"encoder\.stages\.(\d+)\.layers\.(\d+)\.grn\.(\w+)"
        target = rf"stages{joint}\1.blocks.\2.mlp.grn.\3"
        rules.append(Rule(grn, (target,), change=lambda vector: [vector.flatten()]))
        pairs: Pairs = convnext_pairs(joint)
        if conv_mlp:
            block = r"encoder\.stages\.(\d+)\.layers\.(\d+)\.pwconv([12])\.weight"
            target = rf"stages{joint}\1.blocks.\2.mlp.fc\3.weight"
            rules.append(Rule(block, (target,), "a 1x1 convolution", lambda weight: [weight[:, :, None, None]]))
    elif kind in ("swin", "swin_timm"):
        if config.get("use_absolute_embeddings"):
            raise ValueError("use_absolute_embeddings=True: timm's Swin has no absolute position embeddings")
        pairs = swin_pairs(len(depths), f"layers{joint}", first_merged=1)
        tensors = _joined(tensors)
        rules += [
            Rule(
                r"encoder\.layers\.(\d+)\.blocks\.(\d+)\.attention\.self\.qkv\.(\w+)",
                 (rf"layers{joint}\1.blocks.\2.attn.qkv.\3",), "query, key and value"),
            Rule(r".*\.relative_position_index", (), "timm computes it"),
        ]  # fmt: skip
    else:
        if config.get("downsample_in_bottleneck") or config.get("downsample_in_first_stage"):
            raise ValueError("timm's ResNet has its strides in 3x3 convolutions, from the second stage on")
        if config.get("strides") or config.get("dilations"):
            raise ValueError("strides and dilations are options of timm's models, and no names: leave them out")
        deep = len(config.get("stem_widths") or [0]) == 3
        pairs = resnet_pairs(len(depths), deep, bool(config.get("avg_down")))
    if kind in FINAL_NORMS:
        last = rf"hidden_states_norms\.stage{len(depths)}\.(\w+)"
        if not features_only:
            rules.append(Rule(last, (rf"{FINAL_NORMS[kind]}.\1",)))
        rules.append(Rule(r"hidden_states_norms\..*", (), "timm has no norms of its maps"))
    rules += [named(*pair, backwards=True) for pair in pairs]
    translated = translate(tensors, rules, f"the {kind} backbone")
    # One tensor "qkv" stands for three.
    rows = [
        replace(row, source=row.source.replace(".self.qkv.", f".self.{part}."))
        for row in translated.rows
        for part in (QKV if ".self.qkv." in row.source else ("",))
    ]
    return replace(translated, rows=rows)


def timm_arguments(config: Mapping[str, Any], features_only: bool) -> str:
    """Return the arguments of `timm.create_model`, as Python text, with which a model takes the tensors of `to_timm`.

    Args:
        config: see `to_timm`.
        features_only: see there.
    """
    kind = config["model_type"]
    arguments: dict[str, Any] = {"features_only": True} if features_only else {"num_classes": 0}
    if kind in ("convnext", "convnextv2"):
        arguments["conv_mlp"] = False  # some names have 1x1 convolutions in place of linear layers
    if kind == "swin_timm":
        size = config["image_size"]
        arguments["img_size"] = tuple(size) if isinstance(size, list) else size
    if kind == "swin" or config.get("always_partition"):
        arguments["always_partition"] = True
    return ", ".join(f"{name}={value}" for name, value in arguments.items())


def _joined(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a Swin's tensors with each query, key and value as one tensor "qkv", queries first."""
    joined: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*\.attention\.self\.)(query|key|value)\.(\w+)", name)
        if match is None:
            joined[name] = tensor
        elif match[2] == "query":
            parts = [tensors.get(f"{match[1]}{part}.{match[3]}") for part in QKV]
            if any(part is None for part in parts):
                raise CheckpointError(
                    f"the swin backbone has {name} without its key or value; the tensors are incomplete"
                )
            joined[f"{match[1]}qkv.{match[3]}"] = torch.cat([part for part in parts if part is not None])
    return joined

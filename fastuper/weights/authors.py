"""Checkpoints of Swin's and ConvNeXt's own repositories: classifiers as backbones, and the backbones of their UPerNets.

The repositories are microsoft/Swin-Transformer, SwinTransformer/Swin-Transformer-Semantic-Segmentation and
facebookresearch/ConvNeXt. Their UPerNets have mmsegmentation's heads, over backbones with the names given here. The
authors merge patches in our order, (row, column) = (0, 0), (1, 0), (0, 1), (1, 1), so that nothing is rearranged.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

import torch

from fastuper.weights.conversion import Choices, Conversion, Dialect, Rule, Source, translate
from fastuper.weights.errors import CheckpointError
from fastuper.weights.families import (
    COMPUTED,
    HEAD,
    Tensors,
    convnext_values,
    named,
    preprocessing,
    refuse,
    stages_of,
    swin_values,
)
from fastuper.weights.mmseg_backbones import BackboneDialect, BackbonePart, Settings, grn_rules, integers, split
from fastuper.weights.transformers import OUTPUT_NORMS

# Names ----------------------------------------------------------------------------------------------------------------

SWIN_BLOCK = (
    ("norm1.*", "layernorm_before.*"),
    ("norm2.*", "layernorm_after.*"),
    ("attn.relative_position_bias_table", "attention.self.relative_position_bias_table"),
    ("attn.proj.*", "attention.output.dense.*"),
    ("mlp.fc1.*", "intermediate.dense.*"),
    ("mlp.fc2.*", "output.dense.*"),
)
"""The names inside a block of Swin, the authors' (timm's too) and ours; `*` stands for the last part."""

QKV = ("query", "key", "value")
"""The parts of a layer "qkv", in their order."""

NOT_SWIN = (
    (
        r"\.(logit_scale|cpb_mlp|q_bias|v_bias|relative_coords_table)\b",
        "is of a Swin V2, and only Transformers' checkpoints of Swin V2 are read",
    ),
    (r"\.spatial_mlp\.", "is of a Swin-MLP, which has no attention"),
    (r"\b_?moe_|\.experts\b", "is of a Swin-MoE, a mixture of experts"),
)
"""Names of other networks, and what they show."""

SHIFTS = (
    "every second block shifts its windows, as in the authors' UPerNets; the classifier does not shift where a map is "
    "no larger than a window"
)
"""What differs between a classifier's Swin and a backbone's."""


def swin_pairs(stages: int, layers: str = "layers.", first_merged: int = 0) -> Iterator[tuple[str, str]]:
    """Yield the names of a Swin's tensors, the authors' or timm's and ours, except those of queries, keys and values.

    Args:
        stages: the number of stages.
        layers: the beginning of a stage's name.
        first_merged: the stage that has the first patch merging: 0 if a stage ends with it, 1 if a stage begins with
            it, as in timm since 0.9.
    """
    yield "patch_embed.proj.*", "embeddings.patch_embeddings.projection.*"
    yield "patch_embed.norm.*", "embeddings.norm.*"
    for theirs, ours in SWIN_BLOCK:
        yield f"{layers}#.blocks.#.{theirs}", f"encoder.layers.#.blocks.#.{ours}"
    for stage in range(stages - 1):
        for part in ("norm.*", "reduction.*"):
            yield f"{layers}{stage + first_merged}.downsample.{part}", f"encoder.layers.{stage}.downsample.{part}"


def swin_rules(
    stages: int, layers: str = "layers.", first_merged: int = 0, factors: Sequence[float] = ()
) -> list[Rule]:
    """Return the rules of a Swin's tensors, those of its blocks, patches and mergings; see `swin_pairs`.

    Args:
        stages: see `swin_pairs` for this and the next two.
        layers: see there.
        first_merged: see there.
        factors: the factor of the queries of each stage; 1 if empty.
    """
    rules = [named(theirs, ours) for theirs, ours in swin_pairs(stages, layers, first_merged)]
    parts = tuple(rf"encoder.layers.\1.blocks.\2.attention.self.{part}.\3" for part in QKV)
    # The layer qkv gives the channels of all queries, then of all keys, then of all values.
    for stage, factor in enumerate(factors or [1.0] * stages):
        pattern = rf"{re.escape(layers)}({stage})\.blocks\.(\d+)\.attn\.qkv\.(weight|bias)"
        note = "split into query, key and value" + ("" if factor == 1 else f"; the query times {factor:g} (qk_scale)")
        rules.append(Rule(pattern, parts, note, split(factor)))
    return [*rules, Rule(r".*\.(relative_position_index|attn_mask)", (), COMPUTED)]


def convnext_rules(stages: int) -> list[Rule]:
    """Return the rules of a ConvNeXt's tensors, V1's or V2's, in the authors' names."""
    rules = [
        named("downsample_layers.0.0.*", "embeddings.patch_embeddings.*"),
        named("downsample_layers.0.1.*", "embeddings.layernorm.*"),
        *grn_rules(r"stages\.(\d{1,3})\.(\d{1,3})\."),
    ]
    for stage in range(1, stages):
        rules.append(named(f"downsample_layers.{stage}.#.*", f"encoder.stages.{stage}.downsampling_layer.#.*"))
    for theirs, ours in (
        ("dwconv.*", "dwconv.*"),
        ("norm.*", "layernorm.*"),
        ("pwconv1.*", "pwconv1.*"),
        ("pwconv2.*", "pwconv2.*"),
        ("gamma", "layer_scale_parameter"),
    ):
        rules.append(named(f"stages.#.#.{theirs}", f"encoder.stages.#.layers.#.{ours}"))
    return rules


# Classifiers ----------------------------------------------------------------------------------------------------------


def convert_swin_classifier(source: Source, choices: Choices) -> Conversion:
    """Convert a classifier of microsoft/Swin-Transformer to a backbone.

    Raises:
        CheckpointError: it is another network (Swin V2, Swin-MLP, Swin-MoE), or its tensors disagree.
    """
    tensors, place = source.tensors, source.place
    refuse(tensors, NOT_SWIN, place)
    rules = [
        *swin_rules(stages_of(tensors, r"layers\.(\d{1,2})\.")),
        named("absolute_pos_embed", "embeddings.position_embeddings"),
        Rule(r"(norm|head)\.(weight|bias)", (), HEAD),
    ]
    translated = translate(tensors, rules, place)
    config = swin_values(translated.tensors, place)
    if (table := translated.tensors.get("embeddings.position_embeddings")) is not None:
        config["image_size"] = _image_size(table, config["patch_size"], choices, place)
    return Conversion(
        "the classifier of Swin's authors",
        "backbone",
        config,
        translated.tensors,
        translated.rows,
        preprocessing(choices, config["num_channels"]),
        (SHIFTS,),
        (OUTPUT_NORMS,),
    )


def convert_convnext_classifier(source: Source, choices: Choices) -> Conversion:
    """Convert a classifier of facebookresearch/ConvNeXt or ConvNeXt-V2 to a backbone.

    Raises:
        CheckpointError: it is another network, or its tensors disagree.
    """
    tensors, place = source.tensors, source.place
    rules = convnext_rules(stages_of(tensors, r"stages\.(\d{1,2})\."))
    translated = translate(tensors, [*rules, Rule(r"(norm|head)\.(weight|bias)", (), HEAD)], place)
    config = convnext_values(translated.tensors, place)
    return Conversion(
        "the classifier of ConvNeXt's authors",
        "backbone",
        config,
        translated.tensors,
        translated.rows,
        preprocessing(choices, config["num_channels"]),
        initialised=(OUTPUT_NORMS,),
    )


def _image_size(table: torch.Tensor, patch: int | list[int], choices: Choices, place: str) -> list[int]:
    """Return the image size of a table of positions (1, rows * columns, C); a square one by default."""
    if table.ndim != 3:
        raise CheckpointError(f"{place}: absolute_pos_embed has shape {tuple(table.shape)}, not (1, positions, C)")
    height, width = (patch, patch) if isinstance(patch, int) else patch
    side = math.isqrt(table.shape[1])
    square = [side * height, side * width] if side * side == table.shape[1] else None
    size = choices.settle("image_size", None, square)
    size = [size, size] if isinstance(size, int) else size
    if (size[0] // height) * (size[1] // width) != table.shape[1]:
        raise CheckpointError(
            f"{place}: absolute_pos_embed has {table.shape[1]} positions, which images of {size[0]} x {size[1]} "
            "(height x width) do not have"
        )
    return size


def is_swin_classifier(source: Source) -> bool:
    """Return True for the names of a Swin whose stages end with patch merging: the authors', and timm's before 0.9."""
    names = source.tensors
    return "patch_embed.proj.weight" in names and (
        "layers.0.downsample.reduction.weight" in names
        or ("layers.0.blocks.0.norm1.weight" in names and "layers.1.blocks.0.norm1.weight" not in names)
    )


def is_convnext_classifier(source: Source) -> bool:
    """Return True for the names of a ConvNeXt of its authors."""
    return "downsample_layers.0.0.weight" in source.tensors and "stages.0.0.dwconv.weight" in source.tensors


CLASSIFIERS = (
    Dialect("classifiers of Swin's authors", is_swin_classifier, convert_swin_classifier),
    Dialect("classifiers of ConvNeXt's authors", is_convnext_classifier, convert_convnext_classifier),
)
"""The dialects of classifiers."""


# The backbones of UPerNets --------------------------------------------------------------------------------------------


def convert_swin(tensors: Tensors, settings: Settings, choices: Choices, place: str, prefix: str) -> BackbonePart:
    """Convert the SwinTransformer of SwinTransformer/Swin-Transformer-Semantic-Segmentation.

    It pads maps to whole windows before it shifts them, and shifts in every second block, as ours does.

    Raises:
        CheckpointError: it is a Swin that ours cannot be, or its tensors disagree.
    """
    refuse(tensors, NOT_SWIN, place, prefix)
    stages = stages_of(tensors, r"layers\.(\d{1,2})\.")
    returned = sorted(int(match[1]) for name in tensors if (match := re.fullmatch(r"norm(\d{1,2})\.weight", name)))
    rules = [
        *swin_rules(stages, factors=_factors(tensors, settings, stages)),
        # The table is (1, C, rows, columns) here, and (1, rows * columns, C) in a classifier and in ours.
        Rule(
            "absolute_pos_embed",
            ("embeddings.position_embeddings",),
            "as positions by channels",
            lambda table: [table.flatten(2).transpose(1, 2).contiguous()],
        ),
        *(named(f"norm{stage}.*", f"{OUTPUT_NORMS}stage{stage + 1}.*") for stage in range(stages)),
    ]
    translated = translate(tensors, rules, place, prefix)
    config = swin_values(translated.tensors, place)
    config["out_features"] = [f"stage{i + 1}" for i in choices.settle("out_indices", returned, None)]
    if "absolute_pos_embed" in tensors:
        patch = config["patch_size"]
        height, width = (patch, patch) if isinstance(patch, int) else patch
        rows, columns = tensors["absolute_pos_embed"].shape[2:]
        config["image_size"] = choices.settle("image_size", [rows * height, columns * width], None)
    for theirs, ours in (
        ("drop_path_rate", "drop_path_rate"),
        ("drop_rate", "hidden_dropout_prob"),
        ("attn_drop_rate", "attention_probs_dropout_prob"),
    ):
        if theirs in settings:
            config[ours] = settings[theirs]
    return BackbonePart(config, translated, "Swin of its authors")


def _factors(tensors: Tensors, settings: Settings, stages: int) -> list[float]:
    """Return the factor of each stage's queries.

    The authors multiply queries by qk_scale, ours by (channels of a head)^-0.5: the layer takes the quotient.
    """
    scale = settings.get("qk_scale")
    if not scale:
        return [1.0] * stages
    table = "blocks.0.attn.relative_position_bias_table"
    heads = [tensors[f"layers.{i}.{table}"].shape[1] for i in range(stages) if f"layers.{i}.{table}" in tensors]
    widths = [tensors[f"layers.{i}.blocks.0.norm1.weight"].shape[0] for i in range(len(heads))]
    return [float(scale) * (width / count) ** 0.5 for width, count in zip(widths, heads, strict=True)]


def convert_convnext(tensors: Tensors, settings: Settings, choices: Choices, place: str, prefix: str) -> BackbonePart:
    """Convert the ConvNeXt of facebookresearch/ConvNeXt/semantic_segmentation.

    Raises:
        CheckpointError: it is a ConvNeXt that ours cannot be, or its tensors disagree.
    """
    stages = stages_of(tensors, r"stages\.(\d{1,2})\.")
    every = list(range(stages))
    # The network has a norm for each stage, of which those in out_indices are used.
    known = (integers(settings, "out_indices", place) or every) if settings else None
    returned = choices.settle("out_indices", known, every)
    rules = convnext_rules(stages)
    for stage in every:
        target, unused = (
            f"{OUTPUT_NORMS}stage{stage + 1}.*",
            Rule(rf"norm{stage}\.\w+", (), "the head does not read this map"),
        )
        rules.append(named(f"norm{stage}.*", target) if stage in returned else unused)
    translated = translate(tensors, rules, place, prefix)
    config = convnext_values(translated.tensors, place)
    config["out_features"] = [f"stage{i + 1}" for i in returned]
    for name in ("drop_path_rate", "layer_scale_init_value"):
        if name in settings and (name == "drop_path_rate" or config.get(name)):
            config[name] = settings[name]
    return BackbonePart(config, translated, "ConvNeXt of its authors")


SWIN = BackboneDialect("Swin of its authors", lambda tensors: "layers.0.blocks.0.norm1.weight" in tensors, convert_swin)
CONVNEXT = BackboneDialect(
    "ConvNeXt of its authors", lambda tensors: "stages.0.0.dwconv.weight" in tensors, convert_convnext
)

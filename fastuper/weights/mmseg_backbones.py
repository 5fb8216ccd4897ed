"""mmsegmentation's backbones: Swin, ConvNeXt V1 and V2 (of mmpretrain and mmcls), ResNet, ResNetV1c and ResNetV1d.

Names are those of mmsegmentation 0.x and 1.x, which are the same. A converter takes the tensors of `backbone.` without
that prefix, and gives them the names of our backbone module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastuper.io.messages import listed, shown
from fastuper.weights.conversion import Choices, Rule, Translated, translate
from fastuper.weights.errors import CheckpointError

Tensors = Mapping[str, torch.Tensor]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class BackbonePart:
    """A converted backbone of a UPerNet.

    Attributes:
        config: the values of its configuration, with `model_type`. It is for all maps that the library's backbone
            returns: `out_features` are their stages, finest first, or the maps are the levels of a `vit_pyramid`. The
            head's converter selects the maps that the head reads.
        translated: tensors by the names of our backbone module, and a row for each of the source.
        words: the network in words: "Swin".
        only_fastuper: why Transformers cannot load the backbone; "" if it can.
    """

    config: dict[str, Any]
    translated: Translated
    words: str
    only_fastuper: str = ""


@dataclass(frozen=True)
class BackboneDialect:
    """A kind of backbone under mmsegmentation's UPerHead.

    Attributes:
        name: in messages that list the kinds.
        recognises: whether tensors, by their bare names, are of this kind.
        convert: takes the tensors by their bare names, the backbone's settings ({} if the checkpoint has none), the
            choices, the file's name, and the prefix of the names in the file; returns the backbone.
        with_neck: True for a backbone that may have a neck. Then the names keep "backbone." and "neck.", the prefix is
            "", and the settings are those of the whole model, with the keys "backbone" and "neck".
    """

    name: str
    recognises: Callable[[Tensors], bool]
    convert: Callable[[Tensors, Settings, Choices, str, str], BackbonePart]
    with_neck: bool = False


# Reading settings and shapes ------------------------------------------------------------------------------------------


def kind_of(settings: Settings) -> str:
    """Return the `type` of settings without the library's name before it; "" if there is none."""
    return str(settings.get("type", "")).rpartition(".")[2]


REGISTERED = {
    "BatchNorm2d": "BN",
    "SyncBatchNorm": "SyncBN",
    "LayerNorm": "LN",
    "LayerNorm2d": "LN2d",
    "GroupNorm": "GN",
    "InstanceNorm2d": "IN",
}
"""Names in mmengine's registries of classes that are registered by another name."""


def short_types(value: Any) -> Any:
    """Return settings in which each `type` is a name of mmengine's registries, as "SwinTransformer".

    A configuration that imports classes is written with their full names, as "mmseg.models.SwinTransformer" and
    "torch.nn.LayerNorm". The library stays before the names of mmpretrain and mmcls, whose networks are others. Names
    of unknown libraries stay as they are.
    """
    if isinstance(value, list | tuple):
        return type(value)(short_types(part) for part in value)
    if not isinstance(value, Mapping):
        return value
    made = {name: short_types(part) for name, part in value.items()}
    kind = made.get("type")
    if isinstance(kind, str) and kind.count(".") > 1:
        library, name = kind.partition(".")[0], kind.rpartition(".")[2]
        if name in REGISTERED or library in ("mmseg", "mmcv", "mmengine", "torch"):
            made["type"] = REGISTERED.get(name, name)
        elif library in ("mmpretrain", "mmcls"):
            made["type"] = f"{library}.{name}"
    return made


def stored(settings: Settings, name: str, default: Any) -> Any:
    """Return a value of the settings, the library's default if they leave it out, or None without settings."""
    return settings.get(name, default) if settings else None


def integers(settings: Settings, name: str, place: str) -> list[int] | None:
    """Return a list of whole numbers from the settings; None if they leave it out.

    Raises:
        CheckpointError: the value is something else.
    """
    value = settings.get(name)
    if value is None:
        return None
    value = [value] if isinstance(value, int) else value
    if not isinstance(value, list | tuple) or not all(type(item) is int for item in value):
        raise CheckpointError(f"{place}: {name}={shown(value)} in its settings is no list of whole numbers")
    return list(value)


def shape(tensors: Tensors, name: str, dimensions: int, place: str, prefix: str) -> tuple[int, ...]:
    """Return the shape of a tensor that the network must have.

    Raises:
        CheckpointError: the tensor is missing, or has another number of dimensions.
    """
    if name not in tensors:
        raise CheckpointError(f"{place} lacks {prefix}{name}; it is incomplete")
    found = tuple(tensors[name].shape)
    if len(found) != dimensions or 0 in found:
        raise CheckpointError(f"{place}: {prefix}{name} has shape {found}, which no such tensor can have")
    return found


def counts(names: Iterable[str], pattern: str) -> list[int]:
    """Return the number of blocks of each stage.

    Args:
        names: names of tensors.
        pattern: matches the beginning of a block's name; its groups are the numbers of the stage and of the block.
    """
    found: dict[int, int] = {}
    for name in names:
        if match := re.match(pattern, name):
            stage, block = int(match[1]), int(match[2])
            found[stage] = max(found.get(stage, 0), block + 1)
    first = min(found, default=0)
    return [found.get(stage, 0) for stage in range(first, max(found, default=-1) + 1)]


def check_norm(settings: Settings, kinds: tuple[str, ...], eps: float, place: str, owner: str) -> None:
    """Refuse a norm of another kind, or with another epsilon.

    Args:
        settings: of the module; without `norm_cfg` its default is taken to fit.
        kinds: the types that are the same function.
        eps: the epsilon of our norms.
        place: the file.
        owner: the module in words.
    """
    norm = settings.get("norm_cfg")
    if norm is None:
        return
    if not isinstance(norm, Mapping) or str(norm.get("type")).rpartition(".")[2] not in kinds:
        kind = norm.get("type") if isinstance(norm, Mapping) else norm
        raise CheckpointError(
            f"{place}: {owner} has the norm {shown(kind)}; it cannot be converted: "
            f"fastuper's has {' or '.join(kinds[:2])}"
        )
    if norm.get("eps", 1e-5) != eps:
        raise CheckpointError(
            f"{place}: the norms of {owner} have eps={shown(norm.get('eps', 1e-5))}; it cannot be converted: "
            f"fastuper's have {eps}"
        )


def activation(settings: Settings, place: str, owner: str) -> str:
    """Return Transformers' name of the activation, GELU by default.

    Raises:
        CheckpointError: the activation is another, or has options.
    """
    act = settings.get("act_cfg") or {"type": "GELU"}
    names = {"GELU": "gelu", "ReLU": "relu"}
    options = act.keys() - {"type", "inplace"} if isinstance(act, Mapping) else {"type"}
    if options or act.get("type") not in names:
        raise CheckpointError(f"{place}: {owner} has the activation {shown(act)}; GELU and ReLU can be converted")
    return names[act["type"]]


# Swin -----------------------------------------------------------------------------------------------------------------


def _merged(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the weight or bias of a patch merging's norm, or the weight of its reduction, in our order of channels.

    mmsegmentation merges 2x2 squares by `nn.Unfold`: channel c of the position (row y, column x) of a square has the
    index 4 c + 2 y + x. Ours, as the authors' and Transformers', is (2 x + y) C + c. The last dimension of the tensor
    is therefore seen as (C, 2, 2), over (c, y, x), and rearranged to (x, y, c).
    """
    squares = tensor.unflatten(-1, (-1, 2, 2))
    return [squares.movedim(-3, -1).transpose(-3, -2).flatten(-3).contiguous()]


def relative_position_index(window: int) -> torch.Tensor:
    """Return the row of the bias table for each pair of positions of a window, (window^2, window^2).

    The rows of positions (y, x) and (v, u) are (y - v + window - 1) (2 window - 1) + x - u + window - 1.
    """
    y, x = torch.arange(window).repeat_interleave(window), torch.arange(window).repeat(window)
    return (y[:, None] - y + window - 1) * (2 * window - 1) + x[:, None] - x + window - 1


def convert_swin(tensors: Tensors, settings: Settings, choices: Choices, place: str, prefix: str) -> BackbonePart:
    """Convert mmsegmentation's SwinTransformer.

    Raises:
        CheckpointError: it is a Swin that ours cannot be, or its tensors disagree.
    """
    library = str(settings.get("type", "")).rpartition(".")[0]
    if library in ("mmpretrain", "mmcls") and not settings.get("pad_small_map"):
        raise CheckpointError(
            f"{place}: its backbone is {library}'s SwinTransformer with pad_small_map=False, which does not shift "
            "windows as large as the map; mmsegmentation's own SwinTransformer can be converted"
        )
    if any(name.startswith("stages.0.blocks.0.attn.w_msa.") and "logit_scale" in name for name in tensors):
        raise CheckpointError(f"{place}: its backbone is a Swin V2; only Transformers' Swin V2 is read")
    width, channels, *patch = shape(tensors, "patch_embed.projection.weight", 4, place, prefix)
    if "patch_embed.norm.weight" not in tensors:
        raise CheckpointError(
            f"{place}: its Swin has no norm after the patches (patch_norm=False); it cannot be converted: fastuper's "
            "has this norm"
        )
    check_norm(settings, ("LN",), 1e-5, place, "its Swin")
    depths = counts(tensors, r"stages\.(\d{1,2})\.blocks\.(\d{1,3})\.")
    strides = integers(settings, "strides", place) or []
    if any(stride != 2 for stride in strides[1:]):
        raise CheckpointError(f"{place}: its Swin has the strides {strides}; fastuper's merges 2 x 2 patches")

    table = "attn.w_msa.relative_position_bias_table"
    tables = [shape(tensors, f"stages.{i}.blocks.0.{table}", 2, place, prefix) for i in range(len(depths))]
    window = (int(tables[0][0] ** 0.5) + 1) // 2
    if any(rows != (2 * window - 1) ** 2 for rows, _ in tables):
        raise CheckpointError(f"{place}: its Swin's windows are not square, or differ between stages")
    index = relative_position_index(window)
    for name, tensor in tensors.items():
        if name.endswith(".relative_position_index") and not torch.equal(tensor.long().cpu(), index):
            raise CheckpointError(f"{place}: {prefix}{name} has another order of relative positions than a Swin's")
    heads = choices.settle("num_heads", [heads for _, heads in tables], None)
    hidden = [
        shape(tensors, f"stages.{i}.blocks.0.ffn.layers.0.0.weight", 2, place, prefix)[0] for i in range(len(depths))
    ]
    returned = sorted(int(match[1]) for name in tensors if (match := re.fullmatch(r"norm(\d{1,2})\.weight", name)))
    config: dict[str, Any] = {
        "model_type": "swin",
        "num_channels": channels,
        "patch_size": patch[0] if patch[0] == patch[1] else patch,
        "embed_dim": width,
        "depths": depths,
        "num_heads": heads,
        "window_size": window,
        "mlp_ratio": ratio(hidden, [width * 2**i for i in range(len(depths))], place),
        "qkv_bias": "stages.0.blocks.0.attn.w_msa.qkv.bias" in tensors,
        "hidden_act": activation(settings, place, "its Swin"),
        "use_absolute_embeddings": "absolute_pos_embed" in tensors,
        "out_features": [f"stage{i + 1}" for i in choices.settle("out_indices", returned, None)],
        **_dropouts(settings),
    }
    if "absolute_pos_embed" in tensors:
        config["image_size"] = _image_size(tensors, settings, choices, patch, place, prefix)

    block = r"stages\.(\d+)\.blocks\.(\d+)\."
    ours = r"encoder.layers.\1.blocks.\2."
    rules = [
        Rule(r"patch_embed\.projection\.(weight|bias)", (r"embeddings.patch_embeddings.projection.\1",)),
        Rule(r"patch_embed\.norm\.(weight|bias)", (r"embeddings.norm.\1",)),
        Rule(r"absolute_pos_embed", ("embeddings.position_embeddings",)),
        Rule(rf"{block}norm1\.(weight|bias)", (rf"{ours}layernorm_before.\3",)),
        Rule(rf"{block}norm2\.(weight|bias)", (rf"{ours}layernorm_after.\3",)),
        Rule(rf"{block}attn\.w_msa\.(relative_position_bias_table)", (rf"{ours}attention.self.\3",)),
        Rule(rf"{block}attn\.w_msa\.relative_position_index", (), "computed from the window's size"),
        Rule(rf"{block}attn\.w_msa\.proj\.(weight|bias)", (rf"{ours}attention.output.dense.\3",)),
        Rule(rf"{block}ffn\.layers\.0\.0\.(weight|bias)", (rf"{ours}intermediate.dense.\3",)),
        Rule(rf"{block}ffn\.layers\.1\.(weight|bias)", (rf"{ours}output.dense.\3",)),
        Rule(
            r"stages\.(\d+)\.downsample\.(norm\.weight|norm\.bias|reduction\.weight)",
            (r"encoder.layers.\1.downsample.\2",),
            "channels in the order of (column, row) of a 2 x 2 square, then its channels",
            _merged,
        ),
    ]
    # mmsegmentation multiplies queries by qk_scale, ours by (channels of a head)^-0.5: the layer takes the quotient.
    scale = settings.get("qk_scale") or None
    for i, count in enumerate(heads):
        factor = 1.0 if scale is None else float(scale) * (width * 2**i / count) ** 0.5
        rules.append(
            Rule(
                rf"stages\.({i})\.blocks\.(\d+)\.attn\.w_msa\.qkv\.(weight|bias)",
                tuple(rf"{ours}attention.self.{part}.\3" for part in ("query", "key", "value")),
                "split into query, key and value" + ("" if factor == 1 else f"; the query times {factor:g} (qk_scale)"),
                split(factor),
            )
        )
        rules.append(Rule(rf"norm{i}\.(weight|bias)", (rf"hidden_states_norms.stage{i + 1}.\1",)))
    return BackbonePart(config, translate(tensors, rules, place, prefix), "Swin")


def split(factor: float = 1.0) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """Return a change that splits (3 C, ...) into the query's (C, ...), times a factor, the key's and the value's."""

    def change(tensor: torch.Tensor) -> list[torch.Tensor]:
        query, key, value = (part.clone() for part in tensor.unflatten(0, (3, -1)).unbind(0))
        return [query if factor == 1 else query * factor, key, value]

    return change


def ratio(hidden: list[int], widths: list[int], place: str) -> float:
    """Return the factor `r` of the hidden widths of MLPs: `int(r * width) == hidden` for each stage.

    Raises:
        CheckpointError: there is no such factor.
    """
    low = max(h / w for h, w in zip(hidden, widths, strict=True))
    high = min((h + 1) / w for h, w in zip(hidden, widths, strict=True))
    for value in (low, (low + high) / 2):
        if all(int(value * w) == h for h, w in zip(hidden, widths, strict=True)):
            return value
    raise CheckpointError(f"{place}: the hidden layers of its MLPs, {hidden}, are no multiple of its widths {widths}")


def _dropouts(settings: Settings) -> dict[str, float]:
    names = {
        "drop_path_rate": ("drop_path_rate", 0.1),
        "drop_rate": ("hidden_dropout_prob", 0.0),
        "attn_drop_rate": ("attention_probs_dropout_prob", 0.0),
    }
    return {ours: settings.get(theirs, default) for theirs, (ours, default) in names.items() if settings}


def _image_size(
    tensors: Tensors, settings: Settings, choices: Choices, patch: list[int], place: str, prefix: str
) -> Any:
    """Return the image size (height, width) that the position table was made for."""
    rows = shape(tensors, "absolute_pos_embed", 3, place, prefix)[1]
    known = integers(settings, "pretrain_img_size", place)
    if settings and known is None:
        known = [224]
    side = round(rows**0.5)
    square = [side * patch[0], side * patch[1]] if side * side == rows else None
    size = choices.settle("image_size", known and (known * 2)[:2], square)
    size = [size, size] if isinstance(size, int) else size
    if (size[0] // patch[0]) * (size[1] // patch[1]) != rows:
        raise CheckpointError(
            f"{place}: {prefix}absolute_pos_embed has {rows} positions, which images of {size[0]} x {size[1]} "
            "(height x width) do not have"
        )
    return size


# ConvNeXt -------------------------------------------------------------------------------------------------------------


def _as_linear(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the weight of a linear layer, (C_out, C_in), from its own or from that of a 1x1 convolution."""
    return [tensor.flatten(1) if tuple(tensor.shape[2:]) == (1, 1) else tensor]


def grn_rules(block: str, weight: str = "gamma", bias: str = "beta") -> list[Rule]:
    """Return the rules of ConvNeXt V2's GRN. Its vectors may be (C,) in a dialect; ours are (1, 1, 1, C).

    Args:
        block: a regular expression for the name of a block's module that has the GRN, with its dot. Its two groups are
            the numbers of the stage and of the block.
        weight: the dialect's name of the weight.
        bias: the dialect's name of the bias.
    """
    return [
        Rule(
            rf"{block}grn\.{theirs}",
            (rf"encoder.stages.\1.layers.\2.grn.{ours}",),
            change=lambda vector: [vector.reshape(1, 1, 1, -1)],
        )
        for theirs, ours in ((weight, "weight"), (bias, "bias"))
    ]


def convnext_kind(tensors: Tensors, scale: float, place: str) -> dict[str, Any]:
    """Return the values that differ between ConvNeXt V1 and V2: the model type, and V1's initial LayerScale.

    Args:
        tensors: the translated tensors.
        scale: the initial value of LayerScale; 0 if there is none.
        place: the file, for the message.

    Raises:
        CheckpointError: the blocks have GRN and LayerScale.
    """
    if not any(".grn." in name for name in tensors):
        return {"model_type": "convnext", "layer_scale_init_value": scale}
    if scale:
        raise CheckpointError(f"{place}: its blocks have GRN and LayerScale, and those of ConvNeXt V2 have GRN alone")
    return {"model_type": "convnextv2"}


def convert_convnext(tensors: Tensors, settings: Settings, choices: Choices, place: str, prefix: str) -> BackbonePart:
    """Convert the ConvNeXt of mmpretrain or mmcls.

    Raises:
        CheckpointError: it is a ConvNeXt that ours cannot be, or its tensors disagree.
    """
    check_norm(settings, ("LN2d",), 1e-6, place, "its ConvNeXt")
    depths = counts(tensors, r"stages\.(\d{1,2})\.(\d{1,3})\.")
    _, channels, *patch = shape(tensors, "downsample_layers.0.0.weight", 4, place, prefix)
    if patch[0] != patch[1]:
        raise CheckpointError(f"{place}: its ConvNeXt has patches of {patch[0]} x {patch[1]}; fastuper's are square")
    sizes = [shape(tensors, f"stages.{i}.0.norm.weight", 1, place, prefix)[0] for i in range(len(depths))]
    scaled = "stages.0.0.gamma" in tensors
    returned = sorted(int(match[1]) for name in tensors if (match := re.fullmatch(r"norm(\d{1,2})\.weight", name)))
    config: dict[str, Any] = {
        "num_channels": channels,
        "patch_size": patch[0],
        "num_stages": len(depths),
        "hidden_sizes": sizes,
        "depths": depths,
        "hidden_act": activation(settings, place, "its ConvNeXt"),
        "drop_path_rate": settings.get("drop_path_rate", 0.0),
        "out_features": [f"stage{i + 1}" for i in choices.settle("out_indices", returned, None)],
    }
    block, ours = r"stages\.(\d+)\.(\d+)\.", r"encoder.stages.\1.layers.\2."
    rules = [
        Rule(r"downsample_layers\.0\.0\.(weight|bias)", (r"embeddings.patch_embeddings.\1",)),
        Rule(r"downsample_layers\.0\.1\.(weight|bias)", (r"embeddings.layernorm.\1",)),
        Rule(r"downsample_layers\.(\d+)\.([01])\.(weight|bias)", (r"encoder.stages.\1.downsampling_layer.\2.\3",)),
        Rule(rf"{block}depthwise_conv\.(weight|bias)", (rf"{ours}dwconv.\3",)),
        Rule(rf"{block}norm\.(weight|bias)", (rf"{ours}layernorm.\3",)),
        Rule(rf"{block}pointwise_conv([12])\.bias", (rf"{ours}pwconv\3.bias",)),
        Rule(
            rf"{block}pointwise_conv([12])\.weight",
            (rf"{ours}pwconv\3.weight",),
            "" if tensors["stages.0.0.pointwise_conv1.weight"].ndim == 2 else "a 1x1 convolution as a linear layer",
            _as_linear,
        ),
        Rule(rf"{block}gamma", (rf"{ours}layer_scale_parameter",)),
        *grn_rules(block),
        *(Rule(rf"norm{i}\.(weight|bias)", (rf"hidden_states_norms.stage{i + 1}.\1",)) for i in range(len(depths))),
    ]
    translated = translate(tensors, rules, place, prefix)
    scale = settings.get("layer_scale_init_value", 1e-6) if scaled else 0.0
    return BackbonePart({**convnext_kind(translated.tensors, scale, place), **config}, translated, "ConvNeXt")


# ResNet ---------------------------------------------------------------------------------------------------------------

STATISTICS = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
RESNETS = ("ResNet", "ResNetV1c", "ResNetV1d")
BATCH_NORMS = ("BN", "SyncBN", "BN2d", "MMSyncBN", "naiveSyncBN")
STEM = ("conv1.weight", "stem.0.weight", "stem.3.weight", "stem.6.weight", *(f"stem.{i}.conv.weight" for i in range(3)))


def convert_resnet(tensors: Tensors, settings: Settings, choices: Choices, place: str, prefix: str) -> BackbonePart:
    """Convert mmsegmentation's ResNet, ResNetV1c or ResNetV1d.

    Raises:
        CheckpointError: it is a network that our ResNets cannot be, or its tensors disagree.
    """
    _check_resnet(tensors, settings, place, prefix)
    depths = counts(tensors, r"layer(\d)\.(\d{1,3})\.")
    stages = range(1, len(depths) + 1)
    bottleneck = "layer1.0.conv3.weight" in tensors
    last = "conv3" if bottleneck else "conv2"
    sizes = [shape(tensors, f"layer{i}.0.{last}.weight", 4, place, prefix)[0] for i in stages]
    for i in stages:
        width, other = (shape(tensors, f"layer{i}.0.{name}.weight", 4, place, prefix) for name in ("conv1", "conv2"))
        if other[1] != width[0]:
            raise CheckpointError(
                f"{place}: the convolutions of its ResNet have groups, as a ResNeXt's; it cannot be converted: "
                "fastuper's have none"
            )
        if bottleneck and sizes[i - 1] != 4 * width[0]:
            raise CheckpointError(
                f"{place}: the bottlenecks of its ResNet narrow {sizes[i - 1]} channels to {width[0]}; it cannot be "
                "converted: fastuper's narrow them to a quarter"
            )
    stem = [name for name in STEM if name in tensors]
    widths = [shape(tensors, name, 4, place, prefix)[0] for name in stem]
    if len(stem) not in (1, 3):
        raise CheckpointError(f"{place} lacks the stem of its ResNet, {prefix}conv1 or {prefix}stem; it is incomplete")

    ones, usual = [1] * len(depths), [1, *[2] * (len(depths) - 1)]
    strides = choices.settle("strides", _per_stage(settings, "strides", [1, 2, 2, 2], place), usual)
    dilations = choices.settle("dilations", _per_stage(settings, "dilations", [1, 1, 1, 1], place), ones)
    for name, values in (("strides", strides), ("dilations", dilations)):
        if len(values) != len(depths):
            raise CheckpointError(f"{place}: {name}={shown(values)} are not as many as the {len(depths)} stages")
    if not settings and any(dilation > 1 for dilation in dilations):
        choices.notes.append("contract_dilation: False (the default; the checkpoint does not say)")
    grid = integers(settings, "multi_grid", place)
    if grid is not None:  # one for each block of the last stage; more have no effect
        grid = grid[: depths[-1]]
    returned = choices.settle(
        "out_indices", _per_stage(settings, "out_indices", [0, 1, 2, 3], place), list(range(len(depths)))
    )
    config: dict[str, Any] = {
        "model_type": "resnet",
        "num_channels": shape(tensors, stem[0], 4, place, prefix)[1],
        "embedding_size": widths[-1],
        "hidden_sizes": sizes,
        "depths": depths,
        "layer_type": "bottleneck" if bottleneck else "basic",
        "out_features": [f"stage{i + 1}" for i in returned],
    }
    if bottleneck:  # a basic block has one place for its stride
        style = choices.settle("resnet_style", stored(settings, "style", "pytorch"), "pytorch")
        if style not in ("pytorch", "caffe"):
            raise CheckpointError(f"{place}: resnet_style must be pytorch or caffe, got {shown(style)}")
        config["downsample_in_bottleneck"] = style == "caffe"

    averages = any(re.fullmatch(r"layer\d\.0\.downsample\.2\.weight", name) for name in tensors)
    rates = [*dilations[:-1], *(dilations[-1:] if grid is None else grid)]
    reasons = [
        words
        for words, applies in (
            ("a deep stem", len(stem) == 3),
            ("averaged shortcuts", averages),
            ("dilations", any(rate != 1 for rate in rates)),
            ("other strides", strides[1:] != usual[1:] or strides[0] not in (1, 2)),
        )
        if applies
    ]
    if reasons:
        config |= {
            "model_type": "resnet_deep_stem",
            "stem_widths": widths,
            "avg_down": averages,
            "strides": strides,
            "dilations": dilations,
            "contract_dilation": bool(settings.get("contract_dilation", False)),
            "multi_grid": grid,
        }
    elif strides[0] == 2:
        config["downsample_in_first_stage"] = True
    rules = [
        Rule(r"conv1\.weight", ("embedder.embedder.convolution.weight",)),
        Rule(rf"bn1\.{STATISTICS}", (r"embedder.embedder.normalization.\1",)),
    ]
    for i in range(3):  # a Sequential of convolution, norm, activation; ConvModules in mmpretrain
        target = f"embedder.embedder.{i}."
        rules += [
            Rule(rf"stem\.({3 * i}|{i}\.conv)\.weight", (f"{target}convolution.weight",)),
            Rule(rf"stem\.({3 * i + 1}|{i}\.bn)\.{STATISTICS}", (rf"{target}normalization.\2",)),
        ]
    for i in stages:
        block, ours = rf"layer{i}\.(\d+)\.", rf"encoder.stages.{i - 1}.layers.\1."
        for j in range(3):
            rules += [
                Rule(rf"{block}conv{j + 1}\.weight", (rf"{ours}layer.{j}.convolution.weight",)),
                Rule(rf"{block}bn{j + 1}\.{STATISTICS}", (rf"{ours}layer.{j}.normalization.\2",)),
            ]
        first = 1 if f"layer{i}.0.downsample.2.weight" in tensors else 0  # the average is module 0, without tensors
        rules += [
            Rule(rf"{block}downsample\.{first}\.weight", (rf"{ours}shortcut.convolution.weight",)),
            Rule(rf"{block}downsample\.{first + 1}\.{STATISTICS}", (rf"{ours}shortcut.normalization.\2",)),
        ]
    words = "ResNet" + ("" if len(stem) == 1 else "V1d" if averages else "V1c")
    only = f"Transformers has no ResNet with {' and '.join(reasons)}" if reasons else ""
    return BackbonePart(config, translate(tensors, rules, place, prefix), words, only)


def _per_stage(settings: Settings, name: str, default: list[int], place: str) -> list[int] | None:
    """Return a ResNet's setting, mmsegmentation's default without it, or None without settings."""
    value = integers(settings, name, place)
    return default if value is None and settings else value


def _check_resnet(tensors: Tensors, settings: Settings, place: str, prefix: str) -> None:
    """Refuse a network that our ResNets cannot be, by its name."""
    kind = kind_of(settings)
    if kind and kind not in RESNETS:
        raise CheckpointError(
            f"{place}: its backbone is a {shown(kind)}; it cannot be converted: of its kind {listed(RESNETS)} can"
        )
    if settings.get("dcn") is not None or any("conv_offset" in name for name in tensors):
        raise CheckpointError(
            f"{place}: its ResNet has deformable convolutions (DCN); it cannot be converted: fastuper's has none"
        )
    if settings.get("conv_cfg") not in (None, {"type": "Conv2d"}):
        raise CheckpointError(
            f"{place}: its ResNet has the convolutions {shown(settings['conv_cfg'])}; Conv2d can be converted"
        )
    check_norm(settings, BATCH_NORMS, 1e-5, place, "its ResNet")
    own = r"(conv|bn)\d\.\w+|stem\.\d\.(conv\.|bn\.)?\w+|layer\d\.\d+\.((conv|bn)\d|downsample\.[012])\.\w+"
    if others := [prefix + name for name in tensors if not re.fullmatch(own, name)]:
        raise CheckpointError(
            f"{place}: its ResNet has other parts than convolutions and BatchNorm (plugins or other norms), such as "
            f"{listed(others, 2)}; it cannot be converted"
        )


SWIN = BackboneDialect("Swin", lambda tensors: "stages.0.blocks.0.attn.w_msa.qkv.weight" in tensors, convert_swin)
CONVNEXT = BackboneDialect("ConvNeXt", lambda tensors: "stages.0.0.depthwise_conv.weight" in tensors, convert_convnext)
RESNET = BackboneDialect("ResNet", lambda tensors: "layer1.0.conv1.weight" in tensors, convert_resnet)

"""The values of our backbone configurations, from the names and shapes of the network's tensors.

Each function takes tensors by the names of our backbone module, so that all dialects share it: a dialect translates
names first. What a network of ours cannot be is refused here if shapes show it. No model is built here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from fastuper.io.messages import listed, shown
from fastuper.weights.conversion import Choices, Rule
from fastuper.weights.errors import CheckpointError
from fastuper.weights.mmseg_backbones import convnext_kind, ratio

Tensors = Mapping[str, torch.Tensor]

COMPUTED = "computed from the configuration"
"""Why a buffer that follows from the window's size is left out."""

HEAD = "the classifier's, which a backbone does not have"
"""Why a classifier's last norm and layer are left out."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# Names ----------------------------------------------------------------------------------------------------------------


def named(theirs: str, ours: str, backwards: bool = False) -> Rule:
    """Return the rule that copies tensors under another name.

    Args:
        theirs: the name in the dialect. `#` stands for a number and `*` for the last part ("weight").
        ours: the name in our module, with the same signs in the same order.
        backwards: True for the rule from our names to theirs.
    """
    source, target = (ours, theirs) if backwards else (theirs, ours)
    pattern = re.escape(source).replace(r"\#", r"(\d{1,3})").replace(r"\*", r"(\w+)")
    numbers = iter(range(1, 10))
    return Rule(pattern, (re.sub(r"[#*]", lambda _: rf"\{next(numbers)}", target),))


def refuse(names: Iterable[str], table: Sequence[tuple[str, str]], place: str, prefix: str = "") -> None:
    """Raise CheckpointError for the first name in which an expression of a table is found.

    Args:
        names: names in the file, without `prefix`.
        table: pairs of a regular expression and what such a tensor shows ("is of a Swin V2").
        place: the file, for the message.
        prefix: the beginning of the names in the file.
    """
    for name in names:
        for pattern, what in table:
            if re.search(pattern, name):
                raise CheckpointError(f"{place}: {prefix}{name} {what}; it cannot be converted")


def stages_of(names: Iterable[str], pattern: str) -> int:
    """Return the number of stages in names; the group of the regular expression is a stage's number, from 0."""
    return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)


def depths_of(tensors: Iterable[str], pattern: str, place: str) -> list[int]:
    """Return the number of blocks of each stage.

    Args:
        tensors: names.
        pattern: a regular expression of a block's name, with the groups stage and block, both counted from 0.
        place: the file, for the message.

    Raises:
        CheckpointError: there is no block, or numbers are missing.
    """
    blocks = {(int(match[1]), int(match[2])) for name in tensors if (match := re.match(pattern, name))}
    stages = sorted({stage for stage, _ in blocks})
    depths = [sum(stage == other for other, _ in blocks) for stage in stages]
    if not blocks or {(stage, block) for stage, depth in enumerate(depths) for block in range(depth)} != blocks:
        raise CheckpointError(f"{place} lacks blocks of its backbone: there are {listed(sorted(blocks), 5)}")
    return depths


# Values ---------------------------------------------------------------------------------------------------------------


def convnext_values(tensors: Tensors, place: str) -> dict[str, Any]:
    """Return the values of a ConvNeXt's configuration.

    Raises:
        CheckpointError: the network is no ConvNeXt of ours: another stem, kernel, width of the MLP, or norm.
    """
    depths = depths_of(tensors, r"encoder\.stages\.(\d+)\.layers\.(\d+)\.", place)
    width, channels, *patch = _shape(tensors, "embeddings.patch_embeddings.weight", 4, place)
    if patch != [4, 4]:
        raise _other(place, f"its stem is a {patch[0]}x{patch[1]} convolution, and ConvNeXt's a 4x4 convolution")
    sizes = []
    for stage in range(len(depths)):
        block = f"encoder.stages.{stage}.layers.0."
        dim, group, *kernel = _shape(tensors, block + "dwconv.weight", 4, place)
        if group != 1 or kernel != [7, 7]:
            raise _other(
                place,
                f"stage {stage + 1} has {kernel[0]}x{kernel[1]} convolutions of {group} channels each, "
                "and ConvNeXt depthwise 7x7 convolutions",
            )
        if (hidden := _shape(tensors, block + "pwconv1.weight", 2, place)[0]) != 4 * dim:
            raise _other(place, f"stage {stage + 1} has MLPs of {hidden} channels, and ConvNeXt of 4 times {dim}")
        sizes.append(dim)
    if sizes[0] != width:
        raise _other(place, f"its stem has {width} channels and its first stage {sizes[0]}")
    if "encoder.stages.0.downsampling_layer.1.weight" in tensors:
        raise _other(place, "its first stage halves the map, and ConvNeXt's does not")
    for stage in range(1, len(depths)):
        kernel = _shape(tensors, f"encoder.stages.{stage}.downsampling_layer.1.weight", 4, place)[2:]
        if kernel != [2, 2]:
            raise _other(
                place,
                f"a {kernel[0]}x{kernel[1]} convolution precedes stage {stage + 1}, and ConvNeXt has a "
                "2x2 convolution of stride 2",
            )
    _check_pairs(tensors, place)
    return {
        **convnext_kind(tensors, _scale(tensors, place), place),
        "num_channels": channels,
        "patch_size": 4,
        "num_stages": len(depths),
        "hidden_sizes": sizes,
        "depths": depths,
        "out_features": _stages(depths),
    }


def _scale(tensors: Tensors, place: str) -> float:
    """Return the initial value of LayerScale for a new network of this kind; 0 for blocks without LayerScale."""
    blocks = [name for name in tensors if name.endswith(".dwconv.weight")]
    scaled = sum(name.endswith(".layer_scale_parameter") for name in tensors)
    if scaled not in (0, len(blocks)):
        raise _other(place, f"{scaled} of its {len(blocks)} blocks have a LayerScale, and ours all or none")
    return 1e-6 if scaled else 0.0


def swin_values(tensors: Tensors, place: str) -> dict[str, Any]:
    """Return the values of a Swin's configuration. `image_size` is not among them: no shape decides it.

    Raises:
        CheckpointError: the network is no Swin of ours: windows that differ, widths that do not double, other norms.
    """
    values, lengths = _swin_values_and_positions(tensors, place)
    windows = [_square(length, stage, place) for stage, length in enumerate(lengths)]
    if len(set(windows)) > 1:
        raise _other(place, f"its stages have windows of {listed(windows, 8)}, and our Swin one window for all stages")
    return {"model_type": "swin", **values, "window_size": windows[0]}


def timm_swin_values(tensors: Tensors, arguments: Mapping[str, Any], choices: Choices, place: str) -> dict[str, Any]:
    """Return the values of the configuration of a Swin by timm's rules (`TimmSwinConfig`).

    A window shrinks to a map that is no larger, at the image size that timm's network was built for; a map of the
    window's size is not shifted either, and no tensor shows that. timm's own Swins are built for images of 32 times the
    window, whose last map is one window: this is the default.

    Args:
        tensors: the network's, by our names.
        arguments: of timm's model: `img_size`, `window_size`, `always_partition`. {} if they are not known.
        choices: the option `image_size`.
        place: the file, for messages.

    Raises:
        CheckpointError: the network is no Swin of ours, or its windows are not those of the image size.
    """
    values, lengths = _swin_values_and_positions(tensors, place)
    given = arguments.get("window_size")
    windows = [_pair(given, "window_size", place)] * len(lengths) if _is_window(given) else []
    if isinstance(given, list | tuple) and not windows and len(given) == len(lengths):
        windows = [_pair(window, "window_size", place) for window in given]
    if not windows:  # a stage before the last shows the whole window, unless its map is smaller too
        windows = [(_square(max(lengths), lengths.index(max(lengths)), place),) * 2] * len(lengths)
    always = arguments.get("always_partition") is True
    last = math.isqrt(lengths[-1])
    shrunk = (last + 1) // 2 if last * last == lengths[-1] and last % 2 else windows[-1][0]
    patch = values["patch_size"]
    patches = [patch, patch] if isinstance(patch, int) else patch
    default = [side * 2 ** (len(lengths) - 1) * min(shrunk, windows[-1][0]) for side in patches]
    stored = arguments.get("img_size")
    if always and stored is None:
        stored = default  # it changes nothing
    stored = None if stored is None else list(_pair(stored, "img_size", place))
    size = list(_pair(choices.settle("image_size", stored, default), "image_size", place))
    for stage, length in enumerate(lengths):
        sides = [-(-(image // patch) // 2**stage) for image, patch in zip(size, patches, strict=True)]
        if given is None and not always:  # stages may have windows of their own, as those of Swin-S3
            fits = [side for side in range(1, min(max(sides), length) + 1) if _positions(side, sides) == length]
            if fits and _positions(windows[stage][0], sides) != length:
                windows[stage] = (fits[0], fits[0])
        height, width = windows[stage] if always else map(min, windows[stage], sides)
        if (2 * height - 1) * (2 * width - 1) != length:
            raise _other(
                place,
                f"stage {stage + 1} has {length} relative positions, and a window of {height} x {width} (images of "
                f"{size[0]} x {size[1]}) has {(2 * height - 1) * (2 * width - 1)}; give image_size, the img_size that "
                "timm's network was built for",
            )
    equal = len(set(windows)) == 1 and windows[0][0] == windows[0][1]
    return {
        "model_type": "swin_timm",
        **values,
        "window_size": max(map(max, windows)),
        **({} if equal else {"window_sizes": [list(window) for window in windows]}),
        "image_size": size[0] if size[0] == size[1] else size,
        **({"always_partition": True} if always else {}),
    }


def _positions(window: int, sides: Sequence[int]) -> int:
    """Return the number of relative positions of a square window that shrinks to a map of the given sides."""
    return math.prod(2 * min(window, side) - 1 for side in sides)


def _is_window(value: Any) -> bool:
    """Return True for a side of windows, or (height, width) of them; timm takes two integers for the latter."""
    return isinstance(value, int) or (isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], int))


def _pair(value: Any, name: str, place: str) -> tuple[int, int]:
    """Return (height, width) of a setting that is one integer for both (in a list too), or a pair."""
    sides = (value,) if isinstance(value, int) else tuple(value) if isinstance(value, list | tuple) else ()
    sides = 2 * sides if len(sides) == 1 else sides
    if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        raise CheckpointError(f"{place}: {name}={shown(value)} is neither a number nor (height, width)")
    return sides[0], sides[1]


def _square(length: int, stage: int, place: str) -> int:
    """Return the side of a square window with a number of relative positions."""
    side = math.isqrt(length)
    if side * side != length or side % 2 == 0:
        raise _other(place, f"stage {stage + 1} has {length} relative positions, and a square window an odd square")
    return (side + 1) // 2


def _swin_values_and_positions(tensors: Tensors, place: str) -> tuple[dict[str, Any], list[int]]:
    """Return a Swin's values but those of its windows, and the number of relative positions of each stage."""
    depths = depths_of(tensors, r"encoder\.layers\.(\d+)\.blocks\.(\d+)\.", place)
    dim, channels, *patch = _shape(tensors, "embeddings.patch_embeddings.projection.weight", 4, place)
    lengths, heads, hidden = [], [], []
    for stage, depth in enumerate(depths):
        blocks = [f"encoder.layers.{stage}.blocks.{block}." for block in range(depth)]
        tables = {tuple(_shape(tensors, block + "attention.self.relative_position_bias_table", 2, place))
                  for block in blocks}  # fmt: skip
        if len(tables) > 1:
            raise _other(place, f"the bias tables of stage {stage + 1} differ in size: {listed(sorted(tables), 2)}")
        length, count = tables.pop()
        query = _shape(tensors, blocks[0] + "attention.self.query.weight", 2, place)
        if query != [dim * 2**stage] * 2:
            raise _other(
                place,
                f"the queries of stage {stage + 1} are {query[1]} to {query[0]} channels, and Swin's "
                f"{dim * 2**stage} to as many: widths double from stage to stage",
            )
        lengths.append(length)
        heads.append(count)
        hidden.append(_shape(tensors, blocks[0] + "intermediate.dense.weight", 2, place)[0])
    for name in ("embeddings.norm.weight", "embeddings.norm.bias"):
        if name not in tensors:
            raise _other(place, "its patches have no norm (patch_norm=False), and Swin's do")
    _check_pairs(tensors, place, but=("reduction", "query", "key", "value"))
    biased = {name.rsplit(".", 1)[0] for name in tensors if re.search(r"self\.(query|key|value)\.bias$", name)}
    if len(biased) not in (0, 3 * sum(depths)):
        raise _other(place, "some of its blocks have biases of query, key and value, and some have none")
    values = {
        "num_channels": channels,
        "patch_size": patch[0] if patch[0] == patch[1] else patch,
        "embed_dim": dim,
        "depths": depths,
        "num_heads": heads,
        "mlp_ratio": ratio(hidden, [dim * 2**stage for stage in range(len(depths))], place),
        "qkv_bias": bool(biased),
        "use_absolute_embeddings": "embeddings.position_embeddings" in tensors,
        "out_features": _stages(depths),
    }
    return values, lengths


def resnet_values(tensors: Tensors, place: str) -> dict[str, Any]:
    """Return the values of a ResNet's configuration, with a single stem or a deep stem, and ordinary strides.

    `downsample_in_bottleneck` and the pooling before shortcuts are not among them: no shape of ours decides them.

    Raises:
        CheckpointError: the network is no ResNet of ours: groups, other widths, kernels or norms.
    """
    depths = depths_of(tensors, r"encoder\.stages\.(\d+)\.layers\.(\d+)\.", place)
    stem = "embedder.embedder."
    deep = stem + "0.convolution.weight" in tensors
    if deep:
        shapes = [_shape(tensors, f"{stem}{i}.convolution.weight", 4, place) for i in range(3)]
        if any(shape[2:] != [3, 3] for shape in shapes):
            raise _other(place, f"its stem has convolutions of {listed((shape[2:] for shape in shapes), 3)}, not 3x3")
        channels, width = shapes[0][1], shapes[2][0]
    else:
        width, channels, *kernel = _shape(tensors, stem + "convolution.weight", 4, place)
        if kernel != [7, 7]:
            raise _other(place, f"its stem is a {kernel[0]}x{kernel[1]} convolution, and ResNet's a 7x7 convolution")
    bottlenecks = {f"encoder.stages.{i}.layers.{j}.layer.2.convolution.weight" in tensors
                   for i, depth in enumerate(depths) for j in range(depth)}  # fmt: skip
    if len(bottlenecks) > 1:
        raise _other(place, "it has basic blocks and bottlenecks, and our ResNet one kind")
    bottleneck = bottlenecks.pop()
    last = 2 if bottleneck else 1
    sizes: list[int] = []
    for stage, depth in enumerate(depths):
        before = sizes[-1] if sizes else width
        size = _shape(tensors, f"encoder.stages.{stage}.layers.0.layer.{last}.convolution.weight", 4, place)[0]
        sizes.append(size)
        for block in range(depth):
            _check_resnet_block(tensors, stage, block, before if block == 0 else size, size, bottleneck, place)
    if any(tensor.shape[2:] not in ((), (1, 1)) for name, tensor in tensors.items() if ".shortcut.conv" in name):
        raise _other(place, "its shortcuts have convolutions larger than 1x1 (as SENet's)")
    missing = [name for name in tensors if name.endswith("normalization.weight")
               and name.replace("normalization.weight", "normalization.running_mean") not in tensors]  # fmt: skip
    if missing:
        raise _other(place, f"{len(missing)} norms have no running mean, so that they are no BatchNorm")
    _check_pairs(tensors, place, but=("convolution",))
    if biased := [name for name in tensors if name.endswith("convolution.bias")]:
        raise _other(place, f"{len(biased)} of its convolutions have a bias, and ResNet's have none")
    values = {
        "num_channels": channels,
        "hidden_sizes": sizes,
        "depths": depths,
        "layer_type": "bottleneck" if bottleneck else "basic",
        "out_features": _stages(depths),
    }
    if deep:
        return {"model_type": "resnet_deep_stem", "stem_widths": [shape[0] for shape in shapes], **values}
    return {"model_type": "resnet", "embedding_size": width, **values}


def _check_resnet_block(
    tensors: Tensors, stage: int, block: int, before: int, size: int, bottleneck: bool, place: str
) -> None:
    """Raise CheckpointError unless a block's convolutions are those of a ResNet."""
    inner = size // 4 if bottleneck else size
    wanted = (
        [[inner, before, 1, 1], [inner, inner, 3, 3], [size, inner, 1, 1]]
        if bottleneck
        else [[inner, before, 3, 3], [size, inner, 3, 3]]
    )
    for part, shape in enumerate(wanted):
        name = f"encoder.stages.{stage}.layers.{block}.layer.{part}.convolution.weight"
        found = _shape(tensors, name, 4, place)
        if found == shape:
            continue
        if bottleneck and part == 1 and found[1] < found[0]:
            raise _other(place, f"the 3x3 convolutions of stage {stage + 1} have groups (as ResNeXt's): {found}")
        if bottleneck and part == 0 and found[1:] == shape[1:] and found[0] != inner:
            raise _other(
                place,
                f"the bottlenecks of stage {stage + 1} are {found[0]} channels wide (as Wide ResNet's "
                f"or ResNeXt's), and ResNet's a quarter of {size}",
            )
        raise _other(
            place,
            f"convolution {part + 1} of stage {stage + 1}, block {block + 1} has shape {found}, and a "
            f"ResNet's has {shape}",
        )


def preprocessing(
    choices: Choices, channels: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> dict[str, Any]:
    """Return the values of preprocessor_config.json about an image's colours.

    Args:
        choices: the options mean and std, in 0 to 255.
        channels: channels of an image; ImageNet's values are the default for three.
        mean: what the checkpoint says, in 0 to 1; None if it says nothing.
        std: likewise.
    """
    values = {}
    for option, stored, default in (("mean", mean, IMAGENET_MEAN), ("std", std, IMAGENET_STD)):
        if stored is None and channels != 3:
            continue
        scaled = None if stored is None else [255 * value for value in stored]
        settled = choices.settle(option, scaled, [255 * value for value in default])
        values[f"image_{option}"] = [round(value / 255, 12) for value in settled]
    return values


def _stages(depths: Sequence[int]) -> list[str]:
    return [f"stage{stage + 1}" for stage in range(len(depths))]


def _shape(tensors: Tensors, name: str, ndim: int, place: str) -> list[int]:
    if name not in tensors:
        raise CheckpointError(f"{place} lacks a tensor of its backbone, which would be {name}; the file is incomplete")
    if tensors[name].ndim != ndim:
        raise _other(place, f"{name} would be of shape {shown(list(tensors[name].shape))}, and has {ndim} dimensions")
    return list(tensors[name].shape)


def _check_pairs(tensors: Tensors, place: str, but: Sequence[str] = ()) -> None:
    """Raise CheckpointError for a weight without a bias: a norm of another kind, or a layer without bias."""
    for name in tensors:
        module, _, last = name.rpartition(".")
        if last == "weight" and f"{module}.bias" not in tensors and module.rpartition(".")[2] not in but:
            raise _other(
                place,
                f"{module} would have no bias: its norms or layers are of another kind (RMSNorm, or conv_bias=False)",
            )


def _other(place: str, what: str) -> CheckpointError:
    return CheckpointError(f"{place}: {what}; it cannot be converted")

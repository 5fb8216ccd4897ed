"""The weights of Unified Perceptual Parsing's official code (CSAILVision/unifiedparsing): names, files, `load_parsing`.

The code writes two files, `encoder_epoch_40.pth` and `decoder_epoch_40.pth`; a `labels.json` may lie beside them.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastuper.io.files import read_json
from fastuper.io.messages import listed, shown
from fastuper.weights.conversion import Choices, Conversion, Dialect, Rule, Source, translate
from fastuper.weights.errors import CheckpointError
from fastuper.weights.reading import iterate_weights

logger = logging.getLogger(__name__)

TASKS = ("scene", "object", "part", "material")
"""The tasks that the official decoder can have a head for."""

HEADS = tuple(f"{task}_head" for task in TASKS)
TEMPORARY = ("_tmp_running_mean", "_tmp_running_var", "_running_iter")
"""Sums that the official BatchNorm keeps while it trains; nothing reads them afterwards."""

COUNT = "num_batches_tracked"
ENCODER = re.compile(r"(conv|bn)[123]\.|layer\d+\.")
DECODER = re.compile(r"ppm_|fpn_|conv_fusion\.|(scene|object|part|material)_head\.")
POOL_SCALES = (1, 2, 3, 6)

Weights = Mapping[str, torch.Tensor] | str | os.PathLike[str]

PREPROCESSING: Mapping[str, Any] = {
    "size": {"shortest_edge": 450, "longest_edge": 1000},
    "size_divisor": 8,
    "antialias": False,
    "do_flip_channel_order": True,
    "do_rescale": False,
    "image_mean": (102.9801, 115.9465, 122.7717),
    "image_std": (1.0, 1.0, 1.0),
}
"""How the official code prepares images: OpenCV's pixels in the order BGR, less Caffe's means."""


# Names ----------------------------------------------------------------------------------------------------------------


def _encoder_pairs() -> Iterator[tuple[str, str]]:
    for kind, official, index in (("convolution", "conv", 0), ("normalization", "bn", 1)):
        for layer in range(3):
            yield f"embedder.embedder.{layer}.{kind}.", f"{official}{layer + 1}."
            for stage in range(9):
                block = f"encoder.stages.{stage}.layers.#."
                yield f"{block}layer.{layer}.{kind}.", f"layer{stage + 1}.#.{official}{layer + 1}."
                if layer == 0:
                    yield f"{block}shortcut.{kind}.", f"layer{stage + 1}.#.downsample.{index}."


def _decoder_pairs() -> Iterator[tuple[str, str]]:
    for ours, official in (("conv.", "0."), ("batch_norm.", "1.")):
        yield f"psp_modules.#.1.{ours}", f"ppm_conv.#.{official}"
        yield f"bottleneck.{ours}", f"ppm_last_conv.{official}"
        yield f"lateral_convs.#.{ours}", f"fpn_in.#.{official}"
        yield f"fpn_convs.#.{ours}", f"fpn_out.#.0.{official}"
        yield f"fpn_bottleneck.{ours}", f"conv_fusion.{official}"
        for head in HEADS:
            yield f"{head}.conv.{ours}", f"{head}.0.{official}"
    for head in HEADS:
        yield f"{head}.classifier.", f"{head}.2." if head == "scene_head" else f"{head}.1."


ENCODER_PAIRS = tuple(_encoder_pairs())
DECODER_PAIRS = tuple(_decoder_pairs())
"""Beginnings of names in our modules, and the official ones; # stands for a number."""


def _rule(name: str, target: str) -> Rule:
    number = "\\1" if "#" in name else ""
    last = "\\2" if number else "\\1"
    return Rule(re.escape(name).replace("\\#", r"(\d+)") + r"(\w+)", (target.replace("#", number) + last,))


SUMS = Rule(rf".*\.({'|'.join(TEMPORARY)})", (), "the official BatchNorm's sums while it trains")
FROM_ENCODER = (SUMS, *(_rule(official, ours) for ours, official in ENCODER_PAIRS))
FROM_DECODER = (SUMS, *(_rule(official, ours) for ours, official in DECODER_PAIRS))
TO_ENCODER = tuple(_rule(ours, official) for ours, official in ENCODER_PAIRS)
TO_DECODER = tuple(_rule(ours, official) for ours, official in DECODER_PAIRS)


def encoder_name(name: str) -> str | None:
    """Return the official name of a tensor of a ResNet with a deep stem; None for a tensor of another module."""
    return _official_name(name, TO_ENCODER)


def decoder_name(name: str) -> str | None:
    """Return the official name of a tensor of `ParsingHead`; None for the texture head, which the official code lacks.

    The modules of `UperNetHead` have the same names, except its classifier.
    """
    return _official_name(name, TO_DECODER)


def _official_name(name: str, rules: Sequence[Rule]) -> str | None:
    for rule in rules:
        if match := re.fullmatch(rule.pattern, name):
            return match.expand(rule.targets[0])
    return None


# Loading --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """A state dict of one official file, without the "module." of DataParallel before each name.

    Attributes:
        place: the file, or words for a state dict in memory; messages begin with it.
        tensors: tensors by their official names.
    """

    place: str
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class LoadReport:
    """What `load_parsing` did.

    Attributes:
        loaded: the number of tensors loaded, for "encoder" and "decoder".
        left_out: the number of tensors of the files that were not loaded, by the reason: the last part of a name
            (`TEMPORARY`), or a head that the model does not have.
        kept: the modules of the model that keep their values.
    """

    loaded: Mapping[str, int]
    left_out: Mapping[str, int]
    kept: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"loaded {count} tensors of the {part}" for part, count in self.loaded.items()]
        for name, count in self.left_out.items():
            why = "the official BatchNorm's sums while it trains" if name in TEMPORARY else "the model has no such head"
            lines.append(f"left out {count} tensors {name}: {why}")
        return "\n".join(lines + [f"kept the values of {name}: no given file has it" for name in self.kept])


def load_parsing(
    model: torch.nn.Module, encoder: Weights | State | None = None, decoder: Weights | State | None = None
) -> LoadReport:
    """Load official weights into a model of Unified Perceptual Parsing.

    Everything is checked before anything is copied: a model whose weights do not fit stays as it is. Parameters and
    buffers keep their identity, dtype and device, so that an optimizer of the model stays valid.

    Args:
        model: `UperNetForUnifiedPerceptualParsing`; for an encoder, its backbone is a ResNet with a deep stem. Of
            `UperNetForSemanticSegmentation`, the pyramid is loaded, and the classifiers are kept.
        encoder: the encoder's .pth or .safetensors file, or its state dict. Pickles are read without running code.
        decoder: the same for the decoder. One of both may be left out.

    Returns:
        What was loaded, left out and kept. The official code has no texture head: the model's is kept. Heads for tasks
        that the model does not have are left out.

    Raises:
        CheckpointError: a file cannot be read, or does not fit the model: it has a missing, foreign or wrongly shaped
            tensor, another depth or width, or is the other of the two files. The message is one line that begins with
            the file's name.
        TypeError: a source or the model is of a wrong type.
        ValueError: no source is given, or the model is on the meta device.
    """
    if encoder is None and decoder is None:
        raise ValueError("load_parsing needs an encoder, a decoder, or both")
    if not (hasattr(model, "backbone") and hasattr(model, "decode_head")):
        raise TypeError(f"expected a model with backbone and decode_head, got {type(model).__name__}")
    own = model.state_dict(keep_vars=True)  # the parameters and buffers themselves
    if meta := [name for name, tensor in own.items() if tensor.is_meta]:
        raise ValueError(f"the model is on the meta device ({meta[0]}): move it with model.to_empty(device=...) first")
    copies: list[tuple[torch.Tensor, torch.Tensor]] = []
    loaded: dict[str, int] = {}
    left_out: Counter[str] = Counter()
    if encoder is not None:
        state = read_state(encoder, "encoder")
        _check_kind(state, "encoder")
        _check_depths(state, model.backbone)
        pairs = _pairs(state, _named(own, "backbone.", encoder_name), left_out)
        loaded["encoder"] = len(pairs)
        copies += pairs
    if decoder is not None:
        state = read_state(decoder, "decoder")
        _check_kind(state, "decoder")
        expected = _named(own, "decode_head.", decoder_name)
        _check_widths(state, expected)
        pairs = _pairs(state, expected, left_out)
        loaded["decoder"] = len(pairs)
        copies += pairs
    with torch.no_grad():
        for target, value in copies:
            target.copy_(value)
    changed = {id(target) for target, _ in copies}
    kept = set()
    for name, tensor in own.items():
        if id(tensor) not in changed and not name.endswith(COUNT):
            inside = decoder is not None and name.startswith("decode_head.")  # then some of its modules are loaded
            kept.add(".".join(name.split(".")[: 2 if inside else 1]))
    return LoadReport(loaded, dict(left_out), tuple(sorted(kept)))


def read_state(source: Weights | State, part: str) -> State:
    """Return the state dict of an official file.

    Args:
        source: the file or the state dict.
        part: "encoder" or "decoder", for the messages.

    Raises:
        CheckpointError: the file is missing or damaged, or holds something else than tensors of floats.
        TypeError: `source` is neither a path nor a mapping.
    """
    if isinstance(source, State):
        return source
    if isinstance(source, Mapping):
        place, tensors = f"the {part}'s state dict", dict(source)
    elif isinstance(source, (str, os.PathLike)):
        place, path = os.fspath(source), Path(source)
        if not path.is_file():
            raise CheckpointError(f"{place} is no file; give the {part}'s .pth or .safetensors file")
        tensors = dict(iterate_weights({path: set()}))
    else:
        raise TypeError(f"{part} must be a path or a state dict, got {type(source).__name__}")
    if not tensors:
        raise CheckpointError(f"{place} holds no tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{place}: {shown(name)} is no name of a tensor; give a state dict")
        if not isinstance(tensor, torch.Tensor) or not (tensor.is_floating_point() or name.endswith(COUNT)):
            kind = str(tensor.dtype) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise CheckpointError(f"{place}: {shown(name)} is {kind}, where a tensor of floats is expected")
        if tensor.is_meta:
            raise CheckpointError(f"{place}: {shown(name)} is on the meta device and has no values")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return State(place, tensors)


def _named(
    own: Mapping[str, torch.Tensor], prefix: str, official: Callable[[str], str | None]
) -> dict[str, torch.Tensor]:
    """Return the tensors of a part of the model by their official names."""
    names = {name: official(name.removeprefix(prefix)) for name in own if name.startswith(prefix)}
    return {theirs: own[name] for name, theirs in names.items() if theirs is not None}


def _check_kind(state: State, part: str) -> None:
    """Refuse a state dict that is not the encoder's, or not the decoder's."""
    found = {
        kind: any(pattern.match(name) for name in state.tensors)
        for kind, pattern in (("encoder", ENCODER), ("decoder", DECODER))
    }
    other = "decoder" if part == "encoder" else "encoder"
    if not found[part]:
        whose = f"an official {other}'s: pass it as {other}=" if found[other] else "not the official code's"
        raise CheckpointError(f"{state.place} is no official {part}: its names ({listed(state.tensors)}) are {whose}")


def _check_depths(state: State, backbone: Any) -> None:
    """Refuse an encoder for a backbone of another family, or of another number of blocks."""
    config: Any = getattr(backbone, "config", None)
    if getattr(config, "model_type", None) != "resnet_deep_stem":
        kind = getattr(config, "model_type", None) or type(backbone).__name__
        raise CheckpointError(
            f"{state.place} is a ResNet with a deep stem, the model's backbone a {kind}; build the model with "
            "backbone_config=DeepStemResNetConfig(...), or load only the decoder"
        )
    found, expected = depths(state.tensors), list(config.depths)
    if found != expected:
        raise CheckpointError(
            f"{state.place} has {found} blocks, the model {expected}: set depths={found} of its backbone_config"
        )


def depths(names: Iterable[str]) -> list[int]:
    """Return the number of blocks of each stage of an official encoder."""
    blocks: dict[int, int] = {}
    for name in names:
        if match := re.match(r"layer(\d{1,3})\.(\d{1,4})\.", name):
            stage = int(match[1])
            blocks[stage] = max(blocks.get(stage, 0), int(match[2]) + 1)
    return [blocks.get(stage, 0) for stage in range(1, max(blocks, default=0) + 1)]


def _check_widths(state: State, expected: Mapping[str, torch.Tensor]) -> None:
    """Refuse a decoder of another `hidden_size` or `pool_channels`, or with other numbers of classes."""
    heads = [f"{head}.{'2' if head == 'scene_head' else '1'}.weight" for head in HEADS]
    values = {"ppm_last_conv.0.weight": "hidden_size", "ppm_conv.0.0.weight": "pool_channels"}
    for name in (*values, *heads):
        if name in expected and name in state.tensors and state.tensors[name].ndim == expected[name].ndim:
            found, wanted = len(state.tensors[name]), len(expected[name])
            task = name.split("_")[0]
            what, remedy = values.get(name, f"{task} channels"), "build the model with the decoder's value"
            if name in heads:
                names = "object_parts" if task == "part" else "labels"
                remedy = f"give the model the {names} of the decoder"
            if found != wanted:
                raise CheckpointError(f"{state.place} has {found} {what}, the model {wanted}: {remedy}")


def _pairs(
    state: State, expected: Mapping[str, torch.Tensor], left_out: Counter[str]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return each tensor of the model with its value, and count the tensors that are left out.

    Raises:
        CheckpointError: a tensor is missing, foreign or of another shape.
    """
    known = {name.split(".")[0] for name in expected}
    foreign = []
    for name in state.tensors:
        if name in expected:
            continue
        first, last = name.split(".")[0], name.rpartition(".")[2]
        if first in HEADS and first not in known:
            left_out[first] += 1
        elif last in TEMPORARY and f"{name.removesuffix(last)}running_mean" in expected:
            left_out[last] += 1
        else:
            foreign.append(name)
    missing = [name for name in expected if name not in state.tensors and not name.endswith(COUNT)]
    if missing:
        raise CheckpointError(
            f"{state.place} lacks {len(missing)} of the model's tensors ({listed(missing)}); it is incomplete, or of "
            "another network"
        )
    if foreign:
        raise CheckpointError(
            f"{state.place} has {len(foreign)} tensors that the model lacks ({listed(foreign)}); it is of "
            "another network"
        )
    for name, tensor in expected.items():
        if name in state.tensors and state.tensors[name].shape != tensor.shape:
            raise CheckpointError(
                f"{state.place}: {name} has shape {tuple(state.tensors[name].shape)}, in the model "
                f"{tuple(tensor.shape)}; the configuration is of another network"
            )
    return [(tensor, state.tensors[name]) for name, tensor in expected.items() if name in state.tensors]


# Whole checkpoints ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OfficialCheckpoint:
    """An encoder, a decoder, and the names of the classes.

    Attributes:
        encoder: the encoder.
        decoder: the decoder.
        labels: names of the classes by task; empty for the official names.
        object_parts: the numbers of each object's parts, by the object's number; None for the official ones.
        notes: sentences about choices that were made, such as between several epochs.
    """

    encoder: State
    decoder: State
    labels: Mapping[str, list[str]] = field(default_factory=dict)
    object_parts: Mapping[int, tuple[int, ...]] | None = None
    notes: tuple[str, ...] = ()

    def values(self) -> dict[str, Any]:
        """Return the values of `UnifiedPerceptualParsingConfig` that the tensors' shapes and the labels give.

        `tasks` are those with a head in the decoder: textures, which the official code does not have, are none of them.

        Raises:
            CheckpointError: a tensor that a value follows from is missing.
        """
        stages = range(1, len(depths(self.encoder.tensors)) + 1)
        values: dict[str, Any] = {
            "backbone_config": {
                "model_type": "resnet_deep_stem",
                "stem_widths": [_length(self.encoder, f"conv{i}.weight") for i in (1, 2, 3)],
                "hidden_sizes": [_length(self.encoder, f"layer{stage}.0.conv3.weight") for stage in stages],
                "depths": depths(self.encoder.tensors),
                "out_features": [f"stage{stage}" for stage in stages],
            },
            "hidden_size": _length(self.decoder, "ppm_last_conv.0.weight"),
            "pool_channels": _length(self.decoder, "ppm_conv.0.0.weight"),
            "pool_scales": POOL_SCALES,
            "tasks": [task for task in TASKS if any(n.startswith(f"{task}_head.") for n in self.decoder.tensors)],
        }
        if not values["tasks"]:
            raise CheckpointError(f"{self.decoder.place} has no head of any task ({', '.join(HEADS)})")
        if self.labels:
            values["labels"] = {task: list(names) for task, names in self.labels.items()}
        if self.object_parts is not None:
            values["object_parts"] = dict(self.object_parts)
        return values


def read_official(
    folder: str | os.PathLike[str] | None = None,
    *,
    encoder: Weights | None = None,
    decoder: Weights | None = None,
    labels: Mapping[str, Any] | str | os.PathLike[str] | None = None,
) -> OfficialCheckpoint:
    """Read an official checkpoint.

    Args:
        folder: has encoder_*.pth and decoder_*.pth (or .safetensors), and may have labels.json. Of several epochs the
            highest that both files have is taken.
        encoder: the encoder's file or state dict, in place of the folder's.
        decoder: the same for the decoder.
        labels: the content of labels.json, or its path, in place of the folder's file: lists of names under "object",
            "scene", "material" and "part", and the names of each object's parts under "object_part", with or without
            a first name for "other". Any of them may be missing. Names under "texture" are those of a texture head
            that you add.

    Raises:
        CheckpointError: a file is missing, damaged, or the other of the two.
        ValueError: the labels do not fit the decoder, or contradict each other; the message names the file.
        OSError: labels.json cannot be read.
    """
    notes: list[str] = []
    if folder is not None and (encoder is None or decoder is None):
        found = find_official(folder)
        if len(found) > 1:
            notes.append(f"{folder} has {len(found)} epochs; taking the highest, {found[-1][0].name}")
            logger.warning("%s", notes[-1])
        encoder = found[-1][0] if encoder is None else encoder
        decoder = found[-1][1] if decoder is None else decoder
    if encoder is None or decoder is None:
        raise ValueError("give a folder with encoder_*.pth and decoder_*.pth, or both encoder= and decoder=")
    if labels is None and folder is not None and (Path(folder) / "labels.json").is_file():
        labels = Path(folder) / "labels.json"
    states = read_state(encoder, "encoder"), read_state(decoder, "decoder")
    for state, part in zip(states, ("encoder", "decoder"), strict=True):
        _check_kind(state, part)
    if labels is None:
        return OfficialCheckpoint(*states, notes=tuple(notes))
    if isinstance(labels, (str, os.PathLike)):
        names, parts = _read_labels(os.fspath(labels), read_json(Path(labels)), states[1])
    else:
        names, parts = _read_labels("labels", labels, states[1])
    return OfficialCheckpoint(*states, names, parts, tuple(notes))


def find_official(folder: str | os.PathLike[str]) -> list[tuple[Path, Path]]:
    """Return the encoder and the decoder of each epoch in a folder, the highest epoch last.

    Raises:
        CheckpointError: the folder lacks one of them, or has no two of one epoch.
    """
    if not Path(folder).is_dir():
        raise CheckpointError(f"{folder} is no folder; give one with encoder_*.pth and decoder_*.pth")
    found: dict[str, dict[str, Path]] = {"encoder": {}, "decoder": {}}
    for path in sorted(Path(folder).iterdir()):
        part, _, epoch = path.stem.partition("_")
        if part in found and epoch and path.suffix in (".pth", ".safetensors"):
            found[part][epoch] = path
    for part, paths in found.items():
        if not paths:
            raise CheckpointError(f"{folder} has no {part}_*.pth; the official checkpoint has an encoder and a decoder")
    both = found["encoder"].keys() & found["decoder"].keys()
    if not both:
        names = [path.name for paths in found.values() for path in paths.values()]
        raise CheckpointError(f"{folder} has no encoder and decoder of one epoch: {listed(names, 4)}")

    def number(epoch: str) -> tuple[int, str]:
        match = re.search(r"(\d{1,9})$", epoch)
        return (int(match[1]) if match else -1), epoch

    return [(found["encoder"][epoch], found["decoder"][epoch]) for epoch in sorted(both, key=number)]


def has_official_files(folder: Path) -> bool:
    """Return True if a folder has a file of an official encoder or decoder."""
    return any(
        path.name.startswith(("encoder_", "decoder_")) and path.suffix in (".pth", ".safetensors")
        for path in folder.iterdir()
    )


def official_source(folder: Path) -> Source:
    """Read the encoder and the decoder of a folder as one source, "encoder." or "decoder." before each name.

    Raises:
        CheckpointError, ValueError, OSError: as `read_official`.
    """
    checkpoint = read_official(folder)
    states = {"encoder": checkpoint.encoder, "decoder": checkpoint.decoder}
    tensors = {f"{part}.{name}": tensor for part, state in states.items() for name, tensor in state.tensors.items()}
    settings = {"labels": checkpoint.labels, "object_parts": checkpoint.object_parts}
    return Source(os.fspath(folder), tensors, settings, notes=checkpoint.notes)


def _recognises(source: Source) -> bool:
    return any(name.startswith("decoder.ppm_") for name in source.tensors) and any(
        name.startswith("encoder.layer") for name in source.tensors
    )


def _convert(source: Source, choices: Choices) -> Conversion:
    parts = {
        part: {n.removeprefix(f"{part}."): t for n, t in source.tensors.items() if n.startswith(f"{part}.")}
        for part in ("encoder", "decoder")
    }
    encoder, decoder = (State(source.place, tensors) for tensors in parts.values())
    checkpoint = OfficialCheckpoint(encoder, decoder, source.settings["labels"], source.settings["object_parts"])
    values = {**checkpoint.values(), "pooling": choices.settle("pooling", None, "precise_roi")}
    notes = ["no texture head: the official code has none (--texture-head adds one with random weights)"]
    initialised: tuple[str, ...] = ()
    if choices.settle("texture_head", None, False):
        values["tasks"] = [*values["tasks"], "texture"]
        notes, initialised = (
            ["the texture head has random weights: train it before use"],
            ("decode_head.texture_head.",),
        )
    made = [
        translate(tensors, rules, source.place, f"{part}.", target)
        for (part, tensors), rules, target in zip(
            parts.items(), (FROM_ENCODER, FROM_DECODER), ("backbone.", "decode_head."), strict=True
        )
    ]
    return Conversion(
        "Unified Perceptual Parsing's official code",
        "unified_perceptual_parsing",
        values,
        made[0].tensors | made[1].tensors,
        made[0].rows + made[1].rows,
        PREPROCESSING,
        notes,
        initialised,
        "it has no Unified Perceptual Parsing",
    )


DIALECT = Dialect("Unified Perceptual Parsing's official code", _recognises, _convert)


def _length(state: State, name: str) -> int:
    """Return the number of output channels of a convolution."""
    if name not in state.tensors or state.tensors[name].ndim != 4:
        raise CheckpointError(f"{state.place} has no convolution {name}; it is incomplete, or of another network")
    return len(state.tensors[name])


def _read_labels(
    place: str, content: Any, decoder: State
) -> tuple[dict[str, list[str]], dict[int, tuple[int, ...]] | None]:
    """Return the names of the classes by task, and the parts of each object by their numbers."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{place} must map tasks to names, or be the path of a labels.json, got {shown(content)}")
    labels: dict[str, list[str]] = {}
    for task in (*TASKS, "texture"):
        if task not in content:
            continue
        names = content[task]
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{place}: {task!r} must be a list of names, got {shown(names)}")
        labels[task] = list(names)
        weight = decoder.tensors.get(f"{task}_head.{2 if task == 'scene' else 1}.weight")
        if task != "part" and weight is not None and len(weight) != len(names):
            raise ValueError(f"{place} has {len(names)} names of {task}, {decoder.place} {len(weight)} channels")
    if "object_part" not in content:
        return labels, None
    return labels, _read_object_parts(place, content["object_part"], labels, decoder)


def _read_object_parts(
    place: str, lists: Any, labels: Mapping[str, list[str]], decoder: State
) -> dict[int, tuple[int, ...]]:
    """Return the parts of each object by their numbers; channels of the decoder are in the order of the objects."""
    if not isinstance(lists, Mapping) or not all(isinstance(names, list | tuple) for names in lists.values()):
        raise ValueError(f"{place}: 'object_part' must map names of objects to lists of names of parts")
    if "object" not in labels or "part" not in labels:
        raise ValueError(f"{place} has 'object_part', which needs the names of 'object' and 'part' too")
    weight = decoder.tensors.get("part_head.1.weight")
    count = sum(len(names) for names in lists.values())
    channels = count + len(lists) if weight is None else len(weight)
    if channels not in (count, count + len(lists)):
        raise ValueError(
            f"{place} has {count} parts of {len(lists)} objects, which need {count + len(lists)} channels "
            f"({count} if a name of each object means other parts); {decoder.place} has {channels}"
        )
    skipped = 1 if channels == count else 0  # the first name of each list stands for "other"
    parts = {}
    for name, names in lists.items():
        number = _number(place, "object", labels["object"], name)
        parts[number] = tuple(_number(place, "part", labels["part"], part) for part in names[skipped:])
    return dict(sorted(parts.items()))


def _number(place: str, task: str, names: list[str], name: Any) -> int:
    """Return the number of a class of a name that exactly one class has."""
    if names.count(name) != 1:
        found = "twice or more" if name in names else "not"
        raise ValueError(f"{place}: 'object_part' has the {task} {shown(name)}, which is {found} among its {task}s")
    return names.index(name)

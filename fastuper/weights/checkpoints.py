"""Reads the checkpoints of other libraries: a file or a folder becomes a `Source`. No code of a file runs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastuper.io.files import read_json
from fastuper.io.messages import listed, shown
from fastuper.weights.config_text import check_values, read_config_text
from fastuper.weights.conversion import Row, Source
from fastuper.weights.errors import CheckpointError
from fastuper.weights.filenames import INDEX, PICKLE, SAFETENSORS
from fastuper.weights.official import has_official_files, official_source
from fastuper.weights.reading import check_dense, iterate_weights, load_pickle, read_weights
from fastuper.weights.stand_ins import Inert, as_values

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl")
"""The ends of the names of weight files."""

PLAIN = ("state_dict", "model", "model_state_dict", "module", "net", "network")
AVERAGED = ("ema_state_dict", "state_dict_ema", "model_ema", "ema")
"""The names of state dicts in a checkpoint; the first that it has is taken. Averaged weights are taken last."""

WRAPPERS = ("module.", "_orig_mod.", "model.")
"""Beginnings of all names: of DataParallel, `torch.compile`, and Lightning or a script's own module."""

COUNTERS = ("steps", "n_averaged")
"""Counters that a module of averaged weights has beside the model's tensors."""


def read_source(path: str | os.PathLike[str], weights_key: str | None = None) -> Source:
    """Read a checkpoint of another library.

    Args:
        path: a file (.pth, .pt, .bin, .ckpt, .safetensors), or a folder: with one weight file; of timm or smp, with a
            config.json beside the weights; or a working folder of mmengine or mmcv, whose last checkpoint is read.
        weights_key: the name of the state dict in a file that has several, such as "state_dict_ema"; dots lead inside.
            If None, plain weights are taken before averaged ones, and `notes` say so.

    Returns:
        The tensors, in float or integer dtypes as they are stored, and what the checkpoint says about its model. They
        are views of the file: copy a tensor to keep it.

    Raises:
        CheckpointError: the file is damaged, contains code, or has no weights; there is no state dict `weights_key`.
        OSError: there is no such file or folder.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, weights_key)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    if not path.is_file():
        raise CheckpointError(f"{path} is neither a file nor a folder")
    if path.suffix.lower() not in SUFFIXES:
        raise CheckpointError(f"{path} is no weight file: its name ends with none of {', '.join(SUFFIXES)}")
    if has_official_files(path.parent) and path.name.startswith(("encoder_", "decoder_")):
        raise CheckpointError(
            f"{path} is one of the two files of Unified Perceptual Parsing's official code; give the folder that "
            "contains it"
        )
    return _read_file(path, weights_key, {}, ())


# Folders --------------------------------------------------------------------------------------------------------------


def _read_folder(folder: Path, weights_key: str | None) -> Source:
    if has_official_files(folder):
        if weights_key is not None:
            raise CheckpointError(f"{folder} has one state dict a file; leave out the weights key {shown(weights_key)}")
        return official_source(folder)
    settings: Mapping[str, Any] = {}
    if (folder / "config.json").is_file():
        settings = read_json(folder / "config.json")
        whole = [name for name in (SAFETENSORS, PICKLE) if (folder / name).is_file()]
        if not whole and any((folder / (name + INDEX)).is_file() for name in (SAFETENSORS, PICKLE)):
            if weights_key is not None:
                raise CheckpointError(f"{folder} has one state dict; leave out the weights key {shown(weights_key)}")
            tensors, _ = read_weights(folder)
            return _source(str(folder), tensors, settings, [])
        if whole:
            return _read_file(folder / whole[0], weights_key, settings, ())
    path, notes = _weight_file(folder)
    return _read_file(path, weights_key, settings, notes)


def _weight_file(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """Return the weight file of a folder, and sentences about the choice."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in SUFFIXES)
    if not files:
        raise CheckpointError(f"{folder} has no checkpoint: no file that ends with {', '.join(SUFFIXES)}")
    if len(files) == 1:
        return files[0], ()
    names = {path.name: path for path in files}
    why = f"{folder} has {len(files)} checkpoints"
    pointer = folder / "last_checkpoint"  # written by mmengine; the path is that of the machine that trained
    if pointer.is_file():
        text = pointer.read_bytes()[:4096].decode("utf-8", "replace").strip()
        last = re.split(r"[/\\]", text)[-1]
        if last in names:
            return names[last], (f"{why}; taking {last}, which its last_checkpoint names",)
    numbered: dict[str, list[tuple[int, Path]]] = {}
    for path in files:
        if match := re.fullmatch(r"(epoch|iter)_(\d{1,12})", path.stem):
            numbered.setdefault(match[1], []).append((int(match[2]), path))
    if len(numbered) == 1:
        _, path = max(next(iter(numbered.values())))
        return path, (f"{why}; taking the latest, {path.name}",)
    raise CheckpointError(f"{why} ({listed(names)}); give the file to read")


# Files ----------------------------------------------------------------------------------------------------------------


def _read_file(path: Path, weights_key: str | None, settings: Mapping[str, Any], notes: tuple[str, ...]) -> Source:
    found = list(notes)
    if path.suffix.lower() == ".safetensors":
        if weights_key is not None:
            raise CheckpointError(f"{path} has one state dict; leave out the weights key {shown(weights_key)}")
        return _source(str(path), dict(iterate_weights({path: set()})), settings, found)
    content = load_pickle(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not a dict of tensors; save the model's state_dict()"
        )
    try:
        tensors = _state_dict(path, content, weights_key, found)
        check_dense(path, tensors)
        meta = as_values(content.get("meta")) or {}
        read = _settings(content, meta, found)
        classes, palette = _labels(meta, found)
    except (TypeError, AttributeError) as error:  # dictionaries with numbers in place of their methods
        raise CheckpointError(f"{path} holds objects of another form than a checkpoint's ({error})") from None
    return _source(str(path), tensors, {**read, **settings}, found, classes, palette)


def _source(
    place: str,
    tensors: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
    notes: list[str],
    classes: tuple[str, ...] | None = None,
    palette: tuple[tuple[int, int, int], ...] | None = None,
) -> Source:
    """Return a source whose names are those inside wrappers."""
    left_out: list[Row] = []
    stripped, tensors, before = True, dict(tensors), ""
    while stripped:
        stripped = False
        for wrapper in WRAPPERS:
            counters = [name for name in COUNTERS if name in tensors]
            inside = [name for name in tensors if name not in counters]
            if inside and all(name.startswith(wrapper) for name in inside):
                left_out += [Row(before + name, (), "a counter of averaged weights") for name in counters]
                tensors = {name.removeprefix(wrapper): tensors[name] for name in inside}
                before += wrapper
                stripped = True
    if before:
        notes.append(f"all names begin with {before!r}, of a module around the model; it is left out")
    return Source(place, tensors, settings, classes, palette, tuple(notes), tuple(left_out))


def _state_dict(
    path: Path, content: Mapping[Any, Any], weights_key: str | None, notes: list[str]
) -> dict[str, torch.Tensor]:
    """Return the state dict of a checkpoint."""
    if weights_key is not None:
        chosen: Any = content
        for part in [weights_key] if weights_key in content else weights_key.split("."):
            if not isinstance(chosen, Mapping) or part not in chosen:
                known = [key for key, value in content.items() if _is_state_dict(value)]
                raise CheckpointError(
                    f"{path} has no state dict {shown(weights_key)}; its state dicts: {listed(known, 8)}"
                )
            chosen = chosen[part]
        if not _is_state_dict(chosen):
            raise CheckpointError(f"{path}: {shown(weights_key)} is no state dict: it does not map names to tensors")
        return dict(chosen)
    if _is_state_dict(content):
        return dict(content)
    known = [key for key in (*PLAIN, *AVERAGED) if _is_state_dict(content.get(key))]
    others = [str(key) for key, value in content.items() if key not in known and _is_state_dict(value)]
    if not known and len(others) == 1:
        known = others
    elif not known and others:
        raise CheckpointError(f"{path} has {len(others)} state dicts ({listed(others, 8)}); choose by the weights key")
    if not known:
        if "optimizer" in content or {"state", "param_groups"} <= content.keys():
            raise CheckpointError(f"{path} holds the state of an optimizer and no weights of a model")
        for key in (*PLAIN, *AVERAGED):
            if isinstance(parts := content.get(key), Mapping) and parts:
                raise CheckpointError(f"{path}: its {key} is no state dict: {_fault(key, parts)}")
        raise CheckpointError(
            f"{path} has no weights: no state dict under {', '.join(PLAIN[:2])} or another name; "
            f"it has {listed(content, 4)}"
        )
    taken, rest = known[0], known[1:] + (others if known != others else [])
    if rest:
        why = ""
        if taken == "state_dict" and "ema_state_dict" in rest:
            # EMAHook of mmengine swaps the two when it saves, so that `state_dict` is what is deployed.
            why = " (mmengine's EMAHook writes the averaged weights as state_dict)"
        notes.append(f"weights of {taken}{why}; the file also has {listed(rest, 8)}: --weights-key chooses")
    return dict(content[taken])


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(key, str) and isinstance(part, torch.Tensor) for key, part in value.items())
    )


def _fault(key: str, parts: Mapping[Any, Any]) -> str:
    """Return why a mapping is no state dict, and the remedy."""
    for name, value in parts.items():
        if _is_state_dict(value):
            return f"choose the one inside it by the weights key {key}.{name}"
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            kind = "of another library's class" if isinstance(value, Inert) else f"of type {type(value).__name__}"
            return f"{shown(name)} is {kind}; it must map names to tensors of PyTorch"
    return "it maps no names to tensors"


# What a checkpoint says about its model -------------------------------------------------------------------------------


def _settings(content: Mapping[Any, Any], meta: Mapping[Any, Any], notes: list[str]) -> dict[str, Any]:
    """Return the configuration in a checkpoint: of its metadata, or of the authors' scripts."""
    for place, given in (
        ("meta['cfg']", meta.get("cfg")),
        ("meta['config']", meta.get("config")),
        ("config", content.get("config")),
        ("args", content.get("args")),
        ("hyper_parameters", content.get("hyper_parameters")),
    ):
        try:
            if isinstance(given, str):
                values = read_config_text(given)
                if "_base_" in values:
                    # What such a text leaves out is in those files, and not the library's default.
                    raise CheckpointError("it changes other files (_base_), which are not here")
                return values
            if (values := as_values(given)) is not None:
                check_values(values)
                return {str(name): value for name, value in values.items()}
        except CheckpointError as error:
            notes.append(f"its configuration, {place}, is not read: {error}")
    return {}


def _labels(
    meta: Mapping[Any, Any], notes: list[str]
) -> tuple[tuple[str, ...] | None, tuple[tuple[int, int, int], ...] | None]:
    """Return the names and the colours of the classes in the metadata of mmengine or mmcv."""
    inner = as_values(meta.get("dataset_meta")) or {}
    values = {str(name).lower(): value for part in (meta, inner) for name, value in part.items()}
    names, colours = values.get("classes"), values.get("palette")
    classes = None
    if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
        classes = tuple(names)
    elif names is not None:
        notes.append("the names of its classes are no list of texts, and are not read")
    palette = None
    if isinstance(colours, list | tuple) and colours and all(map(_is_colour, colours)):
        palette = tuple((int(r), int(g), int(b)) for r, g, b in colours)
    elif colours is not None:
        notes.append("its palette is no list of three numbers each, and is not read")
    if classes and palette and len(classes) != len(palette):
        notes.append(f"it has {len(classes)} names of classes and {len(palette)} colours: the colours are not read")
        palette = None
    return classes, palette


def _is_colour(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 3
        and all(isinstance(part, int) and 0 <= part <= 255 for part in value)
    )

"""Reads the weights of a checkpoint: safetensors or pickles, one file or shards, of a folder or the Hub."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fastuper.io.files import read_json
from fastuper.io.hub import HubOptions, find_file
from fastuper.io.messages import listed, shown
from fastuper.weights.errors import CheckpointError
from fastuper.weights.filenames import INDEX, PICKLE, SAFETENSORS, with_variant
from fastuper.weights.stand_ins import UnknownProtocol, load_with_stand_ins

FLOATING = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
"""The dtypes that weights may have, by their names in safetensors files."""


def read_weights(
    source: str | os.PathLike[str], options: HubOptions | None = None, variant: str | None = None
) -> tuple[dict[str, torch.Tensor], list[Path]]:
    """Read all tensors of a checkpoint, under their names in its files.

    Args:
        source: a folder, or the id of a Hub repository.
        options: how to access the Hub.
        variant: the middle of the files' names, "fp16" for `model.fp16.safetensors`.

    Returns:
        Tensors on the CPU, in memory of their own, and the files that hold them.

    Raises:
        CheckpointError: there are no weights, or a file is damaged; the message names it.
    """
    shards = find_weights(source, options, variant)
    return {name: tensor.clone() for name, tensor in iterate_weights(shards)}, list(shards)


def find_weights(
    source: str | os.PathLike[str],
    options: HubOptions | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
) -> dict[Path, set[str]]:
    """Find the weight files of a checkpoint: safetensors before pickles, one file before shards.

    Args:
        source: a folder, or the id of a Hub repository.
        options: how to access the Hub.
        variant: the middle of the files' names, "fp16" for `model.fp16.safetensors`.
        use_safetensors: True for only safetensors, False for only pickles, None for either.

    Returns:
        For each file the names of the tensors that its index lists; no names without an index.

    Raises:
        CheckpointError: there are no weights, or an index names a file that is missing.
    """
    names = []
    if use_safetensors is not False:
        names += [SAFETENSORS, SAFETENSORS + INDEX]
    if not use_safetensors:
        names += [PICKLE, PICKLE + INDEX]
    names = [with_variant(name, variant) for name in names]
    for name in names:
        path = find_file(source, name, options)
        if path is not None:
            return _shards_of(path, source, options) if name.endswith(".json") else {path: set()}
    place = f"{source}/{options.subfolder}" if options is not None and options.subfolder else f"{source}"
    remedy = "leave out variant=" if variant else "give a folder or repository that has one of them"
    if use_safetensors is not None:
        remedy += ", or leave out use_safetensors="
    if not Path(source).is_dir():
        remedy += "; if the Hub was not reached, only its cache was searched"
    raise CheckpointError(f"{place} has no weights: no file {' or '.join(names)}; {remedy}")


@dataclass(frozen=True)
class Stored:
    """What the header of a file says about a tensor; `dtype` is None if it is no floating-point dtype of weights."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


def stored_tensors(shards: Mapping[Path, set[str]]) -> dict[str, Stored]:
    """Return the shape and the dtype of each tensor in the files of `find_weights`; the values are not read.

    Raises:
        CheckpointError: a file is damaged.
    """
    found: dict[str, Stored] = {}
    for path in shards:
        if path.suffix == ".safetensors":
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118  (the file itself cannot be iterated)
                    part = file.get_slice(name)
                    found[name] = Stored(tuple(part.get_shape()), FLOATING.get(part.get_dtype()))
        else:
            found |= described(dict(_read_pickle(path)))
    return found


def described(state_dict: Mapping[str, torch.Tensor]) -> dict[str, Stored]:
    """Return the shape and the dtype of each tensor of a state dict.

    Raises:
        TypeError: a value is not a tensor.
    """
    if wrong := [name for name, value in state_dict.items() if not isinstance(value, torch.Tensor)]:
        raise TypeError(f"state_dict holds tensors; {listed(wrong)} are none")
    return {
        name: Stored(tuple(tensor.shape), tensor.dtype if tensor.dtype in FLOATING.values() else None)
        for name, tensor in state_dict.items()
    }


def iterate_weights(shards: Mapping[Path, set[str]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and the value of each tensor in the files of `find_weights`, one file open at a time.

    The tensors are views of memory-mapped files. Copy a tensor to keep it: the file may be overwritten.

    Raises:
        CheckpointError: a file is damaged, or lacks a tensor that its index lists.
    """
    for path, expected in shards.items():
        found = set()
        for name, tensor in _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path):
            found.add(name)
            yield name, tensor
        if expected - found:
            raise CheckpointError(
                f"{path} lacks {listed(sorted(expected - found))}, which its index lists; "
                "index and file belong to different checkpoints: fetch both again"
            )


def _shards_of(index: Path, source: str | os.PathLike[str], options: HubOptions | None) -> dict[Path, set[str]]:
    """Return the files of an index, and for each the names of its tensors."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map that names a file for each tensor; fetch it again")
    names: dict[str, set[str]] = {}
    for tensor, filename in weight_map.items():
        names.setdefault(filename, set()).add(tensor)
    shards = {}
    for filename, tensors in names.items():
        if Path(filename).name != filename or Path(filename).suffix not in (".safetensors", ".bin"):
            raise CheckpointError(
                f"{index} names {shown(filename)}, which is not a weight file beside it; fetch it again"
            )
        path = find_file(source, filename, options)
        if path is None:
            raise CheckpointError(f"{index} names {shown(filename)}, which is missing; fetch it")
        if not _is_inside(path, index.parent):
            raise CheckpointError(f"{index} names {shown(filename)}, a link out of its folder; put the file there")
        shards[path] = tensors
    return shards


def _is_inside(path: Path, folder: Path) -> bool:
    """Return True if a file of a folder is no link out of it, except into the Hub's cache."""
    place = path.resolve().parent
    # .../models--organization--name/blobs/<hash>
    return place == folder.resolve() or (place.name == "blobs" and place.parent.name.startswith("models--"))


def _check_file(path: Path) -> None:
    """Refuse an empty file and a git-lfs pointer."""
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise CheckpointError(f"{path} is empty; fetch it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a git-lfs pointer, not the weights; run `git lfs pull` in its folder")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file; its header is checked against the file's size."""
    _check_file(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); fetch it again") from None


def _read_safetensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118  (as above)
            yield name, file.get_tensor(name)


def _read_pickle(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    content = load_pickle(path)
    values = content if isinstance(content, Mapping) else {"": content}
    if content is not values or not all(isinstance(value, torch.Tensor) for value in values.values()):
        inner = [key for key, value in values.items() if key and isinstance(value, Mapping)]
        where = f" (but dicts under {listed(inner)})" if inner else ""
        raise CheckpointError(f"{path} does not hold a dict of tensors{where}; save `model.state_dict()`")
    check_dense(path, values)
    for name, tensor in values.items():
        yield str(name), tensor


def load_pickle(path: Path) -> Any:
    """Return the content of a file of `torch.save`, with inert objects in place of those that are no tensors.

    No code of the file runs. The tensors are views of the file, if it is a zip archive.

    Raises:
        CheckpointError: the file is damaged or compressed, or contains code.
    """
    _check_file(path)
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    raise CheckpointError(
                        f"{path} is a program of TorchScript, which is not run; save the state_dict() of its model"
                    )
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise CheckpointError(f"{path} is compressed, and torch.save compresses nothing; save it again")
        return load_with_stand_ins(path, is_zip)
    except UnknownProtocol as error:
        raise CheckpointError(f"{path} is {error}; save the model's state_dict() by torch.save") from None
    except pickle.UnpicklingError as error:
        if not re.search(r"GLOBAL|global|reduce|NEWOBJ|can only (create|build)", str(error), re.IGNORECASE):
            raise CheckpointError(f"{path} is damaged ({_reason(error)}); fetch it again") from None
        raise CheckpointError(
            f"{path} contains code that would run on loading ({_reason(error)}); it was not run. "
            "Ask its author for model.safetensors, or load it on a machine that may run it and save its state_dict()"
        ) from None
    except (CheckpointError, PermissionError, MemoryError):
        raise
    except Exception as error:  # its class (AssertionError, struct.error, ...) depends on the place of the damage
        # An archive with a member begins with its name; PyTorch takes a file of zeros for an empty archive.
        if "legacy .tar" in str(error) and not _begins_with_zero(path):
            raise CheckpointError(f"{path} is a tar archive of PyTorch 0.1; save it again by torch.save") from None
        raise CheckpointError(f"{path} is truncated or damaged ({_reason(error)}); fetch it again") from None


def _begins_with_zero(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == b"\0"


def check_dense(path: Path, tensors: Mapping[Any, torch.Tensor]) -> None:
    """Refuse tensors that a pickle does not hold whole: sparse, quantised, meta tensors, and views of few values.

    Raises:
        CheckpointError: the message names the tensor.
    """
    size = path.stat().st_size
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.nbytes > size:
            raise CheckpointError(
                f"{path}: {shown(name)} is sparse, quantised or without values; save it as a dense tensor"
            )


def _reason(error: Exception) -> str:
    """Return the sentence with the cause from a long message of torch.load."""
    text = str(error)
    match = re.search(r"WeightsUnpickler error:\s*([^\n]+)", text)
    return (match.group(1) if match else text.split("\n")[0]).split(". ")[0].strip() or type(error).__name__

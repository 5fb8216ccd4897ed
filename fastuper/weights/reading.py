"""Reads the weights of a checkpoint: safetensors or pickles, one file or shards, of a folder or the Hub."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fastuper.io.files import read_json
from fastuper.io.hub import HubOptions, find_file
from fastuper.io.messages import listed
from fastuper.weights.errors import CheckpointError
from fastuper.weights.filenames import INDEX, PICKLE, SAFETENSORS, with_variant


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
            raise CheckpointError(f"{index} names {filename!r}, which is not a weight file beside it; fetch it again")
        path = find_file(source, filename, options)
        if path is None:
            raise CheckpointError(f"{index} names {filename}, which is missing; fetch it")
        shards[path] = tensors
    return shards


def _check_file(path: Path) -> None:
    """Refuse an empty file and a git-lfs pointer."""
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise CheckpointError(f"{path} is empty; fetch it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a git-lfs pointer, not the weights; run `git lfs pull` in its folder")


def _read_safetensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    _check_file(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118  (the file itself cannot be iterated)
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); fetch it again") from None


def _read_pickle(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    _check_file(path)
    try:
        # Files of PyTorch before 1.6 are not zip archives, and cannot be mapped into memory.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if not re.search(r"GLOBAL|global|reduce|NEWOBJ|can only (create|build)", str(error), re.IGNORECASE):
            raise CheckpointError(f"{path} is damaged ({_reason(error)}); fetch it again") from None
        raise CheckpointError(
            f"{path} contains code that would run on loading ({_reason(error)}); it was not run. "
            "Ask its author for model.safetensors, or convert it on a machine that may run it"
        ) from None
    except (OSError, MemoryError):
        raise
    except Exception as error:  # its class (AssertionError, struct.error, ...) depends on the place of the damage
        raise CheckpointError(f"{path} is truncated or damaged ({_reason(error)}); fetch it again") from None
    if not isinstance(content, Mapping) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise CheckpointError(f"{path} does not hold a dict of tensors; save `model.state_dict()`")
    yield from content.items()


def _reason(error: Exception) -> str:
    """Return the sentence with the cause from a long message of torch.load."""
    text = str(error)
    match = re.search(r"WeightsUnpickler error:\s*([^\n]+)", text)
    return (match.group(1) if match else text.split("\n")[0]).split(". ")[0].strip() or type(error).__name__

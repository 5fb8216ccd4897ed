"""The files of a checkpoint: the training state, and checksums by which damage is found."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fastuper.io.files import file_digest, read_json
from fastuper.io.messages import listed, reason
from fastuper.training.config import TrainingError

STATE = "training_state.pt"
CHECKSUMS = "checksums.json"


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint's training state.

    Raises:
        OSError: the file could not be written; the message says why.
    """
    with open(folder / STATE, "wb") as file:  # torch opens no file: its errors hide the system's reason
        torch.save(state, file)


def read_state(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's training state, onto the CPU.

    Raises:
        OSError: the file cannot be read, or holds no state; the message names it.
    """
    path = folder / STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror or reason(error)}") from None
    except Exception as error:  # RuntimeError, EOFError, ValueError, LookupError, UnpicklingError, TypeError, ...
        kind = "" if isinstance(error, RuntimeError | pickle.UnpicklingError) else f"{type(error).__name__} "
        raise OSError(f"{path} cannot be read: {kind}{reason(error)}") from None
    if not isinstance(state, dict):
        raise OSError(f"{path} holds {type(state).__name__}, not the state of a training")
    return state


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 digests of a folder's other files into checksums.json."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS)
    digests = {path.name: _digest(path) for path in files}
    (folder / CHECKSUMS).write_text(json.dumps(digests, indent=1), encoding="utf-8")


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with the files of a checkpoint that training should resume from; None if they are intact."""
    try:
        digests = read_json(folder / CHECKSUMS)
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except OSError as error:
        return reason(error)
    for name in dict.fromkeys([STATE, *digests]):
        path = folder / name
        if name not in digests:
            return f"{CHECKSUMS} does not list {name}"
        try:
            if not path.is_file():
                return f"{name} is missing"
            if _digest(path) != digests[name]:
                return f"{name} differs from its checksum"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return file_digest(file)[1]


@contextlib.contextmanager
def named_failures(folder: Path, final: Path, size: int) -> Iterator[None]:
    """Give errors of the writers of a checkpoint one form.

    Args:
        folder: the folder that the files are written into.
        final: the name that the folder gets when it is complete.
        size: the bytes that the files need, about.

    Raises:
        OSError: an error in the block; the message names the file, the system's reason and the space.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        chain: list[BaseException] = [error]
        while cause := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(cause)
        for cause in chain:
            if not isinstance(cause, Exception):  # Ctrl-C, which torch turned into an error of its own
                raise cause from None
        number = re.search(r"\(os error (\d+)\)", str(error))  # safetensors
        codes = (cause.errno for cause in chain if isinstance(cause, OSError) and cause.errno)
        code = next(codes, int(number[1]) if number else None)
        why = os.strerror(code) if code else reason(error)
        files = [path for path in folder.iterdir() if not path.is_dir()] if folder.is_dir() else []
        newest = max(files, key=lambda path: path.stat().st_mtime_ns, default=None)
        name = final / ("" if newest is None or newest.name.startswith(".") else newest.name)
        free = shutil.disk_usage(final.parent).free
        raise OSError(
            f"{name}: {why}; a checkpoint needs {format_bytes(size)}, and {format_bytes(free)} are free"
        ) from error


def tensor_bytes(value: Any) -> int:
    """Return the bytes of all tensors in a value of dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return 0
    return sum(map(tensor_bytes, value))


def format_bytes(count: int) -> str:
    """Return a number of bytes as text, in MB or GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def optimizer_by_names(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's state by the names of its parameters, so that the order of the parameters does not count.

    Returns:
        "state": each parameter's tensors by its name; "groups": for each group, its options, and the names of its
        parameters as "param_names".
    """
    found = optimizer.state_dict()
    names = _names(found)
    groups = [{name: value for name, value in group.items() if name != "params"} for group in found["param_groups"]]
    return {"state": {names[number]: value for number, value in found["state"].items()}, "groups": groups}


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], path: Path) -> None:
    """Load the state that `optimizer_by_names` returned into an optimizer of the same parameters, in any order.

    Args:
        optimizer: the optimizer; its groups have names.
        saved: the state.
        path: the file of the state, for messages.

    Raises:
        TrainingError: the names, the groups or the shapes of the parameters differ; the message says which.
    """
    current = optimizer.state_dict()
    names = _names(current)
    old_groups = {frozenset(group["param_names"]): group for group in saved["groups"]}
    old_names = {name for group in old_groups for name in group}
    missing, more = sorted({*names.values()} - old_names), sorted(old_names - {*names.values()})
    if missing or more:
        parts = [f"has no {listed(missing, 5)}"] * bool(missing) + [f"has {listed(more, 5)}"] * bool(more)
        raise TrainingError(
            f"{path} is of a model with other parameters: compared with this model it {' and '.join(parts)}; give the "
            "model of the run, or another folder, or --restart (restart=True) to remove the run"
        )
    for group in current["param_groups"]:
        old = old_groups.get(frozenset(group["param_names"]))
        if old is None:
            raise TrainingError(
                f"{path} divides the parameters into other groups: {listed(group['param_names'], 2)} were not "
                "together; give another folder, or --restart (restart=True) to remove the run"
            )
        group |= {name: value for name, value in old.items() if name != "param_names"}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shapes = dict(zip(names.values(), (parameter.shape for parameter in parameters), strict=True))
    for name, values in saved["state"].items():
        for value in values.values():
            if value.ndim and value.shape != shapes[name]:
                raise TrainingError(
                    f"{path}: the state of {name} has the shape {tuple(value.shape)}, the parameter "
                    f"{tuple(shapes[name])}; give the model of the run, or another folder"
                )
    current["state"] = {number: saved["state"][name] for number, name in names.items() if name in saved["state"]}
    optimizer.load_state_dict(current)


def _names(state: Mapping[str, Any]) -> dict[int, str]:
    """Return the names of an optimizer's parameters by their numbers in its state."""
    return {
        number: name
        for group in state["param_groups"]
        for number, name in zip(group["params"], group["param_names"], strict=True)
    }

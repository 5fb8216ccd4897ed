"""Reads a pickle of `torch.save` without the classes that it names: inert objects stand in for them.

mmengine's Runner, the authors' scripts and others write more than tensors: histories, NumPy's numbers, arguments. Code
is in none of it, and `torch.load(weights_only=True)` refuses it all the same. Here each name of a class or function
that only makes such values becomes a class that ignores its arguments. Names of anything else stay refused.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import IO, Any

import torch

DATA = re.compile(
    r"(mmengine|mmcv|mmseg|mmcls|mmpretrain|mmdet|numpy|yacs|omegaconf|addict|easydict|datetime|pathlib|timm\.utils"
    r"|(pytorch_)?lightning(_fabric)?)\..+"
    r"|argparse\.Namespace|types\.SimpleNamespace|collections\.(deque|defaultdict)|typing\.Any|uuid\.UUID"
    r"|torch\.torch_version\.TorchVersion|copyreg\._reconstructor"
    r"|builtins\.(getattr|object|dict|list|tuple|frozenset|int|float|str|bool|bytes|slice|range)"
)
"""Full names of classes and functions that make values, and that stand-ins replace."""

MAPPINGS = re.compile(r"(.*Dict|dict|defaultdict|CfgNode)")
"""The last part of the name of a class of mappings; a plain mapping replaces it, with its items."""

BOMB = "builtins.bytearray"
"""A class that `torch.load` calls itself: a few bytes can ask it for all memory. No checkpoint needs it."""

LISTS = re.compile(r"(deque|list|ConfigList)")
"""The last part of the name of a class of lists; a plain list replaces it."""


class Inert:
    """An object of a pickle whose class is not loaded. It ignores its arguments and keeps its attributes.

    Attributes:
        state: what the pickle says about its attributes, often a dictionary.
    """

    state: Any = None

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class InertMapping:
    """Makes a plain mapping in place of a mapping of another class."""

    def __new__(cls, *args: Any) -> Any:  # noqa: D102
        # torch.load sets items, and attributes, of an `OrderedDict` itself, and of no subclass.
        return OrderedDict(args[0]) if args and isinstance(args[0], dict) else OrderedDict()


class InertList:
    """Makes a plain list in place of a list of another class."""

    def __new__(cls, *args: Any) -> Any:  # noqa: D102
        return list(args[0]) if args and isinstance(args[0], list | tuple) else []


def load_with_stand_ins(path: Path, is_zip: bool) -> Any:
    """Return the content of a file of `torch.save`; no class that it names is loaded, and no code of it runs.

    Args:
        path: the file.
        is_zip: whether it is a zip archive; files of PyTorch before 1.6 are none, and cannot be mapped into memory.

    Raises:
        pickle.UnpicklingError: it names a class or function that may be code, or that takes memory without end.
        UnknownProtocol: it is a pickle of another protocol than `torch.save` writes.
        Exception: the file is damaged; the class depends on the place of the damage.
    """
    names, protocol = _names(path, is_zip)
    if protocol in (4, 5):
        raise UnknownProtocol(f"a pickle of protocol {protocol}, and PyTorch's restricted reader takes 2, torch.save's")
    if BOMB in names:
        raise pickle.UnpicklingError(f"GLOBAL {BOMB} is not allowed")
    stand_ins: list[Any] = [(_stand_in(name), name) for name in names if DATA.fullmatch(name)]
    with _LOCK, torch.serialization.safe_globals(stand_ins):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


class UnknownProtocol(Exception):
    """A pickle that `torch.load` does not read; the message says which."""


_LOCK = Lock()
"""PyTorch has one list of safe names a process: two threads would restore each other's."""


def _stand_in(name: str) -> type:
    last = name.rpartition(".")[2]
    return InertMapping if MAPPINGS.fullmatch(last) else InertList if LISTS.fullmatch(last) else Inert


def _names(path: Path, is_zip: bool) -> tuple[set[str], int]:
    """Return the full names of the classes and functions in a file's pickles, and the highest protocol of them.

    Of a damaged file they are those before the damage.
    """
    found: set[str] = set()
    protocols = [0]
    try:
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                for entry in archive.namelist():
                    if entry.endswith("/data.pkl"):
                        with archive.open(entry) as file:
                            _add_names(file, found, protocols)
        else:
            with path.open("rb") as file:
                for _ in range(4):  # a magic number, a version, the system's sizes, and the content
                    _add_names(file, found, protocols)
    except Exception:  # damage, which torch.load reports
        pass
    return found, max(protocols)


def _add_names(file: IO[bytes], found: set[str], protocols: list[int]) -> None:
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "PROTO" and isinstance(argument, int):
            protocols.append(argument)
        elif opcode.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            # Pickles have the names of Python 2, which torch.load translates in the same way.
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            found.add(f"{module}.{name}")


def as_values(value: Any) -> Any:
    """Return a mapping of plain values for the arguments or settings in a checkpoint; None if it holds none."""
    if isinstance(value, Inert):
        value = value.state
    return value if isinstance(value, Mapping) else None

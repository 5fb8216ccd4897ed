"""Atomic folders, files flushed and hashed, and JSON objects read from files.

The atomic write of a single file, `atomic_path`, is in `fastuper_kernels.dispatch.files`: both packages use it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fastuper.io.messages import about, name_of, shown
from fastuper_kernels.dispatch.files import temporary_beside

LARGEST_JSON = 16 * 2**20
"""The largest JSON file that is read, in bytes; the names of 65,536 classes fit."""
DEEPEST_JSON = 50
"""The deepest nesting of lists and objects in a JSON file."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        OSError: the file cannot be read, is too large, is not valid JSON, holds no object, or names a value twice; the
            message names the file.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_JSON + 1)
        if len(content) > LARGEST_JSON:
            raise OSError(f"{path} is larger than {LARGEST_JSON // 2**20} MiB, and no configuration or index")
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_without_repeats)
        if not isinstance(value, dict):
            raise OSError(f"{path} holds {type(value).__name__} where a JSON object is expected")
        _check_depth(value)
    except RecursionError:
        raise OSError(f"{path} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:  # bytes that are not UTF-8, wrong syntax, an integer of too many digits
        raise OSError(f"{path} is not valid JSON: {error}") from None
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        repeated = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{shown(repeated)} stands in it twice; remove one of them")
    return values


def _check_depth(value: Any) -> None:
    """Raise RecursionError if lists and objects are nested deeper than `DEEPEST_JSON`."""
    level = [value]
    for _ in range(DEEPEST_JSON):
        items = (item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer))
        level = [item for item in items if isinstance(item, dict | list)]
    if level:
        raise RecursionError


def new_folder(path: str | os.PathLike[str]) -> Path:
    """Return the place of a folder that does not exist or is empty, without links.

    Raises:
        ValueError: there is something else, or the place cannot be read; the message is one line.
    """
    place = Path(os.path.realpath(path))
    try:
        if os.path.lexists(place) and (not place.is_dir() or any(place.iterdir())):
            fault = "is not empty" if place.is_dir() else "is a file"
            raise ValueError(f"{name_of(path)} {fault}; give a new folder")
    except OSError as error:
        raise ValueError(f"cannot use the output folder {about(path, error)}") from None
    return place


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a new folder beside `path`; it is renamed to `path` when the block ends, and removed if the block fails.

    Readers find the whole folder or none, also after a power failure: the files are flushed to the disk before the
    folder is renamed. A killed writer leaves a hidden folder behind, until a process writes beside it.

    Raises:
        OSError: `path` exists, or a file could not be written.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in [*temporary.iterdir(), temporary]:
            flush(file)
        os.rename(temporary, path)
        flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(file: BinaryIO) -> tuple[int, str]:
    """Return the number of bytes from a file's position to its end, and their SHA-256."""
    sha, size = hashlib.sha256(), 0
    while block := file.read(1 << 20):
        sha.update(block)
        size += len(block)
    return size, sha.hexdigest()

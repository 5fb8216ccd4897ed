"""Atomic folders, and JSON objects read from files.

The atomic write of a single file, `atomic_path`, is in `fastuper_kernels.dispatch.files`: both packages use it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastuper_kernels.dispatch.files import temporary_beside


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        OSError: the file cannot be read, is not valid JSON, or holds no object; the message names the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise OSError(f"{path} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:  # bytes that are not UTF-8, wrong syntax, an integer of too many digits
        raise OSError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise OSError(f"{path} holds {type(value).__name__} where a JSON object is expected")
    return value


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
            _flush(file)
        os.rename(temporary, path)
        _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

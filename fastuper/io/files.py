"""Atomic files and folders, and JSON objects read from files."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; the error names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise OSError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise OSError(f"{path} holds {type(value).__name__} where a JSON object is expected")
    return value


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a new folder beside `path` to write files into; it becomes `path` when the block ends, or goes if it fails.

    A reader sees no folder or the whole of it, whenever the writer is stopped or the power fails: the files are on the
    disk before the folder has its name. A writer that is killed leaves a hidden folder behind, `.` and 32 digits.

    Raises:
        OSError: `path` is there already, or something could not be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex}")
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
    """Have the system write a file, or the names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Atomic writes of files, and the folder of the user's cache."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CACHE = "FASTUPER_CACHE"


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which replaces `path` at the end of the block.

    A reader gets the old file or the new file, never a part of a file, whenever the writer is stopped. If the block
    raises, the temporary file is deleted.
    """
    path = Path(path)
    # This is not the target's name with a suffix: the target's name may have the greatest length that the file system
    # allows.
    temporary = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_json(path: Path, value: Any) -> None:
    """Write a value to a JSON file in one atomic step; its folder is made first.

    Raises:
        OSError: the file cannot be written. An older file then keeps its content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")


def cache_folder() -> Path | None:
    """Return the folder of measured results: `$FASTUPER_CACHE`, or the user's cache (Linux: `~/.cache/fastuper`).

    Returns:
        The folder, which need not exist yet; None if the variable is unset and the user has no home folder.
    """
    if folder := os.environ.get(CACHE):
        return Path(folder)
    from platformdirs import user_cache_path

    # Without a home folder, new versions of platformdirs raise, and old versions return "~/.cache" unexpanded.
    try:
        path = user_cache_path("fastuper", appauthor=False)
    except RuntimeError:
        return None
    return path if path.is_absolute() else None

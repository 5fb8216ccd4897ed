"""Atomic writes of files, the folder of the user's cache, and the measured results in it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastuper_kernels.dispatch.processes import Process, this_process

CACHE = "FASTUPER_CACHE"
MAX_BYTES = 1 << 20  # of a file of measured results

_TEMPORARY = re.compile(r"\.fastuper-([0-9a-f]{8})-(\d{1,10})-([0-9a-f]{8}|0)-[0-9a-f]{12}(\..*)?")
_DAY = 24 * 3600
_swept: set[Path] = set()


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which replaces `path` at the end of the block.

    A reader gets the old file or the new file, never a part of a file, whenever the writer is stopped. If the block
    raises, the temporary file is deleted. A killed process leaves it behind, until a process writes into the folder.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path | None) -> dict[str, Any]:
    """Return the JSON object in a file of measured results; an empty dict if there is no such object.

    A file that is missing, damaged, nested too deeply, longer than `MAX_BYTES` or no regular file holds no object. The
    call does not wait for a named pipe's writer.
    """
    if path is None:
        return {}
    with contextlib.suppress(OSError, ValueError, RecursionError):
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_BYTES:
                value = json.loads(file.read(MAX_BYTES).decode("utf-8"))
                return value if isinstance(value, dict) else {}
    return {}


@contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Yield False if another process holds this lock, else True; nobody waits.

    The lock ends with its process. Where it cannot be made, the result is True: in a folder that cannot be written to,
    or on a system without `fcntl`.
    """
    try:
        import fcntl

        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o644)
    except (ImportError, OSError):
        yield True
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except BlockingIOError:
        free = False
    except OSError:  # a file system without locks
        free = True
    try:
        yield free
    finally:
        with contextlib.suppress(OSError):
            if free:  # a process that was forked meanwhile shares the lock, so closing the file would not end it
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def temporary_beside(path: Path) -> Path:
    """Return a new hidden path in a path's folder, named after this process, with the path's suffix.

    The first call for a folder removes the folder's orphans; see `remove_orphans`.
    """
    if path.parent not in _swept:
        if len(_swept) >= 1000:
            _swept.clear()
        _swept.add(path.parent)
        remove_orphans(path.parent)
    process = this_process()
    # This is not the target's name with a suffix: the target's name may have the greatest length that the file system
    # allows.
    suffix = path.suffix if len(path.suffix) <= 20 else ""
    return path.with_name(f".fastuper-{process.place}-{process.pid}-{process.start}-{uuid.uuid4().hex[:12]}{suffix}")


def remove_orphans(folder: Path) -> None:
    """Remove the temporary files and folders that killed processes have left in a folder.

    Only names that `temporary_beside` gives are removed, and only if their process has ended. Whether a process of
    another host runs is not known: its files are removed when they are unchanged for a day.
    """
    try:
        with os.scandir(folder) as scan:
            found = [(entry, match) for entry in scan if (match := _TEMPORARY.fullmatch(entry.name))]
    except OSError:
        return
    for entry, match in found:
        writer = Process(match[1], int(match[2]), match[3])
        with contextlib.suppress(OSError):  # another process removes it, or it belongs to another user
            age = time.time() - entry.stat(follow_symlinks=False).st_mtime
            if writer.is_dead() or (not writer.is_here() and age > _DAY):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)


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

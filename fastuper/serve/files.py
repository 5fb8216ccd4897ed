"""The one temporary folder of the page: uploads and results, swept while the page runs and removed at its end."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from fastuper_kernels.dispatch.files import temporary_beside

KEPT_SECONDS = 3600
"""Results and uploads are removed after this time."""
KEPT_RESULTS = 100
"""The number of results that are kept; the oldest are removed."""
KEPT_BYTES = 1_000_000_000
"""The size of all results, and of all uploads, that are kept; the oldest are removed."""
UNFINISHED_SECONDS = 60
"""Uploads to which nothing was added for this time have failed, and are removed."""


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a new folder that only this user can read, and remove it at the end of the block.

    Inside the block it is the folder of all temporary files of this process. The folders of killed processes are
    removed too.

    Raises:
        OSError: the folder cannot be made.
    """
    before = tempfile.tempdir
    folder = temporary_beside(Path(tempfile.gettempdir()) / "serve")
    folder.mkdir(mode=0o700)
    tempfile.tempdir = str(folder)
    try:
        yield folder
    finally:
        tempfile.tempdir = before
        shutil.rmtree(folder, ignore_errors=True)


class _Result(NamedTuple):
    """The folder of a photo's results, its size in bytes, and when they were made."""

    folder: Path
    size: int
    made: float


class ResultFiles:
    """Folders of results, by keys that cannot be guessed.

    Args:
        folder: the folder of all results, which exists.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._results: dict[str, _Result] = {}

    @contextmanager
    def new(self) -> Iterator[tuple[str, Path]]:
        """Yield the key and the folder of a new result; if the block fails, the folder is removed.

        Raises:
            OSError: the folder cannot be made.
        """
        self.sweep(KEPT_RESULTS - 1)
        key = secrets.token_urlsafe(12)
        folder = self._folder / key
        folder.mkdir()
        try:
            yield key, folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        size = sum(path.stat().st_size for path in folder.iterdir())
        self._results[key] = _Result(folder, size, time.monotonic())

    def path(self, key: str, name: str) -> Path | None:
        """Return a file of a result; None if there is none."""
        result = self._results.get(key)
        if result is None or name not in os.listdir(result.folder):
            return None
        return result.folder / name

    def sweep(self, kept: int = KEPT_RESULTS) -> None:
        """Remove old results, and the oldest if there are more than `kept`, or more than KEPT_BYTES in all."""
        newest = sorted(self._results.items(), key=lambda item: -item[1].made)
        total = 0
        for position, (key, result) in enumerate(newest):
            total += result.size
            if position >= kept or total > KEPT_BYTES or time.monotonic() - result.made > KEPT_SECONDS:
                self._results.pop(key, None)
                shutil.rmtree(result.folder, ignore_errors=True)


class Uploads:
    """The photos that the page was sent, which Gradio keeps in a folder of their own.

    Args:
        folder: that folder. What is in it now, the examples, stays.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._examples = set(folder.rglob("*"))

    def sweep(self) -> None:
        """Remove old uploads, unfinished ones, and the oldest if all have more than KEPT_BYTES."""
        found = []
        for path in set(self._folder.rglob("*")) - self._examples:
            with suppress(OSError):  # another thread has removed it
                if path.is_file():
                    found.append((path.stat().st_mtime, path.stat().st_size, path))
        total = 0
        for changed, size, path in sorted(found, reverse=True):
            total += size
            unfinished = path.parent == self._folder  # a finished upload has a folder of its own
            old = time.time() - changed > (UNFINISHED_SECONDS if unfinished else KEPT_SECONDS)
            if old or (total > KEPT_BYTES and not unfinished):
                with suppress(OSError):
                    path.unlink()
                    path.parent.rmdir()


def size_limit(max_pixels: int) -> int:
    """Return the largest size of a photo's file in bytes: 4 channels of 16 bits for each pixel, and metadata."""
    return 8 * max_pixels + (1 << 24)


@contextmanager
def removed_after(path: Path) -> Iterator[Path]:
    """Yield a path, and remove its file at the end of the block."""
    try:
        yield path
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)

"""The lock of a run's folder: one training at a time, on all machines that share the folder.

The lock is a file that names its process. While the process runs, a thread touches the file every few seconds. A lock
is stale when its process has ended on this machine, or when another machine's file is no longer touched.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastuper.io.files import read_json
from fastuper.training.config import TrainingError
from fastuper_kernels.dispatch.files import temporary_beside
from fastuper_kernels.dispatch.processes import Process, this_process

INTERVAL = 10.0
"""Seconds between two touches of the file."""
STALE = 12 * INTERVAL
"""Seconds without a touch after which another machine's lock no longer holds."""

_training: set[Path] = set()  # the locks of the trainings that take steps in this process


class RunLock:
    """The lock of a folder.

    Args:
        path: the file; its folder exists when `acquire` is called.
    """

    def __init__(self, path: Path):
        self.path = path.absolute()
        self._own: dict[str, Any] | None = None
        self._stop = threading.Event()
        self._lost = False

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the lock while the block runs, and release it then; inside, this process cannot take it again."""
        self.acquire()
        _training.add(self.path)
        try:
            yield
        finally:
            _training.discard(self.path)
            self.release()

    def acquire(self) -> None:
        """Take the lock. A stale lock is taken over, and so is a lock of this process outside `hold`.

        Raises:
            TrainingError: another training holds the lock; the message says which.
            OSError: the file cannot be written.
        """
        if self._own is not None and _read(self.path) == self._own:
            return
        own = {
            "process": list(this_process()),
            "host": platform.node(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "id": os.urandom(8).hex(),
        }
        temporary = temporary_beside(self.path)
        try:
            try:
                temporary.write_text(json.dumps(own), encoding="utf-8")
            except OSError as error:
                raise OSError(f"{self.path} cannot be written: {error.strerror}") from None
            for _ in range(5):  # another process may take or remove the lock in between
                if _place(temporary, self.path):
                    break
                self._remove_stale(temporary)
            else:
                raise TrainingError(f"{self.path} changes while it is taken: another training starts in this folder")
        finally:
            temporary.unlink(missing_ok=True)
        self._own, self._lost, self._stop = own, False, threading.Event()
        threading.Thread(target=self._touch, args=(self._stop, own), daemon=True, name="fastuper-lock").start()
        atexit.register(self.release)

    def release(self) -> None:
        """Give the lock back; without effect if it is not held, and in forked processes."""
        own, self._own = self._own, None
        if own is None:
            return
        atexit.unregister(self.release)
        self._stop.set()
        if tuple(own["process"]) != tuple(this_process()):
            return
        if _read(self.path) == own:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def check(self) -> None:
        """Check that the lock still holds.

        Raises:
            TrainingError: another training took the lock, since this process did not run for minutes.
        """
        if self._lost:
            raise TrainingError(
                f"{self.path.parent} was taken over by another training, since this one stood still for over "
                f"{STALE:.0f} s; this one stops, so that the two do not mix"
            )

    def _touch(self, stop: threading.Event, own: dict[str, Any]) -> None:
        while not stop.wait(INTERVAL):
            found = _read(self.path)
            if found is not None and found != own:
                self._lost = True
                return
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def _remove_stale(self, fresh: Path) -> None:
        """Remove the file if it is stale.

        Args:
            fresh: a file just written into the same folder, whose time is by the same clock as the lock's.
        """
        found = _read(self.path)
        try:
            # A copy may have kept a time from a clock that was ahead.
            age = abs(fresh.stat().st_mtime - self.path.stat().st_mtime)
        except FileNotFoundError:
            return
        writer = _process(found)
        if writer is None:  # no lock of ours, or cut off by a full disk
            dead = age > STALE
        elif writer == this_process():
            dead = self.path not in _training
        else:
            dead = writer.is_dead() or (not writer.is_here() and age > STALE)
        if not dead:
            raise TrainingError(self._who(found, writer))
        taken = temporary_beside(self.path)
        with contextlib.suppress(OSError):
            os.rename(self.path, taken)
            if _read(taken) != found:  # another process removed the stale lock, and took it
                _place(taken, self.path)
            taken.unlink(missing_ok=True)

    def _who(self, found: dict[str, Any] | None, writer: Process | None) -> str:
        folder = self.path.parent
        if found is None or writer is None:
            return f"{self.path} does not name a process; if no training runs in {folder}, remove the file"
        line = (
            f"{folder} is in use: process {writer.pid} on {found.get('host')} trains there since {found.get('since')}; "
            "wait for it or stop it, or give another folder"
        )
        return line if writer.is_here() else f"{line} (if it has ended, its lock is free after {STALE:.0f} s)"


def _place(temporary: Path, path: Path) -> bool:
    """Give a file a second name; return False if the name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without such names
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        with open(descriptor, "wb") as file:
            file.write(temporary.read_bytes())
    return True


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except OSError:
        return None


def _process(found: dict[str, Any] | None) -> Process | None:
    """Return the process that a lock names; None if it names none."""
    value = None if found is None else found.get("process")
    if not isinstance(value, list) or list(map(type, value)) != [str, int, str]:
        return None
    return Process(*value)

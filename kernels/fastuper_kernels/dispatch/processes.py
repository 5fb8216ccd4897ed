"""The identity of processes: files name their writer, and a later run finds out whether it still runs."""

from __future__ import annotations

import hashlib
import os
import platform
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    """A process, as files name it.

    Attributes:
        place: the host and, in a container, the container: 8 hexadecimal digits. Numbers of processes are comparable
            inside one place only.
        pid: the number of the process.
        start: the boot and the time at which the process started: 8 hexadecimal digits that tell it from a later
            process of the same number; "0" if the system does not say.
    """

    place: str
    pid: int
    start: str

    def is_here(self) -> bool:
        """Return True if the process ran or runs on this host, in this container."""
        return self.place == _place()

    def is_dead(self) -> bool:
        """Return True if the process has certainly ended; False if it runs, or ran at another place."""
        if not self.is_here() or os.name == "nt":  # Windows would end the process that is asked for
            return False
        found = _state_and_start(self.pid)
        if found is not None:
            state, start = found
            return state == "Z" or start != self.start
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return True
        except OSError:  # another user's process
            return False
        return False


def this_process() -> Process:
    """Return the calling process."""
    pid = os.getpid()
    return Process(_place(), pid, _own_start(pid))


@lru_cache(1)
def _place() -> str:
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return _digest(platform.node(), namespace)


@lru_cache(1)
def _own_start(pid: int) -> str:
    found = _state_and_start(pid)
    return "0" if found is None else found[1]


def _state_and_start(pid: int) -> tuple[str, str] | None:
    """Return the letter of a process's state and the digest of its start; None if the system does not say."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        fields = text.rpartition(")")[2].split()  # the name of the program, in brackets, may have spaces
        return fields[0], _digest(boot, fields[19])
    except (OSError, IndexError):
        return None


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:8]

"""Temporary files of killed processes, which the next process removes, and the identity of processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from fastuper_kernels.dispatch import files
from fastuper_kernels.dispatch.files import atomic_path, remove_orphans, temporary_beside
from fastuper_kernels.dispatch.processes import Process, this_process

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell when a process started")


def kill_while_writing(path: Path) -> None:
    """Write a file in a forked process that is killed before it ends."""
    pid = os.fork()
    if not pid:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.mark.parametrize("name", ["a.png", "model.safetensors", "no_suffix", "x" * 250, "log." + "y" * 200])
def test_file_of_a_killed_process_is_removed_by_the_next_write(name, tmp_path):
    files._swept.clear()
    kill_while_writing(tmp_path / name)
    (orphan,) = os.listdir(tmp_path)
    assert orphan.startswith(".fastuper-")
    files._swept.clear()  # as in another process
    with atomic_path(tmp_path / name) as temporary:
        temporary.write_text("whole")
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "whole"


def test_folders_of_killed_processes_are_removed_and_nothing_else(tmp_path):
    dead = this_process()._replace(start="00000000")
    name = temporary_beside(tmp_path / "x").name.replace("-".join(map(str, this_process())), "-".join(map(str, dead)))
    (tmp_path / name / "inside").mkdir(parents=True)
    (tmp_path / f"{name}.png").symlink_to(tmp_path / "target")
    (tmp_path / "target").touch()
    kept = [
        temporary_beside(tmp_path / "mine.png"),  # of this process, which may still write it
        *(tmp_path / other for other in (f"{name[:-1]}", f"x{name}", ".fastuper-notes", f".{'0' * 32}")),
    ]
    for path in kept:
        path.touch()
    remove_orphans(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([*kept, tmp_path / "target"])


def test_files_of_another_host_are_removed_after_a_day(tmp_path):
    path = tmp_path / ".fastuper-ffffffff-1-00000000-0123456789ab.png"
    path.touch()
    remove_orphans(tmp_path)
    assert path.exists()
    old = time.time() - 25 * 3600
    os.utime(path, (old, old))
    remove_orphans(tmp_path)
    assert not path.exists()


def test_processes_that_run_have_ended_or_are_elsewhere():
    own = this_process()
    assert own.is_here()
    assert not own.is_dead()
    assert not Process("ffffffff", own.pid, own.start).is_here()
    assert not Process("ffffffff", own.pid, own.start).is_dead(), "it may run there"
    assert own._replace(start="00000000").is_dead(), "an earlier process of the same number"
    pid = os.fork()
    if not pid:
        os._exit(0 if this_process().pid == os.getpid() and this_process() != own else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert own._replace(pid=pid).is_dead()
    assert own._replace(pid=10**9).is_dead()

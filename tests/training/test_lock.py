"""The lock of a run's folder: held by one process, stale when it has ended or its host is silent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastuper.training import lock as lock_module
from fastuper.training.config import TrainingError
from fastuper.training.lock import STALE, RunLock
from fastuper.training.trainer import Trainer
from fastuper_kernels.dispatch.processes import Process, _state_and_start, this_process
from tests.training.common import train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell when a process started")


@pytest.fixture
def other() -> Iterator[subprocess.Popen]:
    """Start another process that runs until the test ends."""
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def identity(pid: int) -> Process:
    found = _state_and_start(pid)
    assert found is not None
    return this_process()._replace(pid=pid, start=found[1])


def write(path: Path, process: Process) -> None:
    path.write_text(json.dumps({"process": list(process), "host": "somewhere", "since": "today"}))


def test_lock_of_a_running_process_is_named_and_stays(tmp_path, other):
    path = tmp_path / "lock.json"
    write(path, identity(other.pid))
    content = path.read_bytes()
    message = rf"is in use: process {other.pid} on somewhere trains there since today; wait for it or stop it, or give"
    with pytest.raises(TrainingError, match=message) as raised:
        RunLock(path).acquire()
    assert "\n" not in str(raised.value)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["lock.json"]


@pytest.mark.parametrize("how", ["waited for", "a zombie", "number taken by another process"])
def test_lock_of_a_killed_process_is_taken_over(how, tmp_path, other):
    path = tmp_path / "lock.json"
    process = identity(other.pid)
    if how == "number taken by another process":
        process = process._replace(start="00000000")
    else:
        other.send_signal(signal.SIGKILL)
        if how == "waited for":
            other.wait()
        else:
            os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    write(path, process)
    lock = RunLock(path)
    lock.acquire()
    assert json.loads(path.read_text())["process"] == list(this_process())
    lock.release()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("clock", [-1, 1], ids=["old", "copied from a clock that was ahead"])
@pytest.mark.parametrize("content", ["another host", "", "[1]", '{"process": ["a", "b", "c"]}', "{"])
def test_lock_that_tells_no_process_here_goes_by_its_age(content, clock, tmp_path):
    path = tmp_path / "lock.json"
    path.write_text(content)
    if content == "another host":
        write(path, Process("ffffffff", 1, "00000000"))
    with pytest.raises(TrainingError, match=r"its lock is free after 120 s|does not name a process; if no training"):
        RunLock(path).acquire()
    touched = time.time() + clock * (STALE + 5)
    os.utime(path, (touched, touched))
    lock = RunLock(path)
    lock.acquire()
    lock.release()
    assert not path.exists()


def test_lock_is_touched_and_a_takeover_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "INTERVAL", 0.005)
    path = tmp_path / "lock.json"
    lock = RunLock(path)
    lock.acquire()
    os.utime(path, (0, 0))
    wait_until(lambda: path.stat().st_mtime > 0)
    lock.check()
    write(path, Process("ffffffff", 1, "00000000"))
    wait_until(lambda: lock._lost)
    with pytest.raises(TrainingError, match="was taken over by another training"):
        lock.check()
    lock.release()
    assert path.exists(), "a lock of another process stays"


def wait_until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_two_that_take_a_stale_lock_do_not_both_get_it(tmp_path, monkeypatch):
    """Another process takes the stale lock between our look at it and its removal."""
    path = tmp_path / "lock.json"
    write(path, this_process()._replace(start="00000000"))
    rename = os.rename

    def late(source, target):
        if source == path:
            write(path, Process("ffffffff", 1, "00000000"))
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(TrainingError, match="is in use"):
        RunLock(path).acquire()
    assert json.loads(path.read_text())["process"][0] == "ffffffff"
    assert os.listdir(tmp_path) == ["lock.json"]


def test_file_system_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "lock.json"
    lock = RunLock(path)
    with lock.hold():
        assert json.loads(path.read_text())["process"] == list(this_process())
        with pytest.raises(TrainingError, match="is in use"):
            RunLock(path).acquire()
    assert os.listdir(tmp_path) == []


def test_a_forked_process_leaves_the_lock(tmp_path):
    path = tmp_path / "lock.json"
    lock = RunLock(path)
    lock.acquire()
    pid = os.fork()
    if not pid:
        lock.release()
        os._exit(0)
    os.waitpid(pid, 0)
    assert path.exists()
    lock.release()
    assert not path.exists()


def test_folder_without_space_or_permission_is_named(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"lock\.json cannot be written: No space left on device"):
        RunLock(tmp_path / "lock.json").acquire()
    assert os.listdir(tmp_path) == []


def test_training_holds_the_lock_until_it_ends(tmp_path, other, monkeypatch):
    path, seen = tmp_path / ".fastuper-lock.json", []
    step = Trainer._train_step

    def watched(trainer, pieces):
        seen.append(json.loads(path.read_text())["process"] == list(this_process()))
        step(trainer, pieces)
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_train_step", watched)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, steps=3, save_every=1)
    assert seen == [True, True]
    assert not path.exists()
    write(path, identity(other.pid))
    log = (tmp_path / "log.jsonl").read_text()
    with pytest.raises(TrainingError, match="is in use"):
        train(tmp_path, steps=3, save_every=1)
    with pytest.raises(TrainingError, match="is in use"):
        train(tmp_path, steps=3, save_every=1, restart=True)
    assert (tmp_path / "log.jsonl").read_text() == log
    path.unlink()
    train(tmp_path, steps=3, save_every=1)
    assert not path.exists()

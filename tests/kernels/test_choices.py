"""Measured choices: when an option is measured, cached, shown and forced, and when the default decides."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time

import pytest
import torch

from fastuper_kernels.dispatch import choices
from fastuper_kernels.dispatch.choices import CHOICES, Choice
from fastuper_kernels.dispatch.files import cache_folder
from tests.unit.test_imports import environment


@pytest.fixture
def choice(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTUPER_CACHE", str(tmp_path))
    monkeypatch.setattr(choices, "SECONDS", 0.02)
    yield Choice("walk", ("slow", "quick", "absent"), "slow", "it is older")
    del CHOICES["walk"]


class Candidates:
    """Makes a slow and a quick way, and counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"slow": lambda: time.sleep(0.002), "quick": lambda: None}


def test_measured_once_and_cached(choice, tmp_path):
    candidates = Candidates()
    assert [choice("float32", candidates) for _ in range(3)] == ["quick"] * 3
    assert candidates.calls == 1
    (entry, result), *others = json.loads((tmp_path / "choices.json").read_text()).items()
    assert not others
    assert entry.startswith("walk | float32 | ")
    assert torch.__version__ in entry
    assert f"{torch.get_num_threads()} threads" in entry
    assert result["option"] == "quick"
    assert set(result["milliseconds"]) == {"slow", "quick"}
    choice.forget()  # like a new process
    assert choice("float32", candidates) == "quick"
    assert candidates.calls == 1
    assert choice("bfloat16", candidates) == "quick"
    assert candidates.calls == 2
    assert len(json.loads((tmp_path / "choices.json").read_text())) == 2


def test_capture_of_a_cuda_graph_measures_nothing(choice, monkeypatch):
    candidates = Candidates()
    choice("before", candidates)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert (choice("before", candidates), choice("during", candidates)) == ("quick", "slow")
    assert candidates.calls == 1
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choice("during", candidates) == "quick"


def test_clock(choice):
    assert choice("", Candidates(), clock=lambda functions: {"slow": 1.0, "quick": 2.0}) == "slow"


def test_each_number_of_threads_is_measured(choice):
    candidates, before = Candidates(), torch.get_num_threads()
    choice("", candidates)
    try:
        torch.set_num_threads(before + 1)
        choice("", candidates)
    finally:
        torch.set_num_threads(before)
    assert candidates.calls == 2


def test_the_default_stays_if_another_option_is_hardly_quicker(choice, monkeypatch):
    monkeypatch.setattr(choices, "time_each", lambda _: {"slow": 1.0, "quick": 0.97})
    assert choice("", Candidates()) == "slow"


def test_forced(choice, monkeypatch):
    candidates = Candidates()
    monkeypatch.setenv("FASTUPER_CHOICES", " linear=torch, walk = absent,")
    assert choice("", candidates) == "absent"
    with torch.no_grad():
        monkeypatch.setenv("FASTUPER_CHOICES", "linear=torch")
        assert choice("", candidates) == "quick"
    assert candidates.calls == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run=quick", r"no choice 'run'; known are conv, conv3x3, linear, .*walk"),
        ("walk=fast", "walk is one of slow, quick, absent, not 'fast'"),
        ("walk", "not ''"),
    ],
)
def test_unknown_forced_options(choice, monkeypatch, text, message):
    monkeypatch.setenv("FASTUPER_CHOICES", text)
    with pytest.raises(ValueError, match=message):
        choice("", Candidates())


def test_not_in_deterministic_mode(choice):
    candidates = Candidates()
    try:
        torch.use_deterministic_algorithms(True)
        assert choice("", candidates) == "slow"
    finally:
        torch.use_deterministic_algorithms(False)
    assert candidates.calls == 0


@pytest.mark.parametrize(("ranks", "expected"), [(1, "quick"), (2, "slow")])
def test_not_on_several_ranks(choice, monkeypatch, ranks, expected):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)
    assert choice("", Candidates()) == expected


def test_not_while_tracing(choice):
    candidates, taken = Candidates(), []

    class Traced(torch.nn.Module):
        def forward(self, x):
            taken.append(choice("", candidates))
            return x + 1

    torch.export.export(Traced(), (torch.ones(2),))
    torch.jit.trace(Traced(), torch.ones(2), check_trace=False)
    torch.func.vmap(Traced())(torch.ones(2, 2))
    assert set(taken) == {"slow"}
    assert candidates.calls == 0


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"walk": 3}'])
def test_a_broken_file_is_replaced(choice, tmp_path, content):
    (tmp_path / "choices.json").write_text(content)
    assert choice("", Candidates()) == "quick"
    assert any(key.startswith("walk | ") for key in json.loads((tmp_path / "choices.json").read_text()))


def test_an_unknown_option_in_the_file_is_measured_again(choice, tmp_path):
    choice("", Candidates())
    path = tmp_path / "choices.json"
    path.write_text(path.read_text().replace('"option": "quick"', '"option": "gone"'))
    choice.forget()
    candidates = Candidates()
    assert choice("", candidates) == "quick"
    assert candidates.calls == 1


def test_a_folder_that_cannot_be_written(choice, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTUPER_CACHE", str(tmp_path / "file" / "below"))  # root could write to a read-only folder
    candidates = Candidates()
    assert [choice("", candidates) for _ in range(2)] == ["quick"] * 2
    assert candidates.calls == 1


def test_a_failed_write_leaves_no_file(choice, monkeypatch, tmp_path):
    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    assert choice("", Candidates()) == "quick"
    assert list(tmp_path.iterdir()) == []


def test_no_home(choice, monkeypatch):
    monkeypatch.delenv("FASTUPER_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert choices.cache_file() is None
    assert choice("", Candidates()) == "quick"


def test_the_cache_folder(monkeypatch, tmp_path):
    """The variable decides. Without it the folder is the user's own, on Linux ~/.cache/fastuper."""
    monkeypatch.setenv("FASTUPER_CACHE", str(tmp_path / "own"))
    assert choices.cache_file() == tmp_path / "own" / "choices.json"
    monkeypatch.delenv("FASTUPER_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = cache_folder()
    assert folder is not None
    assert folder.parts[-1] == "fastuper" or sys.platform == "win32"
    if sys.platform == "linux":
        assert folder == tmp_path / ".cache" / "fastuper"


def test_eight_threads_measure_once(choice):
    candidates, results = Candidates(), []
    threads = [threading.Thread(target=lambda: results.append(choice("", candidates))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["quick"] * 8
    assert candidates.calls == 1


def test_a_measurement_draws_no_random_numbers(monkeypatch, tmp_path):
    from fastuper_kernels import linear
    from fastuper_kernels.dispatch.choices import LINEAR

    monkeypatch.setenv("FASTUPER_CACHE", str(tmp_path))
    LINEAR.forget()
    before = torch.get_rng_state()
    with torch.inference_mode():
        linear(torch.ones(3, 4), torch.ones(5, 4))
    assert torch.equal(torch.get_rng_state(), before)
    LINEAR.forget()


def test_a_name_is_unique(choice):
    with pytest.raises(ValueError, match="there is a choice 'walk' already"):
        Choice("walk", ("a",), "a", "")


def test_the_table(choice, monkeypatch):
    choice("float32", Candidates())
    rows = list(choices.rows())
    assert ("walk", "slow | quick | absent", "options") in rows
    assert ("walk", "slow", "if nothing is measured (it is older)") in rows
    assert any(row[:2] == ("walk", "quick") and row[2].startswith("measured for float32") for row in rows)
    monkeypatch.setenv("FASTUPER_CHOICES", "walk=absent")
    assert ("walk", "absent", "forced by FASTUPER_CHOICES") in choices.rows()


def test_the_command():
    command = [sys.executable, "-m", "fastuper_kernels"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    assert re.search(r"^ *linear +torch \| conv \| onednn \| float32 +options *$", done.stdout, re.MULTILINE)
    assert "linear: float32 is for float16 operands" in done.stdout  # a forced option may not be taken
    assert not done.stderr

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

from fastuper_kernels.dispatch import choices, measuring
from fastuper_kernels.dispatch.choices import CHOICES, Choice
from fastuper_kernels.dispatch.files import cache_folder
from tests.unit.test_imports import environment

SLOW, QUICK = [2.0, 2.02, 2.01, 2.0, 2.01, 2.02], [1.0, 1.01, 1.0, 1.02, 1.01, 1.0]
CLEAN = {"slow": SLOW, "quick": QUICK}
WRONG = {"slow": QUICK, "quick": SLOW}
NOISE = {"slow": [2.0, 9.0, 2.0, 8.0, 3.0, 5.0], "quick": [1.0, 7.0, 3.0, 1.0, 6.0, 2.0]}


@pytest.fixture
def choice(monkeypatch, tmp_path):
    """Return a choice on an idle machine with a clock that says `CLEAN`."""
    monkeypatch.setenv("FASTUPER_CACHE", str(tmp_path))
    monkeypatch.setattr(choices, "is_busy", lambda: False)
    monkeypatch.setattr(choices, "_spent", [0.0])
    monkeypatch.setattr(choices, "clock_turns", lambda functions: CLEAN)
    yield Choice("walk", ("slow", "quick", "absent"), "slow", "it is older")
    del CHOICES["walk"]


class Candidates:
    """Makes a slow and a quick way, and counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"slow": lambda: None, "quick": lambda: None}


def process(choice, clock=CLEAN, key=""):
    """Return the option that a new process takes, and whether it measured."""
    choice.forget()
    candidates = Candidates()
    return choice(key, candidates, clock=lambda _: clock), candidates.calls == 1


def kept(folder):
    """Return the only entry of the file."""
    (entry,) = json.loads((folder / "choices.json").read_text()).values()
    return entry


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
    choice.forget()  # like a new process, which confirms the result
    assert choice("float32", candidates) == "quick"
    assert candidates.calls == 2
    choice.forget()
    assert choice("float32", candidates) == "quick"
    assert candidates.calls == 2
    assert choice("bfloat16", candidates) == "quick"
    assert candidates.calls == 3
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
    assert choice("", Candidates(), clock=lambda functions: WRONG) == "slow"


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
    assert process(choice, {"slow": [1.0] * 6, "quick": [0.97] * 6}) == ("slow", True)
    assert process(choice) == ("slow", False)  # a clean tie is kept


def test_a_default_of_the_key(choice, monkeypatch, tmp_path):
    """A heuristic that knows better for this key decides wherever nothing is measured, and is a winner's rival."""
    candidates = Candidates()
    monkeypatch.setattr(choices, "is_busy", lambda: True)
    assert choice("busy", candidates, default="quick") == "quick"
    assert choice("noisy", candidates, clock=lambda _: NOISE, default="quick") == "quick"
    try:
        torch.use_deterministic_algorithms(True)
        assert choice("deterministic", candidates, default="quick") == "quick"
    finally:
        torch.use_deterministic_algorithms(False)
    (tmp_path / "choices.json").unlink()
    assert choice("", candidates, clock=lambda _: CLEAN, default="quick") == "quick"
    choice.forget()
    assert choice("", candidates, clock=lambda _: WRONG, default="quick") == "quick"  # the default needs no second time
    assert candidates.calls == 2


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


DAMAGED = {
    "empty": b"",
    "a list": b"[1]",
    "cut off": b"{",
    "a number as an entry": b'{"walk": 3}',
    "not UTF-8": b'{"\xff": 1}',
    "nested": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "nested lists": b"[" * 100_000,
    "a long integer": b'{"walk": {"date": ' + b"9" * 5000 + b"}}",
    "long": b'{"walk": "' + b"x" * (2 << 20) + b'"}',
    "zeros": bytes(4096),
    "infinity": b'{"walk": {"option": "quick", "date": Infinity, "times": Infinity}}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_broken_file_is_replaced(choice, tmp_path, content):
    (tmp_path / "choices.json").write_bytes(content)
    list(choices.rows())
    assert choice("", Candidates()) == "quick"
    assert [key.startswith("walk | ") for key in json.loads((tmp_path / "choices.json").read_text())] == [True]


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes")
@pytest.mark.parametrize("name", ["choices.json", "choices.lock"])
def test_a_named_pipe_does_not_wait(choice, tmp_path, name):
    os.mkfifo(tmp_path / name)
    list(choices.rows())
    assert choice("", Candidates()) == "quick"
    assert kept(tmp_path)["option"] == "quick"


@pytest.mark.parametrize("target", ["folder", "/dev/zero", "choices.json", "missing/choices.json"])
@pytest.mark.parametrize("name", ["choices.json", "choices.lock"])
def test_a_folder_a_device_or_a_loop_in_the_files_place(choice, tmp_path, name, target):
    if target == "folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).symlink_to(target)
    list(choices.rows())
    assert choice("", Candidates()) == "quick"


@pytest.mark.parametrize(
    "change",
    [
        {"option": 1},
        {"option": ["quick"]},
        {"option": "absent"},
        {"date": "today"},
        {"date": 1e300},
        {"date": float("nan")},
        {"times": None},
        {"times": float("inf")},
        {"milliseconds": [1]},
        {"milliseconds": {"quick": "soon"}},
        {"milliseconds": {}},
        {"spread": {}},
        {"rounds": "five"},
    ],
    ids=str,
)
def test_a_damaged_entry_is_measured_again(choice, tmp_path, change):
    process(choice)
    process(choice)
    path = tmp_path / "choices.json"
    ((entry, value),) = json.loads(path.read_text()).items()
    path.write_text(json.dumps({entry: {**value, **change}, "walk | \x1b[31m | x": value}))
    assert not [row for row in choices.rows() if "\x1b" in row[2]]
    assert process(choice) == ("quick", True)


def test_the_file_stays_small(choice, monkeypatch, tmp_path):
    monkeypatch.setattr(choices, "MAX_ENTRIES", 3)
    for key in "abcde":
        process(choice, key=key)
    assert [name.split(" | ")[1] for name in json.loads((tmp_path / "choices.json").read_text())] == ["c", "d", "e"]


# A busy machine -------------------------------------------------------------------------------------------------------


def test_noise_decides_nothing(choice, tmp_path):
    assert process(choice, NOISE) == ("slow", True)
    assert kept(tmp_path)["option"] is None
    assert process(choice) == ("quick", True)


def test_a_slow_winner_is_used_by_one_process_only(choice):
    """The clock lies once, without noise: the next process measures again, and disagrees."""
    lie = {"slow": SLOW, "absent": QUICK}
    assert process(choice, lie) == ("absent", True)
    assert process(choice, WRONG) == ("slow", True)
    assert process(choice, lie) == ("slow", False)


def test_processes_pause_after_three_measurements_that_were_not_clean(choice, monkeypatch):
    assert [process(choice, NOISE) for _ in range(4)] == [("slow", True)] * 3 + [("slow", False)]
    later = time.time() + choices.PAUSE + 1
    monkeypatch.setattr(choices.time, "time", lambda: later)
    assert process(choice) == ("quick", True)


@pytest.mark.parametrize("days", [8, -1])
def test_an_old_result_is_measured_again(choice, monkeypatch, tmp_path, days):
    """Of an old result only the age is doubtful: it decides until a clean measurement replaces it."""
    process(choice)
    assert process(choice) == ("quick", True)
    assert process(choice) == ("quick", False)
    now = time.time() + 24 * 3600 * days
    monkeypatch.setattr(choices.time, "time", lambda: now)
    assert process(choice, NOISE) == ("quick", True)
    assert process(choice, NOISE) == ("quick", False)  # after a pause
    now += choices.PAUSE + 1
    assert process(choice, WRONG) == ("slow", True)
    assert kept(tmp_path)["option"] == "slow"


@pytest.mark.parametrize("what", ["another processor", "fewer CPUs"])
def test_another_machine_measures_for_itself(choice, monkeypatch, what):
    process(choice)
    process(choice)
    if what == "another processor":
        monkeypatch.setattr(choices, "machine", lambda: "another")
    else:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4, 5, 6}, raising=False)
        choices.machine.cache_clear()
    try:
        assert process(choice) == ("quick", True)
    finally:
        monkeypatch.undo()
        choices.machine.cache_clear()


def test_a_busy_machine_measures_nothing(choice, monkeypatch, tmp_path):
    monkeypatch.setattr(choices, "is_busy", lambda: True)
    candidates = Candidates()
    assert [choice("", candidates) for _ in range(3)] == ["slow"] * 3
    assert candidates.calls == 0
    assert not (tmp_path / "choices.json").exists()


def test_a_process_measures_for_a_limited_time(choice, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(choices.time, "perf_counter", lambda: clock[0])

    def slow(functions):
        clock[0] += 0.1
        return CLEAN

    monkeypatch.setattr(choices, "clock_turns", slow)
    candidates = Candidates()
    assert [choice(key, candidates) for key in "abcdef"] == ["quick"] * 3 + ["slow"] * 3
    assert candidates.calls == 3


def test_one_process_measures_at_a_time(choice, tmp_path):
    """While a process holds the lock, others take the default without waiting; the lock ends with its process."""
    code = (
        "import sys; from pathlib import Path; from fastuper_kernels.dispatch.files import lock\n"
        "with lock(Path(sys.argv[1])) as free: print(free, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "choices.lock")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        candidates = Candidates()
        assert choice("", candidates) == "slow"
        assert candidates.calls == 0
        other.kill()
    assert process(choice) == ("quick", True)


CASES = {
    "clean": (CLEAN, "quick"),
    "the default is faster": (WRONG, "slow"),
    "a tie": ({"slow": [1.0] * 6, "quick": [0.96] * 6}, "slow"),
    "noise": (NOISE, None),
    "the winner's lead is within the spread": (
        {"slow": [1.0, 1.1, 1.12, 1.0, 1.1, 1.0], "quick": [0.95, 1.0, 0.95, 0.9, 0.96, 0.95]},
        None,
    ),
    "a third way is noisy": ({**CLEAN, "absent": [3.0, 90.0, 4.0, 50.0, 70.0, 3.0]}, "quick"),
    "both are noisy in one pattern": ({"slow": [2.0, 8.0] * 4, "quick": [1.0, 4.0] * 4}, None),
    "the last rounds are busy": ({"slow": [2.0] * 4 + [9.0] * 4, "quick": [1.0] * 4 + [9.0] * 4}, None),
    "too few rounds": ({"slow": [2.0] * 4, "quick": [1.0] * 4}, None),
    "nothing": ({}, None),
    "no default": ({"quick": QUICK, "absent": SLOW}, "quick"),
    "below the clock's resolution": ({"slow": [0.0] * 6, "quick": [0.0] * 6}, None),
    "no number": ({"slow": [float("nan")] * 6, "quick": QUICK}, None),
}


@pytest.mark.parametrize(("times", "expected"), CASES.values(), ids=CASES.keys())
def test_verdicts(times, expected):
    verdict = measuring.judge(times, "slow")
    assert (None if verdict is None else verdict.option) == expected


class Machine:
    """A clock that calls advance, and threads that wait."""

    def __init__(self, monkeypatch):
        self.now = self.waited = 0.0
        self.calls = []
        monkeypatch.setattr(measuring.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(measuring, "_seconds_waited", lambda: self.waited)

    def function(self, name, seconds, first=0.0, waited=0.0):
        def call():
            self.now += seconds if name in self.calls else seconds + first
            self.waited += waited
            self.calls.append(name)

        return call


def test_turns(monkeypatch):
    machine = Machine(monkeypatch)
    times = measuring.clock_turns({"a": machine.function("a", 0.004, 0.02), "b": machine.function("b", 0.001)})
    assert times is not None
    assert set(map(len, times.values())) == {20}  # 0.1 s
    assert times["a"] == pytest.approx([0.004] * 20)
    rounds = [tuple(machine.calls[i : i + 2]) for i in range(2, 42, 2)]
    assert set(rounds) == {("a", "b"), ("b", "a")}
    assert rounds != [rounds[0], rounds[1]] * 10


def test_a_long_call_is_not_repeated(monkeypatch):
    machine = Machine(monkeypatch)
    assert measuring.clock_turns({"a": machine.function("a", 12.0), "b": machine.function("b", 0.7)}) is None
    assert machine.calls == ["a"]


@pytest.mark.parametrize(("seconds", "clean"), [(0.02, True), (0.03, False), (0.045, False)])
def test_the_time_of_a_measurement_is_limited(monkeypatch, seconds, clean):
    machine = Machine(monkeypatch)
    times = measuring.clock_turns({name: machine.function(name, seconds) for name in "ab"})
    assert (times is not None) == clean
    assert machine.now < 0.4


def test_threads_that_wait_for_a_processor(monkeypatch):
    machine = Machine(monkeypatch)
    assert measuring.clock_turns({"a": machine.function("a", 0.004, waited=0.001)}) is None


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts the threads that run")
def test_other_processes_make_the_machine_busy(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 10_000)
    assert not measuring.is_busy()
    monkeypatch.setattr(os, "cpu_count", lambda: torch.get_num_threads())
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            assert any(measuring.is_busy() for _ in range(200))  # it may have to start first
        finally:
            other.kill()


def test_an_unknown_option_in_the_file_is_measured_again(choice, tmp_path):
    choice("", Candidates())
    path = tmp_path / "choices.json"
    path.write_text(path.read_text().replace('"quick"', '"gone"'))
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
    assert [path.name for path in tmp_path.iterdir()] == ["choices.lock"]


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
    (row,) = (row for row in rows if row[2].startswith("measured for float32"))
    assert row[1] == "the default"  # in a new process, if it does not confirm the result
    assert "slow 2.01e+03 ms, quick 1e+03 ms; spread 1%, 6 rounds, 20" in row[2]
    assert row[2].endswith(", found once)")
    process(choice, key="float32")
    (row,) = (row for row in choices.rows() if row[2].startswith("measured for float32"))
    assert row[1] == "quick"
    monkeypatch.setenv("FASTUPER_CHOICES", "walk=absent")
    assert ("walk", "absent", "forced by FASTUPER_CHOICES") in choices.rows()


def test_the_command():
    command = [sys.executable, "-m", "fastuper_kernels"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    assert re.search(r"^ *linear +torch \| conv \| onednn \| float32 +options *$", done.stdout, re.MULTILINE)
    assert "linear: float32 is for float16 operands" in done.stdout  # a forced option may not be taken
    assert not done.stderr

"""Choices between ways to compute the same result: the fastest on this machine is measured, shown, and forced.

A `Choice` has a name, options, and a default that applies if nothing may be measured. `choices.json` in the cache
folder has a measured result for each processor, PyTorch version, number of threads and key (a dtype, say). The cache
folder is `$FASTUPER_CACHE`, or the user's own (Linux: `~/.cache/fastuper`). `FASTUPER_CHOICES="linear=onednn,..."`
forces options. `python -m fastuper_kernels` prints each choice and the option that it takes here.

A busy moment must not slow later runs. So a result is kept only if its measurement is clean
(`fastuper_kernels.dispatch.measuring`); else the default decides in this process, and a later process measures again.
A kept result that replaces the default must be found a second time, by another process, before it is trusted. Each
result is measured again after `AGE` seconds.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastuper_kernels.dispatch.files import cache_folder, lock, read_json, replace_json
from fastuper_kernels.dispatch.measuring import Times, Verdict, clock_turns, is_busy, judge
from fastuper_kernels.dispatch.modes import is_eager
from fastuper_kernels.dispatch.terminal import print_table

FORCED = "FASTUPER_CHOICES"
AGE = 7 * 24 * 3600.0  # seconds after which a kept result is measured again
TRIES = 3  # measurements that were not clean, after which processes wait for `PAUSE` seconds
PAUSE = 3600.0
SECONDS_A_PROCESS = 0.3  # for all measurements of a process together; once they are spent, nothing more is measured
MAX_ENTRIES = 500  # in the file; the oldest are dropped

CHOICES: dict[str, Choice] = {}

Candidates = Callable[[], Mapping[str, Callable[[], object]]]
Clock = Callable[[Mapping[str, Callable[[], object]]], Times | None]


@dataclass(frozen=True)
class Choice:
    """A choice between ways to compute the same result.

    Args:
        name: the name in `FASTUPER_CHOICES`, in the cache file and in the printed table.
        options: the names of the ways.
        default: the option if nothing is measured, for keys that are called without a default of their own. Nothing may
            be measured in deterministic mode, on several ranks and while tracing; nothing is on a busy machine.
        reason: the measurement or heuristic behind the default, in a few words.

    Raises:
        ValueError: the name is taken.
    """

    name: str
    options: tuple[str, ...]
    default: str
    reason: str
    _decided: dict[tuple[str, int], str] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.name in CHOICES:
            raise ValueError(f"there is a choice {self.name!r} already")
        CHOICES[self.name] = self

    def __call__(self, key: str, candidates: Candidates, clock: Clock | None = None, default: str | None = None) -> str:
        """Return the option to take.

        Args:
            key: the part of the problem that the result depends on: a dtype, a class of shapes.
            candidates: makes a function for each option that can run here, on a representative shape that takes about
                a millisecond. It is called only for a measurement, and must draw no global random numbers.
            clock: returns the seconds of several calls of each candidate, or None if the machine is busy; if None, this
                is `clock_turns`, within the process's `SECONDS_A_PROCESS`.
            default: the option if nothing is measured, where a heuristic knows better for this key than the choice's
                default.

        Raises:
            ValueError: `FASTUPER_CHOICES` names an unknown choice or option.
        """
        if os.environ.get(FORCED) and self.name in (given := forced()):
            return given[self.name]
        default = default or self.default
        if not may_measure():
            return default
        state = (key, torch.get_num_threads())
        if (decided := self._decided.get(state)) is not None:
            return decided
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # a CUDA graph
            return default
        return self._decide(state, default, candidates, clock)

    def _decide(self, state: tuple[str, int], default: str, candidates: Candidates, clock: Clock | None) -> str:
        with _lock:  # two measurements at once would disturb each other
            if state not in self._decided:
                entry = f"{self.name} | {state[0]} | {machine()} | {state[1]} threads"
                self._decided[state] = self._option(entry, default, candidates, clock)
            return self._decided[state]

    def _option(self, entry: str, default: str, candidates: Candidates, clock: Clock | None) -> str:
        """Return the option for this process: the file's, if it is trusted; else that of a measurement."""
        path = cache_file()
        kept = result_of(read_json(path), entry, self)
        if kept is not None and not kept.is_due():
            return kept.option or default
        otherwise = kept.option if kept is not None and kept.option and kept.is_trusted() else default
        with contextlib.nullcontext(True) if path is None else lock(path.with_suffix(".lock")) as free:
            # While another process measures, this process neither waits nor measures.
            if not free or (clock is None and not _may_spend()):
                return otherwise
            verdict = _measured(default, candidates, clock)
            write_cache(entry, _next(kept, verdict, default))
        return otherwise if verdict is None else verdict.option

    def forget(self) -> None:
        """Drop this process's results: the next call reads the file, or measures again."""
        self._decided.clear()


_lock = threading.RLock()
_spent = [0.0]  # seconds of this process's measurements

LINEAR = Choice(
    "linear",
    options=("torch", "conv", "onednn", "float32"),
    default="onednn",
    reason="one call of oneDNN with the activation in it; float32 for float16 without instructions for it",
)
CONV3X3 = Choice(
    "conv3x3",
    options=("winograd", "direct"),
    default="winograd",
    reason="24 products instead of 72; direct for small products, whose transforms cost more than that saves",
)
WINOGRAD_PRODUCT = Choice(
    "winograd_product",
    options=("linear", "blas"),
    default="linear",
    reason="the fastest linear layer; BLAS (MKL) adds a product to another in place",
)
CONV = Choice(
    "conv",
    options=("triton", "cudnn"),
    default="triton",
    reason="on a GPU, one kernel for the convolution and its epilogue; cuDNN needs a second kernel",
)

# Operands that an option, forced or not, cannot take; `python -m fastuper_kernels` prints these lines.
LIMITS = (
    "linear: float32 is for float16 operands on a processor without float16 instructions. conv and onednn are for",
    "  float32, and for bfloat16 and float16 if oneDNN computes in these, with contiguous weights. Else torch runs.",
    "  In float32 conv and onednn take the first 256 shapes of operands of a process; torch runs for later shapes.",
)


def may_measure() -> bool:
    """Return True if a measured result may decide.

    The result is False while tracing, in deterministic mode (whose results must not depend on a clock), and on several
    ranks (which would have to agree). During the capture of a CUDA graph an earlier result decides, and nothing is
    measured.
    """
    if not is_eager() or torch.are_deterministic_algorithms_enabled():
        return False
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)


def _measured(default: str, candidates: Candidates, clock: Clock | None) -> Verdict | None:
    """Return the verdict on a measurement; None if it was not clean."""
    start = time.perf_counter()
    with torch.autocast("cpu", enabled=False), torch.inference_mode(False), torch.no_grad():
        times = (clock or clock_turns)(candidates())
    if clock is None:
        _spent[0] += time.perf_counter() - start
    return None if times is None else judge(times, default)


def _may_spend() -> bool:
    """Return True if the process has time left for a measurement, and the machine is idle."""
    if _spent[0] >= SECONDS_A_PROCESS:
        return False
    start = time.perf_counter()
    busy = is_busy()
    _spent[0] += time.perf_counter() - start
    return not busy


def forced() -> dict[str, str]:
    """Return {choice: option} of `FASTUPER_CHOICES`.

    Raises:
        ValueError: the variable names an unknown choice or option; the message lists the known ones.
    """
    return _parse_forced(os.environ.get(FORCED, ""))


@functools.lru_cache(maxsize=8)
def _parse_forced(text: str) -> dict[str, str]:
    given = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, option = (part.strip() for part in item.partition("="))
        if name not in CHOICES:
            raise ValueError(f"{FORCED}={text!r}: no choice {name!r}; known are {', '.join(sorted(CHOICES))}")
        if option not in CHOICES[name].options:
            raise ValueError(f"{FORCED}={text!r}: {name} is one of {', '.join(CHOICES[name].options)}, not {option!r}")
        given[name] = option
    return given


@functools.cache
def machine() -> str:
    """Return the processor, the instruction set that PyTorch uses on it, and PyTorch's version."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        first, _, _ = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")
        facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
        # A virtual machine's model name can be as short as "AMD EPYC".
        processor = " ".join(filter(None, map(facts.get, ("model name", "cpu family", "model")))) or processor
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{processor} {capability}, {_processors()} | torch {torch.__version__}"


def _processors() -> str:
    """Return the processors that this process may use: their number, highest frequency and a container's limit."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = [f"{count} CPUs"]
    with contextlib.suppress(OSError, ValueError):
        kilohertz = Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").read_text()
        words.append(f"{int(kilohertz) // 1000} MHz")
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        words.append(f"at most {int(quota) / int(period):.3g} of them")  # "max" is no number: there is no limit
    return ", ".join(words)


def cache_file() -> Path | None:
    """Return the file of measured choices; None if the user has no home folder."""
    folder = cache_folder()
    return None if folder is None else folder / "choices.json"


@dataclass(frozen=True)
class Result:
    """What the file holds about one entry.

    Attributes:
        option: the option; None if no measurement was clean.
        date: seconds since 1970, when it was measured.
        times: 2 if the option was found twice or is the default, else 1; without an option, the number of measurements.
        verdict: the measurement; None without an option.
    """

    option: str | None
    date: float
    times: int
    verdict: Verdict | None = None

    def is_trusted(self) -> bool:
        """Return True if the option is the default, or was found twice."""
        return self.option is not None and self.times >= 2

    def is_due(self) -> bool:
        """Return True if a process should measure again. A date in the future is a wrong date."""
        age = time.time() - self.date
        if self.option is None:
            return self.times < TRIES or not 0 <= age < PAUSE
        return not self.is_trusted() or not 0 <= age < AGE

    def __str__(self) -> str:
        day = time.strftime("%Y-%m-%d", time.gmtime(self.date))
        if self.verdict is None:
            return f"no clean measurement, {day}"
        times = ", ".join(f"{way} {value:.3g} ms" for way, value in self.verdict.milliseconds.items())
        trust = "" if self.times > 1 else ", found once"
        return f"{times}; spread {self.verdict.spread:.0%}, {self.verdict.rounds} rounds, {day}{trust}"


def _next(kept: Result | None, verdict: Verdict | None, default: str) -> Result:
    """Return the result to keep after a measurement that followed the result `kept`."""
    now = time.time()
    if verdict is not None:
        again = kept is not None and kept.option == verdict.option
        return Result(verdict.option, now, 2 if again or verdict.option == default else 1, verdict)
    if kept is not None and kept.is_trusted():  # it stays, and is measured again after a pause
        return replace(kept, date=now - AGE + PAUSE)
    return Result(None, now, 1 if kept is None or kept.option is not None else min(kept.times, TRIES) + 1)


def result_of(entries: Mapping[str, Any], entry: str, choice: Choice) -> Result | None:
    """Return an entry of the file; None if it is missing, damaged, or of another format."""
    with contextlib.suppress(TypeError, ValueError, KeyError, OverflowError):
        value = entries[entry]
        option, date, times = value["option"], float(value["date"]), int(value["times"])
        time.gmtime(date)
        if option is None:
            return Result(None, date, times)
        milliseconds = {
            str(way): float(value["milliseconds"][way]) for way in choice.options if way in value["milliseconds"]
        }
        verdict = Verdict(option, milliseconds, float(value["spread"]), int(value["rounds"]))
        return Result(option, date, times, verdict) if option in milliseconds else None
    return None


def write_cache(entry: str, result: Result) -> None:
    """Add a result to the file, without entries of other formats; a folder that cannot be written to is no error."""
    path = cache_file()
    if path is None:
        return
    value: dict[str, Any] = {"option": result.option, "date": result.date, "times": result.times}
    if result.verdict is not None:
        milliseconds, spread, rounds = result.verdict.milliseconds, result.verdict.spread, result.verdict.rounds
        value.update(milliseconds=milliseconds, spread=spread, rounds=rounds)
    entries = {**read_json(path), entry: value}
    dates = {name: _date(value) for name, value in entries.items()}
    newest = sorted((name for name in entries if dates[name] is not None), key=lambda name: -(dates[name] or 0))
    with contextlib.suppress(OSError):
        replace_json(path, {name: entries[name] for name in sorted(newest[:MAX_ENTRIES])})


def _date(value: Any) -> float | None:
    date = value.get("date") if isinstance(value, dict) else None
    return float(date) if isinstance(date, float) and math.isfinite(date) else None


def rows(wanted: Iterable[Choice] | None = None) -> Iterator[tuple[str, str, str]]:
    """Yield (choice, option, when the option is taken) for the wanted choices (all if None).

    The first row of a choice has all of its options. Each further row has one option: the forced option, the default,
    or an option measured on this machine.
    """
    given, entries = forced(), read_json(cache_file())
    for choice in sorted(CHOICES.values() if wanted is None else wanted, key=lambda choice: choice.name):
        name = choice.name
        yield name, " | ".join(choice.options), "options"
        if name in given:
            yield name, given[name], f"forced by {FORCED}"
        yield name, choice.default, f"if nothing is measured ({choice.reason})"
        for entry in sorted(entries):
            parts = entry.split(" | ")
            if parts[0] == name and machine() in entry and entry.isprintable():
                result = result_of(entries, entry, choice)
                if result is not None:
                    option = result.option if result.is_trusted() else None
                    yield name, option or "the default", f"measured for {parts[1]}, {parts[-1]} ({result})"


def show(wanted: Iterable[Choice] | None = None) -> None:
    """Print the table of `rows`, the machine, and the file of measured results."""
    print_table("Choices", ("choice", "option", "when"), rows(wanted))
    print(f"machine: {machine()}", f"measured results: {cache_file()}", sep="\n")

"""Choices between ways to compute the same result: the fastest on this machine is measured once, shown, and forced.

A `Choice` has a name, options, and a default that applies if nothing may be measured. `choices.json` in the cache
folder has a measured result for each processor, PyTorch version, number of threads and key (a dtype, say). The cache
folder is `$FASTUPER_CACHE`, or the user's own (Linux: `~/.cache/fastuper`). `FASTUPER_CHOICES="linear=onednn,..."`
forces options. `python -m fastuper_kernels` prints each choice and the option that it takes here.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastuper_kernels.dispatch.files import cache_folder, replace_json
from fastuper_kernels.dispatch.modes import is_eager
from fastuper_kernels.dispatch.terminal import print_table

FORCED = "FASTUPER_CHOICES"
SECONDS = 0.1  # for the measurement of one choice, beside the first call of each option
MARGIN = 0.95  # an option replaces the default if it takes less than this share of the default's time
CHOICES: dict[str, Choice] = {}

Candidates = Callable[[], Mapping[str, Callable[[], object]]]
Clock = Callable[[Mapping[str, Callable[[], object]]], dict[str, float]]


@dataclass(frozen=True)
class Choice:
    """A choice between ways to compute the same result.

    Args:
        name: the name in `FASTUPER_CHOICES`, in the cache file and in the printed table.
        options: the names of the ways.
        default: the option if nothing may be measured: in deterministic mode, on several ranks, while tracing.
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

    def __call__(self, key: str, candidates: Candidates, clock: Clock | None = None) -> str:
        """Return the option to take.

        Args:
            key: the part of the problem that the result depends on: a dtype, a class of shapes.
            candidates: makes a function for each option that can run here, on a representative shape that takes about
                a millisecond. It is called only for a measurement, and must draw no global random numbers.
            clock: returns the seconds per call of each candidate; `time_each` if None.

        Raises:
            ValueError: `FASTUPER_CHOICES` names an unknown choice or option.
        """
        if os.environ.get(FORCED) and self.name in (given := forced()):
            return given[self.name]
        if not may_measure():
            return self.default
        state = (key, torch.get_num_threads())
        if (decided := self._decided.get(state)) is not None:
            return decided
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # a CUDA graph
            return self.default
        return self._decide(state, candidates, clock or time_each)

    def _decide(self, state: tuple[str, int], candidates: Candidates, clock: Clock) -> str:
        with _lock:  # two measurements at once would disturb each other
            if state not in self._decided:
                entry = f"{self.name} | {state[0]} | {machine()} | {state[1]} threads"
                result: dict[str, Any] = read_cache().get(entry)  # type: ignore[assignment]
                if not _is_result(result, self.options):
                    result = self._measure(candidates, clock)
                    write_cache(entry, result)
                self._decided[state] = result["option"]
            return self._decided[state]

    def _measure(self, candidates: Candidates, clock: Clock) -> dict[str, Any]:
        with torch.autocast("cpu", enabled=False), torch.inference_mode(False), torch.no_grad():
            seconds = clock(candidates())
        best = min(seconds, key=seconds.__getitem__)
        if self.default in seconds and seconds[best] > MARGIN * seconds[self.default]:
            best = self.default
        return {"option": best, "milliseconds": {name: round(1e3 * value, 4) for name, value in seconds.items()}}

    def forget(self) -> None:
        """Drop this process's results: the next call reads the file, or measures again."""
        self._decided.clear()


_lock = threading.RLock()

LINEAR = Choice(
    "linear",
    options=("torch", "conv", "onednn", "float32"),
    default="onednn",
    reason="one call of oneDNN with the activation in it was the fastest on AVX-512",
)
CONV3X3 = Choice(
    "conv3x3",
    options=("winograd", "direct"),
    default="winograd",
    reason="24 products instead of 72 are faster from 128 channels and 32 tiles on",
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


def time_each(functions: Mapping[str, Callable[[], object]], seconds: float = SECONDS) -> dict[str, float]:
    """Return the shortest time of each function in seconds. Calls alternate: a busy moment slows all functions."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not all(times.values()):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in times.items()}


@functools.cache
def machine() -> str:
    """Return the processor, the instruction set that PyTorch uses on it, and PyTorch's version."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        first, _, _ = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")
        facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
        # A virtual machine's model name can be as short as "AMD EPYC".
        processor = " ".join(filter(None, map(facts.get, ("model name", "cpu family", "model")))) or processor
    return f"{processor} {torch.backends.cpu.get_cpu_capability()} | torch {torch.__version__}"


def cache_file() -> Path | None:
    """Return the file of measured choices; None if the user has no home folder."""
    folder = cache_folder()
    return None if folder is None else folder / "choices.json"


def read_cache() -> dict[str, Any]:
    """Return the measured results {entry: result}; an empty dict if the file is missing, unreadable or malformed."""
    path = cache_file()
    with contextlib.suppress(OSError, ValueError):
        entries = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
        return entries if isinstance(entries, dict) else {}
    return {}


def write_cache(entry: str, result: dict[str, Any]) -> None:
    """Add a result to the file; a folder that cannot be written to is no error."""
    path = cache_file()
    if path is None:
        return
    with contextlib.suppress(OSError):
        replace_json(path, {**read_cache(), entry: result})


def _is_result(value: Any, options: tuple[str, ...]) -> bool:
    return isinstance(value, dict) and value.get("option") in options


def rows(wanted: Iterable[Choice] | None = None) -> Iterator[tuple[str, str, str]]:
    """Yield (choice, option, when the option is taken) for the wanted choices (all if None).

    The first row of a choice has all of its options. Each further row has one option: the forced option, the default,
    or an option measured on this machine.
    """
    given, entries = forced(), read_cache()
    for choice in sorted(CHOICES.values() if wanted is None else wanted, key=lambda choice: choice.name):
        name = choice.name
        yield name, " | ".join(choice.options), "options"
        if name in given:
            yield name, given[name], f"forced by {FORCED}"
        yield name, choice.default, f"if nothing is measured ({choice.reason})"
        for entry, result in sorted(entries.items()):
            parts = entry.split(" | ")
            if parts[0] == name and machine() in entry and _is_result(result, choice.options):
                times = ", ".join(f"{way} {value:.3g} ms" for way, value in result.get("milliseconds", {}).items())
                yield name, result["option"], f"measured for {parts[1]}, {parts[-1]} ({times})"


def show(wanted: Iterable[Choice] | None = None) -> None:
    """Print the table of `rows`, the machine, and the file of measured results."""
    print_table("Choices", ("choice", "option", "when"), rows(wanted))
    print(f"machine: {machine()}", f"measured results: {cache_file()}", sep="\n")

"""Which of several ways that compute the same thing is the fastest on this machine: measured once, shown and forced.

A `Choice` has a name, its options, and the option that decides where nothing was measured. What was measured is kept
for each processor, version of PyTorch, number of threads and key (a dtype, say) in `$FASTUPER_CACHE/choices.json`, or
`~/.cache/fastuper/choices.json`. `FASTUPER_CHOICES="linear=onednn,..."` forces options, and
`python -m fastuper_kernels` shows what decides here.
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

from fastuper_kernels.dispatch.files import atomic_path
from fastuper_kernels.dispatch.modes import is_eager

FORCED = "FASTUPER_CHOICES"
SECONDS = 0.1  # what measuring one choice may take, beside a first call of each option
MARGIN = 0.95  # another option than the default has to take less than this much of its time
CHOICES: dict[str, Choice] = {}

Candidates = Callable[[], Mapping[str, Callable[[], object]]]
Clock = Callable[[Mapping[str, Callable[[], object]]], dict[str, float]]


@dataclass(frozen=True)
class Choice:
    """A choice between ways to compute the same thing.

    Args:
        name: what it is forced and shown under.
        options: the names of the ways.
        default: the way where nothing was measured: in deterministic mode, on several ranks, while tracing.
        why: the heuristic behind the default, in a few words.

    Raises:
        ValueError: the name is taken.
    """

    name: str
    options: tuple[str, ...]
    default: str
    why: str
    _decided: dict[tuple[str, int], str] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.name in CHOICES:
            raise ValueError(f"there is a choice {self.name!r} already")
        CHOICES[self.name] = self

    def __call__(self, key: str, candidates: Candidates, clock: Clock | None = None) -> str:
        """Return the option to take.

        Args:
            key: what the answer depends on beside the machine: a dtype, a class of shapes.
            candidates: makes a function for each option that can run here, on a representative shape of a millisecond
                or so; called only where something is measured. It must draw from no global random numbers.
            clock: what times them, in seconds a call; `time_each` where not given.

        Raises:
            ValueError: `FASTUPER_CHOICES` names a choice or an option that is not known.
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
        with _lock:  # two threads that measure at once would disturb each other
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
        """Forget what this process knows, so that the file is read, or the options are measured, again."""
        self._decided.clear()


_lock = threading.RLock()


def may_measure() -> bool:
    """Return whether a measured choice may decide here.

    Not while tracing; not in deterministic mode, whose results must not depend on a stopwatch; not where several
    ranks would have to agree. (During the capture of a CUDA graph what was measured before decides, and nothing is.)
    """
    if not is_eager() or torch.are_deterministic_algorithms_enabled():
        return False
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)


def forced() -> dict[str, str]:
    """Return {choice: option} of `FASTUPER_CHOICES`.

    Raises:
        ValueError: it names a choice or an option that is not known; the message lists those that are.
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
    """Return the shortest time of each function, in seconds: called in turn, so that a busy moment meets them all."""
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
    """Return the processor, the instructions that PyTorch uses of it, and PyTorch's version."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        first, _, _ = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")
        facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
        # A virtual machine's model name can be as short as "AMD EPYC".
        processor = " ".join(filter(None, map(facts.get, ("model name", "cpu family", "model")))) or processor
    return f"{processor} {torch.backends.cpu.get_cpu_capability()} | torch {torch.__version__}"


def cache_file() -> Path | None:
    """Return where measured choices are kept; None where there is no home."""
    try:
        folder = os.environ.get("FASTUPER_CACHE") or Path.home() / ".cache" / "fastuper"
    except RuntimeError:
        return None
    return Path(folder) / "choices.json"


def read_cache() -> dict[str, Any]:
    """Return what was measured before; nothing where the file cannot be read or is no such file."""
    path = cache_file()
    with contextlib.suppress(OSError, ValueError):
        entries = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
        return entries if isinstance(entries, dict) else {}
    return {}


def write_cache(entry: str, result: dict[str, Any]) -> None:
    """Add a result to the file. A read-only home is tolerated."""
    path = cache_file()
    if path is None:
        return
    with contextlib.suppress(OSError):
        replace_json(path, {**read_cache(), entry: result})


def replace_json(path: Path, value: Any) -> None:
    """Write a value to a file, in one step that no reader sees half done.

    Raises:
        OSError: it cannot be written; the file is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _is_result(value: Any, options: tuple[str, ...]) -> bool:
    return isinstance(value, dict) and value.get("option") in options


def table(wanted: Iterable[Choice] | None = None) -> Iterator[str]:
    """Yield the lines that say, for each choice that is wanted (all), what was measured here and what decides."""
    given, entries = forced(), read_cache()
    for choice in sorted(CHOICES.values() if wanted is None else wanted, key=lambda choice: choice.name):
        name = choice.name
        yield f"{name}: {' | '.join(choice.options)}"
        if name in given:
            yield f"  {given[name]}: forced by {FORCED}"
        yield f"  {choice.default}: where nothing is measured ({choice.why})"
        for entry, result in sorted(entries.items()):
            parts = entry.split(" | ")
            if parts[0] == name and machine() in entry and _is_result(result, choice.options):
                times = ", ".join(f"{way} {value:.3g} ms" for way, value in result.get("milliseconds", {}).items())
                yield f"  {result['option']}: measured for {parts[1]}, {parts[-1]} ({times})"
    yield f"kept in {cache_file()} for {machine()}"

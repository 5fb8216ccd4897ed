"""Times calls in alternating turns, A B C A B C ...: a machine that slows down meanwhile slows every call alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.machine import one_line

Call = Callable[[], Any]


class CannotDo(Exception):
    """A peer does not support a task; the message is the reason."""


def seconds_of(call: Call) -> float:
    """Return the wall seconds of one call, its output's release excluded.

    Garbage is collected before. A pause of 20 ms lets the previous call's threads, which still spin, fall asleep.
    """
    gc.collect()
    time.sleep(0.02)
    start = time.perf_counter()
    output = call()
    seconds = time.perf_counter() - start
    del output
    return seconds


def turns(
    clocks: Mapping[str, Callable[[], float]],
    rounds: int,
    failed: Callable[[str, Exception], None] | None = None,
) -> Iterator[tuple[str, float]]:
    """Yield the name and the seconds of each turn; in a round every clock has one turn.

    Args:
        clocks: a function for each name that times one turn and returns its seconds.
        rounds: how many turns each name has.
        failed: called with the name and the exception of a turn that raises. That name has no further turns. If None,
            the exception propagates.
    """
    left = dict(clocks)
    for _ in range(rounds):
        for name, clock in list(left.items()):
            try:
                seconds = clock()
            except Exception as error:
                if failed is None:
                    raise
                failed(name, error)
                del left[name]
                continue
            yield name, seconds


def quantile(seconds: Sequence[float], share: float) -> float:
    """Return a quantile, interpolated linearly between the two nearest values; `share` is between 0 and 1."""
    ordered = sorted(seconds)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def rounded(seconds: float) -> float:
    """Return seconds with the five significant digits that results files keep."""
    return float(f"{seconds:.5g}")


def medians(peers: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the median of each peer's "rounds"; peers without rounds are left out."""
    return {name: statistics.median(row["rounds"]) for name, row in peers.items() if row.get("rounds")}


@dataclass
class Timed:
    """A task's result: each peer's seconds and the facts about its output, or the reason why it was skipped."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def alternate(
    builders: Mapping[str, Callable[[], tuple[Call, Call]]],
    rounds: int,
    examine: Callable[[str, Call], dict[str, Any]],
) -> Timed:
    """Build and warm up peers, time them in turns, and examine their outputs. A peer that fails is skipped.

    Args:
        builders: for each peer a function that returns the call to time and the call that warms it up.
        rounds: how many times each peer is timed.
        examine: takes a peer's name and its call, and returns facts about the output for the results. It runs after all
            rounds, so that each turn follows another peer's turn and not a comparison.
    """
    result, calls = Timed(), {}

    def skip(name: str, error: Exception) -> None:
        result.skipped[name] = str(error) if isinstance(error, CannotDo) else one_line(error)
        result.seconds.pop(name, None)
        calls.pop(name, None)

    with torch.inference_mode():
        for name, build in builders.items():
            try:
                call, warm_up = build()
                warm_up()
                calls[name] = call
            except Exception as error:  # the other peers are timed all the same
                skip(name, error)
        clocks = {name: lambda call=call: seconds_of(call) for name, call in calls.items()}
        for name, seconds in turns(clocks, rounds, skip):
            result.seconds.setdefault(name, []).append(seconds)
        for name, call in calls.items():
            try:
                result.facts[name] = examine(name, call)
            except Exception as error:  # the times stand without the comparison
                result.facts[name] = {"not_compared": one_line(error)}
    return result

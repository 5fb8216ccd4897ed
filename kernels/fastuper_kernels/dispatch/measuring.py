"""Measurements of several ways to compute the same result, and the evidence that the machine was idle meanwhile.

A busy machine slows the ways unequally: threads that wait for each other at a barrier wait for whole time slices. So a
measurement counts only if it is clean. `clock_turns` and `judge` say what that means.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

Functions = Mapping[str, Callable[[], object]]
Times = Mapping[str, Sequence[float]]

SECONDS = 0.1  # of turns in one measurement
LONGEST = 0.05  # seconds of the first call of an option; a longer call ends the measurement
ROUNDS = 5  # the fewest rounds that are judged
MARGIN = 0.95  # an option replaces the default if it takes less than this share of the default's time
SPREAD = 0.15  # of a clean measurement, at most
WAITING = 0.05  # share of the time that this process's threads may wait for a processor


@dataclass(frozen=True)
class Verdict:
    """A clean measurement.

    Attributes:
        option: the way to take.
        milliseconds: the median of each way.
        spread: the upper quartile less the shortest time, as a share of the slower way's median.
        rounds: how often each way was timed.
    """

    option: str
    milliseconds: dict[str, float]
    spread: float
    rounds: int


def clock_turns(functions: Functions) -> dict[str, list[float]] | None:
    """Return the seconds of each call of each function; None if the machine was busy or a call takes too long.

    The functions take turns, in a random order in each round: a busy moment, or a pattern of busy moments, cannot hit
    the calls of one function alone.
    """
    begin, waited = time.perf_counter(), _seconds_waited()
    for function in functions.values():
        first = time.perf_counter()
        function()
        if time.perf_counter() - first > LONGEST:
            return None
    times: dict[str, list[float]] = {name: [] for name in functions}
    order, shuffled, rounds = list(functions), random.Random(0), 0
    end = time.perf_counter() + SECONDS
    while rounds < ROUNDS or time.perf_counter() < end:
        if time.perf_counter() > end + SECONDS:  # too slow for the fewest rounds
            return None
        shuffled.shuffle(order)
        for name in order:
            start = time.perf_counter()
            functions[name]()
            times[name].append(time.perf_counter() - start)
        rounds += 1
    if _seconds_waited() - waited > WAITING * (time.perf_counter() - begin):
        return None
    return times


def judge(times: Times, default: str) -> Verdict | None:
    """Return the verdict on a measurement; None if it is not clean.

    It is clean if the times of the fastest way and of the default spread little. Another way than the default must also
    be faster by more than the spread, and in four of five rounds.
    """
    rounds = min(map(len, times.values()), default=0)
    if rounds < ROUNDS or not all(math.isfinite(t) and t >= 0 for values in times.values() for t in values):
        return None
    middle = {name: statistics.median(values) for name, values in times.items()}
    best = min(middle, key=middle.__getitem__)
    rival = default if default in times else best
    slower = middle[rival]
    if slower == 0:  # below the clock's resolution
        return None
    spread = max(statistics.quantiles(times[name], n=4)[2] - min(times[name]) for name in (best, rival)) / slower
    if spread > SPREAD:
        return None
    option = rival
    if best != rival and middle[best] < MARGIN * slower:
        wins = sum(a < b for a, b in zip(times[best], times[rival], strict=False))
        if slower - middle[best] <= spread * slower or wins < 0.8 * rounds:
            return None
        option = best
    milliseconds = {name: round(1e3 * value, 4) for name, value in middle.items()}
    return Verdict(option, milliseconds, round(spread, 3), rounds)


# Evidence of other work -----------------------------------------------------------------------------------------------


def is_busy() -> bool:
    """Return True if other processes leave too few processors for this process's threads.

    Linux counts the threads that run or wait for a processor. The least of three looks counts, because any idle machine
    has moments of work. Elsewhere the result is False.
    """
    with suppress(OSError, ValueError, IndexError):
        free = []
        for _ in range(3):
            running = int(Path("/proc/loadavg").read_text().split()[3].split("/")[0])
            free.append((os.cpu_count() or 1) - (running - _own_running()))
            if free[-1] >= torch.get_num_threads():
                return False
            time.sleep(0.002)
        return max(free) < torch.get_num_threads()
    return False


def _own_running() -> int:
    """Return the number of this process's threads that run or wait for a processor."""
    count = 0
    for path in Path("/proc/self/task").iterdir():
        with suppress(OSError, IndexError):  # the thread may end meanwhile
            count += (path / "stat").read_text().rpartition(")")[2].split()[0] == "R"
    return count


def _seconds_waited() -> float:
    """Return the seconds that this process's threads have waited for a processor; 0 where no system counts them."""
    nanoseconds = 0
    with suppress(OSError):
        for path in Path("/proc/self/task").iterdir():
            with suppress(OSError, ValueError, IndexError):
                nanoseconds += int((path / "schedstat").read_text().split()[1])
    return nanoseconds / 1e9

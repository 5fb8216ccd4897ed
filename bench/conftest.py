"""How peers are timed beside each other, with pytest-benchmark.

pytest-benchmark times one test after the other, and a machine that grows slower meanwhile would favour whoever came
first. Here all peers of a task take turns, A B C A B C ...; then each peer's own test hands the seconds that it was
timed with to pytest-benchmark, through a timer that replays them. So its tables and its JSON hold every real round.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from bench.machine import machine
from bench.peers import CannotDo, one_line

SKIPPED = pytest.StashKey[dict[str, dict[str, str]]]()


@dataclass
class Timed:
    """A task's result: for each peer its seconds and what was found out about its outputs, or why there are none."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def alternate(
    builders: dict[str, Callable[[], tuple[Callable[[], Any], Callable[[], Any]]]],
    rounds: int,
    look: Callable[[str, Callable[[], Any]], dict[str, Any]],
) -> Timed:
    """Time calls in turns.

    Args:
        builders: for each peer a function that returns its call, and the call that warms it up.
        rounds: how often each is timed.
        look: is given a peer's name and its call, and returns what the results shall say about its output; asked when
            all rounds are over, so that nobody's turn follows a comparison instead of the peer before.
    """
    result, calls = Timed(), {}

    def give_up(name: str, error: Exception) -> None:
        result.skipped[name] = str(error) if isinstance(error, CannotDo) else one_line(error)
        result.seconds.pop(name, None)
        calls.pop(name, None)

    with torch.inference_mode():
        for name, build in builders.items():
            try:
                call, warm_up = build()
                warm_up()
                calls[name] = call
            except Exception as error:  # whatever a peer fails with, the others are timed
                give_up(name, error)
        for _ in range(rounds):
            for name, call in list(calls.items()):
                gc.collect()
                time.sleep(0.02)  # threads of the one before that still wait busily fall asleep
                try:
                    start = time.perf_counter()
                    output = call()
                    seconds = time.perf_counter() - start
                except Exception as error:
                    give_up(name, error)
                    continue
                result.seconds.setdefault(name, []).append(seconds)
                del output  # not before: giving its memory back is not what is timed
        for name, call in calls.items():
            try:
                result.facts[name] = look(name, call)
            except Exception as error:  # the times stand without their distance from float64
                result.facts[name] = {"not_compared": one_line(error)}
    return result


def readable(*parts: str) -> str:
    """Return a test's id, such that `-k` takes any part of it."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


class Replay:
    """A timer for pytest-benchmark, which reads it before and after each round."""

    def __init__(self, seconds: list[float]):
        self.readings = iter([reading for second in seconds for reading in (0.0, second)])

    def __call__(self) -> float:
        return next(self.readings)


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[dict[str, Any], str, Timed], None]:
    """Return a function that gives a peer's part of a task's result to pytest-benchmark, or skips the test."""

    def report(task: dict[str, Any], peer: str, timed: Timed) -> None:
        if peer in timed.skipped:
            request.config.stash[SKIPPED].setdefault(task["name"], {})[peer] = timed.skipped[peer]
            pytest.skip(timed.skipped[peer])
        seconds = timed.seconds[peer]
        request.node.add_marker(pytest.mark.benchmark(group=task["name"], timer=Replay(seconds)))
        benchmark = request.getfixturevalue("benchmark")
        benchmark.extra_info.update({"task": task, "peer": peer, **timed.facts.get(peer, {})})
        benchmark.pedantic(lambda: None, rounds=len(seconds))

    return report


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, help="time each peer this often, whatever the task says")
    parser.addoption("--peers", default="", help="time only the peers whose names hold one of these, separated by ;")
    parser.addoption("--sections", default="", help="run only the benchmarks of these sections, separated by commas")
    parser.addoption("--no-truth", action="store_true", help="leave out the comparison with float64")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SKIPPED] = {}
    config.addinivalue_line("markers", "section(name): the part of the results that a benchmark belongs to")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if wanted := config.getoption("--sections").split(",") if config.getoption("--sections") else []:
        marks = {item: item.get_closest_marker("section") for item in items}
        items[:] = [item for item in items if (mark := marks[item]) is not None and mark.args[0] in wanted]


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return machine()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["skipped"] = config.stash[SKIPPED]


@pytest.fixture(scope="session", autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield

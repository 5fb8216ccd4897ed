"""pytest-benchmark fixtures and options for the benchmarks in this folder.

pytest-benchmark times one test after the other: a machine that slows down favours the first peer. Here the first test
of a task times all its peers in alternating turns (`bench.timing.alternate`). Each peer's test then hands its seconds
to pytest-benchmark, through a timer that replays them. So tables and JSON hold every real round.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench.machine import machine
from bench.timing import Timed

SKIPPED = pytest.StashKey[dict[str, dict[str, str]]]()


def readable(*parts: str) -> str:
    """Return a test's id in lower case with dashes, so that `-k` can select by each part."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


class Replay:
    """A timer for pytest-benchmark that replays seconds; pytest-benchmark reads it before and after each round."""

    def __init__(self, seconds: list[float]):
        self.readings = iter([reading for second in seconds for reading in (0.0, second)])

    def __call__(self) -> float:
        return next(self.readings)


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[dict[str, Any], str, Timed], None]:
    """Return a function that hands a peer's seconds and facts to pytest-benchmark, or skips the test."""

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
    parser.addoption("--rounds", type=int, help="rounds of each peer, instead of the task's number")
    parser.addoption(
        "--peers", default="", help="time only peers whose names contain one of these texts, separated by ;"
    )
    parser.addoption("--sections", default="", help="run only these sections, separated by commas")
    parser.addoption("--no-truth", action="store_true", help="skip the comparison with float64")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SKIPPED] = {}
    config.addinivalue_line("markers", "section(name): the section of the results that a benchmark belongs to")


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

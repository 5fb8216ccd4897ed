"""Tests of bench.timing: the order of the turns, peers that fail, quantiles."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from bench.timing import CannotDo, alternate, medians, quantile, turns


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the collections, which take a second each among the objects of a whole test run."""
    monkeypatch.setattr("bench.timing.gc", SimpleNamespace(collect=lambda: None))


def test_every_turn_has_the_same_predecessor_and_comparisons_come_last():
    events: list[str] = []

    def builder(name: str) -> Callable[[], tuple[Callable[[], Any], Callable[[], Any]]]:
        def call() -> str:
            events.append(name)
            return name

        return lambda: (call, lambda: events.append(f"warm {name}"))

    def examine(name: str, call: Callable[[], Any]) -> dict[str, Any]:
        events.append(f"examine {call()}")
        return {"output": name}

    result = alternate({name: builder(name) for name in "ab"}, 3, examine)
    assert events == ["warm a", "warm b", *"ab" * 3, "a", "examine a", "b", "examine b"]
    assert {name: len(seconds) for name, seconds in result.seconds.items()} == {"a": 3, "b": 3}
    assert result.facts == {"a": {"output": "a"}, "b": {"output": "b"}}


def test_peers_that_fail_are_skipped_and_the_others_are_timed():
    runs = {"late": 0}

    def fail() -> Any:
        raise RuntimeError("no")

    def unable() -> Any:
        raise CannotDo("no such part")

    def late() -> Any:
        runs["late"] += 1
        if runs["late"] == 2:
            fail()

    def examine(name: str, call: Callable[[], Any]) -> dict[str, Any]:
        raise ValueError("not this")

    builders = {"never": fail, "unable": unable, "late": lambda: (late, int), "well": lambda: (int, int)}
    result = alternate(builders, 2, examine)
    assert result.skipped == {"never": "RuntimeError: no", "unable": "no such part", "late": "RuntimeError: no"}
    assert list(result.seconds) == ["well"]
    assert result.facts == {"well": {"not_compared": "ValueError: not this"}}, "its times stand"


def test_without_a_handler_errors_propagate():
    with pytest.raises(ZeroDivisionError):
        list(turns({"a": lambda: 1.0, "b": lambda: 1 / 0}, 2))


def test_medians_and_quantiles():
    assert medians({"a": {"rounds": [3.0, 1.0, 2.0]}, "b": {"skipped": "no"}}) == {"a": 2.0}
    assert [quantile([5.0, 1.0, 2.0, 3.0, 4.0], share) for share in (0.0, 0.2, 0.5, 0.8, 1.0)] == [
        1.0,
        1.8,
        3.0,
        4.2,
        5.0,
    ]
    assert quantile([7.0], 0.8) == 7.0

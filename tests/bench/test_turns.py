"""How the benchmark lets peers take turns."""

from collections.abc import Callable
from typing import Any

from bench.conftest import alternate


def test_every_turn_has_the_same_predecessor_and_comparisons_come_last():
    events: list[str] = []

    def builder(name: str) -> Callable[[], tuple[Callable[[], Any], Callable[[], Any]]]:
        def call() -> str:
            events.append(name)
            return name

        return lambda: (call, lambda: events.append(f"warm {name}"))

    def look(name: str, call: Callable[[], Any]) -> dict[str, Any]:
        events.append(f"look at {call()}")
        return {"output": name}

    result = alternate({name: builder(name) for name in "ab"}, 3, look)
    assert events == ["warm a", "warm b", *"ab" * 3, "a", "look at a", "b", "look at b"]
    assert {name: len(seconds) for name, seconds in result.seconds.items()} == {"a": 3, "b": 3}
    assert result.facts == {"a": {"output": "a"}, "b": {"output": "b"}}


def test_whoever_fails_is_left_out_and_the_others_go_on():
    runs = {"late": 0}

    def fail() -> Any:
        raise RuntimeError("no")

    def late() -> Any:
        runs["late"] += 1
        if runs["late"] == 2:
            fail()

    def look(name: str, call: Callable[[], Any]) -> dict[str, Any]:
        raise ValueError("not this")

    builders = {"never": fail, "late": lambda: (late, int), "well": lambda: (int, int)}
    result = alternate(builders, 2, look)
    assert result.skipped == {"never": "RuntimeError: no", "late": "RuntimeError: no"}
    assert list(result.seconds) == ["well"]
    assert result.facts == {"well": {"not_compared": "ValueError: not this"}}, "its times stand"

"""Tests of `python -m bench.run`: selection, rejected arguments, filed tasks."""

import sys
from typing import Any

import pytest

from bench import memory, run

NAME = "memory logits convnext-t 1024 float32"


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("", True),
        ("logits", True),
        ("Logits", True),
        ("logits or labels", True),
        ("labels or head", False),
        ("logits and convnext-t and 1024", True),
        ("logits and not 1024", False),
        ("not (labels or swin)", True),
        ("(labels or logits) and swin", False),
    ],
)
def test_expressions_select_as_with_pytest(expression: str, expected: bool):
    assert run.selects(expression, NAME) is expected


def test_the_expression_selects_memory_tasks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "in_fresh_process", lambda *args: {"peak": 1})
    found = run.measure_memory("swin and (512 or labels and 2048)")
    assert list(found) == ["logits swin-t 512 float32", "labels swin-t 2048 float32"]
    assert all(list(task["peers"]) == memory.PEERS for task in found.values())


@pytest.mark.parametrize("arguments", [["--peers=OpenVINO"], ["--rounds=1"], ["--no-truth"], ["-k", "logits labels"]])
def test_unfileable_arguments_are_rejected(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(sys, "argv", ["bench.run", *arguments])
    monkeypatch.setattr(run, "time_batch", lambda *args: pytest.fail("a benchmark ran"))
    with pytest.raises(SystemExit) as refused:
        run.main()
    assert refused.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert ("--output FILE" in message) if arguments[0] != "-k" else ("no expression" in message)


def test_tasks_are_filed_with_all_of_their_peers_or_not_at_all(capsys: Any):
    def entry(name: str, peer: str) -> dict[str, Any]:
        task = {"name": name, "section": "512", "order": ["a", "b", "c"]}
        return {"extra_info": {"task": task, "peer": peer, "error": 1e-7}, "stats": {"data": [1.0, 2.0]}}

    entries = [entry("whole", "c"), entry("whole", "a"), entry("part", "a"), entry("part", "c")]
    report = {"benchmarks": entries, "skipped": {"whole": {"b": "cannot"}}}
    tasks = run.tasks_of(report)
    timed = {"rounds": [1.0, 2.0], "error": 1e-7}
    assert tasks == {"whole": {"section": "512", "peers": {"a": timed, "b": {"skipped": "cannot"}, "c": timed}}}
    assert "leaves out b: part" in capsys.readouterr().out
    assert list(run.tasks_of(report, whole=False)["part"]["peers"]) == ["a", "c"]

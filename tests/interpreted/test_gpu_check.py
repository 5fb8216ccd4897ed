"""Tests of `make gpu-check` on small shapes in the interpreter: every step, its files, and a second run."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.gpu import check as gpu_check
from bench.gpu import report
from bench.gpu.calls import times_of
from bench.gpu.check import Check
from bench.gpu.operations import OPERATIONS
from bench.pairs import pair
from bench.roofline import Shapes
from tests.parity.models import config

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the check itself runs")
SHAPES = Shapes(batch=1, size=32, channels=(8, 16, 24, 32), dim=32, classes=9)
TRAINED = dataclasses.replace(SHAPES, batch=2, size=64)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, few_programs: None) -> Any:
    """Return small models instead of UPerNet-ConvNeXt-T, and select the Triton kernels."""
    monkeypatch.setenv("FASTUPER_BACKEND", "triton")
    theirs, ours = pair(config("convnext"), dtype=torch.float32)
    return SimpleNamespace(theirs=lambda dtype, auxiliary=True: theirs, ours=lambda dtype: ours)


def test_every_step(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Check(tmp_path, time.monotonic() + 600, compiled=False, rounds=1, copies=1)
    with monkeypatch.context() as patch:  # interpreted, training steps take minutes; test_head runs one
        patch.setenv("FASTUPER_BACKEND", "torch")
        check.rates()
        check.training(TRAINED, world)
    check.measure([SHAPES], world, TRAINED)
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["complete"]
    for row in [*results["models"], *results["training"], *results["operations"]]:
        assert all(peer["median"] > 0 for peer in row["peers"].values()), row["name"]
        assert row["difference"] <= 3e-2, row["name"]
    (trained,) = results["training"]
    assert (trained["batch"], list(trained["peers"])) == (2, ["fastuper", "Transformers"])
    assert trained["difference"] <= 3e-3, "the first step changes the loss by three times this bound"
    assert [row["name"] for row in results["operations"]] == [operation.name for operation in OPERATIONS]
    allowed = {"bfloat16": 8e-3, "float16": 1e-3, "tf32": 1e-5, "float32": 1e-5}  # the interpreter has no TF32
    assert len(results["accuracy"]) == 4 * len(OPERATIONS)
    for row in results["accuracy"]:
        assert max(row["errors"].values()) <= allowed[row["dtype"]], row
    text = (tmp_path / "gpu.md").read_text()
    assert all(operation.name in text for operation in OPERATIONS)
    assert trained["name"] in text
    assert text.count("not measured") == len(report.TARGETS), "no peer was compiled"
    assert (tmp_path / "gpu.svg").stat().st_size > 1000

    again = Check(tmp_path, time.monotonic() + 600, compiled=False, rounds=1, copies=1)
    capsys.readouterr()
    again.measure([SHAPES], world, TRAINED)
    assert "floor" not in capsys.readouterr().out.split("| bfloat16")[0], "a row was measured twice"
    assert again.results == results


def test_a_failing_peer_is_recorded(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = Check(tmp_path, time.monotonic() + 600, compiled=False, rounds=1, copies=1)
    check.rates()
    (pool,) = (operation for operation in OPERATIONS if operation.name == "pyramid_pool")
    monkeypatch.setattr(gpu_check, "OPERATIONS", [dataclasses.replace(pool, theirs=lambda x: 1 / 0)])
    check.operations(SHAPES)
    row = check.results["operations"][0]
    assert row["peers"]["PyTorch"] == {"failed": "ZeroDivisionError: division by zero"}
    assert "PyTorch failed" in report.table(check.results)


def test_a_training_step_out_of_memory_is_recorded(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTUPER_BACKEND", "torch")

    def fails(dtype: str) -> Any:
        raise torch.OutOfMemoryError("no room")

    check = Check(tmp_path, time.monotonic() + 600, compiled=False, rounds=1, copies=1)
    check.rates()
    check.training(TRAINED, SimpleNamespace(theirs=fails, ours=world.ours))
    peers = check.results["training"][0]["peers"]
    assert peers["Transformers"] == {"failed": "OutOfMemoryError: no room"}
    assert peers["fastuper"]["median"] > 0
    again = Check(tmp_path, time.monotonic() - 1, compiled=False, rounds=1, copies=1)
    assert again.results["training"] == [], "a failed row was not dropped"


def test_a_peer_out_of_memory_has_no_more_turns() -> None:
    calls = iter(range(1000))

    def third_time_fails() -> None:
        if next(calls) == 2:
            raise torch.OutOfMemoryError("no room")

    found = times_of({"one": [third_time_fails], "other": [lambda: time.sleep(0.01)]}, rounds=2)
    assert found["one"] == {"failed": "OutOfMemoryError: no room"}
    assert next(calls) == 3
    assert len(found["other"]["rounds"]) == 2


@pytest.mark.parametrize(
    ("ours", "theirs", "values", "met"),
    [
        ({"median": 1.0, "peak_bytes": 4}, {"median": 1.7, "peak_bytes": 8}, [1.7, 0.5], [True, True]),
        ({"median": 1.0, "peak_bytes": 6}, {"median": 1.5, "peak_bytes": 8}, [1.5, 0.75], [False, False]),
        ({"median": 1.0, "peak_bytes": 4}, {"failed": "no room"}, [None, None], [None, None]),
    ],
    ids=["met", "missed", "failed"],
)
def test_targets_of_a_training_step(
    ours: dict[str, Any], theirs: dict[str, Any], values: list[float | None], met: list[bool | None]
) -> None:
    peers = {"fastuper": ours, "Transformers": {"median": 9.0, "peak_bytes": 99}, "Transformers, compiled": theirs}
    found = report.targets({"training": [{"peers": peers}]})
    assert [target["value"] for target in found] == values
    assert [target["met"] for target in found] == met


def test_no_measurement_starts_after_the_end(world: Any, tmp_path: Path) -> None:
    check = Check(tmp_path, time.monotonic() - 1, compiled=False, rounds=1, copies=1)
    check.measure([SHAPES], world)
    assert not check.results["complete"]
    assert not check.results["models"]
    assert not check.results["training"]

"""`make gpu-check` on shapes that the interpreter can do: every step, what it writes, and going on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import gpu
from bench.roofline import Shapes
from tests.parity.models import config, pair

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="it is being run")
SHAPES = Shapes(batch=1, size=64, channels=(8, 16, 24, 32), dim=32, classes=9)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, few_programs: None) -> Any:
    """Small models in the place of a UPerNet-ConvNeXt-T, and our kernels on a CPU."""
    monkeypatch.setenv("FASTUPER_BACKEND", "triton")
    theirs, ours = pair(config("convnext"), dtype=torch.float32)
    return SimpleNamespace(theirs=lambda dtype, auxiliary=True: theirs, ours=lambda dtype: ours)


def test_every_step(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = gpu.Check(tmp_path, time.monotonic() + 600, compiled=False, rounds=1, copies=1)
    check.measure([SHAPES], world)
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["complete"]
    for row in [*results["models"], *results["operations"]]:
        assert all(peer["median"] > 0 for peer in row["peers"].values()), row["name"]
        assert row["difference"] <= 3e-2, row["name"]
    assert [row["name"] for row in results["operations"]] == [operation.name for operation in gpu.OPERATIONS]
    allowed = {"bfloat16": 8e-3, "float16": 1e-3, "tf32": 1e-5, "float32": 1e-5}  # the interpreter has no TF32
    assert len(results["accuracy"]) == 4 * len(gpu.OPERATIONS)
    for row in results["accuracy"]:
        assert max(row["errors"].values()) <= allowed[row["dtype"]], row
    text = (tmp_path / "gpu.md").read_text()
    assert all(operation.name in text for operation in gpu.OPERATIONS)
    assert (tmp_path / "gpu.svg").stat().st_size > 1000

    again = gpu.Check(tmp_path, time.monotonic() + 600, compiled=False, rounds=1, copies=1)
    capsys.readouterr()
    again.measure([SHAPES], world)
    assert "floor" not in capsys.readouterr().out.split("| bfloat16")[0], "what was measured was measured again"
    assert again.results == results


def test_what_fails_is_a_result(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = gpu.Check(tmp_path, time.monotonic() + 600, compiled=False, rounds=1, copies=1)
    check.rates()
    monkeypatch.setattr(gpu, "OPERATIONS", [dataclasses.replace(gpu.OPERATIONS[4], theirs=lambda x: 1 / 0)])
    check.operations(SHAPES)
    row = check.results["operations"][0]
    assert row["peers"]["PyTorch"] == {"failed": "ZeroDivisionError: division by zero"}
    assert "PyTorch failed" in gpu.table(check.results)


def test_nothing_begins_after_the_end(world: Any, tmp_path: Path) -> None:
    check = gpu.Check(tmp_path, time.monotonic() - 1, compiled=False, rounds=1, copies=1)
    check.measure([SHAPES], world)
    assert not check.results["complete"]
    assert not check.results["models"]

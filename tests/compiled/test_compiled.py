"""The kernels, compiled ahead of time for several GPUs, are within their limits and equal the committed table."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import triton

from bench import compiled
from fastuper_kernels.dispatch.backend import interpreted

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(interpreted(), reason="the interpreter does not compile"),
]
KEY = ("kernel", "operation", "configuration", "dtype", "target")


def key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


@pytest.fixture(scope="module")
def committed() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(compiled.PATH.read_text(encoding="utf-8"))
    return rows


def within_limits(row: dict[str, Any]) -> None:
    assert row["spill_bytes"] == 0, row
    assert row["shared"] <= compiled.SHARED[row["target"]], row
    if row["target"] == "sm_90" and row["kernel"] in compiled.GEMMS and not compiled.is_ieee(row):
        assert row["wgmma"], row


def test_the_table_is_within_the_limits(committed: list[dict[str, Any]]) -> None:
    for row in committed:
        within_limits(row)


def test_the_table_is_complete(committed: list[dict[str, Any]]) -> None:
    wanted = {
        (case.operation, case.configuration, dtype, target)
        for target in compiled.TARGETS
        for case in compiled.cases()
        for dtype in compiled.DTYPES
        if case.takes(target, compiled.DTYPES[dtype])
    }
    assert {key(row)[1:] for row in committed} == wanted


@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=[pytest.mark.exhaustive] * (name != "sm_90")) for name in compiled.TARGETS]
)
def test_kernels_compiled_here_are_in_the_table(target: str, committed: list[dict[str, Any]]) -> None:
    """Compile a configuration of each operation; each target has other configurations."""
    chosen: dict[str, str] = {}
    for number, case in enumerate(compiled.cases()):
        if case.takes(target, torch.bfloat16) and (case.operation not in chosen or number % 5 == len(target) % 5):
            chosen[case.operation] = case.configuration
    rows = list(compiled.rows([target], ["bf16"], lambda case: chosen.get(case.operation) == case.configuration))
    assert len(rows) >= len(chosen)
    known = {key(row): row for row in committed}
    for row in rows:
        within_limits(row)
        assert key(row) in known
        if row["triton"] == known[key(row)]["triton"] == triton.__version__:
            assert row == known[key(row)]

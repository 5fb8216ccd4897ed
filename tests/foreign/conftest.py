"""The real libraries, or an error that says how to get them; and the table of differences at the end of the run."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest

LIBRARIES = ("mmcv", "mmengine", "mmpretrain", "mmseg", "segmentation_models_pytorch", "timm", "transformers")
COLUMNS = ("checkpoint", "tensors", "sizes", "float32", "float64", "loads in", "--verify")


class Operators(ModuleType):
    """A stand-in for mmcv's compiled operators, which mmcv-lite lacks; mmseg and mmpretrain only look them up."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_: Any, **__: Any) -> None:
            raise NotImplementedError(f"mmcv-lite has no operator {name}")

        return missing


def pytest_configure(config: pytest.Config) -> None:
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise pytest.UsageError(
            f"tests/foreign needs {', '.join(missing)}, which this Python lacks: run `make test-foreign`"
        )
    operators = Operators("mmcv._ext")
    operators.__spec__ = ModuleSpec("mmcv._ext", None)
    sys.modules["mmcv._ext"] = operators
    warnings.filterwarnings("ignore", module="mm(cv|engine|pretrain|seg)")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print a line for each checkpoint: the largest relative differences of its logits or maps."""
    reports = terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", [])
    rows = sorted(value for report in reports for name, value in report.user_properties if name == "difference")
    if not rows:
        return
    table = [COLUMNS, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(COLUMNS))]
    terminalreporter.section("largest relative differences from the real library")
    for row in table:
        terminalreporter.line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

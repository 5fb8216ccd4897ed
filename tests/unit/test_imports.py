"""What may import what: `fastuper` -> `fastuper_kernels` -> torch and triton, and nothing heavy before it is needed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastuper
import fastuper_kernels

HEAVY = ["transformers", "torchvision", "matplotlib", "timm", "skimage", "accelerate", "scipy", "pandas"]


@pytest.mark.parametrize("module", ["fastuper", "fastuper_kernels"])
def test_importing_loads_nothing_that_is_not_needed(module):
    # With *, because fastuper imports each of its names when it is first used.
    code = f"import sys; from {module} import *; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    loaded = done.stdout.split()
    assert {module, "torch"} <= set(loaded)
    assert [name for name in HEAVY if name in loaded] == []
    assert (module == "fastuper") is ("fastuper" in loaded)


def environment() -> dict[str, str]:
    folders = [str(Path(package.__file__).parent.parent) for package in (fastuper, fastuper_kernels)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])}


def imported(path: Path) -> set[str]:
    """Return the packages that a file imports anywhere in it, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports here are absolute"
            found.add((node.module or "").split(".")[0])
    return found


def files(package: object) -> list[Path]:
    folder = Path(package.__file__).parent  # type: ignore[attr-defined]
    return sorted(folder.rglob("*.py"))


def test_the_kernels_never_import_the_networks():
    assert len(files(fastuper_kernels)) >= 3
    allowed = {"torch", "triton", "fastuper_kernels", *sys.stdlib_module_names}
    for path in files(fastuper_kernels):
        assert imported(path) <= allowed, path


def test_the_networks_never_import_triton():
    assert len(files(fastuper)) >= 10
    for path in files(fastuper):
        assert "triton" not in imported(path), path


def test_the_networks_do_import_the_kernels():
    assert any("fastuper_kernels" in imported(path) for path in files(fastuper))

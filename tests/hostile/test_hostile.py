"""Damaged checkpoints end in one line that names the file, within 20 s and 2 GB; see run.py and damage.py."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
@pytest.mark.parametrize(
    ("first", "count"), [(0, 80), *(pytest.param(n, 480, marks=pytest.mark.exhaustive) for n in range(80, 2000, 480))]
)
def test_damaged_checkpoints(first, count):
    command = [sys.executable, "-m", "tests.hostile.run", str(first), str(count)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert f"{count} damaged checkpoints, 0 faults" in result.stdout

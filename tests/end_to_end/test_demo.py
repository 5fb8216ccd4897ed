"""`make demo`: what it prints, writes, and says when the two libraries should differ."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastuper.scenes.dataset import PALETTE, scene

ROOT = Path(__file__).parents[2]


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "OUTPUT", tmp_path / "demo")
    monkeypatch.setattr(module, "ROUNDS", 1)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--figure", str(tmp_path / "figure.png")])
    return module


@pytest.mark.slow
def test_the_demo(demo, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    demo.main()
    printed = capfd.readouterr().out
    assert "$ fastuper segment" in printed
    assert "of 196,608 pixels differ" in printed
    assert "of the pixels are right, mean IoU 0." in printed
    for path in (tmp_path / "figure.png", tmp_path / "demo" / "demo.png"):
        with Image.open(path) as picture:
            assert picture.size == (3 * 512 + 4 * 24, 2 * (44 + 384 + 12) + 104)
            shown = np.asarray(picture.convert("RGB")).astype(int)
    _, truth = scene(demo.SEED)
    panel = shown[44:428, 2 * 24 + 512 : 2 * 24 + 1024]
    assert np.abs(panel - PALETTE[truth]).mean() < 8, "the second panel is the truth, in a palette of 256 colours"


@pytest.mark.exhaustive
def test_the_demo_of_libraries_that_differ(demo, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = demo.compare

    def other(photo):
        ours, theirs, labels, tied = compare(photo)
        return ours, theirs, (labels + 1) % 10, tied

    monkeypatch.setattr(demo, "compare", other)
    with pytest.raises(SystemExit, match="not the same"):
        demo.main()

"""`make demo`: its lines, its picture, and its exit status if the two libraries differ."""

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
    monkeypatch.setattr(module, "FULL_SIZE", 64)
    monkeypatch.setattr(module, "FULL_SIZE_ROUNDS", 1)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--figure", str(tmp_path / "figure.png")])
    return module


@pytest.mark.slow
def test_the_demo(demo, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    demo.main()
    printed = capfd.readouterr().out
    assert "This scene was not in the training data." in printed
    assert "$ fastuper segment" in printed
    assert "of 196,608 pixels differ" in printed
    assert "of the pixels are right, mean IoU 0." in printed
    assert "of 4,096 pixels differ" in printed
    assert printed.count("s, Transformers ") == 2, "a line with both times for each model"
    for path in (tmp_path / "figure.png", tmp_path / "demo" / "demo.png"):
        with Image.open(path) as picture:
            assert picture.size == (3 * 512 + 4 * 24, 2 * (44 + 384 + 12) + 104)
            shown = np.asarray(picture.convert("RGB")).astype(int)
    _, truth = scene(demo.SEED)
    panel = shown[44:428, 3 * 24 + 1024 : 3 * 24 + 1536]
    assert np.abs(panel - PALETTE[truth]).mean() < 8, "the third panel is the truth, in a palette of 256 colours"
    bars = shown[484:868, 3 * 24 + 1024 : 3 * 24 + 1536]
    for colour in (demo.OURS, demo.THEIRS):
        assert (np.abs(bars - colour).max(axis=-1) < 16).any(), "the last panel has a bar for each library"


@pytest.mark.exhaustive
def test_the_demo_of_libraries_that_differ(demo, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = demo.compare

    def other(*arguments):
        found = compare(*arguments)
        return found._replace(their_labels=(found.their_labels + 1) % 10)

    monkeypatch.setattr(demo, "compare", other)
    with pytest.raises(SystemExit, match="not the same"):
        demo.main()

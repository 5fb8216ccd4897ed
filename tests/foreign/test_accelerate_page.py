"""docs/accelerate.md: the sections of the real libraries run as written, on small checkpoints that they wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config

from fastuper.patch.accelerated import Accelerated
from tests.end_to_end.pages import ACCELERATE, run_section
from tests.end_to_end.test_accelerate_page import FOREIGN
from tests.foreign.makers import settings_of
from tests.foreign.test_conversions import SWIN, SWIN_CHANNELS, mmseg
from tests.foreign.test_migrate import from_smp


def from_mmsegmentation(folder: Path) -> None:
    # PyTorch's reader refuses the objects that mmengine's Runner writes beside the weights.
    made = mmseg(SWIN, SWIN_CHANNELS, auxiliary={})(folder)
    meta = {"CLASSES": [str(number) for number in range(5)], "PALETTE": [[number] * 3 for number in range(5)]}
    torch.save({"state_dict": made.network.state_dict(), "meta": meta}, folder / "upernet_swin_tiny.pth")
    model = settings_of(SWIN, SWIN_CHANNELS, auxiliary={})
    Config({"model": model, "default_scope": "mmseg"}).dump(folder / "upernet_swin_tiny.py")


MAKERS: dict[str, Callable[[Path], None]] = {
    "segmentation_models_pytorch": from_smp,
    "mmsegmentation": from_mmsegmentation,
}


def test_every_section_is_run() -> None:
    assert MAKERS.keys() == FOREIGN


@pytest.mark.parametrize("heading", MAKERS)
def test_code_runs_as_written(heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    MAKERS[heading](tmp_path)
    monkeypatch.chdir(tmp_path)
    names = run_section(ACCELERATE, heading)
    model: Any = names["model"]
    assert any(isinstance(part, Accelerated) for part in model.modules())
    with torch.inference_mode():
        model(torch.zeros(1, 3, 64, 64))

"""The comparison with the real library: it runs by itself, finds a wrong conversion, and runs nothing of a file."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from tests.foreign.test_conversions import SWIN, SWIN_CHANNELS, convert, mmseg

LOSS = "loss_weight=1.0, type='CrossEntropyLoss', use_sigmoid=False"


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "code",
    [
        (LOSS, "command='mkdir {trap}', type='os.system'"),
        (LOSS, "class_weight='{folder}/weights.pkl', type='CrossEntropyLoss', use_sigmoid=False"),
        (LOSS, "type='trap_module.Loss'"),
        ("type='SwinTransformer'", "type='TIMMBackbone', model_name='vgg11', checkpoint_path='{folder}/weights.pkl'"),
    ],
    ids=["function", "pickle of class weights", "module", "weights of a backbone"],
)
def test_no_code_that_a_configuration_names_runs(
    code: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap = tmp_path / "trap"
    made = mmseg(SWIN, SWIN_CHANNELS)(tmp_path)
    content = torch.load(made.path, weights_only=False)
    before, after = code[0], code[1].format(trap=trap, folder=tmp_path)
    assert before in content["meta"]["cfg"]
    content["meta"]["cfg"] = content["meta"]["cfg"].replace(before, after)
    torch.save(content, made.path)
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps(Touch(trap)))
    (tmp_path / "trap_module.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    result = convert(made.path, tmp_path / "converted")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    assert not trap.exists()
    assert "TIMMBackbone" not in after or "not verified: its configuration names 'TIMMBackbone'" in result.output

"""The examples that train with the loops of other libraries, run to the end."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

from fastuper import UperNetForSemanticSegmentation
from tests.training.common import tiny_model, tiny_processor, write_data

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_with_transformers_trainer", "train_with_lightning"])
def test_example_trains_and_saves(name, tmp_path, monkeypatch, capsys):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    data = write_data(tmp_path / "data")
    options = ["--model", str(tmp_path / "model"), "--steps", "2", "--batch-size", "2", "--crop", "32"]
    monkeypatch.setattr(sys, "argv", [name, str(data), str(tmp_path / "trained"), *options])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert "mean" in capsys.readouterr().out
    trained = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "trained")
    weight = "decode_head.classifier.weight"
    assert not torch.equal(trained.state_dict()[weight], model.state_dict()[weight])

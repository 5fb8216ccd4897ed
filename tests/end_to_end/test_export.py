"""`fastuper export`: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fastuper.export.onnx
from fastuper import UperNetImageProcessor
from fastuper.cli import app
from tests.end_to_end.common import NAMES
from tests.models.heads import randomize
from tests.models.test_upernet import model as small_model
from tests.unit.test_imports import environment


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with a small model."""
    folder = tmp_path_factory.mktemp("models") / "model"
    network = randomize(small_model(hidden_size=8, num_labels=len(NAMES)))
    network.config.id2label = NAMES
    network.save_pretrained(folder)
    UperNetImageProcessor(size=(64, 96)).save_pretrained(folder)
    return folder


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def refused(result: Any, status: int, *words: str) -> None:
    """Check that a command printed one line with these words, and its exit status."""
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("fastuper: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def test_a_model_is_exported_and_nothing_else_is_printed(folder, tmp_path):
    command = [sys.executable, "-m", "fastuper", "export", str(folder), "-o", "made", "--labels", "--format", "onnx"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment(), check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("exported to made: model.onnx (")
    assert lines[1].startswith("checked in its runtime at 8 sizes: 1 x 16 x 16, 3 x 37 x 23, ")
    assert lines[2].startswith("labels equal wherever the reference decides: all but ")
    assert lines[3:] == [f"segment a photo: python {Path('made', 'run.py')} PHOTO"]
    report = json.loads((tmp_path / "made" / "export.json").read_text())
    assert report["checked"] is True
    assert {int(index): name for index, name in report["id2label"].items()} == NAMES
    assert os.listdir(tmp_path) == ["made"]


def test_without_a_check(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(fastuper.export.onnx, "RUNTIME", "no_such_runtime")
    monkeypatch.setattr(fastuper.export.onnx, "write", lambda graph, settings, place, _: (place / "model.onnx").touch())
    refused(run(folder, "-o", tmp_path / "made"), 2, "needs no_such_runtime", "install fastuper[onnx]")
    result = run(folder, "-o", tmp_path / "made", "--no-check", "--size", "64x64")
    assert result.exit_code == 0
    assert "not checked: nothing has shown that it gives the model's results" in result.stdout
    assert json.loads((tmp_path / "made" / "export.json").read_text())["checked"] is False


OPTIONS = {
    "target-size": (["--target-size"], "target_size is the size of label maps; it needs labels"),
    "size": (["--size", "64"], "size='64': give any, or HEIGHTxWIDTH in pixels"),
    "executorch": (["--format", "executorch"], "give size=HEIGHTxWIDTH, such as size=512x512"),
    "dtype": (["--dtype", "bfloat16"], "format=onnx computes in float32 or float16 on a CPU"),
    "opset": (["--opset", "5"], "opset=5: give a version of ONNX's operators from"),
    "int8": (["--int8", "nowhere"], "cannot quantise", "nowhere", "there is no such folder"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_are_refused(folder, tmp_path, case):
    options, *words = OPTIONS[case]
    refused(run(folder, "-o", tmp_path / "made", *options), 2, *words)
    assert os.listdir(tmp_path) == []


def test_an_empty_calibration_folder_is_no_folder(folder, tmp_path):
    result = run(folder, "-o", tmp_path / "made", "--int8", "")
    assert result.exit_code == 2
    assert "--int8" in result.stderr
    assert "it is empty; is a variable unset?" in result.stderr


def test_models_that_cannot_be_loaded(tmp_path):
    output = tmp_path / "made"
    refused(run("no/such/model", "-o", output), 2, "cannot load the model no/such/model")
    torch.save({"head.weight": torch.zeros(2), "norm.weight": torch.zeros(2)}, tmp_path / "a.pth")
    refused(run(tmp_path / "a.pth", "-o", output), 2, "cannot load the model", "a.pth", "what can be converted")
    (tmp_path / "empty").mkdir()
    refused(run(tmp_path / "empty", "-o", output), 2, "cannot load the model", "config.json")
    assert run("", "-o", output).exit_code == 2
    assert sorted(os.listdir(tmp_path)) == ["a.pth", "empty"]


def test_a_folder_that_is_there_stays_as_it_is(folder, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    refused(run(folder, "-o", tmp_path), 2, "is not empty; give a new folder")
    refused(run(folder, "-o", tmp_path / "mine.txt"), 2, "mine.txt is a file; give a new folder")
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [
        (OSError(28, "No space left on device"), 1, "made: No space left on device"),
        (KeyboardInterrupt(), 130, "stopped; nothing was written"),
        (MemoryError(), 1, "not enough memory"),
        (TypeError("of a\nlibrary"), 2, "the model cannot be written in this format (TypeError: of a library)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_export_that_fails_leaves_nothing(folder, tmp_path, monkeypatch, fault, status, words):
    def write(graph: Any, settings: Any, place: Path, metadata: Any) -> None:
        (place / "model.onnx").write_bytes(b"half")
        raise fault

    monkeypatch.setattr(fastuper.export.onnx, "write", write)
    refused(run(folder, "-o", tmp_path / "new" / "made"), status, words)
    assert os.listdir(tmp_path) == []


def test_a_wrong_export_has_status_1(folder, tmp_path, monkeypatch):
    graphs = []

    def wrong(arrays: Any) -> Any:
        return {"logits": graphs[0](torch.from_numpy(arrays["pixel_values"])).numpy() * 1.001}

    monkeypatch.setattr(fastuper.export.onnx, "write", lambda graph, *_: graphs.append(graph))
    monkeypatch.setattr(fastuper.export.onnx, "load", lambda *_: wrong)
    refused(run(folder, "-o", tmp_path / "made", "--size", "64x64"), 1, "differs from the model by 1.0e-03 (relative)")
    assert os.listdir(tmp_path) == []

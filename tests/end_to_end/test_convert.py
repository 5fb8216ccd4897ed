"""`fastuper convert`: official files made here become a model folder, and every fault leaves nothing behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import fastuper.weights.writing
from fastuper import UperNetForUnifiedPerceptualParsing, UperNetImageProcessor
from fastuper.cli import app
from fastuper.weights.official import load_parsing
from tests.weights.test_official import LABELS, PARTS, PIXELS, build, labels_json, saved, states, unchanged, values_of

FILES = ["config.json", "model.safetensors", "preprocessor_config.json"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = saved(tmp_path / "official", *states(temporary=True))
    (folder / "labels.json").write_text(json.dumps(labels_json(True)), encoding="utf-8")
    return folder


def test_a_converted_folder_is_the_model_in_memory(source, tmp_path):
    output = tmp_path / "new" / "model"
    result = run(source, output)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in output.iterdir()) == FILES
    assert os.listdir(output.parent) == ["model"]
    model = UperNetForUnifiedPerceptualParsing.from_pretrained(output)
    assert model.config.tasks == ("scene", "object", "part", "material")
    assert model.config.labels == LABELS
    assert model.config.object_parts == PARTS
    expected = build(tasks=model.config.tasks)
    load_parsing(expected, *states(temporary=True))
    assert unchanged(model, values_of(expected))
    with torch.no_grad():
        found, wanted = model(PIXELS), expected(PIXELS)
    assert all(torch.equal(found[task], wanted[task]) for task in model.config.tasks)
    assert UperNetImageProcessor.from_pretrained(output).to_dict() == UperNetImageProcessor.for_parsing().to_dict()
    for line in (
        "tensors, 0 of them with changed values",
        "left out 114 tensors (encoder.bn1._tmp_running_mean, encoder.bn1._tmp_running_var, ...): the official Batch",
        "no texture head: the official code has none",
        "pooling: precise_roi (the default; the checkpoint does not say)",
        "Transformers cannot load the folder: it has no Unified Perceptual Parsing",
        f"written to {output}",
    ):
        assert line in result.output


def test_options(source, tmp_path):
    saved(source, *states(), epoch=7)
    (tmp_path / "model").mkdir()  # an empty folder may be there
    result = run(source, tmp_path / "model", "--pooling", "adaptive", "--texture-head")
    assert result.exit_code == 0, result.output
    config = UperNetForUnifiedPerceptualParsing.from_pretrained(tmp_path / "model").config
    assert config.pooling == "adaptive"
    assert config.tasks[-1] == "texture"
    assert "taking the highest, encoder_epoch_40.pth" in result.output
    assert "tensors that the source cannot have (decode_head.texture_head." in result.output
    assert "the texture head has random weights: train it before use" in result.output


def refused(result: Result, output: Path, *messages: str) -> None:
    assert result.exit_code == 2, result.output
    (line,) = result.output.splitlines()
    assert line.startswith("fastuper: ")
    assert all(message in line for message in messages), line
    assert not output.exists()
    assert not [path for path in output.parent.iterdir() if path.name.startswith(".")]


def test_bad_files_are_refused_in_one_line(source, tmp_path):
    output = tmp_path / "model"
    encoder, decoder = states()
    (source / "labels.json").write_text('{"object": ["-"]}')
    refused(run(source, output), output, "labels.json has 1 names of object")
    (source / "labels.json").unlink()
    refused(
        run(source, output),
        output,
        "decoder.scene_head.2.weight becomes",
        "(3, 16, 1, 1), and the model has (365, ",
        "labels.json",
    )
    saved(source, decoder, encoder)
    refused(run(source, output), output, "encoder_epoch_40.pth is no official encoder", "pass it as decoder=")
    (source / "decoder_epoch_40.pth").write_bytes(b"\0" * 100)
    (source / "encoder_epoch_40.pth").write_bytes(b"\0" * 100)
    refused(run(source, output), output, "encoder_epoch_40.pth is", "damaged")
    (source / "decoder_epoch_40.pth").unlink()
    refused(run(source, output), output, "has no decoder_*.pth")


KINDS = {
    "Transformers or fastuper already; load it with from_pretrained": {"model_type": "upernet"},
    "is of mmsegmentation, and ": "decode_head.conv_seg.weight",
    "is of an unknown library": "weights",
    "has no checkpoint: no file that ends with .safetensors, .pth": None,
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_refused_by_name(kind, tmp_path):
    source, output, content = tmp_path / "other", tmp_path / "model", KINDS[kind]
    source.mkdir()
    if isinstance(content, dict):
        (source / "config.json").write_text(json.dumps(content))
        torch.save({"weights": torch.zeros(2)}, source / "pytorch_model.bin")
    elif content is not None:
        torch.save({content: torch.zeros(2)}, source / "a.pth")
    known = "what can be converted: Unified Perceptual Parsing's official code" if isinstance(content, str) else ""
    refused(run(source, output), output, kind, known)


def test_sources_that_are_no_folders(source, tmp_path):
    output = tmp_path / "model"
    encoder = run(source / "encoder_epoch_40.pth", output)
    refused(encoder, output, "is one of the two files of Unified", "give the folder that contains it")
    refused(run(tmp_path / "nowhere", output), output, "there is no such file or folder")
    assert run(source).exit_code == 2
    assert run(source, output, "--pooling", "max").exit_code == 2


def test_an_output_with_files_stays_as_it_is(source, tmp_path):
    output = tmp_path / "model"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    result = run(source, output)
    assert result.exit_code == 2
    assert result.output == f"fastuper: {output} is not empty; give a new folder\n"
    assert os.listdir(output) == ["notes.txt"]
    result = run(source, output / "notes.txt")
    assert result.exit_code == 2
    assert "notes.txt is a file; give a new folder" in result.output


def test_a_write_that_fails_leaves_nothing(source, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fastuper.weights.writing, "save_file", full)
    result = run(source, tmp_path / "model")
    assert result.exit_code == 1
    assert "cannot write" in result.output.splitlines()[-1]
    assert "No space left on device" in result.output.splitlines()[-1]
    assert sorted(os.listdir(tmp_path)) == ["official"]

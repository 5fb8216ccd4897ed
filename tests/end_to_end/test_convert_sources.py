"""`fastuper convert` and `from_pretrained` on other libraries' checkpoints: whole, or one line and nothing written."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import timm
import torch
import transformers
from timm.models import save_for_hf
from typer.testing import CliRunner, Result

import fastuper.cli.convert
from bench.numerics import error
from bench.pairs import images
from fastuper import UperNetConfig, UperNetForSemanticSegmentation, UperNetImageProcessor
from fastuper.cli import app
from fastuper.models import verification
from fastuper.models.converted import build_converted
from fastuper.training.start import build_model
from fastuper.weights.checkpoints import read_source
from fastuper.weights.conversion import Choices, Source
from fastuper.weights.convert import DIALECTS, OTHER_NETWORKS, convert_source
from fastuper.weights.errors import CheckpointError
from fastuper.weights.options import OPTIONS
from tests.parity.foreign_mmseg import EncoderDecoder
from tests.parity.test_mmseg_weights import BASIC, BasicBlock, ResNet, foreign
from tests.weights.common import assert_same

TEXT = """
crop = (32, 48)
preprocessor = dict(type='SegDataPreProcessor', mean=[120.0, 110.0, 100.0], std=[50.0, 60.0, 70.0], bgr_to_rgb=True)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=preprocessor,
    backbone=dict(type='ResNet', depth=18, style='pytorch', out_indices=(0, 1, 2, 3)),
    decode_head=dict(type='UPerHead', in_index=[0, 1, 2, 3], pool_scales=(1, 2, 3, 6), align_corners=False,
                     norm_cfg=dict(type='SyncBN')),
    auxiliary_head=dict(type='FCNHead', in_index=2, norm_cfg=dict(type='SyncBN')),
    test_cfg=dict(mode='whole'))
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def refused(result: Result, output: Path, *messages: str) -> None:
    assert result.exit_code == 2, result.output
    (line,) = result.output.splitlines()
    assert line.startswith("fastuper: ")
    assert all(message in line for message in messages), line
    assert not output.exists()
    assert not [path for path in output.parent.iterdir() if path.name.startswith(".")]


@pytest.fixture(scope="module")
def network() -> EncoderDecoder:
    return foreign(ResNet(BasicBlock), BASIC).float()


@pytest.fixture(scope="module")
def checkpoint(network: EncoderDecoder) -> dict[str, Any]:
    classes = network.decode_head.conv_seg.out_channels
    names = {"classes": [f"name {i}" for i in range(classes)], "palette": [[i, 0, 1] for i in range(classes)]}
    return {"meta": {"cfg": TEXT, "dataset_meta": names}, "state_dict": network.state_dict(), "optimizer": {}}


@pytest.fixture
def file(checkpoint: dict[str, Any], tmp_path: Path) -> Path:
    torch.save(checkpoint, tmp_path / "iter_80000.pth")
    return tmp_path / "iter_80000.pth"


# Whole models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [".md", ".csv", ".json"])
def test_a_converted_folder_and_its_report(network, file, tmp_path, form):
    output, report = tmp_path / "model", tmp_path / f"report{form}"
    result = run(file, output, "--report", report)
    assert result.exit_code == 0, result.output
    assert sorted(os.listdir(output)) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    model, pixels = UperNetForSemanticSegmentation.from_pretrained(output), images(2, 3, 45, 71).float()
    with torch.no_grad():
        assert error(model(pixels).logits, network(pixels)) < 1e-5
    assert model.config.id2label[1] == "name 1"
    processor = UperNetImageProcessor.from_pretrained(output)
    np.testing.assert_allclose(np.array(processor.image_mean) * 255, [120, 110, 100], rtol=1e-6)

    text = report.read_text(encoding="utf-8")
    if form == ".json":
        rows = [(row["source"], row["targets"]) for row in json.loads(text)["tensors"]]
    elif form == ".csv":
        rows = [(row["source"], row["target"].split()) for row in csv.DictReader(text.splitlines())]
    else:
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
        rows = [(row[0], row[1].split()) for row in cells[2:]]
        assert f"- {file}: mmsegmentation's UPerHead over ResNet" in text
    assert sorted(source for source, _ in rows) == sorted(network.state_dict())
    assert sorted(target for _, targets in rows for target in targets) == sorted(model.state_dict())


def test_from_pretrained_reads_the_file_itself(network, file, caplog):
    model, pixels = UperNetForSemanticSegmentation.from_pretrained(file), images(1, 3, 33, 64).float()
    with torch.no_grad():
        assert error(model(pixels).logits, network(pixels)) < 1e-5
    assert not model.training
    half = UperNetForSemanticSegmentation.from_pretrained(
        file, dtype="float16", id2label={0: "a", 1: "b"}, ignore_mismatched_sizes=True
    )
    assert (half.dtype, half.config.num_labels) == (torch.float16, 2)
    assert torch.equal(half.decode_head.bottleneck.conv.weight, model.decode_head.bottleneck.conv.weight.half())
    processor = UperNetImageProcessor.from_pretrained(file)
    np.testing.assert_allclose(np.array(processor.image_std) * 255, [50, 60, 70], rtol=1e-6)
    with pytest.raises(ValueError, match=r"align_corners=True contradicts the checkpoint, which has False; leave it"):
        UperNetForSemanticSegmentation.from_pretrained(file, source_options={"align_corners": True})
    with pytest.raises(CheckpointError, match="has no state dict 'ema'; its state dicts: state_dict"):
        UperNetForSemanticSegmentation.from_pretrained(file, source_options={"weights_key": "ema"})
    with pytest.raises(TypeError, match=r"source_options are for the checkpoint of another library, and .* is none"):
        UperNetForSemanticSegmentation.from_pretrained(file.parent / "x", source_options={"weights_key": "ema"})


def test_defaults_are_said(network, tmp_path, caplog):
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    UperNetForSemanticSegmentation.from_pretrained(tmp_path / "plain.pth")
    result = run(tmp_path / "plain.pth", tmp_path / "model")
    for text in (caplog.text, result.output):
        assert "align_corners: False (the default; the checkpoint does not say)" in text
    assert "not verified: " in result.output


def test_other_commands_take_the_file(file, tmp_path):
    PIL.Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "photo.png")
    result = CliRunner().invoke(
        app, ["segment", str(tmp_path / "photo.png"), "--model", str(file), "-o", str(tmp_path / "o")]
    )
    assert result.exit_code == 0, result.output
    model, _ = build_model({0: "a", 1: "b", 2: "c"}, model=file)
    assert model.config.num_labels == 3
    expected = UperNetForSemanticSegmentation.from_pretrained(file)
    assert torch.equal(model.decode_head.bottleneck.conv.weight, expected.decode_head.bottleneck.conv.weight)


# Backbones ------------------------------------------------------------------------------------------------------------


def test_a_backbone_alone(tmp_path):
    torch.manual_seed(0)
    values = {"dims": [8, 12, 16, 20], "depths": [1, 1, 2, 1]}
    theirs = timm.create_model("convnext_atto", num_classes=3, **values).eval()
    save_for_hf(theirs, tmp_path / "hub", model_args=values)
    result = run(tmp_path / "hub", tmp_path / "backbone")
    assert result.exit_code == 0, result.output
    assert "verified: timm's model differs by " in result.output
    assert "the classifier's, which a backbone does not have" in result.output
    config = UperNetConfig(
        backbone=str(tmp_path / "backbone"), use_pretrained_backbone=True, hidden_size=8, auxiliary_channels=8
    )
    model, pixels = UperNetForSemanticSegmentation(config).eval(), images(1, 3, 64, 96).float()
    architecture = json.loads((tmp_path / "backbone" / "config.json").read_text())["architectures"][0]
    hub = getattr(transformers, architecture).from_pretrained(tmp_path / "backbone").eval()
    with torch.no_grad():
        expected = theirs.forward_intermediates(pixels, intermediates_only=True)[-1]
        for backbone in (model.backbone, hub):
            assert error(backbone(pixels, output_hidden_states=True).hidden_states[-1], expected) < 1e-5
    with pytest.raises(CheckpointError, match=r"is timm's .*, no UperNetForSemanticSegmentation; write it to a folder"):
        UperNetForSemanticSegmentation.from_pretrained(tmp_path / "hub")


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.pth: there is no such file or folder"):
        UperNetForSemanticSegmentation.from_pretrained(tmp_path / "no.pth")
    refused(run(tmp_path / "no", tmp_path / "b", "--to", "timm"), tmp_path / "b", "no has no config.json; give a model")


# Verification ---------------------------------------------------------------------------------------------------------


def test_verification(file, tmp_path, monkeypatch):
    output = tmp_path / "model"
    converted = build_converted(str(file), convert_source(read_source(file), Choices()))

    def built(shift: float) -> Callable[..., Any]:
        return lambda *_: lambda pixels: [converted.model(pixels).logits + shift]

    real = verification.LIBRARIES["mmseg"]
    for shift in (0.0, 1.0):
        fake = dataclasses.replace(real, module="math", build=built(shift))
        monkeypatch.setattr(verification, "LIBRARIES", {"mmseg": fake})
        result = run(file, output)
        if shift:
            refused(result, output, "the converted model differs from mmsegmentation's by", "at most 1e-04 is allowed")
            assert run(file, output, "--no-verify").exit_code == 0
        else:
            assert "verified: mmsegmentation's model differs by 0.0e+00, relative" in result.output
            for path in output.iterdir():
                path.unlink()
            output.rmdir()
    monkeypatch.setattr(verification, "LIBRARIES", {"mmseg": dataclasses.replace(real, module="no_such_module")})
    refused(run(file, tmp_path / "b", "--verify"), tmp_path / "b", "--verify needs mmsegmentation", "install it")
    assert "not verified: mmsegmentation is not installed" in run(file, tmp_path / "c").output


# Refusals -------------------------------------------------------------------------------------------------------------

NETWORKS = {
    "decode_head.convs.0.conv.weight": "FCN",
    "decode_head.aspp_modules.0.conv.weight": "DeepLab V3 (ASPP)",
    "decode_head.c1_bottleneck.conv.weight": "DeepLab V3+",
    "decode_head.psp_modules.0.1.conv.weight": "PSPNet",
    "decode_head.fusion_conv.conv.weight": "SegFormer",
    "decode_head.linear_c1.proj.weight": "SegFormer",
    "backbone.block1.0.attn.q.weight": "SegFormer",
    "decode_head.pixel_decoder.mask_feature.weight": "Mask2Former",
    "decode_head.up_convs.0.0.conv.weight": "SETR",
    "decode_head.lateral_convs.1.conv.weight": "a UPerNet over 2 levels",
    "roi_head.bbox_head.weight": "a detector of mmdetection",
    "decoder.aspp.0.weight": "DeepLab of segmentation_models_pytorch",
}


@pytest.mark.parametrize("name", NETWORKS)
def test_other_networks_are_refused_by_name(name, tmp_path):
    torch.save({"state_dict": {name: torch.zeros(2), "backbone.conv1.weight": torch.zeros(2)}}, tmp_path / "a.pth")
    refused(run(tmp_path / "a.pth", tmp_path / "model"), tmp_path / "model", f"is a checkpoint of {NETWORKS[name]}")


def test_no_dialect_has_names_of_other_networks(network):
    source = Source("a.pth", network.state_dict())
    names = [*source.tensors, "backbone.block1.0.attn.proj_1.weight"]  # of mmsegmentation's MSCAN, below a UPerHead too
    assert not any(re.match(pattern, name) for pattern, _ in OTHER_NETWORKS for name in names)
    assert len({dialect.name for dialect in DIALECTS}) == len(DIALECTS)


def changed(checkpoint: dict[str, Any], change: Callable[[dict[str, torch.Tensor]], Any]) -> dict[str, Any]:
    tensors = dict(checkpoint["state_dict"])
    change(tensors)
    return {**checkpoint, "state_dict": tensors}


WEIGHT = "decode_head.fpn_convs.0.conv.weight"
NO_FLOATS = (f"{WEIGHT} holds no float16, bfloat16, float32 or float64; quantised weights",)
BAD_FILES: dict[str, tuple[Callable[[dict[str, Any]], Any], tuple[str, ...]]] = {
    "a tensor less": (lambda c: changed(c, lambda t: t.pop(WEIGHT)), ("lacks 1 of the model's",)),
    "a tensor more": (
        lambda c: changed(c, lambda t: t.update({"decode_head.more": torch.zeros(2)})),
        ("decode_head.more",),
    ),
    "a shape": (
        lambda c: changed(c, lambda t: t.update({WEIGHT: t[WEIGHT][:1]})),
        (f"{WEIGHT} becomes", "of shape (1, "),
    ),
    "integers": (lambda c: changed(c, lambda t: t.update({WEIGHT: t[WEIGHT].long()})), NO_FLOATS),
    "complex numbers": (lambda c: changed(c, lambda t: t.update({WEIGHT: t[WEIGHT].to(torch.complex64)})), NO_FLOATS),
    "a part": (lambda c: changed(c, lambda t: [t.pop(n) for n in list(t) if n.startswith("backbone.")]), ()),
    "an optimizer": (lambda c: {"optimizer": {}}, ("holds the state of an optimizer",)),
    "settings of another form": (lambda c: {**c, "meta": {"cfg": "model = dict(backbone=3, decode_head=[1])"}}, ()),
    "settings that are no literals": (
        lambda c: {**c, "meta": {"cfg": TEXT.replace("(1, 2, 3, 6)", "scales()")}},
        ("'scales()'",),
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused_in_one_line(checkpoint, case, tmp_path):
    make, messages = BAD_FILES[case]
    torch.save(make(checkpoint), tmp_path / "a.pth")
    output, report = tmp_path / "model", tmp_path / "report.md"
    refused(run(tmp_path / "a.pth", output, "--report", report), output, "a.pth", *messages)
    assert not report.exists()


def test_every_tensor_counts(checkpoint, network):
    """Without any one tensor, or with another shape of it, nothing is built; only training's may be missing."""
    names = list(network.state_dict())[::13]
    assert any(name.startswith("auxiliary_head.") for name in names)
    for name in names:
        flat = network.state_dict()[name].flatten()[:1].expand(3, 1)
        for change in (lambda t, name=name: t.pop(name), lambda t, name=name, flat=flat: t.update({name: flat})):
            source = Source("a.pth", changed(checkpoint, change)["state_dict"])
            try:
                converted = build_converted("a.pth", convert_source(source, Choices()))
            except (CheckpointError, ValueError):
                continue
            left_out = [row.source for row in converted.conversion.rows if not row.targets]
            assert name.endswith("num_batches_tracked") or set(left_out) == {
                name for name in source.tensors if name.startswith("auxiliary_head.")
            }


def test_options(file, tmp_path):
    output = tmp_path / "model"
    refused(run(file, output, "--align-corners"), output, "align_corners=True contradicts the checkpoint")
    refused(run(file, output, "--num-heads", "3,6"), output, "has no use for num_heads; leave it out")
    refused(
        run(file, output, "--weights-key", "model"), output, "has no state dict 'model'; its state dicts: state_dict"
    )
    for arguments in (["--num-heads", "three"], ["--heads", "3"], ["--resnet-style", "tf"], ["--weights-key", ""]):
        result = run(file, output, *arguments)
        assert result.exit_code == 2
        assert not output.exists()
    help_text = run("--help").output
    assert all(f"--{name.replace('_', '-')}" in help_text for name in OPTIONS)
    assert run(file, output, "--no-align-corners", "--pool-scales", "1,2,3,6").exit_code == 0


def test_reports_that_cannot_be_written(file, tmp_path, monkeypatch):
    output = tmp_path / "model"
    (tmp_path / "old.md").write_text("mine")
    for name, message in {
        "report.pdf": "its name must end with .md, .txt, .csv, .json",
        "old.md": "exists; give a new file",
        "nowhere/a.md": "there is no folder",
        "model/a.md": "there is no folder",
    }.items():
        refused(run(file, output, "--report", tmp_path / name), output, message)
    output.mkdir()
    assert "lies in the output folder" in run(file, output, "--report", output / "a.md").output
    assert (tmp_path / "old.md").read_text() == "mine"

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fastuper.weights.writing, "save_file", full)
    result = run(file, output, "--report", tmp_path / "report.md")
    assert result.exit_code == 1
    assert "No space left on device" in result.output.splitlines()[-1]
    assert sorted(os.listdir(tmp_path)) == ["iter_80000.pth", "model", "old.md"]
    assert os.listdir(output) == []


# Half of a state dict -------------------------------------------------------------------------------------------------


def test_half_of_a_state_dict_is_refused_everywhere(file, tmp_path):
    model = UperNetForSemanticSegmentation.from_pretrained(file)
    half = {name: tensor for name, tensor in model.state_dict().items() if "stages.1." not in name}
    with pytest.raises(CheckpointError, match="tensors are missing"):
        UperNetForSemanticSegmentation.from_pretrained(None, config=model.config, state_dict=half)
    with pytest.raises(CheckpointError, match="tensors are missing"):
        UperNetForSemanticSegmentation.from_pretrained(
            None, config=model.config, state_dict=half, ignore_mismatched_sizes=True
        )
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(half)
    assert_same(before, dict(model.state_dict()))

    for name, part in {
        "half": half,
        "headless": {n: t for n, t in model.state_dict().items() if n.startswith("backbone.")},
    }.items():
        folder = tmp_path / name
        model.config.save_pretrained(folder)
        torch.save(part, folder / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=r"missing|lacks"):
            build_model({0: "a", 1: "b"}, model=folder)

    backbone = {n.removeprefix("backbone."): t for n, t in half.items() if n.startswith("backbone.")}
    folder = tmp_path / "backbone"
    model.config.backbone_config.save_pretrained(folder)
    torch.save(backbone, folder / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"does not fit its configuration: it lacks \d+ of the backbone's tensors"
    ):
        UperNetForSemanticSegmentation(UperNetConfig(backbone=str(folder), use_pretrained_backbone=True))
    torch.save({name: tensor.flatten()[:1] for name, tensor in backbone.items()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"does not fit its configuration: embedder\.\S+ has shape \(1,\), and"):
        UperNetForSemanticSegmentation(UperNetConfig(backbone=str(folder), use_pretrained_backbone=True))


def test_half_of_a_backbone_of_transformers_is_refused(tmp_path):
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14
    )
    config.out_features = ["stage1", "stage2", "stage3", "stage4"]
    theirs = transformers.Dinov2Backbone(config)
    theirs.save_pretrained(tmp_path)
    values = {"backbone": str(tmp_path), "use_pretrained_backbone": True, "hidden_size": 8, "auxiliary_channels": 8}
    model = UperNetForSemanticSegmentation(UperNetConfig(**values))
    assert_same(theirs.state_dict(), model.backbone.state_dict())
    half = {name: tensor for name, tensor in theirs.state_dict().items() if "layer.3." not in name}
    (tmp_path / "model.safetensors").unlink()
    torch.save(half, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"lacks \d+ of the \d+ tensors of a Dinov2Backbone, such as"):
        UperNetForSemanticSegmentation(UperNetConfig(**values))


def test_a_backbone_goes_back_to_timm(tmp_path):
    values = {"dims": [8, 12, 16, 20], "depths": [1, 1, 2, 1]}
    theirs = timm.create_model("convnext_atto", num_classes=0, **values).eval()
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    assert run(tmp_path / "timm.pth", tmp_path / "ours", "--no-verify").exit_code == 0
    result = run(tmp_path / "ours", tmp_path / "back", "--to", "timm", "--report", tmp_path / "report.csv")
    assert result.exit_code == 0, result.output
    assert os.listdir(tmp_path / "back") == ["model.safetensors"]
    # The arguments that the command prints are those that load the file.
    assert "create_model(NAME, features_only=True, conv_mlp=False, checkpoint_path=...)" in " ".join(
        result.output.split()
    )
    path = tmp_path / "back" / "model.safetensors"
    loaded = timm.create_model(
        "convnext_atto", features_only=True, conv_mlp=False, checkpoint_path=str(path), **values
    ).eval()
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        maps = theirs.forward_intermediates(pixels, intermediates_only=True)
        for found, expected in zip(loaded(pixels), maps[-4:], strict=True):
            torch.testing.assert_close(found, expected)
    back = read_source(tmp_path / "back").tensors
    refused(
        run(tmp_path / "ours", tmp_path / "b", "--to", "timm", "--verify"), tmp_path / "b", "no option but --report"
    )
    refused(run(tmp_path / "back", tmp_path / "b", "--to", "timm"), tmp_path / "b", "config.json")
    (tmp_path / "ours" / "model.safetensors").unlink()
    half = {name: tensor for name, tensor in back.items() if "stages_1" not in name}
    torch.save(half, tmp_path / "ours" / "pytorch_model.bin")
    refused(
        run(tmp_path / "ours", tmp_path / "b", "--to", "timm"), tmp_path / "b", "these are not weights of a convnext"
    )

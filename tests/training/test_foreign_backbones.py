"""`fastuper train --backbone` over backbones of timm and Transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastuper import UperNetForSemanticSegmentation
from fastuper.cli import app
from tests.models.test_foreign_backbones import VIT
from tests.training.common import write_data

OPTIONS = "--steps 1 --batch-size 2 --crop 32 --cpu --workers 0 --hidden-size 8"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture
def offline(monkeypatch):
    """timm's models with random weights in place of the weights that it would fetch; the names that are asked for."""
    timm = pytest.importorskip("timm")
    create_model, asked = timm.create_model, []

    def create(name, *, pretrained, **options):
        asked.append((name, pretrained))
        return create_model(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", create)
    return asked


def run(data: Path, output: Path, backbone: str, *more: str) -> tuple[int, str]:
    arguments = ["train", "--data", str(data), "--output", str(output), *OPTIONS.split(), "--backbone", backbone, *more]
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


def test_a_vision_transformer_of_timm(data, tmp_path, offline):
    code, text = run(data, tmp_path, "timm/test_vit.r160_in1k", "--layer-decay", "0.9", "--drop-path", "0.1")
    assert code == 0, text
    assert offline[0] == ("test_vit.r160_in1k", True)
    model = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "last")
    assert model.neck is not None
    assert model(torch.zeros(1, 3, 40, 33)).logits.shape[2:] == (40, 33)


def test_a_backbone_of_one_size_is_built_for_the_crops(data, tmp_path, offline):
    code, text = run(data, tmp_path, "timm/test_vit_relpos")
    assert code == 0, text
    assert "test_vit_relpos is built for images of 32 x 32 pixels and no larger" in text
    model = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "last")
    assert model.image_sizes.largest == (32, 32)


def test_a_folder_of_transformers(data, tmp_path):
    transformers = pytest.importorskip("transformers")
    network = transformers.Dinov2Model(transformers.Dinov2Config(**VIT))
    network.save_pretrained(tmp_path / "backbone")
    code, text = run(data, tmp_path / "run", str(tmp_path / "backbone"), "--layer-decay", "0.9")
    assert code == 0, text
    assert "images of 32 x 32 pixels are padded to 42 x 42 for the backbone" in text
    model = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "run" / "last")
    kept = model.backbone.embeddings.patch_embeddings.projection.weight
    assert (kept - network.embeddings.patch_embeddings.projection.weight).abs().max() < 1e-3  # one step's change


def test_an_unknown_name_lists_what_there_is(data, tmp_path, offline):
    code, text = run(data, tmp_path, "vitt-base-16")
    assert code == 2
    assert "no backbone 'vitt-base-16', like vit-base-16" in text
    assert "Give one of these names, a folder, a Hub id (owner/name) or timm/NAME" in " ".join(text.split())
    code, text = run(data, tmp_path, "timm/resnet81")
    assert code == 2
    assert "has no model 'resnet81'; like resnet18" in text

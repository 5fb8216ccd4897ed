"""docs/migrate.md: each section's commands run as written, on small checkpoints of the networks stated again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from fastuper import UperNetImageProcessor
from fastuper.weights.options import OPTIONS
from tests.end_to_end.pages import MIGRATE, run_section, sections
from tests.parity import foreign_authors, foreign_mmseg, foreign_smp


def save(network: nn.Module, path: Path, key: str = "state_dict", **more: object) -> None:
    torch.save({key: network.state_dict(), **more}, path)


def upernet_of(backbone: nn.Module, channels: tuple[int, ...]) -> nn.Module:
    head = foreign_mmseg.UPerHead(channels, dim=8, classes=3)
    return foreign_mmseg.EncoderDecoder(backbone, head, foreign_mmseg.FCNHead(channels[2], dim=8, classes=3))


def from_transformers(folder: Path) -> None:
    backbone = transformers.ConvNextConfig(
        hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=8, auxiliary_channels=8, auxiliary_in_channels=8, num_labels=3
    )
    transformers.UperNetForSemanticSegmentation(config).save_pretrained(folder / "my-upernet")
    UperNetImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder / "my-upernet")


def from_mmsegmentation(folder: Path) -> None:
    network = upernet_of(foreign_mmseg.Swin(), (8, 16, 32, 64))
    save(network, folder / "upernet_swin_tiny.pth", meta={"CLASSES": ("road", "car", "sky")})
    torch.save(upernet_of(foreign_mmseg.ResNet(), (16, 32, 64, 128)).state_dict(), folder / "resnet50_weights.pth")


def from_smp(folder: Path) -> None:
    features = {"out_indices": (1, 2, 3, 4), "layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}
    network = foreign_smp.UPerNet(timm.create_model("resnet18", features_only=True, **features), own=True)
    torch.save(network.state_dict(), folder / "smp_upernet.pth")
    (folder / "smp-upernet").mkdir()
    save_file(network.state_dict(), folder / "smp-upernet" / "model.safetensors")
    values = {"_model_class": "UPerNet", "encoder_name": "resnet18", "classes": 5, "decoder_channels": 8}
    (folder / "smp-upernet" / "config.json").write_text(json.dumps(values), encoding="utf-8")


def from_timm(folder: Path) -> None:
    convnext = timm.create_model("convnext_atto", depths=[1, 1, 1, 1], dims=[8, 8, 8, 8])
    torch.save(convnext.state_dict(), folder / "convnext_tiny.pth")
    resnet = timm.create_model("resnet18", channels=[8, 8, 8, 8])
    save_for_hf(resnet, folder / "timm-resnet18", model_args={"channels": [8, 8, 8, 8]}, safe_serialization=True)


def from_authors(folder: Path) -> None:
    save(foreign_authors.SwinClassifier((128, 128)), folder / "swin_tiny_patch4_window7_224.pth", "model")
    save(foreign_authors.ConvNext(5), folder / "convnext_tiny_1k_224_ema.pth", "model")
    swin = upernet_of(foreign_authors.SwinBackbone(), (8, 16, 32, 64))
    save(swin, folder / "upernet_swin_tiny_patch4_window7_512x512.pth")
    convnext = upernet_of(foreign_authors.ConvNext(None), (8, 12, 16, 24))
    save(convnext, folder / "upernet_convnext_tiny_1k_512x512.pth")


MAKERS: dict[str, Callable[[Path], None]] = {
    "From Transformers": from_transformers,
    "From mmsegmentation": from_mmsegmentation,
    "From segmentation_models_pytorch": from_smp,
    "From timm": from_timm,
    "From the authors' repositories": from_authors,
}
"""Writes the checkpoints that a section names into a folder."""


def test_every_section_with_commands_is_run():
    assert sections(MIGRATE).keys() == MAKERS.keys()


def test_the_page_has_every_option():
    text = MIGRATE.read_text(encoding="utf-8")
    for name in (*OPTIONS, "report", "weights_key", "no_verify"):
        assert f"`--{name.replace('_', '-')}" in text, name


@pytest.mark.parametrize("heading", MAKERS)
def test_commands_run_as_written(heading, tmp_path, monkeypatch):
    MAKERS[heading](tmp_path)
    monkeypatch.chdir(tmp_path)
    run_section(MIGRATE, heading)

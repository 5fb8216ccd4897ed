"""docs/migrate.md: each section's commands run as written, on small checkpoints that the real libraries write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.end_to_end.pages import MIGRATE, run_section, sections
from tests.end_to_end.test_migrate import from_transformers
from tests.foreign.test_conversions import (
    RESNET,
    RESNET_CHANNELS,
    SWIN,
    SWIN_CHANNELS,
    TIMM_CONVNEXT,
    authors_convnext,
    authors_swin,
    convnext_classifier,
    mmseg,
    old_swin,
    smp,
    timm,
    trained,
)


def from_mmsegmentation(folder: Path) -> None:
    trained(SWIN, SWIN_CHANNELS, auxiliary={})(folder).path.rename(folder / "upernet_swin_tiny.pth")
    caffe = mmseg({**RESNET, "stem_channels": 4, "style": "caffe"}, RESNET_CHANNELS, "bare", align_corners=True)
    caffe(folder).path.rename(folder / "resnet50_weights.pth")


def from_smp(folder: Path) -> None:
    smp("resnet18")(folder).path.rename(folder / "smp-upernet")
    smp("resnet18", "state_dict")(folder).path.rename(folder / "smp_upernet.pth")


def from_timm(folder: Path) -> None:
    timm("convnext_atto", **TIMM_CONVNEXT)(folder).path.rename(folder / "convnext_tiny.pth")
    timm("resnet18", "folder")(folder).path.rename(folder / "timm-resnet18")


def from_authors(folder: Path) -> None:
    old_swin(folder).path.rename(folder / "swin_tiny_patch4_window7_224.pth")
    convnext_classifier(folder).path.rename(folder / "convnext_tiny_1k_224_ema.pth")
    authors_swin(folder).path.rename(folder / "upernet_swin_tiny_patch4_window7_512x512.pth")
    authors_convnext(folder).path.rename(folder / "upernet_convnext_tiny_1k_512x512.pth")


MAKERS: dict[str, Callable[[Path], None]] = {
    "From Transformers": from_transformers,
    "From mmsegmentation": from_mmsegmentation,
    "From segmentation_models_pytorch": from_smp,
    "From timm": from_timm,
    "From the authors' repositories": from_authors,
}
"""Writes the checkpoints that a section names into a folder."""


def test_every_section_with_commands_is_run() -> None:
    assert sections(MIGRATE).keys() == MAKERS.keys()


@pytest.mark.parametrize("heading", MAKERS)
def test_commands_run_as_written(heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    MAKERS[heading](tmp_path)
    monkeypatch.chdir(tmp_path)
    run_section(MIGRATE, heading)

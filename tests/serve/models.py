"""Tiny models for the tests of the page and of servers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fastuper import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation, UperNetImageProcessor
from fastuper.models.parsing import UperNetForUnifiedPerceptualParsing
from fastuper.models.parsing_configuration import UnifiedPerceptualParsingConfig

LABELS = {
    "scene": ["street", "kitchen", "beach"],
    "object": ["-", "table", "lamp"],
    "part": ["-", "top", "leg"],
    "material": ["-", "wood", "metal"],
    "texture": ["banded", "dotted"],
}


def _backbone() -> ConvNextConfig:
    return ConvNextConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], out_features=["stage1", "stage2", "stage3", "stage4"]
    )


def _save(network: nn.Module, folder: Path) -> Path:
    for parameter in network.parameters():
        if parameter.ndim >= 2:
            nn.init.kaiming_normal_(parameter)
    network.save_pretrained(folder)  # type: ignore[operator]
    UperNetImageProcessor(size={"height": 64, "width": 96}).save_pretrained(folder)
    return folder


def segmenter(folder: Path, classes: int) -> Path:
    """Save a tiny model, two of whose classes share a name."""
    torch.manual_seed(0)
    names = {index: f"thing {index % (classes - 1)}" for index in range(classes)}
    config = UperNetConfig(_backbone(), hidden_size=16, auxiliary_in_channels=24, auxiliary_channels=8, id2label=names)
    return _save(UperNetForSemanticSegmentation(config), folder)


def parser(folder: Path) -> Path:
    """Save a tiny parsing model."""
    torch.manual_seed(0)
    config = UnifiedPerceptualParsingConfig(
        _backbone(), hidden_size=16, pool_channels=8, texture_channels=8, labels=LABELS, object_parts={1: (1, 2)}
    )
    return _save(UperNetForUnifiedPerceptualParsing(config), folder)

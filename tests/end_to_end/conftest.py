"""The model that the tests of the command line use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fastuper import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation, UperNetImageProcessor
from tests.end_to_end.common import NAMES


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a checkpoint: a tiny network whose label maps have several classes."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    backbone = ConvNextConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=16, auxiliary_in_channels=24, auxiliary_channels=8, id2label=NAMES
    )
    network = UperNetForSemanticSegmentation(config)
    for parameter in network.parameters():
        if parameter.ndim >= 2:
            nn.init.kaiming_normal_(parameter)
    nn.init.normal_(network.decode_head.classifier.bias)
    network.save_pretrained(folder)
    UperNetImageProcessor(size={"height": 64, "width": 96}).save_pretrained(folder)
    return folder

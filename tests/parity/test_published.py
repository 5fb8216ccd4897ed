"""Tests of the published backbones at full width and depth with the ADE20K head: the shapes of the checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import fastuper
from bench.numerics import error
from bench.pairs import STAGES, hub_names, images, pair
from tests.parity.models import segmentation_labels

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "convnext-tiny": ("ConvNext", {"depths": [3, 3, 9, 3], "hidden_sizes": [96, 192, 384, 768]}),
    "convnext-small": ("ConvNext", {"depths": [3, 3, 27, 3], "hidden_sizes": [96, 192, 384, 768]}),
    "convnext-base": ("ConvNext", {"depths": [3, 3, 27, 3], "hidden_sizes": [128, 256, 512, 1024]}),
    "convnext-large": ("ConvNext", {"depths": [3, 3, 27, 3], "hidden_sizes": [192, 384, 768, 1536]}),
    "convnext-xlarge": ("ConvNext", {"depths": [3, 3, 27, 3], "hidden_sizes": [256, 512, 1024, 2048]}),
    "convnextv2-atto": ("ConvNextV2", {"depths": [2, 2, 6, 2], "hidden_sizes": [40, 80, 160, 320]}),
    "convnextv2-femto": ("ConvNextV2", {"depths": [2, 2, 6, 2], "hidden_sizes": [48, 96, 192, 384]}),
    "convnextv2-pico": ("ConvNextV2", {"depths": [2, 2, 6, 2], "hidden_sizes": [64, 128, 256, 512]}),
    "convnextv2-nano": ("ConvNextV2", {"depths": [2, 2, 8, 2], "hidden_sizes": [80, 160, 320, 640]}),
    "convnextv2-tiny": ("ConvNextV2", {"depths": [3, 3, 9, 3], "hidden_sizes": [96, 192, 384, 768]}),
    "convnextv2-huge": ("ConvNextV2", {"depths": [3, 3, 27, 3], "hidden_sizes": [352, 704, 1408, 2816]}),
    "swinv2-tiny-window16": (
        "Swinv2",
        {
            "image_size": 256,
            "embed_dim": 96,
            "depths": [2, 2, 6, 2],
            "num_heads": [3, 6, 12, 24],
            "window_size": 16,
        },
    ),
    "swinv2-large-window12to24": (
        "Swinv2",
        {
            "image_size": 384,
            "embed_dim": 192,
            "depths": [2, 2, 18, 2],
            "num_heads": [6, 12, 24, 48],
            "window_size": 24,
            "pretrained_window_sizes": [12, 12, 12, 6],
        },
    ),
    "swin-tiny-window7": ("Swin", {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}),
    "swin-small-window7": ("Swin", {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24]}),
    "swin-base-window7": ("Swin", {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}),
    "swin-base-window12": (
        "Swin",
        {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 12},
    ),
    "swin-large-window7": ("Swin", {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48]}),
    "swin-large-window12": (
        "Swin",
        {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], "window_size": 12},
    ),
    "resnet-18": ("ResNet", {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}),
    "resnet-34": ("ResNet", {"depths": [3, 4, 6, 3], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}),
    "resnet-50": ("ResNet", {"depths": [3, 4, 6, 3], "hidden_sizes": [256, 512, 1024, 2048]}),
    "resnet-101": ("ResNet", {"depths": [3, 4, 23, 3], "hidden_sizes": [256, 512, 1024, 2048]}),
}

# Millions of parameters, from their papers, for ADE20K with both heads.
PARAMETERS = {
    "convnext-tiny": 60, "convnext-small": 82, "convnext-base": 122, "convnext-large": 235, "convnext-xlarge": 391,
    "swin-tiny-window7": 60, "swin-small-window7": 81, "swin-base-window7": 121, "swin-large-window7": 234,
}  # fmt: skip


# One or two of each family; the others differ from these in widths and depths alone.
RUN = ("convnext-tiny", "convnextv2-atto", "swin-tiny-window7", "swin-base-window12", "resnet-18", "resnet-50")


def configuration(name: str) -> Any:
    family, values = PUBLISHED[name]
    backbone = getattr(transformers, f"{family}Config")(**values, out_features=STAGES)
    return transformers.UperNetConfig(backbone_config=backbone, num_labels=150)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_and_shapes(name):
    """Both models' state dicts have the same tensors. Nothing is allocated."""
    with torch.device("meta"):
        theirs = transformers.UperNetForSemanticSegmentation(configuration(name))
        ours = fastuper.UperNetForSemanticSegmentation(configuration(name))
    # Transformers 5 computes a Swin's position indices when it builds the model, and saves none.
    expected, found = (
        {key: tensor.shape for key, tensor in state.items() if not key.endswith("relative_position_index")}
        for state in (hub_names(theirs.state_dict()), ours.state_dict())
    )
    assert found == expected
    if name in PARAMETERS:
        assert round(ours.num_parameters() / 1e6) == PARAMETERS[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive] * (name not in RUN)) for name in PUBLISHED]
)
def test_published_shape(name):
    theirs, ours = pair(configuration(name), share=True)
    if name in PARAMETERS:
        assert round(ours.num_parameters() / 1e6) == PARAMETERS[name]
    pixels, labels = images(1, 3, 40, 72), segmentation_labels(1, 40, 72, classes=150)
    with torch.no_grad():
        expected, output = theirs(pixels, labels=labels), ours(pixels, labels=labels)
    spread = expected.logits.std().item()
    assert 0.1 < spread < 100  # activations neither vanish nor explode
    assert error(output.logits, expected.logits) < 1e-10
    assert error(output.loss, expected.loss) < 1e-10

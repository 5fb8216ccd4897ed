"""Small configurations of both libraries, and labels, for the comparisons with Transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from bench.pairs import DEVICE, STAGES

# Small enough for float64 on a CPU. Widths and depths are irregular and differ from the defaults, so that a swapped or
# ignored value shows. The sizes are lists, not tuples: given a tuple of hidden_sizes, Transformers 5 fails to build its
# ConvNeXt.
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "convnext": ("ConvNextConfig", {"hidden_sizes": [16, 24, 40, 56], "depths": [2, 1, 3, 2]}),
    "convnextv2": ("ConvNextV2Config", {"hidden_sizes": [16, 24, 40, 56], "depths": [2, 1, 3, 2]}),
    "swin": (
        "SwinConfig",
        {"embed_dim": 16, "depths": [2, 1, 3, 2], "num_heads": [2, 4, 4, 8], "window_size": 4, "drop_path_rate": 0.0},
    ),
    # At this image size the last stage's map is smaller than the window.
    "swinv2": (
        "Swinv2Config",
        {
            "image_size": [96, 64],
            "embed_dim": 16,
            "depths": [2, 1, 3, 2],
            "num_heads": [2, 4, 4, 8],
            "window_size": 4,
            "pretrained_window_sizes": [3, 3, 0, 2],
            "drop_path_rate": 0.0,
        },
    ),
    "resnet-basic": (
        "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [16, 24, 40, 56], "depths": [2, 1, 3, 2], "layer_type": "basic"},
    ),
    "resnet-bottleneck": (
        "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [32, 48, 80, 112], "depths": [2, 1, 3, 2], "layer_type": "bottleneck"},
    ),
}
FAMILIES = list(BACKBONES)
VARIATIONS = ("convnextv2", "swinv2")
"""Families that share most code with another family. `make test` leaves out their longest tests."""


def with_exhaustive_variations(families: list[str]) -> list[Any]:
    """Return the families as parameters of a test that `make test` leaves out for the variations."""
    return [pytest.param(name, marks=[pytest.mark.exhaustive] * (name in VARIATIONS)) for name in families]


HEAD: dict[str, Any] = {"hidden_size": 24, "auxiliary_channels": 20, "num_labels": 7}


def backbone_config(family: str, library: Any = transformers, **overrides: Any) -> Any:
    """Return a small backbone's configuration, Transformers' or (with `library=fastuper`) fastuper's."""
    name, values = BACKBONES[family]
    if "out_indices" not in overrides:
        overrides = {"out_features": STAGES, **overrides}
    return getattr(library, name)(**{**copy.deepcopy(values), **overrides})


def config(family: str, backbone: dict[str, Any] | None = None, library: Any = transformers, **head: Any) -> Any:
    """Return a small UPerNet's configuration; `backbone` overrides values of its backbone, `head` its own values."""
    return library.UperNetConfig(
        backbone_config=backbone_config(family, library, **(backbone or {})), **{**HEAD, **head}
    )


def segmentation_labels(
    batch: int, height: int, width: int, classes: int = 7, ignore: int = 255, seed: int = 0
) -> torch.Tensor:
    """Return labels (B, H, W), about one in five of them `ignore`."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (batch, height, width), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = ignore
    return labels.to(DEVICE)


def as_maps(hidden_states: Any, like: Any) -> list[torch.Tensor]:
    """Return Transformers' hidden states as maps (B, C, H, W): the Swin of Transformers 4 returns (B, L, C)."""
    return [
        x.transpose(1, 2).reshape(shape.shape) if x.ndim == 3 else x
        for x, shape in zip(hidden_states, like, strict=True)
    ]

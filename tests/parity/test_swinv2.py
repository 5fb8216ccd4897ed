"""Swin V2's own rules, beside Transformers': windows, masks, coordinates, and where Transformers fails its users."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fastuper
from bench.numerics import error
from bench.pairs import images, randomize
from fastuper.models.backbones import build_backbone
from tests.parity.models import as_maps, backbone_config

SIZES = [(64, 64), (130, 33), (16, 97)]


def backbones(dtype: torch.dtype = torch.float64, **values: Any) -> tuple[Any, Any]:
    """Return Transformers' backbone and ours, with the same random weights."""
    theirs = transformers.Swinv2Backbone(backbone_config("swinv2", **values))
    randomize(theirs)
    ours = build_backbone(backbone_config("swinv2", fastuper, **values))
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(dtype).eval(), ours.to(dtype).eval()


def compare(theirs: Any, ours: Any, size: tuple[int, int]) -> None:
    pixels = images(2, 3, *size)
    with torch.no_grad():
        expected, found = theirs(pixels).feature_maps, ours(pixels).feature_maps
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fastuper.models.backbones.rewrites.on_cpu_without_gradients", lambda *_: False)
            textbook = ours(pixels).feature_maps
    for x, y, z in zip(expected, found, textbook, strict=True):
        assert error(y, x) < 1e-12
        assert error(z, x) < 1e-12


@pytest.mark.parametrize(
    "values",
    [
        {"image_size": 224, "window_size": 7},
        {"image_size": [32, 96], "window_size": 3},  # the height decides the windows of both sides
        {"image_size": [96, 32], "window_size": 5, "pretrained_window_sizes": [6, 6, 3, 2]},
        {"image_size": 33, "window_size": 8, "qkv_bias": False},  # the last stage has a map of one position
        {"image_size": 64, "window_size": 1},
    ],
    ids=str,
)
def test_windows_are_made_for_the_configured_image_size(values):
    """They stay as they are for images of any size, in any order of sizes."""
    theirs, ours = backbones(**values)
    for size in SIZES:
        compare(theirs, ours, size)
    windows = [
        [(block.window_size, block.shift_size) for stage in model.encoder.layers for block in stage.blocks]
        for model in (theirs, ours)
    ]
    assert windows[0] == windows[1]


def test_the_mask_counts_twice():
    """At the largest scale, scores are up to 200 apart: a mask of -100 hides no position, twice the mask does."""
    theirs, ours = (model.encoder.layers[0].blocks[0].attention.self for model in backbones())
    for attention in (theirs, ours):
        nn.init.constant_(attention.logit_scale, 10.0)  # clamped to log(100)
        for layer, sign in ((attention.query, 1.0), (attention.key, -1.0), (attention.value, 1.0)):
            layer.weight.data = sign * torch.eye(16, dtype=torch.float64)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    # Two regions of opposite directions: a query is like the keys of the other region.
    region = torch.arange(16) < 8
    windows = torch.where(region[:, None], 1.0, -1.0).double() * images(1, 1, 1, 16)[0]
    mask = torch.where(region[:, None] == region, 0.0, -100.0).double()[None]
    with torch.no_grad():
        expected = theirs(windows, mask)[0]
        assert error(ours(windows, mask, False)[0], expected) < 1e-12
        assert error(ours(windows, mask / 2, False)[0], expected) > 0.1


def test_dropouts_are_those_of_transformers():
    values = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2, "drop_path_rate": 0.3}
    found = [
        {name: (getattr(m, "p", None), getattr(m, "drop_prob", None)) for name, m in model.named_modules()}
        for model in backbones(**values)
    ]
    assert found[0] == found[1]


def test_hidden_states_are_maps():
    theirs, ours = backbones()
    pixels = images(1, 3, 75, 50)
    with torch.no_grad():
        expected = theirs(pixels, output_hidden_states=True).hidden_states
        found = ours(pixels, output_hidden_states=True).hidden_states
    assert all(x.ndim == 3 for x in expected)
    for x, y in zip(as_maps(expected, found), found, strict=True):
        assert error(y, x) < 1e-12


def test_attentions_are_those_of_transformers():
    theirs, ours = backbones()
    pixels = images(1, 3, 75, 50)
    with torch.no_grad():
        expected = theirs(pixels, output_attentions=True).attentions
        found = ours(pixels, output_attentions=True).attentions
    for x, y in zip(expected, found, strict=True):
        assert error(y, x) < 1e-12


def test_absolute_position_embeddings_have_a_position_for_each_patch():
    theirs = transformers.Swinv2Backbone(backbone_config("swinv2", use_absolute_embeddings=True))
    with pytest.raises(RuntimeError, match="must match the size"):  # one position too many
        theirs(images(1, 3, 96, 64, dtype=torch.float32))
    ours = build_backbone(backbone_config("swinv2", fastuper, use_absolute_embeddings=True)).eval()
    assert ours.embeddings.position_embeddings.shape == (1, 24 * 16, 16)
    before = ours(images(1, 3, 75, 50, dtype=torch.float32)).feature_maps[0]
    nn.init.normal_(ours.embeddings.position_embeddings)
    assert error(ours(images(1, 3, 75, 50, dtype=torch.float32)).feature_maps[0], before) > 1e-3


def test_padded_maps_in_float16():
    """A padded position's key is 0, and its length is rounded to 0: Transformers divides by it."""
    theirs, ours = backbones(torch.float16)
    exact = ours.double()
    pixels = images(1, 3, 75, 50)
    with torch.no_grad():
        expected = exact(pixels).feature_maps
        assert all(x.isnan().any() for x in theirs(pixels.half()).feature_maps)
        found = ours.half()(pixels.half()).feature_maps
    for x, y in zip(expected, found, strict=True):
        assert error(y, x) < 0.05


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pretrained_window_sizes": [12, 12, 12]}, r"\[12, 12, 12\] must have a window for each of 4 stages"),
        ({"pretrained_window_sizes": [12, 1, 0, 0]}, "has a window of one position"),
        ({"image_size": 31}, "image_size=31 and patch_size=4 leave no position for the windows of stage 4"),
        ({"image_size": [64, 16]}, r"image_size=\[64, 16\] .* stage 4"),
        ({"num_heads": [3, 6, 12, 7]}, "768 channels of stage 4 .* not a multiple of its 7 attention heads"),
    ],
    ids=str,
)
def test_values_that_make_no_network_are_refused_in_one_line(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        fastuper.Swinv2Config(**values)
    assert "\n" not in str(caught.value)

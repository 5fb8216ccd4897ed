"""Checkpoints of Swin's and ConvNeXt's own repositories, compared with their networks, stated again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bench.numerics import error
from bench.pairs import images, randomize
from fastuper import UperNetConfig, UperNetForSemanticSegmentation
from fastuper.weights.authors import CONVNEXT, SWIN
from fastuper.weights.checkpoints import read_source
from fastuper.weights.conversion import Choices, Conversion
from fastuper.weights.convert import convert_source
from fastuper.weights.errors import CheckpointError
from tests.parity.conversions import converted, network, stages_of
from tests.parity.foreign_authors import ConvNext, SwinBackbone, SwinClassifier
from tests.parity.foreign_mmseg import EncoderDecoder, FCNHead, UPerHead

SETTINGS: dict[str, Any] = {"type": "SwinTransformer", "drop_path_rate": 0.3}


def drawn(model: nn.Module) -> Any:
    randomize(model)
    return model.double().eval()


def backbone(model: nn.Module, settings: dict[str, Any] | None = None, **options: Any) -> Conversion:
    """Return the conversion of a backbone of a UPerNet, which the dialect of mmsegmentation's heads calls."""
    state, choices = model.state_dict(), Choices(options)
    (kind,) = (kind for kind in (SWIN, CONVNEXT) if kind.recognises(state))
    part = kind.convert(state, settings or {}, choices, "x.pth", "backbone.")
    assert {row.source for row in part.translated.rows} == {f"backbone.{name}" for name in state}
    assert not choices.unused()
    return Conversion(part.words, "backbone", part.config, part.translated.tensors, part.translated.rows)


# Classifiers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"image": (256, 256)},
        {"image": (128, 256), "depths": (2, 1, 2), "heads": (2, 2, 4), "window": 2, "patch": 2, "channels": 4},
        {"image": (256, 256), "ape": True, "mlp_ratio": 2.5, "qkv_bias": False},
    ],
)
def test_swins_classifier(values):
    model = drawn(SwinClassifier(**values))
    conversion = converted(model.state_dict())
    pixels = images(1, conversion.config["num_channels"], *values["image"])
    with torch.no_grad():
        expected = model.features(pixels)
    for x, y in zip(stages_of(network(conversion), pixels), expected, strict=True):
        assert error(x, y) < 1e-10
    left_out = {row.source.rpartition(".")[2] for row in conversion.rows if not row.targets}
    assert left_out == {"weight", "bias", "attn_mask", "relative_position_index"}
    assert conversion.initialised == ("hidden_states_norms.",)
    assert any("every second block shifts" in note for note in conversion.notes)


def test_every_second_block_of_a_backbone_shifts():
    """The classifier's last map is one window, which it does not shift; a UPerNet's backbone shifts it."""
    classifier = drawn(SwinClassifier((64, 64), window=2))
    conversion = converted(classifier.state_dict())
    segmenter = SwinBackbone(window=2).double().eval()
    segmenter.load_state_dict(classifier.state_dict(), strict=False)
    pixels = images(1, 3, 64, 64)
    with torch.no_grad():
        embedded = segmenter.patch_embed(pixels)
        expected = [x.permute(0, 3, 1, 2) for x in segmenter.maps(embedded)]
        unshifted = classifier.features(pixels)
    found = stages_of(network(conversion), pixels)
    assert all(error(x, y) < 1e-10 for x, y in zip(found, expected, strict=True))
    assert error(found[3], unshifted[3]) > 1e-3


@pytest.mark.parametrize(("scale", "grn"), [(True, False), (False, False), (False, True)])
def test_convnexts_classifier(scale, grn, tmp_path):
    model = drawn(ConvNext(classes=7, scale=scale, grn=grn, channels=4))
    torch.save({"model": model.state_dict()}, tmp_path / "convnext.pth")
    conversion = convert_source(read_source(tmp_path / "convnext.pth"), Choices())
    pixels = images(2, 4, 67, 93)
    with torch.no_grad():
        expected = model.features(pixels)
    for x, y in zip(stages_of(network(conversion), pixels), expected, strict=True):
        assert error(x, y) < 1e-10
    assert [row.source for row in conversion.rows if not row.targets] == [
        "norm.weight", "norm.bias", "head.weight", "head.bias"
    ]  # fmt: skip


def test_the_position_table_of_another_image():
    model = SwinClassifier((64, 128), ape=True, window=2)
    with pytest.raises(ValueError, match="does not say its image size"):
        converted(model.state_dict())
    with pytest.raises(CheckpointError, match="has 512 positions, which images of 64 x 64"):
        converted(model.state_dict(), image_size=[64, 64])
    assert converted(model.state_dict(), image_size=[64, 128]).config["image_size"] == [64, 128]


def renamed(state: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    return {name.replace(old, new): value for name, value in state.items()}


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (lambda: ConvNext(classes=2, grn=True).state_dict(), "its blocks have GRN and LayerScale"),
        (
            lambda: renamed(SwinClassifier((64, 64)).state_dict(), "relative_position_bias_table", "logit_scale"),
            "is of a Swin V2",
        ),
        (lambda: renamed(SwinClassifier((64, 64)).state_dict(), "attn.qkv", "spatial_mlp"), "is of a Swin-MLP"),
        (
            lambda: renamed(SwinClassifier((64, 64)).state_dict(), "mlp.fc1", "mlp._moe_layer.experts"),
            "is of a Swin-MoE",
        ),
        (lambda: SwinClassifier((64, 64), window=4).state_dict(), "windows of 4, 4, 4, 2, and our Swin one window"),
        (lambda: SwinClassifier((64, 64), window=2, patch_norm=False).state_dict(), "patch_norm=False"),
        (lambda: {**ConvNext(classes=2).state_dict(), "extra": torch.ones(1)}, "1 tensors of another network"),
    ],
)
def test_networks_that_are_refused(state, reason):
    with pytest.raises(CheckpointError, match=reason) as raised:
        converted(state())
    assert "\n" not in str(raised.value)


# The backbones of UPerNets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "settings"),
    [
        ({}, SETTINGS),
        ({"window": 3, "depths": (2, 3, 2, 2), "heads": (2, 2, 4, 4), "qkv_bias": False, "channels": 5}, {}),
        ({"ape": True, "window": 5, "mlp_ratio": 3.0}, {"ape": True}),
        ({"qk_scale": 0.5, "window": 2}, {"qk_scale": 0.5}),
        ({"out_indices": (1, 3)}, {"out_indices": (1, 3)}),
    ],
)
@pytest.mark.parametrize("size", [(64, 64), (67, 93)])
def test_swins_upernet(values, settings, size):
    model = drawn(SwinBackbone(**values))
    conversion = backbone(model, settings)
    pixels = images(2, conversion.config["num_channels"], *size)
    with torch.no_grad():
        found = network(conversion)(pixels).feature_maps
        expected = model(pixels)
    assert all(error(x, y) < 1e-10 for x, y in zip(found, expected, strict=True))
    assert conversion.config.get("drop_path_rate") == settings.get("drop_path_rate")


@pytest.mark.parametrize(
    ("values", "settings", "options"),
    [
        ({}, {"type": "ConvNeXt", "drop_path_rate": 0.4}, {}),
        ({"scale": False, "depths": (2, 1, 2, 1), "channels": 4}, {}, {"out_indices": [0, 1, 2, 3]}),
        ({"out_indices": (0, 2, 3)}, {"out_indices": (0, 2, 3)}, {}),
    ],
)
def test_convnexts_upernet(values, settings, options):
    model = drawn(ConvNext(classes=None, **values))
    conversion = backbone(model, settings, **options)
    pixels = images(2, conversion.config["num_channels"], 67, 93)
    with torch.no_grad():
        found = network(conversion)(pixels).feature_maps
        expected = model(pixels)
    assert all(error(x, y) < 1e-10 for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("build", "channels"),
    [
        (lambda: SwinBackbone(window=3, ape=True), (8, 16, 32, 64)),
        (lambda: ConvNext(classes=None), (8, 12, 16, 24)),
        (lambda: ConvNext(classes=None, scale=False, grn=True), (8, 12, 16, 24)),
    ],
)
def test_whole_upernets(build, channels):
    model = drawn(EncoderDecoder(build(), UPerHead(channels), FCNHead(channels[2])))
    conversion = converted(model.state_dict())
    ours = UperNetForSemanticSegmentation(UperNetConfig.from_dict(dict(conversion.config)))
    ours.load_state_dict(dict(conversion.tensors), strict=False, assign=True)
    pixels = images(1, 3, 67, 93)
    with torch.no_grad():
        assert error(ours.eval()(pixels).logits, model(pixels)) < 1e-10


def test_options_that_contradict_the_file():
    with pytest.raises(ValueError, match=r"out_indices=.* contradicts the checkpoint"):
        backbone(SwinBackbone(out_indices=(1, 3)), out_indices=[0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"image_size=.* contradicts the checkpoint"):
        backbone(SwinBackbone(ape=True), image_size=[64, 64])

"""The ResNet with a deep stem, compared with the official code's encoder, stated again in plain calls, and with timm.

Transformers has no such backbone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fastuper
from bench.numerics import error
from bench.pairs import STAGES, images, randomize
from fastuper.models.backbones import resnet, rewrites
from fastuper.models.backbones.registry import PRESETS, build_backbone
from fastuper.weights.official import encoder_name
from tests.parity.parsing_reference import reference_encoder

SMALL: dict[str, Any] = {"hidden_sizes": [32, 48, 80, 112], "depths": [2, 1, 3, 2], "out_features": STAGES}


def network(dtype: torch.dtype = torch.float64, **values: Any) -> Any:
    torch.manual_seed(0)
    config = fastuper.DeepStemResNetConfig(**{"stem_widths": [6, 10, 16], **SMALL, **values})
    model = build_backbone(config)
    randomize(model)
    return model.to(dtype).eval()


def restated(state: dict[str, torch.Tensor], pixels: torch.Tensor) -> list[torch.Tensor]:
    """Return the four maps of the official encoder, stated in plain calls."""
    return reference_encoder({str(encoder_name(name)): x for name, x in state.items()}, pixels)


@pytest.mark.parametrize("size", [(64, 96), (45, 67), (33, 1)])
def test_the_official_encoder(size):
    model = network()
    pixels = images(2, 3, *size)
    expected = restated(model.state_dict(), pixels)
    with torch.no_grad():
        fast = model(pixels).feature_maps
    for result in (fast, model(pixels).feature_maps):  # the second has gradients: no rewrite applies
        assert all(error(x, y) < 1e-10 for x, y in zip(result, expected, strict=True))


def test_gradients():
    model = network()
    pixels = images(1, 3, 45, 67).requires_grad_()
    weights = dict(model.named_parameters())
    wanted = [
        pixels,
        weights["embedder.embedder.0.convolution.weight"],
        weights["embedder.embedder.2.convolution.weight"],
    ]
    maps = restated(dict(model.named_buffers()) | weights, pixels)
    expected = torch.autograd.grad(sum(x.square().sum() for x in maps), wanted)
    found = torch.autograd.grad(sum(x.square().sum() for x in model(pixels).feature_maps), wanted)
    assert all(error(x, y) < 1e-10 for x, y in zip(found, expected, strict=True))


STEM = {"conv1.0": "0.convolution", "conv1.3": "1.convolution", "conv1.6": "2.convolution"} | {
    "conv1.1": "0.normalization",
    "conv1.4": "1.normalization",
    "bn1": "2.normalization",
}


def from_timm(name: str) -> str:
    """Return our name of a tensor of timm's ResNet with a deep stem."""
    module, _, part = name.rpartition(".")
    if module in STEM:
        return f"embedder.embedder.{STEM[module]}.{part}"
    stage, block, kind, *index = module.removeprefix("layer").split(".")
    if kind == "downsample":
        layer = "shortcut." + ("convolution", "normalization")[int(index[0])]
    else:
        layer = f"layer.{int(kind[-1]) - 1}." + ("convolution" if kind.startswith("conv") else "normalization")
    return f"encoder.stages.{int(stage) - 1}.layers.{block}.{layer}.{part}"


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "stem"), [("resnet50s", [64, 64, 128]), ("resnet50c", [32, 32, 64])])
def test_timms_networks(name, stem):
    """timm's "s" is the official ResNet; its "c" is mmsegmentation's V1c."""
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(name, features_only=True, out_indices=[1, 2, 3, 4]).double().eval()
    randomize(theirs)
    ours = build_backbone(fastuper.DeepStemResNetConfig(stem_widths=stem, out_features=STAGES)).double().eval()
    ours.load_state_dict({from_timm(key): value for key, value in theirs.state_dict().items()})
    pixels = images(1, 3, 40, 56)
    with torch.no_grad():
        expected, found = theirs(pixels), ours(pixels).feature_maps
    assert all(error(x, y) < 1e-10 for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("preset", "parameters"), [("resnet-50-deep-stem", 23_631_808), ("resnet-101-deep-stem", 42_623_936)]
)
def test_presets_have_the_official_sizes(preset, parameters):
    with torch.device("meta"):
        model = build_backbone(PRESETS[preset]())
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.channels == [256, 512, 1024, 2048]


def test_the_stem_takes_the_fast_convolution(monkeypatch):
    model, calls, rewritten = network(torch.float32), [], rewrites.conv_bn_relu
    monkeypatch.setattr(rewrites, "conv_bn_relu", lambda *a, **k: calls.append(1) or rewritten(*a, **k))
    with torch.no_grad():
        model(images(1, 3, 64, 64).float())
    layers = [m for m in model.modules() if isinstance(m, resnet.ResNetConvLayer)]
    assert len(calls) == sum(m.convolution.stride == (1, 1) for m in layers)


@pytest.mark.parametrize("place", ["whole", "layer", "convolution"])
def test_a_replaced_stem_decides_the_channels(place):
    model = network()
    convolution = nn.Conv2d(4, 6 if place != "whole" else 16, 3, 2, 1).double()
    if place == "whole":
        model.embedder.embedder = convolution
    elif place == "layer":
        model.embedder.embedder[0] = convolution
    else:
        model.embedder.embedder[0].convolution = convolution
    with torch.no_grad():
        assert model(images(1, 4, 33, 40)).feature_maps[0].shape == (1, 32, 9, 10)
        with pytest.raises(ValueError, match="have 3 channels, the backbone's first convolution takes 4"):
            model(images(1, 3, 33, 40))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stem_widths": [8, 8]}, r"stem_widths=\[8, 8\] must be the channels of three convolutions"),
        ({"stem_widths": "deep"}, "stem_widths must be a list of one or more numbers .*, got 'deep'"),
        ({"stem_widths": []}, "stem_widths must be a list"),
        ({"stem_widths": [8, 0, 8]}, r"stem_widths\[1\] must be a whole number of at least 1"),
        ({"strides": [1, 2]}, r"strides=\[1, 2\] must be 4 numbers, as many as stages"),
        ({"dilations": [1] * 5}, r"dilations=.* must be 4 numbers"),
        ({"multi_grid": [1, 2, 4, 8]}, r"multi_grid=.* must be 3 numbers, as many as blocks in the last stage"),
        ({"strides": [2] * 4, "downsample_in_first_stage": True}, "either strides or downsample_in_first_stage"),
        ({"embedding_size": 64}, r"embedding_size=64 must be the last of stem_widths=\[64, 64, 128\]; leave it out"),
    ],
)
def test_wrong_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        fastuper.DeepStemResNetConfig(**values)


def test_a_saved_width_can_be_overridden():
    saved = fastuper.DeepStemResNetConfig().to_dict()
    assert fastuper.DeepStemResNetConfig.from_dict(saved, stem_widths=[32, 32, 64]).embedding_size == 64


def test_transformers_refuses_what_is_written(tmp_path):
    config = fastuper.DeepStemResNetConfig(
        stem_widths=[4, 4, 8], hidden_sizes=[8] * 4, depths=[1] * 4, out_features=STAGES
    )
    fastuper.UperNetForSemanticSegmentation(fastuper.UperNetConfig(config, hidden_size=8)).save_pretrained(tmp_path)
    assert fastuper.UperNetForSemanticSegmentation.from_pretrained(tmp_path).config.backbone_config == config
    with pytest.raises(KeyError, match="resnet_deep_stem"):
        transformers.UperNetForSemanticSegmentation.from_pretrained(tmp_path)

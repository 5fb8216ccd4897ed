"""Swin by timm's rules: its windows, its configuration, and its faster ways; tests/parity compares it with timm."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from bench.numerics import error
from bench.pairs import images, randomize
from fastuper import TimmSwinConfig, UperNetConfig, UperNetForSemanticSegmentation
from fastuper.models.backbones import build_backbone
from tests.models.test_rewrites import check

STAGES = ["stage1", "stage2", "stage3", "stage4"]
SMALL: dict[str, Any] = {"embed_dim": 8, "depths": [2, 2, 2, 1], "num_heads": [1, 2, 2, 4], "out_features": STAGES}
CONFIGS = {
    "one window last": {"image_size": 64, "window_size": 2},
    "small windows": {"image_size": 32, "window_size": 5},
    "wide": {"image_size": [64, 96], "window_size": 4},
    "of each stage": {"image_size": 96, "window_sizes": [[3, 5], 5, 4, 2]},
    "always": {"image_size": 32, "window_size": 3, "always_partition": True},
    "normed": {"image_size": 64, "window_size": 3, "output_norms": True},
}


def network(name: str) -> Any:
    model = build_backbone(TimmSwinConfig(**{**SMALL, **CONFIGS[name]}))
    randomize(model)
    return model.double().eval()


# By hand from timm's rule: a side of the map (the patches, halved and rounded up from stage to stage) that is no larger
# than the window's is the window's side, without a shift.
WINDOWS = {
    "default": ({}, [((7, 7), (3, 3)), ((7, 7), (3, 3)), ((7, 7), (3, 3)), ((7, 7), (0, 0))]),
    "small": ({"image_size": 64}, [((7, 7), (3, 3)), ((7, 7), (3, 3)), ((4, 4), (0, 0)), ((2, 2), (0, 0))]),
    "odd": ({"image_size": 103}, [((7, 7), (3, 3)), ((7, 7), (3, 3)), ((7, 7), (0, 0)), ((4, 4), (0, 0))]),
    "wide": (
        {"image_size": [64, 96], "window_size": 4},
        [((4, 4), (2, 2)), ((4, 4), (2, 2)), ((4, 4), (0, 2)), ((2, 3), (0, 0))],
    ),
    "of each stage": (
        {"image_size": 96, "window_sizes": [[3, 5], 5, 4, 7]},
        [((3, 5), (1, 2)), ((5, 5), (2, 2)), ((4, 4), (2, 2)), ((3, 3), (0, 0))],
    ),
    "always": ({"image_size": 32, "always_partition": True}, [((7, 7), (3, 3))] * 4),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows(name):
    values, expected = WINDOWS[name]
    assert [TimmSwinConfig(**values).windows(stage) for stage in range(4)] == expected


@pytest.mark.parametrize("size", [(1, 1), (31, 77), (64, 96)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_faster_way_is_the_same_function(name, size):
    check(network(name), images(2, 3, *size))


def test_gradients_are_those_of_the_modules(monkeypatch):
    model, pixels, found = network("wide"), images(1, 3, 45, 70), []
    for textbook in (False, True):
        monkeypatch.setattr("fastuper.models.backbones.rewrites.apply_to", lambda *_: False) if textbook else None
        model.zero_grad()
        sum((x**2).sum() for x in model(pixels).feature_maps).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 50
    assert all(error(ours, theirs) < 1e-12 for ours, theirs in zip(*found, strict=True))


def test_a_trace_takes_other_sizes():
    model = network("wide").requires_grad_(False)
    traced = torch.jit.trace(lambda x: model(x).feature_maps[-1], images(1, 3, 64, 96), check_trace=False)
    for size in ((64, 96), (45, 131)):
        pixels = images(1, 3, *size)
        assert error(traced(pixels), model(pixels).feature_maps[-1]) < 1e-13


@pytest.mark.parametrize("name", ["wide", "of each stage", "normed"])
def test_saved_and_loaded(name, tmp_path):
    config = TimmSwinConfig(**{**SMALL, **CONFIGS[name]})
    options = {"hidden_size": 8, "use_auxiliary_head": False, "num_labels": 3}
    model = randomize_all(UperNetForSemanticSegmentation(UperNetConfig(config, **options)))
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert (values["model_type"], values["backbone_config"]["model_type"]) == ("upernet", "swin_timm")
    again = UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    assert type(again.config.backbone_config) is TimmSwinConfig
    with torch.no_grad():
        pixels = images(1, 3, 64, 64, dtype=torch.float32)
        assert torch.equal(again(pixels).logits, model(pixels).logits)
    norms = [key for key in model.state_dict() if "hidden_states_norms" in key]
    assert len(norms) == (8 if name == "normed" else 0)


def randomize_all(model: Any) -> Any:
    randomize(model)
    return model.eval()


def test_transformers_refuses_the_file(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = UperNetConfig(TimmSwinConfig(**SMALL), hidden_size=8, use_auxiliary_head=False)
    UperNetForSemanticSegmentation(config).save_pretrained(tmp_path)
    for loader in (transformers.AutoModelForSemanticSegmentation, transformers.UperNetForSemanticSegmentation):
        with pytest.raises(KeyError, match="swin_timm"):
            loader.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window_sizes": [7, 7]}, "window_sizes must be a list of 4 windows"),
        ({"window_sizes": 7}, "window_sizes must be a list of 4 windows"),
        ({"window_sizes": [7, 7, 7, 0]}, r"window_sizes\[3\] must be a whole number"),
        ({"window_sizes": [7, 7, 7, [7, 7, 7]]}, r"window_sizes\[3\] must be a whole number .* or two such numbers"),
        ({"image_size": 3}, "image_size=3 must be at least patch_size=4"),
        ({"image_size": [224, 3]}, r"image_size=\[224, 3\] must be at least"),
        ({"always_partition": 1}, "always_partition must be true or false"),
        ({"output_norms": "no"}, "output_norms must be true or false"),
    ],
)
def test_values_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        TimmSwinConfig(**values)

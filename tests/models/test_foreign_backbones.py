"""Backbones of timm and of Transformers' AutoBackbone, beside the library's own backbone with a plain neck and head."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastuper import UperNetConfig
from fastuper import UperNetForSemanticSegmentation as Segmentation
from fastuper.recipes import Recipe, parameter_groups
from tests.models.heads import error, randomize

HEAD: dict[str, Any] = {"hidden_size": 8, "auxiliary_channels": 4, "num_labels": 5}
SIZES = ((64, 96), (75, 53))


@dataclass
class Row:
    """A backbone, and what it should be.

    Attributes:
        values: of timm's function, or of Transformers' configuration.
        levels: the levels that are read by default: indices of timm's, names of Transformers' stages.
        channels: of the maps that the heads read.
        multiple: images are padded to multiples of it.
        is_flat: True for a vision transformer, whose maps a neck scales.
        is_last: True if the library returns (B, H, W, C).
        depth: the layer depth of the first parameter of the first block.
    """

    values: dict[str, Any]
    levels: list[Any]
    channels: list[int]
    multiple: int = 1
    is_flat: bool = False
    is_last: bool = False
    flexible: dict[str, Any] = field(default_factory=dict)


LAST = [-4, -3, -2, -1]
STAGES = ["stage1", "stage2", "stage3", "stage4"]
SMALL = {"embed_dim": 32, "depth": 4, "num_heads": 2}
DYNAMIC: dict[str, Any] = {"dynamic_img_size": True}
NARROW = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
FLAT = {"is_flat": True, "channels": [32] * 4}
BLOCKS = [1, 3, 4, 6]  # every fourth part of six

TIMM = {
    "vit_tiny_patch16_224": Row(SMALL | {"depth": 6}, [1, 2, 4, 5], multiple=16, flexible=DYNAMIC, **FLAT),
    "vit_small_patch14_dinov2": Row(SMALL | {"img_size": 56}, [0, 1, 2, 3], multiple=14, flexible=DYNAMIC, **FLAT),
    "vit_small_patch16_dinov3": Row(SMALL, [0, 1, 2, 3], multiple=16, flexible=DYNAMIC, **FLAT),
    "eva02_tiny_patch14_224": Row(SMALL | {"img_size": 56}, [0, 1, 2, 3], multiple=14, flexible=DYNAMIC, **FLAT),
    "beit_base_patch16_224": Row(SMALL | {"depth": 6, "img_size": 96}, [1, 2, 3, 5], multiple=96, **FLAT),
    "swin_tiny_patch4_window7_224": Row(NARROW, LAST, [8, 16, 32, 64], 4, is_last=True, flexible=DYNAMIC),
    "swinv2_tiny_window8_256": Row(NARROW, LAST, [8, 16, 32, 64], 4, is_last=True, flexible=DYNAMIC),
    "hiera_tiny_224": Row(
        {"embed_dim": 8, "num_heads": 1, "stages": (1, 1, 1, 1), "img_size": 96}, LAST, [8, 16, 32, 64], 96
    ),
    "test_maxvit": Row({"img_size": 96}, LAST, [32, 64, 96, 128], 96),
    "test_resnet": Row({}, LAST, [32, 48, 192, 96]),
}
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": 64,
    "drop_path_rate": 0.0,
}


def stages(numbers: list[int]) -> list[str]:
    return [f"stage{number}" for number in numbers]


AUTO = {
    "dinov2": Row(VIT, stages([2, 3, 5, 6]), multiple=14, **FLAT),
    "dinov2_with_registers": Row(VIT, stages([2, 3, 5, 6]), multiple=16, **FLAT),
    "beit": Row(VIT, stages([2, 3, 4, 6]), multiple=16, **FLAT),
    "vitdet": Row(VIT, stages([2, 3, 5, 6]), multiple=16, **FLAT),
    "dinov3_vit": Row(VIT, stages([2, 3, 5, 6]), multiple=16, **FLAT),
    "focalnet": Row(
        {"embed_dim": 8, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 32, 64], "image_size": 64},
        ["stem", "stage1", "stage2", "stage4"],
        [8, 16, 32, 64],
    ),
    "hgnet_v2": Row(
        {
            "stem_channels": [3, 8, 8],
            "embedding_size": 8,
            "stage_in_channels": [8, 16, 32, 64],
            "stage_mid_channels": [8, 8, 8, 8],
            "stage_out_channels": [16, 32, 64, 128],
            "stage_num_blocks": [1, 1, 1, 1],
            "stage_numb_of_layers": [2, 2, 2, 2],
            "hidden_sizes": [256, 512, 1024, 2048],
        },
        STAGES,
        [16, 32, 64, 128],
    ),
    "hiera": Row(
        {"embed_dim": 8, "num_heads": [1, 2, 4, 8], "depths": [1, 1, 1, 1], "image_size": [96, 96]},
        STAGES,
        [8, 16, 32, 64],
        96,
    ),
}
ROWS = {f"timm-{name}": (name, row) for name, row in TIMM.items()} | {name: (name, row) for name, row in AUTO.items()}


def given(kind: str, **more: Any) -> dict[str, Any]:
    """Return the arguments of a configuration that name a backbone and no levels."""
    name, row = ROWS[kind]
    if kind.startswith("timm-"):
        pytest.importorskip("timm")
        return {"backbone": name, "use_timm_backbone": True, "backbone_kwargs": {**row.values, **more}}
    skip_unless_known(name)
    return {"backbone_config": {"model_type": name, **row.values, **more}}


def skip_unless_known(model_type: str) -> None:
    auto = pytest.importorskip("transformers.models.auto.modeling_auto")
    if model_type not in auto.MODEL_FOR_BACKBONE_MAPPING_NAMES:
        pytest.skip(f"this version of Transformers has no {model_type}")


def build(kind: str, cls: Any = Segmentation, **more: Any) -> Any:
    torch.manual_seed(0)
    model = cls(UperNetConfig(**given(kind, **more), **HEAD))
    randomize(model.decode_head)
    randomize(model.auxiliary_head)
    if model.neck is not None:
        randomize(model.neck)
    return model


def library_maps(kind: str, model: Any, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Return the maps of the library's backbone, built anew, with the model's weights."""
    name, row = ROWS[kind]
    if kind.startswith("timm-"):
        import timm

        values = {**row.values, **row.flexible}
        network = timm.create_model(name, features_only=True, out_indices=row.levels, **values)
        network.load_state_dict(model.backbone._backbone.state_dict())
        maps = network.double().eval()(pixels)
    else:
        from transformers import AutoBackbone, AutoConfig

        network = AutoBackbone.from_config(AutoConfig.for_model(name, **row.values, out_features=row.levels))
        network.load_state_dict(model.backbone.state_dict())
        maps = network.double().eval()(pixels).feature_maps
    return [x.permute(0, 3, 1, 2) for x in maps] if row.is_last else list(maps)


def norm(weights: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    names = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(x, *(weights[f"{name}.{value}"] for value in names))


def conv_norm_relu(weights: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    kernel = weights[f"{name}.conv.weight"]
    return norm(weights, f"{name}.batch_norm", F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)).relu()


def resize(x: torch.Tensor, size: Any) -> torch.Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def plain_neck(weights: dict[str, torch.Tensor], maps: list[torch.Tensor]) -> list[torch.Tensor]:
    """Scale four maps by 4, 2, 1 and a half, as BEiT's authors do."""

    def up(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.conv_transpose2d(x, weights[f"neck.levels.{name}.weight"], weights[f"neck.levels.{name}.bias"], 2)

    finest = F.gelu(norm(weights, "neck.levels.0.batch_norm", up("0.first", maps[0])))
    return [up("0.second", finest), up("1", maps[1]), maps[2], F.max_pool2d(maps[3], 2)]


def plain_head(weights: dict[str, torch.Tensor], maps: list[torch.Tensor]) -> torch.Tensor:
    """Return logits (B, classes, h, w) of four maps, by the steps of the paper."""
    head = "decode_head"
    *lower, top = maps
    pooled = [
        resize(conv_norm_relu(weights, f"{head}.psp_modules.{i}.1", F.adaptive_avg_pool2d(top, side)), top.shape[2:])
        for i, side in enumerate((1, 2, 3, 6))
    ]
    levels = [conv_norm_relu(weights, f"{head}.bottleneck", torch.cat([top, *pooled], 1))]
    for i in (2, 1, 0):
        lateral = conv_norm_relu(weights, f"{head}.lateral_convs.{i}", lower[i])
        levels.insert(0, lateral + resize(levels[0], lateral.shape[2:]))
    outputs = [conv_norm_relu(weights, f"{head}.fpn_convs.{i}", x) for i, x in enumerate(levels[:3])] + levels[3:]
    fused = torch.cat([resize(x, outputs[0].shape[2:]) for x in outputs], 1)
    fused = conv_norm_relu(weights, f"{head}.fpn_bottleneck", fused)
    return F.conv2d(fused, weights[f"{head}.classifier.weight"], weights[f"{head}.classifier.bias"])


@torch.no_grad()
def composition(kind: str, model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Return full-size logits: pad, the library's backbone, the neck, the head, resample, crop."""
    row, (height, width) = ROWS[kind][1], pixels.shape[2:]
    padded = F.pad(pixels, (0, -width % row.multiple, 0, -height % row.multiple))
    maps = library_maps(kind, model, padded)
    weights = model.state_dict()
    maps = plain_neck(weights, maps) if row.is_flat else maps
    return resize(plain_head(weights, maps), padded.shape[2:])[:, :, :height, :width]


@pytest.mark.parametrize("kind", ROWS)
def test_the_network_is_the_librarys_backbone_with_a_plain_neck_and_head(kind, tmp_path):
    row = ROWS[kind][1]
    model = build(kind).eval()
    values = model.config.backbone_config.values
    assert values["out_indices" if kind.startswith("timm-") else "out_features"] == row.levels
    assert values.get("neck") == ("transposed" if row.is_flat else None)
    assert [conv.conv.in_channels for conv in model.decode_head.lateral_convs] == row.channels[:3]

    model.save_pretrained(tmp_path)
    again = Segmentation.from_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    only_here = row.is_flat or row.is_last or (kind.startswith("timm-") and bool(row.values))
    assert (saved["model_type"], saved["backbone_config"]["model_type"].startswith("fastuper_")) == (
        ("fastuper_upernet", True) if only_here else ("upernet", False)
    )

    model, again = model.double(), again.double()
    generator = torch.Generator().manual_seed(1)
    for size in SIZES:
        pixels = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)
        expected = composition(kind, model, pixels)
        with torch.no_grad():
            logits = model(pixels).logits
            assert torch.equal(again(pixels).logits, logits)
        assert error(logits, expected) < 1e-10
        assert torch.equal(torch.stack(model.segment(pixels)), expected.argmax(1))
        labels = torch.randint(5, (2, *size), generator=generator)
        with torch.no_grad():
            loss = model(pixels, labels=labels).loss - 0.4 * auxiliary_loss(model, pixels, labels)
        assert error(loss, F.cross_entropy(expected, labels)) < 1e-10


def auxiliary_loss(model: Any, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    padded = model.image_sizes.pad(pixels)
    maps, _, _ = model._features(padded, False, False)
    logits = resize(model.auxiliary_head(maps), padded.shape[2:])
    return F.cross_entropy(logits[:, :, : labels.shape[1], : labels.shape[2]], labels)


@pytest.mark.parametrize("kind", ROWS)
def test_all_that_is_read_learns_and_has_a_depth(kind):
    model = build(kind).train()
    if any(isinstance(part, nn.Dropout) and part.p for part in model.modules()):
        torch.manual_seed(0)
    pixels, labels = torch.randn(2, 3, 70, 54), torch.randint(5, (2, 70, 54))
    model.gradient_checkpointing_enable()
    model(pixels, labels=labels).loss.backward()
    lacking = {name for name, p in model.named_parameters() if p.grad is None}
    assert not {name for name in lacking if "norm" not in name and "mask_token" not in name}, lacking
    if model.neck is not None:
        assert all(p.grad.abs().sum() > 0 for name, p in model.neck.named_parameters() if "first.bias" not in name)

    groups = parameter_groups(model, Recipe(1.0, 0.0, layer_decay=0.5))
    rates = {name: group["lr"] for group in groups for name, _ in group["params"]}
    assert all(rate == 1 for name, rate in rates.items() if not name.startswith("backbone."))
    first = next(name for name in rates if name.startswith("backbone."))
    blocks = {0.5**depth for depth in range(1 if ROWS[kind][1].is_flat else 3, 8)}
    deepest = (ROWS[kind][1].values.get("depth") or 6) + 1 if ROWS[kind][1].is_flat else 7
    assert rates[first] == 0.5**deepest == min(rates.values())
    assert {rate for name, rate in rates.items() if name.startswith("backbone.")} - {1.0} <= blocks

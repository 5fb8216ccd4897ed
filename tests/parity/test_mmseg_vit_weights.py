"""mmsegmentation's ViT, BEiT and MAE with their necks, converted: the same maps; refused settings."""

from __future__ import annotations

import pytest
import torch

from bench.numerics import error
from fastuper.models.backbones import build_backbone
from fastuper.models.backbones.vit import ViTPyramidConfig
from fastuper.weights.conversion import Choices
from fastuper.weights.errors import CheckpointError
from fastuper.weights.mmseg_vit import BEIT_OR_MAE, VISION_TRANSFORMER
from tests.parity.foreign_mmseg_vit import Model

EPS = {"norm_cfg": {"type": "LN", "eps": 1e-6}}
FOUR = {"type": "MultiLevelNeck", "in_channels": [16] * 4, "out_channels": 12, "scales": [4, 2, 1, 0.5]}
NORMED = {**FOUR, "norm_cfg": {"type": "SyncBN"}, "act_cfg": {"type": "ReLU"}}
PYRAMID = {"type": "Feature2Pyramid", "embed_dim": 16}
ODD = [(33, 41), (24, 72)]

CASES = {
    "vit": ({"type": "VisionTransformer", "img_size": (32, 32), **EPS}, FOUR, [(32, 32), (16, 64), *ODD]),
    "vit-options": (
        {
            "type": "VisionTransformer",
            "img_size": (32, 48),
            "in_channels": 5,
            "with_cls_token": False,
            "qkv_bias": False,
            "patch_bias": False,
            "patch_norm": True,
            "pre_norm": True,
            "final_norm": True,
            "num_fcs": 3,
        },
        NORMED,
        [(32, 48), (48, 32), *ODD],
    ),
    "vit-one-map": (
        {"type": "VisionTransformer", "img_size": (32, 40), "out_indices": [3]},
        {"type": "MultiLevelNeck", "in_channels": [16], "out_channels": 12},
        [(32, 40), *ODD],
    ),
    "vit-other-scales": (
        {"type": "VisionTransformer", "img_size": (32, 32), "out_indices": [0, 3]},
        {"type": "MultiLevelNeck", "in_channels": [16] * 2, "out_channels": 12, "scales": [0.25, 1.5]},
        [(32, 32), *ODD[:1], (88, 56)],
    ),
    "vit-no-neck": ({"type": "VisionTransformer", "img_size": (32, 32)}, None, [(32, 32), (5, 3), *ODD]),
    "vit-feature2pyramid": ({"type": "VisionTransformer", "img_size": (32, 32)}, PYRAMID, [(32, 32), *ODD]),
    "beit": ({"type": "BEiT", "img_size": (32, 32), **EPS}, PYRAMID, [(32, 32), (16, 64), (39, 33)]),
    "beit-options": (
        {
            "type": "BEiT",
            "img_size": (32, 48),
            "qv_bias": False,
            "patch_norm": True,
            "final_norm": True,
            "num_fcs": 3,
            "init_values": 1e-3,
        },
        {**PYRAMID, "rescales": [2, 1, 0.5, 0.25]},
        [(32, 48), (48, 32), (39, 49)],
    ),
    "mae": ({"type": "MAE", "img_size": (32, 48), "final_norm": True}, PYRAMID, [(32, 48), (48, 32), (39, 49)]),
}


def convert(model, settings=None, **given):
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(("backbone.", "neck."))}
    (dialect,) = [one for one in (VISION_TRANSFORMER, BEIT_OR_MAE) if one.recognises(tensors)]
    part = dialect.convert(tensors, model.settings if settings is None else settings, Choices(given), "x.pth", "")
    assert [row.source for row in part.translated.rows] == list(tensors)
    return part


def built(part):
    values = dict(part.config)
    assert values.pop("model_type") == "vit_pyramid"
    backbone = build_backbone(ViTPyramidConfig(**values)).double().eval()
    backbone.load_state_dict(part.translated.tensors)
    return backbone


def assert_same(backbone, model, sizes):
    channels = model.backbone.patch_embed.projection.in_channels
    for size in sizes:
        image = torch.randn(2, channels, *size, dtype=torch.float64)
        with torch.no_grad():
            ours, theirs = backbone(image).feature_maps, model(image)
            attended = backbone(image, output_attentions=True).feature_maps
        for x, again, expected in zip(ours, attended, theirs, strict=True):
            assert error(x, expected) < 1e-12, size
            assert error(again, expected) < 1e-12, size


@pytest.mark.parametrize("case", CASES)
def test_the_same_maps(case):
    backbone, neck, sizes = CASES[case]
    model = Model(backbone, neck)
    assert_same(built(convert(model)), model, sizes)


def test_without_settings_options_and_defaults_decide():
    model = Model({"type": "VisionTransformer", "img_size": (32, 48), **EPS}, FOUR)
    part = convert(model, {}, num_heads=4, image_size=[32, 48])
    assert_same(built(part), model, [(32, 48)])
    beit = Model({"type": "BEiT", "img_size": (32, 32), **EPS}, PYRAMID)
    assert_same(built(convert(beit, {}, out_indices=[0, 1, 2, 3])), beit, [(32, 32)])


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("beit", {"image_size": [32, 64]}, "has 52 rows, but an image of 32 x 64 .* has 108 relative positions"),
        ("vit", {"image_size": [32, 64]}, "has 17 rows, but a class token and the patches of an image .* are 33"),
        ("vit", {"num_heads": [4, 4]}, "num_heads=.* must be one number"),
        ("vit", {"num_heads": 4, "neck_scales": [4, 2, 1]}, "its neck has 4 levels, and neck_scales=.4, 2, 1"),
        ("vit", {"num_heads": 4, "out_indices": [1, 2, 3, 4]}, "must be numbers of its 4 blocks, from 0"),
    ],
)
def test_options_that_contradict_the_tensors(kind, given, message):
    with pytest.raises((CheckpointError, ValueError), match=message):
        convert(Model(*CASES[kind][:2]), {}, **given)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("backbone", {"output_cls_token": True}, "output_cls_token=True cannot be converted"),
        ("backbone", {"patch_pad": "same"}, "patch_pad='same' cannot be converted; 'corner' and 0 can"),
        ("backbone", {"type": "mmpretrain.VisionTransformer"}, "its backbone is 'mmpretrain.VisionTransformer'"),
        ("backbone", {"norm_cfg": {"type": "BN"}}, "its ViT has the norm 'BN'"),
        ("backbone", {"act_cfg": {"type": "PReLU"}}, "its ViT has the activation"),
        ("backbone", {"with_cls_token": "no"}, "with_cls_token='no' in its settings cannot be read"),
        ("neck", {"type": "FPN"}, "its neck is 'FPN'"),
        ("neck", {"norm_cfg": {"type": "GN"}}, "its neck has the norm 'GN'"),
    ],
)
def test_what_ours_cannot_be_is_refused(part, values, message):
    model = Model(*CASES["vit"][:2])
    settings = {**model.settings, part: {**model.settings[part], **values}}
    with pytest.raises(CheckpointError, match=f"x.pth: {message}"):
        convert(model, settings)


def test_another_order_of_relative_positions_is_refused():
    model = Model(*CASES["beit"][:2])
    model.backbone.layers[1].attn.relative_position_index[3, 4] += 1
    with pytest.raises(CheckpointError, match=r"layers.1.attn.relative_position_index has another order"):
        convert(model)

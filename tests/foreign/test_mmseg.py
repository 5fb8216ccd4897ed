"""Options of mmsegmentation's own networks: the logits of each converted network, and what is refused, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from fastuper import UperNetConfig, UperNetForSemanticSegmentation
from fastuper.weights.conversion import Choices, Conversion, Source
from fastuper.weights.convert import convert_source
from tests.foreign.makers import build_mmseg, logits_of_mmseg, settings_of
from tests.foreign.test_conversions import (
    CONVNEXT,
    CONVNEXT_CHANNELS,
    RESNET,
    RESNET_CHANNELS,
    SWIN,
    SWIN_CHANNELS,
    VIT,
    Case,
    difference,
    record,
)

BASIC_CHANNELS = (4, 8, 16, 32)
DILATED = {"strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4), "contract_dilation": False}
FULL = (64, 128, 256, 512)


def swin(head: Mapping[str, Any] | None = None, auxiliary: Any = (), **values: Any) -> dict[str, Any]:
    return settings_of({**SWIN, **values}, SWIN_CHANNELS, head=head, auxiliary=dict(auxiliary))


def convnext(**values: Any) -> dict[str, Any]:
    return settings_of({**CONVNEXT, **values}, CONVNEXT_CHANNELS, auxiliary={})


def resnet(kind: str = "ResNet", depth: int = 18, **values: Any) -> dict[str, Any]:
    channels = BASIC_CHANNELS if depth < 50 else RESNET_CHANNELS
    return settings_of({**RESNET, "type": kind, "depth": depth, **values}, channels, auxiliary={})


def of_mmpretrain(kind: str) -> dict[str, Any]:
    backbone = {"type": f"mmpretrain.{kind}", "depth": 18, "stem_channels": 8, "out_indices": (0, 1, 2, 3)}
    return settings_of(backbone, FULL, auxiliary={})


def five_stages() -> dict[str, Any]:
    five = {"depths": [1] * 5, "num_heads": [1, 1, 2, 2, 4], "strides": (4, 2, 2, 2, 2), "out_indices": (0, 1, 2, 3, 4)}
    head = {"in_index": [1, 2, 3, 4], "in_channels": [16, 32, 64, 128]}
    return settings_of({**SWIN, **five}, (8, 16, 32, 64, 128), head=head, auxiliary={"in_index": 3})


OPTIONS: dict[str, tuple[Callable[[], dict[str, Any]], tuple[int, int]]] = {
    "Swin, mlp_ratio 2.3": (lambda: swin(mlp_ratio=2.3), (67, 93)),
    "Swin, qk_scale": (lambda: swin(qk_scale=0.7), (67, 93)),
    "Swin, patches of 2": (lambda: swin(patch_size=2, strides=(2, 2, 2, 2)), (67, 93)),
    "Swin, ReLU": (lambda: swin(act_cfg={"type": "ReLU"}), (67, 93)),
    "Swin, positions": (lambda: swin(use_abs_pos_embed=True, pretrain_img_size=(64, 96)), (64, 96)),
    "Swin, five stages": (five_stages, (131, 163)),
    "Swin, indices from the end": (lambda: swin({"in_index": [-4, -3, -2, -1]}), (67, 93)),
    "Swin, an auxiliary head without convolutions": (
        lambda: swin(auxiliary={"num_convs": 0, "channels": 32, "concat_input": True}),
        (67, 93),
    ),
    "Swin, one logit for two classes": (
        lambda: swin({"num_classes": 2, "out_channels": 1, "threshold": 0.4}),
        (67, 93),
    ),
    "ConvNeXt, 1x1 convolutions, 4 channels": (lambda: convnext(linear_pw_conv=False, in_channels=4), (67, 93)),
    "ConvNeXt, equal widths": (
        lambda: settings_of(
            {**CONVNEXT, "arch": {"depths": [1, 1, 1, 1], "channels": [8] * 4}, "stem_patch_size": 2}, (8,) * 4
        ),
        (41, 57),
    ),
    "ResNet-18, averaged shortcuts alone": (lambda: resnet(avg_down=True), (67, 93)),
    "ResNet-50, grid": (
        lambda: resnet(depth=50, strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), multi_grid=(1, 2, 4)),
        (67, 93),
    ),
    "ResNet-18, strides": (lambda: resnet(strides=(2, 2, 2, 2)), (131, 93)),
    "ResNet-18, other strides": (lambda: resnet(strides=(1, 1, 2, 3)), (67, 93)),
    "ResNet-18, dilated": (lambda: resnet(**DILATED), (67, 93)),
    "ResNetV1c-18, contracted": (lambda: resnet("ResNetV1c", **{**DILATED, "contract_dilation": True}), (67, 93)),
    "ResNetV1d-50, caffe, dilated": (lambda: resnet("ResNetV1d", 50, style="caffe", **DILATED), (67, 93)),
    "mmpretrain ResNet": (lambda: of_mmpretrain("ResNet"), (67, 93)),
    "mmpretrain ResNetV1c": (lambda: of_mmpretrain("ResNetV1c"), (67, 93)),
    "mmpretrain ResNetV1d": (lambda: of_mmpretrain("ResNetV1d"), (67, 93)),
    "mmpretrain Swin that pads": (
        lambda: settings_of(
            {
                "type": "mmpretrain.SwinTransformer",
                "arch": {"embed_dims": 8, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 2, 4]},
                "window_size": 4,
                "out_indices": (0, 1, 2, 3),
                "pad_small_map": True,
            },
            SWIN_CHANNELS,
        ),
        (67, 93),
    ),
    "ViT without a neck, maps in another order": (
        lambda: settings_of(VIT, (16,) * 4, head={"in_index": [3, 1, 2, 0]}),
        (70, 96),
    ),
}


def converted(settings: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> Conversion:
    return convert_source(Source("x.pth", state, {"model": settings}), Choices())


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, record_property):
    make, size = OPTIONS[name]
    settings = make()
    network: Any = build_mmseg(settings).double()
    conversion = converted(settings, network.state_dict())
    model = UperNetForSemanticSegmentation(UperNetConfig.from_dict(dict(conversion.config))).eval()
    missing, unexpected = model.load_state_dict(dict(conversion.tensors), strict=False, assign=True)
    assert unexpected == []
    assert all(key.endswith("relative_position_index") for key in missing)
    channels = settings["backbone"].get("in_channels", 3)
    image = torch.randn(2, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        worst = difference(model(image).logits, logits_of_mmseg(network)(image)[0])
        assert worst < 1e-10
        if model.config.use_auxiliary_head:
            expected = network.auxiliary_head(network.extract_feat(image))
            assert difference(model.auxiliary_head(model.backbone(image).feature_maps), expected) < 1e-10
    case = Case(lambda _: network, sizes=[size], transformers=not conversion.only_fastuper)
    record(record_property, f"mmseg {name}", case, len(network.state_dict()), {torch.float64: worst})


def over_resnet(head: str, **values: Any) -> dict[str, Any]:
    """Return a network with another head."""
    settings = settings_of({**RESNET, "depth": 18}, BASIC_CHANNELS)
    common = {"num_classes": 5, "norm_cfg": {"type": "BN"}, "channels": 8}
    return {**settings, "decode_head": {"type": head, **common, **values}}


LEVELS = {"in_channels": list(BASIC_CHANNELS), "in_index": [0, 1, 2, 3]}
LAST = {"in_channels": 32, "in_index": 3}
RESNEXT = {"type": "ResNeXt", "depth": 50, "groups": 32, "base_width": 4, "norm_cfg": {"type": "BN"}}
WIDE = (256, 512, 1024, 2048)
REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "FCN": (lambda: over_resnet("FCNHead", **LAST), "FCN"),
    "PSPNet": (lambda: over_resnet("PSPHead", **LAST), "PSP"),
    "DeepLabV3": (lambda: over_resnet("ASPPHead", **LAST), "ASPP|DeepLab"),
    "SegFormer": (lambda: over_resnet("SegformerHead", **LEVELS), "SegFormer|SegformerHead"),
    "Semantic FPN": (lambda: over_resnet("FPNHead", feature_strides=[4, 8, 16, 32], **LEVELS), "FPN"),
    "GroupNorm in the head": (lambda: swin({"norm_cfg": {"type": "GN", "num_groups": 2}}), "'GN'|GroupNorm"),
    "InstanceNorm in the head": (lambda: swin({"norm_cfg": {"type": "IN"}}), "'IN'|no BatchNorm"),
    "no norm in the head": (lambda: swin({"norm_cfg": None}), "no norm"),
    "patch_norm": (lambda: swin(patch_norm=False), "patch_norm=False"),
    "three levels": (
        lambda: swin({"in_index": [0, 1, 2], "in_channels": [8, 16, 32]}),
        "over 3 (feature maps|levels)",
    ),
    "GRN and LayerScale": (lambda: convnext(use_grn=True), "GRN and LayerScale"),
    "ResNeXt": (lambda: settings_of(RESNEXT, WIDE), "ResNeXt"),
    "GroupNorm in the backbone": (
        lambda: resnet(norm_cfg={"type": "GN", "num_groups": 2}),
        "'GN'|other parts than convolutions and BatchNorm",
    ),
    "a neck": (
        lambda: settings_of(
            {**RESNET, "depth": 18},
            (8,) * 4,
            neck={"type": "FPN", "in_channels": list(BASIC_CHANNELS), "out_channels": 8, "num_outs": 4},
        ),
        "with the neck 'FPN'|with a neck",
    ),
}


@pytest.mark.parametrize("settings_are_known", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name, settings_are_known):
    make, message = REFUSED[name]
    settings = make()
    state = build_mmseg(settings).state_dict()
    with pytest.raises(OSError, match=message) as caught:
        converted(settings if settings_are_known else {}, state)
    assert "\n" not in str(caught.value)

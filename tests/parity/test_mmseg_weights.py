"""mmsegmentation's UPerNets, converted: the logits are those of its networks, which `foreign_mmseg` states again."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from bench.numerics import error
from bench.pairs import images, randomize
from fastuper import UperNetConfig, UperNetForSemanticSegmentation, UperNetImageProcessor
from fastuper.models.converted import build_converted, save_converted
from fastuper.weights.conversion import Choices, Conversion, Source
from fastuper.weights.convert import check_filled, convert_source
from fastuper.weights.errors import CheckpointError
from tests.parity.foreign_mmseg import (
    BasicBlock,
    ConvNext,
    EncoderDecoder,
    FCNHead,
    ResNet,
    Swin,
    UPerHead,
)

SWIN, CONVNEXT, BASIC, BOTTLENECK = (8, 16, 32, 64), (8, 12, 16, 24), (4, 8, 16, 32), (16, 32, 64, 128)
HEAD = {"type": "UPerHead", "in_index": [0, 1, 2, 3], "norm_cfg": {"type": "SyncBN", "requires_grad": True}}
AUXILIARY = {"type": "FCNHead", "in_index": 2, "norm_cfg": {"type": "SyncBN"}, "loss_decode": {"loss_weight": 0.3}}


def foreign(backbone: nn.Module, channels: tuple[int, ...], auxiliary: Any = (), **head: Any) -> EncoderDecoder:
    """Return a network with random tensors; `auxiliary` are the arguments of its FCNHead, None for no head."""
    torch.manual_seed(0)
    second = None if auxiliary is None else FCNHead(channels[2], **dict(auxiliary))
    network = EncoderDecoder(backbone, UPerHead(channels, **head), second)
    randomize(network)
    for name, tensor in network.named_parameters():
        if name.endswith("gamma"):
            nn.init.uniform_(tensor, 0.1, 0.5)
    return network.double().eval()


def settings(
    backbone: Mapping[str, Any], head: Mapping[str, Any] | None = None, auxiliary: Any = None, **more: Any
) -> dict[str, Any]:
    """Return the settings in a checkpoint's metadata."""
    model: dict[str, Any] = {"type": "EncoderDecoder", "backbone": backbone, "decode_head": {**HEAD, **(head or {})}}
    if auxiliary is None:
        auxiliary = AUXILIARY
    return {"model": {**model, "auxiliary_head": auxiliary}, **more}


def convert(network: nn.Module, config: Mapping[str, Any] | None = None, **options: Any) -> Conversion:
    return convert_source(Source("x.pth", network.state_dict(), config or {}), Choices(options))


def ours(conversion: Conversion) -> UperNetForSemanticSegmentation:
    """Return our network in float64; each of its tensors is filled."""
    model = UperNetForSemanticSegmentation(UperNetConfig.from_dict(dict(conversion.config)))
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    computed = [name for name in own if name.endswith("relative_position_index")]
    assert check_filled("x.pth", conversion, own, computed) == []
    model.load_state_dict(dict(conversion.tensors), strict=False, assign=True)
    return model.eval()


def check_equal(network: EncoderDecoder, conversion: Conversion, size: tuple[int, int], channels: int = 3) -> None:
    """Compare the logits, and those of the auxiliary head."""
    model, pixels = ours(conversion), images(2, channels, *size)
    with torch.no_grad():
        assert error(model(pixels).logits, network(pixels)) < 1e-10
        if model.config.use_auxiliary_head:
            assert network.auxiliary_head is not None
            expected = network.auxiliary_head(network.backbone(pixels))
            assert error(model.auxiliary_head(model.backbone(pixels).feature_maps), expected) < 1e-10


DILATED = {"strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4)}
CASES: dict[str, tuple[Any, tuple[int, ...], dict[str, Any], int]] = {
    "swin": (lambda: Swin(), SWIN, {}, 3),
    "swin, window 7, 5 channels": (lambda: Swin(window=7, channels=5, patch=2), SWIN, {}, 5),
    "swin, MLPs of 2.3": (lambda: Swin(mlp_ratio=2.3, qkv_bias=False), SWIN, {}, 3),
    "swin, qk_scale": (
        lambda: Swin(qk_scale=0.7, act=nn.ReLU),
        SWIN,
        {"qk_scale": 0.7, "act_cfg": {"type": "ReLU"}},
        3,
    ),
    "convnext": (lambda: ConvNext(), CONVNEXT, {}, 3),
    "convnext, 1x1 convolutions": (lambda: ConvNext(linear=False, patch=2, channels=4), CONVNEXT, {}, 4),
    "convnext, no scale": (lambda: ConvNext(scaled=False), CONVNEXT, {}, 3),
    "convnext v2": (lambda: ConvNext(scaled=False, grn=True), CONVNEXT, {}, 3),
    "convnext v2, 1x1 convolutions": (lambda: ConvNext(linear=False, scaled=False, grn=True), CONVNEXT, {}, 3),
    "resnet": (lambda: ResNet(), BOTTLENECK, {"style": "pytorch"}, 3),
    "resnet, basic": (lambda: ResNet(BasicBlock, channels=1), BASIC, {"style": "caffe"}, 1),
    "resnet, caffe": (lambda: ResNet(style="caffe"), BOTTLENECK, {"style": "caffe"}, 3),
    "resnet, first stride": (lambda: ResNet(strides=(2, 2, 2, 2)), BOTTLENECK, {"strides": (2, 2, 2, 2)}, 3),
    "resnet, dilated": (lambda: ResNet(**DILATED), BOTTLENECK, DILATED, 3),
    "resnet, contracted": (
        lambda: ResNet(contract_dilation=True, **DILATED),
        BOTTLENECK,
        {"contract_dilation": True, **DILATED},
        3,
    ),
    "v1c": (lambda: ResNet(deep_stem=True, stem=6), BOTTLENECK, {"type": "ResNetV1c"}, 3),
    "v1c, basic, dilated": (lambda: ResNet(BasicBlock, deep_stem=True, **DILATED), BASIC, DILATED, 3),
    "v1d": (lambda: ResNet(deep_stem=True, avg_down=True), BOTTLENECK, {"type": "ResNetV1d"}, 3),
    "v1d, grid": (
        lambda: ResNet(deep_stem=True, avg_down=True, multi_grid=(2, 4)),
        BOTTLENECK,
        {"multi_grid": (2, 4, 8)},
        3,
    ),
}
NEEDS_SETTINGS = {"swin, qk_scale", "resnet, contracted", "v1d, grid"}
GIVEN: dict[str, dict[str, Any]] = {
    "resnet, caffe": {"resnet_style": "caffe"},
    "resnet, first stride": {"strides": [2, 2, 2, 2]},
    "resnet, dilated": {name: list(values) for name, values in DILATED.items()},
    "v1c, basic, dilated": {name: list(values) for name, values in DILATED.items()},
}


@pytest.mark.parametrize("case", CASES)
def test_logits(case):
    backbone, channels, values, image_channels = CASES[case]
    network = foreign(backbone(), channels)
    conversion = convert(network, settings(values or {"drop_path_rate": 0.1}))
    check_equal(network, conversion, (67, 93), image_channels)
    assert conversion.config["auxiliary_loss_weight"] == 0.3
    if case not in NEEDS_SETTINGS:
        bare = convert(network, **GIVEN.get(case, {}))
        assert all(torch.equal(tensor, bare.tensors[name]) for name, tensor in conversion.tensors.items())
        contracts = [note for note in bare.notes if note.startswith("contract_dilation: False")]
        assert bool(contracts) is ("dilated" in case)
        same = {"out_features", "depths", "num_channels", "downsample_in_bottleneck", "strides", "dilations"}
        wanted, found = (c.config["backbone_config"] for c in (conversion, bare))
        assert all(found.get(name) == wanted.get(name) for name in same)


@pytest.mark.parametrize(
    ("head", "auxiliary"),
    [
        ({"pool_scales": (1, 3)}, {}),
        ({"align_corners": True}, {"num_convs": 2, "concat_input": True}),
        ({"classes": 1}, {"classes": 1, "num_convs": 0, "dim": 32, "concat_input": True}),
        ({"dim": 6}, None),
    ],
)
def test_heads(head, auxiliary):
    network = foreign(Swin(), SWIN, auxiliary, **head)
    values = {name: value for name, value in head.items() if name in ("pool_scales", "align_corners")}
    conversion = convert(network, settings({"mlp_ratio": 4}, values))
    assert conversion.config["use_auxiliary_head"] is (auxiliary is not None)
    assert bool(conversion.only_fastuper) is head.get("align_corners", False)
    check_equal(network, conversion, (45, 70))


def test_a_position_table_belongs_to_an_image_size():
    network = foreign(Swin(positions=16 * 24), SWIN)
    conversion = convert(network, settings({"pretrain_img_size": (64, 96), "use_abs_pos_embed": True}))
    check_equal(network, conversion, (64, 96))
    assert conversion.config["backbone_config"]["image_size"] == [64, 96]
    with pytest.raises(ValueError, match=r"does not say its image size.*give image_size"):
        convert(network)
    given = convert(network, image_size=[64, 96]).config["backbone_config"]
    assert given["image_size"] == [64, 96]
    with pytest.raises(OSError, match="has 384 positions, which images of 64 x 64"):
        convert(network, image_size=[64, 64])


def test_the_head_chooses_among_five_stages():
    backbone = Swin(depths=(1,) * 5, heads=(1, 2, 2, 4, 4), out_indices=(0, 1, 2, 3, 4))
    network = foreign(backbone, (16, 32, 64, 128), {"in_index": 3}, in_index=(1, 2, 3, 4))
    config = settings({"depths": (1,) * 5}, {"in_index": [1, 2, -2, -1]}, {**AUXILIARY, "in_index": 3})
    conversion = convert(network, config)
    left = {row.source: row.note for row in conversion.rows if not row.targets and "index" not in row.source}
    why = "a norm of a feature map that the head does not read"
    assert left == {"backbone.norm0.weight": why, "backbone.norm0.bias": why}
    check_equal(network, conversion, (131, 67))


@pytest.mark.parametrize(
    ("arguments", "values", "why"),
    [
        ({"kernel": 1}, {}, r"convolutions of \(1, 1\), fastuper's are 3 x 3"),
        ({}, {"dilation": 2}, "its convolutions have the dilation 2"),
        ({}, {"in_index": 1}, "it reads the backbone's map 1"),
        ({}, {"type": "PSPHead"}, "it is a PSPHead"),
        ({}, {"norm_cfg": {"type": "BN", "eps": 0.1}}, "its norm is"),
        ({}, {"act_cfg": {"type": "GELU"}}, "its activation is"),
        ({"classes": 3}, {}, "it has other classes"),
    ],
)
def test_an_auxiliary_head_of_another_kind_is_left_out(arguments, values, why):
    network = foreign(ConvNext(), CONVNEXT, arguments)
    conversion = convert(network, settings({"drop_path_rate": 0.4}, None, {**AUXILIARY, **values}))
    left = [row for row in conversion.rows if not row.targets]
    assert {row.source for row in left} == {name for name in network.state_dict() if name.startswith("auxiliary_head.")}
    assert any("the auxiliary head is left out" in note for note in conversion.notes)
    assert re.search(why, left[0].note)
    check_equal(network, conversion, (40, 57))


def test_auxiliary_heads_in_a_list():
    network = foreign(ConvNext(), CONVNEXT)
    network.auxiliary_head = nn.ModuleList([network.auxiliary_head])
    assert convert(network, settings({"a": 1}, None, [AUXILIARY])).config["use_auxiliary_head"]
    assert convert(network).config["use_auxiliary_head"]
    network.auxiliary_head.append(FCNHead(8, in_index=0))
    conversion = convert(network, settings({"a": 1}, None, [AUXILIARY, AUXILIARY]))
    assert not conversion.config["use_auxiliary_head"]
    assert any("there are 2 auxiliary heads" in note for note in conversion.notes)


@pytest.mark.parametrize("kind", ["swin", "convnext", "resnet"])
def test_transformers_loads_the_result(kind, tmp_path):
    backbone, channels, values, _ = CASES[kind]
    network = foreign(backbone(), channels)
    conversion = convert(network, settings(values or {"a": 1}))
    assert conversion.only_fastuper == ""
    save_converted(build_converted("x.pth", conversion), tmp_path)
    theirs = transformers.UperNetForSemanticSegmentation.from_pretrained(tmp_path, dtype=torch.float64).eval()
    pixels = images(1, 3, 64, 96)
    with torch.no_grad():
        assert error(theirs(pixels).logits, network(pixels)) < 1e-10


# What cannot be converted ---------------------------------------------------------------------------------------------


@functools.cache
def tensors(kind: str) -> Mapping[str, torch.Tensor]:
    """Return the state dict of a case."""
    backbone, channels, _, _ = CASES[kind]
    return foreign(backbone(), channels).state_dict()


def without(part: str) -> Any:
    return lambda state: {name: tensor for name, tensor in state.items() if part not in name}


def added(name: str, *shape: int) -> Any:
    return lambda state: {**state, name: torch.zeros(shape)}


def renamed(old: str, new: str) -> Any:
    return lambda state: {name.replace(old, new): tensor for name, tensor in state.items()}


def grouped(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor[:, ::2] if "conv2.weight" in name else tensor for name, tensor in state.items()}


def turned(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.flip(1) if name.endswith("position_index") else tensor for name, tensor in state.items()}


NOTHING = settings({"a": 1})


@pytest.mark.parametrize(
    ("kind", "change", "config", "message"),
    [
        ("swin", without("patch_embed.norm"), {}, "no norm after the patches"),
        ("swin", None, settings({"norm_cfg": {"type": "LN", "eps": 1e-6}}), "norms of its Swin have eps=1e-06"),
        ("swin", None, settings({"strides": (4, 2, 4, 2)}), "has the strides"),
        ("swin", None, settings({"act_cfg": {"type": "Swish"}}), "has the activation"),
        ("swin", None, settings({"type": "mmpretrain.SwinTransformer"}), "mmpretrain's SwinTransformer"),
        ("swin", turned, {}, "another order of relative positions"),
        ("swin", without("stages.1.blocks.0.attn.w_msa.relative_position_bias_table"), {}, "lacks .*bias_table"),
        ("swin", added("backbone.stages.0.blocks.0.attn.w_msa.other", 1), {}, "has 1 tensors of another network"),
        ("convnext", added("backbone.stages.0.0.grn.gamma", 8), {}, "its blocks have GRN and LayerScale"),
        ("convnext", None, settings({"norm_cfg": {"type": "LN2d"}}), "norms of its ConvNeXt have eps=1e-05"),
        ("resnet", grouped, {}, "groups, as a ResNeXt's"),
        ("resnet", None, settings({"type": "ResNeXt"}), "its backbone is a 'ResNeXt'"),
        ("resnet", None, settings({"norm_cfg": {"type": "GN"}}), "its ResNet has the norm 'GN'"),
        ("resnet", None, settings({"dcn": {"type": "DCN"}}), "deformable convolutions"),
        ("resnet", None, settings({"conv_cfg": {"type": "ConvAWS"}}), "its ResNet has the convolutions"),
        ("resnet", renamed(".bn1.", ".gn1."), {}, "other parts than convolutions and BatchNorm"),
        ("resnet", added("backbone.layer1.0.context_block.weight", 1), {}, "plugins"),
        ("resnet", None, settings({"strides": (1, 2)}), "strides=.* are not as many as the 4 stages"),
        ("resnet", None, settings({"style": "tensorflow"}), "resnet_style must be pytorch or caffe"),
        ("resnet", renamed("backbone.layer", "backbone.block"), {}, "its backbone is of unknown kind"),
        ("resnet", added("neck.fpn_convs.0.conv.weight", 8, 8, 3, 3), {}, "unknown kind .* with a neck"),
        ("swin", None, settings({"a": 1}, {"in_index": [0, 1, 3, 2]}), "fastuper's reads the finest first"),
        ("swin", None, settings({"a": 1}, {"in_index": [0, 1, 2]}), "3 feature maps to a head over 4"),
        ("swin", None, settings({"a": 1}, {"in_index": [0, 1, 2, 4]}), "reads the maps .* returns 4"),
        ("swin", None, settings({"a": 1}, {"pool_scales": (1, 2)}), "its pyramid pooling has 4 branches"),
        (
            "swin",
            None,
            settings({"a": 1}, {"norm_cfg": {"type": "BN", "eps": 1e-3}}),
            "norms of its head have eps=0.001",
        ),
        ("swin", None, settings({"a": 1}, {"norm_cfg": {"type": "GN"}}), "its head has the norm 'GN'"),
        ("swin", None, settings({"a": 1}, {"act_cfg": {"type": "GELU"}}), "its head has act_cfg"),
        ("swin", None, settings({"a": 1}, {"conv_cfg": {"type": "ConvAWS"}}), "its head has conv_cfg"),
        ("swin", None, settings({"a": 1}, {"type": "PSPHead"}), "with PSPHead; only UPerHead"),
        ("swin", renamed("decode_head.bottleneck.bn", "decode_head.bottleneck.gn"), {}, "the module GroupNorm"),
        ("swin", added("decode_head.bottleneck.conv.bias", 16), {}, "convolutions of its head have no norm"),
        ("swin", without("decode_head.fpn_bottleneck.bn"), {}, "decode_head.fpn_bottleneck has no BatchNorm"),
        ("swin", without("conv_seg"), {}, "a UPerHead without conv_seg"),
        ("swin", added("other.weight", 1), {}, "has 1 tensors of another network, such as other.weight"),
    ],
)
def test_what_is_refused(kind, change, config, message):
    state = tensors(kind)
    source = Source("x.pth", state if change is None else change(state), config)
    with pytest.raises((OSError, ValueError), match=message) as caught:
        convert_source(source, Choices())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": [1, 1, 1, 1]}, "num_heads=.* contradicts the checkpoint"),
        ({"pool_scales": [1, 2, 3]}, "its pyramid pooling has 4 branches"),
        ({"resnet_style": "caffe"}, "has no use for resnet_style"),
        ({"out_indices": [0, 1, 2]}, "out_indices=.* contradicts the checkpoint"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises((OSError, ValueError), match=message):
        convert_source(Source("x.pth", tensors("swin")), Choices(options))


# Settings -------------------------------------------------------------------------------------------------------------

NORM = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}
RESIZE = {"type": "Resize", "scale": (256, 64), "keep_ratio": True}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {
                "data_preprocessor": {"bgr_to_rgb": True, "size": (64, 64), **NORM},
                "test_pipeline": [{"type": "LoadImageFromFile"}, RESIZE],
                "train_pipeline": [{"type": "LoadAnnotations", "reduce_zero_label": True}],
            },
            {**IMAGENET, "size": {"shortest_edge": 64, "longest_edge": 256}, "do_reduce_labels": True},
        ),
        (
            {"data_preprocessor": {**NORM, "rgb_to_bgr": True}, "dataset_type": "ADE20KDataset"},
            {**IMAGENET, "do_reduce_labels": True},
        ),
        (
            {
                "test_pipeline": [
                    {
                        "type": "MultiScaleFlipAug",
                        "img_scale": (256, 64),
                        "transforms": [{"type": "Resize", "keep_ratio": True}, {"type": "Normalize", **NORM}],
                    }
                ],
                "img_norm_cfg": NORM,
            },
            {
                **IMAGENET,
                "do_flip_channel_order": True,
                "size": {"shortest_edge": 64, "longest_edge": 256},
                "do_reduce_labels": False,
            },
        ),
        (
            {"img_norm_cfg": {"to_rgb": True, **NORM}, "crop_size": (48, 64)},
            {**IMAGENET, "size": {"height": 48, "width": 64}, "do_reduce_labels": False},
        ),
        (
            {"data_preprocessor": {"bgr_to_rgb": True}, "test_pipeline": [{"type": "LoadImageFromFile"}]},
            {"rescale_factor": 1.0, "do_normalize": False, "do_resize": False, "do_reduce_labels": False},
        ),
        (
            {"data_preprocessor": {**NORM}, "test_pipeline": [{**RESIZE, "keep_ratio": False}]},
            {
                **IMAGENET,
                "do_flip_channel_order": True,
                "size": {"height": 64, "width": 256},
                "do_reduce_labels": False,
            },
        ),
        (
            {
                "data_preprocessor": {"bgr_to_rgb": True, **NORM},
                "test_pipeline": [{"type": "mmseg.ResizeShortestEdge", "scale": (96, 64), "max_size": 200}],
            },
            {**IMAGENET, "size": {"shortest_edge": 64, "longest_edge": 200}, "do_reduce_labels": False},
        ),
        ({}, {**IMAGENET, "do_reduce_labels": False}),
    ],
)
def test_preprocessing(config, expected):
    conversion = convert_source(Source("x.pth", tensors("convnext"), {**NOTHING, **config}), Choices())
    assert dict(conversion.preprocessing) == expected
    UperNetImageProcessor.from_dict(dict(conversion.preprocessing))


@pytest.mark.parametrize(
    ("step", "note"),
    [
        ({"type": "Resize", "scale_factor": 0.5, "keep_ratio": True}, "by the factor 0.5; fastuper does not"),
        ({"type": "ResizeToMultiple", "size_divisor": 16}, "multiples of 16 pixels"),
    ],
)
def test_sizes_that_a_processor_cannot_say_are_noted(step, note):
    config = {**NOTHING, "data_preprocessor": {"size": (64, 64), **NORM}, "test_pipeline": [step]}
    conversion = convert_source(Source("x.pth", tensors("convnext"), config), Choices())
    assert conversion.preprocessing["do_resize"] is False
    assert any(note in line for line in conversion.notes)


def test_a_configuration_may_have_full_names_of_classes():
    """mmpretrain's Swin has the same names and other shifts, and is refused by either form of its name."""
    full = {
        "type": "mmseg.models.SwinTransformer",
        "norm_cfg": {"type": "torch.nn.LayerNorm"},
        "act_cfg": {"type": "torch.nn.ReLU"},
    }
    head = {"type": "mmseg.models.UPerHead", "norm_cfg": {"type": "torch.nn.SyncBatchNorm"}}
    found = convert_source(Source("x.pth", tensors("swin"), settings(full, head)), Choices())
    assert found.config["backbone_config"]["hidden_act"] == "relu"
    values = settings({**full, "type": "mmpretrain.models.backbones.swin_transformer.SwinTransformer"}, head)
    with pytest.raises(CheckpointError, match=r"mmpretrain's SwinTransformer with pad_small_map=False"):
        convert_source(Source("x.pth", tensors("swin"), values), Choices())


def test_options_say_how_images_are_normalized():
    network = foreign(ConvNext(channels=2), CONVNEXT)
    assert convert(network, mean=[51, 102], std=[25.5, 51]).preprocessing == {
        "image_mean": [0.2, 0.4],
        "image_std": [0.1, 0.2],
        "do_reduce_labels": False,
    }
    source = Source("x.pth", tensors("convnext"))
    found = convert_source(source, Choices({"channel_order": "bgr"}))
    assert found.preprocessing["do_flip_channel_order"] is True
    assert found.preprocessing["image_mean"] == IMAGENET["image_mean"][::-1]
    with pytest.raises(ValueError, match="channel_order must be rgb or bgr"):
        convert_source(source, Choices({"channel_order": "grb"}))


def test_classes_colours_crop_and_tests():
    state = foreign(ConvNext(), CONVNEXT, classes=3, auxiliary={"classes": 3}).state_dict()
    config = {**NOTHING, "train_pipeline": [{"type": "RandomCrop", "crop_size": (48, 64)}]}
    config["model"] = {**config["model"], "test_cfg": {"mode": "slide", "crop_size": (48, 64), "stride": 32}}
    colours = ((1, 2, 3), (4, 5, 6), (7, 8, 9))
    found = convert_source(Source("x.pth", state, config, ("a", "b", "c"), colours), Choices())
    assert found.config["id2label"] == {0: "a", 1: "b", 2: "c"}
    assert found.config["palette"] == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert found.config["crop_size"] == [48, 64]
    assert any("in windows of 48 x 64 pixels, 32 x 32 pixels apart" in note for note in found.notes)
    found = convert_source(Source("x.pth", state, config, ("a", "b"), colours), Choices())
    assert found.config["num_labels"] == 3
    assert "palette" not in found.config
    assert any("has 2 names for 3 classes" in note for note in found.notes)


@pytest.mark.parametrize(("head", "threshold"), [({}, "0.3"), ({"threshold": 0.7}, "0.7"), ({"threshold": 0.5}, None)])
def test_one_class_has_a_threshold(head, threshold):
    state = foreign(ConvNext(), CONVNEXT, classes=1, auxiliary=None).state_dict()
    source = Source("x.pth", state, settings({"a": 1}, head), ("background", "road"), ((0, 0, 0), (255, 0, 9)))
    found = convert_source(source, Choices())
    assert found.config["id2label"] == {0: "road"}
    assert found.config["palette"] == [[0, 0, 0], [255, 0, 9]]
    notes = [note for note in found.notes if "probability of the only class" in note]
    assert (f"is above {threshold};" in notes[0]) if threshold else not notes

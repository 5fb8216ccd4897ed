"""timm's checkpoints as our backbones, and our backbones in timm's names, compared with timm itself."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.models._features import FeatureListNet
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.swin_transformer import SwinTransformer
from torch import nn

import fastuper
from bench.numerics import error
from bench.pairs import images, randomize
from fastuper.models.backbones import build_backbone
from fastuper.models.pyramid_configuration import backbone_config_from
from fastuper.weights.checkpoints import read_source
from fastuper.weights.conversion import Choices
from fastuper.weights.convert import convert_source
from fastuper.weights.errors import CheckpointError
from fastuper.weights.timm import to_timm
from tests.parity.conversions import converted, network, stages_of

SIZES: dict[str, Any] = {"depths": (1, 2, 1, 1), "dims": (8, 12, 16, 24), "num_classes": 5}
BLOCKS: dict[str, Any] = {"layers": (1, 2, 1, 1), "channels": (8, 12, 16, 20), "num_classes": 5}
WINDOWS: dict[str, Any] = {
    "embed_dim": 8,
    "depths": (2, 2, 1, 2),
    "num_heads": (1, 2, 4, 8),
    "window_size": 2,
    "num_classes": 5,
    "always_partition": True,
}
DEEP: dict[str, Any] = {"stem_type": "deep", "stem_width": 8}

# Models, their families in words, and the size of an image. timm's Swin is built for a size; all of its maps are
# multiples of the window, as timm pads other maps after the shift.
MODELS = {
    "convnext": (lambda: ConvNeXt(**SIZES), (67, 93)),
    "convnext-conv-mlp": (lambda: ConvNeXt(**SIZES, conv_mlp=True, head_norm_first=True, in_chans=4), (64, 96)),
    "convnext-no-gamma": (lambda: ConvNeXt(**SIZES, ls_init_value=None, head_hidden_size=6), (67, 93)),
    "convnextv2": (lambda: ConvNeXt(**SIZES, use_grn=True, ls_init_value=None), (67, 93)),
    "resnet-basic": (lambda: ResNet(BasicBlock, **BLOCKS), (67, 93)),
    "resnet-bottleneck": (lambda: ResNet(Bottleneck, **BLOCKS, in_chans=1), (33, 96)),
    "resnet-c": (lambda: ResNet(Bottleneck, **BLOCKS, **DEEP), (67, 93)),
    "resnet-d": (lambda: ResNet(Bottleneck, **BLOCKS, **DEEP, avg_down=True), (67, 93)),
    "resnet-t": (lambda: ResNet(BasicBlock, **BLOCKS, stem_type="deep_tiered", stem_width=8, avg_down=True), (67, 93)),
    "resnet-avg-down": (lambda: ResNet(Bottleneck, **BLOCKS, avg_down=True), (67, 93)),
    "swin": (lambda: SwinTransformer(img_size=(64, 128), **WINDOWS), (64, 128)),
    "swin-no-bias": (
        lambda: SwinTransformer(img_size=64, **WINDOWS, qkv_bias=False, mlp_ratio=2.5, in_chans=5),
        (64, 64),
    ),
}


def drawn(model: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
    randomize(model)
    return model.to(dtype).eval()


def features(model: nn.Module) -> FeatureListNet:
    """Return timm's model of `features_only=True` with the same tensors."""
    last = (1, 2, 3, 4) if isinstance(model, ResNet) else (0, 1, 2, 3)
    net = FeatureListNet(model, out_indices=last, flatten_sequential=not isinstance(model, ResNet))
    return net.eval()


def maps(model: nn.Module, pixels: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        found = features(model)(pixels)
    return [x.permute(0, 3, 1, 2) if isinstance(model, SwinTransformer) else x for x in found]


@pytest.mark.parametrize("name", MODELS)
def test_features(name):
    build, size = MODELS[name]
    model = drawn(build())
    conversion = converted(model.state_dict())
    pixels = images(2, conversion.config["num_channels"], *size)
    ours = network(conversion)
    for x, y in zip(stages_of(ours, pixels), maps(model, pixels), strict=True):
        assert error(x, y) < 1e-10
    left_out = {row.source for row in conversion.rows if not row.targets}
    assert left_out == {key for key in model.state_dict() if key.startswith(("head.", "norm.", "norm_pre.", "fc."))}
    assert conversion.kind == "backbone"
    assert conversion.config["out_features"] == ["stage1", "stage2", "stage3", "stage4"]

    # The names of features_only give the same tensors, and so do other libraries' prefixes.
    state = features(model).state_dict()
    for prefix in ("", "_backbone.", "timm_model."):
        other = converted({prefix + key: value for key, value in state.items()})
        assert other.config == conversion.config
        assert all(torch.equal(other.tensors[key], value) for key, value in conversion.tensors.items())


@pytest.mark.parametrize("name", MODELS)
def test_back(name):
    build, _ = MODELS[name]
    model = drawn(build(), torch.float32)
    ours = network(converted(model.state_dict()))
    for features_only in (True, False):
        back = to_timm(
            ours.config.to_dict(), ours.state_dict(), features_only=features_only, conv_mlp=name == "convnext-conv-mlp"
        )
        assert {row.source for row in back.rows} == set(ours.state_dict())
        left_out = [row.source for row in back.rows if not row.targets]
        assert all(key.startswith("hidden_states_norms.") or key.endswith("_index") for key in left_out)
        if features_only:
            expected = features(model).state_dict()
            net: Any = features(build())
        else:
            net = build()
            net.reset_classifier(0)
            expected = model.state_dict()
        if name not in ("convnext-conv-mlp", "convnext-no-gamma") or features_only:  # other heads than timm's usual
            net.load_state_dict(back.tensors)
        norms = ("norm.", "head.")
        assert {key for key in expected if not key.startswith((*norms, "fc.", "norm_pre."))} <= set(back.tensors)
        for key, value in back.tensors.items():
            assert key.startswith(norms) or torch.equal(value, expected[key])


def test_a_classifier_of_timm_gets_the_norm_of_the_last_map():
    config = fastuper.SwinConfig(embed_dim=8, depths=[2, 1, 1, 2], num_heads=[1, 1, 2, 2], window_size=2,
                                 out_features=["stage3", "stage4"])  # fmt: skip
    ours = drawn(build_backbone(config))
    state = {f"backbone.{key}": value for key, value in ours.state_dict().items()} | {"decode_head.x": torch.ones(1)}
    net = SwinTransformer(img_size=64, embed_dim=8, depths=(2, 1, 1, 2), num_heads=(1, 1, 2, 2), window_size=2,
                          num_classes=0, always_partition=True).double().eval()  # fmt: skip
    net.load_state_dict(to_timm(config.to_dict(), state).tensors)
    pixels = images(1, 3, 64, 64)
    with torch.no_grad():
        assert error(net.forward_features(pixels).permute(0, 3, 1, 2), ours(pixels).feature_maps[1]) < 1e-10


def test_the_names_that_transformers_has_in_memory():
    from transformers import SwinBackbone, SwinConfig

    from fastuper.models.backbones.registry import checkpoint_names

    config = SwinConfig(embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=2, out_features=["stage1", "stage2"])
    theirs = SwinBackbone(config)
    back = to_timm(config.to_dict(), theirs.state_dict(), checkpoint_names("swin"), features_only=True)
    ours = network(converted(back.tensors)).state_dict()
    again = to_timm(config.to_dict(), ours, features_only=True)
    assert len(back.tensors) == 4 + 3 * 13 + 3  # the patches, the blocks, the merging
    assert all(torch.equal(value, again.tensors[key]) for key, value in back.tensors.items())


# Image sizes, windows, and the options and settings with which the conversion is by timm's rules.
BY_TIMMS_RULES = [
    ({"img_size": 64}, {"image_size": 64}, {}),  # the last map is one window, with a table of full size
    ({"img_size": (64, 96), "window_size": 3}, {"image_size": [64, 96]}, {}),  # maps are padded, after the shift
    ({"img_size": 64, "window_size": 4}, {}, {}),  # the last window shrinks to its map: the tables tell
    ({"img_size": (64, 96), "window_size": 5}, {}, {"model_args": {"img_size": [64, 96]}}),
    ({"img_size": 72, "window_size": (2, 2, 3, 2)}, {}, {"model_args": {"img_size": 72}}),
    ({"img_size": 64, "window_size": (2, 4)}, {"image_size": 64}, {"model_args": {"window_size": [2, 4]}}),
]


@pytest.mark.parametrize(("values", "options", "settings"), BY_TIMMS_RULES)
def test_swin_by_timms_rules(values, options, settings):
    values = {**WINDOWS, "always_partition": False, "strict_img_size": False, **values}
    model = drawn(SwinTransformer(**values))
    settings = {"architecture": "swin_tiny_patch4_window7_224", "pretrained_cfg": {}, **settings} if settings else {}
    conversion = converted(model.state_dict(), settings, **options)
    ours = network(conversion)
    size = values["img_size"] if isinstance(values["img_size"], tuple) else (64, 64)
    for pixels in (images(1, 3, *size), images(1, 3, 96, 124)):
        with torch.no_grad():
            found = ours(pixels).feature_maps
        assert all(error(x, y) < 1e-10 for x, y in zip(found, maps(model, pixels), strict=True))
    assert conversion.config["model_type"] == "swin_timm"
    assert conversion.initialised == ()
    back = to_timm(ours.config.to_dict(), ours.state_dict(), features_only=True).tensors
    expected = features(model).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in back.items())
    assert set(back) == set(expected)


def test_an_image_size_that_does_not_fit_the_windows():
    state = SwinTransformer(img_size=64, **{**WINDOWS, "window_size": 4, "always_partition": False}).state_dict()
    with pytest.raises(CheckpointError, match="stage 3 has 49 relative positions, and a window of 2 x 2"):
        converted(state, image_size=32)


def test_swins_files_of_timm_before_0_9():
    model = drawn(SwinTransformer(img_size=64, **WINDOWS))
    state = model.state_dict()
    older = {
        re.sub(r"layers\.(\d)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample", key).replace(
            "head.fc.", "head."
        ): value
        for key, value in state.items()
    }
    older["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 4, 4)
    older["layers.0.blocks.1.attn.relative_position_index"] = torch.zeros(4, 4, dtype=torch.int64)
    expected, found = converted(state), converted(older)
    assert found.config == expected.config
    assert all(torch.equal(found.tensors[key], value) for key, value in expected.tensors.items())


def test_a_folder_of_the_hub(tmp_path):
    model = drawn(timm.create_model("resnet18", layers=(1, 1, 1, 1), channels=(8, 12, 16, 20), num_classes=5))
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    conversion = convert_source(read_source(tmp_path), Choices())
    assert conversion.preprocessing == {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    assert not [note for note in conversion.notes if "default" in note]
    pixels = images(1, 3, 45, 67)
    for x, y in zip(stages_of(network(conversion), pixels), maps(model, pixels), strict=True):
        assert error(x, y) < 1e-10
    values = json.loads((tmp_path / "config.json").read_text())
    values["pretrained_cfg"]["mean"] = [0.5, 0.5, 0.25]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert convert_source(read_source(tmp_path), Choices()).preprocessing["image_mean"] == [0.5, 0.5, 0.25]
    with pytest.raises(ValueError, match=r"mean=.* contradicts the checkpoint"):
        convert_source(read_source(tmp_path), Choices({"mean": [1.0, 2.0, 3.0]}))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: ConvNeXt(**SIZES, use_grn=True), "its blocks have GRN and LayerScale"),
        (lambda: ConvNeXt(**SIZES, stem_type="overlap_tiered"), "overlapping"),
        (lambda: ConvNeXt(**SIZES, stem_type="overlap_act"), "overlapping"),
        (lambda: ConvNeXt(**SIZES, patch_size=2), "its stem is a 2x2 convolution"),
        (lambda: ConvNeXt(**SIZES, kernel_sizes=(7, 5, 7, 7)), "stage 2 has 5x5 convolutions"),
        (lambda: ConvNeXt(**SIZES, conv_mlp=True, norm_layer="rmsnorm2d"), "would have no bias"),
        (lambda: ConvNeXt(**SIZES, conv_bias=False), "would have no bias"),
        (lambda: ConvNeXt(depths=(1, 1, 1, 1), dims=(32, 64, 96, 128)), "test_convnext2, whose norms"),
        (lambda: ResNet(Bottleneck, **BLOCKS, cardinality=2, base_width=32), "have groups"),
        (lambda: ResNet(Bottleneck, **BLOCKS, base_width=128), "channels wide"),
        (lambda: ResNet(Bottleneck, **BLOCKS, block_args={"attn_layer": "se"}), r"\.se\..* is of an attention"),
        (lambda: ResNet(Bottleneck, **BLOCKS, block_args={"attn_layer": "eca"}), r"\.se\..* is of an attention"),
        (lambda: ResNet(Bottleneck, (1, 1), channels=(32, 32), norm_layer="groupnorm"), "no running mean"),
        (lambda: ResNet(Bottleneck, **BLOCKS, replace_stem_pool=True), "in place of the pooling"),
        (lambda: ResNet(Bottleneck, **BLOCKS, down_kernel_size=3), "larger than 1x1"),
        (lambda: ResNet(Bottleneck, **BLOCKS, block_reduce_first=2), "channels wide"),
        (lambda: ResNet([BasicBlock, BasicBlock, Bottleneck, BasicBlock], **BLOCKS), "basic blocks and bottlenecks"),
        (lambda: SwinTransformer(img_size=64, **{**WINDOWS, "window_size": (2, 4)}), "21 relative positions"),
        (lambda: SwinTransformer(img_size=64, **WINDOWS, head_dim=4), "widths double"),
        (
            lambda: timm.create_model(
                "swinv2_cr_tiny_224", img_size=64, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)
            ),
            "x.pth",
        ),
    ],
)
def test_networks_that_are_refused(build, reason):
    with pytest.raises(CheckpointError, match=reason) as raised:
        converted(build().state_dict())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"architecture": "resnetblur18"}, "resnetblur18.* anti-aliasing"),
        ({"architecture": "seresnetaa50d.sw_in12k"}, "anti-aliasing"),
        ({"architecture": "resnet18", "model_args": {"output_stride": 8}}, "output_stride=8"),
        ({"architecture": "resnet18", "model_args": {"act_layer": "silu"}}, "act_layer='silu'"),
    ],
)
def test_what_only_a_configuration_shows(settings, reason):
    state = ResNet(BasicBlock, **BLOCKS).state_dict()
    assert converted(state, {"architecture": "resnet18", "pretrained_cfg": {}}).config["model_type"] == "resnet"
    with pytest.raises(CheckpointError, match=reason):
        converted(state, {"pretrained_cfg": {}, **settings})


def test_a_file_that_is_named_after_its_model():
    state = ResNet(BasicBlock, **BLOCKS).state_dict()
    with pytest.raises(CheckpointError, match="anti-aliasing"):
        converted(state, name="resnetblur18-84f4748f.pth")


def test_an_activation_in_the_configuration():
    model = drawn(ConvNeXt(**SIZES, act_layer="gelu_tanh"))
    settings = {"architecture": "convnext_tiny", "pretrained_cfg": {}, "model_args": {"act_layer": "gelu_tanh"}}
    pixels = images(1, 3, 40, 56)
    for x, y in zip(
        stages_of(network(converted(model.state_dict(), settings)), pixels), maps(model, pixels), strict=True
    ):
        assert error(x, y) < 1e-10


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvisions_resnets_have_timms_names(name):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)().state_dict()
        shapes = {key: value.shape for key, value in timm.create_model(name).state_dict().items()}
    assert {key: value.shape for key, value in theirs.items()} == shapes


def test_another_model_of_timm():
    with pytest.raises(CheckpointError, match=r"timm's 'vit_tiny_patch16_224'; ConvNeXt, ResNet and Swin can"):
        converted({"cls_token": torch.ones(1)}, {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}})


def test_half_precision_is_kept():
    conversion = converted(ConvNeXt(**SIZES, conv_mlp=True).half().state_dict())
    assert {tensor.dtype for tensor in conversion.tensors.values()} == {torch.float16}


@pytest.fixture(scope="module")
def upernet(tmp_path_factory):
    config = fastuper.UperNetConfig(
        backbone="resnet10t", use_timm_backbone=True, hidden_size=8, auxiliary_channels=4, num_labels=3
    )
    model = fastuper.UperNetForSemanticSegmentation(config)
    randomize(model)
    model = model.eval()
    folder = tmp_path_factory.mktemp("upernet")
    model.save_pretrained(folder)
    return model, folder


def test_a_upernet_over_a_timm_backbone(upernet):
    model, folder = upernet
    conversion = convert_source(read_source(folder), Choices())
    ours = fastuper.UperNetForSemanticSegmentation(fastuper.UperNetConfig.from_dict(dict(conversion.config)))
    ours.load_state_dict(dict(conversion.tensors))
    pixels = images(1, 3, 45, 67, dtype=torch.float32)
    with torch.no_grad():
        expected = model(pixels).logits
        found = ours.eval()(pixels).logits
    assert error(found, expected) < 1e-5
    assert ours.config.backbone_config.model_type == "resnet_deep_stem"
    assert ours.config.id2label == model.config.id2label
    assert "Transformers" in conversion.only_fastuper
    settings = {**model.config.to_dict(), "num_labels": 3}
    settings["backbone_config"] = {**settings["backbone_config"], "freeze_batch_norm_2d": True}
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert any("freeze_batch_norm_2d" in note for note in converted(state, settings).notes)


def test_upernets_that_stay_as_they_are(upernet):
    model, _ = upernet
    settings = model.config.to_dict()
    levels = {**settings, "backbone_config": {**settings["backbone_config"], "out_indices": [0, 1, 2, 3]}}
    with pytest.raises(CheckpointError, match="reads timm's levels 0, 1, 2, 3"):
        converted(model.state_dict(), levels)
    state = {f"backbone._backbone.{name}": value for name, value in features(ConvNeXt(**SIZES)).state_dict().items()}
    with pytest.raises(CheckpointError, match="loads as it is; only timm's ResNets and Swins"):
        converted(state, settings)


def test_a_upernet_over_timms_swin(upernet):
    model = drawn(SwinTransformer(img_size=64, **{**WINDOWS, "always_partition": False}))
    settings = upernet[0].config.to_dict()
    backbone = {"model_type": "timm_backbone", "backbone": "swin_tiny_patch4_window2_64", "out_indices": [0, 1, 2, 3]}
    state = {f"backbone._backbone.{name}": value for name, value in features(model).state_dict().items()}
    conversion = converted(state, {**settings, "backbone_config": backbone})
    own = conversion.config["backbone_config"]
    tensors = {name.removeprefix("backbone."): value for name, value in conversion.tensors.items()}
    ours = build_backbone(backbone_config_from(own)).double().eval()
    assert ours.load_state_dict(tensors, strict=False).unexpected_keys == []
    assert {key for key in ours.state_dict() if key not in tensors} == {
        key for key in ours.state_dict() if key.endswith("relative_position_index")
    }
    pixels = images(1, 3, 64, 64)
    with torch.no_grad():
        found = ours(pixels).feature_maps
    assert all(error(x, y) < 1e-10 for x, y in zip(found, maps(model, pixels), strict=True))
    assert own["image_size"] == 64
    unnamed = converted(state, {**settings, "backbone_config": {**backbone, "backbone": "swin_of_mine"}})
    assert [note for note in unnamed.notes if "image_size: 64, 64 (the default" in note]

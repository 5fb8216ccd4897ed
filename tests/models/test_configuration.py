"""Configurations: checks, messages, conversions. tests/parity/test_configs.py compares them with Transformers'."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch

import fastuper
from fastuper import ConvNextConfig, ResNetConfig, SwinConfig, UperNetConfig
from fastuper.models.backbones.registry import FAMILIES
from fastuper.models.configuration import as_dtype
from fastuper.models.pyramid_configuration import backbone_config_from
from fastuper.models.upernet_configuration import upernet_config_from

REFUSED = {
    "stages-that-disagree": (
        lambda: ConvNextConfig(depths=[1, 2, 3]),
        r"num_stages=4, hidden_sizes=\[96, 192, 384, 768\] and depths=\[1, 2, 3\] must agree on the number of stages",
    ),
    "fewer-stages": (lambda: ConvNextConfig(num_stages=3), "num_stages=3"),
    "swin-heads-and-depths": (
        lambda: SwinConfig(depths=[2, 2], num_heads=[3]),
        r"depths=\[2, 2\] and num_heads=\[3\] must agree on the number of stages",
    ),
    "swin-heads": (
        lambda: SwinConfig(num_heads=[3, 5, 12, 24]),
        r"the 192 channels of stage 2 \(embed_dim=96\) are not a multiple of its 5 attention heads",
    ),
    "resnet-layer-type": (lambda: ResNetConfig(layer_type="wide"), "'wide' must be one of basic, bottleneck"),
    "resnet-stages": (
        lambda: ResNetConfig(hidden_sizes=[64, 128]),
        r"hidden_sizes=\[64, 128\] and depths=\[3, 4, 6, 3\] must agree on the number of stages",
    ),
    "unknown-feature": (lambda: SwinConfig(out_features=["layer1"]), r"\['layer1'\] must be among the stages"),
    "unordered-features": (
        lambda: SwinConfig(out_features=["stage2", "stage1"]),
        r"\['stage2', 'stage1'\] must be in the order of the stages",
    ),
    "index-too-large": (lambda: SwinConfig(out_indices=[5]), r"out_indices \[5\] must be indices into the stages"),
    "index-too-small": (lambda: SwinConfig(out_indices=[-6]), r"out_indices \[-6\] must be indices into the stages"),
    "no-features": (lambda: SwinConfig(out_features=[]), "must name at least one of the stages"),
    "feature-no-list": (lambda: SwinConfig(out_features="stage1"), "out_features and out_indices are lists"),
    "index-no-list": (lambda: SwinConfig(out_indices=4), "out_features and out_indices are lists"),
    "features-against-indices": (
        lambda: SwinConfig(out_features=["stage1"], out_indices=[2]),
        r"out_features \['stage1'\] and out_indices \[2\] name different stages",
    ),
    "backbone-twice": (
        lambda: UperNetConfig(backbone_config=SwinConfig(), backbone="resnet18"),
        "give either backbone_config or backbone, not both",
    ),
    "kwargs-for-a-config": (
        lambda: UperNetConfig(backbone_config=SwinConfig(), backbone_kwargs={"out_indices": [1]}),
        "give either backbone_config or backbone_kwargs, not both",
    ),
    "timm-for-a-config": (
        lambda: UperNetConfig(backbone_config=SwinConfig(), use_timm_backbone=True),
        "give either backbone_config or use_timm_backbone, not both",
    ),
    "timm-without-a-name": (lambda: UperNetConfig(use_timm_backbone=True), "use_timm_backbone=True needs backbone"),
    "no-pool-scales": (lambda: UperNetConfig(pool_scales=[]), "pool_scales must be a list of one or more numbers"),
    "one-pool-scale": (lambda: UperNetConfig(pool_scales=3), "pool_scales must be a list of .*, got 3"),
    "pool-scale-0": (
        lambda: UperNetConfig(pool_scales=[1, 0]),
        r"pool_scales\[1\] must be .* at least 1 and at most 256, got 0",
    ),
    "window-0": (lambda: SwinConfig(window_size=0), "window_size must be .* at least 1 and at most 64, got 0"),
    "depth-0": (lambda: SwinConfig(depths=[2, 2, 0, 2]), r"depths\[2\] must be .* at least 1 and at most 400, got 0"),
    "no-labels": (lambda: UperNetConfig(num_labels=0), "num_labels must be .* at least 1 and at most 65536, got 0"),
    "labels-in-a-list": (lambda: UperNetConfig(id2label=["a", "b"]), r"id2label must map .*, got \['a', 'b'\]"),
    "labels-by-name": (lambda: UperNetConfig(id2label={"x": "a"}), "id2label must map class numbers to names"),
    "labels-empty": (lambda: UperNetConfig(id2label={}), "id2label names no class"),
    "hidden-size-in-words": (lambda: UperNetConfig(hidden_size="16"), "hidden_size must be .* at most 16384, got '16'"),
    "convs-below-0": (lambda: UperNetConfig(auxiliary_num_convs=-1), "auxiliary_num_convs must be .* at least 0"),
    "pretrained-nothing": (lambda: UperNetConfig(use_pretrained_backbone=True), "use_pretrained_backbone=True needs"),
    "unknown-backbone": (
        lambda: UperNetConfig(backbone_config={"model_type": "vgg"}),
        f"'vgg' is not known; known are {', '.join(FAMILIES)}, timm_backbone",
    ),
    "dtype-name": (lambda: SwinConfig(dtype="float31"), "dtype='float31' is not a floating-point dtype"),
    "dtype-of-integers": (lambda: SwinConfig(dtype=torch.int8), "dtype=torch.int8 is not a floating-point dtype"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    build, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("given", [3, "swin", None, object()], ids=lambda value: type(value).__name__)
def test_no_configuration_at_all(given):
    with pytest.raises(TypeError, match="expected a UperNetConfig, ours or Transformers', got"):
        upernet_config_from(given)
    with pytest.raises(TypeError, match="expected a backbone's configuration or its dictionary, got"):
        backbone_config_from(given)
    with pytest.raises(TypeError, match="expected a UperNetConfig"):
        fastuper.UperNetForSemanticSegmentation(given)


def test_a_backbones_configuration_is_no_upernet():
    with pytest.raises(TypeError, match="expected a UperNetConfig, ours or Transformers', got SwinConfig"):
        fastuper.UperNetForSemanticSegmentation(SwinConfig())


def test_an_unknown_activation_names_the_known_ones():
    with pytest.raises(ValueError, match=r"hidden_act='gulp' is not known; known are gelu, gelu_10, .*quick_gelu"):
        fastuper.UperNetForSemanticSegmentation(UperNetConfig(backbone_config=SwinConfig(hidden_act="gulp")))


def test_an_error_in_a_file_names_it(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "upernet", "id2label": ["a"]}')
    with pytest.raises(ValueError, match=r"config\.json: id2label must map"):
        UperNetConfig.from_pretrained(tmp_path)


def test_reading_what_is_not_there(tmp_path):
    with pytest.raises(OSError, match=r"has no config\.json"):
        UperNetConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OSError, match=r"config\.json"):
        UperNetConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "segformer"}))
    with pytest.raises(ValueError, match="describes a 'segformer' model; UperNetConfig reads 'upernet'"):
        UperNetConfig.from_pretrained(tmp_path)


def test_overriding_a_value_on_reading(tmp_path):
    UperNetConfig(hidden_size=64).save_pretrained(tmp_path)
    assert UperNetConfig.from_pretrained(tmp_path, hidden_size=32).hidden_size == 32
    assert UperNetConfig.from_pretrained(tmp_path, num_labels=5).id2label[4] == "LABEL_4"
    with pytest.raises(TypeError, match="UperNetConfig has no hiden_size"):
        UperNetConfig.from_pretrained(tmp_path, hiden_size=32)


def test_overrides_are_checked_like_arguments(tmp_path):
    UperNetConfig(id2label={0: "sea", 1: "land", 2: "sky"}).save_pretrained(tmp_path)
    named = UperNetConfig.from_pretrained(tmp_path, id2label={"0": "a", "1": "b"})
    assert (named.id2label, named.label2id) == ({0: "a", 1: "b"}, {"a": 0, "b": 1})
    assert UperNetConfig.from_pretrained(tmp_path, num_labels=3).id2label[2] == "sky"
    assert UperNetConfig.from_pretrained(tmp_path, torch_dtype="bfloat16").dtype is torch.bfloat16
    for wrong in ({"hidden_size": -1}, {"dtype": "nonsense"}):
        with pytest.raises(ValueError, match=r"hidden_size|dtype"):
            UperNetConfig.from_pretrained(tmp_path, **wrong)


def test_a_backbone_may_be_assigned():
    config = UperNetConfig()
    config.backbone_config = {"model_type": "swin", "embed_dim": 12, "num_heads": [1, 2, 3, 4]}
    assert isinstance(config.backbone_config, SwinConfig)
    assert config.backbone_config.out_features == ["stage1", "stage2", "stage3", "stage4"]
    assert UperNetConfig.from_dict(config.to_dict()) == config


def test_whole_numbers_serve_as_floats():
    config = ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_scale_init_value=1)
    model = fastuper.UperNetForSemanticSegmentation(UperNetConfig(backbone_config=config, hidden_size=8))
    assert model.backbone.encoder.stages[0].layers[0].layer_scale_parameter.eq(1.0).all()


def test_numbers_and_names_of_classes(caplog):
    assert UperNetConfig(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    named = UperNetConfig(id2label={"0": "sea", "1": "land"})
    assert named.label2id == {"sea": 0, "land": 1}
    named.num_labels = 2
    assert named.id2label == {0: "sea", 1: "land"}
    named.num_labels = 1
    assert named.id2label == {0: "LABEL_0"}
    assert UperNetConfig(id2label={0: "sea"}, num_labels=3).num_labels == 1
    assert "num_labels=3 disagrees with the 1 names of id2label" in caplog.text


def test_setting_stages():
    config = SwinConfig()
    assert config.out_features == ["stage4"]
    config.out_indices = [1, -1]
    assert config.out_features == ["stage1", "stage4"]
    config.out_features = ["stem"]
    assert config.out_indices == [0]


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_dtypes(name, tmp_path):
    config = UperNetConfig(torch_dtype=name)
    assert config.dtype == config.torch_dtype == torch.bfloat16
    assert json.loads(config.to_json_string())["dtype"] == "bfloat16"
    config.torch_dtype = "float16"
    assert config.dtype == torch.float16
    assert as_dtype(None) is None


def test_copies_are_equal_and_apart():
    config = UperNetConfig(backbone_config=SwinConfig(), custom={"a": [1]})
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), UperNetConfig.from_dict(config.to_dict())):
        assert again == config
        again.backbone_config.depths[0] = 5
        assert again != config
    assert config.custom == {"a": [1]}
    assert repr(config).startswith("UperNetConfig {")
    with pytest.raises(TypeError, match="unhashable"):
        hash(config)


def test_the_given_backbone_configuration_is_copied():
    backbone = SwinConfig()
    config = UperNetConfig(backbone_config=backbone)
    assert config.backbone_config.out_features == ["stage1", "stage2", "stage3", "stage4"]
    assert backbone.out_features == ["stage4"]

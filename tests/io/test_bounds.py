"""The bounds of the values of configurations; tests/hostile damages whole checkpoints."""

from __future__ import annotations

import json
import math
import re
from collections import UserList

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastuper import (
    ConvNextConfig,
    DeepStemResNetConfig,
    ResNetConfig,
    SwinConfig,
    Swinv2Config,
    TimmSwinConfig,
    UnifiedPerceptualParsingConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTPyramidConfig,
)
from fastuper.data import UperNetImageProcessor
from fastuper.io.bounds import BOUNDS
from fastuper.io.files import read_json
from fastuper.models.backbones.registry import PRESETS
from fastuper.models.configuration import Config, ForeignBackboneConfig
from fastuper.models.memory import within_memory

CLASSES = (
    UperNetConfig,
    UnifiedPerceptualParsingConfig,
    ConvNextConfig,
    SwinConfig,
    Swinv2Config,
    TimmSwinConfig,
    ResNetConfig,
    DeepStemResNetConfig,
    ViTPyramidConfig,
)
PLACES = [(cls, name) for cls in CLASSES for name in BOUNDS if name in vars(cls()) and name != "hidden_act"]
SIZES = {"height", "width", "shortest_edge", "longest_edge", "max_height", "max_width"}
PROCESSOR = {*SIZES, "size_divisor", "rescale_factor", "image_mean", "image_std"}

NONSENSE = st.one_of(
    st.sampled_from([float("nan"), float("inf"), -float("inf"), 2**2000, -(2**2000), 10**5000, 10**10, -(10**10)]),
    st.sampled_from(["x", "1", b"1", object(), {}, {"a": 1}, [], [[]], [[1]], [None], ["a"], [2**2000], [1] * 100_000]),
)


def test_each_bound_belongs_to_a_configuration():
    assert {name for _, name in PLACES} | PROCESSOR | {"num_labels", "hidden_act"} == BOUNDS.keys()


@pytest.mark.parametrize(("cls", "name"), PLACES, ids=lambda value: value if isinstance(value, str) else value.__name__)
@settings(max_examples=5, deadline=None)
@given(value=NONSENSE)
def test_nonsense_is_refused_by_name(cls, name, value):
    if BOUNDS[name].kind is str and isinstance(value, str):
        return
    for make in (lambda: cls(**{name: value}), lambda: changed(cls(), name, value).check()):
        with pytest.raises(ValueError, match=name) as caught:
            make()
        assert len(str(caught.value)) < 250


def changed(config: Config, name: str, value: object) -> Config:
    setattr(config, name, value)
    return config


@pytest.mark.parametrize("preset", PRESETS)
def test_published_sizes_are_within_the_bounds(preset):
    UperNetConfig(PRESETS[preset](), num_labels=150).check()


@pytest.mark.parametrize(
    "config",
    [
        ConvNextConfig(hidden_sizes=[1] * 4, depths=[1] * 4, num_channels=1, patch_size=1),
        ConvNextConfig(hidden_sizes=[3072] * 4, depths=[3, 4, 30, 3], layer_scale_init_value=0),
        ResNetConfig(embedding_size=1, hidden_sizes=[4] * 4, depths=[1, 1, 331, 1]),
        ResNetConfig(hidden_sizes=[1] * 4, layer_type="basic"),
        SwinConfig(embed_dim=512, depths=[2, 2, 42, 2], num_heads=[16, 32, 64, 128], window_size=24),
        SwinConfig(image_size=[512, 1024], patch_size=(4, 4), use_absolute_embeddings=True, drop_path_rate=0),
    ],
)
def test_unusual_networks_are_within_the_bounds(config):
    UperNetConfig(config, num_labels=21_841, pool_scales=(1,), auxiliary_num_convs=0, loss_ignore_index=-100).check()


@pytest.mark.parametrize(
    ("make", "same"),
    [
        (lambda: ConvNextConfig(depths=np.array([1] * 4), hidden_sizes=[np.int64(8)] * 4), {"depths": [1] * 4}),
        (lambda: ConvNextConfig(layer_norm_eps=np.float32(0.5), image_size=np.int16(32)), {"layer_norm_eps": 0.5}),
        (lambda: ConvNextConfig(out_indices=np.array([1, 2])), {"out_features": ["stage1", "stage2"]}),
        (lambda: SwinConfig(image_size=UserList([8, 16]), qkv_bias=np.True_), {"image_size": [8, 16]}),
        (lambda: UperNetConfig(num_labels=np.int64(5), pool_scales=range(1, 3)), {"pool_scales": [1, 2]}),
        (lambda: UperNetConfig(id2label={np.int64(0): "a"}, label2id={"a": np.int64(0)}), {"label2id": {"a": 0}}),
        (lambda: changed(UperNetConfig(), "hidden_size", np.uint16(64)), {"hidden_size": 64}),
        (lambda: changed(UperNetConfig(), "other", np.arange(2)), {"other": [0, 1]}),
        (lambda: ForeignBackboneConfig("focalnet", depths=[np.int64(1)]), {"depths": [1]}),
        (lambda: UperNetImageProcessor(size=np.int64(8), rescale_factor=np.float32(0.5)), {"rescale_factor": 0.5}),
    ],
)
def test_values_of_other_libraries_become_pythons(make, same):
    saved = json.loads(make().to_json_string())
    assert {name: saved[name] for name in same} == same


def test_attributes_are_checked_when_a_model_is_built():
    config = UperNetConfig()
    config.hidden_size = 10**6
    with pytest.raises(ValueError, match=r"hidden_size must be .* at most 16384, got 1000000"):
        UperNetForSemanticSegmentation(config)
    config = UperNetConfig()
    config.backbone_config.depths = [1, 10**6, 1, 1]
    with pytest.raises(ValueError, match=r"depths\[1\] must be .* at most 400, got 1000000"):
        UperNetForSemanticSegmentation(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SwinConfig(depths=[200, 201], num_heads=[3, 6]), "depths must be at most 400 blocks in all"),
        (lambda: SwinConfig(depths=[1] * 16, num_heads=[3] * 16), "embed_dim=96 doubles from stage to stage"),
        (lambda: SwinConfig(mlp_ratio=1e-9), "mlp_ratio=1e-09 gives the MLPs no channels"),
        (lambda: SwinConfig(image_size=2, use_absolute_embeddings=True), "image_size=2 must be at least patch_size=4"),
        (lambda: ResNetConfig(hidden_sizes=[2] * 4), "must be at least 4 where layer_type is 'bottleneck'"),
        (lambda: UperNetConfig(id2label={str(i): "a" for i in range(70_000)}), "num_labels must be .* got 70000"),
        (lambda: UperNetConfig(id2label={"1": "a", "01": "b"}), "each once"),
        (lambda: UperNetConfig(id2label={"9" * 5000: "a"}), "id2label must map class numbers to names"),
        (lambda: UperNetConfig(label2id=["a"], id2label={0: "a"}), "label2id must map names to class numbers"),
        (lambda: UperNetConfig(backbone_config={"model_type": []}), "model_type must be a text"),
        (lambda: UperNetConfig(backbone_kwargs=[1], backbone="a"), "backbone_kwargs must map names to values"),
        (lambda: UperNetConfig(dtype="float8_e5m2"), "not a floating-point dtype of a model's weights"),
        (lambda: UperNetConfig(to_dict="x"), "'to_dict' is not a value of a configuration"),
        (lambda: UperNetConfig(__class__="x"), "'__class__' is not a value of a configuration"),
        (lambda: ForeignBackboneConfig("focalnet", depths=[10**6]), "depths must be at most 400, got 1000000"),
        (
            lambda: ForeignBackboneConfig("dinov2", unknown=[[float("nan")]]),
            "unknown must be at most 2147483648, got nan",
        ),
        (lambda: UperNetImageProcessor(size=10**6), "height must be .* at most 16384, got 1000000"),
        (lambda: UperNetImageProcessor(rescale_factor=float("nan")), "rescale_factor must be .* got nan"),
        (lambda: UperNetImageProcessor(rescale_factor=[1]), "rescale_factor must be a number"),
        (lambda: UperNetImageProcessor(image_mean=[2**2000] * 3), "image_mean is .*; give one finite number"),
        (lambda: UperNetImageProcessor(image_mean=[0.5] * 2000), "image_mean must be a list"),
        (lambda: UperNetImageProcessor(image_std=[0.5, -1, 0.5]), r"image_std\[1\] must be a number of at least 0"),
    ],
)
def test_values_that_contradict_each_other(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "focalnet", "embed_dim": 10**6}, "embed_dim must be at most 16384, got 1000000"),
        (
            {"model_type": "pvt_v2", "num_attention_heads": [0, 1, 1, 1]},
            "Transformers cannot build a 'pvt_v2' backbone",
        ),
        ({"model_type": "dinov2", "num_hidden_layers": 10**6}, "num_hidden_layers must be at most 400"),
        ({"model_type": "timm_backbone", "backbone": "nosuch"}, "has no model 'nosuch'"),
        ({"model_type": "timm_backbone", "backbone": ["resnet18"]}, r"has no model \['resnet18'\]"),
        ({"model_type": "timm_backbone", "backbone": "resnet18", "out_indices": "x"}, "out_indices must be a list"),
        ({"model_type": "timm_backbone", "backbone": "resnet18", "out_indices": [[]]}, "timm cannot build resnet18"),
        ({"model_type": "timm_backbone", "backbone": "resnet18", "num_channels": 10**9}, "at most 1024"),
    ],
)
def test_backbones_of_other_libraries(values, message):
    with pytest.raises(ValueError, match=message):
        UperNetForSemanticSegmentation(UperNetConfig(backbone_config=values, use_auxiliary_head=False))


def test_a_model_larger_than_the_memory_is_not_built(monkeypatch):
    monkeypatch.setattr("fastuper.models.memory.memory_of", lambda _: 2**20)
    with pytest.raises(RuntimeError, match=r"describes a model of .* GB, and this machine has 0\.0 GB of memory"):
        UperNetForSemanticSegmentation(UperNetConfig())
    with torch.device("meta"):  # the shapes alone are no matter of memory
        UperNetForSemanticSegmentation(UperNetConfig())


def test_memory_that_cannot_be_reserved(monkeypatch):
    monkeypatch.setattr("fastuper.models.memory.memory_of", lambda _: math.inf)
    with pytest.raises(RuntimeError, match=r"not enough memory for the model"):
        within_memory(torch.empty)(2**50)  # more than the addresses of a process


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands in it twice"),
        ('{"a": ' * 60 + "1" + "}" * 60, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "is not valid JSON: Exceeds the limit"),
        ("\ufeff{}", "BOM"),
        (json.dumps({"a": "x" * 2**24}), "is larger than 16 MiB"),
    ],
    ids=["twice", "deep", "deeper", "digits", "mark", "large"],
)
def test_json_that_is_refused(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(OSError, match=f"{re.escape(str(path))}.*{message}"):
        read_json(path)

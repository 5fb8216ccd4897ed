"""Configurations compared with Transformers': arguments, defaults, and config.json in both directions."""

from __future__ import annotations

import copy
import inspect
import json
from typing import Any

import pytest
import torch
import transformers

import fastuper
from bench.numerics import error
from bench.pairs import STAGES, VERSION_5, images, load, randomize
from tests.parity.models import FAMILIES, backbone_config, config

CLASSES = ["UperNetConfig", "ConvNextConfig", "SwinConfig", "ResNetConfig"]

# Values that one library derives from others, or that do not describe a network.
DERIVED = {"transformers_version", "id2label", "backbone_config", "num_layers", "hidden_size"}


def as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.skipif(VERSION_5, reason="the configurations of Transformers 5 have other signatures")
@pytest.mark.parametrize("name", CLASSES)
def test_arguments_and_their_order(name):
    expected = [p.name for p in inspect.signature(getattr(transformers, name).__init__).parameters.values()]
    given = [p.name for p in inspect.signature(getattr(fastuper, name).__init__).parameters.values()]
    assert given == [*expected[:-1], "extra"]


@pytest.mark.parametrize("name", CLASSES)
def test_defaults(name):
    theirs, ours = getattr(transformers, name)(), getattr(fastuper, name)()
    parameters = inspect.signature(type(ours).__init__).parameters
    names = [key for key in parameters if key not in ("self", "extra", "backbone_config")]
    later_removed = {"backbone", "use_pretrained_backbone", "use_timm_backbone", "backbone_kwargs"}
    for key in names:
        if not (VERSION_5 and key in later_removed):
            assert as_list(getattr(ours, key)) == as_list(getattr(theirs, key)), key
    for key in ("num_labels", "id2label", "label2id", "return_dict", "output_hidden_states", "output_attentions"):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert type(ours).model_type == type(theirs).model_type


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_written_has_the_same_values(name):
    theirs, ours = getattr(transformers, name)().to_dict(), getattr(fastuper, name)().to_dict()
    shared = (theirs.keys() & ours.keys()) - {"id2label", "backbone_config"}
    assert len(shared) > 10
    assert {key: as_list(theirs[key]) for key in shared} == {key: ours[key] for key in shared}


def test_the_default_is_a_resnet_50():
    ours = fastuper.UperNetConfig()
    expected = transformers.UperNetConfig().backbone_config
    assert isinstance(ours.backbone_config, fastuper.ResNetConfig)
    for key in ("depths", "hidden_sizes", "embedding_size", "layer_type", "out_features", "out_indices"):
        assert as_list(getattr(ours.backbone_config, key)) == as_list(getattr(expected, key)), key


def outputs_of(ours: Any, theirs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    randomize(theirs)
    load(ours, theirs)
    with torch.no_grad():
        pixels = images(1, 3, 50, 70)
        return ours.double().eval()(pixels).logits, theirs.double().eval()(pixels).logits


HEADS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything-changed": {
        "pool_scales": [1, 4],
        "auxiliary_num_convs": 2,
        "auxiliary_concat_input": True,
        "auxiliary_loss_weight": 0.7,
        "loss_ignore_index": 0,
        "initializer_range": 0.1,
    },
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_our_config_json(family, head, tmp_path):
    given = config(family, library=fastuper, **HEADS[head])
    given.save_pretrained(tmp_path)
    read = transformers.UperNetConfig.from_pretrained(tmp_path)
    for key in ("hidden_size", *HEADS[head]):
        assert as_list(getattr(read, key)) == as_list(getattr(given, key))
    assert read.num_labels == given.num_labels
    logits, expected = outputs_of(
        fastuper.UperNetForSemanticSegmentation(given), transformers.UperNetForSemanticSegmentation(read)
    )
    assert error(logits, expected) < 1e-10


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_we_read_the_config_json_of_transformers(family, head, tmp_path):
    given = config(family, **HEADS[head])
    given.save_pretrained(tmp_path)
    read = fastuper.UperNetConfig.from_pretrained(tmp_path)
    for key in ("hidden_size", *HEADS[head]):
        assert as_list(getattr(read, key)) == as_list(getattr(given, key))
    logits, expected = outputs_of(
        fastuper.UperNetForSemanticSegmentation(read), transformers.UperNetForSemanticSegmentation(given)
    )
    assert error(logits, expected) < 1e-10


# A shortened config.json of the Hub (openmmlab/upernet-convnext-tiny), as Transformers before 4.40 wrote it.
OLD_CONFIG = {
    "_commit_hash": None,
    "architectures": ["UperNetForSemanticSegmentation"],
    "auxiliary_channels": 256,
    "auxiliary_concat_input": False,
    "auxiliary_in_channels": 40,
    "auxiliary_loss_weight": 0.4,
    "auxiliary_num_convs": 1,
    "backbone_config": {
        "_name_or_path": "", "add_cross_attention": False, "architectures": None, "bad_words_ids": None,
        "depths": [2, 1, 3, 2], "hidden_sizes": [16, 24, 40, 56], "drop_path_rate": 0.4, "hidden_act": "gelu",
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1},
        "image_size": 224, "initializer_range": 0.02, "is_decoder": False, "layer_norm_eps": 1e-12,
        "layer_scale_init_value": 1e-06, "max_length": 20, "model_type": "convnext", "num_channels": 3,
        "num_stages": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"], "output_attentions": False,
        "output_hidden_states": False, "patch_size": 4, "problem_type": None, "pruned_heads": {},
        "return_dict": True, "stage_names": ["stem", "stage1", "stage2", "stage3", "stage4"],
        "torch_dtype": None, "torchscript": False, "transformers_version": "4.26.0.dev0", "use_bfloat16": False,
    },
    "hidden_size": 24,
    "id2label": {"0": "wall", "1": "building", "2": "sky"},
    "initializer_range": 0.02,
    "label2id": {"wall": 0, "building": 1, "sky": 2},
    "loss_ignore_index": 255,
    "model_type": "upernet",
    "pool_scales": [1, 2, 3, 6],
    "torch_dtype": "float32",
    "transformers_version": None,
    "use_auxiliary_head": True,
}  # fmt: skip


def test_an_old_config_json(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OLD_CONFIG))
    ours = fastuper.UperNetConfig.from_pretrained(tmp_path)
    theirs = transformers.UperNetConfig.from_pretrained(tmp_path)
    assert ours.id2label == theirs.id2label == {0: "wall", 1: "building", 2: "sky"}
    assert ours.dtype == torch.float32
    assert ours.backbone_config.drop_path_rate == 0.4
    logits, expected = outputs_of(
        fastuper.UperNetForSemanticSegmentation(ours), transformers.UperNetForSemanticSegmentation(theirs)
    )
    assert error(logits, expected) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(family, tmp_path):
    given = config(family, library=fastuper, id2label={i: f"class {i}" for i in range(7)}, dtype="bfloat16")
    given.save_pretrained(tmp_path / "ours")
    read = fastuper.UperNetConfig.from_pretrained(tmp_path / "ours")
    assert read.name_or_path == str(tmp_path / "ours")
    read.name_or_path = given.name_or_path
    assert read == given
    transformers.UperNetConfig.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = fastuper.UperNetConfig.from_pretrained(tmp_path / "theirs")
    for key in ("id2label", "label2id", "hidden_size", "pool_scales", "num_labels", "dtype"):
        assert as_list(getattr(again, key)) == as_list(getattr(given, key)), key
    ours, theirs = again.backbone_config.to_dict(), given.backbone_config.to_dict()
    assert {key: ours[key] for key in theirs} == theirs


@pytest.mark.parametrize(
    "stages",
    [
        {},
        {"out_features": ["stage2", "stage4"]},
        {"out_indices": [0, 3]},
        {"out_indices": (1, 2)},
        {"out_indices": [-2, -1]},
        {"out_features": ["stage1", "stage3"], "out_indices": [1, 3]},
    ],
    ids=str,
)
def test_stages_are_chosen_as_there(stages):
    ours = fastuper.SwinConfig(**stages)
    theirs = transformers.SwinConfig(**stages)
    assert list(ours.out_features) == list(theirs.out_features)
    assert list(ours.out_indices) == list(theirs.out_indices)
    assert ours.stage_names == theirs.stage_names


@pytest.mark.parametrize(
    "stages",
    [
        {"out_features": ["stage5"]},
        {"out_features": ["stage2", "stage1"]},
        {"out_features": ["stage1", "stage1"]},
        {"out_indices": [5]},
        {"out_indices": [2, 1]},
        {"out_features": ["stage1"], "out_indices": [2]},
        {"out_features": "stage1"},
    ],
    ids=str,
)
def test_stages_that_are_refused_there_are_refused_here(stages):
    with pytest.raises(Exception, match=r"out_|stage"):
        transformers.SwinConfig(**stages)
    with pytest.raises(ValueError, match=r"out_|stage"):
        fastuper.SwinConfig(**stages)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Swin", "ConvNext"])
def test_the_example_of_the_documentation(family):
    """The example of Transformers' UPerNet page, with only the model's import changed."""
    from transformers import ConvNextConfig, SwinConfig, UperNetConfig

    from fastuper import UperNetForSemanticSegmentation

    # The page's ConvNeXt line fails in Transformers 5.
    backbone = {"Swin": SwinConfig, "ConvNext": ConvNextConfig}[family](out_features=STAGES)
    upernet = UperNetConfig(backbone_config=backbone)
    model = UperNetForSemanticSegmentation(upernet)
    assert model.config.backbone_config.model_type == family.lower()
    assert model.config.num_labels == 2
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 40, 40)).logits.shape == (1, 2, 40, 40)


def test_the_given_configuration_is_left_alone():
    for library in (transformers, fastuper):
        given = config("swin", library=library)
        before = copy.deepcopy(given.to_dict())
        model = fastuper.UperNetForSemanticSegmentation(given)
        model.config.num_labels = 3
        # The model keeps our configuration itself, as Transformers' model does with its own.
        assert (given.to_dict() == before) is (library is transformers)
        assert (model.config is given) is (library is fastuper)


@pytest.mark.parametrize("as_dictionary", [False, True], ids=["object", "dictionary"])
@pytest.mark.parametrize("library", [transformers, fastuper], ids=["their-config", "our-config"])
@pytest.mark.parametrize("family", FAMILIES)
def test_backbone_configurations_of_either_library(family, library, as_dictionary):
    given = backbone_config(family, library)
    given = given.to_dict() if as_dictionary else given
    ours = fastuper.UperNetForSemanticSegmentation(fastuper.UperNetConfig(backbone_config=given, hidden_size=24))
    theirs = transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(backbone_config=backbone_config(family), hidden_size=24)
    )
    logits, expected = outputs_of(ours, theirs)
    assert error(logits, expected) < 1e-10

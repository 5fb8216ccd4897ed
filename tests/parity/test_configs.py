"""Configurations compared with Transformers': arguments, defaults, and config.json in both directions."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fastuper
from bench.numerics import error
from bench.pairs import STAGES, VERSION_5, images, load, randomize
from fastuper.models.upernet_configuration import OPTIONS
from tests.parity.models import FAMILIES, backbone_config, config

CLASSES = ["UperNetConfig", "ConvNextConfig", "ConvNextV2Config", "SwinConfig", "Swinv2Config", "ResNetConfig"]

# Values that one library derives from others, or that do not describe a network.
DERIVED = {"transformers_version", "id2label", "backbone_config", "num_layers", "hidden_size"}


def as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.skipif(VERSION_5, reason="the configurations of Transformers 5 have other signatures")
@pytest.mark.parametrize("name", CLASSES)
def test_arguments_and_their_order(name):
    expected = [p.name for p in inspect.signature(getattr(transformers, name).__init__).parameters.values()]
    given = [key for key in inspect.signature(getattr(fastuper, name).__init__).parameters if key not in OPTIONS]
    assert given == [*expected[:-1], "extra"]


@pytest.mark.parametrize("name", CLASSES)
def test_defaults(name):
    theirs, ours = getattr(transformers, name)(), getattr(fastuper, name)()
    parameters = inspect.signature(type(ours).__init__).parameters
    names = [key for key in parameters if key not in ("self", "extra", "backbone_config", *OPTIONS)]
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


# ------------------------------------------------------------------------------- methods and constants of their classes

DOCUMENT = (Path(__file__).parents[2] / "docs" / "differences.md").read_text(encoding="utf-8")

# Public names of their configurations that ours do not have; docs/differences.md has the reasons.
LEFT_OUT = {
    *("convert_rope_params_to_dict", "default_rope_type", "default_theta", "ignore_keys_at_rope_validation"),
    *("nested_rope_parameter_keys", "rope_scaling", "standardize_rope_params", "validate_rope"),
    *("allow_global_per_layer_attribute_access", "per_layer_attributes", "per_layer_config"),
    *("serialize_explicit_per_layer_config", "get_mtp_config", "validate_layer_type", "validate_token_ids"),
    *("base_model_fsdp_plan", "default_config_fields", "dict_dtype_to_str", "sub_configs_defaults"),
    *("register_for_auto_class", "validate_output_attentions"),
}
LEFT_OUT_4 = {
    *("dict_dtype_to_str", "register_for_auto_class"),
    *("add_cross_attention", "cross_attention_hidden_size", "finetuning_task", "from_text_audio_configs"),
    *("from_text_vision_configs", "has_no_defaults_at_init", "is_decoder", "prefix", "pruned_heads", "sep_token_id"),
    *("tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "torchscript"),
    "use_bfloat16",
}


def public(value: Any) -> set[str]:
    # Not `dir(value)`: that of an object of ours asks its `__class__`, which is also a subclass of Transformers' class.
    return {name for name in {*dir(type(value)), *vars(value)} if not name.startswith("_")}


@pytest.mark.parametrize("name", CLASSES)
def test_every_public_name_is_there_or_listed(name):
    theirs, ours = getattr(transformers, name)(), getattr(fastuper, name)()
    generation = set() if VERSION_5 else vars(transformers.GenerationConfig()).keys()
    left_out = LEFT_OUT if VERSION_5 else LEFT_OUT_4
    later_changed = ("transformers_version",) if VERSION_5 else ("transformers_version", "attribute_map")
    assert public(theirs) - public(ours) - generation == left_out
    assert [name for name in left_out if f"`{name}`" not in DOCUMENT] == []
    for attribute in public(theirs) & public(ours):
        value, expected = getattr(ours, attribute), getattr(theirs, attribute)
        assert callable(value) == callable(expected), attribute
        if not callable(value) and attribute not in ("backbone_config", "sub_configs", *later_changed):
            assert as_list(value) == as_list(expected), attribute
    assert ours.sub_configs.keys() >= theirs.sub_configs.keys()
    assert ours.get_text_config() is ours
    assert ours.is_custom_code()
    assert not ours.is_remote_code()
    assert isinstance(ours, transformers.PretrainedConfig)
    assert type(ours) is getattr(fastuper, name)


@pytest.mark.parametrize("name", CLASSES)
def test_methods_of_transformers(name, tmp_path):
    """The same calls of both classes."""
    theirs, ours = getattr(transformers, name)(), getattr(fastuper, name)()
    for config_ in (theirs, ours):
        before = copy.deepcopy(config_)
        config_.update({"initializer_range": 0.5, "num_labels": 3, "note": [1, 2]})
        config_.update_from_string("initializer_range=0.25,output_hidden_states=true")
        assert (config_.initializer_range, config_.num_labels, config_.note) == (0.25, 3, [1, 2])
        assert config_.output_hidden_states is True
        assert config_ != before
        for wrong in ("initializer_range=x", "nothing=1", "output_hidden_states=2"):
            with pytest.raises(ValueError, match=None if config_ is theirs else wrong.split("=")[0]):
                config_.update_from_string(wrong)
        assert {"initializer_range", "note", "id2label"} <= set(config_)
        assert all(hasattr(config_, key) for key in config_)
        assert "nothing" not in config_
        for use_diff in (True, False):
            config_.to_json_file(tmp_path / "c.json", use_diff=use_diff)
            assert (tmp_path / "c.json").read_text(encoding="utf-8") == config_.to_json_string(use_diff=use_diff)
            read = type(config_).from_json_file(tmp_path / "c.json")
            assert read.to_dict() == config_.to_dict()
        config_.save_pretrained(tmp_path)
        values, unused = type(config_).get_config_dict(tmp_path, foo=1, cache_dir=None, token=None)
        assert (values["note"], unused) == ([1, 2], {"foo": 1})
        read, unused = type(config_).from_pretrained(tmp_path, return_unused_kwargs=True, foo=1, initializer_range=1.0)
        assert (read.initializer_range, unused) == (1.0, {"foo": 1})
        assert type(config_).from_pretrained(tmp_path / "config.json").note == [1, 2]  # the file itself
        config_.validate() if hasattr(config_, "validate") else None
    changed = {key: value for key, value in ours.to_diff_dict().items() if key != "backbone_config"}
    expected = theirs.to_diff_dict()
    only_ours = {"backbone", "backbone_kwargs", "use_pretrained_backbone", "use_timm_backbone"} if VERSION_5 else set()
    assert changed.keys() - only_ours <= expected.keys()
    assert expected.keys() - changed.keys() <= {
        *("transformers_version", "backbone_config", "task_specific_params", "dtype", "torch_dtype"),
        *("num_layers", "hidden_size"),
    }


def test_a_refused_update_changes_nothing():
    given = fastuper.SwinConfig()
    before = given.to_dict()
    with pytest.raises(ValueError, match="num_labels"):
        given.update({"embed_dim": 48, "num_labels": 0})
    with pytest.raises(AttributeError, match="'update' is a method of SwinConfig"):
        given.update({"embed_dim": 48, "update": 0})
    assert given.to_dict() == before
    given.update(given.to_dict())
    assert given.to_dict() == before
    given.update({"dtype": "bfloat16"})
    assert given.dtype is torch.bfloat16
    given.embed_dim = 0
    with pytest.raises(ValueError, match="embed_dim"):
        given.validate()


def test_other_names_of_attributes():
    for library in (fastuper, transformers):
        swin, convnext = library.SwinConfig(), library.ConvNextConfig()
        assert swin.num_hidden_layers == 4
        swin.num_attention_heads = [1, 2, 4, 8]
        assert swin.num_heads == [1, 2, 4, 8]
        assert "num_attention_heads" not in swin.to_dict()
        if VERSION_5 or library is fastuper:  # 4.x drops the argument
            assert library.SwinConfig(num_attention_heads=[1, 2, 4, 8]).num_heads == [1, 2, 4, 8]
            assert convnext.num_hidden_layers == 4
    with pytest.raises(AttributeError, match="ResNetConfig has no 'num_hidden_layers'"):
        fastuper.ResNetConfig().num_hidden_layers  # noqa: B018


def test_a_backbones_configuration_is_found_in_a_whole_models(tmp_path):
    config("convnext").save_pretrained(tmp_path)
    theirs, ours = (library.ConvNextConfig.from_pretrained(tmp_path) for library in (transformers, fastuper))
    assert ours.hidden_sizes == as_list(theirs.hidden_sizes)
    with pytest.raises(ValueError, match="describes a 'upernet' model; SwinConfig reads 'swin'"):
        fastuper.SwinConfig.from_pretrained(tmp_path)


def test_stages_are_selected_by_their_methods():
    given = fastuper.SwinConfig()
    given.set_output_features_output_indices(out_features=["stage1", "stage3"], out_indices=None)
    assert given.out_indices == [1, 3]
    given.verify_out_features_out_indices()
    given._out_indices = [1, 2]
    with pytest.raises(ValueError, match="name different stages"):
        given.verify_out_features_out_indices()


@pytest.fixture
def registered(monkeypatch):
    """Our classes in Transformers' Auto classes, until the end of the test."""
    from transformers.models.auto import configuration_auto, modeling_auto

    for mapping in (
        configuration_auto.CONFIG_MAPPING,
        modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    ):
        monkeypatch.setattr(mapping, "_extra_content", dict(mapping._extra_content))
    transformers.AutoConfig.register("upernet", fastuper.UperNetConfig, exist_ok=True)
    transformers.AutoModelForSemanticSegmentation.register(
        fastuper.UperNetConfig, fastuper.UperNetForSemanticSegmentation, exist_ok=True
    )


def test_the_calls_of_the_official_training_scripts(registered, tmp_path):
    """The calls on configuration, model and processor in run_semantic_segmentation.py and its _no_trainer twin."""
    start = config("convnext", library=fastuper)
    fastuper.UperNetForSemanticSegmentation(start).save_pretrained(tmp_path)
    fastuper.UperNetImageProcessor(size={"shortest_edge": 64}).save_pretrained(tmp_path)
    id2label = {0: "road", 1: "sky", 2: "tree"}
    label2id = {name: str(number) for number, name in id2label.items()}
    hub = {"cache_dir": None, "revision": "main", "token": None, "trust_remote_code": False}
    for auto in (True, False):
        read = transformers.AutoConfig if auto else fastuper.UperNetConfig
        build = transformers.AutoModelForSemanticSegmentation if auto else fastuper.UperNetForSemanticSegmentation
        given = read.from_pretrained(tmp_path, label2id=label2id, id2label=id2label, **hub)
        assert type(given) is fastuper.UperNetConfig
        assert (given.id2label, given.label2id) == (id2label, label2id)
        model = build.from_pretrained(tmp_path, from_tf=False, config=given, ignore_mismatched_sizes=True, **hub)
        assert type(model) is fastuper.UperNetForSemanticSegmentation
        assert model.config.num_labels == 3
        assert model.decode_head.classifier.out_channels == 3
        given = read.from_pretrained(tmp_path, num_labels=3, id2label=id2label, label2id=label2id)
        assert given.num_labels == 3
    assert type(transformers.AutoModelForSemanticSegmentation.from_config(start)) is type(model)
    processor = fastuper.UperNetImageProcessor.from_pretrained(tmp_path, do_reduce_labels=False, **hub)
    assert "shortest_edge" in processor.size
    assert (processor.size["shortest_edge"], processor.do_reduce_labels) == (64, False)
    assert len(processor.image_mean) == len(processor.image_std) == 3
    assert processor.save_pretrained(tmp_path / "out") == [str(tmp_path / "out" / "preprocessor_config.json")]


def test_copies_and_pickles_with_transformers_loaded():
    given = config("swin", library=fastuper)
    for other in (copy.copy(given), copy.deepcopy(given), pickle.loads(pickle.dumps(given))):
        assert type(other) is fastuper.UperNetConfig
        assert other == given
        assert repr(other) == repr(given)
    with pytest.raises(TypeError, match="unhashable"):
        hash(given)
    other.loss_ignore_index = 3
    assert other != given

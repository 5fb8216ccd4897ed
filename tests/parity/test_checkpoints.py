"""Checkpoints of fastuper in Transformers and the other way round; run with Transformers 4.56 and 5.x."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import fastuper
from fastuper.models.backbones.registry import checkpoint_names
from fastuper.weights.reading import read_weights
from fastuper.weights.transformers import backbone_state_dict, hub_name

VERSION_5 = int(transformers.__version__.split(".")[0]) >= 5
STAGES = ["stage1", "stage2", "stage3", "stage4"]

# The configuration's arguments, and the channels of the third stage.
BACKBONES = {
    "convnext": ("ConvNextConfig", {"hidden_sizes": [4, 6, 8, 10], "depths": [1, 1, 2, 1]}, 8),
    "convnextv2": ("ConvNextV2Config", {"hidden_sizes": [4, 6, 8, 10], "depths": [1, 1, 2, 1]}, 8),
    "resnet-basic": (
        "ResNetConfig",
        {"embedding_size": 4, "hidden_sizes": [4, 6, 8, 10], "depths": [1, 2, 1, 1], "layer_type": "basic"},
        8,
    ),
    "resnet": ("ResNetConfig", {"embedding_size": 4, "hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 2, 1]}, 16),
    "swin": ("SwinConfig", {"embed_dim": 4, "depths": [2, 1, 2, 1], "num_heads": [1, 1, 2, 2], "window_size": 2}, 16),
    "swinv2": (
        "Swinv2Config",
        {"image_size": 64, "embed_dim": 4, "depths": [2, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 3},
        16,
    ),
    "swin-variations": (
        "SwinConfig",
        {
            "embed_dim": 4,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 2, 2, 4],
            "window_size": 3,
            "qkv_bias": False,
            "use_absolute_embeddings": VERSION_5,  # 4.56 has one position too many, and cannot run such a model
            "image_size": 32,
        },
        16,
    ),
}
WAYS = {
    "one file": {},
    "shards": {"max_shard_size": "8KB"},
    "variant": {"variant": "ema"},
}
CASES = [
    *((backbone, "one file", torch.float32) for backbone in BACKBONES),
    ("swin", "one file", torch.bfloat16),
    ("swin", "shards", torch.float32),
    ("convnext", "shards", torch.bfloat16),
    ("resnet", "shards", torch.float16),
    ("convnext", "variant", torch.float32),
    ("swin", "variant", torch.bfloat16),
]
cases = pytest.mark.parametrize(
    ("backbone", "way", "dtype"), CASES, ids=[f"{b}, {w}, {d}".replace("torch.", "") for b, w, d in CASES]
)


def make_config(library, backbone, **values):
    name, arguments, channels = BACKBONES[backbone]
    backbone_config = getattr(library, name)(**arguments, out_indices=[1, 2, 3, 4])
    return library.UperNetConfig(
        backbone_config=backbone_config,
        num_labels=5,
        hidden_size=6,
        auxiliary_in_channels=channels,
        auxiliary_channels=4,
        **values,
    )


def make_model(library, backbone, dtype=torch.float32):
    """Return a model with random values in all floating-point tensors, none of them an initial value."""
    torch.manual_seed(0)
    model = library.UperNetForSemanticSegmentation(make_config(library, backbone)).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return model.to(dtype)


def as_loaded(state_dict, model):
    """Return a state dict of Transformers under the names by which our loader copies it."""
    names = checkpoint_names(model.config.backbone_config.model_type)
    return {ours: tensor for name, tensor in state_dict.items() if (ours := hub_name(name, names)) is not None}


def assert_same_weights(theirs, ours):
    """Compare all tensors of Transformers' model with ours; only relative_position_index may be missing, in 5.x."""
    theirs, ours = as_loaded(theirs.state_dict(), ours), ours.state_dict()
    absent = ours.keys() - theirs.keys()
    assert theirs.keys() <= ours.keys()
    assert all(VERSION_5 and name.endswith("relative_position_index") for name in absent)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def nothing_amiss(info):
    return not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"] or info["error_msgs"])


@cases
def test_transformers_reads_ours(tmp_path, backbone, way, dtype):
    ours = make_model(fastuper, backbone, dtype)
    ours.save_pretrained(tmp_path, **WAYS[way])
    theirs, info = transformers.UperNetForSemanticSegmentation.from_pretrained(
        tmp_path, variant=WAYS[way].get("variant"), output_loading_info=True, dtype="auto"
    )
    assert nothing_amiss(info)
    assert theirs.dtype == dtype
    assert_same_weights(theirs, ours)


@cases
def test_we_read_transformers(tmp_path, backbone, way, dtype, caplog):
    theirs = make_model(transformers, backbone, dtype)
    theirs.save_pretrained(tmp_path, **WAYS[way])
    ours, info = fastuper.UperNetForSemanticSegmentation.from_pretrained(
        tmp_path, variant=WAYS[way].get("variant"), output_loading_info=True
    )
    assert nothing_amiss(info)
    assert not [record for record in caplog.records if record.name == "fastuper"]
    assert ours.dtype == ours.config.dtype == dtype
    assert_same_weights(theirs, ours)


@pytest.mark.parametrize("backbone", ["convnext", "resnet", "swin"])
def test_a_loaded_model_computes_the_same(tmp_path, backbone):
    theirs = make_model(transformers, backbone)
    theirs.save_pretrained(tmp_path)
    ours = fastuper.UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    pixels = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels).logits, theirs(pixels).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(VERSION_5, reason="Transformers 5 writes safetensors alone")
@pytest.mark.parametrize("way", WAYS)
def test_pickles_of_transformers(tmp_path, way):
    theirs = make_model(transformers, "swin")
    theirs.save_pretrained(tmp_path, safe_serialization=False, **WAYS[way])
    ours = fastuper.UperNetForSemanticSegmentation.from_pretrained(tmp_path, variant=WAYS[way].get("variant"))
    assert_same_weights(theirs, ours)


@pytest.mark.parametrize("way", WAYS)
def test_transformers_reads_our_pickles(tmp_path, way):
    ours = make_model(fastuper, "swin")
    ours.save_pretrained(tmp_path, safe_serialization=False, **WAYS[way])
    theirs, info = transformers.UperNetForSemanticSegmentation.from_pretrained(
        tmp_path, variant=WAYS[way].get("variant"), output_loading_info=True, use_safetensors=False
    )
    assert nothing_amiss(info)
    assert_same_weights(theirs, ours)


@pytest.mark.skipif(not VERSION_5, reason="Transformers 4 has one set of names")
def test_the_names_that_transformers_5_has_in_memory(tmp_path):
    theirs = make_model(transformers, "swin")
    theirs.save_pretrained(tmp_path, save_original_format=False)
    assert "backbone.swin.encoder.layers.0.blocks.0.mlp.fc1.weight" in load_file(tmp_path / "model.safetensors")
    ours, info = fastuper.UperNetForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert nothing_amiss(info)
    assert_same_weights(theirs, ours)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_load_state_dict(backbone):
    theirs = make_model(transformers, backbone)
    ours = fastuper.UperNetForSemanticSegmentation(make_config(fastuper, backbone))
    ours.load_state_dict(theirs.state_dict())
    assert_same_weights(theirs, ours)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_names_are_those_of_version_4(backbone):
    """Our names, shapes and dtypes are those of 4.56. 5.x has no relative_position_index, and one norm more."""
    theirs = make_model(transformers, backbone).state_dict()
    model = make_model(fastuper, backbone)
    ours = model.state_dict()
    if not VERSION_5:
        assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    else:
        assert sorted(as_loaded(theirs, model)) == sorted(n for n in ours if not n.endswith("relative_position_index"))


def test_a_transformers_configuration_object(tmp_path):
    theirs = make_model(transformers, "swin")
    theirs.save_pretrained(tmp_path)
    config = make_config(transformers, "swin", loss_ignore_index=7)
    (tmp_path / "config.json").unlink()
    ours = fastuper.UperNetForSemanticSegmentation.from_pretrained(tmp_path, config=config)
    assert ours.config.loss_ignore_index == 7
    assert_same_weights(theirs, ours)


def test_classes_of_another_number_as_transformers_has_it(tmp_path):
    make_model(transformers, "convnext").save_pretrained(tmp_path)
    asked = {"num_labels": 9, "ignore_mismatched_sizes": True, "output_loading_info": True}
    theirs, expected = transformers.UperNetForSemanticSegmentation.from_pretrained(tmp_path, **asked)
    ours, info = fastuper.UperNetForSemanticSegmentation.from_pretrained(tmp_path, **asked)
    assert len(info["mismatched_keys"]) == 4
    if VERSION_5:  # 4.56 returns the names alone
        assert {(n, tuple(a), tuple(b)) for n, a, b in expected["mismatched_keys"]} == info["mismatched_keys"]
    else:
        assert set(expected["mismatched_keys"]) == {name for name, _, _ in info["mismatched_keys"]}
    assert set(info) >= {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"}
    assert ours.config.id2label == theirs.config.id2label
    fresh = {name for name, _, _ in info["mismatched_keys"]}
    loaded = ours.state_dict()
    for name, tensor in theirs.state_dict().items():
        if name not in fresh:
            torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("backbone", ["convnext", "resnet", "swin"])
@pytest.mark.parametrize("kind", ["classifier", "bare model", "backbone"])
def test_a_checkpoint_of_the_backbones_family(tmp_path, backbone, kind):
    """Our backbone loads the same tensors from it as Transformers' backbone."""
    name, arguments, _ = BACKBONES[backbone]
    config = getattr(transformers, name)(**arguments, out_indices=[1, 2, 3, 4])
    auto = {
        "classifier": transformers.AutoModelForImageClassification,
        "bare model": transformers.AutoModel,
        "backbone": transformers.AutoBackbone,
    }[kind]
    torch.manual_seed(0)
    model = auto.from_config(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
    model.save_pretrained(tmp_path)

    upernet = fastuper.UperNetForSemanticSegmentation(make_config(fastuper, backbone))
    ours = upernet.backbone
    weights = backbone_state_dict(read_weights(tmp_path)[0], backbone, checkpoint_names(backbone))
    result = ours.load_state_dict(weights, strict=False)
    norms = {n for n in ours.state_dict() if n.startswith("hidden_states_norms.")}
    indices = {n for n in ours.state_dict() if n.endswith("relative_position_index")} if VERSION_5 else set()
    assert result.unexpected_keys == []
    assert set(result.missing_keys) == indices | (norms if kind != "backbone" else set())

    backbone_class = getattr(transformers, name.replace("Config", "Backbone"))
    theirs = backbone_class.from_pretrained(tmp_path, out_indices=[1, 2, 3, 4])
    theirs = as_loaded({f"backbone.{n}": t for n, t in theirs.state_dict().items()}, upernet)
    random = set(result.missing_keys)
    for tensor_name, tensor in ours.state_dict().items():
        if tensor_name not in random:
            torch.testing.assert_close(tensor, theirs[f"backbone.{tensor_name}"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("BeitConfig", {"intermediate_size": 8, "image_size": 32, "num_hidden_layers": 4}),
        ("Dinov2Config", {"image_size": 28, "patch_size": 14, "num_hidden_layers": 4}),
        ("ConvNextV2Config", {"hidden_sizes": [4, 6, 8, 10], "depths": [1, 1, 1, 1]}),
    ],
)
def test_backbones_that_transformers_builds(tmp_path, name, arguments):
    """Our modules have Transformers' names in memory. For 5.x these differ from the names on disk, which we write."""
    sizes = {} if "hidden_sizes" in arguments else {"hidden_size": 8, "num_attention_heads": 2}
    config = getattr(transformers, name)(**arguments, **sizes, out_features=STAGES)
    config = transformers.UperNetConfig(backbone_config=config, num_labels=3, hidden_size=6, use_auxiliary_head=False)
    theirs = transformers.UperNetForSemanticSegmentation(config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, info = fastuper.UperNetForSemanticSegmentation.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert nothing_amiss(info)
    ours.save_pretrained(tmp_path / "ours")
    expected = load_file(tmp_path / "theirs" / "model.safetensors")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert written.keys() == expected.keys()
    for tensor_name, tensor in expected.items():
        torch.testing.assert_close(written[tensor_name], tensor, rtol=0, atol=0)
    again, info = transformers.UperNetForSemanticSegmentation.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert nothing_amiss(info)
    assert again.state_dict().keys() == ours.state_dict().keys()


def test_config_json_says_what_transformers_looks_for(tmp_path):
    make_model(fastuper, "swin", torch.bfloat16).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["model_type"] == "upernet"
    theirs = transformers.AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "UperNetForSemanticSegmentation"
    assert theirs.config.architectures == ["UperNetForSemanticSegmentation"]

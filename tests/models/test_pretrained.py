"""`from_pretrained`, `save_pretrained`, `push_to_hub` and the names of tensors; tests/weights tests the files."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import pickle
import re
import types

import accelerate
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastuper.io.hub
import fastuper.models.pretrained
import fastuper.weights.writing
from fastuper import (
    ConvNextConfig,
    ConvNextV2Config,
    DeepStemResNetConfig,
    ResNetConfig,
    SwinConfig,
    Swinv2Config,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    UperNetImageProcessor,
    ViTPyramidConfig,
)
from fastuper.models.pretrained import PretrainedMixin, rename_on_load
from fastuper.weights.errors import CheckpointError
from fastuper.weights.reading import read_weights
from tests.weights.common import assert_same

try:
    import resource
except ImportError:  # not on Windows
    resource = None

STAGES = ["stage1", "stage2", "stage3", "stage4"]
BACKBONES = {
    "convnext": (lambda: ConvNextConfig(hidden_sizes=[4, 6, 8, 10], depths=[1, 1, 1, 1], out_features=STAGES), 8),
    "convnextv2": (lambda: ConvNextV2Config(hidden_sizes=[4, 6, 8, 10], depths=[1] * 4, out_features=STAGES), 8),
    "resnet": (
        lambda: ResNetConfig(embedding_size=4, hidden_sizes=[4, 6, 8, 10], depths=[1, 1, 1, 1], out_features=STAGES),
        8,
    ),
    "resnet_deep_stem": (
        lambda: DeepStemResNetConfig([4, 2, 4], hidden_sizes=[4, 6, 8, 10], depths=[1] * 4, out_features=STAGES),
        8,
    ),
    "swin": (
        lambda: SwinConfig(
            embed_dim=4, depths=[1, 2, 1, 1], num_heads=[1, 1, 2, 2], window_size=2, out_features=STAGES
        ),
        16,
    ),
    "swinv2": (
        lambda: Swinv2Config(
            64, embed_dim=4, depths=[1, 2, 1, 1], num_heads=[1, 1, 2, 2], window_size=2, out_features=STAGES
        ),
        16,
    ),
    "vit_pyramid": (
        lambda: ViTPyramidConfig(
            image_size=[32, 48],
            patch_size=8,
            hidden_size=8,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=12,
            use_relative_position_bias=True,
            layer_scale_init_value=0.1,
            final_norm=True,
            neck="transposed",
        ),
        8,
    ),
}


def tiny_config(backbone="convnext", **values):
    make, auxiliary_in_channels = BACKBONES[backbone]
    values = {"num_labels": 3, "hidden_size": 6, "auxiliary_channels": 4, **values}
    return UperNetConfig(make(), auxiliary_in_channels=auxiliary_in_channels, **values)


def tiny_model(backbone="convnext", seed=0, **values):
    """Return a model whose tensors all differ from their initial values."""
    torch.manual_seed(seed)
    model = UperNetForSemanticSegmentation(tiny_config(backbone, **values)).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
            elif name.endswith("num_batches_tracked"):
                tensor.fill_(7)
    return model


def names_of_version_5(state_dict):
    """Return the state dict of a Swin UPerNet with the names that Transformers 5 has in memory."""
    renamed = {}
    for name, tensor in state_dict.items():
        if name.endswith("relative_position_index"):
            continue
        if re.match(r"backbone\.(embeddings|encoder)\.", name):
            name = name.replace("backbone.", "backbone.swin.", 1)
            name = name.replace("attention.self.query.", "attention.q_proj.")
            name = name.replace("attention.self.key.", "attention.k_proj.")
            name = name.replace("attention.self.value.", "attention.v_proj.")
            name = name.replace("attention.self.relative_", "attention.relative_position_bias.relative_")
            name = name.replace("attention.output.dense.", "attention.o_proj.")
            name = name.replace("intermediate.dense.", "mlp.fc1.")
            name = name.replace(".output.dense.", ".mlp.fc2.")
        renamed[name] = tensor
    renamed["backbone.swin.layernorm.weight"] = torch.ones(32)
    renamed["backbone.swin.layernorm.bias"] = torch.zeros(32)
    return renamed


def folder_contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fill new memory with NaN, so that a tensor without values is found."""
    empty_like = torch.empty_like

    def poisoned(*args, **kwargs):
        tensor = empty_like(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -(10**9))

    monkeypatch.setattr(torch, "empty_like", poisoned)


# ---------------------------------------------------------------------------------------------------------------- names


def test_load_state_dict_with_version_5_names():
    model, other = tiny_model("swin"), tiny_model("swin", seed=1)
    theirs = names_of_version_5(model.state_dict())
    before = dict(theirs)
    assert str(other.load_state_dict(theirs)) == "<All keys matched successfully>"
    assert_same(model.state_dict(), other.state_dict())
    assert theirs == before  # the caller's dict is the caller's


def test_load_state_dict_of_a_model_around_ours():
    def around(seed):
        model = nn.ModuleDict({"net": tiny_model("swin", seed), "backbone": nn.Linear(2, 2)})
        model["backbone"].swin = nn.Linear(1, 1)  # a name that is ours to rename only inside `net`
        return model

    model, other = around(0), around(1)
    theirs = {f"net.{name}": t for name, t in names_of_version_5(model["net"].state_dict()).items()}
    theirs |= {f"backbone.{name}": t for name, t in model["backbone"].state_dict().items()}
    other.load_state_dict(theirs)
    assert_same(model.state_dict(), other.state_dict())


def test_load_state_dict_still_says_what_is_wrong():
    model = tiny_model("swin")
    theirs = names_of_version_5(model.state_dict())
    ours = "backbone.encoder.layers.0.blocks.0.attention.self.query.weight"
    theirs[ours] = theirs["backbone.swin.encoder.layers.0.blocks.0.attention.q_proj.weight"]  # both names of one tensor
    theirs["backbone.surplus"] = torch.zeros(1)
    del theirs["decode_head.classifier.bias"]
    result = model.load_state_dict(theirs, strict=False)
    assert result.missing_keys == ["decode_head.classifier.bias"]
    assert sorted(result.unexpected_keys) == [
        "backbone.surplus",
        "backbone.swin.encoder.layers.0.blocks.0.attention.q_proj.weight",
    ]


def test_rename_on_load_leaves_the_modules_own_names_alone():
    model = nn.Module()
    model.backbone = nn.Module()
    model.backbone.swin = nn.ModuleDict({"layernorm": nn.LayerNorm(2)})  # as a backbone of Transformers 5 has it
    model.register_load_state_dict_pre_hook(rename_on_load)
    theirs = {name: torch.rand(2) for name in model.state_dict()}
    model.load_state_dict(theirs)
    assert_same(theirs, model.state_dict())


def test_a_model_can_be_copied_and_pickled():
    model = tiny_model("swin")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.load_state_dict(names_of_version_5(model.state_dict()))
        assert_same(model.state_dict(), other.state_dict())


# ------------------------------------------------------------------------------------------------------ from_pretrained


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return a read-only folder with a tiny ConvNeXt UPerNet, and the model."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model()
    model.save_pretrained(folder)
    return folder, model


def load(folder, **kwargs):
    return UperNetForSemanticSegmentation.from_pretrained(folder, **kwargs)


def rewrite(folder, change):
    """Apply `change` to the tensors of a folder's model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_round_trip(tmp_path, backbone, poisoned_memory, caplog):
    model = tiny_model(backbone)
    model.save_pretrained(tmp_path)
    other, info = load(tmp_path, output_loading_info=True)
    assert_same(model.state_dict(), other.state_dict())
    assert info == {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    assert not caplog.records
    assert not other.training
    assert all(parameter.requires_grad for parameter in other.parameters())
    assert other.config.name_or_path == str(tmp_path)
    assert (
        other.config.to_dict() | {"_name_or_path": "", "architectures": None, "dtype": None} == model.config.to_dict()
    )
    pixels = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(other(pixels).logits, model(pixels).logits, rtol=0, atol=0)


def test_every_missing_tensor_is_initialised(tmp_path, poisoned_memory):
    """Missing tensors get initial values, buffers too."""
    model = tiny_model("swin")
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: [tensors.pop(n) for n in list(tensors) if n != "decode_head.classifier.weight"])
    other, info = load(tmp_path, output_loading_info=True)
    state_dict = other.state_dict()
    assert info["missing_keys"] == {
        n for n in state_dict if n != "decode_head.classifier.weight" and not n.endswith("relative_position_index")
    }
    for name, tensor in state_dict.items():
        assert tensor.isfinite().all(), name
        if name.endswith("relative_position_index"):
            assert torch.equal(tensor, model.state_dict()[name])
        if name.endswith("num_batches_tracked"):
            assert tensor == 0


def test_loaded_weights_do_not_depend_on_the_file(tmp_path):
    model = tiny_model()
    for safe in (False, True):
        model.save_pretrained(tmp_path, safe_serialization=safe)
        other = load(tmp_path)
        file = tmp_path / ("model.safetensors" if safe else "pytorch_model.bin")
        with file.open("r+b") as stream:
            stream.write(b"\xff" * file.stat().st_size)
        assert_same(model.state_dict(), other.state_dict())


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, torch.bfloat16),
        ({"dtype": None}, torch.bfloat16),
        ({"dtype": "auto"}, torch.bfloat16),
        ({"dtype": "float32"}, torch.float32),
        ({"dtype": "torch.float16"}, torch.float16),
        ({"dtype": torch.float64}, torch.float64),
        ({"torch_dtype": torch.float16}, torch.float16),
        ({"torch_dtype": "auto"}, torch.bfloat16),
        ({"dtype": "float16", "torch_dtype": torch.float16}, torch.float16),
    ],
)
@pytest.mark.parametrize("in_config", [True, False], ids=["config says", "weights say"])
def test_dtype(tmp_path, asked, expected, in_config):
    model = tiny_model("swin").bfloat16()
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["dtype"] == "bfloat16"
    if not in_config:
        (tmp_path / "config.json").write_text(json.dumps({**values, "dtype": None}))
    other = load(tmp_path, **asked)
    assert other.config.dtype == expected
    theirs = {n: t.to(expected) if t.is_floating_point() else t for n, t in model.state_dict().items()}
    assert_same(theirs, other.state_dict())


def test_the_dtype_of_the_configuration_precedes_that_of_the_weights(tmp_path):
    tiny_model().half().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["dtype"]
    (tmp_path / "config.json").write_text(json.dumps({**values, "torch_dtype": "float32"}))  # 4.x's name
    assert load(tmp_path).dtype == torch.float32


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8' is not a floating-point dtype"),
        ({"dtype": "float33"}, "dtype='float33'"),
        ({"dtype": torch.int64}, "dtype=torch.int64"),
        ({"dtype": {"": "float32"}}, "is not a floating-point dtype"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "disagree"),
        ({"dtype": "auto", "torch_dtype": "bfloat16"}, "disagree"),
    ],
)
def test_bad_dtype(checkpoint, asked, message):
    with pytest.raises(ValueError, match=message):
        load(checkpoint[0], **asked)


@pytest.mark.parametrize("labels", [{"num_labels": 5}, {"id2label": {i: f"class {i}" for i in range(5)}}])
def test_another_number_of_classes_is_an_error(checkpoint, labels):
    with pytest.raises(RuntimeError) as caught:
        load(checkpoint[0], **labels)
    lines = str(caught.value).split("\n")
    assert "ignore_mismatched_sizes=True" in lines[0]
    assert lines[1:] == [
        "  auxiliary_head.classifier.bias: (3,) in the checkpoint, (5,) in the model",
        "  auxiliary_head.classifier.weight: (3, 4, 1, 1) in the checkpoint, (5, 4, 1, 1) in the model",
        "  decode_head.classifier.bias: (3,) in the checkpoint, (5,) in the model",
        "  decode_head.classifier.weight: (3, 6, 1, 1) in the checkpoint, (5, 6, 1, 1) in the model",
    ]


def test_another_number_of_classes(checkpoint, caplog, poisoned_memory):
    folder, model = checkpoint
    other, info = load(folder, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True)
    fresh = {
        "auxiliary_head.classifier.bias": ((3,), (5,)),
        "auxiliary_head.classifier.weight": ((3, 4, 1, 1), (5, 4, 1, 1)),
        "decode_head.classifier.bias": ((3,), (5,)),
        "decode_head.classifier.weight": ((3, 6, 1, 1), (5, 6, 1, 1)),
    }
    assert info["mismatched_keys"] == {(name, *shapes) for name, shapes in fresh.items()}
    assert info["missing_keys"] == set() == info["unexpected_keys"]
    assert other.config.id2label == {i: f"LABEL_{i}" for i in range(5)}
    theirs, ours = model.state_dict(), other.state_dict()
    for name in fresh:
        del theirs[name]
        tensor = ours.pop(name)
        if name.endswith("bias"):
            assert not tensor.any()
        else:  # normal, standard deviation 0.02
            assert 0 < tensor.abs().max() < 0.2
    assert_same(theirs, ours)
    [record] = caplog.records
    assert (record.name, record.levelno) == ("fastuper", logging.WARNING)
    assert all(name in record.getMessage() for name in fresh)


def test_names_of_classes(checkpoint):
    names = {"0": "road", "1": "sky", "2": "tree"}  # JSON's keys are strings
    config = load(checkpoint[0], id2label=names, num_labels=3).config
    assert config.id2label == {0: "road", 1: "sky", 2: "tree"}
    assert config.label2id == {"road": 0, "sky": 1, "tree": 2}
    config = load(checkpoint[0], id2label=names, label2id={"Road": 0, "sky": 1, "tree": 2}).config
    assert config.label2id == {"Road": 0, "sky": 1, "tree": 2}


def test_the_same_number_of_classes_keeps_their_names(tmp_path):
    model = tiny_model(num_labels=None, id2label={0: "road", 1: "sky", 2: "tree"})
    model.save_pretrained(tmp_path)
    assert load(tmp_path, num_labels=3, loss_ignore_index=0).config.id2label == {0: "road", 1: "sky", 2: "tree"}


def test_missing_and_unexpected_tensors_are_logged(tmp_path, caplog, poisoned_memory):
    model = tiny_model()
    model.save_pretrained(tmp_path)

    def change(tensors):
        tensors["surplus.weight"] = tensors.pop("decode_head.classifier.weight")
        del tensors["backbone.embeddings.layernorm.bias"]

    rewrite(tmp_path, change)
    other, info = load(tmp_path, output_loading_info=True)
    missing = {"decode_head.classifier.weight", "backbone.embeddings.layernorm.bias"}
    assert info["missing_keys"] == missing
    assert info["unexpected_keys"] == {"surplus.weight"}
    first, second = (record.getMessage() for record in caplog.records)
    assert "newly initialised: " + ", ".join(sorted(missing)) in first
    assert second.endswith("not used: surplus.weight")
    theirs, ours = model.state_dict(), other.state_dict()
    for name in missing:
        del theirs[name]
        assert ours.pop(name).isfinite().all()
    assert_same(theirs, ours)


def test_weights_of_another_model_are_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    save_file({"vit.cls_token": torch.zeros(1), "vit.norm": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"not UPerNet weights.*their names are vit\.cls_token, vit\.norm and the"
    ):
        load(tmp_path)


def test_overrides_of_the_configuration(checkpoint):
    model = load(checkpoint[0], loss_ignore_index=0, auxiliary_loss_weight=0.1, output_hidden_states=True)
    assert (model.config.loss_ignore_index, model.config.auxiliary_loss_weight) == (0, 0.1)
    assert model.config.output_hidden_states
    model, info = load(checkpoint[0], use_auxiliary_head=False, output_loading_info=True)
    assert model.auxiliary_head is None
    assert info["unexpected_keys"] == {n for n in checkpoint[1].state_dict() if n.startswith("auxiliary_head.")}


def test_an_override_that_is_a_configuration(tmp_path):
    model = tiny_model("swin")
    model.save_pretrained(tmp_path)
    other = load(tmp_path, backbone_config={**model.config.backbone_config.to_dict(), "drop_path_rate": 0.5})
    assert isinstance(other.config.backbone_config, SwinConfig)
    assert other.config.backbone_config.drop_path_rate == 0.5


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"loss_ignore": 0, "ignore": 1}, "no argument loss_ignore, ignore, and UperNetConfig has no such attribute"),
        ({"_out": 0}, "no argument _out"),
        ({"trust_remote_code": True}, "trust_remote_code=True: code of a repository is never run"),
        ({"attn_implementation": "flash_attention_2"}, "does not support attn_implementation='flash_attention_2'"),
        ({"load_in_8bit": True}, "load_in_8bit=True: "),
        ({"weights_only": False}, "weights_only=False"),
    ],
)
def test_arguments_that_are_refused(checkpoint, asked, message):
    with pytest.raises(TypeError, match=message):
        load(checkpoint[0], **asked)


def test_arguments_of_transformers_without_effect_are_accepted(checkpoint):
    model = load(
        checkpoint[0],
        low_cpu_mem_usage=True,
        use_safetensors=True,
        trust_remote_code=False,
        attn_implementation="sdpa",
        device_map=None,
        force_download=False,
        weights_only=True,
    )
    assert_same(checkpoint[1].state_dict(), model.state_dict())


def test_use_safetensors(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert_same(model.state_dict(), load(tmp_path, use_safetensors=False).state_dict())
    with pytest.raises(
        CheckpointError, match=r"no file model.safetensors or model.safetensors.index.json; .*use_safetensors="
    ):
        load(tmp_path, use_safetensors=True)
    tiny_model(seed=1).save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert_same(model.state_dict(), load(tmp_path, use_safetensors=False).state_dict())


@pytest.mark.parametrize("given", ["object", "dict", "folder"])
def test_a_configuration_in_place_of_the_checkpoints(checkpoint, tmp_path, given):
    config = tiny_config(loss_ignore_index=9)
    before = config.to_dict()
    config.save_pretrained(tmp_path)
    (checkpoint[0] / "config.json").rename(checkpoint[0] / "aside.json")
    try:
        given = {"object": config, "dict": config.to_dict(), "folder": tmp_path}[given]
        model = load(checkpoint[0], config=given, dtype=torch.float16)
    finally:
        (checkpoint[0] / "aside.json").rename(checkpoint[0] / "config.json")
    assert model.config.loss_ignore_index == 9
    assert model.config.name_or_path == str(checkpoint[0])
    assert config.to_dict() == before


def test_a_missing_configuration(tmp_path):
    with pytest.raises(OSError, match=r"config\.json"):
        load(tmp_path)


def test_variant_and_subfolder(tmp_path):
    models = [tiny_model(), tiny_model(seed=1)]
    models[0].save_pretrained(tmp_path / "sub")
    models[1].save_pretrained(tmp_path / "sub", variant="ema")
    assert_same(models[0].state_dict(), load(tmp_path, subfolder="sub").state_dict())
    assert_same(models[1].state_dict(), load(tmp_path, subfolder="sub", variant="ema").state_dict())


def test_from_the_hubs_cache(tmp_path):
    """The cache holds a whole repository, and weights of a commit that is not `main`'s."""
    model = tiny_model()
    repository = tmp_path / "models--someone--upernet"
    model.save_pretrained(repository / "snapshots" / ("a" * 40), max_shard_size="4KB")
    tiny_model(seed=1).save_pretrained(repository / "snapshots" / ("b" * 40), max_shard_size="4KB")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    options = {"cache_dir": tmp_path, "local_files_only": True}
    other = load("someone/upernet", **options)
    assert other.config.name_or_path == "someone/upernet"
    assert_same(model.state_dict(), other.state_dict())
    assert_same(tiny_model(seed=1).state_dict(), load("someone/upernet", revision="b" * 40, **options).state_dict())
    with pytest.raises(OSError, match="not in the local cache"):
        load("someone/upernet", revision="v2", **options)


def test_options_reach_the_hub(tmp_path, monkeypatch):
    """All options are passed for each file; once the commit is known, it is the revision."""
    model = tiny_model()
    commit = "a" * 40
    snapshot = tmp_path / "models--someone--upernet" / "snapshots" / commit
    model.save_pretrained(snapshot, max_shard_size="4KB")
    asked = []

    def download(repo_id, filename, **kwargs):
        asked.append((repo_id, filename, kwargs))
        if (snapshot / filename).is_file():
            return str(snapshot / filename)
        raise EntryNotFoundError.__new__(EntryNotFoundError)

    monkeypatch.setattr(fastuper.io.hub, "hf_hub_download", download)
    options = {"token": "hf_secret", "cache_dir": tmp_path, "local_files_only": True}
    assert_same(model.state_dict(), load("someone/upernet", revision="v1", **options).state_dict())
    expected = {**options, "subfolder": None, "force_download": False}
    assert asked[0] == ("someone/upernet", "config.json", {**expected, "revision": "v1"})
    assert {filename for _, filename, _ in asked} >= {path.name for path in snapshot.iterdir()}
    for repo_id, _, kwargs in asked[1:]:
        assert repo_id == "someone/upernet"
        assert kwargs == {**expected, "revision": commit}

    asked.clear()
    load("someone/upernet")
    nothing = {
        "token": None,
        "cache_dir": None,
        "local_files_only": False,
        "subfolder": None,
        "force_download": False,
    }
    assert asked[0] == ("someone/upernet", "config.json", {**nothing, "revision": None})
    assert all(kwargs == {**nothing, "revision": commit} for _, _, kwargs in asked[1:])


def test_all_files_come_from_one_commit(tmp_path, monkeypatch):
    """All files have one commit, even after a push between two downloads."""
    model = tiny_model()
    repository = tmp_path / "models--someone--upernet"
    model.save_pretrained(repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    original = fastuper.models.pretrained.find_weights

    def push_and_find(*args, **kwargs):
        tiny_model(seed=1).save_pretrained(repository / "snapshots" / ("b" * 40))
        (repository / "refs" / "main").write_text("b" * 40)
        return original(*args, **kwargs)

    monkeypatch.setattr(fastuper.models.pretrained, "find_weights", push_and_find)
    other = load("someone/upernet", cache_dir=tmp_path, local_files_only=True)
    assert_same(model.state_dict(), other.state_dict())


def test_weights_loaded_in_inference_mode_can_be_trained(checkpoint):
    with torch.inference_mode():
        model = load(checkpoint[0])
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
    model(torch.rand(1, 3, 32, 32)).logits.sum().backward()


def test_device(checkpoint):
    assert load(checkpoint[0], device="meta").device.type == "meta"
    with torch.device("meta"):
        model = load(checkpoint[0], device="cpu")
    assert_same(checkpoint[1].state_dict(), model.state_dict())


def test_where_new_tensors_have_no_values(checkpoint):
    with torch.device("meta"), pytest.raises(RuntimeError, match="a model without weights"):
        load(checkpoint[0])
    with FakeTensorMode(), pytest.raises(RuntimeError, match="FakeTensorMode"):
        load(checkpoint[0])
    with accelerate.init_empty_weights(include_buffers=True), pytest.raises(RuntimeError, match="without weights"):
        load(checkpoint[0])
    torch.set_default_device("meta")
    try:
        with pytest.raises(RuntimeError, match=r"torch\.device\('meta'\)"):
            load(checkpoint[0])
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("surroundings", ["cpu", "float16", "init_empty_weights"])
def test_surroundings_that_change_nothing(checkpoint, surroundings):
    context = {
        "cpu": lambda: torch.device("cpu"),
        "float16": contextlib.nullcontext,
        "init_empty_weights": accelerate.init_empty_weights,
    }[surroundings]
    torch.set_default_dtype(torch.float16 if surroundings == "float16" else torch.float32)
    try:
        with context():
            model = load(checkpoint[0])
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(checkpoint[1].state_dict(), model.state_dict())
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}


def test_device_map(checkpoint):
    for device_map in ("meta", torch.device("meta"), {"": "meta"}):
        assert load(checkpoint[0], device_map=device_map).device.type == "meta"
    assert load(checkpoint[0], device_map="auto").device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong in ({"device_map": {"backbone": 0}}, {"device_map": "cpu", "device": "cpu"}):
        with pytest.raises(ValueError, match="goes to one device: pass device="):
            load(checkpoint[0], **wrong)


class ToyConfig:
    def __init__(self, **values):
        self.dtype = None
        self.architectures = None
        self.__dict__.update(values)

    def to_dict(self):
        return {name: value for name, value in vars(self).items() if not isinstance(value, torch.dtype)}

    @classmethod
    def from_dict(cls, values, **overrides):
        return cls(**values, **overrides)

    @classmethod
    def from_pretrained(cls, source, **options):
        return cls()

    def save_pretrained(self, folder):
        (folder / "config.json").write_text("{}")


class Toy(PretrainedMixin):
    """A model with a tensor under two names, and a part that another library built with values."""

    config_class = ToyConfig

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.first = nn.Linear(2, 2)
        self.second = nn.Linear(2, 2)
        self.second.weight = self.first.weight
        with torch.device("cpu"):
            self.foreign = nn.BatchNorm1d(3)
            self.foreign.running_mean.fill_(5.0)
        self.register_buffer("constant", torch.arange(3), persistent=False)
        self.first.weight.requires_grad = False
        self.initialized = None

    def initialize(self, names=None):
        self.initialized = names
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            if names is None or name in names:
                tensor.copy_(torch.arange(3)) if name == "constant" else tensor.fill_(0.25)


def test_shared_tensors_and_foreign_parts(tmp_path, poisoned_memory):
    model = Toy(ToyConfig())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    del saved["second.weight"], saved["second.bias"], saved["foreign.running_mean"]
    save_file(saved, tmp_path / "model.safetensors")

    other, info = Toy.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float64)
    assert other.first.weight is other.second.weight
    assert not other.first.weight.requires_grad
    assert info["missing_keys"] == {"second.bias", "foreign.running_mean"}
    assert other.initialized == {"second.bias", "constant"}
    assert other.constant.tolist() == [0, 1, 2]
    expected = {name: t.double() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    expected["second.bias"] = torch.full((2,), 0.25, dtype=torch.float64)
    assert_same(expected, other.state_dict())


# ------------------------------------------------------------------------------------------------------ save_pretrained


def test_files_and_values_that_are_written(tmp_path):
    model = tiny_model().to(memory_format=torch.channels_last)
    model.save_pretrained(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert_same(dict(model.state_dict()), load_file(folder / "model.safetensors"))
    values = json.loads((folder / "config.json").read_text())
    assert values["architectures"] == ["UperNetForSemanticSegmentation"]
    assert values["dtype"] == "float32"


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("variant", [None, "ema"])
def test_shards(tmp_path, safe, variant, poisoned_memory):
    model = tiny_model("swin")
    model.save_pretrained(tmp_path, max_shard_size="10KB", safe_serialization=safe, variant=variant)
    names = os.listdir(tmp_path)
    stem, extension = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    middle = f".{variant}" if variant else ""
    index = json.loads((tmp_path / f"{stem}.{extension}.index{middle}.json").read_text())
    shards = sorted(
        name for name in names if re.fullmatch(rf"{stem}{re.escape(middle)}-\d{{5}}-of-\d{{5}}.{extension}", name)
    )
    assert len(shards) > 2
    assert len(names) == len(shards) + 2
    assert index["weight_map"].keys() == model.state_dict().keys()
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    other, info = load(tmp_path, variant=variant, output_loading_info=True)
    assert info["missing_keys"] == set()
    assert_same(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_files_of_an_older_save_are_removed(tmp_path, safe):
    """Shards replace one file, one file replaces shards, and fewer replace more; other files stay."""
    others = {"notes.txt": b"x", "model-card.safetensors": b"y", "training_args.bin": b"z"}
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    tiny_model(seed=9).save_pretrained(tmp_path, variant="ema", max_shard_size="10KB")
    kept = folder_contents(tmp_path).keys()
    for seed, size in enumerate(["5GB", "2KB", "10KB", "5GB"]):
        model = tiny_model(seed=seed)
        model.save_pretrained(tmp_path, max_shard_size=size, safe_serialization=safe)
        added = folder_contents(tmp_path).keys() - kept
        assert len({name.split("-of-")[-1] for name in added if "index" not in name}) == 1, added
        assert len(added) == 1 if size == "5GB" else any("index" in name for name in added)
        assert_same(model.state_dict(), load(tmp_path).state_dict())
    assert {name: folder_contents(tmp_path)[name] for name in others} == others
    assert_same(tiny_model(seed=9).state_dict(), load(tmp_path, variant="ema").state_dict())


def test_a_pickle_is_not_hidden_by_older_safetensors(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="10KB")
    model = tiny_model(seed=1)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "pytorch_model.bin"]
    assert_same(model.state_dict(), load(tmp_path).state_dict())


def test_saving_over_the_folder_of_the_checkpoint(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    other = load(tmp_path)
    other.save_pretrained(tmp_path)
    assert_same(model.state_dict(), other.state_dict())
    assert_same(model.state_dict(), load(tmp_path).state_dict())


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("at", [0, 2], ids=["first file", "third file"])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch, safe, at):
    tiny_model().save_pretrained(tmp_path, max_shard_size="10KB", safe_serialization=safe)
    before = folder_contents(tmp_path)
    calls = []

    def full(tensors, path, **kwargs):
        path.write_bytes(b"half of it")
        calls.append(path)
        if len(calls) > at:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(fastuper.weights.writing, "save_file", full)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        tiny_model(seed=1, hidden_size=8).save_pretrained(tmp_path, max_shard_size="10KB", safe_serialization=safe)
    assert folder_contents(tmp_path) == before


@pytest.mark.skipif(resource is None, reason="needs a limit on the size of files")
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_the_error_of_a_real_full_disk(tmp_path, safe):
    """The writers raise their own errors here, without a mock."""
    name = "model.safetensors" if safe else "pytorch_model.bin"
    model = tiny_model()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / name} could not be written (is the disk")):
            model.save_pretrained(tmp_path, safe_serialization=safe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_permissions_are_those_of_a_new_file(tmp_path, safe):
    (tmp_path / "new_file").write_text("x")
    tiny_model().save_pretrained(tmp_path, safe_serialization=safe, max_shard_size="10KB")
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "model").write_text("precious")
    with pytest.raises(NotADirectoryError, match="model is a file; save_pretrained writes a folder"):
        tiny_model().save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "precious"


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_views_are_saved_without_their_base(tmp_path, safe):
    base = torch.arange(100_000.0)
    tensors = {"a": base[:4], "b": base[:4], "c": base[2:6], "d": base[:4].view(2, 2).t()}
    Toy(ToyConfig()).save_pretrained(tmp_path, state_dict=tensors, safe_serialization=safe)
    read, [file] = read_weights(tmp_path)
    assert_same(tensors, read)
    assert file.stat().st_size < 10_000


def test_saving_another_state_dict(tmp_path):
    model = tiny_model()
    state_dict = {name: t.half() if t.is_floating_point() else t for name, t in tiny_model(seed=1).state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state_dict)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"
    assert_same(state_dict, load_file(tmp_path / "model.safetensors"))
    assert_same(tiny_model().state_dict(), model.state_dict())


def test_tensors_without_values_are_refused(tmp_path):
    with torch.device("meta"):
        model = UperNetForSemanticSegmentation(tiny_config())
    with pytest.raises(CheckpointError, match=r"backbone\..* is on the meta device and has no values"):
        model.save_pretrained(tmp_path / "folder")
    with pytest.raises(CheckpointError, match="extra is not a tensor"):
        tiny_model().save_pretrained(tmp_path / "folder", state_dict={"extra": 1})
    assert not (tmp_path / "folder").exists()


def test_only_the_main_process_writes(tmp_path):
    tiny_model().save_pretrained(tmp_path / "folder", is_main_process=False, save_function=torch.save)
    assert not (tmp_path / "folder").exists()


def test_save_pretrained_refuses_unknown_arguments(tmp_path):
    with pytest.raises(TypeError, match="no argument safe_serialisation"):
        tiny_model().save_pretrained(tmp_path, safe_serialisation=True)
    with pytest.raises(TypeError, match="no argument repo_id, or only with push_to_hub=True"):
        tiny_model().save_pretrained(tmp_path, repo_id="someone/upernet")
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------- push_to_hub


@pytest.fixture
def hub(monkeypatch):
    """Return the calls to the Hub and the files uploaded to it."""
    asked = types.SimpleNamespace(calls=[], files={})

    def create_repo(self, repo_id, **kwargs):
        asked.calls.append(("create_repo", self.token, repo_id, kwargs))
        return types.SimpleNamespace(repo_id=f"someone/{repo_id}" if "/" not in repo_id else repo_id)

    def create_branch(self, repo_id, **kwargs):
        asked.calls.append(("create_branch", self.token, repo_id, kwargs))

    def upload_folder(self, *, folder_path, allow_patterns, **kwargs):
        asked.calls.append(("upload_folder", self.token, kwargs))
        asked.files = {name: (folder_path / name).read_bytes() for name in allow_patterns}
        return types.SimpleNamespace(commit_url="https://huggingface.co/someone/upernet/commit/abc")

    for function in (create_repo, create_branch, upload_folder):
        monkeypatch.setattr(HfApi, function.__name__, function)
    return asked


def test_push_to_hub(hub, tmp_path):
    model = tiny_model()
    url = model.push_to_hub("upernet", private=True, token="hf_secret", commit_message="Third try", revision="dev")
    assert url == "https://huggingface.co/someone/upernet/commit/abc"
    digits = "[0-9]" * 5
    assert hub.calls == [
        ("create_repo", "hf_secret", "upernet", {"private": True, "exist_ok": True}),
        ("create_branch", "hf_secret", "someone/upernet", {"branch": "dev", "exist_ok": True}),
        (
            "upload_folder",
            "hf_secret",
            {
                "repo_id": "someone/upernet",
                "delete_patterns": [
                    "model.safetensors",
                    f"model-{digits}-of-{digits}.safetensors",
                    "model.safetensors.index.json",
                ],
                "commit_message": "Third try",
                "commit_description": None,
                "revision": "dev",
                "create_pr": False,
            },
        ),
    ]
    assert hub.files.keys() == {"config.json", "model.safetensors"}
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    assert_same(model.state_dict(), load(tmp_path).state_dict())


def test_push_a_pull_request(hub):
    tiny_model().push_to_hub("org/upernet", create_pr=True, max_shard_size="10KB")
    assert [call[0] for call in hub.calls] == ["create_repo", "upload_folder"]
    assert hub.calls[-1][2]["create_pr"] is True
    assert "model.safetensors.index.json" in hub.files
    assert len(hub.files) > 3


@pytest.mark.parametrize("card", [None, "---\nlicense: mit\ntags: [old, drone]\n---\nA card."])
def test_the_model_card_gets_the_tags(hub, monkeypatch, tmp_path, card):
    def load_card(repo_id, token):
        assert (repo_id, token) == ("org/upernet", "hf_secret")
        if card is None:
            raise EntryNotFoundError("no README.md")
        return ModelCard(card)

    monkeypatch.setattr(ModelCard, "load", load_card)
    model = tiny_model()
    model.add_model_tags("drone")
    model.add_model_tags(["drone", "roads"])
    assert model.model_tags == ["drone", "roads"]
    assert type(model).model_tags is None
    model.push_to_hub("org/upernet", token="hf_secret", tags="night")
    written = ModelCard(hub.files["README.md"].decode())
    assert written.data.tags == [*(["old"] if card else []), "drone", "roads", "night"]
    if card:
        assert written.data.license == "mit"
        assert written.text.strip() == "A card."
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="org/upernet", token="hf_secret")
    assert ModelCard(hub.files["README.md"].decode()).data.tags[-1] == "roads"


def test_configurations_and_processors_are_pushed_too(hub, tmp_path):
    config, processor = tiny_config(), UperNetImageProcessor()
    for given, name in ((config, "config.json"), (processor, "preprocessor_config.json")):
        assert given.push_to_hub("org/upernet", token="hf_secret", private=True).endswith("/commit/abc")
        given.save_pretrained(tmp_path / "upernet-tiny")
        assert hub.files == {name: (tmp_path / "upernet-tiny" / name).read_bytes()}
        assert hub.calls[0] == ("create_repo", "hf_secret", "org/upernet", {"private": True, "exist_ok": True})
        assert hub.calls[-1][2]["delete_patterns"] == []
        given.save_pretrained(tmp_path / "upernet-tiny", push_to_hub=True, token="hf_secret")
        assert hub.calls[-2][2] == "upernet-tiny"
        hub.calls.clear()
        with pytest.raises(TypeError, match="no argument repo_id, or only with push_to_hub=True"):
            given.save_pretrained(tmp_path, repo_id="someone/upernet")
        with pytest.raises(NotADirectoryError, match="is a file; save_pretrained writes a folder"):
            given.save_pretrained(tmp_path / "upernet-tiny" / name)


def test_save_pretrained_can_push(hub, tmp_path):
    (tmp_path / "upernet-tiny").mkdir()
    (tmp_path / "upernet-tiny" / "optimizer.pt").write_bytes(b"large")
    tiny_model().save_pretrained(tmp_path / "upernet-tiny", push_to_hub=True, token="hf_secret")
    assert hub.calls[0][:3] == ("create_repo", "hf_secret", "upernet-tiny")
    assert hub.files == {n: c for n, c in folder_contents(tmp_path / "upernet-tiny").items() if n != "optimizer.pt"}
    tiny_model().save_pretrained(tmp_path / "upernet-tiny", push_to_hub=True, repo_id="org/name")
    assert hub.calls[2][2] == "org/name"

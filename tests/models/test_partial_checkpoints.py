"""Checkpoints that lack tensors of the model, or have other libraries' names: refused, unless the caller asks."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from fastuper import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation
from fastuper.weights.errors import CheckpointError
from tests.weights.common import assert_same


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a tiny model and the folder of its checkpoint."""
    torch.manual_seed(0)
    backbone = ConvNextConfig(
        hidden_sizes=[4, 6, 8, 10], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    model = UperNetForSemanticSegmentation(UperNetConfig(backbone, hidden_size=6, auxiliary_channels=4, num_labels=3))
    folder = tmp_path_factory.mktemp("checkpoint")
    model.eval().save_pretrained(folder)
    return model, folder


@pytest.fixture
def load(model, tmp_path):
    """Return a function that loads a state dict which it makes of the model's."""

    def loaded(make, **options):
        model[0].config.save_pretrained(tmp_path)
        torch.save(make(dict(model[0].state_dict())), tmp_path / "pytorch_model.bin")
        return UperNetForSemanticSegmentation.from_pretrained(tmp_path, **options)

    return loaded


def of_mmsegmentation(tensors):
    renamed = {}
    for name, tensor in tensors.items():
        for ours, theirs in (
            ("batch_norm", "bn"),
            ("classifier", "conv_seg"),
            ("backbone.encoder.stages", "backbone.stages"),
            (".layers.", "."),
            ("layer_scale_parameter", "gamma"),
        ):
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    return renamed


def only(*beginnings):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name.startswith(beginnings)}


def without(part):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def named(*names):
    return lambda _: {name: torch.zeros(1) for name in names}


def under(prefix):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


REFUSED = {
    "mmsegmentation": (of_mmsegmentation, r"10\d of the model's \d+ tensors are missing.*names are those of mmsegment"),
    "mmsegmentation, wrapped": (lambda t: {"state_dict": of_mmsegmentation(t), "meta": {}}, "dicts under state_dict"),
    "DistributedDataParallel": (under("module."), "all names begin with 'module.', of DistributedDataParallel"),
    "torch.compile": (under("_orig_mod."), "all names begin with '_orig_mod.', of torch.compile"),
    "both": (under("module._orig_mod."), "all names begin with 'module._orig_mod.', of Distributed"),
    "Lightning": (under("model."), "all names begin with 'model.', of the module around the model"),
    "smp": (named("encoder.conv1.weight", "decoder.psp.0.weight"), "those of segmentation_models_pytorch"),
    "timm": (named("stem.0.weight", "stages.0.blocks.0.conv_dw.weight"), "those of timm"),
    "Swin's authors": (
        named("patch_embed.proj.weight", "layers.0.blocks.0.attn.qkv.weight"),
        "those of Swin's authors",
    ),
    "Swin's authors, wrapped": (lambda t: {"model": t, "epoch": 3}, "dicts under model"),
    "ConvNeXt's authors": (named("downsample_layers.0.0.weight"), "those of ConvNeXt's authors"),
    "torchvision": (named("layer1.0.conv1.weight"), "those of torchvision or timm"),
    "an adapter": (named("base_model.model.backbone.a.lora_A.weight"), "a LoRA adapter of peft"),
    "with an adapter": (
        lambda t: {name.replace("pwconv1.", "pwconv1.base_layer."): tensor for name, tensor in t.items()},
        "8 of the model's .* a LoRA adapter of peft",
    ),
    "a backbone's own names": (
        lambda t: {name.removeprefix("backbone."): value for name, value in only("backbone.")(t).items()},
        r"put 'backbone\.' before each",
    ),
    "another model": (named("vit.cls_token"), "it belongs to another model"),
    "only the heads": (only("decode_head.", "auxiliary_head."), "holds only a part of a checkpoint"),
    "one tensor": (only("backbone.embeddings.layernorm.bias"), "holds only a part of a checkpoint"),
    "nothing": (lambda _: {}, "their names are none"),
    "one tensor too few": (without("stages.2.layers.0.dwconv.bias"), "1 of the model's .* only a part of a checkpoint"),
    "only the backbone": (only("backbone."), "pass ignore_mismatched_sizes=True to initialise them newly"),
    "no classifier": (without(".classifier."), "4 of the model's .* pass ignore_mismatched_sizes=True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(load, case):
    make, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        load(make)
    assert "pytorch_model.bin" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ["mmsegmentation", "only the heads", "one tensor"])
def test_new_heads_do_not_excuse_a_missing_backbone(load, case):
    with pytest.raises(CheckpointError, match="tensors are missing"):
        load(REFUSED[case][0], ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    ("make", "new"),
    [
        (only("backbone."), ("decode_head.", "auxiliary_head.")),
        (without(".classifier."), ("decode_head.classifier.", "auxiliary_head.classifier.")),
        (without("hidden_states_norms"), ("backbone.hidden_states_norms.",)),
    ],
    ids=["heads", "classifiers", "norms"],
)
def test_new_heads_on_request(model, load, caplog, make, new):
    loaded = load(make, ignore_mismatched_sizes=True).state_dict()
    assert all(tensor.isfinite().all() for tensor in loaded.values())
    kept = {name for name in loaded if not name.startswith(new)}
    assert_same({n: t for n, t in model[0].state_dict().items() if n in kept}, {n: loaded[n] for n in kept})
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "newly initialised" in record.getMessage()


@pytest.mark.parametrize("part", ["auxiliary_head", "num_batches_tracked"])
def test_what_inference_does_not_need_may_be_missing(model, load, part):
    loaded = load(without(part))
    pixels = torch.rand(1, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(loaded(pixels).logits, model[0](pixels).logits)


def test_a_caller_that_reads_the_missing_keys_gets_a_partial_load(load):
    _, info = load(of_mmsegmentation, output_loading_info=True)
    assert len(info["missing_keys"]) > 100
    assert "decode_head.conv_seg.weight" in info["unexpected_keys"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"_class_name": "UNet2DModel", "in_channels": 3}, "written by diffusers"),
        ({}, "has none of the values of UperNetConfig"),
        ({"model_type": "segformer"}, "describes a 'segformer' model; .* load it with the library that wrote it"),
        ({"model_type": ["upernet"]}, r"describes a \['upernet'\] model"),
    ],
)
def test_the_config_of_another_library(tmp_path, content, message):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("content", "library"),
    [
        ({"_model_class": "UPerNet", "encoder_name": "resnet34"}, "segmentation_models_pytorch"),
        ({"architecture": "resnet50"}, "timm"),
    ],
)
def test_the_config_of_a_library_that_can_be_converted(tmp_path, content, library):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=rf"config\.json has no model_type .*written by {library}; run `fastuper convert`"
    ):
        UperNetConfig.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has no checkpoint: no file that ends with"):
        UperNetForSemanticSegmentation.from_pretrained(tmp_path)


def test_a_backbone_outside_the_folder(model, tmp_path):
    folder = tmp_path / "folder"
    (folder / "inside").mkdir(parents=True)
    for place in (tmp_path, folder / "inside"):
        model[0].config.backbone_config.save_pretrained(place)
    config = {"model_type": "upernet", "backbone": str(tmp_path)}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json names the backbone .*, a folder outside its own"):
        UperNetConfig.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**config, "backbone": str(folder / "inside")}))
    assert UperNetConfig.from_pretrained(folder).backbone == str(folder / "inside")


def test_quantised_weights_are_refused(load):
    with pytest.raises(CheckpointError, match=r"classifier\.weight holds no float16, .* quantised weights are not"):
        load(lambda t: {**t, "decode_head.classifier.weight": t["decode_head.classifier.weight"].to(torch.int8)})


def test_shapes_are_compared_before_memory_is_allocated(model, monkeypatch):
    """The heads of the configuration have 2.7 GB, those of the file some kilobytes."""
    monkeypatch.setattr(torch, "empty_like", lambda *_, **__: pytest.fail("memory was allocated"))
    with pytest.raises(RuntimeError, match=r"bottleneck\.conv\.weight: .* in the checkpoint, \(4096, .* in the model"):
        UperNetForSemanticSegmentation.from_pretrained(model[1], hidden_size=4096)

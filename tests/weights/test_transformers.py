"""Names of tensors in Transformers' checkpoints: the Hub's, and those of version 5 in memory."""

from __future__ import annotations

import re

import pytest
import torch

from fastuper.models.backbones.registry import checkpoint_names
from fastuper.weights.errors import CheckpointError
from fastuper.weights.transformers import Names, backbone_state_dict, hub_name
from tests.models.test_pretrained import BACKBONES, assert_same, names_of_version_5, tiny_model

SWIN = checkpoint_names("swin")


def renamed(state_dict, names):
    """Return the tensors that the loader copies: {the Hub's name: value}."""
    return {ours: value for name, value in state_dict.items() if (ours := hub_name(name, names)) is not None}


def test_hub_names():
    block = "backbone.swin.encoder.layers.2.blocks.11."
    hub = "backbone.encoder.layers.2.blocks.11."
    pairs = {
        "backbone.swin.embeddings.norm.bias": "backbone.embeddings.norm.bias",
        block + "attention.q_proj.weight": hub + "attention.self.query.weight",
        block + "attention.k_proj.bias": hub + "attention.self.key.bias",
        block + "attention.v_proj.weight": hub + "attention.self.value.weight",
        block + "attention.o_proj.weight": hub + "attention.output.dense.weight",
        block + "attention.relative_position_bias.relative_position_bias_table": hub
        + "attention.self.relative_position_bias_table",
        block + "mlp.fc1.weight": hub + "intermediate.dense.weight",
        block + "mlp.fc2.bias": hub + "output.dense.bias",
        block + "layernorm_before.weight": hub + "layernorm_before.weight",
        "backbone.swin.encoder.layers.0.downsample.norm.bias": "backbone.encoder.layers.0.downsample.norm.bias",
        "backbone.hidden_states_norms.stage1.weight": "backbone.hidden_states_norms.stage1.weight",
        "decode_head.classifier.weight": "decode_head.classifier.weight",
    }
    state_dict = {theirs: object() for theirs in pairs}
    dropped = {"backbone.swin.layernorm.weight": None, "backbone.swin.layernorm.bias": None}
    result = renamed(state_dict | dropped, SWIN)
    assert result == {ours: state_dict[theirs] for theirs, ours in pairs.items()}
    assert list(result) == list(pairs.values())
    assert renamed(result, SWIN) == result


@pytest.mark.parametrize("backbone", BACKBONES)
def test_our_names_stay(backbone):
    state_dict = dict(tiny_model(backbone).state_dict())
    assert renamed(state_dict, checkpoint_names(backbone)) == state_dict


def test_names_of_one_family_are_not_anothers():
    names = names_of_version_5(tiny_model("swin").state_dict())
    for other in (checkpoint_names("convnext"), checkpoint_names("dinov2"), Names()):
        assert renamed(names, other) == names


def test_a_tensor_under_two_names():
    hub = "encoder.layers.0.blocks.0.output.dense.weight"
    with pytest.raises(CheckpointError, match=re.escape(f"{hub} is in the checkpoint twice")):
        backbone_state_dict({hub: 1, "swin.encoder.layers.0.blocks.0.mlp.fc2.weight": 2}, "swin", SWIN)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("prefix", ["model", "bare", "upernet"])
def test_backbone_state_dict(backbone, prefix):
    expected = dict(tiny_model(backbone).backbone.state_dict())
    prefix = {"model": f"{backbone}.", "bare": "", "upernet": "backbone."}[prefix]
    theirs = {prefix + name: tensor for name, tensor in expected.items()}
    for surplus in (
        f"{backbone}.layernorm.weight",
        "layernorm.bias",
        "classifier.weight",
        "classifier.1.bias",
        f"{backbone}.pooler.weight",
        f"{backbone}.embeddings.mask_token",
        "decode_head.classifier.weight",
    ):
        theirs[surplus] = torch.zeros(1)
    assert backbone_state_dict(theirs, backbone, checkpoint_names(backbone)) == expected


def test_backbone_state_dict_with_version_5_names():
    model = tiny_model("swin")
    theirs = names_of_version_5(model.state_dict())
    classifier = {name.removeprefix("backbone."): tensor for name, tensor in theirs.items()}
    result = backbone_state_dict(classifier, "swin", SWIN)
    expected = {n: t for n, t in model.backbone.state_dict().items() if not n.endswith("relative_position_index")}
    assert_same(expected, result)


def test_backbone_state_dict_of_something_else():
    with pytest.raises(
        CheckpointError, match=r"not weights of a swin model: their names are vit\.cls_token, fc\.weight$"
    ):
        backbone_state_dict({"vit.cls_token": 0, "fc.weight": 1}, "swin", SWIN)

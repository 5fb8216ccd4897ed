"""The outputs' own rules, without Transformers; tests/parity/test_returns.py compares them with Transformers'."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.utils import _pytree as pytree

from fastuper.models.outputs import BackboneOutput, SemanticSegmenterOutput


def test_a_field_set_to_none_is_left_out():
    output = SemanticSegmenterOutput(loss=torch.ones(1), logits=torch.zeros(1))
    output.loss = None
    assert list(output) == ["logits"]
    assert output.loss is None
    assert output[0] is output.logits


def test_a_mapping_with_an_unknown_name_is_refused():
    with pytest.raises(
        TypeError, match="SemanticSegmenterOutput has no field aux; its fields are loss, logits, hidden_states"
    ):
        SemanticSegmenterOutput({"logits": 1, "aux": 2})


@pytest.mark.parametrize("kind", [SemanticSegmenterOutput, BackboneOutput])
def test_an_empty_output(kind):
    output = kind()
    assert len(output) == 0
    assert output.to_tuple() == ()
    assert type(pickle.loads(pickle.dumps(output))) is kind
    assert pytree.tree_leaves(output) == []


@pytest.mark.parametrize("method", ["pop", "popitem", "setdefault", "update"])
def test_methods_of_dictionaries_that_are_refused(method):
    with pytest.raises(TypeError, match="SemanticSegmenterOutput"):
        getattr(SemanticSegmenterOutput(logits=1), method)("logits")


def test_deleting_a_key_is_refused():
    output = SemanticSegmenterOutput(logits=1)
    with pytest.raises(TypeError, match="set logits to None"):
        del output["logits"]


def test_flattening_keeps_each_value_at_its_key():
    """Also if a field was set after the fields that follow it."""
    output = SemanticSegmenterOutput(logits=torch.zeros(1))
    output.loss = torch.ones(1)
    again = pytree.tree_map(lambda x: x + 1, output)
    assert again.loss == 2
    assert again.logits == 1


@pytest.mark.parametrize("kind", [SemanticSegmenterOutput, BackboneOutput])
def test_names_of_outputs_in_serialised_trees(kind):
    """Exported programs hold these names: they must never change, wherever the classes lie."""
    name = {"SemanticSegmenterOutput": "fastuper.SemanticSegmenterOutput", "BackboneOutput": "fastuper.BackboneOutput"}
    text = pytree.treespec_dumps(pytree.tree_flatten(kind())[1])
    assert f'"{name[kind.__name__]}"' in text


def test_the_tree_of_an_output_is_serialised():
    spec = pytree.tree_flatten(BackboneOutput(feature_maps=(1, 2)))[1]
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec


def test_a_list_of_maps_is_not_taken_for_pairs():
    maps = [torch.zeros(1, 2, 3, 3), torch.zeros(1, 4, 2, 2)]
    assert BackboneOutput(maps).feature_maps is maps
    assert list(BackboneOutput({})) == []
    assert list(BackboneOutput([("feature_maps", maps)])) == ["feature_maps"]

"""Outputs without Transformers beside them: what their own rules are. tests/parity/test_returns.py has the rest."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.utils import _pytree as pytree

from fastuper.models.outputs import BackboneOutput, SemanticSegmenterOutput


def test_a_field_set_to_none_is_gone():
    output = SemanticSegmenterOutput(loss=torch.ones(1), logits=torch.zeros(1))
    output.loss = None
    assert list(output) == ["logits"]
    assert output.loss is None
    assert output[0] is output.logits


def test_an_unknown_name_in_a_mapping():
    with pytest.raises(TypeError, match="SemanticSegmenterOutput has no aux; it has loss, logits, hidden_states"):
        SemanticSegmenterOutput({"logits": 1, "aux": 2})


@pytest.mark.parametrize("kind", [SemanticSegmenterOutput, BackboneOutput])
def test_an_empty_one(kind):
    output = kind()
    assert len(output) == 0
    assert output.to_tuple() == ()
    assert type(pickle.loads(pickle.dumps(output))) is kind
    assert pytree.tree_leaves(output) == []


@pytest.mark.parametrize("method", ["pop", "popitem", "setdefault", "update"])
def test_what_a_dictionary_has_and_an_output_refuses(method):
    with pytest.raises(TypeError, match="SemanticSegmenterOutput"):
        getattr(SemanticSegmenterOutput(logits=1), method)("logits")


def test_deleting_is_refused():
    output = SemanticSegmenterOutput(logits=1)
    with pytest.raises(TypeError, match="set logits to None"):
        del output["logits"]


def test_flattening_keeps_each_value_at_its_key():
    """Also where a field was set after those that come behind it."""
    output = SemanticSegmenterOutput(logits=torch.zeros(1))
    output.loss = torch.ones(1)
    again = pytree.tree_map(lambda x: x + 1, output)
    assert again.loss == 2
    assert again.logits == 1


def test_serialising_the_tree_of_an_output():
    spec = pytree.tree_flatten(BackboneOutput(feature_maps=(1, 2)))[1]
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec


def test_a_list_of_maps_is_no_list_of_pairs():
    maps = [torch.zeros(1, 2, 3, 3), torch.zeros(1, 4, 2, 2)]
    assert BackboneOutput(maps).feature_maps is maps
    assert list(BackboneOutput({})) == []
    assert list(BackboneOutput([("feature_maps", maps)])) == ["feature_maps"]

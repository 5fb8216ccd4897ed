"""Outputs of `forward`: the same keys, tuples, dtypes, layouts and access as Transformers'."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from bench.numerics import error
from bench.pairs import VERSION_5, give_attentions, images, pair
from tests.parity.models import config, segmentation_labels

ASKED = {
    "logits": {},
    "hidden-states": {"output_hidden_states": True},
    "attentions": {"output_attentions": True},
    "everything": {"output_hidden_states": True, "output_attentions": True},
}


@pytest.mark.parametrize("with_labels", [False, True], ids=["no-labels", "labels"])
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("family", ["convnext", "swin"])
def test_the_keys_of_transformers(family, asked, with_labels):
    theirs, ours = pair(config(family))
    if family == "swin":
        give_attentions(theirs, exact=True)
    inputs: dict[str, Any] = {"pixel_values": images(1, 3, 64, 64), **ASKED[asked]}
    if with_labels:
        inputs["labels"] = segmentation_labels(1, 64, 64)
    with torch.no_grad():
        expected, output = theirs(**inputs), ours(**inputs)
    assert isinstance(output, type(expected))
    assert list(output.keys()) == list(expected.keys())
    assert len(output) == len(expected)
    for key in output:
        assert output[key] is getattr(output, key)
        assert type(output[key]) is type(expected[key]) or key == "hidden_states"
        if isinstance(output[key], tuple):
            assert len(output[key]) == len(expected[key])


@pytest.mark.parametrize("with_labels", [False, True], ids=["no-labels", "labels"])
@pytest.mark.parametrize("where", ["argument", "configuration"])
@pytest.mark.parametrize("hidden_states", [False, True], ids=["", "hidden-states"])
def test_tuples_in_place_of_outputs(where, with_labels, hidden_states):
    theirs, ours = pair(config("convnext"))
    inputs: dict[str, Any] = {"pixel_values": images(1, 3, 64, 64)}
    if with_labels:
        inputs["labels"] = segmentation_labels(1, 64, 64)
    if where == "argument":
        inputs |= {"return_dict": False, "output_hidden_states": hidden_states}
    else:
        for model in (theirs, ours):
            model.config.return_dict = False
            model.config.output_hidden_states = hidden_states
    with torch.no_grad():
        expected, output = theirs(**inputs), ours(**inputs)
    assert type(output) is tuple
    assert len(output) == len(expected) == 1 + with_labels + hidden_states
    for value, reference in zip(output[: 1 + with_labels], expected, strict=False):
        assert error(value, reference) < 1e-10
    if hidden_states:
        assert [x.shape for x in output[-1]] == [x.shape for x in expected[-1]]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("family", ["convnext", "swin", "resnet-basic"])
def test_gradients_of_hidden_states(family, training):
    """`retain_grad()` works: the hidden states are the tensors that are read on, as in Transformers."""
    gradients = []
    for model in pair(config(family), train=training):
        output = model(images(2, 3, 32, 32), output_hidden_states=True)
        for state in output.hidden_states:
            state.retain_grad()
        output.logits.square().sum().backward()
        gradients.append([state.grad for state in output.hidden_states])
    if family == "swin" and not VERSION_5:  # (B, L, C) in Transformers 4
        assert [g is None for g in gradients[1]] == [True, False, False, False, False]
        return
    assert [g is None for g in gradients[1]] == [g is None for g in gradients[0]]
    assert all(error(ours, theirs) < 1e-8 for theirs, ours in zip(*gradients, strict=True) if ours is not None)


def test_the_configurations_flags():
    ours = pair(config("swin"))[1]
    ours.config.output_hidden_states = ours.config.output_attentions = True
    pixels = images(1, 3, 64, 64)
    with torch.no_grad():
        assert list(ours(pixels).keys()) == ["logits", "hidden_states", "attentions"]
        assert list(ours(pixels, output_hidden_states=False, output_attentions=False).keys()) == ["logits"]
        ours.config.return_dict = False
        assert list(ours(pixels, return_dict=True).keys()) == ["logits", "hidden_states", "attentions"]


def everything() -> tuple[Any, Any]:
    """Return (Transformers' output, ours) with all fields."""
    theirs, ours = pair(config("swin"))
    give_attentions(theirs)
    pixels, labels = images(1, 3, 64, 64), segmentation_labels(1, 64, 64)
    with torch.no_grad():
        return tuple(
            model(pixels, labels=labels, output_hidden_states=True, output_attentions=True) for model in (theirs, ours)
        )


@pytest.fixture(scope="module")
def outputs() -> tuple[Any, Any]:
    return everything()


def same(a: Any, b: Any) -> bool:
    flat, other = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(flat) == len(other) and all(torch.equal(x, y) for x, y in zip(flat, other, strict=True))


def test_attribute_key_index_slice_and_iteration(outputs):
    for output in outputs:  # for Transformers' output too
        assert output.loss is output["loss"] is output[0]
        assert output.logits is output["logits"] is output[1]
        assert output[-1] is output.attentions
        assert output[:2] == (output.loss, output.logits)
        assert output[2:] == (output.hidden_states, output.attentions)
        assert output.to_tuple() == (output.loss, output.logits, output.hidden_states, output.attentions)
        assert list(output) == ["loss", "logits", "hidden_states", "attentions"]
        assert [key for key, _ in output.items()] == list(output)
        assert "logits" in output
        assert output.get("nothing") is None
        assert isinstance(output, dict)
        with pytest.raises(KeyError):
            output["nothing"]
        with pytest.raises(IndexError):
            output[4]
        with pytest.raises(AttributeError):
            _ = output.nothing


@pytest.mark.parametrize("which", [0, 1], ids=["transformers", "fastuper"])
class TestTheOutput:
    """Tests that hold for Transformers' output and for ours."""

    def test_setting(self, outputs, which):
        output = copy.copy(outputs[which])
        output.loss = torch.tensor(3.0)
        assert output["loss"] is output.loss is output[0]
        output["logits"] = torch.zeros(2)
        assert output.logits is output[1]
        assert output.logits.shape == (2,)

    def test_a_key_of_another(self, outputs, which):
        output = type(outputs[which])(logits=torch.zeros(1))
        output["target_size"] = [(3, 4)]
        assert list(output.keys()) == ["logits", "target_size"]
        assert output["target_size"] is output.target_size is output[1]
        if which == 1:  # Transformers' copies lose it
            output.loss = torch.ones(1)
            assert list(output.keys()) == ["logits", "target_size", "loss"]
            assert all(x is y for x, y in zip(output.values(), output.to_tuple(), strict=True))
            assert all(output[key] is value for key, value in zip(output, output.to_tuple(), strict=True))
            for again in (copy.deepcopy(output), pytree.tree_map(lambda x: x, output)):
                assert again.target_size == again["target_size"] == [(3, 4)]
                assert torch.equal(again.logits, output.logits)
                assert torch.equal(again.loss, output.loss)

    def test_none_is_left_out(self, outputs, which):
        output = type(outputs[which])(logits=torch.zeros(1))
        assert list(output.keys()) == ["logits"]
        assert output.loss is output.hidden_states is output.attentions is None
        assert len(output.to_tuple()) == 1

    @pytest.mark.parametrize("method", ["pop", "setdefault", "update", "__delitem__"])
    def test_refusing(self, outputs, which, method):
        with pytest.raises(Exception, match=r"pop|setdefault|update|delete|__delitem__"):
            getattr(outputs[which], method)("logits")

    def test_pickle(self, outputs, which):
        again = pickle.loads(pickle.dumps(outputs[which]))
        assert type(again) is type(outputs[which])
        assert list(again.keys()) == list(outputs[which].keys())
        assert again.logits is again["logits"]
        assert same(again, outputs[which])

    @pytest.mark.parametrize("make", [copy.copy, copy.deepcopy])
    def test_copy(self, outputs, which, make):
        again = make(outputs[which])
        assert type(again) is type(outputs[which])
        assert again.logits is again["logits"]
        assert same(again, outputs[which])

    @pytest.mark.parametrize(
        "rebuild",
        [
            lambda o: type(o)(dict(o)),  # accelerate
            lambda o: type(o)((k, o[k]) for k in o),  # torch.nn.parallel
            lambda o: type(o)(**o),
            lambda o: type(o)({k: o[k] for k in ("logits",)}),
        ],
        ids=["dictionary", "pairs", "keywords", "one-key"],
    )
    def test_rebuild(self, outputs, which, rebuild):
        again = rebuild(outputs[which])
        assert type(again) is type(outputs[which])
        assert again.logits is again["logits"] is outputs[which].logits
        assert len(again) in (1, 4)

    def test_pytree(self, outputs, which):
        output = outputs[which]
        leaves, spec = pytree.tree_flatten(output)
        assert len(leaves) == 2 + 5 + 4
        again = pytree.tree_unflatten(leaves, spec)
        assert type(again) is type(output)
        assert same(again, output)
        doubled = pytree.tree_map(lambda x: 2 * x, output)
        assert torch.equal(doubled.logits, 2 * output.logits)
        if which == 1 or VERSION_5:  # 4.56 registers no paths
            assert pytree.keystr(pytree.tree_flatten_with_path(output)[0][1][0]) == "['logits']"

    def test_gather(self, outputs, which):
        """The steps by which DataParallel gathers the outputs of its replicas."""
        output = outputs[which]
        pieces = [type(output)(logits=output.logits), type(output)(logits=output.logits + 1)]
        gathered = type(pieces[0])((k, torch.cat([piece[k] for piece in pieces])) for k in pieces[0])
        assert gathered.logits.shape == (2, 7, 64, 64)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@pytest.mark.parametrize("memory_format", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["convnext", "swin", "resnet-bottleneck"])
def test_dtypes_and_contiguous_logits(family, dtype, memory_format):
    theirs, ours = pair(config(family), dtype=DTYPES[dtype])
    layout = getattr(torch, memory_format)
    pixels = images(2, 3, 64, 96, dtype=DTYPES[dtype]).contiguous(memory_format=layout)
    labels = segmentation_labels(2, 64, 96)
    ours.to(memory_format=layout)
    with torch.no_grad():
        expected, output = theirs(pixels, labels=labels), ours(pixels, labels=labels)
    assert output.logits.dtype == expected.logits.dtype
    assert output.loss.dtype == expected.loss.dtype
    assert output.loss.shape == ()
    assert output.logits.is_contiguous()
    assert output.logits.view(-1).shape == (2 * 7 * 64 * 96,)
    assert all(labels.dtype == torch.int64 for labels in ours.segment(pixels))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("family", ["convnext", "swin", "resnet-bottleneck"])
def test_autocast(family, training):
    theirs, ours = pair(config(family), dtype=torch.float32, train=training)
    pixels, labels = images(8, 3, 64, 64, dtype=torch.float32), segmentation_labels(8, 64, 64)
    with torch.no_grad():
        truth = copy.deepcopy(theirs).double()(pixels.double(), labels=labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, output = theirs(pixels, labels=labels), ours(pixels, labels=labels)
        labels_of_ours = ours.segment(pixels)
    assert output.logits.dtype == expected.logits.dtype
    assert output.loss.dtype == expected.loss.dtype
    assert output.logits.is_contiguous()
    assert error(output.logits, truth.logits) <= 1.25 * error(expected.logits, truth.logits)
    assert labels_of_ours[0].shape == (64, 64)
    output.loss.backward()
    expected.loss.backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in ours.parameters())

"""The gradient of every parameter, and of the image, against Transformers'."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch

from bench.numerics import error, root_mean_square
from bench.pairs import images, named_gradients, pair
from fastuper_kernels.cpu import winograd
from tests.parity.models import FAMILIES, VARIATIONS, config, segmentation_labels

BOUND = 1e-10

HEADS: dict[str, dict[str, Any]] = {
    "default": {},
    "auxiliary-2-convs-concatenated": {"auxiliary_num_convs": 2, "auxiliary_concat_input": True},
    "no-auxiliary-head": {"use_auxiliary_head": False},
}


def backward(model: Any, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Return the gradients of the loss by parameter, and that of the images as "pixels"."""
    model.zero_grad(set_to_none=True)
    pixels = pixels.clone().requires_grad_()
    model(pixels, labels=labels).loss.backward()
    return {**named_gradients(model), "pixels": pixels.grad}


def check_equal(gradients: dict[str, torch.Tensor | None], expected: dict[str, torch.Tensor | None]) -> None:
    assert gradients.keys() == expected.keys()
    assert {name for name in gradients if gradients[name] is None} == {
        name for name in expected if expected[name] is None
    }
    largest = max(gradient.norm().item() for gradient in expected.values() if gradient is not None)
    for name, gradient in gradients.items():
        if gradient is None:
            continue
        # A key's bias shifts all scores of a query equally: its gradient is 0, and the computed value is rounding.
        if expected[name].norm() < 1e-13 * largest:
            assert gradient.norm() < 1e-12 * largest, name
        else:
            assert error(gradient, expected[name]) < BOUND, name


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_in_float64(family, head, training):
    theirs, ours = pair(config(family, **HEADS[head]), train=training)
    pixels, labels = images(2, 3, 76, 101), segmentation_labels(2, 76, 101)
    expected = backward(theirs, pixels, labels)
    assert any(gradient is not None for gradient in expected.values())
    check_equal(backward(ours, pixels, labels), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_backbone_without_gradients(family):
    theirs, ours = pair(config(family), train=True)
    theirs.backbone.requires_grad_(False)
    ours.backbone.requires_grad_(False)
    pixels, labels = images(2, 3, 64, 64), segmentation_labels(2, 64, 64)
    gradients, expected = backward(ours, pixels, labels), backward(theirs, pixels, labels)
    assert all(gradients[name] is None for name in gradients if name.startswith("backbone."))
    check_equal(gradients, expected)


def test_a_few_steps_of_an_optimizer_end_at_the_same_weights():
    theirs, ours = pair(config("swin"), train=True)
    for model in (theirs, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        for step in range(3):
            optimizer.zero_grad()
            model(images(2, 3, 64, 64, seed=step), labels=segmentation_labels(2, 64, 64, seed=step)).loss.backward()
            optimizer.step()
    with torch.no_grad():
        pixels = images(2, 3, 64, 64, seed=9)
        expected = theirs.eval()(pixels).logits
        assert (
            error(ours.eval()(pixels).logits, expected) < 1e-9
        )  # the first step's rounding, magnified by the later steps
        fresh = pair(config("swin"))[1](pixels).logits
        assert error(fresh, expected) > 1e-3


@pytest.mark.parametrize(
    ("family", "training", "hidden_size"),
    [
        *(
            pytest.param(
                family,
                training,
                24,
                marks=[pytest.mark.exhaustive] * (family in VARIATIONS and not training),
                id=f"{family}-{'train' if training else 'eval'}",
            )
            for family in FAMILIES
            for training in (False, True)
        ),
        pytest.param("convnext", True, 256, marks=pytest.mark.slow, id="wide enough for Winograd"),
    ],
)
def test_gradients_in_float32_are_as_accurate(family, training, hidden_size, record_property, monkeypatch):
    """The error of each parameter's gradient, root mean square over five seeds, divided by Transformers' error."""
    monkeypatch.setenv("FASTUPER_CHOICES", "conv3x3=winograd")
    by_winograd, original = [], winograd.weight_gradient
    monkeypatch.setattr(winograd, "weight_gradient", lambda *args: by_winograd.append(args) or original(*args))
    ours_errors: dict[str, list[float]] = {}
    their_errors: dict[str, list[list[float]]] = {}
    batch = 8 if training else 2  # in training, BatchNorm over two 1 x 1 cells would magnify rounding
    for seed in range(5):
        pixels = images(batch, 3, 64, 64, seed=seed, dtype=torch.float32)
        labels = segmentation_labels(batch, 64, 64, seed=seed)
        theirs, ours = pair(config(family, hidden_size=hidden_size), dtype=torch.float32, seed=seed, train=training)
        truth = backward(copy.deepcopy(theirs).double(), pixels.double(), labels)
        largest = max(gradient.norm() for gradient in truth.values())
        gradients = backward(ours, pixels, labels)
        contiguous = backward(theirs, pixels, labels)
        theirs.to(memory_format=torch.channels_last)
        last = backward(theirs, pixels.contiguous(memory_format=torch.channels_last), labels)
        for name, expected in truth.items():
            if expected.norm() < 1e-12 * largest:
                assert gradients[name].norm() < 1e-6 * largest, name
                continue
            ours_errors.setdefault(name, []).append(error(gradients[name], expected))
            their_errors.setdefault(name, []).append([error(contiguous[name], expected), error(last[name], expected)])
    assert bool(by_winograd) == (hidden_size >= 256)
    ratios = {
        name: root_mean_square(ours_errors[name])
        / max(root_mean_square(errors) for errors in zip(*their_errors[name], strict=True))
        for name in ours_errors
    }
    worst = max(ratios, key=ratios.__getitem__)
    median = statistics.median(ratios.values())
    record_property("median_ratio", median)
    record_property("largest_ratio", f"{ratios[worst]} at {worst}")
    assert median < 1.25
    # The ratio for one parameter comes from small samples: that of Transformers 4.56 to 5.23, or of eager to fused
    # attention, reaches 1.8.
    assert ratios[worst] < 3.0, worst

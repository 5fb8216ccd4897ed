"""`torch.jit.trace` with its own check: it traces with the caller's gradients, and again without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastuper import ConvNextConfig, ResNetConfig, SwinConfig, UperNetConfig, UperNetForSemanticSegmentation
from tests.models.heads import randomize

STAGES = ["stage1", "stage2", "stage3", "stage4"]
BACKBONES: dict[str, Any] = {
    "convnext": lambda: ConvNextConfig(hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], out_features=STAGES),
    "swin": lambda: SwinConfig(
        embed_dim=8,
        depths=[1, 2, 1, 1],
        num_heads=[1, 2, 2, 4],
        window_size=3,
        drop_path_rate=0.0,
        use_absolute_embeddings=True,
        image_size=32,
        out_features=STAGES,
    ),
    "resnet": lambda: ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], layer_type="basic", out_features=STAGES
    ),
}
exhaustive = pytest.mark.exhaustive


def network(family: str, training: bool = False, **values: Any) -> Any:
    config = UperNetConfig(BACKBONES[family](), hidden_size=8, auxiliary_channels=8, num_labels=4, **values)
    return randomize(UperNetForSemanticSegmentation(config)).train(training)


@pytest.mark.parametrize("gradients", [True, pytest.param(False, marks=exhaustive)], ids=["gradients", "no-gradients"])
@pytest.mark.parametrize("training", [False, pytest.param(True, marks=exhaustive)], ids=["eval", "train"])
@pytest.mark.parametrize("family", ["convnext", *(pytest.param(name, marks=exhaustive) for name in ("swin", "resnet"))])
def test_the_model(family, training, gradients):
    model = network(family, training, return_dict=False)
    pixels, others = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, pixels)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            (logits,), (expected,) = traced(others), model(others)
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    if gradients:
        gradient = torch.autograd.grad(traced(others)[0].square().sum(), [model.decode_head.classifier.weight])[0]
        truth = torch.autograd.grad(model(others)[0].square().sum(), [model.decode_head.classifier.weight])[0]
        torch.testing.assert_close(gradient, truth, rtol=1e-3, atol=1e-3)


@exhaustive
def test_outputs_that_are_dictionaries():
    model, pixels = network("convnext"), torch.randn(1, 3, 32, 32)
    traced = torch.jit.trace(model, pixels, strict=False)
    torch.testing.assert_close(traced(pixels)["logits"], model(pixels).logits, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing():
    """A traced graph recomputes nothing."""
    model, pixels = network("resnet", training=True, return_dict=False), torch.randn(2, 3, 32, 32)
    model.gradient_checkpointing_enable()
    traced = torch.jit.trace(model, pixels)
    torch.testing.assert_close(traced(pixels)[0], model(pixels)[0], rtol=1e-4, atol=1e-4)

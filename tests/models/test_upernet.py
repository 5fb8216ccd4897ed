"""The model's checks of its inputs, and models of one class."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

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

BACKBONES = {
    "convnext": lambda: ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]),
    "convnextv2": lambda: ConvNextV2Config(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]),
    "swin": lambda: SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], window_size=4),
    "swinv2": lambda: Swinv2Config(32, embed_dim=8, depths=[1, 2, 1, 1], num_heads=[1, 2, 2, 4], window_size=3),
    "resnet": lambda: ResNetConfig(embedding_size=16, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1]),
    "resnet_deep_stem": lambda: DeepStemResNetConfig([8, 8, 16], hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1]),
    "vit_pyramid": lambda: ViTPyramidConfig(
        image_size=64,
        patch_size=16,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
        neck_channels=12,
    ),
}


def model(kind: str = "convnext", **values: Any) -> UperNetForSemanticSegmentation:
    values = {"hidden_size": 16, "auxiliary_channels": 8, "num_labels": 5, **values}
    return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=BACKBONES[kind](), **values)).eval()


@pytest.fixture(scope="module")
def network() -> UperNetForSemanticSegmentation:
    return model()


PIXELS = {
    "none": (None, "pixel_values"),
    "no-batch": (torch.zeros(3, 32, 32), r"must be \(batch, channels, height, width\), got \(3, 32, 32\)"),
    "five-dimensions": (torch.zeros(1, 1, 3, 32, 32), r"got \(1, 1, 3, 32, 32\)"),
    "no-images": (torch.zeros(0, 3, 32, 32), r"got \(0, 3, 32, 32\)"),
    "no-rows": (torch.zeros(1, 3, 0, 32), r"got \(1, 3, 0, 32\)"),
    "bytes": (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "must be floating point and normalised, got torch.uint8"),
    "channels-at-the-end": (torch.zeros(1, 32, 32, 3), r"\(1, 32, 32, 3\) have 32 channels, the backbone's .* takes 3"),
    "grey": (torch.zeros(1, 1, 32, 32), "have 1 channels, the backbone's first convolution takes 3"),
}


@pytest.mark.parametrize("method", ["forward", "segment"])
@pytest.mark.parametrize("case", PIXELS)
def test_wrong_pixels_are_refused(network, case, method):
    pixels, message = PIXELS[case]
    with pytest.raises(ValueError, match=message):
        getattr(network, method)(pixels)


@pytest.mark.parametrize("kind", BACKBONES)
def test_every_backbone_checks_the_number_of_channels(kind):
    with pytest.raises(ValueError, match="have 4 channels, the backbone's first convolution takes 3"):
        model(kind)(torch.zeros(1, 4, 32, 32))


LABELS = {
    "another-batch": (torch.zeros(1, 32, 48).long(), r"\(batch, height, width\) for the 2 images, got \(1, 32, 48\)"),
    "with-channels": (torch.zeros(2, 1, 32, 48).long(), r"for the 2 images, got \(2, 1, 32, 48\)"),
    "empty": (torch.zeros(2, 0, 48).long(), r"for the 2 images, got \(2, 0, 48\)"),
    "fractions": (torch.zeros(2, 32, 48), "labels must be integers, got torch.float32"),
    "truth-values": (torch.zeros(2, 32, 48).bool(), "labels must be integers, got torch.bool"),
    "too-large": (torch.full((2, 32, 48), 5), r"from 0 to 4, or ignore_index=255; found 5"),
    "negative": (torch.full((2, 32, 48), -1), "found -1"),
}


@pytest.mark.parametrize("case", LABELS)
def test_wrong_labels_are_refused(network, case):
    labels, message = LABELS[case]
    with pytest.raises(ValueError, match=message):
        network(torch.zeros(2, 3, 32, 48), labels=labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_labels_of_any_integer_type(network, dtype):
    pixels, labels = torch.randn(1, 3, 32, 48), torch.arange(32 * 48).view(1, 32, 48) % 5
    expected = network(pixels, labels=labels).loss
    assert torch.equal(network(pixels, labels=labels.to(dtype)).loss, expected)


def test_swins_dropout_probabilities():
    values = {"embed_dim": 8, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4}
    backbone = SwinConfig(**values, hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.125)
    config = UperNetConfig(backbone, hidden_size=16, auxiliary_in_channels=32, auxiliary_channels=8, num_labels=5)
    swin = UperNetForSemanticSegmentation(config).backbone
    blocks = [block for layer in swin.encoder.layers for block in layer.blocks]
    assert swin.embeddings.dropout.p == 0.25
    assert [block.attention.self.dropout.p for block in blocks] == [0.125] * 5
    assert [block.attention.output.dropout.p for block in blocks] == [0.25] * 5
    assert [block.output.dropout.p for block in blocks] == [0.25] * 5


def test_one_class():
    one = model(num_labels=1)
    pixels, labels = torch.randn(2, 3, 32, 32), torch.arange(2 * 32 * 32).view(2, 32, 32) % 2
    labels[0, :5] = 255
    output = one(pixels, labels=labels)
    assert output.logits.shape == (2, 1, 32, 32)
    valid = labels != 255
    expected = F.binary_cross_entropy_with_logits(output.logits[:, 0][valid], labels[valid].float())
    torch.testing.assert_close(output.loss, expected + 0.4 * auxiliary_loss_of_one(one, pixels, labels))
    with torch.no_grad():  # for any weights, half of the pixels belong to the object
        one.decode_head.classifier.bias -= output.logits.median()
    output = one(pixels)
    expected = (output.logits[:, 0] > 0).long()
    assert 0 < expected.sum() < expected.numel()
    certain = output.logits[:, 0].abs() > 1e-6
    assert certain.float().mean() > 0.9
    assert torch.equal(torch.stack(one.segment(pixels))[certain], expected[certain])
    assert torch.equal(torch.stack(UperNetImageProcessor().post_process_semantic_segmentation(output)), expected)
    with pytest.raises(ValueError, match="from 0 to 1, or ignore_index=255; found 2"):
        one(pixels, labels=labels.clamp(max=254) + 1)


def auxiliary_loss_of_one(one, pixels, labels):
    logits = one.auxiliary_head(one.backbone(pixels).feature_maps)
    logits = F.interpolate(logits, size=labels.shape[1:], mode="bilinear")[:, 0]
    return F.binary_cross_entropy_with_logits(logits[labels != 255], labels[labels != 255].float())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_segment_refuses_pixels_that_are_not_finite(network, value):
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[0, 1, 31, 0] = value
    with pytest.raises(ValueError, match=r"logits are not finite.*: pixel_values contain NaN or infinity"):
        network.segment(pixels)


def test_segment_refuses_weights_that_are_not_finite(network):
    broken = copy.deepcopy(network)
    torch.nn.init.constant_(broken.decode_head.classifier.bias, float("nan"))
    with pytest.raises(ValueError, match=r"not finite.*: weights are not finite, or they overflow torch\.float32"):
        broken.segment(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([(8, 8)], "1 target_sizes for a batch of 2 images; give one an image"),
        ([], "0 target_sizes for a batch of 2 images"),
        ([(8, 8)] * 3, "3 target_sizes for a batch of 2 images"),
        ((8, 8), "target_sizes must be a .height, width. for each image"),
        ([(8, 8, 3)] * 2, "target_sizes must be a .height, width. for each image"),
        ([(8, 8), (0, 8)], r"target_sizes must be .*integers from 1, got \[\(8, 8\), \(0, 8\)\]"),
        ([(8, 8), (8, -1)], r"target_sizes must be .*integers from 1, got"),
        ([(8, 8), (5.7, 8)], r"target_sizes must be .*integers from 1, got \[\(8, 8\), \(5.7, 8\)\]"),
        (torch.tensor([[8.0, 8.0]] * 2), r"target_sizes must be .*integers from 1, got"),
        ([("8", "8")] * 2, r"target_sizes must be .*integers from 1, got"),
        (8, r"target_sizes must be .*integers from 1, got 8"),
    ],
    ids=["one", "none", "three", "one-pair", "triples", "empty", "negative", "fraction", "floats", "text", "number"],
)
def test_wrong_target_sizes_are_refused(network, sizes, message, monkeypatch):
    monkeypatch.setattr(network.backbone, "forward", lambda *_, **__: pytest.fail("the network has run"))
    with pytest.raises(ValueError, match=message):
        network.segment(torch.zeros(2, 3, 32, 32), target_sizes=sizes)


@pytest.mark.parametrize(
    "sizes",
    [
        [[8, 9], [10, 11]],
        torch.tensor([[8, 9], [10, 11]]),
        np.array([[8, 9], [10, 11]]),
        [(torch.tensor(8), np.int32(9)), (np.uint8(10), 11)],
    ],
    ids=["lists", "tensor", "array", "mixed"],
)
def test_target_sizes_of_any_integers(network, sizes):
    labels = network.segment(torch.zeros(2, 3, 32, 32), target_sizes=sizes)
    assert [tuple(x.shape) for x in labels] == [(8, 9), (10, 11)]


def test_a_refused_call_does_not_change_the_model(network):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.train()
    with pytest.raises(ValueError, match="labels"):
        network(torch.zeros(2, 3, 32, 48), labels=torch.full((2, 32, 48), 9))
    network.eval()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())

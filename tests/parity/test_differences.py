"""The differences that docs/differences.md lists, each beside Transformers' behaviour."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import fastuper
from bench.numerics import error
from bench.pairs import STAGES, VERSION_5, images, pair
from fastuper.models import norms as norm_functions
from tests.parity.models import BACKBONES, config, segmentation_labels

BOUND = 1e-10


@pytest.mark.parametrize("family", ["ConvNext", "Swin", "ResNet"])
@pytest.mark.parametrize("library", [transformers, fastuper], ids=["their-config", "our-config"])
def test_a_backbone_that_names_no_stages_returns_all(family, library):
    key = {"ConvNext": "convnext", "Swin": "swin", "ResNet": "resnet-basic"}[family]
    values = copy.deepcopy(BACKBONES[key][1])
    given = library.UperNetConfig(backbone_config=getattr(library, f"{family}Config")(**values), hidden_size=16)
    if library is transformers:
        with pytest.raises(IndexError):
            transformers.UperNetForSemanticSegmentation(copy.deepcopy(given))
    ours = fastuper.UperNetForSemanticSegmentation(given).eval()
    assert ours.config.backbone_config.out_features == STAGES
    assert len(ours.decode_head.lateral_convs) == 3
    assert ours(images(1, 3, 64, 64, dtype=torch.float32)).logits.shape == (1, 2, 64, 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ConvNextConfig", pytest.param("ConvNextV2Config", marks=pytest.mark.exhaustive)])
def test_the_default_convnext_configuration(name):
    given = transformers.UperNetConfig(backbone_config=getattr(transformers, name)(out_features=STAGES))
    if VERSION_5:
        with pytest.raises(TypeError):
            transformers.UperNetForSemanticSegmentation(copy.deepcopy(given))
    ours = fastuper.UperNetForSemanticSegmentation(given).eval()
    with torch.no_grad():
        assert ours(images(1, 3, 40, 40, dtype=torch.float32)).logits.shape == (1, 2, 40, 40)


def pad_before_small_convolutions(model: nn.Module) -> None:
    """Pad maps that are smaller than a kernel with zeros, so that Transformers' ConvNeXt takes small images."""

    def pad(module: nn.Conv2d, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        height, width = args[0].shape[2:]
        return (F.pad(args[0], (0, max(module.kernel_size[1] - width, 0), 0, max(module.kernel_size[0] - height, 0))),)

    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.padding == (0, 0) and module.kernel_size != (1, 1):
            module.register_forward_pre_hook(pad)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 50), (16, 16), (31, 31), (100, 7)], ids=str)
@pytest.mark.parametrize("family", ["convnext", "convnextv2"])
def test_a_convnext_takes_small_images(family, height, width):
    theirs, ours = pair(config(family))
    pixels, labels = images(2, 3, height, width), segmentation_labels(2, height, width)
    labels[:, 0, 0] = 1
    with pytest.raises(RuntimeError):
        theirs(pixels)
    pad_before_small_convolutions(theirs)
    with torch.no_grad():
        expected, output = theirs(pixels, labels=labels), ours(pixels, labels=labels)
    assert error(output.logits, expected.logits) < BOUND
    assert error(output.loss, expected.loss) < BOUND


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 64), (40, 100), (61, 33)], ids=str)
def test_absolute_position_embeddings_are_resampled(height, width):
    given = config("swin", {"use_absolute_embeddings": True, "image_size": 80})
    with torch.no_grad():
        ours = fastuper.UperNetForSemanticSegmentation(given).double().eval()
        embeddings = ours.backbone.embeddings
        embeddings.position_embeddings.uniform_(-1, 1)
        pixels = images(2, 3, height, width)
        patches = embeddings.norm(embeddings.patch_embeddings(pixels))
        table = embeddings.position_embeddings.view(1, 20, 20, -1).permute(0, 3, 1, 2)
        added = F.interpolate(table, (-(-height // 4), -(-width // 4)), mode="bicubic", align_corners=False)
        assert error(embeddings(pixels), patches + added.permute(0, 2, 3, 1)) < BOUND
        if VERSION_5:
            theirs = pair(given)[0]
            with pytest.raises(RuntimeError):
                theirs(pixels)
            reference = theirs.backbone.swin.embeddings
            reference.position_embeddings.copy_(embeddings.position_embeddings)
            if height % 4 == width % 4 == 0:  # Transformers does not count padded patches
                grid = reference.interpolate_pos_encoding(patches.flatten(1, 2), height, width)
                assert error(embeddings.positions(height // 4, width // 4).reshape(grid.shape), grid) < BOUND
        assert ours(pixels).logits.shape == (2, 7, height, width)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_auxiliary_head_runs_only_for_a_loss_or_a_hook(training, monkeypatch):
    theirs, ours = pair(config("convnext"), train=training)
    pixels, labels = images(2, 3, 64, 64), segmentation_labels(2, 64, 64)
    calls, hooks = [], []
    for model in (theirs, ours):
        kind = type(model.auxiliary_head)
        monkeypatch.setattr(kind, "forward", lambda self, *args, run=kind.forward: calls.append(1) or run(self, *args))

    def count(model: Any, **inputs: Any) -> int:
        calls.clear()
        model(**inputs)
        return len(calls)

    assert count(theirs, pixel_values=pixels) == 1
    assert count(ours, pixel_values=pixels) == 0
    assert count(ours, pixel_values=pixels, labels=labels) == 1
    ours.auxiliary_head.convs.register_forward_hook(lambda *_: hooks.append(1))
    assert count(ours, pixel_values=pixels) == len(hooks) == 1


def test_hidden_states_are_maps():
    ours = pair(config("swin"))[1]
    with torch.no_grad():
        states = ours(images(1, 3, 76, 101), output_hidden_states=True).hidden_states
    assert [tuple(x.shape) for x in states] == [
        (1, 16, 19, 26),
        (1, 16, 19, 26),
        (1, 32, 10, 13),
        (1, 64, 5, 7),
        (1, 128, 3, 4),
    ]
    assert all(x.is_contiguous() for x in states)


def test_attentions_are_returned_with_output_attentions():
    theirs, ours = pair(config("swin"))
    pixels = images(1, 3, 64, 64)
    with torch.no_grad():
        if VERSION_5:
            assert not theirs(pixels, output_attentions=True).attentions
        assert len(ours(pixels, output_attentions=True).attentions) == 4
        assert len(theirs(pixels, output_attentions=True, return_dict=False)) == 1
        logits, attentions = ours(pixels, output_attentions=True, return_dict=False)
    assert logits.shape == (1, 7, 64, 64)
    assert len(attentions) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auxiliary_in_channels": 39}, "auxiliary_in_channels=39, but feature map 3 has 40 channels"),
        ({"auxiliary_num_convs": 0}, "auxiliary_channels must be the 40 channels of the feature map, got 20"),
    ],
    ids=["in-channels", "no-convs"],
)
def test_an_auxiliary_head_that_does_not_fit_is_not_built(options, message):
    given = config("convnext", **options)
    theirs = transformers.UperNetForSemanticSegmentation(copy.deepcopy(given)).eval()
    with pytest.raises(RuntimeError):
        theirs(images(1, 3, 64, 64, dtype=torch.float32))
    with pytest.raises(ValueError, match=message):
        fastuper.UperNetForSemanticSegmentation(given)


def test_a_loss_of_ignored_pixels_is_zero_and_nan_in_transformers():
    theirs, ours = pair(config("convnext"))
    pixels, labels = images(1, 3, 64, 64), torch.full((1, 64, 64), 255)
    assert theirs(pixels, labels=labels).loss.isnan()
    loss = ours(pixels, labels=labels).loss
    assert loss == 0
    loss.backward()
    gradients = [parameter.grad for parameter in ours.parameters() if parameter.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)


def test_labels_of_another_size():
    """The logits are resampled to the labels' size; Transformers' loss raises an error."""
    theirs, ours = pair(config("swin"))
    pixels, labels = images(2, 3, 64, 64), segmentation_labels(2, 40, 52)
    with pytest.raises((ValueError, RuntimeError)):
        theirs(pixels, labels=labels)
    maps = ours.backbone(pixels).feature_maps
    expected = [
        F.cross_entropy(F.interpolate(head(maps), size=(40, 52), mode="bilinear"), labels, ignore_index=255)
        for head in (ours.decode_head, ours.auxiliary_head)
    ]
    torch.testing.assert_close(ours(pixels, labels=labels).loss, expected[0] + 0.4 * expected[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("family", ["convnext", "resnet-basic"])
def test_training_on_one_image(family, caplog):
    """BatchNorm over a single cell uses its running statistics there, and logs that once."""
    theirs, ours = pair(config(family), train=True)
    pixels, labels = images(1, 3, 64, 64), segmentation_labels(1, 64, 64)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        theirs(pixels, labels=labels)
    norm_functions.warn_once.cache_clear()
    norms = {name: copy.deepcopy(norm) for name, norm in ours.named_modules() if isinstance(norm, nn.BatchNorm2d)}
    for _ in range(2):
        ours(pixels, labels=labels).loss.backward()
    assert len([record for record in caplog.records if "BatchNorm over a single cell" in record.message]) == 1
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in ours.parameters())
    for name, norm in ours.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.training
            alone = name == "decode_head.psp_modules.0.1.batch_norm"
            assert (norm.num_batches_tracked == norms[name].num_batches_tracked) == alone
            assert torch.equal(norm.running_mean, norms[name].running_mean) == alone
    # The branch has the same result as in evaluation.
    branch, x = ours.decode_head.psp_modules[0], images(1, 56, 2, 2)
    trained = branch(x)
    torch.testing.assert_close(trained, branch.eval()(x))


def test_synchronized_norms_are_called():
    """Other ranks may hold more cells than this rank, and wait for it."""
    norm = nn.SyncBatchNorm(3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        norm_functions.batch_norm(norm, torch.randn(1, 3, 1, 1))


def test_a_hooked_norm_is_called_for_a_single_cell():
    norm, seen = nn.BatchNorm2d(3), []
    norm.register_forward_hook(lambda module, *_: seen.append(module.training))
    norm_functions.batch_norm(norm, torch.randn(1, 3, 1, 1))
    assert seen == [False]
    assert norm.training

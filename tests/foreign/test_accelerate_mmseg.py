"""`accelerate` on mmsegmentation's EncoderDecoder with UPerHead: the same function as before."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from mmcv.cnn import ConvModule
from mmengine.config import ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import nn

import fastuper
from bench.numerics import error
from fastuper.patch.acceleration import accelerate, explain
from tests.foreign.makers import build_mmseg, settings_of
from tests.foreign.test_conversions import CONVNEXT, CONVNEXT_CHANNELS, RESNET
from tests.models.heads import randomize
from tests.patch.sameness import CHECKS, EXACT, Kind, check_explain, equal, pair

BASIC = {**RESNET, "depth": 18}
CHANNELS = (4, 8, 16, 32)


def samples(labels: torch.Tensor) -> list[SegDataSample]:
    """Return mmsegmentation's samples of labels (B, H, W)."""
    made = []
    for label in labels:
        sample = SegDataSample(metainfo={"img_shape": label.shape, "ori_shape": label.shape, "pad_shape": label.shape})
        sample.gt_sem_seg = PixelData(data=label[None])
        made.append(sample)
    return made


def loss(model: Any, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    losses = model(images, samples(labels), mode="loss")
    return sum(value for name, value in losses.items() if "loss" in name)


def kind(
    backbone: Mapping[str, Any] = BASIC,
    channels: tuple[int, ...] = CHANNELS,
    strips: bool = True,
    revert: bool = False,
    **values: Any,
) -> Kind:
    settings = settings_of(backbone, channels, **{"auxiliary": {"concat_input": True}, **values})

    def make() -> nn.Module:
        network = build_mmseg(settings)
        return revert_sync_batchnorm(network) if revert else network

    return Kind(make, lambda model, images: model(images, mode="tensor"), "decode_head", loss, (67, 93), strips)


KINDS = {
    "ResNet, SyncBN": kind(),
    "ResNet, BN": kind(norm="BN"),
    "ConvNeXt, reverted SyncBN": kind(CONVNEXT, CONVNEXT_CHANNELS, revert=True),
    "align_corners": kind(norm="BN", align_corners=True, strips=False),
    "GroupNorm": kind(norm="BN", head={"norm_cfg": {"type": "GN", "num_groups": 2}}, strips=False),
    "LeakyReLU": kind(norm="BN", head={"act_cfg": {"type": "LeakyReLU"}}, strips=False),
    "three levels, no dropout": kind(
        norm="BN", head={"in_index": [0, 2, 3], "in_channels": [4, 16, 32], "dropout_ratio": 0}
    ),
    "two pooling scales": kind(norm="BN", head={"pool_scales": (1, 4)}),
    "several auxiliary heads": kind(norm="BN", auxiliary=[{}, {"in_index": 1, "num_convs": 2, "dilation": 2}]),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", KINDS)
def test_same(name: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "LeakyReLU" and check == "replaced modules":
        pytest.skip("it replaces ReLUs")
    CHECKS[check](KINDS[name], monkeypatch)


def test_explain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    check_explain(KINDS["ResNet, BN"], monkeypatch, capsys)
    explain(accelerate(kind(head={"norm_cfg": None}).model()))
    assert "it has no norm" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("mode", ["whole", "slide"])
@pytest.mark.parametrize("name", ["ResNet, SyncBN", "align_corners"])
def test_predict(mode: str, name: str) -> None:
    ours, theirs = pair(KINDS[name])
    images = KINDS[name].images(dtype=torch.float64)
    given = samples(KINDS[name].labels())
    results = []
    for model in (ours, theirs):
        model.test_cfg = ConfigDict(mode=mode, crop_size=(48, 48), stride=(32, 32))
        with torch.no_grad():
            results.append(model(images, copy.deepcopy(given), mode="predict"))
    for result, expected in zip(*results, strict=True):
        assert error(result.seg_logits.data, expected.seg_logits.data) < EXACT
        assert torch.equal(result.pred_sem_seg.data, expected.pred_sem_seg.data)


BLOCKS: dict[str, dict[str, Any]] = {
    "usual": {},
    "another order": {"order": ("act", "norm", "conv")},
    "norm first": {"order": ("norm", "conv", "act")},
    "reflected": {"padding_mode": "reflect"},
    "circular": {"padding_mode": "circular"},
    "spectral norm": {"with_spectral_norm": True},
    "no norm": {"norm_cfg": None},
    "no norm, no bias": {"norm_cfg": None, "bias": False},
    "no activation": {"act_cfg": None},
    "a bias": {"bias": True},
    "fused by mmcv": {"efficient_conv_bn_eval": True},
    "stride": {"stride": 2},
    "padding": {"padding": 0},
    "groups": {"groups": 2},
    "another convolution": {"conv_cfg": {"type": "Conv"}},
    "GELU": {"act_cfg": {"type": "GELU"}},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_mmcv(name: str, training: bool) -> None:
    """Every option of a ConvModule in the place of the bottleneck; both leave out the norm or activation if asked."""
    ours = KINDS["ResNet, BN"].model(dtype=torch.float64)
    values = {"padding": 1, "norm_cfg": {"type": "BN"}, **BLOCKS[name]}
    block = randomize(ConvModule(8, 8, 3, **values)).double().train(training)
    ours.decode_head.bottleneck = copy.deepcopy(block)
    accelerate(ours)
    fast = ours.decode_head.bottleneck
    assert type(fast) is not ConvModule
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert error(fast(x.clone()), block(x.clone())) < EXACT
            assert error(fast(x.clone(), activate=False), block(x.clone(), activate=False)) < EXACT
            assert error(fast(x.clone(), norm=False), block(x.clone(), norm=False)) < EXACT
    for key, value in block.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[key], value)


def test_other_heads_are_refused() -> None:
    settings = settings_of(BASIC, CHANNELS)
    head = {"type": "FCNHead", "in_channels": 32, "in_index": 3, "num_classes": 5, "channels": 8}
    model = build_mmseg({**settings, "decode_head": head})
    with pytest.raises(ValueError, match="its decode_head is a FCNHead, and holds no UPerHead") as caught:
        accelerate(model)
    assert "\n" not in str(caught.value)
    assert not any(type(part).__module__.startswith("fastuper") for part in model.modules())


def test_traced_exported_compiled() -> None:
    ours, theirs = pair(KINDS["ResNet, BN"])
    images = KINDS["ResNet, BN"].images(dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(images, mode="tensor")
        assert error(torch.jit.trace(ours, images)(images), expected) < EXACT
        program = torch.export.export(ours, (images,), strict=False)
        assert error(program.module()(images), expected) < EXACT
        compiled: Any = torch.compile(ours, backend="aot_eager")
        assert error(compiled(images), expected) < EXACT


def test_a_subclass_of_the_head_keeps_its_own_forward() -> None:
    """A user's head: its convolutions are accelerated, its forward is its own."""
    ours, theirs = KINDS["ResNet, BN"].model(dtype=torch.float64), KINDS["ResNet, BN"].model(dtype=torch.float64)

    class Doubled(type(theirs.decode_head)):  # type: ignore[misc]
        def forward(self, inputs: Any) -> torch.Tensor:
            return 2 * super().forward(inputs)

    for model in (ours, theirs):
        model.decode_head.__class__ = Doubled
    fastuper.accelerate(ours)
    assert type(ours.decode_head) is Doubled
    equal(KINDS["ResNet, BN"], ours, theirs)

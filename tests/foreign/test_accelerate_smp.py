"""`accelerate` on the UPerNet of segmentation_models_pytorch: the same function as before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch.nn import functional as F

import fastuper
from bench.numerics import error
from tests.patch.sameness import CHECKS, EXACT, Kind, check_explain, equal, pair

SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24)}
CONVNEXT = {"encoder_name": "tu-convnext_atto", "conv_mlp": False, **SMALL}


def made(**values: Any) -> Callable[[], nn.Module]:
    values = {"encoder_name": "resnet18", "encoder_weights": None, "decoder_channels": 8, "classes": 5, **values}
    return lambda: smp.UPerNet(**values)


def masks(model: Any, images: torch.Tensor) -> torch.Tensor:
    output = model(images)
    return output[0] if isinstance(output, tuple) else output


def loss(model: Any, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    output = model(images)
    if isinstance(output, tuple):
        return F.cross_entropy(output[0], labels) + output[1].square().mean()
    return F.cross_entropy(output, labels)


def kind(size: tuple[int, int] = (64, 96), strips: bool = True, **values: Any) -> Kind:
    return Kind(made(**values), masks, "decoder", loss, size, strips)


KINDS = {
    "ResNet": kind(),
    "three levels, a classification head": kind(encoder_depth=4, aux_params={"classes": 3, "dropout": None}),
    "two levels, sigmoid": kind(encoder_depth=3, activation="sigmoid"),
    "no norm": kind(decoder_use_norm=False, strips=False),
    "no resampling": Kind(
        made(upsampling=1),
        masks,
        "decoder",
        lambda model, images, labels: F.cross_entropy(model(images), labels[:, ::4, ::4]),
        (64, 96),
    ),
    "ConvNeXt": kind(**CONVNEXT),
    "ConvNeXt, stochastic depth": kind(**CONVNEXT, drop_path_rate=0.3),
    "ConvNeXt, 1x1 convolutions": kind(encoder_name="tu-convnext_atto", **SMALL),
    "ConvNeXt V2": kind(encoder_name="tu-convnextv2_atto", **SMALL),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", KINDS)
def test_same(name: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "no norm" and check == "replaced modules":
        pytest.skip("it replaces norms and activations of the fused blocks")
    CHECKS[check](KINDS[name], monkeypatch)


def test_explain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    check_explain(KINDS["ConvNeXt"], monkeypatch, capsys)


@pytest.mark.parametrize("part", ["segmentation_head", "segmentation_head.0", "segmentation_head.1", "encoder"])
def test_hooks_beside_the_decoder(part: str) -> None:
    """A hooked classifier is called on the fused levels, a hooked head and encoder as before."""
    ours, theirs = pair(KINDS["ConvNeXt"])
    seen: list[list[torch.Tensor]] = []
    images = KINDS["ConvNeXt"].images(dtype=torch.float64)
    for model in (ours, theirs):
        seen.append([])
        model.get_submodule(part).register_forward_hook(lambda *args, seen=seen[-1]: seen.append(args[2]))
        with torch.no_grad():
            model(images)
    assert len(seen[0]) == len(seen[1]) == 1
    result, expected = (x[0][-1] if isinstance(x[0], list) else x[0] for x in seen)
    assert error(result, expected) < EXACT
    equal(KINDS["ConvNeXt"], ours, theirs)


@pytest.mark.parametrize(
    "name", ["conv_dw", "norm", "mlp", "mlp.fc1", "mlp.act", "mlp.drop1", "mlp.fc2", "drop_path", "shortcut"]
)
def test_hooks_in_a_convnext_block(name: str) -> None:
    ours, theirs = pair(KINDS["ConvNeXt"])
    seen: list[list[torch.Tensor]] = []
    for model in (ours, theirs):
        seen.append([])
        part = model.encoder.model.stages_2.blocks[1].get_submodule(name)
        part.register_forward_hook(lambda *args, seen=seen[-1]: seen.append(args[2]))
        equal(KINDS["ConvNeXt"], model, theirs)
    assert len(seen[0]) == 1
    assert error(seen[0][0], seen[1][-1]) < EXACT


def test_another_size_is_refused_as_before() -> None:
    ours, theirs = pair(KINDS["ResNet"])
    messages = []
    for model in (ours, theirs):
        with pytest.raises(RuntimeError) as caught:
            model(torch.zeros(1, 3, 65, 96, dtype=torch.float64))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_saves_as_before(tmp_path: Path) -> None:
    ours, theirs = pair(KINDS["ResNet"])
    ours.save_pretrained(tmp_path)
    loaded = smp.from_pretrained(tmp_path).double().eval()
    assert type(loaded) is smp.UPerNet
    equal(KINDS["ResNet"], fastuper.accelerate(loaded), theirs)


def test_predict_and_frozen_encoder() -> None:
    ours, theirs = pair(KINDS["ResNet"])
    images = KINDS["ResNet"].images(dtype=torch.float64)
    for model in (ours, theirs):
        model.freeze_encoder()
        model.train()
        model(images)
    equal(KINDS["ResNet"], ours, theirs)
    assert error(ours.predict(images), theirs.predict(images)) < EXACT


def test_other_networks_are_not_known() -> None:
    with pytest.raises(ValueError, match=r"Unet is no model that .* segmentation_models_pytorch's UPerNet"):
        fastuper.accelerate(smp.Unet("resnet18", encoder_weights=None))


@pytest.mark.parametrize("name", ["ResNet", "ConvNeXt"])
def test_traced_exported_compiled(name: str) -> None:
    ours, theirs = pair(KINDS[name])
    images = KINDS[name].images(dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(images)
        assert error(torch.jit.trace(ours, images)(images), expected) < EXACT
        program = torch.export.export(ours, (images,), strict=False)
        assert error(program.module()(images), expected) < EXACT
        compiled: Any = torch.compile(ours, backend="aot_eager")
        assert error(compiled(images), expected) < EXACT


def test_in_ddp(tmp_path: Path) -> None:
    """`accelerate` reaches the model inside DistributedDataParallel, which holds the same parameters."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        runs = []
        for is_accelerated in (False, True):
            model: Any = nn.parallel.DistributedDataParallel(KINDS["ResNet"].model(dtype=torch.float64).train())
            if is_accelerated:
                fastuper.accelerate(model)
            value = loss(model, KINDS["ResNet"].images(dtype=torch.float64), KINDS["ResNet"].labels())
            value.backward()
            runs.append([value.detach(), *(p.grad for p in model.parameters())])
        for result, expected in zip(*runs, strict=True):
            assert error(result, expected) < 1e-9 or result.norm() < 1e-9
    finally:
        torch.distributed.destroy_process_group()

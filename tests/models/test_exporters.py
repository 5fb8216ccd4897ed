"""Whole models through the exporters: OpenVINO's front end, both ONNX exporters, `torch.jit.trace`.

Exporters differ from PyTorch in their integer arithmetic: some take the integer part of a negative quotient, PyTorch
takes its floor. So neither 2, 3 nor 6 divides the sides of the images, or of the maps that are pooled.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import openvino
import pytest
import torch
from torch import nn
from torch.export import Dim

from bench.numerics import error
from fastuper.export.openvino import core
from fastuper_kernels import pyramid_pool
from tests.models.heads import randomize
from tests.models.test_upernet import BACKBONES
from tests.models.test_upernet import model as small_model

Runner = Callable[[torch.Tensor], Any]

# (height, width); the first is exported. The last maps are 6 x 8, 4 x 5, 7 x 6, 8 x 8, 2 x 3, 5 x 11, 11 x 5 and 3 x 2.
SIZES = [(161, 227), (97, 131), (193, 165), (256, 256), (64, 67), (131, 323), (323, 131), (65, 64)]
ANY_SIZE = ({2: Dim.AUTO, 3: Dim.AUTO},)
# On processors with instructions for it, OpenVINO computes in bfloat16 unless it is told otherwise.
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}

pytestmark = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values).logits


class LogitsAndLabels(Logits):
    def forward(self, pixel_values):
        return self.model(pixel_values).logits, self.model.segment(pixel_values)[0]


class Pooling(nn.Module):
    def forward(self, x):
        return pyramid_pool(x, [1, 2, 3, 6])


def by_openvino(model: openvino.Model, hints: dict[str, str] | None = None) -> Runner:
    compiled = core().compile_model(model, "CPU", FLOAT32 if hints is None else hints)
    return lambda x: [torch.as_tensor(value) for value in compiled(x.numpy()).values()]


def by_onnx(path: Path) -> Runner:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: [torch.as_tensor(value) for value in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


def jit(module: nn.Module, x: torch.Tensor, folder: Path) -> Runner:
    return torch.jit.trace(module, x)


def legacy_onnx(module: nn.Module, x: torch.Tensor, folder: Path) -> Runner:
    options = {"input_names": ["x"], "dynamic_axes": {"x": {2: "height", 3: "width"}}}
    # The oldest version of the operators: ONNX has attention from 14 on.
    attentions = ("SwinSelfAttention", "Swinv2SelfAttention", "ViTAttention")
    oldest = 14 if any(type(part).__name__ in attentions for part in module.modules()) else 11
    torch.onnx.export(module, (x,), folder / "a.onnx", dynamo=False, opset_version=oldest, **options)
    return by_onnx(folder / "a.onnx")


def legacy_onnx_of_one_size(module: nn.Module, x: torch.Tensor, folder: Path) -> Runner:
    torch.onnx.export(module, (x,), folder / "a.onnx", dynamo=False)
    return by_onnx(folder / "a.onnx")


def new_onnx(module: nn.Module, x: torch.Tensor, folder: Path) -> Runner:
    torch.onnx.export(module, (x,), folder / "a.onnx", dynamo=True, dynamic_shapes=ANY_SIZE, verbose=False)
    return by_onnx(folder / "a.onnx")


def openvino_from_the_module(module: nn.Module, x: torch.Tensor, folder: Path) -> Runner:
    return by_openvino(openvino.convert_model(module, example_input=x, input=[1, x.shape[1], -1, -1]))


def openvino_from_the_module_of_one_size(module: nn.Module, x: torch.Tensor, folder: Path) -> Runner:
    return by_openvino(openvino.convert_model(module, example_input=x, input=list(x.shape)))


def openvino_from_a_program(module: nn.Module, x: torch.Tensor, folder: Path) -> Runner:
    return by_openvino(openvino.convert_model(torch.export.export(module, (x,), dynamic_shapes=ANY_SIZE)))


ANY = [jit, legacy_onnx, new_onnx, openvino_from_the_module, openvino_from_a_program]
ONE = [legacy_onnx_of_one_size, openvino_from_the_module_of_one_size]
# A program of symbolic sizes takes half a minute. tests/models/test_jit_trace.py traces every family, and
# tests/models/test_tracing.py exports a model.
FAST = [("vit_pyramid", legacy_onnx), ("resnet", openvino_from_the_module)]


def id_of(export: Callable[..., Runner], family: str) -> str:
    return f"{family}-{export.__name__}"


def whole(family: str) -> nn.Module:
    torch.manual_seed(0)
    return randomize(small_model(family, hidden_size=16))


def pixels_of(height: int, width: int) -> torch.Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1000 * height + width))


def check(run: Runner, model: nn.Module, height: int, width: int) -> None:
    """Compare an exported model's logits and labels with the eager model's."""
    pixels = pixels_of(height, width)
    logits, labels = run(pixels)
    expected = model(pixels).logits
    assert error(logits, expected) < 1e-5, (height, width)
    best = expected.topk(2, dim=1).values
    decided = best[:, 0] - best[:, 1] > 1e-4 * expected.abs().max()  # rounding may decide a tie differently
    assert labels.shape == (height, width)
    assert labels.dtype == torch.int64
    assert torch.equal(labels[decided[0]], model.segment(pixels)[0][decided[0]]), (height, width)
    assert decided.float().mean() > 0.95


@pytest.mark.parametrize(
    ("family", "export"),
    [
        pytest.param(
            family, export, marks=[pytest.mark.exhaustive] * ((family, export) not in FAST), id=id_of(export, family)
        )
        for family in BACKBONES
        for export in ANY
    ],
)
def test_any_size(family, export, tmp_path):
    """Exported once, a model gives the eager model's results at every size."""
    model = whole(family)
    with torch.no_grad():
        run = export(LogitsAndLabels(model).eval(), pixels_of(*SIZES[0]), tmp_path)
        for size in SIZES[1:2] if (family, export) in FAST else SIZES:  # OpenVINO compiles for each new size
            check(run, model, *size)


@pytest.mark.exhaustive
def test_a_program_of_one_size(tmp_path):
    """The program is exported once for both of its exporters."""
    model, pixels = whole("convnext"), pixels_of(97, 131)
    with torch.no_grad():
        program = torch.export.export(Logits(model).eval(), (pixels,))
        torch.onnx.export(program, (), tmp_path / "a.onnx", dynamo=True, verbose=False, optimize=False)
        for run in (by_openvino(openvino.convert_model(program)), by_onnx(tmp_path / "a.onnx")):
            assert error(run(pixels)[0], model(pixels).logits) < 1e-5


@pytest.mark.parametrize(
    "export",
    [
        jit,
        legacy_onnx,
        *(
            pytest.param(export, marks=pytest.mark.exhaustive)
            for export in (new_onnx, openvino_from_the_module, openvino_from_a_program)
        ),
    ],
    ids=lambda function: function.__name__,
)
def test_pyramid_pooling(export, tmp_path):
    run = export(Pooling(), torch.randn(1, 4, 9, 11), tmp_path)
    for size in [(13, 5), (1, 4)]:
        x = torch.randn(1, 4, *size)
        result = run(x)
        assert error(result if isinstance(result, torch.Tensor) else result[0], Pooling()(x)) < 1e-6, size


@pytest.mark.exhaustive
def test_pooling_rounds_nothing_to_bfloat16():
    """With its default precision, which may be bfloat16, OpenVINO pools in float32: there is no matrix product."""
    x = torch.randn(1, 4, 9, 11)
    run = by_openvino(openvino.convert_model(Pooling(), example_input=x), {"INFERENCE_PRECISION_HINT": "bf16"})
    assert error(run(x)[0], Pooling()(x)) < 1e-6


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", [SIZES[0], SIZES[-1]], ids=str)  # an odd size, and last maps below 6 x 6
@pytest.mark.parametrize("export", ONE, ids=lambda function: function.__name__)
@pytest.mark.parametrize("family", BACKBONES)
def test_one_size(family, export, size, tmp_path):
    model = whole(family)
    with torch.no_grad():
        check(export(LogitsAndLabels(model).eval(), pixels_of(*size), tmp_path), model, *size)

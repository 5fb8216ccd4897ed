"""`linear`: each of its ways against float64, and the calls that it leaves to PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastuper_kernels import linear
from fastuper_kernels.cpu import linear as cpu
from fastuper_kernels.cpu.linear import ACTIVATIONS
from fastuper_kernels.dispatch.choices import LINEAR

WAYS = ["torch", "conv", "onednn", "float32"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def operands(*shape: int, width: int = 40, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Return x, weight, bias and a residual, with the magnitudes of a linear layer in a network."""
    generator = torch.Generator().manual_seed(0)
    shapes = [shape, (width, shape[-1]), (width,), (*shape[:-1], width)]
    x, weight, bias, residual = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [t.to(dtype) for t in (x, weight / shape[-1] ** 0.5, bias, residual)]


def error(result: torch.Tensor, truth: torch.Tensor) -> float:
    assert result.shape == truth.shape
    return ((result.double() - truth.double()).norm() / truth.double().norm()).item()


def truth_of(x, weight, bias, activation, residual):
    out = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if activation is not None:
        out = ACTIVATIONS[activation](out)
    return out if residual is None else residual.double() + out


@pytest.mark.parametrize("shape", [(3, 5, 7, 24), (1, 24), (257, 1)], ids=str)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_as_accurate_as_pytorch(monkeypatch, way, dtype, activation, shape):
    monkeypatch.setenv("FASTUPER_CHOICES", f"linear={way}")
    x, weight, bias, residual = operands(*shape, dtype=DTYPES[dtype])
    for given_bias in (bias, None):
        for given_residual in (None, residual):
            truth = truth_of(x, weight, given_bias, activation, given_residual)
            with torch.no_grad():
                result = linear(x, weight, given_bias, activation=activation, residual=given_residual)
                by_torch = F.linear(x, weight, given_bias)
                by_torch = by_torch if activation is None else ACTIVATIONS[activation](by_torch)
                by_torch = by_torch if given_residual is None else given_residual + by_torch
            assert result.dtype == x.dtype
            assert error(result, truth) <= max(1.25 * error(by_torch, truth), torch.finfo(x.dtype).eps)


@pytest.mark.parametrize("way", WAYS)
def test_any_strides(monkeypatch, way):
    monkeypatch.setenv("FASTUPER_CHOICES", f"linear={way}")
    x, weight, bias, residual = operands(24, 10, 6)
    x = torch.randn(6, 10, 24).permute(2, 1, 0)
    with torch.no_grad():
        truth = truth_of(x, weight, bias, None, residual)
        result = linear(x, weight, bias, residual=residual)
        assert error(result, truth) < 1e-6
        assert result.is_contiguous()
        assert linear(torch.randn(10, 50).t(), torch.randn(6, 10)).is_contiguous()
        assert error(linear(x, weight.t().contiguous().t(), bias, residual=residual), truth) < 1e-6
        turned = residual.transpose(0, 1).contiguous().transpose(0, 1)
        assert error(linear(x, weight, bias, residual=turned), truth) < 1e-6


BIASES = {
    "strided": lambda bias: bias.repeat_interleave(2)[::2],
    "a column": lambda bias: torch.stack([bias, -bias], dim=1)[:, 0],
    "expanded": lambda bias: bias[:1].expand(len(bias)),
    "one": lambda bias: bias[:1],
    "scalar": lambda bias: bias[0],
}


@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
def test_any_bias_that_pytorch_takes(monkeypatch, way, dtype, kind):
    monkeypatch.setenv("FASTUPER_CHOICES", f"linear={way}")
    x, weight, bias, residual = operands(6, 24, dtype=DTYPES[dtype])
    bias = BIASES[kind](bias)
    with torch.no_grad():
        for activation, given in ((None, None), ("gelu", None), (None, residual)):
            truth = truth_of(x, weight, bias, activation, given)
            result = linear(x, weight, bias, activation=activation, residual=given)
            assert error(result, truth) <= 2 * torch.finfo(x.dtype).eps


def test_a_residual_that_broadcasts():
    x, weight, bias, _ = operands(4, 5, 24)
    residual = torch.randn(5, 40)
    with torch.no_grad():
        assert error(linear(x, weight, bias, residual=residual), truth_of(x, weight, bias, None, residual)) < 1e-6


def test_no_positions():
    with torch.no_grad():
        assert linear(torch.empty(0, 24), torch.randn(40, 24), activation="gelu").shape == (0, 40)


def test_gradients_are_those_of_pytorch():
    operands64 = [t.requires_grad_() for t in operands(3, 5, 24, dtype=torch.float64)]
    x, weight, bias, residual = operands64
    ours = torch.autograd.grad(linear(x, weight, bias, activation="gelu", residual=residual).square().sum(), operands64)
    by_torch = residual + F.gelu(F.linear(x, weight, bias))
    for gradient, expected in zip(ours, torch.autograd.grad(by_torch.square().sum(), operands64), strict=True):
        assert error(gradient, expected) < 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_autocast(monkeypatch, way, dtype):
    monkeypatch.setenv("FASTUPER_CHOICES", f"linear={way}")
    x, weight, bias, residual = operands(30, 24)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        assert linear(x, weight, bias, activation="gelu").dtype == dtype
        assert linear(x, weight, bias, residual=residual).dtype == torch.float32
        assert linear(*(t.double() for t in (x, weight, bias))).dtype == torch.float64
        result, by_torch = linear(x, weight, bias), F.linear(x, weight, bias)
    truth = truth_of(x, weight, bias, None, None)
    assert error(result, truth) <= 1.25 * error(by_torch, truth)


def test_weights_are_read_at_every_call():
    x, weight, bias, _ = operands(64, 24)
    with torch.inference_mode():
        linear(x, weight, bias)
        weight.data.mul_(2)
        assert error(linear(x, weight, bias), truth_of(x, weight, bias, None, None)) < 1e-6


def test_without_onednn(monkeypatch):
    monkeypatch.setenv("FASTUPER_CHOICES", "linear=onednn")
    x, weight, bias, _ = operands(64, 24)
    called = []
    monkeypatch.setattr(cpu, "_by_onednn", lambda *_: called.append(1))
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        assert error(linear(x, weight, bias), truth_of(x, weight, bias, None, None)) < 1e-6
    assert not called


def test_a_traced_graph_has_pytorchs_operators():
    _, weight, bias, _ = operands(64, 24)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return linear(x, weight, bias, activation="gelu")

    with torch.no_grad():
        program = torch.export.export(Layer(), (torch.randn(6, 24),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    assert "mkldnn" not in program.graph_module.code
    x = torch.randn(9, 24)
    assert error(program.module()(x), Layer()(x)) < 1e-6


def test_errors():
    with pytest.raises(ValueError, match="activation='swish' is not known; known are gelu, gelu_tanh, relu"):
        linear(torch.randn(2, 3), torch.randn(4, 3), activation="swish")
    with torch.no_grad(), pytest.raises(RuntimeError):
        linear(torch.randn(2, 3), torch.randn(4, 5))
    with torch.no_grad(), pytest.raises(RuntimeError):
        linear(torch.randn(2, 3), torch.randn(4, 3).double())


@pytest.mark.parametrize(
    "shapes",
    [
        ((3, 4), (5, 6)),
        ((3, 4), (5, 6), (5,)),
        ((3, 4), (5,)),
        ((3, 4), (5, 4, 1)),
        ((3, 4), (5, 4), (4,)),
        ((), (5, 4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("way", WAYS)
def test_shapes_that_do_not_fit_are_errors_of_pytorch(monkeypatch, way, shapes):
    monkeypatch.setenv("FASTUPER_CHOICES", f"linear={way}")
    tensors = [torch.ones(shape) for shape in shapes]
    with pytest.raises(RuntimeError) as expected:
        F.linear(*tensors)
    with torch.no_grad(), pytest.raises(RuntimeError) as error:
        linear(*tensors)
    assert str(error.value) == str(expected.value)


def test_the_choice_has_these_ways():
    assert list(LINEAR.options) == WAYS


def test_the_number_of_shapes_that_onednn_compiles_is_bounded(monkeypatch):
    """A shape keeps its way; in deterministic mode the way does not depend on earlier calls."""
    monkeypatch.setenv("FASTUPER_CHOICES", "linear=onednn")
    monkeypatch.setattr(cpu, "MAX_SHAPES", 3)
    monkeypatch.setattr(cpu, "_shapes", set())
    seen = []
    monkeypatch.setattr(cpu, "_by_onednn", lambda x, *others: seen.append(len(x)) or cpu.by_torch(x, *others))
    weight = torch.randn(5, 4)
    with torch.no_grad():
        for rows in (1, 2, 3, 4, 5, 2, 4):
            x = torch.randn(rows, 4)
            assert error(linear(x, weight), x @ weight.T) < 1e-6
        assert seen == [1, 2, 3, 2]
        linear(torch.randn(5, 4).double(), weight.double())  # not a dtype of oneDNN
        torch.use_deterministic_algorithms(True)
        try:
            linear(torch.randn(6, 4), weight)
        finally:
            torch.use_deterministic_algorithms(False)
    assert seen == [1, 2, 3, 2, 6]

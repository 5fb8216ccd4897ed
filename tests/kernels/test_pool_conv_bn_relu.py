"""`pool_conv_bn_relu` against its definition: in inference, in training and traced."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from fastuper_kernels import pool_conv_bn_relu
from tests.kernels.common import (
    DTYPES,
    LAYOUTS,
    check_accuracy,
    check_every_way,
    laid_out,
    name_of,
    parameters_of,
    random,
    same,
    traced,
)

reference = importlib.import_module("fastuper_kernels.ops.pool_conv_bn_relu").reference


def test_signature():
    names = ("x", "scales", "weights", "scale", "shift")
    operands = [(name, "positional or keyword", "required") for name in names]
    options = [("pooling", "keyword-only", "adaptive"), ("relu", "keyword-only", True)]
    assert parameters_of(pool_conv_bn_relu) == operands + options


def operands(batch, channels, out, size, scales, seed=0, dtype=torch.float64):
    weights = [random(out, channels, 1, 1, seed=seed + 10 * i + 1) / channels**0.5 for i in range(len(scales))]
    scale = [random(out, seed=seed + 10 * i + 2).abs() + 0.5 for i in range(len(scales))]
    shift = [random(out, seed=seed + 10 * i + 3) for i in range(len(scales))]
    lists = ([tensor.to(dtype) for tensor in tensors] for tensors in (weights, scale, shift))
    return (random(batch, channels, *size, seed=seed, dtype=dtype), list(scales), *lists)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 5),
    out=st.integers(1, 5),
    size=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    scales=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    layout=st.sampled_from(LAYOUTS),
    pooling=st.sampled_from(["adaptive", "precise_roi"]),
    relu=st.booleans(),
)
def test_any_shapes(batch, channels, out, size, scales, layout, pooling, relu):
    x, *others = operands(batch, channels, out, size, scales)
    options = {"pooling": pooling, "relu": relu}
    check_every_way(pool_conv_bn_relu, reference, (laid_out(x, layout), *others), options)


def test_the_definition_by_pytorch():
    x, scales, weights, scale, shift = operands(2, 3, 4, (5, 7), (1, 2, 3))
    branches = []
    for s, weight, a, b in zip(scales, weights, scale, shift, strict=True):
        y = torch.conv2d(torch.nn.functional.adaptive_avg_pool2d(x, s), weight) * a[:, None, None] + b[:, None, None]
        branches.append(y.relu().flatten(2).transpose(1, 2))
    same(reference(x, scales, weights, scale, shift), torch.cat(branches, dim=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("size", [(16, 16), (9, 13)], ids=str)
def test_accuracy(size, dtype):
    def make(seed):
        return operands(2, 96, 64, size, (1, 2, 3, 6), seed=100 * seed, dtype=dtype), {}

    check_accuracy(pool_conv_bn_relu, reference, make, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("way", ["inference", "training", "traced"])
def test_autocast(way, dtype):
    x, scales, *lists = operands(2, 16, 8, (7, 6), (1, 2, 3), dtype=torch.float32)
    expected = reference(x.double(), scales, *([t.double() for t in tensors] for tensors in lists))
    tensors = [x, *(t for part in lists for t in part)]
    for tensor in tensors:
        tensor.requires_grad_(way == "training")
    with torch.autocast("cpu", dtype=dtype):
        y = (traced if way == "traced" else lambda f, *a: f(*a))(pool_conv_bn_relu, x, scales, *lists)
    assert y.dtype == dtype
    assert (y.double() - expected).norm() < 4 * torch.finfo(dtype).eps * expected.norm()
    if way == "training":
        y.sum().backward()
        assert all(tensor.grad is not None and tensor.grad.dtype == torch.float32 for tensor in tensors)


def test_gradients():
    x, scales, weights, scale, shift = operands(2, 2, 2, (4, 5), (1, 3))
    tensors = [t.requires_grad_() for t in (x, *weights, *scale, *shift)]

    def function(x, *others):
        return pool_conv_bn_relu(x, scales, others[:2], others[2:4], others[4:])

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.exhaustive  # tests/models/test_tracing.py compiles a head with it
def test_compiled():
    torch._dynamo.reset()
    compiled = torch.compile(pool_conv_bn_relu, fullgraph=True, backend="aot_eager", dynamic=True)
    for height in (5, 9):
        arguments = operands(2, 3, 4, (height, 7), (1, 2, 3))
        same(compiled(*arguments), reference(*arguments))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_traced_by_make_fx(mode):
    x, scales, *lists = operands(2, 3, 4, (6, 7), (1, 2))
    graph = make_fx(lambda x, *lists: pool_conv_bn_relu(x, scales, *lists), tracing_mode=mode)(x, *lists)
    same(graph(x, *lists), reference(x, scales, *lists))


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_tensors_without_values(device):
    arguments = operands(2, 3, 4, (6, 7), (1, 2))
    mode = torch._subclasses.FakeTensorMode()

    def convert(t):
        return t.to("meta") if device == "meta" else mode.from_tensor(t)

    x, scales, *lists = arguments
    assert pool_conv_bn_relu(convert(x), scales, *([convert(t) for t in part] for part in lists)).shape == (2, 5, 4)


def test_an_empty_batch():
    assert pool_conv_bn_relu(*operands(0, 3, 4, (6, 7), (1, 2))).shape == (0, 5, 4)


def test_no_branches():
    with pytest.raises(ValueError, match="scales must be one or more positive numbers"):
        pool_conv_bn_relu(torch.zeros(1, 3, 4, 4), [], [], [], [])


@pytest.mark.parametrize("missing", [1, 2, 3, 4], ids=["scales", "weights", "scale", "shift"])
def test_one_entry_per_branch(missing):
    arguments = list(operands(1, 3, 4, (5, 5), (1, 2)))
    arguments[missing] = arguments[missing][:1]
    with pytest.raises(ValueError, match=r"must have one entry per branch; got \(.*1.*\)"):
        pool_conv_bn_relu(*arguments)


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (4, 2, 1, 1), (5, 3, 1, 1), (4, 3)], ids=str)
@pytest.mark.parametrize("branch", [0, 1])
def test_weights_that_do_not_fit(branch, shape):
    x, scales, weights, scale, shift = operands(1, 3, 4, (5, 5), (1, 2))
    weights[branch] = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"weights must all be \(\d, 3, 1, 1\), got .*\(4, 3, 1, 1\)"):
        pool_conv_bn_relu(x, scales, weights, scale, shift)


def test_scales_and_shifts_that_do_not_fit():
    x, scales, weights, scale, _ = operands(1, 3, 4, (5, 5), (1, 2))
    with pytest.raises(ValueError, match=r"shift must be \(4,\)"):
        pool_conv_bn_relu(x, scales, weights, scale, [torch.zeros(3)] * 2)


def test_x_must_be_a_map():
    _, *others = operands(1, 3, 4, (5, 5), (1, 2))
    with pytest.raises(ValueError, match=r"x must be \(B, C, H, W\)"):
        pool_conv_bn_relu(torch.zeros(3, 5, 5), *others)


def test_different_dtypes():
    x, *others = operands(1, 3, 4, (5, 5), (1, 2))
    with pytest.raises(ValueError, match="must be of one dtype"):
        pool_conv_bn_relu(x.float(), *others)

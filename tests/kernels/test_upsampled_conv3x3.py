"""`upsampled_conv3x3` against its definition: in inference, in training and traced."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastuper_kernels import upsampled_conv3x3
from fastuper_kernels.cpu import upsampled_conv
from tests.kernels.common import (
    DTYPES,
    LAYOUTS,
    check_accuracy,
    check_every_way,
    elements_of_calls,
    elements_of_graph,
    gradients,
    laid_out,
    name_of,
    parameters_of,
    random,
    same,
    strips,
    traced,
)

reference = importlib.import_module("fastuper_kernels.ops.upsampled_conv3x3").reference
SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))


def test_signature():
    ordinary = "positional or keyword"
    assert parameters_of(upsampled_conv3x3) == [(name, ordinary, "required") for name in ("levels", "weights", "size")]


def operands(batch, channels, out, sizes, seed=0, dtype=torch.float64):
    """Return a list of levels and a list of weights."""
    levels = [random(batch, c, *size, seed=seed + i) for i, (c, size) in enumerate(zip(channels, sizes, strict=True))]
    weights = [random(out, c, 3, 3, seed=seed + 50 + i) / (3 * c**0.5) for i, c in enumerate(channels)]
    return [level.to(dtype) for level in levels], [weight.to(dtype) for weight in weights]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    out=st.integers(1, 4),
    levels=st.lists(st.tuples(st.integers(1, 4), SIZES), min_size=1, max_size=3),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    layout=st.sampled_from(LAYOUTS),
    weight_layout=st.sampled_from(["contiguous", "channels-last", "strided", "channels-of-more"]),
)
def test_any_shapes(batch, out, levels, size, layout, weight_layout):
    maps, weights = operands(batch, [c for c, _ in levels], out, [hw for _, hw in levels])
    maps = [laid_out(level, layout) for level in maps]
    weights = [laid_out(weight, weight_layout) for weight in weights]
    check_every_way(upsampled_conv3x3, reference, (maps, weights, size))


@pytest.mark.parametrize("channels_last", [False, True])
def test_slices_of_one_weight(channels_last):
    """As in the head: each level has a slice of the fusion convolution's weight, and its gradient."""
    whole = random(5, 12, 3, 3).contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    levels, _ = operands(2, [4, 4, 4], 5, [(4, 5), (2, 3), (1, 1)])

    def ours(whole):
        return upsampled_conv3x3(levels, whole.split(4, dim=1), (8, 10))

    for mine, theirs in zip(
        gradients(ours, [whole], {}),
        gradients(lambda w: reference(levels, w.split(4, dim=1), (8, 10)), [whole], {}),
        strict=True,
    ):
        same(mine, theirs)
    with torch.inference_mode():
        same(ours(whole).clone(), reference(levels, whole.split(4, dim=1), (8, 10)))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 5)), min_size=1, max_size=2),
    size=st.tuples(st.integers(1, 120), st.integers(1, 6)),
    cuts=st.lists(st.integers(0, 999), max_size=6),
    way=st.sampled_from(["inference", "training", "traced"]),
)
def test_strips_equal_the_whole(sizes, size, cuts, way):
    levels, weights = operands(2, [3] * len(sizes), 2, sizes)
    weights[0].requires_grad_(way == "training")
    call = traced if way == "traced" else lambda function, *a, **b: function(*a, **b)
    parts = [call(upsampled_conv3x3, levels, weights, size, strip=strip) for strip in strips(size[0], cuts)]
    assert [part.shape[2] for part in parts] == [stop - start for start, stop in strips(size[0], cuts)]
    same(torch.cat(parts, dim=2), reference(levels, weights, size))


@pytest.mark.parametrize("positions", [1, 3, 16, 31, 1000])
def test_any_number_of_positions_at_a_time(positions, monkeypatch):
    monkeypatch.setattr(upsampled_conv, "CHUNK_POSITIONS", positions)
    levels, weights = operands(2, [3, 2, 4], 5, [(20, 9), (70, 3), (1, 2)])
    with torch.no_grad():
        same(upsampled_conv3x3(levels, weights, (67, 21)), reference(levels, weights, (67, 21)))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    ("sizes", "size"),
    [([(8, 8), (4, 4), (2, 2)], (16, 16)), ([(7, 9), (4, 5)], (13, 17)), ([(3, 40)], (41, 3))],
    ids=["powers-of-two", "odd", "up-and-down"],
)
def test_accuracy(sizes, size, dtype):
    def make(seed):
        return (*operands(2, [80] * len(sizes), 64, sizes, seed=100 * seed, dtype=dtype), size), {}

    check_accuracy(upsampled_conv3x3, reference, make, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("way", ["inference", "training", "traced"])
def test_autocast(way, dtype):
    levels, weights = operands(2, [16, 16], 8, [(4, 5), (2, 2)], dtype=torch.float32)
    levels[1] = levels[1].to(dtype)  # a result of another operation under autocast
    expected = reference([x.double() for x in levels], [w.double() for w in weights], (8, 10))
    for tensor in (*levels, *weights):
        tensor.requires_grad_(way == "training")
    with torch.autocast("cpu", dtype=dtype):
        y = (traced if way == "traced" else lambda f, *a: f(*a))(upsampled_conv3x3, levels, weights, (8, 10))
    assert y.dtype == dtype
    assert (y.double() - expected).norm() < 4 * torch.finfo(dtype).eps * expected.norm()
    if way == "training":
        y.sum().backward()
        assert all(t.grad is not None and t.grad.dtype == t.dtype for t in (*levels, *weights))


@pytest.mark.parametrize("sizes", [[(3, 2), (1, 2)], [(7, 2), (4, 5)]], ids=["up", "down"])
def test_gradients(sizes):
    levels, weights = operands(2, [2, 1], 2, sizes)
    tensors = [t.requires_grad_() for t in (*levels, *weights)]

    def function(*tensors):
        return upsampled_conv3x3(tensors[:2], tensors[2:], (4, 5))

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)
    assert torch.autograd.gradcheck(lambda *t: upsampled_conv3x3(t[:2], t[2:], (4, 5), strip=(1, 3)), tensors)


@pytest.mark.parametrize("wanted", ["levels", "weights", "one"])
def test_gradients_of_some_operands(wanted):
    levels, weights = operands(2, [2, 3], 2, [(3, 2), (2, 2)])
    chosen = {"levels": levels, "weights": weights, "one": weights[1:]}[wanted]
    for tensor in chosen:
        tensor.requires_grad_()
    grad = random(2, 2, 6, 5)
    ours = torch.autograd.grad(upsampled_conv3x3(levels, weights, (6, 5)), chosen, grad)
    theirs = torch.autograd.grad(reference(levels, weights, (6, 5)), chosen, grad)
    for mine, other in zip(ours, theirs, strict=True):
        same(mine, other)


@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_compiled(training):
    torch._dynamo.reset()
    compiled = torch.compile(upsampled_conv3x3, fullgraph=True, backend="aot_eager", dynamic=True)
    for height, width in ((3, 4), (5, 7)):
        levels, weights = operands(2, [3], 4, [(height, width)])
        size = (2 * height, 2 * width + 1)
        weights[0].requires_grad_(training)
        y, expected = compiled(levels, weights, size), reference(levels, weights, size)
        same(y, expected)
        if training:
            (found,), (wanted,) = (torch.autograd.grad(result.square().sum(), weights) for result in (y, expected))
            same(found, wanted)


def test_a_strip_compiled():
    torch._dynamo.reset()
    levels, weights = operands(2, [3], 4, [(5, 7)])
    compiled = torch.compile(upsampled_conv3x3, fullgraph=True, backend="aot_eager")
    same(compiled(levels, weights, (11, 15), strip=(2, 5)), reference(levels, weights, (11, 15))[:, :, 2:5])


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_traced_by_make_fx(mode):
    levels, weights = operands(2, [3], 4, [(5, 4)])
    graph = make_fx(lambda x, w: upsampled_conv3x3([x], [w], (9, 8)), tracing_mode=mode)(levels[0], weights[0])
    same(graph(levels[0], weights[0]), reference(levels, weights, (9, 8)))


def test_exported():
    class Module(torch.nn.Module):
        def forward(self, x, y, w):
            return upsampled_conv3x3([x], [w], (2 * x.shape[2], y.shape[3]))

    levels, weights = operands(2, [3], 4, [(5, 4)])
    auto = torch.export.Dim.AUTO
    shapes = {"x": {2: auto, 3: auto}, "y": {3: auto}, "w": None}
    program = torch.export.export(
        Module(), (levels[0], random(1, 1, 1, 9), weights[0]), dynamic_shapes=shapes, strict=False
    )
    other = random(2, 3, 7, 6)
    same(program.module()(other, random(1, 1, 1, 11), weights[0]), reference([other], weights, (14, 11)))


def test_forward_mode_differentiation():
    levels, weights = operands(2, [3], 4, [(5, 4)])
    tangent = random(2, 3, 5, 4, seed=9)
    expected = reference([tangent], weights, (9, 8))
    with forward_ad.dual_level(), torch.no_grad():
        y = upsampled_conv3x3([forward_ad.make_dual(levels[0], tangent)], weights, (9, 8))
        same(forward_ad.unpack_dual(y).tangent, expected)
    same(torch.func.jvp(lambda x: upsampled_conv3x3([x], weights, (9, 8)), (levels[0],), (tangent,))[1], expected)


def test_mapped():
    levels, weights = operands(2, [3], 4, [(5, 4)])
    many = torch.stack([weights[0], 2 * weights[0]])
    ours = torch.func.vmap(lambda w: upsampled_conv3x3(levels, [w], (9, 8)))(many)
    same(ours[1], reference(levels, [many[1]], (9, 8)))


def test_flops_counted_by_a_dispatch_mode():
    """Nine products of channels for each pixel of the level, none for a pixel of the output."""
    levels, weights = operands(1, [8], 8, [(4, 4)])
    with FlopCounterMode(display=False) as counter:
        upsampled_conv3x3(levels, weights, (16, 16))
    assert counter.get_total_flops() == 2 * 9 * 8 * 8 * 16


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_tensors_without_values(device):
    levels, weights = operands(2, [3], 4, [(5, 4)])
    mode = torch._subclasses.FakeTensorMode()
    x, weight = (t.to("meta") if device == "meta" else mode.from_tensor(t) for t in (levels[0], weights[0]))
    for training in (False, True):
        y = upsampled_conv3x3([x], [weight.requires_grad_(training)], (10, 9), strip=(0, 4))
        assert y.shape == (2, 4, 4, 9)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=name_of)
@pytest.mark.parametrize("way", ["inference", "training"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_layout_and_dtype_of_the_result(layout, way, dtype):
    levels, weights = operands(2, [8, 8], 8, [(5, 4), (2, 2)], dtype=dtype)
    weights[0].requires_grad_(way == "training")
    y = upsampled_conv3x3([laid_out(level, layout) for level in levels], weights, (9, 8))
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_an_empty_batch():
    levels, weights = operands(0, [3], 4, [(5, 4)])
    for training in (False, True):
        weights[0].requires_grad_(training)
        y = upsampled_conv3x3(levels, weights, (9, 8))
        assert y.shape == (0, 4, 9, 8)
    y.sum().backward()
    assert not weights[0].grad.any()


WIDE = ([(32, 32), (16, 16), (8, 8)], (64, 64))


def limit_of(channels: int, out: int) -> float:
    """The products of three taps, at the output's height and half its width, have the size of 1.5 outputs."""
    return 1.6 * out * WIDE[1][0] * WIDE[1][1]


@pytest.mark.parametrize("way", ["inference", "training", "make_fx", "compiled"])
def test_no_tensor_is_wider_than_the_result(way):
    """No level is resampled before its channels are mixed, and no maps are concatenated at the output's size.

    With 256 input and 32 output channels, one upsampled level would have the size of eight outputs.
    """
    channels, out = 256, 32
    levels, weights = operands(1, [channels] * 3, out, WIDE[0], dtype=torch.float32)
    # The inputs, and in training their gradients, do not count: the largest level has the size of two outputs.
    given = {tensor.numel() for tensor in (*levels, *weights)}

    def largest(elements):
        return max((count for count in elements if count not in given), default=0)

    limit = limit_of(channels, out)
    if way == "make_fx":
        graph = make_fx(lambda x, w: upsampled_conv3x3(x, w, WIDE[1]), tracing_mode="fake")(levels, weights)
        found = elements_of_graph(graph)
        full = elements_of_graph(make_fx(lambda x, w: reference(x, w, WIDE[1]), tracing_mode="fake")(levels, weights))
    elif way == "compiled":
        found = []

        def backend(graph, inputs):
            for node in graph.graph.nodes:
                value = node.meta.get("example_value")
                found.append(value.numel() if isinstance(value, torch.Tensor) else 0)
            return graph.forward

        torch._dynamo.reset()
        torch.compile(upsampled_conv3x3, fullgraph=True, backend=backend)(levels, weights, WIDE[1])
        full = [8 * out * WIDE[1][0] * WIDE[1][1]]
    else:
        for weight in weights:
            weight.requires_grad_(way == "training")
        upsampled_conv3x3(levels, weights, WIDE[1])  # a first call makes packs and bands
        found = elements_of_calls(lambda: upsampled_conv3x3(levels, weights, WIDE[1]))
        full = elements_of_calls(lambda: reference(levels, weights, WIDE[1]))
    assert largest(found) <= limit, largest(found) / (out * WIDE[1][0] * WIDE[1][1])
    assert largest(found) >= out * WIDE[1][0] * WIDE[1][1] / 2
    assert largest(full) > 4 * limit  # the reference exceeds the limit: the test can fail


def test_saved_tensors_are_small():
    levels, weights = operands(1, [64] * 3, 64, WIDE[0], dtype=torch.float32)
    for weight in weights:
        weight.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        upsampled_conv3x3(levels, weights, WIDE[1])
    assert max(kept) <= levels[0].numel()


class _PassThrough(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_nested_modes():
    levels, weights = operands(1, [3], 4, [(5, 4)])
    with _PassThrough(), _PassThrough():
        same(upsampled_conv3x3(levels, weights, (9, 8)), reference(levels, weights, (9, 8)))


X, W = (2, 4, 5, 5), (8, 4, 3, 3)
BAD = {
    "none": ([], [], (9, 9), "at least one level.*got 0 and 0"),
    "too few": ([X, X], [W], (9, 9), "a weight for each level: got 2 and 1"),
    "channels": ([X], [(8, 3, 3, 3)], (9, 9), r"got \(2, 4, 5, 5\) and \(8, 3, 3, 3\)"),
    "outputs": ([X, X], [W, (7, 4, 3, 3)], (9, 9), r"weights \(8, C, 3, 3\)"),
    "batches": ([X, (1, 4, 5, 5)], [W, W], (9, 9), r"levels must be \(2, C, h, w\)"),
    "kernel": ([X], [(8, 4, 1, 1)], (9, 9), r"\(8, C, 3, 3\), got"),
    "dimensions": ([(4, 5, 5)], [W], (9, 9), "levels must be"),
    "linear": ([X], [(8, 4)], (9, 9), "levels must be"),
    "empty": ([(2, 4, 0, 5)], [W], (9, 9), "levels must be"),
    "no size": ([X], [W], (0, 9), r"size must be a positive \(height, width\), got \(0, 9\)"),
    "one size": ([X], [W], (9,), r"size must be a positive"),
}


@pytest.mark.parametrize(("levels", "weights", "size", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("training", [False, True])
def test_shapes_that_do_not_fit(training, levels, weights, size, message):
    with torch.set_grad_enabled(training), pytest.raises(ValueError, match=message):
        upsampled_conv3x3(
            [torch.zeros(shape) for shape in levels],
            [torch.zeros(shape, requires_grad=training) for shape in weights],
            size,
        )


@pytest.mark.parametrize("strip", [(2, 2), (3, 2), (-1, 2), (2, 10)], ids=str)
def test_invalid_strips(strip):
    with pytest.raises(ValueError, match=r"strip \(.*\) is not \(start, stop\) of rows of a map of size \(9, 9\)"):
        upsampled_conv3x3([torch.zeros(X)], [torch.zeros(W)], (9, 9), strip=strip)


@pytest.mark.parametrize("training", [False, True])
def test_different_dtypes(training):
    with torch.set_grad_enabled(training), pytest.raises(ValueError, match=r"of one dtype.*levels\[1\].*bfloat16"):
        upsampled_conv3x3([torch.zeros(X), torch.zeros(X).bfloat16()], [torch.zeros(W)] * 2, (9, 9))

"""`conv_bn_relu` against its definition: in inference, in training and traced."""

from __future__ import annotations

import importlib
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from fastuper_kernels import conv_bn_relu
from fastuper_kernels.cpu import conv, winograd
from tests.kernels.common import (
    DTYPES,
    LAYOUTS,
    check_accuracy,
    check_every_way,
    elements_of_calls,
    elements_of_graph,
    error,
    laid_out,
    name_of,
    parameters_of,
    random,
    rms,
    same,
    strips,
    traced,
)

reference = importlib.import_module("fastuper_kernels.ops.conv_bn_relu").reference
WEIGHT_LAYOUTS = ["contiguous", "channels-last", "strided", "channels-of-more"]


def test_signature():
    ordinary, named = "positional or keyword", "keyword-only"
    assert parameters_of(conv_bn_relu) == [
        ("x", ordinary, "required"),
        ("weight", ordinary, "required"),
        ("scale", ordinary, None),
        ("shift", ordinary, None),
        ("addend", named, None),
        ("upsampled", named, None),
        ("relu", named, True),
    ]


def operands(batch, channels, out, k, size, coarse, given, seed=0, dtype=torch.float64):
    """Return (x, weight) and the operands named in `given`."""
    args = random(batch, channels, *size, seed=seed), random(out, channels, k, k, seed=seed + 1)
    others = {
        "scale": random(out, seed=seed + 2),
        "shift": random(out, seed=seed + 3),
        "addend": random(batch, out, *size, seed=seed + 4),
        "upsampled": random(batch, out, *coarse, seed=seed + 5),
    }
    kwargs = {name: tensor.to(dtype) for name, tensor in others.items() if name in given}
    return tuple(tensor.to(dtype) for tensor in args), kwargs


SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))
GIVEN = st.sets(st.sampled_from(["scale", "shift", "addend", "upsampled"]))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 5),
    out=st.integers(1, 5),
    k=st.sampled_from([1, 3]),
    size=SIZES,
    coarse=SIZES,
    given=GIVEN,
    relu=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    weight_layout=st.sampled_from(WEIGHT_LAYOUTS),
)
def test_any_shapes(batch, channels, out, k, size, coarse, given, relu, layout, weight_layout):
    (x, weight), kwargs = operands(batch, channels, out, k, size, coarse, given)
    for name in ("addend", "upsampled"):
        if name in kwargs:
            kwargs[name] = laid_out(kwargs[name], layout)
    args = laid_out(x, layout), laid_out(weight, weight_layout)
    check_every_way(conv_bn_relu, reference, args, {**kwargs, "relu": relu})


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    k=st.sampled_from([1, 3]),
    size=st.tuples(st.integers(1, 40), st.integers(1, 5)),
    coarse=SIZES,
    given=GIVEN,
    relu=st.booleans(),
    cuts=st.lists(st.integers(0, 99), max_size=6),
    way=st.sampled_from(["inference", "training", "traced"]),
)
def test_strips_equal_the_whole(batch, k, size, coarse, given, relu, cuts, way):
    (x, weight), kwargs = operands(batch, 3, 4, k, size, coarse, given)
    height, margin, parts = size[0], k // 2, []
    weight.requires_grad_(way == "training")
    for start, stop in strips(height, cuts):
        some = dict(kwargs)
        if "addend" in some:
            some["addend"] = some["addend"][:, :, start:stop]
        window = x[:, :, max(start - margin, 0) : min(stop + margin, height)]
        call = traced if way == "traced" else lambda function, *a, **b: function(*a, **b)
        parts.append(call(conv_bn_relu, window, weight, **some, relu=relu, strip=(start, stop, height)))
    same(torch.cat(parts, dim=2), reference(x, weight, **kwargs, relu=relu))


@pytest.mark.parametrize("strip", [(0, 13, 13), (0, 4, 13), (4, 9, 13), (9, 13, 13), (12, 13, 13)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strips_by_winograd(strip, layout, monkeypatch):
    """With enough channels for Winograd's transforms, in float32."""
    (x, weight), kwargs = operands(2, 64, 70, 3, (13, 11), (5, 6), {"scale", "shift", "addend", "upsampled"})
    x, weight = laid_out(x, layout).float(), weight.float()
    kwargs = {name: tensor.float() for name, tensor in kwargs.items()}
    start, stop, height = strip
    used = []
    monkeypatch.setattr(conv, "_way", lambda *_: used.append(1) or "winograd")
    some = {**kwargs, "addend": laid_out(kwargs["addend"], layout)}
    expected = reference(x.double(), weight.double(), **{n: t.double() for n, t in some.items()})[:, :, start:stop]
    some["addend"] = some["addend"][:, :, start:stop]
    window = x[:, :, max(start - 1, 0) : min(stop + 1, height)]
    with torch.inference_mode():
        ours = conv_bn_relu(window, weight, **some, strip=strip)
    assert used
    assert (ours.double() - expected).norm() < 1e-6 * expected.norm()


def test_winograd_in_several_blocks(monkeypatch):
    """Each block of rows gets its own rows of the addend."""
    monkeypatch.setattr(winograd, "BLOCK_BYTES", 1)
    monkeypatch.setattr(conv, "_way", lambda *_: "winograd")
    (x, weight), kwargs = operands(2, 64, 64, 3, (13, 11), (5, 6), {"scale", "shift", "addend", "upsampled"})
    expected = reference(x, weight, **kwargs)
    with torch.inference_mode():
        ours = conv_bn_relu(x.float(), weight.float(), **{name: tensor.float() for name, tensor in kwargs.items()})
    assert (ours.double() - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("way", ["winograd", "direct", None])
@pytest.mark.parametrize("size", [(16, 16), (15, 18), (2, 200), (7, 60), (5, 5)], ids=str)
def test_either_way(size, way, monkeypatch):
    """The way is forced, or measured if the map is large enough for a choice."""
    monkeypatch.delenv("FASTUPER_CHOICES", raising=False)
    if way is not None:
        monkeypatch.setenv("FASTUPER_CHOICES", f"conv3x3={way}")
    (x, weight), _ = operands(1, 128, 130, 3, size, (1, 1), ())
    calls, convolve = [], winograd.conv3x3
    monkeypatch.setattr(winograd, "conv3x3", lambda *args: calls.append(args[0].shape[:2]) or convolve(*args))
    with torch.no_grad():
        ours = conv_bn_relu(x.float(), weight.float())
    assert (ours.double() - reference(x, weight)).norm() < 1e-6 * reference(x, weight).norm()
    if way is not None:
        assert bool(calls) == (way == "winograd" and size != (5, 5))
    elif size == (5, 5):
        assert not calls


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    "given",
    [(), ("shift",), ("scale", "shift"), ("scale", "shift", "upsampled"), ("scale", "shift", "addend", "upsampled")],
    ids=lambda names: "+".join(names) or "alone",
)
def test_accuracy(given, k, dtype, monkeypatch):
    monkeypatch.setenv("FASTUPER_CHOICES", "conv3x3=winograd")
    calls = []
    convolve = winograd.conv3x3
    monkeypatch.setattr(winograd, "conv3x3", lambda *args: calls.append(1) or convolve(*args))

    channels = 160
    if dtype == torch.float16:  # without float16 instructions more channels take long
        channels = 16 if given else 48

    def make(seed):
        (x, weight), kwargs = operands(2, channels, 128, k, (15, 16), (6, 7), given, seed=10 * seed, dtype=dtype)
        weight = weight / (channels * k * k) ** 0.5
        if "scale" in kwargs:
            kwargs["scale"] = kwargs["scale"].abs() + 0.5
        return (x, weight), kwargs

    check_accuracy(conv_bn_relu, reference, make, dtype)
    # Winograd's transforms run only in float32: in narrower dtypes they lose accuracy.
    assert bool(calls) == (dtype == torch.float32 and k == 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("addend", [False, True])
def test_accuracy_with_statistics_in_float32(k, addend, dtype):
    """As in a model under autocast: maps in half precision, scales and shifts in float32."""

    def make(seed):
        names = {"scale", "shift", "addend"} if addend else {"scale", "shift"}
        (x, weight), kwargs = operands(2, 96, 64, k, (8, 9), (1, 1), names, seed=10 * seed)
        kwargs = {name: t.to(dtype if name == "addend" else torch.float32) for name, t in kwargs.items()}
        return (x.to(dtype), (weight / (96 * k * k) ** 0.5).to(dtype)), kwargs

    check_accuracy(conv_bn_relu, reference, make, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("way", ["inference", "training", "traced"])
@pytest.mark.parametrize("strip", [None, (1, 6, 7)], ids=["whole", "strip"])
def test_autocast(strip, way, k, dtype):
    """The result has autocast's dtype, and the error of operands rounded to it; gradients have the operands' dtype."""
    (x, weight), kwargs = operands(2, 16, 8, k, (7, 6), (3, 3), {"scale", "shift", "addend", "upsampled"})
    x, weight, kwargs = x.float(), weight.float() / 4, {name: tensor.float() for name, tensor in kwargs.items()}
    expected = reference(x.double(), weight.double(), **{name: t.double() for name, t in kwargs.items()})
    if strip is not None:
        expected = expected[:, :, 1:6]
        kwargs["addend"] = kwargs["addend"][:, :, 1:6]
        x = x[:, :, : 7 if k == 3 else 6][:, :, 0 if k == 3 else 1 :]
    for tensor in (x, weight, *kwargs.values()):
        tensor.requires_grad_(way == "training")
    call = traced if way == "traced" else lambda function, *a, **b: function(*a, **b)
    with torch.autocast("cpu", dtype=dtype):
        y = call(conv_bn_relu, x, weight, **kwargs, strip=strip)
    assert y.dtype == dtype
    assert (y.double() - expected).norm() < 4 * torch.finfo(dtype).eps * expected.norm()
    if way == "training":
        y.sum().backward()
        assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in (x, weight, *kwargs.values()))


@pytest.mark.parametrize("k", [1, 3])
def test_gradients(k):
    (x, weight), kwargs = operands(2, 3, 2, k, (4, 3), (2, 2), {"scale", "shift", "addend", "upsampled"})
    tensors = [t.requires_grad_() for t in (x, weight, *kwargs.values())]

    def function(x, weight, scale, shift, addend, upsampled):
        return conv_bn_relu(x, weight, scale, shift, addend=addend, upsampled=upsampled)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)
    strip = x.detach()[:, :, :3].clone().requires_grad_()
    if k == 3:
        assert torch.autograd.gradcheck(lambda x, w: conv_bn_relu(x, w, strip=(0, 2, 4)), (strip, weight))


def train(x, weight, addend, grad, function):
    """Return a convolution's result and its three gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, addend)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def test_trained_by_winograd_as_accurately(monkeypatch):
    """By the rule of docs/accuracy.md: the result, and the gradients of the map and of the weight."""
    monkeypatch.setenv("FASTUPER_CHOICES", "conv3x3=winograd")
    ours: dict[int, list[float]] = {}
    theirs: dict[int, dict[str, list[float]]] = {}
    for seed in range(5):
        x, addend = random(2, 256, 21, 18, seed=seed).relu(), random(2, 256, 21, 18, seed=seed + 20)
        weight, grad = random(256, 256, 3, 3, seed=seed + 40) / 48, random(2, 256, 21, 18, seed=seed + 60)

        def direct(x, weight, addend):
            return F.conv2d(x, weight, padding=1) + addend

        truth = train(x, weight, addend, grad, direct)
        single = [tensor.float() for tensor in (x, weight, addend, grad)]
        ran = conv_bn_relu(single[0], single[1].requires_grad_(), addend=single[2], relu=False)
        assert ran.grad_fn.name() == "_WinogradBackward"
        result = train(*single, lambda x, weight, addend: conv_bn_relu(x, weight, addend=addend, relu=False))
        for i, (y, expected) in enumerate(zip(result, truth, strict=True)):
            ours.setdefault(i, []).append(error(y, expected))
        for layout in ("contiguous", "channels-last"):
            result = train(*(laid_out(tensor, layout) for tensor in single), direct)
            for i, (y, expected) in enumerate(zip(result, truth, strict=True)):
                theirs.setdefault(i, {}).setdefault(layout, []).append(error(y, expected))
    ratios = [rms(errors) / max(rms(others) for others in theirs[i].values()) for i, errors in ours.items()]
    assert ratios[0] <= 1.25
    assert statistics.median(ratios) <= 1.25
    assert max(ratios) <= 2.0  # of the weight's gradient: a direct sum over few positions has a small error


@pytest.mark.parametrize("leaves", [("x",), ("weight",), ("addend",), ("x", "weight", "addend")], ids="+".join)
def test_gradients_by_winograd_of_some_operands(leaves, monkeypatch):
    monkeypatch.setenv("FASTUPER_CHOICES", "conv3x3=winograd")
    given = {"x": random(1, 256, 16, 18), "weight": random(256, 256, 3, 3, seed=1) / 30}
    given["addend"] = random(1, 256, 16, 18, seed=2)
    given = {name: value.float().requires_grad_(name in leaves) for name, value in given.items()}
    y = conv_bn_relu(given["x"], given["weight"], addend=given["addend"], relu=False)
    expected = F.conv2d(given["x"], given["weight"], padding=1) + given["addend"]
    wanted = [given[name] for name in leaves]
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
    for ours, theirs in zip(
        torch.autograd.grad((y * weights).sum(), wanted),
        torch.autograd.grad((expected * weights).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_gradients_of_gradients_by_winograd(layout, monkeypatch):
    monkeypatch.setenv("FASTUPER_CHOICES", "conv3x3=winograd")
    x = laid_out(random(1, 256, 16, 16).float(), layout).requires_grad_()
    weight = (random(256, 256, 3, 3, seed=1) / 30).float().requires_grad_()

    def penalty(y):
        grads = torch.autograd.grad(y.square().sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), (x, weight))

    for ours, theirs in zip(
        penalty(conv_bn_relu(x, weight, relu=False)), penalty(F.conv2d(x, weight, padding=1)), strict=True
    ):
        assert error(ours, theirs.double()) < 1e-5


@pytest.mark.parametrize(("strip", "k"), [(None, 1), ((0, 2, 5), 3)], ids=["whole-1", "strip-3"])
def test_compiled(strip, k):
    (x, weight), kwargs = operands(2, 3, 4, k, (5, 7), (2, 3), {"scale", "shift", "addend", "upsampled"})
    torch._dynamo.reset()
    compiled = torch.compile(conv_bn_relu, fullgraph=True, backend="aot_eager", dynamic=True)
    for height in (5, 8):
        (x, weight), kwargs = operands(2, 3, 4, k, (height, 7), (2, 3), {"scale", "shift", "addend", "upsampled"})
        expected = reference(x, weight, **kwargs)
        if strip is not None:
            expected, kwargs["addend"], x = expected[:, :, :2], kwargs["addend"][:, :, :2], x[:, :, : 2 + k // 2]
        same(compiled(x, weight, **kwargs, strip=None if strip is None else (0, 2, height)), expected)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_traced_by_make_fx(mode):
    (x, weight), kwargs = operands(2, 3, 4, 3, (5, 7), (2, 3), {"scale", "shift"})
    graph = make_fx(lambda *tensors: conv_bn_relu(*tensors), tracing_mode=mode)(x, weight, *kwargs.values())
    same(graph(x, weight, *kwargs.values()), reference(x, weight, **kwargs))


def test_forward_mode_differentiation():
    (x, weight), kwargs = operands(2, 3, 4, 1, (5, 7), (2, 3), {"scale", "shift"})
    tangent = random(*x.shape, seed=9)
    _, expected = torch.func.jvp(lambda x: reference(x, weight, **kwargs), (x,), (tangent,))
    with forward_ad.dual_level(), torch.no_grad():
        y = conv_bn_relu(forward_ad.make_dual(x, tangent), weight, **kwargs)
        same(forward_ad.unpack_dual(y).tangent, expected)
    same(torch.func.jvp(lambda x: conv_bn_relu(x, weight, **kwargs), (x,), (tangent,))[1], expected)


def test_mapped():
    (x, weight), _ = operands(2, 3, 4, 3, (5, 7), (2, 3), set())
    weights = torch.stack([weight, 2 * weight])
    same(torch.func.vmap(conv_bn_relu, (None, 0))(x, weights)[1], reference(x, weights[1]))


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_tensors_without_values(device):
    (x, weight), _ = operands(2, 3, 4, 3, (5, 7), (2, 3), set())
    mode = torch._subclasses.FakeTensorMode()
    x, weight = ((t.to("meta") if device == "meta" else mode.from_tensor(t)) for t in (x, weight))
    with torch.no_grad():
        assert conv_bn_relu(x, weight).shape == (2, 4, 5, 7)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=name_of)
@pytest.mark.parametrize("channels", [8, 64])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_layout_and_dtype_of_the_result(layout, k, channels, dtype):
    (x, weight), kwargs = operands(2, channels, channels, k, (9, 8), (3, 3), {"scale", "shift"}, dtype=dtype)
    with torch.inference_mode():
        y = conv_bn_relu(laid_out(x, layout), weight, **kwargs)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=name_of)
@pytest.mark.parametrize("channels", [8, 64])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("given", [("shift",), ("scale", "shift"), ("scale", "shift", "addend")], ids="+".join)
@pytest.mark.parametrize("kind", ["strided", "expanded"])
def test_scales_and_shifts_of_any_strides(kind, given, k, channels, dtype):
    (x, weight), kwargs = operands(2, channels, channels, k, (9, 8), (3, 3), given, dtype=dtype)
    weight /= channels**0.5 * k
    for name in ("scale", "shift"):
        if name in kwargs:
            vector = kwargs[name]
            kwargs[name] = vector.repeat_interleave(2)[::2] if kind == "strided" else vector[:1].expand(channels)
    truth = reference(x.double(), weight.double(), **{name: tensor.double() for name, tensor in kwargs.items()})
    with torch.no_grad():
        y = conv_bn_relu(x, weight, **kwargs)
    assert (y.double() - truth).norm() <= 8 * torch.finfo(dtype).eps * truth.norm()


def test_an_empty_batch():
    for k in (1, 3):
        (x, weight), kwargs = operands(0, 64, 64, k, (9, 8), (3, 3), {"scale", "shift", "addend", "upsampled"})
        for dtype in (torch.float64, torch.float32):
            some = {name: tensor.to(dtype) for name, tensor in kwargs.items()}
            with torch.no_grad():
                assert conv_bn_relu(x.to(dtype), weight.to(dtype), **some).shape == (0, 64, 9, 8)


def test_a_batch_is_its_images():
    (x, weight), kwargs = operands(3, 64, 64, 3, (9, 9), (3, 3), {"scale", "shift", "addend", "upsampled"})
    x, weight, kwargs = x.float(), weight.float(), {name: tensor.float() for name, tensor in kwargs.items()}
    with torch.inference_mode():
        whole = conv_bn_relu(x, weight, **kwargs)
        for i in range(3):
            one = {name: tensor if tensor.ndim == 1 else tensor[i : i + 1] for name, tensor in kwargs.items()}
            alone = conv_bn_relu(x[i : i + 1], weight, **one)
            assert (alone - whole[i : i + 1]).norm() < 2e-6 * alone.norm()


@pytest.mark.parametrize("way", ["inference", "training", "traced"])
@pytest.mark.parametrize("k", [1, 3])
def test_no_tensor_is_wider_than_the_result(k, way):
    """No tensor is larger than the output, but for the margins of strips and tiles: nothing is concatenated."""
    channels, out, size = 64, 64, (64, 48)
    (x, weight), kwargs = operands(1, channels, out, k, size, (32, 24), {"scale", "shift", "upsampled"})
    x, weight, kwargs = x.float(), weight.float(), {name: tensor.float() for name, tensor in kwargs.items()}
    limit = 1.2 * out * size[0] * size[1]
    if way == "traced":
        graph = make_fx(lambda *t: conv_bn_relu(t[0], t[1], upsampled=t[2]), tracing_mode="fake")(
            x, weight, kwargs["upsampled"]
        )
        found = elements_of_graph(graph)
    else:
        weight.requires_grad_(way == "training")
        found = elements_of_calls(lambda: conv_bn_relu(x, weight, **kwargs))
    assert max(found) <= limit, max(found) / limit
    assert len(found) > 2


ZEROS = torch.zeros(2, 4, 5, 5)
BAD = {
    "channels": (((2, 4, 5, 5), (8, 3, 1, 1)), {}, r"x must be .*got \(2, 4, 5, 5\) and \(8, 3, 1, 1\)"),
    "kernel": (((2, 4, 5, 5), (8, 4, 5, 5)), {}, "k 1 or 3"),
    "oblong": (((2, 4, 5, 5), (8, 4, 1, 3)), {}, "k 1 or 3"),
    "dimensions": (((4, 5, 5), (8, 4, 1, 1)), {}, "x must be"),
    "empty": (((2, 4, 0, 5), (8, 4, 1, 1)), {}, "x must be"),
    "linear": (((2, 4, 5, 5), (8, 4)), {}, "x must be"),
    "scale": (((2, 4, 5, 5), (8, 4, 1, 1)), {"scale": (4,)}, r"scale must be \(8,\).*got \(4,\)"),
    "shift": (((2, 4, 5, 5), (8, 4, 1, 1)), {"shift": (8, 1, 1)}, r"shift must be \(8,\)"),
    "addend": (((2, 4, 5, 5), (8, 4, 1, 1)), {"addend": (2, 8, 5, 1)}, r"addend must have .*\(2, 8, 5, 5\), got"),
    "upsampled": (((2, 4, 5, 5), (8, 4, 1, 1)), {"upsampled": (1, 8, 2, 2)}, r"upsampled must be \(2, 8, h, w\)"),
    "nothing": (((2, 4, 5, 5), (8, 4, 1, 1)), {"upsampled": (2, 8, 0, 2)}, "upsampled must be"),
}


@pytest.mark.parametrize(("shapes", "others", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("training", [False, True])
def test_shapes_that_do_not_fit(training, shapes, others, message):
    x, weight = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        conv_bn_relu(x, weight.requires_grad_(training), **{name: torch.zeros(shape) for name, shape in others.items()})


@pytest.mark.parametrize("strip", [(2, 2, 5), (3, 2, 5), (-1, 2, 5), (2, 6, 5)], ids=str)
def test_invalid_strips(strip):
    with pytest.raises(ValueError, match=r"strip \(.*\) is not \(start, stop, height\) of rows"):
        conv_bn_relu(ZEROS, torch.zeros(8, 4, 3, 3), strip=strip)


def test_x_without_the_rows_of_its_strip():
    with pytest.raises(ValueError, match=r"x must hold 4 rows to compute strip \(1, 3, 5\) of a 3 x 3 conv, got 5"):
        conv_bn_relu(ZEROS, torch.zeros(8, 4, 3, 3), strip=(1, 3, 5))


@pytest.mark.parametrize("name", ["weight", "addend", "upsampled"])
@pytest.mark.parametrize("training", [False, True])
def test_different_dtypes(training, name):
    tensors = {"weight": torch.zeros(4, 4, 1, 1), "addend": ZEROS, "upsampled": ZEROS}
    tensors[name] = tensors[name].double()
    with torch.set_grad_enabled(training), pytest.raises(ValueError, match=f"must be of one dtype.*{name}"):
        conv_bn_relu(ZEROS, **tensors)

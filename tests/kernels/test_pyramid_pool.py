"""`pyramid_pool` against its definition: in inference, in training and traced."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from fastuper_kernels import pyramid_pool
from fastuper_kernels.ops.pyramid_pool import grids
from tests.kernels.common import (
    DTYPES,
    LAYOUTS,
    check_accuracy,
    check_every_way,
    elements_of_calls,
    laid_out,
    name_of,
    parameters_of,
    random,
    same,
)
from tests.kernels.test_band import precise_pooled

reference = importlib.import_module("fastuper_kernels.ops.pyramid_pool").reference
POOLINGS = ["adaptive", "precise_roi"]


def test_signature():
    ordinary = "positional or keyword"
    assert parameters_of(pyramid_pool) == [
        ("x", ordinary, "required"),
        ("scales", ordinary, "required"),
        ("pooling", "keyword-only", "adaptive"),
    ]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 5),
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    scales=st.lists(st.integers(1, 15), min_size=1, max_size=4),
    layout=st.sampled_from(LAYOUTS),
    pooling=st.sampled_from(POOLINGS),
)
def test_any_shapes(batch, channels, size, scales, layout, pooling):
    x = laid_out(random(batch, channels, *size), layout)
    check_every_way(pyramid_pool, reference, (x, scales), {"pooling": pooling})


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3), (6, 6), (13, 7)], ids=str)
def test_precise_roi_pooling_by_its_integral(size):
    """Each cell is the mean of the bilinear interpolation, which Simpson's rule integrates exactly piece by piece."""
    x, scales = random(2, 3, *size), (1, 2, 3, 6)
    for cells, scale in zip(grids(pyramid_pool(x, scales, pooling="precise_roi"), scales), scales, strict=True):
        columns = torch.stack([precise_pooled(row[None, :, None], scale)[0, :, 0] for row in x.flatten(0, 1)])
        rows = torch.stack([precise_pooled(part.T[None, :, None], scale)[0, :, 0] for part in columns])
        same(cells, rows.transpose(1, 2).view(2, 3, scale, scale))


def test_the_order_of_the_cells():
    """The cells come in the order of the scales, row by row."""
    x = torch.arange(16.0).view(1, 1, 4, 4)
    expected = [2.5, 4.5, 10.5, 12.5, 7.5, *range(16)]
    assert pyramid_pool(x, (2, 1, 4)).flatten().tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("size", [(16, 16), (33, 17)], ids=str)
def test_accuracy(size, dtype, pooling):
    def make(seed):
        return (random(2, 32, *size, seed=seed, dtype=dtype) + 1, (1, 2, 3, 6)), {"pooling": pooling}

    check_accuracy(pyramid_pool, reference, make, dtype)


def test_many_large_values_in_half_precision():
    """The sums are in float32: they exceed float16."""
    x = torch.full((1, 2, 64, 64), 1000.0, dtype=torch.float16)
    assert (pyramid_pool(x, [1, 2]) == 1000).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_constant_is_its_own_mean(dtype):
    """Weights of 1/61 and 1/63, rounded to half precision, would scale all means by a wrong factor."""
    x = torch.full((1, 2, 63, 61), 1.5, dtype=dtype)
    expected = torch.full((1, 14, 2), 1.5, dtype=dtype)
    torch.testing.assert_close(pyramid_pool(x, [1, 2, 3]), expected, rtol=1e-6 if dtype == torch.float32 else 0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("given", [torch.float32, None], ids=["float32", "narrow"])
def test_autocast(given, dtype):
    """The result has x's dtype, as that of `F.adaptive_avg_pool2d`; the sums are in float32."""
    x = random(2, 8, 30, 31).to(given or dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = pyramid_pool(x, (1, 3))
        assert y.dtype == x.dtype == reference(x, (1, 3)).dtype
    expected = reference(x.detach().double(), (1, 3))
    assert (y.double() - expected).norm() < 4 * torch.finfo(x.dtype).eps * expected.norm()
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == x.dtype


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradients(pooling):
    x = random(2, 2, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pyramid_pool(x, (1, 3, 7), pooling=pooling), (x,))
    assert torch.autograd.gradgradcheck(lambda x: pyramid_pool(x, (1, 3, 7), pooling=pooling), (x,))


@pytest.mark.parametrize("pooling", ["adaptive", pytest.param("precise_roi", marks=pytest.mark.exhaustive)])
def test_compiled(pooling):
    torch._dynamo.reset()
    compiled = torch.compile(pyramid_pool, fullgraph=True, backend="aot_eager", dynamic=True)
    for height in (5, 12, 14):
        x = random(2, 3, height, 7).requires_grad_()
        y, expected = compiled(x, (1, 2, 3), pooling=pooling), reference(x, (1, 2, 3), pooling=pooling)
        same(y, expected)
        same(*(torch.autograd.grad(result.square().sum(), x)[0] for result in (y, expected)))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_traced_by_make_fx(mode, pooling):
    x = random(2, 3, 5, 7)
    graph = make_fx(lambda x: pyramid_pool(x, (1, 2, 3), pooling=pooling), tracing_mode=mode)(x)
    same(graph(x), reference(x, (1, 2, 3), pooling=pooling))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_forward_mode_differentiation_and_maps(pooling):
    x, tangent, way = random(2, 3, 5, 7), random(2, 3, 5, 7, seed=1), {"pooling": pooling}
    with forward_ad.dual_level(), torch.no_grad():
        y = pyramid_pool(forward_ad.make_dual(x, tangent), (1, 2), **way)
        same(forward_ad.unpack_dual(y).tangent, reference(tangent, (1, 2), **way))
    same(torch.func.vmap(lambda x: pyramid_pool(x[None], (1, 2), **way)[0])(x), reference(x, (1, 2), **way))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("device", ["meta", "fake"])
def test_tensors_without_values(device, pooling):
    x = random(2, 3, 5, 7)
    x = x.to("meta") if device == "meta" else torch._subclasses.FakeTensorMode().from_tensor(x)
    assert pyramid_pool(x, (1, 2), pooling=pooling).shape == (2, 5, 3)


def test_an_empty_batch():
    assert pyramid_pool(torch.zeros(0, 3, 5, 7), (1, 2)).shape == (0, 5, 3)


def test_no_tensor_grows_faster_than_the_map():
    """The pooled rows and the matrices have 12 rows: no tensor but x itself has x's size."""
    x = random(1, 16, 256, 128).float().contiguous(memory_format=torch.channels_last)
    found = [count for count in elements_of_calls(lambda: pyramid_pool(x, (1, 2, 3, 6))) if count != x.numel()]
    assert max(found) <= x.numel() / 16


@pytest.mark.parametrize("scales", [[], [0], [2, -1]], ids=str)
def test_scales_below_one(scales):
    with pytest.raises(ValueError, match="scales must be one or more positive numbers, got"):
        pyramid_pool(torch.zeros(1, 3, 4, 4), scales)


def test_an_unknown_pooling():
    with pytest.raises(ValueError, match="pooling must be one of adaptive, precise_roi, got 'max'"):
        pyramid_pool(torch.zeros(1, 3, 4, 4), [1], pooling="max")


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 3, 0, 4), (1, 3, 4, 0), (4,)], ids=str)
def test_x_must_be_a_map(shape):
    with pytest.raises(ValueError, match=r"x must be \(B, C, H, W\).*got"):
        pyramid_pool(torch.zeros(shape), [1])


def test_integers():
    with pytest.raises(ValueError, match=r"floating-point numbers, got .* of torch.int64"):
        pyramid_pool(torch.zeros(1, 3, 4, 4, dtype=torch.int64), [1])

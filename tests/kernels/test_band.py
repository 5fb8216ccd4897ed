"""Bands against PyTorch's own operators in float64, and their caches."""

from __future__ import annotations

import importlib
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from fastuper_kernels.cpu import resample
from fastuper_kernels.cpu.band import Band, bilinear_chain, bilinear_taps, blocks_of, inputs_of
from tests.kernels.common import random, traced

band_module = importlib.import_module("fastuper_kernels.cpu.band")

many = settings(max_examples=80, deadline=None, derandomize=True)
sizes = st.integers(1, 40)
offsets = st.integers(-45, 45)


def dense_of(operator, size_in: int) -> torch.Tensor:
    """Return the matrix (size_out, size_in) of an operator on (1, C, 1, size_in), from its results for unit vectors."""
    return operator(torch.eye(size_in, dtype=torch.float64)[None, :, None, :])[0, :, 0].T


def interpolated(size_out: int, align_corners: bool = False):
    return lambda x: F.interpolate(x, size=(1, size_out), mode="bilinear", align_corners=align_corners)


def shifted(offset: int):
    """Return a convolution whose only nonzero tap, a 1, is at the offset from its centre."""
    kernel = torch.zeros(1, 1, 1, 2 * abs(offset) + 1, dtype=torch.float64)
    kernel[..., abs(offset) + offset] = 1
    return lambda x: F.conv2d(x.transpose(0, 1), kernel, padding=(0, abs(offset))).transpose(0, 1)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@st.composite
def bands(draw, size_in: int | None = None) -> Band:
    """Any band: a constructor's, or a product or transpose of such bands."""
    n = draw(sizes) if size_in is None else size_in
    m, offset = draw(sizes), draw(st.integers(-3, 3))
    return draw(
        st.sampled_from(
            [
                Band.bilinear(n, m),
                Band.bilinear(n, m, align_corners=True),
                Band.bilinear(n, m, offset=offset),
                Band.adaptive_avg_pool(n, m),
                Band.precise_roi_pool(n, m),
                Band.bilinear(n, n, offset=offset),
                Band.bilinear(m, n).T,
                Band.adaptive_avg_pool(m, n).T,
                Band.bilinear(m, m, offset=offset) @ Band.bilinear(n, m),
            ]
        )
    )


# Constructors ---------------------------------------------------------------------------------------------------------


@many
@given(n=sizes, m=sizes, align_corners=st.booleans())
def test_bilinear(n, m, align_corners):
    close(Band.bilinear(n, m, align_corners=align_corners).dense(), dense_of(interpolated(m, align_corners), n))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("n", "m"), [(1024, 2048), (2048, 1000), (8191, 77), (16, 683), (3, 8192)])
def test_bilinear_of_large_sizes(n, m, align_corners):
    x = random(1, 2, 1, n)
    ours = Band.bilinear(n, m, align_corners=align_corners).gather(x, 3)
    # A weight is the fraction of a position, whose rounding error grows with the map.
    torch.testing.assert_close(ours, interpolated(m, align_corners)(x), rtol=0, atol=1e-15 * n)


@many
@given(n=sizes, m=sizes, offset=st.integers(-3, 3), align_corners=st.booleans())
def test_bilinear_then_shifted(n, m, offset, align_corners):
    band = Band.bilinear(n, m, offset=offset, align_corners=align_corners)
    close(band.dense(), dense_of(lambda x: shifted(offset)(interpolated(m, align_corners)(x)), n))


@many
@given(n=sizes, m=sizes)
def test_adaptive_avg_pool(n, m):
    close(Band.adaptive_avg_pool(n, m).dense(), dense_of(lambda x: F.adaptive_avg_pool2d(x, (1, m)), n))


def precise_pooled(x: torch.Tensor, size_out: int) -> torch.Tensor:
    """Return the means over equal parts of [0, n] of the interpolation by `F.grid_sample` of x (1, C, 1, n).

    The interpolation is linear between integer coordinates: Simpson's rule is exact on every piece between these and
    the parts' edges. A zero on either side of x keeps the last piece inside the map.
    """
    n = x.shape[3]
    padded = F.pad(x, (1, 1))
    parts = []
    for i in range(size_out):
        low, high = i * n / size_out, (i + 1) * n / size_out
        edges = [low, *(float(j) for j in range(n + 1) if low < j < high), high]
        total = torch.zeros(x.shape[1], dtype=torch.float64)
        for a, b in pairwise(edges):
            points = torch.tensor([a, (a + b) / 2, b], dtype=torch.float64) + 1
            grid = torch.stack([2 * points / (n + 1) - 1, torch.zeros(3, dtype=torch.float64)], dim=-1)[None, None]
            values = F.grid_sample(padded, grid, align_corners=True, padding_mode="zeros")[0, :, 0]
            total += (b - a) / 6 * (values[:, 0] + 4 * values[:, 1] + values[:, 2])
        parts.append(total / (high - low))
    return torch.stack(parts, dim=1)[None, :, None]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(n=st.integers(1, 16), m=st.integers(1, 12))
def test_precise_roi_pool(n, m):
    torch.testing.assert_close(
        Band.precise_roi_pool(n, m).dense(), dense_of(lambda x: precise_pooled(x, m), n), rtol=0, atol=1e-12
    )


def test_precise_roi_pool_by_hand():
    """For [a, b] and one part the integral over [0, 2] is (a + b) / 2 + b / 2, and the mean is half of it."""
    close(Band.precise_roi_pool(2, 1).dense(), torch.tensor([[0.25, 0.5]], dtype=torch.float64))


@many
@given(n=sizes, offset=offsets)
def test_shift(n, offset):
    close(Band.bilinear(n, n, offset=offset).dense(), dense_of(shifted(offset), n))


@many
@given(n=sizes, tap=st.sampled_from([-1, 0, 1]))
def test_a_shift_is_a_tap_of_a_convolution(n, tap):
    kernel = torch.zeros(1, 1, 3, dtype=torch.float64)
    kernel[..., tap + 1] = 1
    x = random(2, 1, n)
    close(Band.bilinear(n, n, offset=tap).gather(x, 2), F.conv1d(x, kernel, padding=1))


@many
@given(n=sizes, m=sizes)
def test_weights_of_averages_add_up_to_one(n, m):
    for band in (Band.bilinear(n, m), Band.bilinear(n, m, align_corners=True), Band.adaptive_avg_pool(n, m)):
        close(band.dense().sum(1), torch.ones(m, dtype=torch.float64))
        assert band.weights.dtype == torch.float64
        assert (band.size_in, band.size_out) == (n, m)


# Algebra --------------------------------------------------------------------------------------------------------------


@many
@given(data=st.data())
def test_products(data):
    first = data.draw(bands())
    second = data.draw(bands(size_in=first.size_out))
    product = second @ first
    assert (product.size_in, product.size_out) == (first.size_in, second.size_out)
    close(product.dense(), second.dense() @ first.dense())


@many
@given(n=sizes, chain=st.lists(sizes, min_size=1, max_size=4))
def test_a_chain_of_resamplings(n, chain):
    x = random(1, 3, 1, n)
    expected = x
    for m in chain:
        expected = interpolated(m)(expected)
    close(bilinear_chain((n, *chain)).gather(x, 3), expected)


def test_a_product_of_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="a band from 5 positions cannot follow one to 4"):
        Band.bilinear(5, 5) @ Band.bilinear(4, 4)


@many
@given(band=bands())
def test_transposes(band):
    close(band.T.dense(), band.dense().T)
    close(band.T.T.dense(), band.dense())


@many
@given(n=sizes, m=sizes, align_corners=st.booleans())
def test_a_transpose_is_the_backward_pass(n, m, align_corners):
    x, grad = random(1, 2, 1, n).requires_grad_(), random(1, 2, 1, m, seed=1)
    (expected,) = torch.autograd.grad(interpolated(m, align_corners)(x), x, grad)
    close(Band.bilinear(n, m, align_corners=align_corners).T.gather(grad, 3), expected)


@many
@given(n=sizes, data=st.data())
def test_interleaved(n, data):
    first = data.draw(bands(size_in=n))
    parts = [first, *(Band.bilinear(n, first.size_out, offset=i) for i in range(data.draw(st.integers(0, 3))))]
    expected = torch.stack([part.dense() for part in parts], dim=2).flatten(1)
    close(Band.interleaved(parts).dense(), expected)


@many
@given(n=sizes, m=sizes)
def test_the_taps_of_a_convolution_after_resampling(n, m):
    x, kernel = random(3, 1, n), random(1, 1, 3, seed=1)
    upsampled = F.interpolate(x[:, :, None], size=(1, m), mode="bilinear", align_corners=False)[:, :, 0]
    products = (x[:, 0, :, None] * kernel[0, 0]).flatten(1)
    close(bilinear_taps(n, m).gather(products, 1)[:, None], F.conv1d(upsampled, kernel, padding=1))


# Application ----------------------------------------------------------------------------------------------------------


@many
@given(band=bands(), dim=st.sampled_from([0, 1, 2, -1]))
def test_gather(band, dim):
    shape = [2, 3, 4]
    shape[dim] = band.size_in
    x = random(*shape)
    expected = torch.tensordot(band.dense(), x, dims=([1], [dim])).movedim(0, dim)
    close(band.gather(x, dim), expected)


@many
@given(band=bands(), size=st.integers(1, 50))
def test_blocks(band, size):
    blocks = band.blocks(torch.float64, size)
    whole = torch.zeros(band.size_out, band.size_in, dtype=torch.float64)
    for block in blocks:
        assert block.matrix.shape == (block.stop - block.start, block.last - block.first)
        assert block.matrix.is_contiguous()
        whole[block.start : block.stop, block.first : block.last] = block.matrix
    assert [(b.start, b.stop) for b in blocks] == [
        (i, min(i + size, band.size_out)) for i in range(0, band.size_out, size)
    ]
    close(whole, band.dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_are_rounded_once(dtype):
    band = Band.bilinear(7, 19)
    for block in band.blocks(dtype):
        expected = band.dense()[block.start : block.stop, block.first : block.last].to(dtype)
        assert torch.equal(block.matrix, expected)


@many
@given(n=sizes, m=sizes, ends=st.tuples(st.integers(0, 39), st.integers(1, 40)))
def test_inputs_of_some_outputs(n, m, ends):
    start = ends[0] % m
    stop = start + 1 + ends[1] % (m - start)
    for kind, count in ((Band.bilinear, 1), (bilinear_taps, 3)):
        first, last = inputs_of(kind, (n, m), start, stop)
        assert 0 <= first < last <= n * count
        dense = kind(n, m).dense()[start:stop]
        assert not dense[:, :first].any()
        assert not dense[:, last:].any()


LARGE = {
    "up": lambda n: Band.bilinear(n // 2, n),
    "up a lot": lambda n: Band.bilinear(n // 16, n),
    "up, corners": lambda n: Band.bilinear(n // 2, n, align_corners=True),
    "down": lambda n: Band.bilinear(n, n // 2),
    "down a lot": lambda n: Band.bilinear(n, n // 16),
    "down, odd": lambda n: Band.bilinear(n, n // 5 + 1),
    "pooled": lambda n: Band.adaptive_avg_pool(n, 6),
    "pooled, fine": lambda n: Band.adaptive_avg_pool(n, n // 3),
    "precise": lambda n: Band.precise_roi_pool(n, 6),
    "shifted": lambda n: Band.bilinear(n, n, offset=-1),
    "taps": lambda n: bilinear_taps(n // 2, n),
    "taps, down": lambda n: bilinear_taps(n, n // 4),
    "chain": lambda n: bilinear_chain((n // 4, n, n // 3, n // 2)),
}


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE.keys())
def test_memory_is_linear_in_the_size(make, transposed):
    def elements(n: int) -> int:
        band = make(n).T if transposed else make(n)
        assert band.weights.numel() <= 64 * n
        return sum(block.matrix.numel() for block in band.blocks(torch.float32))

    small, large = elements(4096), elements(8192)
    assert large <= 2.2 * small
    assert large <= 128 * 8192


@settings(max_examples=60, deadline=None, derandomize=True)
@given(n=sizes, m=sizes, batch=st.integers(1, 3), width=st.integers(1, 4))
def test_apply(n, m, batch, width):
    for kind, size_in in ((Band.bilinear, n), (bilinear_taps, 3 * n)):
        x = random(batch, size_in, width).requires_grad_()
        y = resample.apply(x, kind, (n, m))
        dense = kind(n, m).dense()
        close(y, torch.einsum("mn,anb->amb", dense, x))
        grad = random(*y.shape, seed=1)
        close(torch.autograd.grad(y, x, grad)[0], torch.einsum("mn,amb->anb", dense, grad))
        with torch.no_grad():
            close(resample.columns(x, kind, (n, m)), y)


@pytest.mark.parametrize(("n", "m"), [(3, 7), (7, 3), (1, 4), (20, 2)])
@pytest.mark.parametrize("kind", [Band.bilinear, bilinear_taps], ids=["bilinear", "taps"])
def test_gradients_of_apply(kind, n, m):
    x = random(2, n * (3 if kind is bilinear_taps else 1), 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: resample.apply(x, kind, (n, m)), (x,))
    assert torch.autograd.gradgradcheck(lambda x: resample.apply(x, kind, (n, m)), (x,))


def test_apply_to_other_layouts_and_gradients_of_other_layouts():
    x = random(5, 2, 3).permute(1, 2, 0).requires_grad_()
    y = resample.apply(x, Band.bilinear, (3, 40))
    close(y, torch.einsum("mn,anb->amb", Band.bilinear(3, 40).dense(), x))
    (grad,) = torch.autograd.grad(y.sum(), x)  # an expanded gradient
    close(grad, Band.bilinear(3, 40).dense().sum(0)[None, :, None].expand_as(x))


# Caches ---------------------------------------------------------------------------------------------------------------


def test_each_size_is_built_once():
    assert bilinear_chain((5, 11)) is bilinear_chain((5, 11))
    assert bilinear_taps(5, 11) is bilinear_taps(5, 11)
    cpu = torch.device("cpu")
    blocks = blocks_of(Band.bilinear, (5, 11), torch.float32, cpu)
    assert blocks_of(Band.bilinear, (5, 11), torch.float32, cpu) is blocks
    others = [
        blocks_of(Band.bilinear, (5, 11), torch.float64, cpu),
        blocks_of(Band.bilinear, (5, 11), torch.float32, torch.device("meta")),
        blocks_of(Band.bilinear, (5, 11), torch.float32, cpu, True),
        blocks_of(Band.bilinear, (5, 12), torch.float32, cpu),
        blocks_of(Band.adaptive_avg_pool, (5, 11), torch.float32, cpu),
    ]
    assert all(other is not blocks for other in others)
    assert others[0][0].matrix.dtype == torch.float64
    assert others[1][0].matrix.device.type == "meta"


@pytest.mark.parametrize("cached", [bilinear_chain, bilinear_taps, blocks_of], ids=["chain", "taps", "blocks"])
def test_caches_are_bounded(cached):
    limit = cached.cache_info().maxsize
    assert limit <= 1024
    for n in range(1, limit + 20):
        if cached is bilinear_chain:
            cached((n, 2))
        elif cached is bilinear_taps:
            cached(n, 2)
        else:
            cached(Band.bilinear, (n, 2), torch.float32, torch.device("cpu"))
    assert cached.cache_info().currsize <= limit
    cached.cache_clear()
    assert cached.cache_info().currsize == 0


def test_eight_threads():
    def work(i: int) -> list[torch.Tensor]:
        found = []
        for n in range(1, 40):
            x = random(1, n, 2)
            found.append(resample.columns(x, Band.bilinear, (n, 2 * n + i % 2)))
        return found

    for cached in (bilinear_chain, bilinear_taps, blocks_of):
        cached.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(16)))
    for i, found in enumerate(results):
        for n, y in zip(range(1, 40), found, strict=True):
            close(y, Band.bilinear(n, 2 * n + i % 2).dense() @ random(1, n, 2))


def test_bands_built_in_inference_mode_serve_training():
    blocks_of.cache_clear()
    bilinear_taps.cache_clear()
    with torch.inference_mode():
        resample.apply(random(2, 9, 2), bilinear_taps, (3, 6))
        resample.columns(random(2, 6, 2).transpose(1, 2), Band.bilinear, (2, 3))
        resample.apply(random(2, 6, 2), bilinear_taps, (2, 4))
    x = random(2, 9, 2).requires_grad_()
    resample.apply(x, bilinear_taps, (3, 6)).square().sum().backward()
    assert x.grad is not None
    assert not bilinear_taps(3, 6).weights.is_inference()
    x = random(2, 9, 2).requires_grad_()  # and as a saved tensor
    (bilinear_taps(3, 6).weights.sum() * x).sum().backward()


def counts() -> tuple[int, ...]:
    caches = (bilinear_chain, bilinear_taps, blocks_of)
    return tuple(number for each in caches for number in (each.cache_info().hits, each.cache_info().currsize))


def test_no_cache_entries_while_something_traces():
    before = counts()
    x = random(2, 9, 2)

    def use(x: torch.Tensor) -> torch.Tensor:
        return bilinear_chain((9, 6)).gather(x, 1)

    expected = Band.bilinear(9, 6).gather(x, 1)
    close(traced(use, x), expected)
    close(make_fx(use)(x)(x), expected)
    close(torch.func.vmap(use)(x[None])[0], expected)
    torch.func.grad(lambda x: use(x).sum())(x)
    with torch._subclasses.FakeTensorMode() as mode:
        use(mode.from_tensor(x))
    torch._dynamo.reset()
    close(torch.compile(use, fullgraph=True, backend="eager")(x), expected)
    assert counts() == before
    close(use(x), expected)
    assert counts() != before


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (0, 0), (-1, 4)], ids=str)
def test_sizes_below_one(sizes):
    with pytest.raises(ValueError, match=f"sizes must be at least 1, got {sizes[0]} and {sizes[1]}"):
        Band.bilinear(*sizes)
    with pytest.raises(ValueError, match="sizes must be at least 1"):
        bilinear_chain((5, *sizes))


def test_bands_of_symbolic_sizes():
    def use(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        n, m = x.shape[0], y.shape[0]
        return (
            Band.bilinear(n, m, offset=1).gather(x, 0)
            + Band.bilinear(n, m, align_corners=True).gather(x, 0)
            + Band.adaptive_avg_pool(n, 3).gather(x, 0).sum()
            + Band.precise_roi_pool(n, 3).gather(x, 0).sum()
            + Band.bilinear(n, n, offset=1).gather(x, 0).sum()
        )

    compiled = torch.compile(use, fullgraph=True, backend="eager", dynamic=True)
    torch._dynamo.reset()
    for n, m in ((5, 9), (6, 13), (17, 4)):
        close(compiled(random(n, 2), random(m)), use(random(n, 2), random(m)))


def test_bands_are_cheap_to_build():
    bilinear_taps.cache_clear()
    times = []
    for n in range(1024, 1034):
        start = time.perf_counter()
        bilinear_taps(n, 2 * n)
        bilinear_chain((n, 2 * n, 1500))
        times.append(time.perf_counter() - start)
    assert sorted(times)[len(times) // 2] < 0.05, times

"""Winograd's convolution and its weight's gradient against PyTorch's, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fastuper_kernels.cpu import winograd
from tests.kernels.common import error, laid_out, random, rms


def convolve(
    x: torch.Tensor, weight: torch.Tensor, rows: tuple[int, int] | None = None
) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Return rows [start, stop) of the convolution of x (C, H, W), and the (start, stop) of each finished block."""
    height = x.shape[1]
    start, stop = rows or (0, height)
    halo = (int(start > 0), int(stop < height))
    window = x[:, start - halo[0] : stop + halo[1]].permute(1, 2, 0)
    out = torch.empty(stop - start, x.shape[2], len(weight), dtype=x.dtype)
    finished = []

    def finish(block: torch.Tensor, first: int, last: int) -> None:
        assert block.shape == (last - first, x.shape[2], len(weight))
        assert block.data_ptr() == out[first:last].data_ptr()
        assert not block.isnan().any(), "not all of the rows were written"
        finished.append((first, last))
        block.add_(1)

    winograd.conv3x3(window, winograd.pack(weight, x.dtype), halo, finish, out)
    return out.permute(2, 0, 1) - 1, finished


def check(x: torch.Tensor, weight: torch.Tensor, rows: tuple[int, int] | None = None) -> list[tuple[int, int]]:
    before = x.clone()
    y, finished = convolve(x, weight, rows)
    start, stop = rows or (0, x.shape[1])
    expected = F.conv2d(x[None], weight, padding=1)[0, :, start:stop]
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)
    assert torch.equal(x, before)
    assert [row for first, last in finished for row in range(first, last)] == list(range(stop - start))
    return finished


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    channels=st.integers(1, 6),
    out=st.integers(1, 6),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    layout=st.sampled_from(["contiguous", "channels-last", "strided"]),
    weight_layout=st.sampled_from(["contiguous", "channels-last", "channels-of-more"]),
)
def test_any_sizes(channels, out, size, layout, weight_layout):
    x = laid_out(random(1, channels, *size), layout)[0]
    check(x, laid_out(random(out, channels, 3, 3, seed=1), weight_layout))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(size=st.tuples(st.integers(1, 20), st.integers(1, 5)), ends=st.tuples(st.integers(0, 19), st.integers(0, 19)))
def test_strips_with_neighbouring_rows(size, ends):
    start = ends[0] % size[0]
    stop = start + 1 + ends[1] % (size[0] - start)
    check(random(3, *size), random(2, 3, 3, 3, seed=1), (start, stop))


@pytest.fixture(params=sorted(winograd.PRODUCTS))
def way(request, monkeypatch):
    """A way to compute the products, which is the one that runs."""
    used = []
    multiply = winograd.PRODUCTS[request.param]
    monkeypatch.setenv("FASTUPER_CHOICES", f"winograd_product={request.param}")
    monkeypatch.setitem(winograd.PRODUCTS, request.param, lambda *args: used.append(1) or multiply(*args))
    yield request.param
    assert used


@pytest.mark.parametrize("limit", [1, 3000, 10_000, 10**9])
@pytest.mark.parametrize("height", [1, 2, 7, 24, 33])
@pytest.mark.parametrize("cut", [0, 1], ids=["whole", "rows"])
def test_a_few_rows_at_a_time(cut, height, limit, monkeypatch):
    monkeypatch.setattr(winograd, "BLOCK_BYTES", limit)
    rows = (cut, max(height - cut, cut + 1)) if height > cut else None
    finished = check(random(3, height, 9), random(2, 3, 3, 3, seed=1), rows)
    if limit == 10**9:
        assert len(finished) == 1
    elif limit == 1 and height > 8:
        assert len(finished) > 2


def test_products_leave_their_operands(way):
    """Both ways write only products: a second convolution with the same packs gives the same result."""
    x, weight = random(6, 9, 7), random(4, 6, 3, 3, seed=1)
    kernels = winograd.pack(weight, x.dtype)
    before, results = [kernel.clone() for kernel in kernels], []
    for _ in range(2):
        results.append(torch.empty(9, 7, 4, dtype=x.dtype))
        winograd.conv3x3(x.permute(1, 2, 0), kernels, (0, 0), lambda *_: None, results[-1])
    assert torch.equal(*results)
    assert all(map(torch.equal, kernels, before))
    check(x, weight)


def test_a_map_without_rows():
    out = torch.empty(0, 4, 2)
    kernels = winograd.pack(torch.zeros(2, 3, 3, 3), torch.float32)
    winograd.conv3x3(torch.empty(0, 4, 3), kernels, (0, 0), lambda *_: pytest.fail("called"), out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_packs_are_rounded_once(dtype):
    weight = random(4, 3, 3, 3).to(dtype)
    g = [torch.tensor(rows, dtype=torch.float64) for rows in (winograd.DOWN, winograd.ALONG)]
    expected = torch.einsum("ij,ocjk,lk->iloc", g[0], weight.double(), g[1]).flatten(0, 1)
    expected = [matrix[:, part] for part in (slice(0, 2), slice(2, 3)) for matrix in expected]
    for ours, theirs in zip(winograd.pack(weight, dtype), expected, strict=True):
        assert ours.dtype == dtype
        assert ours.is_contiguous()
        torch.testing.assert_close(ours.double(), theirs, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(("channels", "positive"), [(128, False), (512, True)])
def test_as_accurate_as_a_direct_convolution(channels, positive, way):
    """By the rule of docs/accuracy.md; UPerNet's convolutions of 512 channels read maps after a ReLU."""
    ours: list[float] = []
    theirs: dict[str, list[float]] = {"contiguous": [], "channels-last": []}
    for seed in range(5):
        x, weight = random(channels, 20, 18, seed=seed).float(), random(64, channels, 3, 3, seed=seed + 50).float()
        x = x.relu() if positive else x
        truth = F.conv2d(x[None].double(), weight.double(), padding=1)[0]
        ours.append(error(convolve(x, weight)[0], truth))
        for layout in theirs:
            theirs[layout].append(error(F.conv2d(laid_out(x[None], layout), weight, padding=1)[0], truth))
    assert rms(ours) <= max(1.25 * max(rms(errors) for errors in theirs.values()), 4 * torch.finfo(torch.float32).eps)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 6),
    out=st.integers(1, 6),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    layout=st.sampled_from(["contiguous", "channels-last", "strided"]),
    limit=st.sampled_from([1, 3000, 10**9]),
)
def test_the_weights_gradient(batch, channels, out, size, layout, limit):
    x, grad = laid_out(random(batch, channels, *size), layout), laid_out(random(batch, out, *size, seed=1), layout)
    expected = torch.nn.grad.conv2d_weight(x, (out, channels, 3, 3), grad, padding=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "BLOCK_BYTES", limit)
        torch.testing.assert_close(winograd.weight_gradient(x, grad), expected, rtol=0, atol=1e-10)

"""`upsample_add` against the definition of bilinear resampling, written out in float64."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastuper_kernels import upsample_add
from tests.kernels.common import DTYPES, LAYOUTS, check_accuracy, check_every_way, laid_out, parameters_of, random, same

reference = importlib.import_module("fastuper_kernels.ops.upsample_add").reference


def resampling_matrix(size_in: int, size_out: int) -> torch.Tensor:
    """Return the (size_out, size_in) matrix of linear resampling with half-pixel centres and clamped borders."""
    matrix = torch.zeros(size_out, size_in, dtype=torch.float64)
    for i in range(size_out):
        position = max((i + 0.5) * size_in / size_out - 0.5, 0.0)
        low = min(int(position), size_in - 1)
        high = min(low + 1, size_in - 1)
        matrix[i, low] += 1 - (position - low)
        matrix[i, high] += position - low
    return matrix


def truth(x: torch.Tensor, lateral: torch.Tensor) -> torch.Tensor:
    rows = resampling_matrix(x.shape[2], lateral.shape[2])
    columns = resampling_matrix(x.shape[3], lateral.shape[3])
    return lateral.double() + torch.einsum("yh,bchw,xw->bcyx", rows, x.double(), columns)


def test_signature():
    ordinary = "positional or keyword"
    assert parameters_of(upsample_add) == [("x", ordinary, "required"), ("lateral", ordinary, "required")]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 5),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    to=st.tuples(st.integers(1, 20), st.integers(1, 20)),
)
def test_any_sizes_in_float64(batch, channels, size, to):
    x, lateral = random(batch, channels, *size), random(batch, channels, *to, seed=1)
    torch.testing.assert_close(upsample_add(x, lateral), truth(x, lateral), rtol=0, atol=1e-13)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_dtypes_and_layouts(dtype, layout):
    x = random(2, 33, 7, 5).to(dtype).contiguous(memory_format=layout)
    lateral = random(2, 33, 13, 11, seed=1).to(dtype).contiguous(memory_format=layout)
    result = upsample_add(x, lateral)
    assert result.dtype == dtype
    eps, expected = torch.finfo(dtype).eps, truth(x, lateral)
    assert (result.double() - expected).norm() < 4 * eps * expected.norm()
    # A weight is the fraction of a position, which is rounded in float32 at least.
    torch.testing.assert_close(
        result.double(), expected, rtol=2 * eps, atol=2 * eps + 16 * torch.finfo(torch.float32).eps
    )


def test_strided_and_expanded_tensors():
    x, lateral = random(2, 4, 3, 10)[..., ::2], random(2, 4, 1, 9, seed=1).expand(2, 4, 6, 9)
    torch.testing.assert_close(upsample_add(x, lateral), truth(x, lateral), rtol=0, atol=1e-13)


def test_the_arguments_do_not_change():
    x, lateral = random(1, 2, 3, 3), random(1, 2, 6, 6)
    before = x.clone(), lateral.clone()
    upsample_add(x, lateral)
    assert torch.equal(x, before[0])
    assert torch.equal(lateral, before[1])


def test_gradients():
    x, lateral = random(2, 3, 3, 4).requires_grad_(), random(2, 3, 5, 9).requires_grad_()
    assert torch.autograd.gradcheck(upsample_add, (x, lateral))
    assert torch.autograd.gradgradcheck(upsample_add, (x, lateral))


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 4, 4, 4)], ids=["batch", "channels"])
def test_batch_and_channels_must_agree(shape):
    with pytest.raises(ValueError, match=r"x \(1, 3, 2, 2\) and lateral \(.*\) must agree in batch and channels"):
        upsample_add(torch.zeros(1, 3, 2, 2), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(3, 2, 2), (2, 2)], ids=str)
def test_x_and_lateral_must_be_maps(shape):
    with pytest.raises(ValueError, match=r"x and lateral must be \(B, C, H, W\), got"):
        upsample_add(torch.zeros(shape), torch.zeros(shape))


@pytest.mark.parametrize("shapes", [((1, 3, 0, 2), (1, 3, 4, 4)), ((1, 3, 2, 2), (1, 3, 4, 0))], ids=str)
def test_empty_maps(shapes):
    with pytest.raises(ValueError, match=r"x \(1, 3, .*\) and lateral \(1, 3, .*\) must not be empty"):
        upsample_add(*map(torch.zeros, shapes))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)], ids=str)
def test_different_dtypes(dtypes):
    for first, second in (dtypes, dtypes[::-1]):
        with pytest.raises(ValueError, match=r"operands must be of one dtype, got .*x.*lateral"):
            upsample_add(torch.zeros(1, 3, 2, 2, dtype=first), torch.zeros(1, 3, 4, 4, dtype=second))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    to=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
)
def test_every_way(size, to, layouts):
    x, lateral = laid_out(random(2, 3, *size), layouts[0]), laid_out(random(2, 3, *to, seed=1), layouts[1])
    check_every_way(upsample_add, reference, (x, lateral))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_accuracy(dtype):
    def make(seed):
        return (random(2, 16, 7, 5, seed=seed, dtype=dtype), random(2, 16, 13, 11, seed=seed + 9, dtype=dtype)), {}

    check_accuracy(upsample_add, reference, make, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_autocast(dtype):
    """The result has the dtype of PyTorch's own operators: the wider dtype of the two."""
    x, lateral = random(2, 4, 3, 4).float(), random(2, 4, 6, 8, seed=1).float()
    with torch.autocast("cpu", dtype=dtype):
        for a, b in ((x, lateral), (x.to(dtype), lateral), (x, lateral.to(dtype)), (x.to(dtype), lateral.to(dtype))):
            y = upsample_add(a, b)
            assert y.dtype == reference(a, b).dtype
            expected = truth(a, b)
            eps = max(torch.finfo(a.dtype).eps, torch.finfo(b.dtype).eps)
            assert (y.double() - expected).norm() < 4 * eps * expected.norm()


def test_compiled():
    torch._dynamo.reset()
    compiled = torch.compile(upsample_add, fullgraph=True, backend="aot_eager", dynamic=True)
    for height in (3, 5):
        x, lateral = random(2, 4, height, 4), random(2, 4, 2 * height, 9, seed=1)
        same(compiled(x, lateral), truth(x, lateral))

"""`upsample_add` against the definition of bilinear resampling, written out in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastuper_kernels import upsample_add


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


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
    # A position is as large as the map: its rounding, in float32 at least, is that of a weight.
    torch.testing.assert_close(
        result.double(), expected, rtol=2 * eps, atol=2 * eps + 16 * torch.finfo(torch.float32).eps
    )


def test_strided_and_expanded_tensors():
    x, lateral = random(2, 4, 3, 10)[..., ::2], random(2, 4, 1, 9, seed=1).expand(2, 4, 6, 9)
    torch.testing.assert_close(upsample_add(x, lateral), truth(x, lateral), rtol=0, atol=1e-13)


def test_the_arguments_are_left_alone():
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

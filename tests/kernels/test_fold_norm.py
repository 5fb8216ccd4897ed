"""`fold_norm` against PyTorch's BatchNorm in evaluation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastuper_kernels import fold_norm
from tests.kernels.common import random, same


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_batch_norm(weight, bias):
    mean, var, a, b = (random(7, seed=seed) for seed in range(4))
    var, x = var.abs(), random(2, 7, 3, 4, seed=5)
    a, b = a if weight else None, b if bias else None
    scale, shift = fold_norm(mean, var, a, b, 1e-3)
    same(x * scale[:, None, None] + shift[:, None, None], F.batch_norm(x, mean, var, a, b, eps=1e-3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_float32_at_least(dtype):
    vectors = [random(5, seed=seed).abs().to(dtype) for seed in range(4)]
    expected = torch.promote_types(dtype, torch.float32)
    assert [vector.dtype for vector in fold_norm(*vectors, 1e-5)] == [expected] * 2


def test_vectors_of_different_sizes():
    with pytest.raises(ValueError, match=r"vectors of one size, got \[\(5,\), \(5,\), \(4,\), None\]"):
        fold_norm(torch.ones(5), torch.ones(5), torch.ones(4), None, 1e-5)

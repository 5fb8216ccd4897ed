"""`upsample_argmax` against resampling by matrices in float64, a few rows at a time or all of them."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastuper_kernels import upsample_argmax
from tests.kernels.test_upsample_add import random, resampling_matrix

# `fastuper_kernels.upsample_argmax` is the function; monkeypatch wants the module of the same name.
upsample_argmax_module = sys.modules[upsample_argmax.__module__]


def resampled(logits: torch.Tensor, sizes: list[tuple[int, int]]) -> torch.Tensor:
    """Return float64 logits, resampled through each size in turn."""
    logits = logits.double()
    for height, width in sizes:
        rows, columns = resampling_matrix(logits.shape[2], height), resampling_matrix(logits.shape[3], width)
        logits = torch.einsum("yh,bchw,xw->bcyx", rows, logits, columns)
    return logits


def check(logits: torch.Tensor, sizes: list[tuple[int, int]], labels: torch.Tensor) -> None:
    """The labels are the best class wherever rounding cannot decide."""
    full = resampled(logits, sizes)
    assert labels.shape == (len(logits), *sizes[-1])
    if logits.shape[1] == 1:
        assert not labels.any()
        return
    labels = labels.long()
    best, classes = full.topk(2, dim=1)
    certain = best[:, 0] - best[:, 1] > 8 * torch.finfo(logits.dtype).eps * full.abs().max()
    assert torch.equal(labels[certain], classes[:, 0][certain])
    assert labels.min() >= 0
    assert labels.max() < logits.shape[1]


sizes_of = st.tuples(st.integers(1, 15), st.integers(1, 15))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    classes=st.integers(1, 9),
    size=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    sizes=st.lists(sizes_of, min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_sizes(batch, classes, size, sizes, dtype):
    logits = random(batch, classes, *size).to(dtype)
    labels = upsample_argmax(logits, sizes)
    assert labels.dtype == torch.int64
    check(logits, sizes, labels)


@pytest.mark.parametrize("limit", [1, 4 * 11 * 31 * 4, 10**9], ids=["one-row", "four-rows", "all-rows"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
def test_a_few_rows_at_a_time(limit, layout, monkeypatch):
    monkeypatch.setattr(upsample_argmax_module, "BLOCK_BYTES", limit)
    logits = random(2, 11, 6, 8).float().contiguous(memory_format=layout)
    check(logits, [(23, 31)], upsample_argmax(logits, [(23, 31)]))


@pytest.mark.parametrize("limit", [1, 10**9], ids=["one-row", "all-rows"])
def test_the_first_of_equal_classes_wins(limit, monkeypatch):
    monkeypatch.setattr(upsample_argmax_module, "BLOCK_BYTES", limit)
    logits = torch.zeros(1, 5, 3, 3)
    logits[:, [2, 4]] = 1.0
    assert (upsample_argmax(logits, [(7, 7)]) == 2).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=lambda d: str(d)[6:])
def test_types_of_labels(dtype):
    labels = upsample_argmax(random(1, 256, 2, 3), [(4, 5)], dtype=dtype)
    assert labels.dtype == dtype
    check(random(1, 256, 2, 3), [(4, 5)], labels)


@pytest.mark.parametrize("sizes", [[], [(0, 3)], [(4, 4), (3, 0)], [(-1, 2)]], ids=str)
def test_sizes_must_be_positive(sizes):
    with pytest.raises(ValueError, match=r"sizes must be one or more positive \(height, width\), got"):
        upsample_argmax(torch.zeros(1, 3, 2, 2), sizes)


@pytest.mark.parametrize(("dtype", "classes"), [(torch.float32, 3), (torch.uint8, 257), (torch.int8, 129)], ids=str)
def test_a_type_that_does_not_hold_the_classes(dtype, classes):
    with pytest.raises(ValueError, match=f"{dtype} does not hold the labels of {classes} classes"):
        upsample_argmax(torch.zeros(1, classes, 2, 2), [(2, 2)], dtype=dtype)

"""Fixtures of the comparisons with Transformers: seeds, one thread, full float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers

from bench.numerics import float32_as


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """Seed PyTorch's global generator, and use one thread, which is faster for small models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with float32_as("ieee"):
        yield
    torch.set_num_threads(threads)
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture(autouse=True, scope="session")
def quiet() -> None:
    transformers.logging.set_verbosity_error()

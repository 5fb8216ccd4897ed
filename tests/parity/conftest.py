"""What every comparison with Transformers needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers

from bench.gpu import float32_as


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """Seed the draws that have no generator of their own; one thread is quicker for what is small, and here all is."""
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

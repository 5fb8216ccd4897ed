"""What every comparison with Transformers needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """Seed the draws that a test makes without a generator, and check that it leaves the default dtype alone."""
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture(autouse=True, scope="session")
def quiet() -> None:
    transformers.logging.set_verbosity_error()

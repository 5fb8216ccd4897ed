"""What every comparison with Transformers needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers


@pytest.fixture(autouse=True)
def repeatable(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seed the draws that a test makes without a generator; small networks run on one thread, where they are quicker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if request.node.get_closest_marker("slow") else 1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture(autouse=True, scope="session")
def quiet() -> None:
    transformers.logging.set_verbosity_error()

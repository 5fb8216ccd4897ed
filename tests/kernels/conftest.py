"""What holds for every test of the operations: memory that nobody wrote is NaN, and no pack outlives its test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastuper_kernels.cpu import packs


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point():
            tensor.detach().fill_(float("nan"))  # PyTorch 2.11's checkpoint makes one that requires a gradient
        return tensor

    return wrapper


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` and its kin return with NaN: an element that is read before it is written shows."""
    with torch.device("cpu"):
        torch.empty(0)  # PyTorch keeps the functions that `torch.device` acts on: not the ones below
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield


@pytest.fixture(autouse=True, scope="module")
def no_packs() -> Iterator[None]:
    """Begin and end without packed weights."""
    packs.clear()
    yield
    packs.clear()

"""Fixtures of every test of the operations: new memory is filled with NaN, and packs are freed after each module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastuper_kernels.cpu import linear, packs


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point():
            tensor.detach().fill_(
                float("nan")
            )  # detached: PyTorch 2.11's checkpoint allocates a tensor that requires a gradient
        return tensor

    return wrapper


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory() -> Iterator[None]:
    """Fill the results of `torch.empty`, `empty_like` and `new_empty` with NaN: a read of unwritten memory shows."""
    with torch.device("cpu"):
        torch.empty(0)  # PyTorch caches the functions that `torch.device` wraps: before they are patched below
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield


@pytest.fixture(autouse=True, scope="module")
def no_packs() -> Iterator[None]:
    """Start and end each module without packs, and start it without shapes that `linear` has seen."""
    packs.clear()
    linear._shapes.clear()
    yield
    packs.clear()

"""A fixture for every test here: one thread, fixed ways, and Accelerate's state without that of earlier tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Runs of several processes are equal to the last bit only if all of them compute by the same ways.
    monkeypatch.setenv("FASTUPER_CHOICES", "linear=onednn,conv3x3=winograd")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
    torch.set_num_threads(threads)

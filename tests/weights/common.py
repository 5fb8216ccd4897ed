"""The comparison of two state dicts."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def assert_same(theirs: Mapping[str, torch.Tensor], ours: Mapping[str, torch.Tensor]) -> None:
    """Check that both have the same names, and bitwise the same tensors of the same dtypes."""
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")

"""Products of channels: a GEMM whose epilogue adds a bias and applies an activation."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = None
) -> torch.Tensor:
    """Return `activation(x @ weight.T + bias)` of x (N, C), on a CPU and without gradients."""
    if x.dtype in (torch.float32, torch.bfloat16) and torch.backends.mkldnn.is_available():
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation or "none", [], "")
        return y
    y = F.linear(x, weight, bias)
    return F.relu(y) if activation == "relu" else y

"""A linear layer with the activation, or the residual, that follows it."""

from __future__ import annotations

import torch

from fastuper_kernels.cpu import linear as cpu
from fastuper_kernels.dispatch.modes import is_eager_inference


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `activation(x @ weight.T + bias) + residual`.

    On a CPU, if no gradient is recorded and nothing traces, the fastest of several ways runs (the choice `linear` of
    `fastuper_kernels.dispatch.choices`). Elsewhere PyTorch's own operators run.

    Args:
        x: (..., C_in).
        weight: (C_out, C_in).
        bias: (C_out,).
        activation: "gelu", "gelu_tanh" or "relu"; None for none.
        residual: (..., C_out); added as `+` adds, in the dtype that both promote to.

    Returns:
        (..., C_out), in the dtype that `F.linear` returns (autocast's, where autocast is on).

    Raises:
        ValueError: the activation is unknown.
        RuntimeError: shapes or dtypes do not fit; the error is `F.linear`'s own.
    """
    if activation is not None and activation not in cpu.ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not known; known are {', '.join(cpu.ACTIVATIONS)}")
    if x.device.type != "cpu" or not is_eager_inference(x, weight, bias, residual):
        return reference(x, weight, bias, activation=activation, residual=residual)
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64 and x.numel():
        dtype = torch.get_autocast_dtype("cpu")
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return cpu.linear(x, weight, bias, activation=activation, residual=residual)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition of `linear`."""
    return cpu.by_torch(x, weight, bias, activation, residual)

"""BatchNorm in evaluation as a scale and a shift of each channel."""

from __future__ import annotations

import torch

from fastuper_kernels.dispatch.backend import takes_triton


def fold_norm(
    mean: torch.Tensor,
    var: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (scale, shift) of a BatchNorm in evaluation: `batch_norm(x) = x * scale + shift`.

    If an operand requires a gradient, PyTorch's operators run on every device.

    Args:
        mean: the running mean, (C,).
        var: the running variance, (C,).
        weight: (C,); None for ones.
        bias: (C,); None for zeros.
        eps: the number added to the variance.
        backend: "auto", "triton" or "torch"; see `fastuper_kernels.dispatch.backend`.

    Returns:
        scale and shift, (C,) each, in float32 at least.

    Raises:
        ValueError: the vectors differ in size, or the backend cannot take them.
    """
    given = (mean, var, weight, bias)
    if any(vector is not None and vector.shape != (len(mean),) for vector in given):
        shapes = [None if vector is None else tuple(vector.shape) for vector in given]
        raise ValueError(f"mean, var, weight and bias must be vectors of one size, got {shapes}")
    wants_gradients = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in given)
    if not wants_gradients and takes_triton(backend, var, mean, weight, bias):
        from fastuper_kernels.gpu.fold_norm import fold_norm as kernel

        return kernel(mean, var, weight, bias, eps)
    return reference(mean, var, weight, bias, eps)


def reference(
    mean: torch.Tensor, var: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of `fold_norm`."""
    dtype = torch.promote_types(var.dtype, torch.float32)
    scale = torch.rsqrt(var.to(dtype) + eps)
    if weight is not None:
        scale = scale * weight.to(dtype)
    shift = -mean.to(dtype) * scale
    return scale, shift if bias is None else shift + bias.to(dtype)

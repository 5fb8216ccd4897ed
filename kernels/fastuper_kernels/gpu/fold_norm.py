"""`fold_norm` on a GPU: one launch for each norm, where PyTorch's operators take ten."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastuper_kernels.gpu.layout import on_its_device


@triton.jit
def fold_kernel(
    mean,
    var,
    weight,
    bias,
    scale,
    shift,
    eps,
    C: tl.constexpr,
    BC: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Write scale = weight / sqrt(var + eps) and shift = bias - mean * scale.

    Program: BC channels.

    mean, var: pointers to (C,).
    weight, bias: pointers to (C,), or any pointer without HAS_WEIGHT, HAS_BIAS.
    scale, shift: pointers to (C,) float32; written.
    eps: a number.
    C: channels.
    BC: channels of a program.
    HAS_WEIGHT: False for a weight of ones.
    HAS_BIAS: False for a bias of zeros.
    """
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < C
    a = 1.0 / tl.sqrt_rn(tl.load(var + c, mask=inside, other=1.0).to(tl.float32) + eps)
    if HAS_WEIGHT:
        a *= tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    b = -tl.load(mean + c, mask=inside, other=0.0).to(tl.float32) * a
    if HAS_BIAS:
        b += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(scale + c, a, mask=inside)
    tl.store(shift + c, b, mask=inside)


@on_its_device
def fold(
    mean: torch.Tensor, var: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and shift, (C,) float32 each, of checked vectors (C,); weight and bias may be None."""
    scale, shift = (mean.new_empty(len(mean), dtype=torch.float32) for _ in range(2))
    if scale.numel() == 0:
        return scale, shift
    vectors = [mean if vector is None else vector.contiguous() for vector in (mean, var, weight, bias)]
    fold_kernel[(triton.cdiv(len(mean), 128),)](
        *vectors,
        scale,
        shift,
        eps,
        C=len(mean),
        BC=128,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        num_warps=4,
    )
    return scale, shift


@torch.library.custom_op("fastuper::fold_norm", mutates_args=())
def fold_norm(
    mean: torch.Tensor, var: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator of `fastuper_kernels.ops.fold_norm`."""
    return fold(mean, var, weight, bias, eps)


@fold_norm.register_fake
def _(
    mean: torch.Tensor, var: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return mean.new_empty(len(mean), dtype=torch.float32), mean.new_empty(len(mean), dtype=torch.float32)

"""All branches of a pyramid pooling module: the means over each grid's cells, then conv 1x1, BatchNorm and ReLU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from fastuper_kernels.dispatch.backend import takes_triton
from fastuper_kernels.dispatch.modes import autocast, check_dtypes
from fastuper_kernels.ops.conv_bn_relu import conv_bn_relu
from fastuper_kernels.ops.pyramid_pool import grids, pyramid_pool
from fastuper_kernels.ops.pyramid_pool import reference as pool_reference


def pool_conv_bn_relu(
    x: torch.Tensor,
    scales: Sequence[int],
    weights: Sequence[torch.Tensor],
    scale: Sequence[torch.Tensor],
    shift: Sequence[torch.Tensor],
    *,
    pooling: str = "adaptive",
    relu: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    """Return `relu(conv1x1(means of x over s x s cells) * scale + shift)` for each branch.

    Args:
        x: (B, C, H, W).
        scales: for each branch the number s of cells along each side.
        weights: for each branch (C_out, C, 1, 1).
        scale: for each branch (C_out,): with `shift` a BatchNorm in evaluation.
        shift: for each branch (C_out,).
        pooling: "adaptive" or "precise_roi", the kind of cells; see `pyramid_pool`.
        relu: False leaves the ReLU out.
        backend: "auto", "triton" or "torch"; see `fastuper_kernels.dispatch.backend`.

    Returns:
        (B, sum of s * s, C_out): for each branch in turn its cells, row by row.

    Raises:
        ValueError: scales, weights, scale and shift differ in length, shapes do not fit, x and the weights have several
            dtypes, there is no such pooling, or the backend cannot take the operands.
    """
    if not len(scales) == len(weights) == len(scale) == len(shift):
        counts = (len(scales), len(weights), len(scale), len(shift))
        raise ValueError(f"scales, weights, scale and shift must have one entry per branch; got {counts}")
    shape = (weights[0].shape[0], x.shape[1], 1, 1) if len(weights) and x.ndim == 4 else None
    if shape is not None and any(weight.shape != shape for weight in weights):
        raise ValueError(f"weights must all be {tuple(shape)}, got {[tuple(weight.shape) for weight in weights]}")
    (x,) = autocast(x)
    if takes_triton(backend, x, *weights, *scale, *shift):
        from fastuper_kernels.gpu.pool_conv_bn_relu import pool_conv_bn_relu as kernel

        weights = autocast(*weights)
        check_dtypes(x=x, **{f"weights[{i}]": weight for i, weight in enumerate(weights)})
        return kernel(x, list(scales), list(weights), list(scale), list(shift), pooling, relu)
    means = grids(pyramid_pool(x, scales, pooling=pooling, backend=backend), scales)
    maps = [
        conv_bn_relu(grid, *branch, relu=relu, backend=backend)
        for grid, *branch in zip(means, weights, scale, shift, strict=True)
    ]
    return torch.cat([y.flatten(2).transpose(1, 2) for y in maps], dim=1)


def reference(
    x: torch.Tensor,
    scales: Sequence[int],
    weights: Sequence[torch.Tensor],
    scale: Sequence[torch.Tensor],
    shift: Sequence[torch.Tensor],
    *,
    pooling: str = "adaptive",
    relu: bool = True,
) -> torch.Tensor:
    """The definition of `pool_conv_bn_relu`."""
    branches = []
    means = grids(pool_reference(x, scales, pooling=pooling), scales)
    for cells, weight, a, b in zip(means, weights, scale, shift, strict=True):
        y = F.conv2d(cells, weight) * a[:, None, None] + b[:, None, None]
        branches.append((F.relu(y) if relu else y).to(x.dtype).flatten(2).transpose(1, 2))
    return torch.cat(branches, dim=1)

"""All branches of a pyramid pooling module: means over each grid, and on each cell conv 1x1, BatchNorm, ReLU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from fastuper_kernels.dispatch.backend import takes_triton
from fastuper_kernels.dispatch.modes import autocast, check_dtypes
from fastuper_kernels.ops.conv_bn_relu import conv_bn_relu
from fastuper_kernels.ops.pyramid_pool import grids, pyramid_pool


def pool_conv_bn_relu(
    x: torch.Tensor,
    scales: Sequence[int],
    weights: Sequence[torch.Tensor],
    scale: Sequence[torch.Tensor],
    shift: Sequence[torch.Tensor],
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Return `relu(conv1x1(mean over s x s cells) * scale + shift)` for each branch.

    Args:
        x: (B, C, H, W).
        scales: cells along each side, one number a branch.
        weights: (C_out, C, 1, 1), one a branch.
        scale: (C_out,), one a branch: with `shift` a BatchNorm in evaluation.
        shift: (C_out,), one a branch.
        backend: "auto", "triton" or "torch"; see `fastuper_kernels.dispatch.backend`.

    Returns:
        (B, sum of s * s, C_out): for each branch in turn its cells, row by row.

    Raises:
        ValueError: the branches' weights are not as many as the scales, shapes do not fit, or x and the weights are
            of several dtypes; or a backend that cannot take them.
    """
    if not len(scales) == len(weights) == len(scale) == len(shift):
        counts = (len(scales), len(weights), len(scale), len(shift))
        raise ValueError(f"scales, weights, scale and shift must be as many, one a branch; got {counts}")
    shape = (weights[0].shape[0], x.shape[1], 1, 1) if len(weights) and x.ndim == 4 else None
    if shape is not None and any(weight.shape != shape for weight in weights):
        raise ValueError(f"weights must all be {tuple(shape)}, got {[tuple(weight.shape) for weight in weights]}")
    (x,) = autocast(x)
    if takes_triton(backend, x, *weights, *scale, *shift):
        from fastuper_kernels.gpu.pool_conv_bn_relu import pool_conv_bn_relu as kernel

        weights = autocast(*weights)
        check_dtypes(x=x, **{f"weights[{i}]": weight for i, weight in enumerate(weights)})
        return kernel(x, list(scales), list(weights), list(scale), list(shift))
    means = grids(pyramid_pool(x, scales, backend=backend), scales)
    maps = [
        conv_bn_relu(grid, *branch, backend=backend) for grid, *branch in zip(means, weights, scale, shift, strict=True)
    ]
    return torch.cat([y.flatten(2).transpose(1, 2) for y in maps], dim=1)


def reference(
    x: torch.Tensor,
    scales: Sequence[int],
    weights: Sequence[torch.Tensor],
    scale: Sequence[torch.Tensor],
    shift: Sequence[torch.Tensor],
) -> torch.Tensor:
    """The definition of `pool_conv_bn_relu`."""
    branches = []
    for s, weight, a, b in zip(scales, weights, scale, shift, strict=True):
        y = F.conv2d(F.adaptive_avg_pool2d(x, s), weight) * a[:, None, None] + b[:, None, None]
        branches.append(F.relu(y).to(x.dtype).flatten(2).transpose(1, 2))
    return torch.cat(branches, dim=1)

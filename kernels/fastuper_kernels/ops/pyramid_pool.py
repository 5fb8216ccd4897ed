"""Averages of a map over grids of several scales: the pooling of PSPNet's pyramid (https://arxiv.org/abs/1612.01105)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from fastuper_kernels.cpu.band import pool_matrix
from fastuper_kernels.dispatch.backend import takes_triton
from fastuper_kernels.dispatch.modes import is_eager, is_ordinary, without_autocast


def pyramid_pool(x: torch.Tensor, scales: Sequence[int], *, backend: str = "auto") -> torch.Tensor:
    """Return the means of a map over s x s cells for each scale s, as `F.adaptive_avg_pool2d` divides it.

    The rows of all scales are pooled in one read of the map, by one small matrix.

    Args:
        x: (B, C, H, W).
        scales: cells along each side.
        backend: "auto", "triton" or "torch"; see `fastuper_kernels.dispatch.backend`.

    Returns:
        (B, sum of s * s, C): for each scale in turn its cells, row by row; of x's dtype, added up in float32 at least.

    Raises:
        ValueError: no scales, or one below 1; x is no map, or an empty one; a backend that cannot take it.
    """
    if not scales or min(scales) < 1:
        raise ValueError(f"scales must be one or more numbers from 1, got {list(scales)}")
    if x.ndim != 4 or min(x.shape[2:]) < 1 or not x.is_floating_point():
        raise ValueError(f"x must be (B, C, H, W) of floating-point numbers, got {tuple(x.shape)} of {x.dtype}")
    if takes_triton(backend, x):
        from fastuper_kernels.gpu.pyramid_pool import pyramid_pool as kernel

        return kernel(x, list(scales))
    if is_eager() and not is_ordinary(x):
        return reference(x, scales)
    batch, channels, height, width = x.shape
    wide = x.permute(0, 2, 3, 1).to(torch.promote_types(x.dtype, torch.float32))
    with without_autocast(x):  # a mean in bfloat16 weights would be off by the same share everywhere
        rows = torch.cat([pool_matrix(height, scale, wide.dtype, wide.device) for scale in scales])
        pooled = rows @ wide.reshape(batch, height, width * channels)
        cells = []
        for line, scale in zip(pooled.split(list(scales), dim=1), scales, strict=True):
            columns = pool_matrix(width, scale, wide.dtype, wide.device)
            cells.append((columns @ line.reshape(batch * scale, width, channels)).view(batch, scale * scale, channels))
    return torch.cat(cells, dim=1).to(x.dtype)


def grids(cells: torch.Tensor, scales: Sequence[int]) -> list[torch.Tensor]:
    """Return `pyramid_pool`'s cells (B, sum of s * s, C) as a map (B, C, s, s) for each scale s; views of them."""
    parts = cells.transpose(1, 2).split([scale * scale for scale in scales], dim=2)
    return [part.unflatten(2, (scale, scale)) for part, scale in zip(parts, scales, strict=True)]


def reference(x: torch.Tensor, scales: Sequence[int]) -> torch.Tensor:
    """The definition of `pyramid_pool`."""
    return torch.cat([F.adaptive_avg_pool2d(x, scale).flatten(2).transpose(1, 2) for scale in scales], dim=1)

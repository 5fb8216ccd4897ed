"""Means of a map over grids of several scales: the pooling of PSPNet's pyramid (https://arxiv.org/abs/1612.01105)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from fastuper_kernels.cpu.band import POOLINGS, Band, pool_matrix
from fastuper_kernels.dispatch.backend import takes_triton
from fastuper_kernels.dispatch.modes import is_eager, is_ordinary, without_autocast


def pyramid_pool(
    x: torch.Tensor, scales: Sequence[int], *, pooling: str = "adaptive", backend: str = "auto"
) -> torch.Tensor:
    """Return the means of a map over s x s cells for each scale s.

    One small matrix pools the rows for all scales, in one read of the map.

    Args:
        x: (B, C, H, W).
        scales: the numbers s of cells along each side.
        pooling: "adaptive" takes the cells of `F.adaptive_avg_pool2d`, which are whole pixels. "precise_roi" divides
            the map, from 0 to H and from 0 to W, into s x s equal cells. It takes the mean over each cell of the
            bilinear interpolation between the pixels (precise RoI pooling, https://arxiv.org/abs/1807.11590). Pixel i
            has the coordinate i, and the interpolation falls to zero beyond the map.
        backend: "auto", "triton" or "torch"; see `fastuper_kernels.dispatch.backend`.

    Returns:
        (B, sum of s * s, C): for each scale in turn its cells, row by row; in x's dtype, added up in float32 at least.

    Raises:
        ValueError: no scales, or a scale below 1; x is not a map, or is empty; there is no such pooling; or the backend
            cannot take x.
    """
    if not scales or min(scales) < 1:
        raise ValueError(f"scales must be one or more positive numbers, got {list(scales)}")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    if x.ndim != 4 or min(x.shape[2:]) < 1 or not x.is_floating_point():
        raise ValueError(f"x must be (B, C, H, W) of floating-point numbers, got {tuple(x.shape)} of {x.dtype}")
    if takes_triton(backend, x):
        from fastuper_kernels.gpu.pyramid_pool import pyramid_pool as kernel

        return kernel(x, list(scales), pooling)
    if is_eager() and not is_ordinary(x):
        return reference(x, scales, pooling=pooling)
    batch, channels, height, width = x.shape
    wide = x.permute(0, 2, 3, 1).to(torch.promote_types(x.dtype, torch.float32))
    if not is_eager():
        return torch.cat([_traced(wide, scale, pooling) for scale in scales], dim=1).to(x.dtype)
    with without_autocast(x):  # weights rounded to bfloat16 would scale all means by the same wrong factor
        rows = torch.cat([pool_matrix(pooling, height, scale, wide.dtype, wide.device) for scale in scales])
        pooled = rows @ wide.reshape(batch, height, width * channels)
        cells = []
        for line, scale in zip(pooled.split(list(scales), dim=1), scales, strict=True):
            columns = pool_matrix(pooling, width, scale, wide.dtype, wide.device)
            cells.append((columns @ line.reshape(batch * scale, width, channels)).view(batch, scale * scale, channels))
    return torch.cat(cells, dim=1).to(x.dtype)


def _traced(x: torch.Tensor, scale: int, pooling: str) -> torch.Tensor:
    """Return the cells (B, scale * scale, C) of x (B, H, W, C), whose size may be symbolic.

    The sums are no matrix products: runtimes with bfloat16 as their default would round the operands of a product.
    """
    band = POOLINGS[pooling]
    rows = band(x.shape[1], scale, device=x.device).gather_at_once(x, 1)
    cells = band(x.shape[2], scale, device=x.device).gather_at_once(rows, 2)
    return cells.flatten(1, 2)


def grids(cells: torch.Tensor, scales: Sequence[int]) -> list[torch.Tensor]:
    """Return the cells (B, sum of s * s, C) of `pyramid_pool` as a view (B, C, s, s) for each scale s."""
    parts = cells.transpose(1, 2).split([scale * scale for scale in scales], dim=2)
    return [part.view(*part.shape[:2], scale, scale) for part, scale in zip(parts, scales, strict=True)]


def reference(x: torch.Tensor, scales: Sequence[int], *, pooling: str = "adaptive") -> torch.Tensor:
    """The definition of `pyramid_pool`."""
    pool = {"adaptive": F.adaptive_avg_pool2d, "precise_roi": _precise_roi_pool2d}[pooling]
    return torch.cat([pool(x, scale).flatten(2).transpose(1, 2) for scale in scales], dim=1)


def _precise_roi_pool2d(x: torch.Tensor, scale: int) -> torch.Tensor:
    """Return the cells (B, C, scale, scale) of precise RoI pooling, by operators that any subclass of Tensor has."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    for dim in (2, 3):
        lines = y.unbind(dim)
        weights = Band.precise_roi_pool(len(lines), scale).dense().tolist()
        y = torch.stack([sum(w * line for w, line in zip(row, lines, strict=True) if w) for row in weights], dim)
    return y.to(x.dtype)

"""The step of a feature pyramid's top-down path: a coarser level is resampled and added to a finer level."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fastuper_kernels.cpu import matrices
from fastuper_kernels.dispatch.backend import takes_triton
from fastuper_kernels.dispatch.modes import check_dtypes, written_for


def upsample_add(x: torch.Tensor, lateral: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Return `lateral + bilinear(x to lateral's size)`, align_corners=False.

    Args:
        x: the coarser level, (B, C, h, w).
        lateral: the finer level, (B, C, H, W), of the same dtype and on the same device.
        backend: "auto", "triton" or "torch"; see `fastuper_kernels.dispatch.backend`.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: x or lateral is not a map or is empty, the two differ in batch, channels or dtype, or the backend
            cannot take them. Under autocast the dtypes may differ; the sum then has the wider dtype.
    """
    if not x.ndim == lateral.ndim == 4:
        raise ValueError(f"x and lateral must be (B, C, H, W), got {tuple(x.shape)} and {tuple(lateral.shape)}")
    if x.shape[:2] != lateral.shape[:2]:
        raise ValueError(f"x {tuple(x.shape)} and lateral {tuple(lateral.shape)} must agree in batch and channels")
    if 0 in x.shape[2:] or 0 in lateral.shape[2:]:  # not min(): Dynamo would compile a graph for each order of sizes
        raise ValueError(f"x {tuple(x.shape)} and lateral {tuple(lateral.shape)} must not be empty")
    check_dtypes(x=x, lateral=lateral)
    if x.dtype == lateral.dtype and takes_triton(backend, x, lateral):
        from fastuper_kernels.gpu.upsample_add import upsample_add as kernel

        return kernel(x, lateral)
    if written_for() is not None:
        return lateral + matrices.resample(x, lateral.shape[2:])
    return reference(x, lateral)


def reference(x: torch.Tensor, lateral: torch.Tensor) -> torch.Tensor:
    """The definition of `upsample_add`, and the fastest way on a CPU."""
    return lateral + F.interpolate(x, size=lateral.shape[2:], mode="bilinear", align_corners=False)

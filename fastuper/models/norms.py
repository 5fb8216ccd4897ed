"""BatchNorm, called or folded to a scale and a shift."""

from __future__ import annotations

import functools
import logging

import torch
from torch import nn

from fastuper.models.untouched import is_untouched
from fastuper_kernels import fold_norm
from fastuper_kernels.dispatch.modes import is_jit_tracing, written_for

logger = logging.getLogger(__name__)

FIXED_IN_EVALUATION: set[type[nn.Module]] = {nn.BatchNorm2d, nn.SyncBatchNorm}
"""Classes of norms that are a scale and a shift in evaluation. `fastuper.patch` adds those of other libraries."""


def is_fixed_norm(norm: nn.Module) -> bool:
    """Return True if a module is an untouched BatchNorm in evaluation with gradients off: a fixed scale and shift."""
    if type(norm) not in FIXED_IN_EVALUATION or not is_untouched(norm):
        return False
    # `torch.jit.trace` traces with the caller's gradients, and again without gradients to check the first trace.
    # An exporter that writes for a runtime traces once.
    twice = is_jit_tracing() and written_for() is None
    return not (norm.training or norm.running_var is None or torch.is_grad_enabled() or twice)


def fold(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale and shift (C,) of a BatchNorm in evaluation, in float32 or wider; computed at every call."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return fold_norm(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)


def batch_norm(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return `norm(x)` of a map (B, C, H, W), also in training on a single cell (1, C, 1, 1).

    A single value has no variance, and PyTorch raises an error. There the running statistics are used: the pyramid
    pooling averages an image to one cell, and a model can be trained on one image at a time. SyncBatchNorm is called as
    usual: other ranks may hold more cells, and they wait for this rank.
    """
    has_statistics = isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None
    if not norm.training or not has_statistics or x.shape[0] != 1 or tuple(x.shape[2:]) != (1, 1):
        return norm(x)
    if not torch.compiler.is_compiling():
        warn_once(
            "BatchNorm over a single cell of a single image uses its running statistics, because one value has no "
            "variance; train on two or more images in a batch to use the batch's statistics"
        )
    norm.training = False
    try:
        return norm(x)  # the module is called, so that its hooks run
    finally:
        norm.training = True


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning the first time that it is given."""
    logger.warning(message)

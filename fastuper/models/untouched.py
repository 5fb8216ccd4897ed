"""Detects hooked, replaced or quantised modules, which must run as they are; and BatchNorm, called or folded.

LoRA, pruning, quantisation, hooks, offloading and parametrizations replace a module or hook it. A faster way may stand
in for a module only if nobody has touched the module.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import nn

from fastuper_kernels import fold_norm
from fastuper_kernels.dispatch.torch_private import (
    PARAMETER_CLASSES,
    children_of,
    has_global_hooks,
    has_hooks,
    parameters_of,
)

logger = logging.getLogger(__name__)


def is_untouched(*modules: nn.Module) -> bool:
    """Return True if no hook, subclass or parametrization changes these modules. Their children are not checked.

    A module is touched where a hook is registered on it (or on all modules), where its instance has another `forward`,
    where its class is neither PyTorch's nor this library's, where it has parametrizations, or where one of its
    parameters is not an ordinary tensor (a quantised one, for example).
    """
    if has_global_hooks():
        return False
    for module in modules:
        if type(module).__module__.split(".")[0] not in ("torch", "fastuper") or "parametrizations" in children_of(
            module
        ):
            return False
        if _is_replaced(module) or has_hooks(module):
            return False
        if any(type(p) not in PARAMETER_CLASSES for p in parameters_of(module).values() if p is not None):
            return False
    return True


def _is_replaced(module: nn.Module) -> bool:
    """Return True if the instance has a `forward` other than its class's.

    Accelerate, when it removes its hooks, leaves the class's own `forward` on the instance.
    """
    forward = module.__dict__.get("forward")
    if forward is None:
        return False
    return getattr(forward, "__func__", None) is not type(module).forward or forward.__self__ is not module


def is_exactly(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return True if a module is untouched and its class is `kind` itself, not a subclass."""
    return type(module) is kind and is_untouched(module)


def is_supported_conv(conv: nn.Module) -> bool:
    """Return True if a module is an untouched convolution that `conv_bn_relu` supports: 1x1 or 3x3, stride 1."""
    return (
        is_exactly(conv, nn.Conv2d)
        and (conv.kernel_size, conv.padding) in (((1, 1), (0, 0)), ((3, 3), (1, 1)))
        and (conv.stride, conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), (1, 1), 1, "zeros")
    )


def is_fixed_norm(norm: nn.Module) -> bool:
    """Return True if a module is an untouched BatchNorm in evaluation with gradients off: a fixed scale and shift."""
    if not is_exactly(norm, nn.BatchNorm2d):
        return False
    return not (norm.training or norm.running_var is None or torch.is_grad_enabled())


def fold(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale and shift (C,) of a BatchNorm in evaluation, in float32 or wider; computed at every call."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return fold_norm(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)


def batch_norm(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return `norm(x)` of a map (B, C, H, W), also in training on a single cell (1, C, 1, 1).

    A single value has no variance, and PyTorch raises an error. The running statistics are used there, so that one
    image can be trained on although the pyramid pooling averages it to one cell. SyncBatchNorm is called as usual:
    other ranks may hold more cells, and they wait for this rank.
    """
    has_statistics = isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None
    if not norm.training or not has_statistics or x.shape[0] != 1 or tuple(x.shape[2:]) != (1, 1):
        return norm(x)
    if not torch.compiler.is_compiling():
        _warn_once(
            "BatchNorm over a single cell of a single image uses its running statistics, because one value has no "
            "variance; train on two or more images in a batch to use the batch's statistics"
        )
    norm.training = False
    try:
        return norm(x)  # the module is called, so that its hooks run
    finally:
        norm.training = True


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)

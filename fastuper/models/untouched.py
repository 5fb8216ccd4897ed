"""Whether a module is exactly what this library put there, so that its arithmetic may be written in another way.

LoRA, pruning, quantisation, hooks, offloading and parametrizations all work by replacing a module or by hooking it.
Whatever has been touched is called as it stands.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as torch_module

from fastuper_kernels import fold_norm

# Under a tracer (`torch.export`, AOTAutograd) ordinary parameters are stood in for by tensors of these two classes;
# those of a parameter's own class keep that class.
PARAMETERS = (torch.Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = tuple(f"_global{name}" for name in HOOKS)


logger = logging.getLogger(__name__)


def is_untouched(*modules: nn.Module) -> bool:
    """Return whether nothing sees these modules being called, and whether their classes are ours or PyTorch's own.

    Children are not looked at. A module is not plain where a hook is registered on it (or on all modules), where its
    `forward` has been replaced on the instance, where its class is somebody's subclass or parametrization, or where
    one of its parameters is no ordinary tensor.
    """
    if any(getattr(torch_module, name) for name in GLOBAL_HOOKS):
        return False
    for module in modules:
        if type(module).__module__.split(".")[0] not in ("torch", "fastuper") or "parametrizations" in module._modules:
            return False
        if _is_replaced(module) or any(module.__dict__.get(name) for name in HOOKS):
            return False
        if any(type(p) not in PARAMETERS for p in module._parameters.values() if p is not None):
            return False
    return True


def _is_replaced(module: nn.Module) -> bool:
    """Return whether the instance has a `forward` of its own. Accelerate, taking its hooks away, leaves the class's."""
    forward = module.__dict__.get("forward")
    if forward is None:
        return False
    return getattr(forward, "__func__", None) is not type(module).forward or forward.__self__ is not module


def is_exactly(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a module is plain and of this very class, not of a subclass."""
    return type(module) is kind and is_untouched(module)


def is_supported_conv(conv: nn.Module) -> bool:
    """Return whether a module is a convolution that `conv_bn_relu` computes, and nobody has touched it."""
    return (
        is_exactly(conv, nn.Conv2d)
        and (conv.kernel_size, conv.padding) in (((1, 1), (0, 0)), ((3, 3), (1, 1)))
        and (conv.stride, conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), (1, 1), 1, "zeros")
    )


def is_fixed_norm(norm: nn.Module) -> bool:
    """Return whether a module is a BatchNorm that is a fixed scale and shift here, and nobody has touched it.

    It is one in evaluation with gradients off.
    """
    if not is_exactly(norm, nn.BatchNorm2d):
        return False
    return not (norm.training or norm.running_var is None or torch.is_grad_enabled())


def fold(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a BatchNorm's scale and shift (C,) in evaluation, in float32 at least; computed at every call."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return fold_norm(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)


def batch_norm(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return `norm(x)` of a map (B, C, H, W): in training, with running statistics where x is one cell of one image.

    A single value has no variance, so that PyTorch refuses it: an image alone, averaged over the whole map, could not
    be trained on. SyncBatchNorm is left to do what it does: other ranks may hold more, and wait for this one.
    """
    has_statistics = isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None
    if not norm.training or not has_statistics or x.shape[0] != 1 or tuple(x.shape[2:]) != (1, 1):
        return norm(x)
    if not torch.compiler.is_compiling():
        _say_once(
            "BatchNorm over a single cell of a single image takes its running statistics, as one value has no "
            "variance; with two images in a batch it would take the batch's own"
        )
    norm.training = False
    try:  # called all the same, for whoever has hooked it
        return norm(x)
    finally:
        norm.training = True


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)

"""Which way an operation may run: blocked loops and packed weights are for plain tensors and eager inference alone."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_eager() -> bool:
    """Return whether operations run at once and on real values: nothing traces, transforms or counts them."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    # A mode (FakeTensorMode, make_fx, FlopCounterMode) wants to see PyTorch's own operators; that of `torch.device`,
    # and of `torch.set_default_device`, says only where tensors are made.
    if torch._C._len_torch_dispatch_stack() or any(
        type(mode) is not DeviceContext for mode in torch.overrides._get_current_function_mode_stack()
    ):
        return False
    # torch.func's transformations; forward-mode differentiation, whose tangents travel where nothing requires grad.
    return torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0


def is_eager_inference(*tensors: torch.Tensor | None) -> bool:
    """Return whether these run eagerly and no gradient flows through them, so that a hand-written path is the same.

    None stands for an operand that is left out. Subclasses of Tensor (quantised, sharded, fake) bring operators of
    their own, which a hand-written path would go past: for them, too, the answer is no.
    """
    if not is_eager():
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    if not all(type(tensor) in PLAIN and tensor.layout == torch.strided for tensor in given):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given))


def autocast(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """Return operands as autocast would hand them to a convolution: in its dtype where it is on, float64 left alone."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def without_autocast(x: torch.Tensor) -> Any:
    """Return a context in which operators keep the dtypes they are given."""
    if x.device.type == "meta":  # has no autocast
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)

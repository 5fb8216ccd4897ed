"""Which way an operation may run: blocked loops and packed weights are for plain tensors and eager inference alone."""

from __future__ import annotations

from contextlib import nullcontext
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
    # torch.func, and forward-mode differentiation, which carries tangents where nothing requires grad.
    return torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0


def is_ordinary(*tensors: torch.Tensor | None) -> bool:
    """Return whether these are ordinary tensors; None stands for an operand that is left out.

    Subclasses of Tensor (quantised, sharded, fake) bring operators of their own, which a hand-written path would go
    past.
    """
    return all(t is None or (type(t) in PLAIN and t.layout == torch.strided) for t in tensors)


def is_eager_inference(*tensors: torch.Tensor | None) -> bool:
    """Return whether these run eagerly and no gradient flows through them, so that a hand-written path is the same."""
    if not is_eager() or not is_ordinary(*tensors):
        return False
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))


def check_dtypes(**tensors: torch.Tensor | None) -> None:
    """Refuse operands of several dtypes, where autocast does not make them one.

    Raises:
        ValueError: the dtypes differ.
    """
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    device = next(tensor.device.type for tensor in tensors.values() if tensor is not None)
    if len(set(dtypes.values())) > 1 and not is_autocast(device):
        raise ValueError(f"operands must be of one dtype, got {dtypes}")


def is_autocast(device: str) -> bool:
    """Return whether autocast is on for a type of device."""
    return _has_autocast(device) and torch.is_autocast_enabled(device)


def _has_autocast(device: str) -> bool:
    # Of a device without it one may not even ask; PyTorch 2.11 cannot trace torch.amp.is_autocast_available.
    return device != "meta"


def autocast(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """Return operands as autocast would hand them to a convolution: in its dtype where it is on, float64 left alone."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not is_autocast(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def current_autocast(device: str) -> Any:
    """Return a context in which autocast is what it is now, for a type of device, wherever the context is entered."""
    if not _has_autocast(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device))


def without_autocast(x: torch.Tensor) -> Any:
    """Return a context in which operators keep the dtypes they are given."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if _has_autocast(device) else nullcontext()

"""Checks of the modes that an operation runs under: tracing, transforms, gradients, autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, TypeAlias, TypeVar

import torch

from fastuper_kernels.dispatch.torch_private import free_sizes, has_modes, in_forward_ad, in_transform

Function = TypeVar("Function", bound=Callable[..., Any])

ORDINARY = (torch.Tensor, torch.nn.Parameter)


def is_eager() -> bool:
    """Return True if operations run at once and on real values: no tracer, transform or mode is active."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not (has_modes() or in_transform() or in_forward_ad())


def is_jit_tracing() -> bool:
    """Return True while `torch.jit.trace`, or an exporter that uses it, runs."""
    return not torch.compiler.is_compiling() and torch.jit.is_tracing()


Runtime: TypeAlias = Literal["onnxruntime", "openvino"]
_written: tuple[Runtime, bool, torch.dtype] | None = None


@contextmanager
def writing_for(runtime: Runtime, *, one_size: bool = False, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """While this context is active, traced operations are written as a runtime computes them fastest.

    It changes neither eager runs nor results beyond rounding. Whoever exports a model for a runtime traces it inside.
    Only one thread at a time may trace for a runtime.

    Args:
        runtime: the runtime.
        one_size: True if the graph is for images of the traced height and width only.
        dtype: the dtype in which the runtime computes, also if float32 is traced.
    """
    global _written
    before, _written = _written, (runtime, one_size, dtype)
    try:
        yield
    finally:
        _written = before


def written_for() -> Runtime | None:
    """Return the runtime that the graph is written for, see `writing_for`; None for PyTorch, and if nothing traces."""
    return None if _written is None or is_eager() else _written[0]


def written_dtype() -> torch.dtype | None:
    """Return the dtype in which the runtime computes that the graph is written for; None if it is for PyTorch."""
    return None if _written is None or is_eager() else _written[2]


def as_written(size: Sequence[Any]) -> tuple[Any, ...]:
    """Return the sizes of a map as the graph has them: integers if it is for one size, else what the tracer follows."""
    return tuple(int(side) for side in size) if _written is not None and _written[1] else tuple(size)


def is_known(condition: Any) -> bool:
    """Return True if a condition on sizes holds, in a graph with free sizes for all sizes of its range."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # it takes time to import

    return statically_known_true(condition)


def for_all_sizes(forward: Function) -> Function:
    """Return a forward whose free sizes torch.export keeps free, also if they are 1 in the example."""

    @functools.wraps(forward)
    def called(*args: Any, **kwargs: Any) -> Any:
        # Dynamo cannot trace the context: a strict export is valid for sizes like its example's.
        if not torch.compiler.is_exporting() or torch.compiler.is_dynamo_compiling():
            return forward(*args, **kwargs)
        with free_sizes():
            return forward(*args, **kwargs)

    return called  # type: ignore[return-value]


def is_ordinary(*tensors: torch.Tensor | None) -> bool:
    """Return True if all tensors are strided and of PyTorch's own classes, Tensor or Parameter.

    Subclasses of Tensor (quantised, sharded, fake) replace PyTorch's operators by their own. A path that works on
    memory would skip these operators.

    Args:
        tensors: None stands for an operand that is left out.
    """
    return all(t is None or (type(t) in ORDINARY and t.layout == torch.strided) for t in tensors)


def is_eager_inference(*tensors: torch.Tensor | None) -> bool:
    """Return True if operations on these tensors run eagerly and record no gradient.

    Args:
        tensors: None stands for an operand that is left out.
    """
    if not is_eager() or not is_ordinary(*tensors):
        return False
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))


def check_dtypes(**tensors: torch.Tensor | None) -> None:
    """Check that the operands have one dtype, unless autocast is on.

    Raises:
        ValueError: the dtypes differ.
    """
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    device = next(tensor.device.type for tensor in tensors.values() if tensor is not None)
    if len(set(dtypes.values())) > 1 and not is_autocast(device):
        raise ValueError(f"operands must be of one dtype, got {dtypes}")


def is_autocast(device: str) -> bool:
    """Return True if autocast is on for a type of device."""
    return _has_autocast(device) and torch.is_autocast_enabled(device)


def _has_autocast(device: str) -> bool:
    # On a device without autocast the query itself raises an error. PyTorch 2.11 cannot trace
    # torch.amp.is_autocast_available.
    return device != "meta"


def autocast(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """Return the operands in the dtype that autocast gives a convolution's; float64 and None stay as they are."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not is_autocast(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def current_autocast(device: str) -> Any:
    """Return a context that restores the autocast state at the time of this call, for a type of device."""
    if not _has_autocast(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device))


def without_autocast(x: torch.Tensor) -> Any:
    """Return a context without autocast on x's device."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if _has_autocast(device) else nullcontext()

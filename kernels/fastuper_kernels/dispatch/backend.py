"""The choice between Triton's kernels and PyTorch's operators."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from fastuper_kernels.dispatch.modes import is_eager, is_ordinary

VARIABLE = "FASTUPER_BACKEND"
BACKENDS = ("auto", "triton", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def takes_triton(backend: str, *tensors: torch.Tensor | None, obstacle: str | None = None) -> bool:
    """Return True if an operation on these operands runs Triton's kernels.

    Args:
        backend: "triton", "torch" or "auto". With "auto" the environment variable `FASTUPER_BACKEND` decides. If the
            variable is unset or "auto" too, operands on a GPU take Triton's kernels. Even there float64, subclasses of
            Tensor, exported calls and torch.func transforms take PyTorch's operators.
        tensors: the operands. The device and the dtype of the first operand decide. None stands for an operand that
            is left out.
        obstacle: the reason that the operation's kernels cannot take its other arguments; None if they can.

    Raises:
        ValueError: `backend` is unknown, or "triton" although the kernels cannot take these operands. The message
            gives the reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    given = [tensor for tensor in tensors if tensor is not None]
    if backend == "auto":
        backend = _of_environment()
        if backend == "auto":
            return given[0].is_cuda and obstacle is None and _obstacle(given) is None
    if backend == "torch":
        return False
    if reason := obstacle or _obstacle(given):
        raise ValueError(f'backend="triton": {reason}')
    return True


def interpreted() -> bool:
    """Return True if Triton runs its kernels in its interpreter, on any device (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@torch.compiler.assume_constant_result
def _of_environment() -> str:
    value = os.environ.get(VARIABLE) or "auto"
    if value not in BACKENDS:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(BACKENDS)}, got {value!r}")
    return value


def _obstacle(tensors: list[torch.Tensor]) -> str | None:
    """Return the reason that Triton's kernels cannot take these operands; None if they can."""
    first = tensors[0]
    if any(tensor.device != first.device for tensor in tensors):
        return f"the operands are on several devices: {sorted({str(tensor.device) for tensor in tensors})}"
    if reason := _obstacle_of_device(first.device.type):
        return reason
    if first.dtype not in DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {first.dtype}"
    if _is_exporting():
        return "an exported graph may hold only PyTorch's own operators"
    if torch.compiler.is_compiling():
        return None
    if not is_eager():
        return "a tracer, a transform or a mode is active, which needs PyTorch's own operators"
    return None if is_ordinary(*tensors) else "an operand is a subclass of Tensor, or not strided"


@torch.compiler.assume_constant_result
def _is_exporting() -> bool:
    # Not traced: Dynamo of PyTorch 2.11 takes torch.compiler.is_exporting() for True in every trace.
    return torch.compiler.is_exporting()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def _obstacle_of_device(device: str) -> str | None:
    if not _has_triton():
        return "Triton is not installed"
    if device != "cuda" and not interpreted():
        return (
            f"the kernels run on a GPU, not on {device} (or on any device in Triton's interpreter, TRITON_INTERPRET=1)"
        )
    return None

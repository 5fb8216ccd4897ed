"""Which of the two paths an operation takes: Triton's kernels, or PyTorch's operators."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from fastuper_kernels.dispatch.modes import is_eager, is_ordinary

VARIABLE = "FASTUPER_BACKEND"
BACKENDS = ("auto", "triton", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def takes_triton(backend: str, *tensors: torch.Tensor | None) -> bool:
    """Return whether an operation on these operands takes its Triton path.

    Args:
        backend: "torch", "triton", or "auto": what the environment variable `FASTUPER_BACKEND` says, and where it says
            nothing, Triton on a GPU. Float64, subclasses of Tensor, exported and functionally transformed calls take
            PyTorch's operators then.
        tensors: the operands; the first one's device and dtype decide. None stands for one that is left out.

    Raises:
        ValueError: `backend` is none of these, or "triton" where its kernels cannot run: the message says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    given = [tensor for tensor in tensors if tensor is not None]
    if backend == "auto":
        backend = _of_environment()
        if backend == "auto":
            return given[0].is_cuda and _why_not(given) is None
    if backend == "torch":
        return False
    if reason := _why_not(given):
        raise ValueError(f'backend="triton": {reason}')
    return True


def interpreted() -> bool:
    """Return whether Triton's kernels are run by its interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@torch.compiler.assume_constant_result
def _of_environment() -> str:
    value = os.environ.get(VARIABLE) or "auto"
    if value not in BACKENDS:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(BACKENDS)}, got {value!r}")
    return value


def _why_not(tensors: list[torch.Tensor]) -> str | None:
    """Return why Triton's kernels cannot take these operands; None where they can."""
    first = tensors[0]
    if any(tensor.device != first.device for tensor in tensors):
        return f"the operands are on several devices: {sorted({str(tensor.device) for tensor in tensors})}"
    if reason := _why_not_here(first.device.type):
        return reason
    if first.dtype not in DTYPES:
        return f"its kernels take float32, bfloat16 and float16, not {first.dtype}"
    if _is_exporting():
        return "an exported graph holds PyTorch's own operators alone"
    if torch.compiler.is_compiling():
        return None
    if not is_eager():
        return "PyTorch's own operators are what is traced, transformed or counted here"
    return None if is_ordinary(*tensors) else "an operand is a subclass of Tensor, or not strided"


@torch.compiler.assume_constant_result
def _is_exporting() -> bool:
    # Dynamo of PyTorch 2.11 takes torch.compiler.is_exporting() for true wherever it traces: so it is not let in here.
    return torch.compiler.is_exporting()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def _why_not_here(device: str) -> str | None:
    if not _has_triton():
        return "Triton is not installed"
    if device != "cuda" and not interpreted():
        return f"its kernels run on a GPU, not on {device} (or anywhere under its interpreter, TRITON_INTERPRET=1)"
    return None

"""Refuses models that do not fit into the machine's memory."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

Function = TypeVar("Function", bound=Callable[..., Any])


FACTORIES = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.empty_like})
"""The functions that make the parameters and buffers of modules."""


def memory_of(device: torch.device) -> float:
    """Return the memory of a GPU, or of the machine for other devices, in bytes; infinity where it is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "meta":
        return float("inf")
    limits = [float("inf")]
    if hasattr(os, "sysconf"):  # not on Windows
        import resource

        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        limits += [limit for limit in resource.getrlimit(resource.RLIMIT_AS)[:1] if limit != resource.RLIM_INFINITY]
    container = Path("/sys/fs/cgroup/memory.max")
    if container.is_file() and (text := container.read_text().strip()).isdecimal():
        limits.append(int(text))
    return min(limits)


def check_memory(size: int, device: torch.device) -> None:
    """Raise RuntimeError if `size` bytes of parameters and buffers exceed a device's memory."""
    limit = memory_of(device)
    if size > limit:
        raise RuntimeError(
            f"the configuration describes a model of {size / 2**30:,.1f} GB, and this machine has "
            f"{limit / 2**30:,.1f} GB of memory ({device.type}): check its numbers of channels, blocks and classes"
        )


class _Counted(TorchFunctionMode):
    """Adds up the memory of the tensors that are made in the context, in this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in FACTORIES and not result.is_meta:
            self.size += result.nbytes
            check_memory(self.size, result.device)
        return result


def within_memory(build: Function) -> Function:
    """Return a function that builds a module, and stops where the module would exceed the machine's memory.

    PyTorch reserves the memory of a tensor before it is filled: what does not fit is never touched.
    """

    @functools.wraps(build)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            with _Counted():
                return build(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
                raise
            raise RuntimeError(
                "the machine has not enough memory for the model that the configuration describes: check its numbers "
                "of channels, blocks and classes"
            ) from None

    return guarded  # type: ignore[return-value]

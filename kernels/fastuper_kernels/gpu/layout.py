"""The memory layout of the kernels' operands: channels last. Maps and weights in another layout are copied."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def on_its_device(function: Function) -> Function:
    """Make a function launch its kernels on the device of its first argument, a tensor or a sequence of tensors."""

    @functools.wraps(function)
    def wrapper(first: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(first if isinstance(first, torch.Tensor) else first[0]):
            return function(first, *args, **kwargs)

    return cast(Function, wrapper)


def has_descriptor(x: torch.Tensor) -> bool:
    """Return True if TMA can move boxes of x: its address and the strides of its rows are multiples of 16 bytes."""
    starts = [x.shape[-1], *(stride for n, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1)]
    return x.data_ptr() % 16 == 0 and all(start * x.element_size() % 16 == 0 for start in starts)


def nhwc(x: torch.Tensor) -> torch.Tensor:
    """Return x (B, C, H, W) as dense (B, H, W, C): a view if x is in channels_last memory, else a copy."""
    return x.permute(0, 2, 3, 1).contiguous()


def from_nhwc(x: torch.Tensor) -> torch.Tensor:
    """Return dense x (B, H, W, C) as a view (B, C, H, W) in channels_last memory."""
    return x.permute(0, 3, 1, 2)


def taps_of(weight: torch.Tensor) -> torch.Tensor:
    """Return weight (C_out, C, k, k) as (C_out, k * k, C), the channels of a tap contiguous.

    The result is a view if the weight, or the weight that it is a slice of, is in channels_last memory.
    """
    taps = weight.permute(0, 2, 3, 1)
    if taps.stride(3) == 1 and (taps.shape[1] == 1 or taps.stride(1) == taps.shape[2] * taps.stride(2)):
        return taps.flatten(1, 2)
    return taps.contiguous().flatten(1, 2)

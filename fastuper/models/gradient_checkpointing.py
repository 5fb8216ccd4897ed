"""Gradient checkpointing: activations are let go after the forward pass, and computed again for the backward one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from fastuper_kernels.dispatch.modes import is_eager


class Checkpointed(nn.Module):
    """Base of the blocks that are computed again where `gradient_checkpointing` is on; it acts in training alone."""

    gradient_checkpointing = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, keeping no more than its inputs for the backward pass where checkpointing is on."""
        call = partial(super().__call__, **kwargs)
        return checkpointed(call, self, *args) if self.gradient_checkpointing and self.training else call(*args)


def checkpointed(call: Callable[..., Any], module: nn.Module, *args: Any) -> Any:
    """Return `call(*args)`, which runs a module; what its backward pass needs is computed again then.

    Random numbers are drawn as before, and BatchNorm's running statistics are counted once.
    """
    if not torch.is_grad_enabled():
        return call(*args)
    if torch.compiler.is_compiling():  # the compiled graph changes no buffer a second time, and takes no contexts
        return checkpoint(call, *args, use_reentrant=False)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _on_copies_of_statistics(module)

    return checkpoint(call, *args, use_reentrant=False, context_fn=contexts)


def recomputed(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Return `function(x)`, keeping x alone for the backward pass: for a cheap step before a linear layer.

    The step is taken again then, and the layer, which needs no more than its input, is not. Whatever traces decides by
    itself what it keeps.
    """
    if not torch.is_grad_enabled() or not is_eager():
        return function(x)
    result: torch.Tensor = checkpoint(function, x, use_reentrant=False)
    return result


@contextmanager
def _on_copies_of_statistics(module: nn.Module) -> Iterator[None]:
    """Let the BatchNorms of a module update copies of their buffers, which are forgotten at the end."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    buffers = [dict(norm._buffers) for norm in norms]
    try:
        for norm, own in zip(norms, buffers, strict=True):
            norm._buffers.update({name: None if buffer is None else buffer.clone() for name, buffer in own.items()})
        yield
    finally:
        for norm, own in zip(norms, buffers, strict=True):
            norm._buffers.update(own)

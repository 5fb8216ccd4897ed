"""Gradient checkpointing: recompute activations in the backward pass to save memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastuper_kernels.dispatch.modes import is_eager, is_jit_tracing
from fastuper_kernels.dispatch.torch_private import BatchNorm, buffers_of


class Checkpointed(nn.Module):
    """Base of the modules whose activations are recomputed; `gradient_checkpointing` acts in training only."""

    gradient_checkpointing = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; with checkpointing on, only its inputs are kept for the backward pass."""
        call = partial(super().__call__, **kwargs)
        return checkpointed(call, self, *args) if self.gradient_checkpointing and self.training else call(*args)


def checkpointed(call: Callable[..., Any], module: nn.Module, *args: Any) -> Any:
    """Return `call(*args)`, a call of `module`; the backward pass recomputes its activations.

    The recomputation draws the same random numbers, and does not update BatchNorm's running statistics again.
    """
    if not torch.is_grad_enabled() or is_jit_tracing():  # a traced graph recomputes nothing
        return call(*args)
    if torch.compiler.is_compiling():  # a compiled graph updates no buffer twice, and Dynamo takes no context_fn
        return checkpoint(call, *args, use_reentrant=False)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _on_copies_of_statistics(module)

    return checkpoint(call, *args, use_reentrant=False, context_fn=contexts)


def recomputed(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Return `function(x)`, keeping only x for the backward pass: for a cheap step before a linear layer.

    The backward pass recomputes the step but not the layer, which needs only its input. Under a tracer the step is not
    checkpointed, because tracers choose the tensors to keep.
    """
    if not torch.is_grad_enabled() or not is_eager():
        return function(x)
    result: torch.Tensor = checkpoint(function, x, use_reentrant=False)
    return result


@contextmanager
def _on_copies_of_statistics(module: nn.Module) -> Iterator[None]:
    """Within this context the BatchNorms of a module update copies of their buffers; the originals come back after."""
    norms = [part for part in module.modules() if isinstance(part, BatchNorm)]
    buffers = [dict(buffers_of(norm)) for norm in norms]
    try:
        for norm, own in zip(norms, buffers, strict=True):
            buffers_of(norm).update({name: None if buffer is None else buffer.clone() for name, buffer in own.items()})
        yield
    finally:
        for norm, own in zip(norms, buffers, strict=True):
            buffers_of(norm).update(own)


class GradientCheckpointingMixin(nn.Module):
    """The methods by which users and Transformers' Trainer turn gradient checkpointing on and off.

    The class that inherits it is a model with a `backbone`; its other children are heads.
    """

    supports_gradient_checkpointing = True
    gradient_checkpointing = False
    backbone: Any

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """Recompute activations in the backward pass, block by block, to save memory.

        Args:
            gradient_checkpointing_kwargs: options of `transformers.Trainer`; only `use_reentrant=False` is supported.

        Raises:
            ValueError: another option.
        """
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute activations in the backward pass to save memory; the method's name in Transformers 5.

        Args:
            activation_checkpointing_kwargs: options; only `use_reentrant=False` is supported.
            every_n_layers: recompute only every nth block of the backbone.
            offload: not supported; False.

        Raises:
            ValueError: an option that is not supported.
        """
        options = dict(activation_checkpointing_kwargs or {})
        if options.pop("use_reentrant", False) or options or offload or every_n_layers < 1:
            raise ValueError(
                "gradient checkpointing supports only use_reentrant=False and every_n_layers from 1, got "
                f"{activation_checkpointing_kwargs}, every_n_layers={every_n_layers}, offload={offload}"
            )
        self._set_gradient_checkpointing(every_n_layers)

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations for the backward pass."""
        self._set_gradient_checkpointing(0)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether the backward pass recomputes activations."""
        return self.gradient_checkpointing

    # Their names in Transformers 5.
    activation_checkpointing_disable = gradient_checkpointing_disable
    is_activation_checkpointing = is_gradient_checkpointing

    def _set_gradient_checkpointing(self, every: int) -> None:
        """Turn it on for the heads and for every nth block of the backbone; 0 turns it off."""
        self.gradient_checkpointing = every > 0
        blocks = [module for module in self.backbone.modules() if isinstance(module, Checkpointed)]
        for i, block in enumerate(blocks):
            block.gradient_checkpointing = every > 0 and i % every == 0
        for name, head in self.named_children():
            if name != "backbone" and isinstance(head, Checkpointed):
                head.gradient_checkpointing = every > 0

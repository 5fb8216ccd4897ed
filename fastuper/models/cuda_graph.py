"""A model's work on images of one shape as a CUDA graph: replayed by one launch, where many small ones would wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from fastuper.models.untouched import GLOBAL_HOOKS, HOOKS


class Captured:
    """What a function of a model does with one tensor of a fixed shape, recorded.

    The kernels read the model's parameters where they are, so that weights changed in place (by an optimizer, by
    `load_state_dict`) count at the next call. Parameters that were moved, replaced or converted, modules that were
    replaced or hooked, and modes that have changed are noticed before a replay: the work is then recorded anew. (A hook
    that is there already runs while the work is recorded, and not at a replay.)

    Args:
        model: whose weights are looked at.
        function: called with the static input, without gradients; it must not look at values on the host.
        example: (B, C, H, W) on a GPU; the shape, dtype and device that every call must have.

    Raises:
        ValueError: `example` is not on a GPU.
    """

    def __init__(self, model: nn.Module, function: Callable[[torch.Tensor], Any], example: torch.Tensor):
        if not example.is_cuda:
            raise ValueError(f"a CUDA graph is recorded on a GPU, and pixel_values are on {example.device}")
        self.model, self.function = model, function
        self.input = example.detach().clone(memory_format=torch.preserve_format)
        self._record()

    def __call__(self, pixel_values: torch.Tensor) -> Any:
        """Return the function's result for (B, C, H, W); its tensors are overwritten by the next call.

        Raises:
            ValueError: a shape, dtype or device other than the recorded one.
        """
        mine, given = ((t.shape, t.dtype, t.device) for t in (self.input, pixel_values))
        if mine != given:
            raise ValueError(f"this was recorded for {mine}, got {given}: capture once more for another shape")
        if not self.seen.is_current():
            self._record()
        self.input.copy_(pixel_values)
        self.graph.replay()
        return self.output

    def _record(self) -> None:
        with torch.cuda.device(self.input.device), torch.no_grad():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):  # kernels are compiled, and choices measured, before
                    self.function(self.input)
            torch.cuda.current_stream().wait_stream(stream)
            seen, graph = Seen(self.model), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = self.function(self.input)
        self.seen, self.graph, self.output = seen, graph, output


class Seen:
    """What a recorded graph depends on: the modules, and where their tensors are.

    As flat lists: that a replay looks at them takes less time than the replay.
    """

    def __init__(self, model: nn.Module):
        self.modules = modules = list(model.modules())
        self.hooks = [getattr(owner, name) for owner, name in _hook_owners(modules)]
        self.owners = [owner for m in modules for owner in (m._modules, m._parameters, m._buffers)]
        self.children = [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        self.tensors = [
            (owner, name, tensor, tensor.data_ptr(), tensor.dtype, tensor.stride())
            for module in modules
            for owner in (module._parameters, module._buffers)
            for name, tensor in owner.items()
            if tensor is not None
        ]
        self.state = self._state()

    def is_current(self) -> bool:
        """Return whether all of that is as it was."""
        for owner, name, tensor, place, dtype, stride in self.tensors:
            if owner.get(name) is not tensor or tensor.data_ptr() != place:
                return False
            if tensor.dtype is not dtype or tensor.stride() != stride:
                return False
        for modules, name, child in self.children:
            if modules.get(name) is not child:
                return False
        return self._state() == self.state

    def _state(self) -> tuple[Any, ...]:
        """Return the hooks, how many children and tensors there are, and the modes and own `forward`s."""
        hooks = [tuple(hooks) for hooks in self.hooks if hooks]
        modes = [(module.training, "forward" in module.__dict__) for module in self.modules]
        values = [tensor is not None for owner in self.owners for tensor in owner.values()]
        return hooks, values, modes


def _hook_owners(modules: list[nn.Module]) -> Iterator[tuple[Any, str]]:
    yield from ((torch_module, name) for name in GLOBAL_HOOKS)
    yield from ((module, name) for module in modules for name in HOOKS)

"""CUDA graphs: a model's work on images of one shape, recorded once and replayed by a single launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastuper_kernels.dispatch.torch_private import buffers_of, children_of, global_hooks, hooks_of, parameters_of


class CapturedFunction:
    """A function of a model, recorded as a CUDA graph for images of one shape, dtype and device.

    The recorded kernels read the model's parameters from their memory. Weights changed in place (by an optimizer, by
    `load_state_dict`) therefore take effect at the next call. A call records the graph again if a parameter was moved,
    replaced or converted, a module was replaced or hooked, or a mode has changed. Hooks run while the graph is
    recorded, but not at a replay.

    Args:
        model: the model whose modules and tensors the graph depends on.
        function: takes the images and returns tensors; called without gradients. It must not synchronise with the
            host.
        example: (B, C, H, W) on a GPU; every call takes images of its shape, dtype and device.

    Raises:
        ValueError: `example` is not on a GPU.
    """

    def __init__(self, model: nn.Module, function: Callable[[torch.Tensor], Any], example: torch.Tensor):
        if not example.is_cuda:
            raise ValueError(
                f"a CUDA graph is recorded on a GPU, but pixel_values are on {example.device}; move the model and the "
                "images there"
            )
        self.model, self.function = model, function
        self.input = example.detach().clone(memory_format=torch.preserve_format)
        self._record()

    def __call__(self, pixel_values: torch.Tensor) -> Any:
        """Return the function's result for (B, C, H, W); the next call overwrites its tensors.

        Raises:
            ValueError: the shape, dtype or device is not the recorded one.
        """
        recorded, given = ((t.shape, t.dtype, t.device) for t in (self.input, pixel_values))
        if recorded != given:
            raise ValueError(f"the graph was recorded for {recorded}, got {given}: call capture for this shape too")
        if not self.dependencies.are_unchanged():
            self._record()
        self.input.copy_(pixel_values)
        self.graph.replay()
        return self.output

    def _record(self) -> None:
        with torch.cuda.device(self.input.device), torch.no_grad():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):  # kernels are compiled and choices measured before the recording
                    self.function(self.input)
            torch.cuda.current_stream().wait_stream(stream)
            dependencies, graph = Dependencies(self.model), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = self.function(self.input)
        self.dependencies, self.graph, self.output = dependencies, graph, output


class Dependencies:
    """The state of a model that a recorded graph depends on: its modules, their hooks and modes, and its tensors.

    It is held in flat lists, because every replay compares it with the model: that takes less time than the replay.
    """

    def __init__(self, model: nn.Module):
        self.modules = modules = list(model.modules())
        self.hooks = [*global_hooks(), *(hooks for module in modules for hooks in hooks_of(module))]
        self.owners = [owner for m in modules for owner in (children_of(m), parameters_of(m), buffers_of(m))]
        self.children = [(children_of(m), name, child) for m in modules for name, child in children_of(m).items()]
        self.tensors = [
            (owner, name, tensor, tensor.data_ptr(), tensor.dtype, tensor.stride())
            for module in modules
            for owner in (parameters_of(module), buffers_of(module))
            for name, tensor in owner.items()
            if tensor is not None
        ]
        self.state = self._state()

    def are_unchanged(self) -> bool:
        """Return True if the model still has the same modules, hooks and modes, and its tensors the same memory."""
        for owner, name, tensor, address, dtype, stride in self.tensors:
            if owner.get(name) is not tensor or tensor.data_ptr() != address:
                return False
            if tensor.dtype is not dtype or tensor.stride() != stride:
                return False
        for modules, name, child in self.children:
            if modules.get(name) is not child:
                return False
        return self._state() == self.state

    def _state(self) -> tuple[Any, ...]:
        """Return the hooks, whether each child and tensor exists, the modes, and which instances have a `forward`."""
        hooks = [tuple(hooks) for hooks in self.hooks if hooks]
        modes = [(module.training, "forward" in module.__dict__) for module in self.modules]
        values = [tensor is not None for owner in self.owners for tensor in owner.values()]
        return hooks, values, modes

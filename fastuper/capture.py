"""A model's work on images of one shape as a CUDA graph: replayed by one launch, where many small ones would wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastuper.plain import HOOKS


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
            self.seen = Seen(self.model)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.output = self.function(self.input)


class Seen:
    """What a recorded graph depends on: the modules, and where their tensors are.

    As flat lists: that a replay looks at them takes less time than the replay.
    """

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self.attributes = [module.__dict__ for module in modules]
        self.hooks = [getattr(module, name) for module in modules for name in HOOKS]
        self.children = [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        self.tensors = [
            (owner, name, tensor, tensor.data_ptr(), tensor.dtype)
            for module in modules
            for owner in (module._parameters, module._buffers)
            for name, tensor in owner.items()
            if tensor is not None
        ]
        self.state = self._state()

    def is_current(self) -> bool:
        """Return whether all of that is as it was."""
        for owner, name, tensor, place, dtype in self.tensors:
            if owner.get(name) is not tensor or tensor.data_ptr() != place or tensor.dtype is not dtype:
                return False
        for modules, name, child in self.children:
            if modules.get(name) is not child:
                return False
        return self._state() == self.state

    def _state(self) -> tuple[int, list[bool]]:
        return sum(map(len, self.hooks)), [attributes["training"] for attributes in self.attributes]

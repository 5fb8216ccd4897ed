"""A model's work on images of one shape as a CUDA graph: replayed by one launch, where many small ones would wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Captured:
    """What a function of a model does with one tensor of a fixed shape, recorded.

    The kernels read the model's parameters where they are, so that weights changed in place (by an optimizer, by
    `load_state_dict`) count at the next call. Parameters that were moved, replaced or converted, and modules whose mode
    has changed, are noticed before a replay: the work is then recorded anew.

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
        if self._state() != self.state:
            self._record()
        self.input.copy_(pixel_values)
        self.graph.replay()
        return self.output

    def _record(self) -> None:
        stream = torch.cuda.Stream(self.input.device)
        stream.wait_stream(torch.cuda.current_stream(self.input.device))
        with torch.cuda.device(self.input.device), torch.cuda.stream(stream), torch.no_grad():
            for _ in range(3):  # kernels are compiled, choices measured and bands built before
                self.function(self.input)
        torch.cuda.current_stream(self.input.device).wait_stream(stream)
        self.state = self._state()
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self.graph):
            self.output = self.function(self.input)

    def _state(self) -> list[Any]:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        modes = [module.training for module in self.model.modules()]
        return [*((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors), *modes]

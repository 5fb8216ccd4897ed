"""The module that is exported: from images to logits or label maps, as a graph with named inputs and outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastuper.export.settings import ExportSettings


class Graph(nn.Module):
    """A model as one function of tensors: what an exporter traces.

    Inputs, in this order, by the settings:

    - `pixel_values` (B, C, H, W), float32, normalised; or with `with_preprocessing` `images` (B, H, W, 3), uint8, RGB;
    - with `target_size`: `target_size` (2,), int64, the height and width of the label maps.

    Outputs, in this order, by model and settings:

    - UPerNet: `logits` (B, classes, H, W), float32; or `labels` (B, height, width), uint8 (int32 above 256 classes);
    - Unified Perceptual Parsing: the logits of each task by its name, or for `labels` the probabilities of the scenes
      (B, scenes) and the label map of each other task.

    Args:
        model: in evaluation mode, in the dtype of the settings.
        settings: what to compute.
        processor: the model's image processor; needed with `with_preprocessing`.
    """

    def __init__(self, model: nn.Module, settings: ExportSettings, processor: Any = None):
        super().__init__()
        self.model, self.settings, self.processor = model, settings, processor
        self.input_names = ["images" if settings.with_preprocessing else "pixel_values"]
        if settings.target_size:
            self.input_names.append("target_size")
        self.output_names = ["labels" if settings.labels else "logits"]

    def forward(self, images: torch.Tensor, target_size: torch.Tensor | None = None) -> torch.Tensor:
        """Return the outputs; a tuple if there are several."""
        if self.settings.labels:
            return torch.stack(self.model.segment(images)).to(torch.uint8)
        return self.model(images).logits

"""An image processor as a graph: photos to the model's pixels, for exports that take photos."""

from __future__ import annotations

from typing import Any

import PIL.Image
import torch
from torch import nn

from fastuper.data.processor import UperNetImageProcessor
from fastuper.data.sizes import checked_size
from fastuper.export.bands import LARGEST, Chain, Filter, Size, Step, apply, smaller
from fastuper.export.settings import ExportError
from fastuper_kernels.dispatch.torch_private import check_size

# The blocks of an axis that is resampled: each is one product of matrices.
BLOCKS = 8


def _triangle(t: torch.Tensor) -> torch.Tensor:
    return 1 - t


def _cubic(t: torch.Tensor) -> torch.Tensor:
    """Return Pillow's bicubic filter, whose parameter is -0.5, at distances t."""
    near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
    return torch.where(t < 1, near, far)


FILTERS = {
    PIL.Image.Resampling.BILINEAR: (1, _triangle),
    PIL.Image.Resampling.BICUBIC: (2, _cubic),
}
"""Pillow's filters: half of the width, and the function of the distance."""


class Preprocessing(nn.Module):
    """What a `UperNetImageProcessor` does to RGB photos: resize, rescale, normalise, reverse the channels.

    Resized pixels are rounded to 8 bits after each pass, as in Pillow. They differ from the processor's by at most one
    of 256 levels.

    Args:
        processor: an image processor, with options from `from_pretrained` or the constructor.

    Raises:
        ExportError: an option asks for what a graph cannot do; the message names the option.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, processor: UperNetImageProcessor):
        super().__init__()
        self.resizes = bool(processor.do_resize)
        self.flips = bool(processor.do_flip_channel_order)
        self.antialias = processor.antialias is not False
        self.divisor = processor.size_divisor
        self.size = dict(checked_size(processor.size))
        if self.resizes:
            self._check_resizing(processor)
        self.filter = FILTERS.get(PIL.Image.Resampling(processor.resample))
        factor = processor.rescale_factor if processor.do_rescale else 1.0
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
        scale, shift = [], []
        for m, s in zip(_three("image_mean", mean), _three("image_std", std), strict=True):
            scale.append(factor / s)
            shift.append(-m / s)
        self.register_buffer("scale", torch.tensor(scale).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(shift).view(3, 1, 1), persistent=False)

    def _check_resizing(self, processor: UperNetImageProcessor) -> None:
        if self.antialias and processor.resample not in FILTERS:
            names = " and ".join(f"{filter.value} ({filter.name.lower()})" for filter in FILTERS)
            raise ExportError(
                f"the processor's resample is {processor.resample}, which a graph cannot compute as Pillow does; the "
                f"filters of a graph are {names}: set one of them, or export without preprocessing"
            )
        # Both rules round products in float64, in which a runtime may differ by a pixel.
        rounds = "shortest_edge" in self.size and "longest_edge" in self.size and self.divisor is None
        if rounds or not ("height" in self.size or "shortest_edge" in self.size):
            raise ExportError(
                f"the processor's size is {self.size}, which a graph cannot compute as the processor does; set "
                '{"height": ..., "width": ...} or {"shortest_edge": ...}, or export without preprocessing'
            )

    def output_size(self, height: Size, width: Size) -> tuple[Size, Size]:
        """Return the (height, width) to which photos of this size are resized; see `fastuper.data.sizes`."""
        if not self.resizes:
            return height, width
        if "height" in self.size:
            rows, columns = self.size["height"], self.size["width"]
        else:
            edge, short = self.size["shortest_edge"], smaller(height, width)
            rows, columns = edge * height // short, edge * width // short
            if (longest := self.size.get("longest_edge")) is not None:
                long = height + width - short
                rows = smaller(rows, longest * height // long)
                columns = smaller(columns, longest * width // long)
        if self.divisor is not None:
            rows, columns = ((side + self.divisor - 1) // self.divisor * self.divisor for side in (rows, columns))
        return rows, columns

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return pixel values (B, 3, height, width), float32, of photos (B, H, W, 3), uint8, RGB."""
        x = images.permute(0, 3, 1, 2)
        if self.resizes:
            x = self.resize(x, images.shape[1], images.shape[2])
        x = x.float()
        if self.flips:
            x = x.flip(1)
        return x * self.scale + self.shift

    def resize(self, x: torch.Tensor, height: Size, width: Size) -> torch.Tensor:
        """Return photos (B, 3, height, width), resized to levels of 8 bits, float32."""
        rows, columns = (_free(side) for side in self.output_size(height, width))
        if not self.antialias:  # OpenCV rounds once
            x = apply(Chain([Step(width, columns)], columns), x, -1, BLOCKS)
            return _rounded(apply(Chain([Step(height, rows)], rows), x, -2, BLOCKS))
        assert self.filter is not None  # the constructor has checked it
        x = _rounded(apply(Filter(width, columns, *self.filter), x, -1, BLOCKS))
        return _rounded(apply(Filter(height, rows, *self.filter), x, -2, BLOCKS))


def _free(side: Size) -> Size:
    """Return a symbolic side as a size of its own: as a formula of the photo's sides it would be in every later size.

    The export of a small model then takes minutes.
    """
    if not isinstance(side, torch.SymInt):
        return side
    own = torch.scalar_tensor(side, dtype=torch.int64).item()
    check_size(own >= 1)
    check_size(own <= LARGEST)
    return own


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """Return the nearest levels of 8 bits, halves rounded up."""
    return (x + 0.5).floor().clamp(0, 255)


def _three(name: str, value: Any) -> list[float]:
    values = [float(value)] * 3 if isinstance(value, float | int) else list(value)
    if len(values) != 3:
        raise ExportError(f"the processor's {name} has {len(values)} numbers, and photos have three channels")
    return values

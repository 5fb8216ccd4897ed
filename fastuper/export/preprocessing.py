"""An image processor as a graph: photos to the model's pixels, for exports that take photos."""

from __future__ import annotations

from typing import Any

import PIL.Image
import torch
from torch import nn

from fastuper.data.processor import UperNetImageProcessor
from fastuper.data.sizes import checked_size
from fastuper.export.bands import LARGEST, Chain, Filter, Size, Step, apply, blocks, first_of, smaller
from fastuper.export.settings import ExportError
from fastuper_kernels.dispatch.torch_private import check_size

# The blocks of an axis that is resampled: each is one product of matrices.
BLOCKS = 8


def _triangle(distance: torch.Tensor, unit: Size) -> torch.Tensor:
    return unit - distance  # whole numbers, whose sums no order of summation rounds


def _cubic(distance: torch.Tensor, unit: Size) -> torch.Tensor:
    x = distance.double() / unit  # in float32 some levels would differ by two
    return torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)


# Pillow's filters: half of the width, and the weights by distance.
FILTERS = {PIL.Image.Resampling.BILINEAR: (1, _triangle), PIL.Image.Resampling.BICUBIC: (2, _cubic)}

COARSE, FINE = 15, 22
"""Pillow's weights are multiples of 2**-22. Here each is the sum of a multiple of 2**-15, and of less than 2**-15."""


class Preprocessing(nn.Module):
    """What a `UperNetImageProcessor` does to RGB photos: resize, rescale, normalise, reverse the channels.

    Resized pixels are rounded to 8 bits after each axis, in the order of the Pillow that is installed. They differ from
    the processor's by at most one of 256 levels, and in few pixels.

    Args:
        processor: an image processor, with options from `from_pretrained` or the constructor.

    Attributes:
        is_exact: True where every runtime that divides as IEEE 754 says finds the same levels.

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
        self.is_exact = not self.resizes or (self.antialias and processor.resample == PIL.Image.Resampling.BILINEAR)
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
            raise ExportError(
                f"the processor's resample is {processor.resample}, which a graph cannot compute as Pillow does; set 2 "
                "(bilinear) or 3 (bicubic), or export without preprocessing"
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
        by_width, by_height = Filter(width, columns, *self.filter), Filter(height, rows, *self.filter)
        height_first = _height_first(height - rows, width - columns)
        if isinstance(height_first, bool):
            order = [(by_height, -2), (by_width, -1)] if height_first else [(by_width, -1), (by_height, -2)]
            return _resampled(_resampled(x, *order[0]), *order[1])
        return torch.where(
            height_first,
            _resampled(_resampled(x, by_height, -2), by_width, -1),
            _resampled(_resampled(x, by_width, -1), by_height, -2),
        )


def _height_first(fewer_rows: Size, fewer_columns: Size) -> bool | torch.Tensor:
    """Return whether Pillow resizes the height before the width: from version 13 on if that saves most."""
    if int(PIL.__version__.split(".")[0]) < 13:
        return False
    if isinstance(fewer_rows, int) and isinstance(fewer_columns, int):
        return fewer_rows > 0 and fewer_rows > 2 * fewer_columns
    first, second = (torch.as_tensor(torch.scalar_tensor(x, dtype=torch.int64)) for x in (fewer_rows, fewer_columns))
    return (first > 0) & (first > 2 * second)


def _resampled(x: torch.Tensor, band: Filter, dim: int) -> torch.Tensor:
    """Return levels of 8 bits (B, 3, H, W), resampled along an axis with weights rounded as in Pillow.

    Products and sums of levels and weights are whole multiples of 2**-15, or of 2**-22, below 2**24 of them: float32
    holds them, so that neither a runtime's order of summation nor its fused operations matter.
    """
    inputs, matrix = blocks(band, BLOCKS)
    weights = (matrix * 2**FINE + 0.5).floor()
    coarse = (weights * 2.0 ** (COARSE - FINE)).floor()
    fine = (weights - coarse * 2 ** (FINE - COARSE)).float()
    parts = []
    for index, *pair in zip(inputs.unbind(), coarse.float().unbind(), fine.unbind(), strict=True):
        read = x.index_select(dim, index).float()
        high, low = (read @ part.T if dim == -1 else part @ read for part in pair)
        half_up = high * 2.0**-COARSE + 0.5
        level = half_up.floor()
        parts.append((level + (half_up - level + low * 2.0**-FINE).floor()).clamp(0, 255))
    return first_of(torch.cat(parts, dim), dim, band.size_out)


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

"""Measures the maps of a backbone that another library builds: what it returns, not what it reports.

Some models report channels or strides that their maps do not have, some return (B, H, W, C), some take one size only.
A small black image, run once, shows it. The model runs in evaluation mode and without gradients: its weights, its modes
and the random numbers stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fastuper.io.messages import reason
from fastuper.models.backbones.layers import lacking
from fastuper_kernels.dispatch.torch_private import check_size

Size = tuple[int, int]
Run = Callable[[torch.Tensor], Sequence[torch.Tensor]]

LARGEST = 4096
"""Larger sides are not tried, in pixels."""

MAPS = 4
"""The number of maps that UPerNet reads."""

FAULTS = (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)
"""The errors by which libraries refuse an image."""


def static_size(size: Sequence[Any]) -> Size | None:
    """Return a size as numbers; None in a graph with free sizes."""
    if any(isinstance(side, torch.SymInt | torch.Tensor) for side in size):
        return None
    height, width = size
    return int(height), int(width)


@dataclass(frozen=True)
class Sizes:
    """The sizes of images that a backbone takes; (height, width) each, in pixels.

    Attributes:
        name: the backbone, for messages.
        multiple: images are padded to multiples of it.
        least: images are padded to at least this size.
        largest: larger images are refused; None if there is no limit.
        remedy: what to do about an image that is too large, for messages.
    """

    name: str = ""
    multiple: Size = (1, 1)
    least: Size = (1, 1)
    largest: Size | None = None
    remedy: str = ""

    @property
    def fits_all(self) -> bool:
        """Whether the backbone takes every image as it is."""
        return self.multiple == (1, 1) and self.least == (1, 1) and self.largest is None

    def padded(self, height: int, width: int) -> Size:
        """Return the size to which an image is padded, (height, width); in a graph with free sizes a symbolic one.

        Raises:
            ValueError: the backbone takes no image of this size.
        """
        if static_size((height, width)) is None:
            return self._symbolic(height, 0), self._symbolic(width, 1)
        size = [
            -(-max(side, least) // multiple) * multiple
            for side, least, multiple in zip((height, width), self.least, self.multiple, strict=True)
        ]
        if self.largest is not None and (size[0] > self.largest[0] or size[1] > self.largest[1]):
            raise ValueError(
                f"{self.name} takes images of at most {self.largest[0]} x {self.largest[1]} pixels, got {height} x "
                f"{width}: {self.remedy}"
            )
        return size[0], size[1]

    def pad(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return images (B, C, H, W) padded with zeros, below and on the right; the images themselves if they fit."""
        if self.fits_all:
            return pixel_values
        height, width = pixel_values.shape[2:]
        rows, columns = self.padded(height, width)
        if static_size((height, width)) == (rows, columns):
            return pixel_values
        return F.pad(pixel_values, (0, columns - width, 0, rows - height))

    def _symbolic(self, side: Any, axis: int) -> Any:
        """Return the height (axis 0) or width (1) to which a symbolic one is padded."""
        least, multiple = self.least[axis], self.multiple[axis]
        if self.largest is not None and isinstance(side, torch.SymInt):
            check_size(side <= self.largest[axis])
        if least > multiple:  # a side below a multiple is padded to it in any case
            side = side + lacking(side, least)
        return (side + multiple - 1) // multiple * multiple


@dataclass(frozen=True)
class Maps:
    """The maps that a backbone returns.

    Attributes:
        channels: the channels of each map.
        scales: the side of a position of each map in pixels, rounded.
        channels_last: True if the library returns them as (B, H, W, C).
        sizes: the sizes of images that the backbone takes.
        neck: the neck that scales them to a pyramid, "transposed" or "resized"; "none" if they need none.
    """

    channels: tuple[int, ...]
    scales: tuple[int, ...]
    channels_last: bool
    sizes: Sizes
    neck: str = "none"

    @property
    def falls(self) -> bool:
        """Whether each map is smaller than the map before it."""
        return all(fine < coarse for fine, coarse in pairwise(self.scales))

    @property
    def rises(self) -> bool:
        """Whether a map is larger than the map before it."""
        return any(fine > coarse for fine, coarse in pairwise(self.scales))

    @property
    def is_flat(self) -> bool:
        """Whether there are several maps, all of one size."""
        return len(self.scales) > 1 and len(set(self.scales)) == 1


def measure(
    run: Run, module: nn.Module, *, name: str, channels: int, unit: int, native: Size | None, remedy: str
) -> Maps:
    """Run a backbone on a small black image and return what its maps are.

    Images of (2 units, 3 units) are tried first, then those of (4, 6), then those of `native`, the size for which the
    library has built the model. Slightly larger and tiny images show whether the images must be padded.

    Args:
        run: returns the maps of an image (1, channels, H, W).
        module: the backbone.
        name: its name, for messages.
        channels: the channels of an image.
        unit: a side that the backbone should take: its patch, or its largest stride.
        native: the size for which it was built; None if it was built for none.
        remedy: what to do about an image that is too large.

    Raises:
        ValueError: it takes neither image, or does not return maps.
    """
    first: Exception | None = None
    small = (2 * unit, 3 * unit)
    sizes_to_try = [small, (4 * unit, 6 * unit), *([native] if native and max(native) <= LARGEST else [])]
    with evaluating(module):
        for size in sizes_to_try:
            maps, error = _attempt(run, module, channels, size)
            if maps is not None:
                break
            first = first or error
        else:
            tried = ", ".join(f"{height} x {width}" for height, width in sizes_to_try)
            raise ValueError(f"{name} runs on no image of {tried} pixels: {reason(first or ValueError())}") from first
        found, scales, last = _layout(maps, size, name)

        def takes(height: int, width: int) -> bool:
            maps, _ = _attempt(run, module, channels, (height, width))
            return maps is not None and [x.shape[3 if last else 1] for x in maps] == list(found)

        height, width = size
        steps = [1, 2, 4, 8, 16, 32, 64] if size == small else [1]
        steps = [*(step for step in steps if step < unit), unit]
        multiple = next((step for step in steps if takes(height + step, width + 2 * step)), None)
        if multiple is not None:
            smaller = (1, unit) if size == small else ()
            least = next((side for side in smaller if takes(side, side)), min(size))
            sizes = Sizes(name, (multiple, multiple), (least, least), None, remedy)
        elif takes(2 * height, width):
            sizes = Sizes(name, size, size, None, remedy)
        else:
            sizes = Sizes(name, (1, 1), size, size, remedy)
    return Maps(found, scales, last, sizes)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within this context a module is in evaluation mode, without gradients; its modes come back after."""
    modes = {part: part.training for part in module.modules()}
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.no_grad(),
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
        ):
            module.eval()
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def black_image(module: nn.Module, channels: int, size: Size) -> torch.Tensor:
    """Return zeros (1, channels, height, width) of a module's dtype and device."""
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    return tensors[0].new_zeros(1, channels, *size) if tensors else torch.zeros(1, channels, *size)


def _attempt(run: Run, module: nn.Module, channels: int, size: Size) -> tuple[Any, Exception | None]:
    """Return the maps of a black image, and None; or None, and the error."""
    try:
        return tuple(run(black_image(module, channels, size))), None
    except torch.OutOfMemoryError:
        raise
    except FAULTS as error:
        return None, error


def _layout(maps: Any, size: Size, name: str) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    """Return the channels and the scales of maps of an image, and whether their channels are last.

    Raises:
        ValueError: they are no maps (B, C, H, W) or (B, H, W, C) of the image.
    """
    for first in (2, 1):  # where the height is
        if all(
            isinstance(x, torch.Tensor) and x.ndim == 4 and _is_reduced(x.shape[first : first + 2], size) for x in maps
        ):
            channels = tuple(x.shape[3 if first == 1 else 1] for x in maps)
            return channels, tuple(max(round(size[0] / x.shape[first]), 1) for x in maps), first == 1
    shapes = [tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__ for x in maps]
    raise ValueError(f"{name} returns no feature maps (B, C, H, W): on {size[0]} x {size[1]} pixels {shapes}")


def _is_reduced(found: Sequence[int], size: Size) -> bool:
    """Return True if the sides of a map are those of an image divided by one number, give or take three positions."""
    rows, columns = found
    height, width = size
    return (
        0 < rows <= height and 0 < columns <= width and abs(rows * width - columns * height) <= 3 * max(height, width)
    )


def has_attention(module: nn.Module) -> bool:
    """Return True if a network has a module for attention, by the names of the modules and classes inside."""
    names = {f"{path}.{type(part).__name__}".lower() for path, part in module.named_modules()}
    return any("attn" in name or "attention" in name for name in names)

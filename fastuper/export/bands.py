"""Resampling by products with small dense matrices, in arithmetic that every exporter and runtime can follow.

Sizes may be symbolic, or values of tensors. Positions are quotients of integers: floating point, which differs between
runtimes, decides none. No integer that is divided is negative: exporters round such quotients in different ways.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

Size: TypeAlias = Any
"""An integer: of Python, symbolic, or while `torch.jit.trace` runs a tensor."""


LARGEST = 16384
"""The largest side that is resampled: products of two sides fit in 32 bits, to which OpenVINO converts integers."""


class Blocks(NamedTuple):
    """A linear map of one axis as one dense matrix for each block of its outputs.

    Attributes:
        inputs: (blocks, L), int64, the inputs that each block reads.
        matrix: (blocks, outputs of a block, L), floating point. Outputs beyond the last one repeat it.
    """

    inputs: torch.Tensor
    matrix: torch.Tensor


class Step(NamedTuple):
    """One bilinear resampling of an axis."""

    size_in: Size
    size_out: Size
    align_corners: bool = False

    def neighbours(self, i: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the lower neighbour of outputs i, and the weight of the upper neighbour."""
        if self.align_corners:
            numerator, denominator = i * (self.size_in - 1), larger(self.size_out - 1, 1)
        else:
            numerator = ((2 * i + 1) * self.size_in - self.size_out).clamp(min=0)
            denominator = 2 * self.size_out
        low = torch.div(numerator, denominator, rounding_mode="floor")
        weight = (numerator - low * denominator).float() / denominator
        last = self.size_in - 1
        return low.minimum(torch.zeros_like(low) + last), weight * (low < last).float()


class Chain(NamedTuple):
    """Bilinear resamplings of an axis, one after the other, as one linear map.

    Attributes:
        steps: the resamplings. No step but the last makes an axis smaller. A step may read only the first outputs of
            the step before it.
        size_out: the number of outputs: the first ones of the last step.
    """

    steps: Sequence[Step]
    size_out: Size

    @property
    def size_in(self) -> Size:
        """The number of inputs."""
        return self.steps[0].size_in

    def reach(self, count: Size) -> Size:
        """Return the most inputs that this many neighbouring outputs read."""
        return (count * self.size_in) // self.steps[-1].size_out + 6

    def first(self, i: torch.Tensor) -> torch.Tensor:
        """Return the first input that outputs i read."""
        for step in reversed(self.steps):
            i = step.neighbours(i)[0]
        return i

    def weights(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Return the weights of inputs j in outputs i, float32."""
        taps = [(i, torch.ones_like(i, dtype=torch.float32))]
        for step in reversed(self.steps):
            found = [(*step.neighbours(position), weight) for position, weight in taps]
            taps = [(low, weight * (1 - upper)) for low, upper, weight in found]
            taps += [(low + 1, weight * upper) for low, upper, weight in found]
        return torch.stack([(position == j) * weight for position, weight in taps]).sum(0)


class Filter(NamedTuple):
    """Pillow's resampling of an axis by a filter, which widens where the axis becomes smaller.

    Attributes:
        size_in: the number of inputs.
        size_out: the number of outputs.
        support: half of the filter's width, in units.
        function: the filter: from distances of less than `support` units, float32, and the unit, to weights, float32 or
            float64. Distances and unit are whole numbers below 2**24. The sum of the weights need not be 1.
    """

    size_in: Size
    size_out: Size
    support: int
    function: Callable[[torch.Tensor, Size], torch.Tensor]

    def reach(self, count: Size) -> Size:
        """Return the most inputs that this many neighbouring outputs read."""
        return ((count + 2 * self.support) * self.size_in) // self.size_out + 2 * self.support + 4

    def first(self, i: torch.Tensor) -> torch.Tensor:
        """Return the first input that outputs i read, or an input before it."""
        # The centre of output i, less the support, in parts of 2 * size_out.
        start = (2 * i + 1) * self.size_in - 2 * self.support * larger(self.size_in, self.size_out)
        return torch.div(start.clamp(min=0), 2 * self.size_out, rounding_mode="floor")

    def weights(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Return the weights of inputs j in outputs i, in the dtype of `function`; their sum is 1."""
        distance = ((2 * j + 1) * self.size_out - (2 * i + 1) * self.size_in).float().abs()
        unit = 2 * larger(self.size_in, self.size_out)
        weights = self.function(distance, unit)
        weights = weights * (distance < self.support * unit).float() * (j < self.size_in).float()
        return weights / weights.sum(-1, keepdim=True)


def blocks(band: Chain | Filter, count: int) -> Blocks:
    """Return a linear map of one axis in this many blocks of equal length."""
    length = (band.size_out + count - 1) // count
    i = torch.arange(count)[:, None] * length + torch.arange(length)
    i = i.minimum(torch.zeros_like(i) + (band.size_out - 1))
    j = band.first(i[:, :1]) + torch.arange(band.reach(length))
    matrix = band.weights(i[:, :, None], j[:, None])
    return Blocks(j.minimum(torch.zeros_like(j) + (band.size_in - 1)), matrix)


def apply(band: Chain | Filter, x: torch.Tensor, dim: int, count: int) -> torch.Tensor:
    """Apply a linear map to the last axis of x (..., H, W) (dim=-1) or to the one before it (-2), in blocks."""
    parts = []
    for index, matrix in zip(*(tensors.unbind() for tensors in blocks(band, count)), strict=True):
        read = x.index_select(dim, index).float()
        parts.append(read @ matrix.T if dim == -1 else matrix @ read)
    return first_of(torch.cat(parts, dim), dim, band.size_out)


def first_of(x: torch.Tensor, dim: int, count: Size) -> torch.Tensor:
    """Return the first entries of a dimension; for a slice, `torch.export` would have to know that there are enough."""
    return x.index_select(dim, torch.arange(count))


def larger(a: Size, b: Size) -> Size:
    """Return the larger of two sizes."""
    return _either(a, b, torch.maximum, torch.sym_max)


def smaller(a: Size, b: Size) -> Size:
    """Return the smaller of two sizes."""
    return _either(a, b, torch.minimum, torch.sym_min)


def _either(a: Size, b: Size, of_tensors: Callable[..., Any], of_integers: Callable[..., Any]) -> Size:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return of_tensors(torch.as_tensor(a), torch.as_tensor(b))
    return of_integers(a, b)

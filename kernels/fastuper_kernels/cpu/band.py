"""Bands: sparse linear maps of one axis. A change of grid in UPerNet is two bands, for the rows and for the columns.

Each output position of such a map has a few neighbouring nonzero weights. So a `Band` stores, for each output position,
its first input position and K weights. Resampling, pooling and the shifted taps of a convolution are bands. Products
and transposes of bands are bands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from fastuper_kernels.dispatch.modes import is_eager

# Output positions per small dense matrix. A block of b outputs of an f-fold upsampling reads b / f + 2 inputs. A GEMM
# over these inputs has few products with zeros, and runs at full rate.
BLOCK = 16

# The most results of each function below that are kept; an image takes about ten.
MAX_KEPT = 64


class Block(NamedTuple):
    """Outputs [start, stop) of a band as a dense matrix (stop - start, last - first) over inputs [first, last)."""

    start: int
    stop: int
    first: int
    last: int
    matrix: torch.Tensor


@dataclass(frozen=True, eq=False)
class Band:
    """A linear map from `size_in` to `size_out` positions: `y[i] = sum_k weights[i, k] * x[first[i] + k]`.

    Attributes:
        first: (size_out,) int64, the first input position of each output position.
        weights: (size_out, K), float64 unless it was converted. Weights beyond the end of the input are zero.
        size_in: the number of input positions.

    The constructors for resampling and pooling are tensor arithmetic on sizes, which may be symbolic: they can be
    traced. Products, transposes and blocks depend on the tensors' values, and cannot be traced.
    """

    first: torch.Tensor
    weights: torch.Tensor
    size_in: int

    @property
    def size_out(self) -> int:
        """The number of output positions."""
        return self.first.shape[0]

    # Constructors ----------------------------------------------------------------------------------------------------

    @staticmethod
    def bilinear(
        size_in: int,
        size_out: int,
        *,
        align_corners: bool = False,
        offset: int = 0,
        device: torch.device | str = "cpu",
    ) -> Band:
        """One axis of `F.interpolate(mode="bilinear")`, up or down.

        Args:
            size_in: input positions.
            size_out: output positions.
            align_corners: as for `F.interpolate`.
            offset: output i is position i + offset of the resampled axis, and zero outside it: the input of a
                convolution's tap with zero padding.
            device: the device of the band's tensors.

        Raises:
            ValueError: a size is below 1.
        """
        if size_in < 1 or size_out < 1:
            raise ValueError(f"sizes must be at least 1, got {size_in} and {size_out}")
        i = torch.arange(size_out, device=device) + offset
        # The position of output i is numerator / denominator. Integers are exact, in runtimes without float64 too.
        if align_corners:
            numerator, denominator = i * (size_in - 1), max(size_out - 1, 1)
        else:
            numerator, denominator = (2 * i + 1) * size_in - size_out, 2 * size_out
        numerator = numerator.clamp(min=0).clamp(max=(size_in - 1) * denominator)
        low = numerator // denominator
        # The weight of the higher neighbour is zero at the last position, which has none.
        high_weight = (numerator - low * denominator).double() / denominator
        weights = torch.stack([1 - high_weight, high_weight], dim=1)
        inside = (i >= 0) & (i < size_out)
        return Band(low, weights * inside[:, None], size_in)

    @staticmethod
    def adaptive_avg_pool(size_in: int, size_out: int, *, device: torch.device | str = "cpu") -> Band:
        """One axis of `F.adaptive_avg_pool2d`: output i of s is the mean of [floor(i n / s), ceil((i + 1) n / s))."""
        i = torch.arange(size_out, device=device)
        start = i * size_in // size_out
        # No number is negative: PyTorch takes the floor of a negative quotient, some exporters its integer part.
        stop = ((i + 1) * size_in + size_out - 1) // size_out
        k = torch.arange(size_in // size_out + 2, device=device)
        weights = (k < (stop - start)[:, None]).double() / (stop - start)[:, None]
        return Band(start, weights, size_in)

    @staticmethod
    def precise_roi_pool(size_in: int, size_out: int, *, device: torch.device | str = "cpu") -> Band:
        """One axis of precise RoI pooling (https://arxiv.org/abs/1807.11590) over the whole map, from 0 to `size_in`.

        Output i of s is the mean over [i n / s, (i + 1) n / s) of the linear interpolation of the n inputs. Input j has
        the coordinate j, and the interpolation falls to zero beyond the ends.
        """
        edges = (torch.arange(size_out + 1, device=device) * size_in).double() / size_out
        low, high = edges[:-1], edges[1:]
        first = low.floor()
        j = first[:, None] + torch.arange(size_in // size_out + 3, device=device)
        weights = (_hat_integral(high[:, None] - j) - _hat_integral(low[:, None] - j)) / (high - low)[:, None]
        return Band(first.long(), weights * (j < size_in), size_in)

    # Algebra ---------------------------------------------------------------------------------------------------------

    def __matmul__(self, other: Band) -> Band:
        """Return the band that applies `other`, then this band."""
        if self.size_in != other.size_out:
            raise ValueError(f"a band from {self.size_in} positions cannot follow one to {other.size_out}")
        middle = self.first[:, None] + torch.arange(self.weights.shape[1], device=self.first.device)
        middle = middle.clamp(max=self.size_in - 1)
        source = other.first[middle][:, :, None] + torch.arange(other.weights.shape[1], device=self.first.device)
        weights = self.weights[:, :, None] * other.weights[middle]
        outputs = torch.arange(self.size_out, device=self.first.device)[:, None, None].expand_as(source)
        return _from_entries(outputs, source, weights, self.size_out, other.size_in)

    @property
    def T(self) -> Band:
        """The transposed band, from `size_out` to `size_in` positions: the backward pass of this band."""
        source = self.first[:, None] + torch.arange(self.weights.shape[1], device=self.first.device)
        outputs = torch.arange(self.size_out, device=self.first.device)[:, None].expand_as(source)
        return _from_entries(source, outputs, self.weights, self.size_in, self.size_out)

    @staticmethod
    def interleaved(bands: Sequence[Band]) -> Band:
        """Return the sum of bands over interleaved inputs: input j * len(bands) + t is input j of band t.

        With it the three taps of a convolution's axis, each resampled, are one band over the taps' products.
        """
        count, device = len(bands), bands[0].first.device
        outputs, source, weights = [], [], []
        for t, band in enumerate(bands):
            j = band.first[:, None] + torch.arange(band.weights.shape[1], device=device)
            outputs.append(torch.arange(band.size_out, device=device)[:, None].expand_as(j))
            source.append(j * count + t)
            weights.append(band.weights)
        size_out, size_in = bands[0].size_out, bands[0].size_in * count
        return _from_entries(torch.cat(outputs, 1), torch.cat(source, 1), torch.cat(weights, 1), size_out, size_in)

    # Application -----------------------------------------------------------------------------------------------------

    def dense(self) -> torch.Tensor:
        """Return the matrix (size_out, size_in): for tests, and for bands with a few outputs."""
        padded = self.weights.new_zeros(self.size_out, self.size_in + self.weights.shape[1])
        index = self.first[:, None] + torch.arange(self.weights.shape[1], device=self.first.device)
        return padded.scatter_add(1, index, self.weights)[:, : self.size_in]

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """Return `dense()` by comparisons, which can be traced; for bands of few weights."""
        column = torch.arange(self.size_in, device=self.first.device)
        total = None
        for k in range(self.weights.shape[1]):
            part = (column == self.first[:, None] + k).to(dtype) * self.weights[:, k, None].to(dtype)
            total = part if total is None else total + part
        assert total is not None
        return total

    def gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Apply the band to one axis of x by K gathers, which can be traced and differentiated."""
        shape = [1] * x.ndim
        shape[dim] = self.size_out
        total = None
        for k in range(self.weights.shape[1]):
            part = x.index_select(dim, (self.first + k).clamp(max=self.size_in - 1))
            part = part * self.weights[:, k].to(x.dtype).view(shape)
            total = part if total is None else total + part
        assert total is not None
        return total

    def gather_at_once(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Apply the band to one axis of x like `gather`, by one gather of K times as many values.

        K may be symbolic. It is for bands with few outputs.
        """
        first = self.first[:, None]
        index = torch.where(self.weights != 0, first + torch.arange(self.weights.shape[1], device=x.device), first)
        parts = x.index_select(dim, index.flatten())
        shape = [1] * (x.ndim + 1)
        shape[dim : dim + 2] = self.size_out, -1
        # `unflatten` is not in the ONNX operators before version 13.
        parts = parts.reshape(*x.shape[:dim], self.size_out, -1, *x.shape[dim + 1 :])
        return (parts * self.weights.to(x.dtype).view(shape)).sum(dim + 1)

    def blocks(self, dtype: torch.dtype, size: int = BLOCK) -> list[Block]:
        """Return the band as dense matrices of `size` output positions each. Their memory is linear in `size_out`."""
        width = self.weights.shape[1]
        last = (self.first + width).clamp(max=self.size_in)
        blocks = []
        for start in range(0, self.size_out, size):
            stop = min(start + size, self.size_out)
            low, high = int(self.first[start:stop].min()), int(last[start:stop].max())
            matrix = self.weights.new_zeros(stop - start, high - low + width)
            index = self.first[start:stop, None] - low + torch.arange(width, device=self.first.device)
            matrix.scatter_add_(1, index, self.weights[start:stop])
            blocks.append(Block(start, stop, low, high, matrix[:, : high - low].to(dtype).contiguous()))
        return blocks


def _hat_integral(t: torch.Tensor) -> torch.Tensor:
    """Return the integral from minus infinity to t of max(0, 1 - |s|)."""
    t = t.clamp(-1, 1)
    return torch.where(t < 0, (t + 1) ** 2 / 2, 1 - (1 - t) ** 2 / 2)


def _from_entries(
    outputs: torch.Tensor, inputs: torch.Tensor, values: torch.Tensor, size_out: int, size_in: int
) -> Band:
    """Return the band with these entries.

    Entries of the same (output, input) are added up. Zeros and entries beyond the ends are dropped.
    """
    keep = ((values != 0) & (inputs < size_in) & (outputs < size_out)).flatten()
    outputs, inputs, values = outputs.flatten()[keep], inputs.flatten()[keep], values.flatten()[keep]
    first = torch.full((size_out,), size_in - 1, dtype=torch.int64, device=outputs.device)
    first.scatter_reduce_(0, outputs, inputs, "amin")
    # An output without entries (in a transpose: an input that nothing reads) starts where the next output does. With
    # any other start, the block that it is in would span all inputs in between.
    first = first.flip(0).cummin(0).values.flip(0)
    distance = inputs - first[outputs]
    width = int(distance.max()) + 1 if len(distance) else 1
    weights = values.new_zeros(size_out, width)
    weights.index_put_((outputs, distance), values, accumulate=True)
    return Band(first, weights, size_in)


# Bands that are built once for each size --------------------------------------------------------------------------


def _cached(build: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the last results of a function of sizes; while something traces, keep nothing.

    The results are made outside inference mode, so that training can use them. They hold no reference to a model.
    """

    def make(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return build(*args, **kwargs)

    kept = lru_cache(maxsize=MAX_KEPT)(make)

    def call(*args: Any, **kwargs: Any) -> Any:
        return kept(*args, **kwargs) if is_eager() else build(*args, **kwargs)

    call.cache_info, call.cache_clear = kept.cache_info, kept.cache_clear  # type: ignore[attr-defined]
    return call


@_cached
def bilinear_chain(sizes: tuple[int, ...], corners: tuple[bool, ...] = ()) -> Band:
    """Return the band that resamples (bilinear) from the first size through each later size.

    Args:
        sizes: the input positions, then the output positions of each step.
        corners: `align_corners` of each step; empty if it is False for all.
    """
    corners = corners or (False,) * (len(sizes) - 1)
    steps = zip(pairwise(sizes), corners, strict=True)
    return reduce(lambda before, band: band @ before, (Band.bilinear(*pair, align_corners=c) for pair, c in steps))


def interpolate_chain(
    x: torch.Tensor, sizes: Sequence[tuple[int, int]], corners: tuple[bool, ...] = ()
) -> torch.Tensor:
    """Return x (B, C, h, w) after the bands of `bilinear_chain` on rows and columns, by PyTorch's operator.

    Args:
        x: the map.
        sizes: the (height, width) of each step.
        corners: `align_corners` of each step; empty if it is False for all.
    """
    for size, aligned in zip(sizes, corners or (False,) * len(sizes), strict=True):
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=aligned)
    return x


# The ways to pool one axis of a map into cells.
POOLINGS: dict[str, Callable[..., Band]] = {
    "adaptive": Band.adaptive_avg_pool,
    "precise_roi": Band.precise_roi_pool,
}


@_cached
def pool_matrix(pooling: str, size: int, scale: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the matrix (scale, size) of one of `POOLINGS`; dense, as it has few outputs."""
    return POOLINGS[pooling](size, scale, device=device).dense().to(dtype)


def bilinear_tap(size_in: int, size_out: int, offset: int) -> Band:
    """Return `Band.bilinear` with an offset, as a function of positional arguments."""
    return Band.bilinear(size_in, size_out, offset=offset)


@_cached
def bilinear_taps(size_in: int, size_out: int) -> Band:
    """Return the band from the interleaved products of a convolution's three taps to their sum, each resampled."""
    return Band.interleaved([Band.bilinear(size_in, size_out, offset=tap) for tap in (-1, 0, 1)])


@_cached
def blocks_of(
    kind: Callable[..., Band],
    sizes: tuple[Any, ...],
    dtype: torch.dtype,
    device: torch.device,
    transposed: bool = False,
    size: int = BLOCK,
) -> list[Block]:
    """Return the band `kind(*sizes)`, or its transpose, as blocks of `size` outputs on a device."""
    band = kind(*sizes)
    blocks = (band.T if transposed else band).blocks(dtype, size)
    return [block._replace(matrix=block.matrix.to(device)) for block in blocks]


def inputs_of(kind: Callable[..., Band], sizes: tuple[Any, ...], start: int, stop: int) -> tuple[int, int]:
    """Return the inputs [first, last) that outputs [start, stop) of the band `kind(*sizes)` read."""
    first, last = _extents(kind, sizes)
    return min(first[start:stop]), max(last[start:stop])


@_cached
def _extents(kind: Callable[..., Band], sizes: tuple[Any, ...]) -> tuple[list[int], list[int]]:
    band = kind(*sizes)
    last = (band.first + band.weights.shape[1]).clamp(max=band.size_in)
    return band.first.tolist(), last.tolist()

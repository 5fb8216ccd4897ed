"""Parts of several kernels: positions of a map, bilinear weights, chains of resamplings, a convolution's epilogue."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl


@triton.jit
def place(pixel, H, W):
    """Return (image, row, column) of pixels.

    pixel: (N,) integers: pixels numbered through a batch of maps, image by image, row by row.
    H, W: the size of a map.
    """
    row = pixel // W
    return row // H, row % H, pixel % W


@triton.jit
def bilinear(i, size_in, size_out):
    """Return (low, high, weight of high): the two inputs of output i, align_corners=False.

    The position is a fraction of integers: no rounding of a large coordinate reaches the weight.

    i: integers of any shape, from 0 to size_out - 1.
    size_in, size_out: positions of the axis before and after.
    """
    numerator = tl.maximum((2 * i + 1) * size_in - size_out, 0)
    low = numerator // (2 * size_out)
    weight = (numerator - low * (2 * size_out)).to(tl.float32) / (2.0 * size_out)
    high = tl.minimum(low + 1, size_in - 1)
    low = tl.minimum(low, size_in - 1)
    return low, high, weight


@triton.jit
def hat(i, j, size_in, size_out):
    """Return the weight of input j in output i, and zero for an i outside [0, size_out).

    i, j: integers of shapes that broadcast.
    size_in, size_out: positions of the axis before and after.
    """
    numerator = tl.maximum((2 * i + 1) * size_in - size_out, 0)
    numerator = tl.minimum(numerator, (size_in - 1) * 2 * size_out)
    distance = tl.abs(numerator - j * (2 * size_out)).to(tl.float32) / (2.0 * size_out)
    inside = (i >= 0) & (i < size_out)
    return tl.where(inside, tl.maximum(1.0 - distance, 0.0), 0.0)


@triton.jit
def resampled(pointer, b, y, x, channels, ok, h, w, H, W, C: tl.constexpr):
    """Return float32 values (N, BN) of a coarser map, resampled to (H, W).

    pointer: to (B, h, w, C), dense.
    b, y, x: (N,) integers: image, row and column of each pixel of the result.
    channels: (BN,) int32, the channels.
    ok: (N,) booleans; other pixels are not read.
    h, w: the coarser map's size.
    H, W: the result's size.
    C: channels of the map.
    """
    top, bottom, down = bilinear(y, h, H)
    left, right, along = bilinear(x, w, W)
    image = b.to(tl.int64) * h
    above, below = (image + top) * w, (image + bottom) * w
    mask = ok[:, None] & (channels < C)[None, :]
    at = channels[None, :]
    total = (
        tl.load(pointer + ((above + left) * C)[:, None] + at, mask=mask, other=0.0).to(tl.float32)
        * ((1 - down) * (1 - along))[:, None]
    )
    total += (
        tl.load(pointer + ((above + right) * C)[:, None] + at, mask=mask, other=0.0).to(tl.float32)
        * ((1 - down) * along)[:, None]
    )
    total += (
        tl.load(pointer + ((below + left) * C)[:, None] + at, mask=mask, other=0.0).to(tl.float32)
        * (down * (1 - along))[:, None]
    )
    total += (
        tl.load(pointer + ((below + right) * C)[:, None] + at, mask=mask, other=0.0).to(tl.float32)
        * (down * along)[:, None]
    )
    return total


@triton.jit
def epilogue(
    acc,
    b,
    y,
    x,
    ok,
    channels,
    addend,
    scale,
    shift,
    upsampled,
    h,
    w,
    H,
    W,
    C: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_UPSAMPLED: tl.constexpr,
    RELU: tl.constexpr,
):
    """Return relu((acc + addend) * scale + shift) + upsampled, (N, BN) float32.

    acc: (N, BN) float32, the convolution's sums.
    b, y, x: (N,) integers: image, row and column of each pixel.
    ok: (N,) booleans; other pixels are not read.
    channels: (BN,) int32, the channels.
    addend: pointer to (B, H, W, C), dense.
    scale, shift: pointers to (C,) float32.
    upsampled: pointer to a coarser map (B, h, w, C), dense, which is resampled to (H, W).
    h, w: the coarser map's size.
    H, W: the map's size.
    C: channels of the map.
    HAS_ADDEND, HAS_SCALE, HAS_SHIFT, HAS_UPSAMPLED: False to leave the operand out; any pointer stands for it.
    RELU: True to clamp negative values to zero.
    """
    inside = channels < C
    if HAS_ADDEND:
        rows = (((b.to(tl.int64) * H + y) * W + x) * C)[:, None]
        acc += tl.load(addend + rows + channels[None, :], mask=ok[:, None] & inside[None, :], other=0.0).to(tl.float32)
    if HAS_SCALE:
        acc *= tl.load(scale + channels, mask=inside, other=0.0)[None, :]
    if HAS_SHIFT:
        acc += tl.load(shift + channels, mask=inside, other=0.0)[None, :]
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)  # NaN stays
    if HAS_UPSAMPLED:
        acc += resampled(upsampled, b, y, x, channels, ok, h, w, H, W, C)
    return acc


# A chain of resamplings -----------------------------------------------------------------------------------------------

# The most neighbouring inputs that an output reads along an axis; longer chains run on PyTorch's operators. Through
# growing sizes an output reads 2 or 3 inputs. A smaller size in between (1, say) makes this number large, and each
# input adds code to the kernel.
TAPS = 6


def taps_of_chain(sizes: Sequence[int]) -> int:
    """Return the number of neighbouring inputs that an output reads through a chain of sizes, input size first."""
    apart = 1  # the distance between the first and the last of these inputs
    for size_in, size_out in zip(reversed(sizes[:-2]), reversed(sizes[1:-1]), strict=True):
        apart = 1 + -(-apart * size_in // size_out)
    return 1 + min(apart, sizes[0] - 1)


@triton.jit
def _path(i, sizes, N: tl.constexpr, TURNS: tl.constexpr):
    """Return (input, weight) of one path from outputs i back through N resamplings, the last resampling first.

    i: (BI,) integers, outputs of the chain.
    sizes: a tuple of N + 1 sizes, input size first.
    TURNS: bit n is 1 if the path takes the higher of the two inputs of resampling N - n.
    """
    weight = tl.full(i.shape, 1.0, tl.float32)
    for n in tl.static_range(N):
        low, high, along = bilinear(i, sizes[N - 1 - n], sizes[N - n])
        if (TURNS >> n) % 2 == 1:
            i = high
            weight *= along
        else:
            i = low
            weight *= 1.0 - along
    return i, weight


@triton.jit
def band(i, sizes, N: tl.constexpr, TAPS: tl.constexpr):
    """Return (first, positions, weights) of the TAPS neighbouring inputs of outputs i through a chain of resamplings.

    `first` is (BI,) integers, the first input. `positions` and `weights` are tuples of TAPS tensors (BI,): the inputs,
    clamped to the axis, and their float32 weights.

    i: (BI,) integers, outputs of the chain.
    sizes: a tuple of N + 1 sizes, input size first.
    N: the number of resamplings.
    TAPS: see `taps_of_chain`.
    """
    first, weight = _path(i, sizes, N, 0)
    positions = ()
    weights = ()
    # The tuples grow by addition: Triton cannot unpack tuples.
    for tap in tl.static_range(TAPS):
        positions = positions + (tl.minimum(first + tap, sizes[0] - 1),)  # type: ignore[assignment]  # noqa: RUF005
        weights = weights + (weight if tap == 0 else tl.zeros(i.shape, tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    for turns in tl.static_range(1, 1 << N):
        position, part = _path(i, sizes, N, turns)
        added = ()
        for tap in tl.static_range(TAPS):
            weight = weights[tap] + tl.where(position == first + tap, part, 0.0)
            added = added + (weight,)  # type: ignore[assignment]  # noqa: RUF005
        weights = added
    return first, positions, weights

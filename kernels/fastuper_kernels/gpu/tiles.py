"""What several kernels share: positions of a map, bilinear weights, chains of them, a convolution's epilogue."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl


@triton.jit
def place(pixel, H, W):
    """Return (image, row, column) of pixels that are numbered through a batch of maps."""
    row = pixel // W
    return row // H, row % H, pixel % W


@triton.jit
def bilinear(i, size_in, size_out):
    """Return (low, high, weight of high) of the position that output i reads, align_corners=False.

    The position is a fraction of integers, so that no rounding of a large coordinate reaches the weight.
    """
    numerator = tl.maximum((2 * i + 1) * size_in - size_out, 0)
    low = numerator // (2 * size_out)
    weight = (numerator - low * (2 * size_out)).to(tl.float32) / (2.0 * size_out)
    high = tl.minimum(low + 1, size_in - 1)
    low = tl.minimum(low, size_in - 1)
    return low, high, weight


@triton.jit
def hat(i, j, size_in, size_out):
    """Return the weight of input j in output i, and zero where there is no output i."""
    numerator = tl.maximum((2 * i + 1) * size_in - size_out, 0)
    numerator = tl.minimum(numerator, (size_in - 1) * 2 * size_out)
    distance = tl.abs(numerator - j * (2 * size_out)).to(tl.float32) / (2.0 * size_out)
    inside = (i >= 0) & (i < size_out)
    return tl.where(inside, tl.maximum(1.0 - distance, 0.0), 0.0)


@triton.jit
def resampled(pointer, b, y, x, channels, ok, h, w, H, W, C: tl.constexpr):
    """Return float32 values [pixels, channels] of a coarser NHWC map (h, w), resampled to (H, W), at (b, y, x)."""
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
    acc,  # [pixels, channels] float32
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
    """Return relu((acc + addend) * scale + shift) + upsampled, at the pixels (b, y, x) of a map (H, W)."""
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

# Neighbouring inputs that an output reads along an axis, at most; more are PyTorch's operators' work. Through sizes
# that grow they are 2 or 3; one that shrinks on the way (to 1 and up again) makes them many, each of which is code.
TAPS = 6


def taps_of_chain(sizes: Sequence[int]) -> int:
    """Return how many inputs, that follow each other, an output reads through a chain of sizes."""
    apart = 1  # from the first of them to the last
    for size_in, size_out in zip(reversed(sizes[:-2]), reversed(sizes[1:-1]), strict=True):
        apart = 1 + -(-apart * size_in // size_out)
    return 1 + min(apart, sizes[0] - 1)


@triton.jit
def _path(i, sizes, N: tl.constexpr, TURNS: tl.constexpr):
    """Return (input, weight) at the end of one of the ways from outputs i through N resamplings, last one first.

    Each reads two neighbours; the bits of TURNS say where the way goes by the higher one.
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
    """Return (first inputs, positions, weights) of outputs i: tuples of TAPS inputs that follow each other."""
    first, weight = _path(i, sizes, N, 0)
    positions = ()
    weights = ()
    # Triton adds tuples, and unpacks none.
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

"""The transposed resampling: the backward pass of bilinear upsampling, from a fine grid to a coarse grid."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastuper_kernels.gpu.layout import from_nhwc, nhwc, on_its_device
from fastuper_kernels.gpu.tiles import hat


@triton.jit
def transposed_kernel(
    grad,
    out,
    B,
    h,
    w,
    H,
    W,
    columns,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    BJ: tl.constexpr,
    BC: tl.constexpr,
):
    """Write each coarse pixel's share of a fine gradient, tap by tap.

    In the forward pass, tap (dy, dx) of fine pixel (y, x) reads the resampled map at row y + dy - TAPS // 2 and column
    x + dx - TAPS // 2, and zero outside the map. Program: BC channels of BJ coarse pixels of a row.

    grad: pointer to (B, H, W, C), dense.
    out: pointer to (B, h, w, TAPS * TAPS, C), dense; written.
    B: images.
    h, w: the coarse size.
    H, W: the fine size.
    columns: the number of fine columns that one coarse column can reach.
    C: channels.
    TAPS: taps along each axis, 1 or 3.
    BJ, BC: coarse pixels and channels of a program.
    """
    M: tl.constexpr = TAPS // 2
    j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    b, i = tl.program_id(2) // h, tl.program_id(2) % h
    channels = (c < C)[None, :]
    top = tl.maximum(((2 * i - 1) * H - h) // (2 * h) - M - 1, 0)
    bottom = tl.minimum((2 * i + 3) * H // (2 * h) + M + 2, H)
    left = tl.maximum(((2 * j - 1) * W - w) // (2 * w) - M - 1, 0)
    image = grad + b.to(tl.int64) * H * W * C
    pixel = ((b.to(tl.int64) * h + i) * w + j) * (TAPS * TAPS * C)
    zeros = tl.zeros((BJ, BC), dtype=tl.float32)
    # A sum for each tap: `a` of the taps' first row, `b` of the second row, `c` of the third row.
    a0, a1, a2, b0, b1, b2, c0, c1, c2 = zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros
    for y in range(top, bottom):
        before, here, after = zeros, zeros, zeros
        for k in range(columns):
            x = left + k
            mask = (x < W)[:, None] & channels
            at = image + ((tl.cast(y, tl.int64) * W + x) * C)[:, None] + c[None, :]
            value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            here += value * hat(x, j, w, W)[:, None]
            if TAPS == 3:
                before += value * hat(x - 1, j, w, W)[:, None]
                after += value * hat(x + 1, j, w, W)[:, None]
        down = hat(y, i, h, H)
        b1 += here * down
        if TAPS == 3:
            above, below = hat(y - 1, i, h, H), hat(y + 1, i, h, H)
            a0 += before * above
            a1 += here * above
            a2 += after * above
            b0 += before * down
            b2 += after * down
            c0 += before * below
            c1 += here * below
            c2 += after * below
    mask = (j < w)[:, None] & channels
    at = out + pixel[:, None] + c[None, :]
    kind = out.dtype.element_ty
    if TAPS == 1:
        tl.store(at, b1.to(kind), mask=mask)
    else:
        tl.store(at, a0.to(kind), mask=mask)
        tl.store(at + C, a1.to(kind), mask=mask)
        tl.store(at + 2 * C, a2.to(kind), mask=mask)
        tl.store(at + 3 * C, b0.to(kind), mask=mask)
        tl.store(at + 4 * C, b1.to(kind), mask=mask)
        tl.store(at + 5 * C, b2.to(kind), mask=mask)
        tl.store(at + 6 * C, c0.to(kind), mask=mask)
        tl.store(at + 7 * C, c1.to(kind), mask=mask)
        tl.store(at + 8 * C, c2.to(kind), mask=mask)


@on_its_device
def transposed(grad: torch.Tensor, size: tuple[int, int], taps: int) -> torch.Tensor:
    """Return the taps' gradient (B, h, w, taps * taps * C) on a coarse grid, from a dense gradient (B, H, W, C).

    Args:
        grad: (B, H, W, C), dense.
        size: (h, w).
        taps: taps along each axis, 1 or 3.
    """
    batch, height, width, channels = grad.shape
    h, w = size
    out = grad.new_empty(batch, h, w, taps * taps * channels)
    if out.numel() == 0:
        return out
    block = min(triton.next_power_of_2(channels), 64)
    # The fine columns between the two neighbouring coarse columns, the taps' shifts, and rounding at both ends.
    reach = -(-2 * width // w) + taps + 3
    grid = (triton.cdiv(w, 16), triton.cdiv(channels, block), batch * h)
    transposed_kernel[grid](
        grad, out, batch, h, w, height, width, min(reach, width), C=channels, TAPS=taps, BJ=16, BC=block, num_warps=4
    )
    return out


@torch.library.custom_op("fastuper::upsample_add_backward", mutates_args=())
def upsample_add_backward(grad: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The operator of the backward pass of bilinear upsampling from (height, width) to the size of grad (B, C, H, W).

    Returns:
        (B, C, height, width) in channels_last memory.
    """
    return from_nhwc(transposed(nhwc(grad), (height, width), 1))


@upsample_add_backward.register_fake
def _(grad: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return from_nhwc(grad.new_empty(grad.shape[0], height, width, grad.shape[1]))

"""`upsampled_conv3x3` on a GPU: all levels' products with the nine taps in one launch, then their sum in another.

The first kernel is a GEMM whose tiles are spread over several maps, so that the small ones share a launch with the
large: it also computes the branches of a pyramid pooling module. The second gives each program a few rows, columns and
channels of the result: it resamples a row of products along the columns once, and adds it to every row that it reaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from fastuper_kernels.gpu.configs import GroupConfig, group_config, precision
from fastuper_kernels.gpu.layout import from_nhwc, on_its_device, taps_of
from fastuper_kernels.gpu.resample import transposed
from fastuper_kernels.gpu.tiles import bilinear, hat


@triton.jit
def products_kernel(
    xs,
    weights,
    out,
    scale,
    shift,
    B,
    pixels,
    x_strides,
    weight_stride_n,
    weight_stride_tap,
    out_stride,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    TAPS: tl.constexpr,
    LEVELS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    RELU: tl.constexpr,
):
    """Write out (B, pixels of all levels, TAPS, C_OUT): each pixel's channels times its level's weights, tap by tap.

    xs: pointers to maps of (B, pixels[l], C_IN), dense inside an image, `x_strides` between images.
    weights: pointers to (C_OUT, TAPS, C_IN) with the strides that are given, for each level.
    scale, shift: (LEVELS, C_OUT) float32, applied before ReLU.
    """
    blocks: tl.constexpr = (C_OUT + BN - 1) // BN
    tile = tl.program_id(0)
    # The level whose tile this is: zeros keep what may be a constant from being one.
    zero = tile * 0
    x, weight, stride, count = xs[0], weights[0], x_strides[0] + zero, pixels[0] + zero
    level, start, first = zero, zero, zero
    reach, before = zero, zero
    for i in tl.static_range(1, LEVELS):
        reach += tl.cdiv(B * pixels[i - 1], BM) * (blocks * TAPS)
        before += pixels[i - 1]
        if tile >= reach:
            x, weight, stride, count = xs[i], weights[i], x_strides[i] + zero, pixels[i] + zero
            level, start, first = level + 1, before, reach
    tile -= first

    n = tile % (blocks * TAPS)
    tap, n0 = n // blocks, n % blocks * BN
    row = tile // (blocks * TAPS) * BM + tl.arange(0, BM)
    b, p = row // count, row % count
    ok = b < B
    channels = n0 + tl.arange(0, BN)
    inside = channels < C_OUT
    k = tl.arange(0, BK)
    x += (b.to(tl.int64) * stride + p.to(tl.int64) * C_IN)[:, None] + k[None, :]
    weight += tap * weight_stride_tap + (channels.to(tl.int64) * weight_stride_n)[:, None] + k[None, :]
    # Weights times pixels, so that a few pixels do for the tensor cores, which want 64 rows of the left factor.
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for c in range(0, C_IN, BK):
        some = c + k < C_IN
        left = tl.load(weight + c, mask=inside[:, None] & some[None, :], other=0.0)
        right = tl.load(x + c, mask=ok[:, None] & some[None, :], other=0.0)
        acc = tl.dot(left, right.T, acc, input_precision=PRECISION)
    acc = acc.T
    if HAS_SCALE:
        acc *= tl.load(scale + level * C_OUT + channels, mask=inside, other=0.0)[None, :]
        acc += tl.load(shift + level * C_OUT + channels, mask=inside, other=0.0)[None, :]
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)
    at = b.to(tl.int64) * out_stride + (start + p).to(tl.int64) * (TAPS * C_OUT) + tap * C_OUT
    mask = ok[:, None] & inside[None, :]
    tl.store(out + at[:, None] + channels[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gather_kernel(
    products,
    out,
    heights,
    widths,
    image_strides,
    H,
    W,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BY: tl.constexpr,
    BX: tl.constexpr,
    BC: tl.constexpr,
):
    """Write out (B, H, W, C): for each level and tap, the products resampled to (H, W) and shifted by the tap.

    products: pointers to (B, heights[l], widths[l], 9, C), dense inside an image, `image_strides` between images.
    """
    top = tl.program_id(0) // tl.cdiv(W, BX) * BY
    # Of three dimensions from the start: a row of products is in the threads that add it up.
    y = (top + tl.arange(0, BY))[:, None, None]
    x = (tl.program_id(0) % tl.cdiv(W, BX) * BX + tl.arange(0, BX))[None, :, None]
    c = (tl.program_id(1) * BC + tl.arange(0, BC))[None, None, :]
    b = tl.program_id(2)
    mask = (x < W) & (c < C)
    acc = tl.zeros((BY, BX, BC), dtype=tl.float32)
    for level in tl.static_range(LEVELS):
        h, w = heights[level], widths[level]
        image = products[level] + tl.cast(b, tl.int64) * image_strides[level]
        # The rows of products that these rows of the result read.
        low, _, _ = bilinear(tl.maximum(top - 1, 0), h, H)
        _, high, _ = bilinear(tl.minimum(top + BY, H - 1), h, H)
        for r in range(low, high + 1):
            for dy in tl.static_range(3):
                line = tl.zeros((1, BX, BC), dtype=tl.float32)
                for dx in tl.static_range(3):
                    left, right, along = bilinear(x + dx - 1, w, W)
                    inside = (x + dx >= 1) & (x + dx <= W)
                    along = tl.where(inside, along, 0.0)
                    against = tl.where(inside, 1.0 - along, 0.0)
                    at = image + (tl.cast(r, tl.int64) * w * 9 + dy * 3 + dx) * C
                    one = tl.load(at + left * (9 * C) + c, mask=mask, other=0.0)
                    two = tl.load(at + right * (9 * C) + c, mask=mask, other=0.0)
                    line += one.to(tl.float32) * against + two.to(tl.float32) * along
                acc += hat(y + dy - 1, r, h, H) * line
    at = out + ((tl.cast(b, tl.int64) * H + y) * W + x) * C + c
    tl.store(at, acc.to(out.dtype.element_ty), mask=(y < H) & mask)


@on_its_device
def products_of(
    levels: Sequence[torch.Tensor],
    taps: Sequence[torch.Tensor],
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    relu: bool = False,
    config: GroupConfig | None = None,
) -> torch.Tensor:
    """Return (B, pixels of all levels, taps, C_out): each pixel's channels times the weights of its level.

    Args:
        levels: maps (B, pixels, C), dense inside each image; of one number of channels.
        taps: (C_out, taps, C) for each level, the channels of a tap side by side.
        scale: (levels, C_out) float32, with `shift` applied to the products before ReLU.
        shift: see there.
        relu: whether negative results become zero.
        config: the kernel's configuration, a heuristic's where not given.
    """
    batch, channels = levels[0].shape[0], levels[0].shape[2]
    channels_out, count, _ = taps[0].shape
    pixels = [level.shape[1] for level in levels]
    out = levels[0].new_empty(batch, sum(pixels), count, channels_out)
    if out.numel() == 0:
        return out
    if len({tap.stride() for tap in taps}) > 1:
        taps = [tap.contiguous() for tap in taps]
    if config is None:
        config = group_config(levels[0], batch * max(pixels))
    tiles = sum(triton.cdiv(batch * n, config.rows) for n in pixels) * triton.cdiv(channels_out, config.channels)
    products_kernel[(tiles * count,)](
        tuple(levels),
        tuple(taps),
        out,
        out if scale is None else scale,
        out if shift is None else shift,
        batch,
        tuple(pixels),
        tuple(level.stride(0) for level in levels),
        taps[0].stride(0),
        taps[0].stride(1),
        out.stride(0),
        C_IN=channels,
        C_OUT=channels_out,
        TAPS=count,
        LEVELS=len(levels),
        BM=config.rows,
        BN=config.channels,
        BK=config.depth_of(out.dtype),
        PRECISION=precision(out.dtype),
        HAS_SCALE=scale is not None,
        RELU=relu,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out


@on_its_device
def gather(products: Sequence[torch.Tensor], sizes: Sequence[Any], out: torch.Tensor) -> None:
    """Write the sum of resampled and shifted products to out (B, H, W, C).

    Args:
        products: (B, h * w, 9, C) for each level, dense inside each image.
        sizes: (h, w) of each level.
        out: see there; dense.
    """
    batch, height, width, channels = out.shape
    block = min(triton.next_power_of_2(channels), 64)
    gather_kernel[(triton.cdiv(height, 8) * triton.cdiv(width, 8), triton.cdiv(channels, block), batch)](
        tuple(products),
        out,
        tuple(h for h, _ in sizes),
        tuple(w for _, w in sizes),
        tuple(part.stride(0) for part in products),
        height,
        width,
        C=channels,
        LEVELS=len(sizes),
        BY=8,
        BX=8,
        BC=block,
        num_warps=4,
    )


def pixels_of(x: torch.Tensor) -> torch.Tensor:
    """Return x (B, C, H, W) as (B, H * W, C), dense inside each image: a view where it is one already."""
    batch, channels, height, width = x.shape
    image = x.permute(0, 2, 3, 1)
    dense = (
        image.stride(3) == 1 and image.stride(2) == channels and (height == 1 or image.stride(1) == width * channels)
    )
    return (image if dense else image.contiguous()).view(batch, height * width, channels)


@torch.library.custom_op("fastuper::upsampled_conv3x3", mutates_args=())
def upsampled_conv3x3(
    levels: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], height: int, width: int
) -> torch.Tensor:
    """Return what the public function of this name says, in channels_last memory."""
    batch, channels_out = levels[0].shape[0], weights[0].shape[0]
    out = levels[0].new_empty(batch, height, width, channels_out)
    if out.numel() == 0:
        return from_nhwc(out)
    products: list[torch.Tensor] = []
    taps = [taps_of(weight) for weight in weights]
    if len({level.shape[1] for level in levels}) == 1:
        whole = products_of([pixels_of(level) for level in levels], taps)
        products = list(whole.split([level.shape[2] * level.shape[3] for level in levels], dim=1))
    else:
        products = [products_of([pixels_of(level)], [tap]) for level, tap in zip(levels, taps, strict=True)]
    gather(products, [tuple(level.shape[2:]) for level in levels], out)
    return from_nhwc(out)


@upsampled_conv3x3.register_fake
def _(levels: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], height: int, width: int) -> torch.Tensor:
    return from_nhwc(levels[0].new_empty(levels[0].shape[0], height, width, weights[0].shape[0]))


@torch.library.custom_op("fastuper::taps_transposed", mutates_args=())
def taps_transposed(grad: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the products' gradient (B, height * width, 9, C) for that of their sum, grad (B, C, H, W)."""
    batch, channels = grad.shape[:2]
    image = grad.permute(0, 2, 3, 1).contiguous()
    return transposed(image, (height, width), 3).view(batch, height * width, 9, channels)


@taps_transposed.register_fake
def _(grad: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return grad.new_empty(grad.shape[0], height * width, 9, grad.shape[1])


@torch.library.custom_op("fastuper::taps_gathered", mutates_args=())
def taps_gathered(products: torch.Tensor, size: Sequence[int], height: int, width: int) -> torch.Tensor:
    """Return the sum (B, C, height, width) of a level's resampled products (B, h * w, 9, C); its size is (h, w)."""
    out = products.new_empty(len(products), height, width, products.shape[3])
    if out.numel():
        gather([products.contiguous()], [tuple(size)], out)
    return from_nhwc(out)


@taps_gathered.register_fake
def _(products: torch.Tensor, size: Sequence[int], height: int, width: int) -> torch.Tensor:
    return from_nhwc(products.new_empty(len(products), height, width, products.shape[3]))


def _keep_fine(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    grad, height, width = inputs
    ctx.sizes = (height, width), *grad.shape[2:]


def _keep_coarse(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.size = inputs[1]


def _to_fine(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return taps_gathered(grad, *ctx.sizes), None, None


def _to_coarse(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    return taps_transposed(grad, *ctx.size), None, None, None


# Each is the other's transpose, so that gradients of gradients are theirs too.
taps_transposed.register_autograd(_to_fine, setup_context=_keep_fine)
taps_gathered.register_autograd(_to_coarse, setup_context=_keep_coarse)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    levels, weights, _, _ = inputs
    ctx.count = len(levels)
    ctx.save_for_backward(*levels, *weights)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    levels, weights = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    wanted = zip(levels, weights, *ctx.needs_input_grad[:2], strict=True)
    grads = [_level_backward(grad, *level) for level in wanted]
    return [level for level, _ in grads], [weight for _, weight in grads], None, None


def _level_backward(
    grad: torch.Tensor, level: torch.Tensor, weight: torch.Tensor, needs_level: bool, needs_weight: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of a level and of its weight: two GEMMs at the level's own resolution."""
    if not needs_level and not needs_weight:
        return None, None
    batch, channels, height, width = level.shape
    channels_out = weight.shape[0]
    taps = weight.permute(2, 3, 0, 1).reshape(9 * channels_out, channels)
    products = taps_transposed(grad, height, width).view(batch * height * width, 9 * channels_out)
    level_grad = weight_grad = None
    if needs_level:
        level_grad = from_nhwc((products @ taps).view(batch, height, width, channels))
    if needs_weight:
        flat = level.permute(0, 2, 3, 1).reshape(batch * height * width, channels)
        weight_grad = (products.T @ flat).view(3, 3, channels_out, channels).permute(2, 3, 0, 1)
    return level_grad, weight_grad


upsampled_conv3x3.register_autograd(_backward, setup_context=_keep)

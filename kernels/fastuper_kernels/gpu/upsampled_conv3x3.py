"""`upsampled_conv3x3` on a GPU: one launch for the products of all levels with the nine taps, a second for their sum.

The first kernel is a grouped GEMM: its tiles are spread over several maps, and small maps share a launch with large
maps. It also computes the branches of a pyramid pooling module. In the second kernel each program computes a few rows,
columns and channels of the result. It resamples a row of products along the columns once, and adds it to each row of
the result that reads it.
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
    """Write relu(products * scale + shift): each pixel's channels times the weights of its level, tap by tap.

    Program: BM pixels of a level's batch, BN output channels of one tap.

    xs: a tuple of LEVELS pointers to maps (B, pixels[l], C_IN), dense inside each image.
    weights: a tuple of LEVELS pointers to (C_OUT, TAPS, C_IN), the channels of a tap contiguous.
    out: pointer to (B, sum of pixels, TAPS, C_OUT), dense inside each image; written.
    scale, shift: pointers to (LEVELS, C_OUT) float32, or any pointer without HAS_SCALE.
    B: images.
    pixels: a tuple of LEVELS numbers, the pixels of an image.
    x_strides: a tuple of LEVELS numbers, the elements between the images of a map.
    weight_stride_n, weight_stride_tap: elements between output channels, and between taps, of each weight.
    out_stride: elements between the images of `out`.
    C_IN, C_OUT: input and output channels of each level.
    TAPS: taps of the weights: 9, or 1 for the branches of a pyramid.
    LEVELS: the number of maps.
    BM, BN: pixels and output channels of a tile.
    BK: input channels per step.
    PRECISION: "tf32" or "ieee", the precision of float32 products.
    HAS_SCALE: False to leave out scale and shift.
    RELU: True to clamp negative values to zero.
    """
    blocks: tl.constexpr = (C_OUT + BN - 1) // BN
    tile = tl.program_id(0)
    # The tile's level. `+ zero` makes a variable of an argument that Triton may have compiled in as a constant.
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
    # Weights times pixels: the tensor cores need 64 rows of the left factor, and small maps have fewer pixels.
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for c in range(0, C_IN, BK):
        valid_k = c + k < C_IN
        left = tl.load(weight + c, mask=inside[:, None] & valid_k[None, :], other=0.0)
        right = tl.load(x + c, mask=ok[:, None] & valid_k[None, :], other=0.0)
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
    """Write the sum over levels and taps of the products, resampled to (H, W) and shifted by the tap.

    Program: BY rows, BX columns and BC channels of an image.

    products: a tuple of LEVELS pointers to (B, heights[l], widths[l], 9, C), dense inside each image.
    out: pointer to (B, H, W, C), dense; written.
    heights, widths: tuples of LEVELS numbers, the sizes of the levels.
    image_strides: a tuple of LEVELS numbers, the elements between the images of the products.
    H, W: the size of the result.
    C: channels.
    LEVELS: the number of levels.
    BY, BX, BC: rows, columns and channels of a program.
    """
    top = tl.program_id(0) // tl.cdiv(W, BX) * BY
    # The tensors have three dimensions from the start: each thread holds the values of a row of products that it adds
    # up.
    y = (top + tl.arange(0, BY))[:, None, None]
    x = (tl.program_id(0) % tl.cdiv(W, BX) * BX + tl.arange(0, BX))[None, :, None]
    c = (tl.program_id(1) * BC + tl.arange(0, BC))[None, None, :]
    b = tl.program_id(2)
    mask = (x < W) & (c < C)
    acc = tl.zeros((BY, BX, BC), dtype=tl.float32)
    for level in tl.static_range(LEVELS):
        h, w = heights[level], widths[level]
        image = products[level] + tl.cast(b, tl.int64) * image_strides[level]
        # The rows of products that the program's rows read.
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
                    near = tl.load(at + left * (9 * C) + c, mask=mask, other=0.0)
                    far = tl.load(at + right * (9 * C) + c, mask=mask, other=0.0)
                    line += near.to(tl.float32) * against + far.to(tl.float32) * along
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
    """Return each pixel's channels times the weights of its level: (B, pixels of all levels, taps, C_out).

    Args:
        levels: maps (B, pixels, C), dense inside each image, all with the same C.
        taps: (C_out, taps, C) for each level, the channels of a tap contiguous.
        scale: (levels, C_out) float32; the result is relu(products * scale + shift). None for ones.
        shift: (levels, C_out) float32; None if scale is None.
        relu: True to clamp negative values to zero.
        config: the kernel's configuration; None for a heuristic's.
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
    """Write the sum over levels and taps of resampled and shifted products.

    Args:
        products: (B, h * w, 9, C) for each level, dense inside each image.
        sizes: (h, w) of each level.
        out: (B, H, W, C), dense; written.
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
    """Return x (B, C, H, W) as (B, H * W, C), dense inside each image: a view if x's memory allows, else a copy."""
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
    """The operator of `fastuper_kernels.ops.upsampled_conv3x3`, without `strip`; the result is in channels_last memory.

    Args:
        levels: maps (B, C_l, H_l, W_l).
        weights: (C_out, C_l, 3, 3) for each level.
        height: the result's height.
        width: the result's width.
    """
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


@torch.library.custom_op("fastuper::upsampled_conv3x3_backward", mutates_args=())
def upsampled_conv3x3_backward(grad: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The operator of the backward pass of `gather`, for one level.

    Args:
        grad: (B, C, H, W), the gradient of the result.
        height: the level's height.
        width: the level's width.

    Returns:
        The gradient of the level's products, (B, height * width, 9, C).
    """
    batch, channels = grad.shape[:2]
    image = grad.permute(0, 2, 3, 1).contiguous()
    return transposed(image, (height, width), 3).view(batch, height * width, 9, channels)


@upsampled_conv3x3_backward.register_fake
def _(grad: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return grad.new_empty(grad.shape[0], height * width, 9, grad.shape[1])


@torch.library.custom_op("fastuper::upsampled_conv3x3_double_backward", mutates_args=())
def upsampled_conv3x3_double_backward(
    products: torch.Tensor, size: Sequence[int], height: int, width: int
) -> torch.Tensor:
    """The operator of the backward pass of `upsampled_conv3x3_backward`: `gather` of one level's products.

    Args:
        products: (B, h * w, 9, C).
        size: (h, w) of the level.
        height: the result's height.
        width: the result's width.

    Returns:
        (B, C, height, width) in channels_last memory.
    """
    out = products.new_empty(len(products), height, width, products.shape[3])
    if out.numel():
        gather([products.contiguous()], [tuple(size)], out)
    return from_nhwc(out)


@upsampled_conv3x3_double_backward.register_fake
def _(products: torch.Tensor, size: Sequence[int], height: int, width: int) -> torch.Tensor:
    return from_nhwc(products.new_empty(len(products), height, width, products.shape[3]))


def _save_sizes(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    grad, height, width = inputs
    ctx.sizes = (height, width), *grad.shape[2:]


def _save_level_size(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.size = inputs[1]


def _to_fine(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return upsampled_conv3x3_double_backward(grad, *ctx.sizes), None, None


def _to_coarse(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    return upsampled_conv3x3_backward(grad, *ctx.size), None, None, None


# Each operator is the other's transpose, and so its backward pass: gradients of any order need no third operator.
upsampled_conv3x3_backward.register_autograd(_to_fine, setup_context=_save_sizes)
upsampled_conv3x3_double_backward.register_autograd(_to_coarse, setup_context=_save_level_size)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
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
    """Return the gradients of a level (B, C, h, w) and of its weight (C_out, C, 3, 3), by two GEMMs."""
    if not needs_level and not needs_weight:
        return None, None
    batch, channels, height, width = level.shape
    channels_out = weight.shape[0]
    taps = weight.permute(2, 3, 0, 1).reshape(9 * channels_out, channels)
    products = upsampled_conv3x3_backward(grad, height, width).view(batch * height * width, 9 * channels_out)
    level_grad = weight_grad = None
    if needs_level:
        level_grad = from_nhwc((products @ taps).view(batch, height, width, channels))
    if needs_weight:
        positions = level.permute(0, 2, 3, 1).reshape(batch * height * width, channels)
        weight_grad = (products.T @ positions).view(3, 3, channels_out, channels).permute(2, 3, 0, 1)
    return level_grad, weight_grad


upsampled_conv3x3.register_autograd(_backward, setup_context=_save)

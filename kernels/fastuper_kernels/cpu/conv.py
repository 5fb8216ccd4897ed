"""`conv_bn_relu` on a CPU: inference by GEMMs or Winograd's transforms, 3x3 training by Winograd's transforms."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from fastuper_kernels.cpu import winograd
from fastuper_kernels.cpu.linear import linear
from fastuper_kernels.cpu.packs import packed
from fastuper_kernels.cpu.resample import add_upsampled_
from fastuper_kernels.dispatch.choices import CONV3X3
from fastuper_kernels.dispatch.modes import is_eager, is_ordinary
from fastuper_kernels.dispatch.torch_private import is_batched

Strip = tuple[int, int, int]  # (start, stop, height)

# From this number of channels on, Winograd's gradients have no larger errors than a direct convolution's, which grow
# with the number of terms. Measured for a map's gradient: 0.75e-6 and 0.84e-6 with 256 channels, 0.57e-6 and 0.60e-6
# with 128.
TRAINED_CHANNELS = 256

# Where nothing is measured: from this number of products (input channels * output channels * tiles) on, the products
# that Winograd saves cost more than its transforms. One thread on AVX-512, and on AVX2: 2.6 and 1.8 of the direct time
# for 256 -> 256 channels and 32 tiles, 1.06 and 0.84 for 512 -> 256 and 128, 0.65 and 0.61 for 2048 -> 512 and 32.
WORTHWHILE = 1 << 24
# The same for training, in tiles: the transforms of the weights take the same time for few tiles and for many.
# 512 -> 512 channels: 4.9 and 3.1 for 32 tiles, 1.8 and 0.9 for 128; on AVX-512 0.83 for 512.
TRAINED_TILES = 512
# Larger maps are not measured: from here on both times grow with the map. With 128 tiles, reading the weights takes a
# large part of Winograd's time. 512 -> 512 channels on an Intel Xeon 6: 1.04 of the direct time for 128 tiles, 0.86 for
# 256, 0.73 for 512, 0.71 for 1024.
LARGEST = 512
# From this number of weights' channels (input * output) on, the transforms of a small map's weights are not kept: they
# take 201 MB for 4096 -> 512 channels, the pyramid pooling over ResNet-50 in Unified Perceptual Parsing. A direct
# convolution of 16 x 16 pixels takes 0.1 s there, Winograd's 0.06 s.
LARGEST_PACK = 1 << 20


def conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    addend: torch.Tensor | None,
    upsampled: torch.Tensor | None,
    relu: bool,
    strip: Strip,
) -> torch.Tensor:
    """Return `conv_bn_relu` of checked operands without gradients, in channels_last memory.

    Args:
        x: (B, C, rows, W): the rows of the strip, and for k = 3 their neighbours inside the map.
        weight: (C_out, C, k, k), k being 1 or 3.
        scale: (C_out,), or None for ones.
        shift: (C_out,), or None for zeros.
        addend: (B, C_out, stop - start, W), or None for zeros.
        upsampled: (B, C_out, h, w), or None for zeros.
        relu: True to clamp negative values to zero.
        strip: (start, stop, height): the rows to compute.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    if weight.shape[-1] == 3 and _way(x, weight) == "winograd":
        if addend is None and scale is not None:
            kernels, scale = packed(weight, _folded_for_winograd, x.dtype, scale), None
        else:
            kernels = packed(weight, winograd.pack, x.dtype)
        y = _by_winograd(x, kernels, scale, shift, addend, relu, strip)
    elif _is_large(weight, x, strip) and weight.dtype == x.dtype:
        y = _unfolded(x, weight.detach(), scale, shift, addend, relu, strip)
    elif addend is not None or (scale is not None and x.dtype == torch.float16):
        # An addend has the scale too, and float16 weights times a scale could underflow.
        y = _unfolded(x, packed(weight, _channels_last, x.dtype), scale, shift, addend, relu, strip)
    else:
        kernel = packed(weight, _channels_last, x.dtype) if scale is None else packed(weight, _folded, x.dtype, scale)
        y = _by_gemm(x, kernel, None if shift is None else shift.to(x.dtype), relu, strip)
    if upsampled is not None:
        add_upsampled_(y, upsampled, strip)
    return y


def between_zeros(x: torch.Tensor, margin: int, strip: Strip) -> torch.Tensor:
    """Return the rows x of a strip with `margin` rows of zeros added above the map's first row and below its last."""
    start, stop, height = strip
    return F.pad(x, (0, 0, margin if start == 0 else 0, margin if stop == height else 0))


def _is_large(weight: torch.Tensor, x: torch.Tensor, strip: Strip) -> bool:
    """Return True if a copy of the weight would take more memory than two results; then the weight itself is read."""
    start, stop, _ = strip
    return weight.numel() > 2 * x.shape[0] * weight.shape[0] * (stop - start) * x.shape[3]


# Packs ----------------------------------------------------------------------------------------------------------------


def _channels_last(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight.to(dtype, copy=True).contiguous(memory_format=torch.channels_last)


def _folded(weight: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> torch.Tensor:
    """Return weight * scale, rounded once."""
    wide = torch.promote_types(scale.dtype, weight.dtype)
    folded = weight.to(wide) * scale.to(wide)[:, None, None, None]
    return folded.to(dtype).contiguous(memory_format=torch.channels_last)


def _folded_for_winograd(weight: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> list[torch.Tensor]:
    """Return the transform of weight * scale, rounded once."""
    wide = torch.promote_types(scale.dtype, weight.dtype)
    return winograd.pack(weight.to(wide) * scale.to(wide)[:, None, None, None], dtype)


# Ways -----------------------------------------------------------------------------------------------------------------


def _by_gemm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, relu: bool, strip: Strip
) -> torch.Tensor:
    """Return relu(conv(x) + bias): 1x1 as a linear layer of the positions, 3x3 by PyTorch's own convolution."""
    if weight.shape[-1] == 1:
        batch, channels, height, width = x.shape
        positions = x.permute(0, 2, 3, 1).reshape(-1, channels)
        y = linear(positions, weight.flatten(1), bias, activation="relu" if relu else None)
        return y.view(batch, height, width, weight.shape[0]).permute(0, 3, 1, 2)
    start, stop, height = strip
    if weight.is_contiguous():  # oneDNN would take 1.6 times as long with x in channels_last
        x = x.contiguous()
    if start == 0 and stop == height:
        y = F.conv2d(x, weight, bias, padding=1)
    else:
        y = F.conv2d(between_zeros(x, 1, strip), weight, bias, padding=(0, 1))
    y = y.contiguous(memory_format=torch.channels_last)
    return y.relu_() if relu else y


def _unfolded(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    addend: torch.Tensor | None,
    relu: bool,
    strip: Strip,
) -> torch.Tensor:
    """Return relu((conv(x) + addend) * scale + shift), each step on the result of the one before."""
    y = _by_gemm(x, weight, None, False, strip)
    if addend is not None:
        y.add_(addend)
    if scale is not None or shift is not None:
        y = _scale_and_shift(y, scale, shift)
    return y.relu_() if relu else y


def _by_winograd(
    x: torch.Tensor,
    kernels: list[torch.Tensor],
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    addend: torch.Tensor | None,
    relu: bool,
    strip: Strip,
) -> torch.Tensor:
    """Return relu((conv(x) + addend) * scale + shift), with the epilogue applied to each block while it is in cache."""
    start, stop, height = strip
    out = x.new_empty(x.shape[0], stop - start, x.shape[3], kernels[0].shape[0])
    halo = (int(start > 0), int(stop < height))
    scale, shift = (None if vector is None else vector.to(x.dtype) for vector in (scale, shift))
    for i in range(x.shape[0]):
        add = None if addend is None else addend[i].permute(1, 2, 0)

        def finish(block: torch.Tensor, first: int, last: int, add: torch.Tensor | None = add) -> None:
            if add is not None:
                block.add_(add[first:last])
            if scale is not None and shift is not None:
                torch.addcmul(shift, block, scale, out=block)
            elif scale is not None:
                block.mul_(scale)
            elif shift is not None:
                block.add_(shift)
            if relu:
                block.relu_()

        winograd.conv3x3(x[i].permute(1, 2, 0), kernels, halo, finish, out[i])
    return out.permute(0, 3, 1, 2)


def _scale_and_shift(y: torch.Tensor, scale: Any, shift: Any) -> torch.Tensor:
    """Return y * scale + shift in y's dtype, computed in the dtype of scale."""
    given = scale if scale is not None else shift
    dtype = given.dtype if y.dtype in (torch.bfloat16, torch.float16) else y.dtype
    ones, zeros = torch.ones_like(given, dtype=dtype), torch.zeros_like(given, dtype=dtype)
    scale, shift = (
        default if vector is None else vector.to(dtype) for vector, default in ((scale, ones), (shift, zeros))
    )
    # This is one pass, for mixed dtypes too. (F.batch_norm of PyTorch 2.11 refuses an epsilon of 0.)
    return torch.batch_norm(y, scale, shift, zeros, ones, False, 0.0, 0.0, torch.backends.cudnn.enabled)


# Winograd or direct ---------------------------------------------------------------------------------------------------


def _way(x: torch.Tensor, weight: torch.Tensor, trained: bool = False) -> str:
    """Return the option of the choice `conv3x3` for a 3x3 convolution, alone or with its gradients.

    Winograd's transforms run only in float32: narrower dtypes would lose accuracy. Gradients are measured separately,
    because oneDNN's gradients take other times than its convolution. On AVX2 the weight's gradient takes six times as
    long.
    """
    (channels_out, channels), (height, width) = weight.shape[:2], x.shape[2:]
    tiles = -(-height // winograd.HEIGHT) * -(-width // winograd.WIDTH)
    if x.dtype != torch.float32 or min(channels, channels_out) < 128 or tiles < 32:
        return "direct"  # the transforms would cost more than the products that they save
    if not trained and channels * channels_out > LARGEST_PACK and tiles < LARGEST:
        return "direct"
    # Training transforms the weights three times a call. Only larger maps and batches save more than that costs.
    tiles = tiles * x.shape[0] if trained else tiles
    size = min(LARGEST, 1 << tiles.bit_length() - 1)
    key = f"{channels} -> {channels_out} channels, {size} tiles"
    if trained:
        default = "winograd" if size >= TRAINED_TILES else "direct"
        return CONV3X3(f"{key}, with gradients", partial(_trained_candidates, weight.shape, size), default=default)
    default = "winograd" if channels * channels_out * size >= WORTHWHILE else "direct"
    return CONV3X3(key, partial(_candidates, weight.shape, size), default=default)


def _candidates(shape: torch.Size, tiles: int) -> dict[str, Callable[[], object]]:
    """Return the ways to convolve a map of `tiles` tiles by a weight of this shape, as functions of no arguments."""
    (height, width), channels = _size_of(tiles), shape[1]
    x = torch.linspace(-1, 1, height * width * channels, device="cpu").view(height, width, channels)
    weight = torch.linspace(-1, 1, shape.numel(), device="cpu").view(shape)
    kernels, out = winograd.pack(weight, weight.dtype), x.new_empty(height, width, shape[0])
    image, wide = x.permute(2, 0, 1)[None], _channels_last(weight, weight.dtype)
    return {
        "winograd": lambda: winograd.conv3x3(x, kernels, (0, 0), lambda *_: None, out),
        "direct": lambda: F.conv2d(image, wide, padding=1),
    }


def _trained_candidates(shape: torch.Size, tiles: int) -> dict[str, Callable[[], object]]:
    """Return the ways to a convolution and both of its gradients, like `_candidates`."""
    height, width = _size_of(tiles)
    x, grad = (
        torch.linspace(-1, 1, n * height * width, device="cpu").view(1, height, width, n).permute(0, 3, 1, 2)
        for n in (shape[1], shape[0])
    )
    weight = _channels_last(torch.linspace(-1, 1, shape.numel(), device="cpu").view(shape), x.dtype)
    return {
        "winograd": lambda: (_convolved(x, weight), _gradients(x, weight, grad, True, True)),
        "direct": lambda: (F.conv2d(x, weight, padding=1), _direct_gradients(x, weight, grad, True, True)),
    }


def _size_of(tiles: int) -> tuple[int, int]:
    """Return (height, width) of an almost square map of `tiles` tiles."""
    rows = math.isqrt(tiles // 2)
    return winograd.HEIGHT * rows, winograd.WIDTH * (tiles // rows)


# Training -------------------------------------------------------------------------------------------------------------


def trains_by_winograd(x: torch.Tensor, weight: torch.Tensor, addend: torch.Tensor | None) -> bool:
    """Return True if `trained_conv` can take these operands, and is faster than PyTorch's own convolution."""
    if x.device.type != "cpu" or weight.shape[-1] != 3 or not is_eager() or not is_ordinary(x, weight, addend):
        return False
    if weight.dtype != x.dtype or 0 in x.shape or min(weight.shape[:2]) < TRAINED_CHANNELS:
        return False
    return _way(x, weight, trained=True) == "winograd"


def trained_conv(x: torch.Tensor, weight: torch.Tensor, addend: torch.Tensor | None) -> torch.Tensor:
    """Return `conv(x) + addend` with gradients, all by Winograd's transforms; see `trains_by_winograd`."""
    # x becomes contiguous outside the function: gradients of gradients go back through the tensors that it saves.
    x = x.contiguous(memory_format=torch.channels_last)
    result: torch.Tensor = _Winograd.apply(x, weight, addend)
    return result


class _Winograd(torch.autograd.Function):
    """`conv(x) + addend` and its gradients by Winograd's transforms; saves only x and the weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, addend: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _convolved(x, weight, addend)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        *wanted, wants_addend = ctx.needs_input_grad
        # PyTorch's own operator has gradients itself, and takes several gradients at once.
        direct = torch.is_grad_enabled() or is_batched(grad)
        x_grad, weight_grad = (_direct_gradients if direct else _gradients)(x, weight, grad, *wanted)
        return x_grad, weight_grad, grad if wants_addend else None


def _convolved(x: torch.Tensor, weight: torch.Tensor, addend: torch.Tensor | None = None) -> torch.Tensor:
    return _by_winograd(x, winograd.pack(weight, x.dtype), None, None, addend, False, (0, x.shape[2], x.shape[2]))


def _gradients(
    x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, wants_x: bool, wants_weight: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of x and of the weight by Winograd's transforms."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    x_grad = _convolved(grad, weight.flip(2, 3).transpose(0, 1)) if wants_x else None
    return x_grad, winograd.weight_gradient(x, grad) if wants_weight else None


def _direct_gradients(
    x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, wants_x: bool, wants_weight: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of x and of the weight by PyTorch's own operator."""
    x_grad, weight_grad, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [wants_x, wants_weight, False]
    )
    return x_grad, weight_grad

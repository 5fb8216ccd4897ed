"""A convolution with what follows it: BatchNorm as a scale and a shift, ReLU, the step of a top-down path."""

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
from fastuper_kernels.dispatch.backend import takes_triton
from fastuper_kernels.dispatch.choices import Choice
from fastuper_kernels.dispatch.modes import (
    autocast,
    check_dtypes,
    is_eager,
    is_eager_inference,
    is_ordinary,
    without_autocast,
)
from fastuper_kernels.ops.upsample_add import upsample_add

Strip = tuple[int, int, int]

CONV3X3 = Choice(
    "conv3x3",
    options=("winograd", "direct"),
    default="winograd",
    why="24 products for 72 paid from 128 channels and 32 tiles on",
)
# From so many channels on Winograd's gradients are as near to float64 as a direct convolution's, whose errors grow with
# the terms that it adds up (0.75e-6 and 0.84e-6 for a map's of 256 channels, 0.57e-6 and 0.60e-6 for 128).
TRAINED_CHANNELS = 256
CONV = Choice(
    "conv",
    options=("triton", "cudnn"),
    default="triton",
    why="on a GPU, one kernel with all that follows; cuDNN needs a second one",
)


def conv_bn_relu(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    *,
    addend: torch.Tensor | None = None,
    upsampled: torch.Tensor | None = None,
    relu: bool = True,
    strip: Strip | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Return `relu((conv(x) + addend) * scale + shift) + bilinear(upsampled to the output's size)`.

    Stride 1, "same" padding with zeros. Every operand but x and weight may be left out.

    Args:
        x: (B, C, H, W), best in channels_last.
        weight: (C_out, C, k, k), k being 1 or 3.
        scale: (C_out,), with `shift` a BatchNorm in evaluation; float32 also where x is narrower.
        shift: (C_out,).
        addend: (B, C_out, H, W), part of the convolution's sum.
        upsampled: (B, C_out, h, w), resampled (bilinear, align_corners=False) and added at the end.
        relu: whether negative values become zero, before `upsampled` is added.
        strip: (start, stop, height): compute rows [start, stop) of a map of that height alone. x then holds these rows
            and, for k = 3, the neighbouring ones inside the map; `addend` holds these rows; `upsampled` is whole. This
            takes PyTorch's operators alone.
        backend: "auto", "triton" or "torch"; see `fastuper_kernels.dispatch.backend`.

    Returns:
        (B, C_out, H, W), or with `strip` (B, C_out, stop - start, W), of x's dtype (under autocast: of its dtype). In
        channels_last memory; where gradients flow or something traces, as PyTorch's own convolution leaves it.

    Raises:
        ValueError: shapes that do not fit, empty maps, x, weight, addend and upsampled of several dtypes, or a backend
            that cannot take them.
    """
    whole = strip is None
    strip = _check(x, weight, scale, shift, addend, upsampled, strip)
    x, addend, upsampled = autocast(x, addend, upsampled)
    if whole and takes_triton(backend, x, weight, scale, shift, addend, upsampled):
        from fastuper_kernels.gpu.conv_bn_relu import conv_bn_relu as kernel

        return kernel(x, *autocast(weight), scale, shift, addend, upsampled, relu)
    if x.device.type == "cpu" and is_eager_inference(x, weight, scale, shift, addend, upsampled):
        with without_autocast(x):
            return _inference(x, weight, scale, shift, addend, upsampled, relu, strip)
    (weight,) = autocast(weight)
    return _plain(x, weight, scale, shift, addend, upsampled, relu, strip)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    *,
    addend: torch.Tensor | None = None,
    upsampled: torch.Tensor | None = None,
    relu: bool = True,
) -> torch.Tensor:
    """The definition of `conv_bn_relu`, in one operator a step."""
    y = _epilogue(F.conv2d(x, weight, padding=weight.shape[-1] // 2), scale, shift, addend, relu)
    if upsampled is not None:
        y = y + F.interpolate(upsampled, size=y.shape[2:], mode="bilinear", align_corners=False)
    return y.to(x.dtype)


def _epilogue(
    y: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    addend: torch.Tensor | None,
    relu: bool,
) -> torch.Tensor:
    if addend is not None:
        y = y + addend
    if scale is not None:
        y = y * scale[:, None, None]
    if shift is not None:
        y = y + shift[:, None, None]
    return F.relu(y) if relu else y


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    addend: torch.Tensor | None,
    upsampled: torch.Tensor | None,
    strip: Strip | None,
) -> Strip:
    """Return the rows to compute.

    Raises:
        ValueError: shapes that do not fit.
    """
    k = weight.shape[-1]
    fits = x.ndim == weight.ndim == 4 and weight.shape[2:] in ((1, 1), (3, 3)) and weight.shape[1] == x.shape[1]
    if not fits or min(x.shape[2:]) < 1:
        raise ValueError(
            f"x must be (B, C, H, W) and weight (C_out, C, k, k) with k 1 or 3, "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    channels = weight.shape[0]
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is not None and vector.shape != (channels,):
            raise ValueError(f"{name} must be ({channels},), one a channel of the output, got {tuple(vector.shape)}")
    if strip is None:
        strip = (0, x.shape[2], x.shape[2])
    else:
        start, stop, height = strip
        if not 0 <= start < stop <= height:
            raise ValueError(f"strip {strip} is not (start, stop, height) of rows in a map of that height")
        margin = k // 2
        given = min(stop + margin, height) - max(start - margin, 0)
        if x.shape[2] != given:
            raise ValueError(f"x must hold {given} rows to compute strip {strip} of a {k} x {k} conv, got {x.shape[2]}")
    shape = (x.shape[0], channels, strip[1] - strip[0], x.shape[3])
    if addend is not None and addend.shape != shape:
        raise ValueError(f"addend must have the output's shape {tuple(shape)}, got {tuple(addend.shape)}")
    fits = upsampled is None or (
        upsampled.ndim == 4 and upsampled.shape[:2] == shape[:2] and min(upsampled.shape[2:]) > 0
    )
    if upsampled is not None and not fits:
        raise ValueError(f"upsampled must be ({shape[0]}, {channels}, h, w), got {tuple(upsampled.shape)}")
    check_dtypes(x=x, weight=weight, addend=addend, upsampled=upsampled)
    return strip


def _plain(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    addend: torch.Tensor | None,
    upsampled: torch.Tensor | None,
    relu: bool,
    strip: Strip,
) -> torch.Tensor:
    """PyTorch's operators, to be traced and differentiated."""
    start, stop, height = strip
    if start == 0 and stop == height:
        if _trains_by_winograd(x, weight, addend):
            # Outside of the function: gradients of gradients go back through what it keeps.
            x = x.contiguous(memory_format=torch.channels_last)
            y = _epilogue(_Winograd.apply(x, weight, addend), scale, shift, None, relu)
            return y if upsampled is None else upsample_add(upsampled, y)
        return reference(x, weight, scale, shift, addend=addend, upsampled=upsampled, relu=relu)
    margin = weight.shape[-1] // 2
    y = F.conv2d(_between_zeros(x, margin, strip), weight, padding=(0, margin))
    y = _epilogue(y, scale, shift, addend, relu)
    if upsampled is not None:
        size = (height, x.shape[3])
        y = y + F.interpolate(upsampled, size=size, mode="bilinear", align_corners=False)[:, :, start:stop]
    return y.to(x.dtype)


def _between_zeros(x: torch.Tensor, margin: int, strip: Strip) -> torch.Tensor:
    """Return x with rows of zeros where the map ends."""
    start, stop, height = strip
    return F.pad(x, (0, 0, margin if start == 0 else 0, margin if stop == height else 0))


def _inference(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    addend: torch.Tensor | None,
    upsampled: torch.Tensor | None,
    relu: bool,
    strip: Strip,
) -> torch.Tensor:
    """On a CPU: by GEMMs over the positions, or by Winograd's transform a few rows at a time."""
    x = x.contiguous(memory_format=torch.channels_last)
    if weight.shape[-1] == 3 and _way(x, weight) == "winograd":
        if addend is None and scale is not None:
            kernels, scale = packed(weight, _winograd_folded, x.dtype, scale), None
        else:
            kernels = packed(weight, winograd.pack, x.dtype)
        y = _winograd(x, kernels, scale, shift, addend, relu, strip)
    elif addend is None and (scale is None or x.dtype != torch.float16):
        kernel = packed(weight, _contiguous, x.dtype) if scale is None else packed(weight, _folded, x.dtype, scale)
        y = _convolve(x, kernel, None if shift is None else shift.to(x.dtype), relu, strip)
    else:  # weights of float16 times a scale could be too small for the type
        y = _convolve(x, packed(weight, _contiguous, x.dtype), None, False, strip)
        if addend is not None:
            y.add_(addend)
        if scale is not None or shift is not None:
            y = _scale_and_shift(y, scale, shift)
        if relu:
            y.relu_()
    if upsampled is not None:
        add_upsampled_(y, upsampled, strip)
    return y


def _folded(weight: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(scale.dtype, weight.dtype)
    folded = weight.to(wide) * scale.to(wide)[:, None, None, None]
    return folded.to(dtype).contiguous(memory_format=torch.channels_last)


def _winograd_folded(weight: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> list[torch.Tensor]:
    wide = torch.promote_types(scale.dtype, weight.dtype)
    return winograd.pack(weight.to(wide) * scale.to(wide)[:, None, None, None], dtype)


def _contiguous(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight.to(dtype, copy=True).contiguous(memory_format=torch.channels_last)


def _convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, relu: bool, strip: Strip
) -> torch.Tensor:
    """Return the convolution, with the bias and ReLU in its epilogue where that is possible."""
    if weight.shape[-1] == 1:
        batch, channels, height, width = x.shape
        flat = x.permute(0, 2, 3, 1).reshape(-1, channels)
        y = linear(flat, weight.flatten(1), bias, activation="relu" if relu else None)
        return y.view(batch, height, width, weight.shape[0]).permute(0, 3, 1, 2)
    start, stop, height = strip
    if start == 0 and stop == height:
        y = F.conv2d(x, weight, bias, padding=1)
    else:
        y = F.conv2d(_between_zeros(x, 1, strip), weight, bias, padding=(0, 1))
    y = y.contiguous(memory_format=torch.channels_last)
    return y.relu_() if relu else y


def _scale_and_shift(y: torch.Tensor, scale: Any, shift: Any) -> torch.Tensor:
    """Return y * scale + shift in y's dtype, computed in the dtype of scale."""
    given = scale if scale is not None else shift
    dtype = given.dtype if y.dtype in (torch.bfloat16, torch.float16) else y.dtype
    ones, zeros = torch.ones_like(given, dtype=dtype), torch.zeros_like(given, dtype=dtype)
    scale, shift = (
        default if vector is None else vector.to(dtype) for vector, default in ((scale, ones), (shift, zeros))
    )
    # One pass, also where the dtypes are mixed; F.batch_norm of PyTorch 2.11 refuses an epsilon of 0.
    return torch.batch_norm(y, scale, shift, zeros, ones, False, 0.0, 0.0, torch.backends.cudnn.enabled)


def _way(x: torch.Tensor, weight: torch.Tensor, trained: bool = False) -> str:
    """Return how to compute a 3x3 convolution, and its gradients: Winograd's in float32 alone, where it errs as little.

    oneDNN's gradients take other times than its convolution, on AVX2 six times as long for the weight's.
    """
    (channels_out, channels), (height, width) = weight.shape[:2], x.shape[2:]
    tiles = -(-height // winograd.HEIGHT) * -(-width // winograd.WIDTH)
    if x.dtype != torch.float32 or min(channels, channels_out) < 128 or tiles < 32:
        return "direct"  # the transforms would cost more than the products that they save
    # With gradients the weights are transformed three times a call, which larger maps and batches make up for.
    tiles, largest = (tiles * x.shape[0], 512) if trained else (tiles, 128)
    size = min(largest, 1 << tiles.bit_length() - 1)
    key = f"{channels} -> {channels_out} channels, {size} tiles"
    if trained:
        return CONV3X3(f"{key}, with gradients", partial(_trained_candidates, weight.shape, size))
    return CONV3X3(key, partial(_candidates, weight.shape, size))


def _candidates(shape: torch.Size, tiles: int) -> dict[str, Callable[[], object]]:
    """Return the ways as functions of no arguments, on a map of so many tiles."""
    (height, width), channels = _size_of(tiles), shape[1]
    x = torch.linspace(-1, 1, height * width * channels, device="cpu").view(height, width, channels)
    weight = torch.linspace(-1, 1, shape.numel(), device="cpu").view(shape)
    kernels, out = winograd.pack(weight, weight.dtype), x.new_empty(height, width, shape[0])
    image, wide = x.permute(2, 0, 1)[None], _contiguous(weight, weight.dtype)
    return {
        "winograd": lambda: winograd.conv3x3(x, kernels, (0, 0), lambda *_: None, out),
        "direct": lambda: F.conv2d(image, wide, padding=1),
    }


def _trained_candidates(shape: torch.Size, tiles: int) -> dict[str, Callable[[], object]]:
    """Return likewise the ways to a convolution and its two gradients."""
    height, width = _size_of(tiles)
    x, grad = (
        torch.linspace(-1, 1, n * height * width, device="cpu").view(1, height, width, n).permute(0, 3, 1, 2)
        for n in (shape[1], shape[0])
    )
    weight = _contiguous(torch.linspace(-1, 1, shape.numel(), device="cpu").view(shape), x.dtype)
    return {
        "winograd": lambda: (_convolved(x, weight), _gradients(x, weight, grad, True, True)),
        "direct": lambda: (F.conv2d(x, weight, padding=1), _direct_gradients(x, weight, grad, True, True)),
    }


def _size_of(tiles: int) -> tuple[int, int]:
    """Return (height, width) of a map of so many tiles, almost a square."""
    rows = math.isqrt(tiles // 2)
    return winograd.HEIGHT * rows, winograd.WIDTH * (tiles // rows)


def _trains_by_winograd(x: torch.Tensor, weight: torch.Tensor, addend: torch.Tensor | None) -> bool:
    """Return whether a convolution whose gradients are wanted runs at once on a CPU, and Winograd's way is the faster.

    A weight's gradient comes with it: where the transform pays forwards it does so backwards.
    """
    if x.device.type != "cpu" or weight.shape[-1] != 3 or not is_eager() or not is_ordinary(x, weight, addend):
        return False
    if weight.dtype != x.dtype or 0 in x.shape or min(weight.shape[:2]) < TRAINED_CHANNELS:
        return False
    return _way(x, weight, trained=True) == "winograd"


class _Winograd(torch.autograd.Function):
    """`conv(x) + addend`, and its gradients, by Winograd's transforms; x and the weight are all that is kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, addend: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _convolved(x, weight, addend)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        *wanted, wants_addend = ctx.needs_input_grad
        # Of gradients of gradients, and of several at once, PyTorch's own operator knows.
        own = torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad)
        of_x, of_weight = (_direct_gradients if own else _gradients)(x, weight, grad, *wanted)
        return of_x, of_weight, grad if wants_addend else None


def _convolved(x: torch.Tensor, weight: torch.Tensor, addend: torch.Tensor | None = None) -> torch.Tensor:
    return _winograd(x, winograd.pack(weight, x.dtype), None, None, addend, False, (0, x.shape[2], x.shape[2]))


def _gradients(
    x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, wants_x: bool, wants_weight: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of x and of the weight, by Winograd's transforms."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    of_x = _convolved(grad, weight.flip(2, 3).transpose(0, 1)) if wants_x else None
    return of_x, winograd.weight_gradient(x, grad) if wants_weight else None


def _direct_gradients(
    x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, wants_x: bool, wants_weight: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [wants_x, wants_weight, False]
    )
    return of_x, of_weight


def _winograd(
    x: torch.Tensor,
    kernels: list[torch.Tensor],
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    addend: torch.Tensor | None,
    relu: bool,
    strip: Strip,
) -> torch.Tensor:
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

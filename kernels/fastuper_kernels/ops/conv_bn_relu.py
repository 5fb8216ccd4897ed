"""A convolution with its epilogue: BatchNorm as a scale and a shift, ReLU, the addition of a coarser map."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fastuper_kernels.cpu import matrices
from fastuper_kernels.cpu.conv import Strip, between_zeros, conv, trained_conv, trains_by_winograd
from fastuper_kernels.dispatch.backend import takes_triton
from fastuper_kernels.dispatch.modes import autocast, check_dtypes, is_eager_inference, without_autocast, written_for
from fastuper_kernels.ops.upsample_add import upsample_add


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

    The stride is 1, the padding "same" with zeros. Every operand but x and weight may be left out.

    Args:
        x: (B, C, H, W), fastest in channels_last.
        weight: (C_out, C, k, k), k being 1 or 3.
        scale: (C_out,), with `shift` a BatchNorm in evaluation; may be float32 if x is narrower.
        shift: (C_out,).
        addend: (B, C_out, H, W), added to the convolution's sum.
        upsampled: (B, C_out, h, w), resampled (bilinear, align_corners=False) and added at the end.
        relu: True to clamp negative values to zero before `upsampled` is added.
        strip: (start, stop, height): compute only rows [start, stop) of a map of that height. x then holds these rows
            and, for k = 3, their neighbouring rows inside the map; `addend` holds these rows; `upsampled` is whole.
            Strips always run on PyTorch's operators.
        backend: "auto", "triton" or "torch"; see `fastuper_kernels.dispatch.backend`.

    Returns:
        (B, C_out, H, W), or with `strip` (B, C_out, stop - start, W), of x's dtype (autocast's, where autocast is on).
        In channels_last memory; if gradients flow or something traces, in the layout of PyTorch's own convolution.

    Raises:
        ValueError: shapes do not fit, maps are empty, x, weight, addend and upsampled have several dtypes, or the
            backend cannot take the operands.
    """
    whole = strip is None
    strip = _check(x, weight, scale, shift, addend, upsampled, strip)
    x, addend, upsampled = autocast(x, addend, upsampled)
    if whole and takes_triton(backend, x, weight, scale, shift, addend, upsampled):
        from fastuper_kernels.gpu.conv_bn_relu import conv_bn_relu as kernel

        return kernel(x, *autocast(weight), scale, shift, addend, upsampled, relu)
    if x.device.type == "cpu" and is_eager_inference(x, weight, scale, shift, addend, upsampled):
        with without_autocast(x):
            return conv(x, weight, scale, shift, addend, upsampled, relu, strip)
    (weight,) = autocast(weight)
    start, stop, height = strip
    if not (start == 0 and stop == height):
        return _strip_of_reference(x, weight, scale, shift, addend, upsampled, relu, strip)
    if written_for() is not None:
        return _written(x, weight, scale, shift, addend, upsampled, relu)
    if trains_by_winograd(x, weight, addend):
        y = _epilogue(trained_conv(x, weight, addend), scale, shift, None, relu)
        return y if upsampled is None else upsample_add(upsampled, y)
    return reference(x, weight, scale, shift, addend=addend, upsampled=upsampled, relu=relu)


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
    """The definition of `conv_bn_relu`, one operator a step."""
    y = _epilogue(F.conv2d(x, weight, padding=weight.shape[-1] // 2), scale, shift, addend, relu)
    if upsampled is not None:
        y = y + F.interpolate(upsampled, size=y.shape[2:], mode="bilinear", align_corners=False)
    return y.to(x.dtype)


def _written(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    addend: torch.Tensor | None,
    upsampled: torch.Tensor | None,
    relu: bool,
) -> torch.Tensor:
    """Return the result by operators that runtimes fuse: scale and shift become the convolution's weight and bias."""
    if scale is not None:
        weight = (weight * scale[:, None, None, None]).to(x.dtype)
        addend = None if addend is None else (addend * scale[:, None, None]).to(x.dtype)
    shift = None if shift is None else shift.to(x.dtype)
    if matrices.takes_winograd(x, weight):
        y = _epilogue(matrices.winograd_conv3x3(x, weight), None, shift, addend, relu)
    else:
        y = _epilogue(F.conv2d(x, weight, shift, padding=weight.shape[-1] // 2), None, None, addend, relu)
    return y if upsampled is None else y + matrices.resample(upsampled, x.shape[2:])


def _strip_of_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    addend: torch.Tensor | None,
    upsampled: torch.Tensor | None,
    relu: bool,
    strip: Strip,
) -> torch.Tensor:
    """Return a strip by PyTorch's operators, which can be traced and differentiated."""
    start, stop, height = strip
    margin = weight.shape[-1] // 2
    y = F.conv2d(between_zeros(x, margin, strip), weight, padding=(0, margin))
    y = _epilogue(y, scale, shift, addend, relu)
    if upsampled is not None:
        size = (height, x.shape[3])
        y = y + F.interpolate(upsampled, size=size, mode="bilinear", align_corners=False)[:, :, start:stop]
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
    """Check the operands, and return the rows to compute.

    Raises:
        ValueError: shapes do not fit, or dtypes differ.
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
            raise ValueError(f"{name} must be ({channels},), one value per output channel, got {tuple(vector.shape)}")
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

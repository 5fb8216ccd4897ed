"""`conv_bn_relu` on a GPU: a convolution as one implicit GEMM, with all that follows it in registers.

The convolution of an NHWC map is a GEMM over pixels and output channels whose inner dimension runs over taps and input
channels. One kernel computes it, with tensor descriptors (TMA, on Hopper and later) or with pointers and masks
(anywhere). The product is transposed, weights times pixels: only then does a four-dimensional box of the map fold into
the tensor cores' operand without passing through registers.

Small maps have too few tiles for a GPU: their inner dimension is split among programs, which write float32 sums that a
second kernel adds up and finishes. The same kernel finishes what cuDNN computed, where that is the faster way.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from fastuper_kernels.gpu.configs import ConvConfig, conv_config, multiprocessors, pointers_config, precision
from fastuper_kernels.gpu.layout import from_nhwc, has_descriptor, nhwc, on_its_device, taps_of
from fastuper_kernels.gpu.resample import upsample_transposed
from fastuper_kernels.gpu.tiles import epilogue, place


@triton.jit
def _tile(
    tile,
    x,
    weight,
    out,
    addend,
    scale,
    shift,
    upsampled,
    B,
    H,
    W,
    h,
    w,
    weight_stride_n,
    weight_stride_tap,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    TAPS: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_UPSAMPLED: tl.constexpr,
    RELU: tl.constexpr,
):
    BM: tl.constexpr = BH * BW
    # Programs that follow each other read the same pixels, for another block of channels: from L2.
    blocks: tl.constexpr = (C_OUT + BN - 1) // BN
    n0 = tile % blocks * BN
    m = tile // blocks
    i = tl.arange(0, BM)
    if TMA and TAPS == 9:  # boxes of an image
        across, down = tl.cdiv(W, BW), tl.cdiv(H, BH)
        image, top, left = m // (across * down), m // across % down * BH, m % across * BW
        y, x0 = top + i // BW, left + i % BW
        b = image + tl.zeros_like(i)
        ok = (y < H) & (x0 < W)
    else:  # pixels of all images in a row
        pixel = m * BM + i
        b, y, x0 = place(pixel, H, W)
        ok = b < B
    channels = n0 + tl.arange(0, BN)
    inside = channels < C_OUT

    steps: tl.constexpr = (C_IN + BK - 1) // BK
    count: tl.constexpr = TAPS * steps // SPLIT
    begin = tl.program_id(1) * count
    k = tl.arange(0, BK)
    if not TMA:
        rows = ((b.to(tl.int64) * H + y) * W + x0) * C_IN
        columns = channels.to(tl.int64) * weight_stride_n
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for step in range(begin, begin + count):
        tap, c = step // steps, step % steps * BK
        if TMA:
            weights = weight.load([n0, tap * weight_stride_tap + c])
            if TAPS == 9:
                pixels = x.load([image, top + tap // 3 - 1, left + tap % 3 - 1, c]).reshape(BM, BK)
            else:
                pixels = x.load([0, 0, m * BM, c]).reshape(BM, BK)
        else:
            seen = ok
            offset = c
            if TAPS == 9:
                dy, dx = tap // 3 - 1, tap % 3 - 1
                seen = ok & (y + dy >= 0) & (y + dy < H) & (x0 + dx >= 0) & (x0 + dx < W)
                offset = (dy * W + dx) * C_IN + c
            some = c + k < C_IN
            pixels = tl.load(x + (rows + offset)[:, None] + k[None, :], mask=seen[:, None] & some[None, :], other=0.0)
            weights = tl.load(
                weight + (columns + (tap * weight_stride_tap + c))[:, None] + k[None, :],
                mask=inside[:, None] & some[None, :],
                other=0.0,
            )
        acc = tl.dot(weights, pixels.T, acc, input_precision=PRECISION)

    result = acc.T
    at = ((b.to(tl.int64) * H + y) * W + x0) * C_OUT
    if SPLIT > 1:
        at += tl.program_id(1).to(tl.int64) * B * H * W * C_OUT
    else:
        result = epilogue(
            result, b, y, x0, ok, channels, addend, scale, shift, upsampled, h, w, H, W,
            C_OUT, HAS_ADDEND, HAS_SCALE, HAS_SHIFT, HAS_UPSAMPLED, RELU,
        )  # fmt: skip
    mask = ok[:, None] & inside[None, :]
    tl.store(out + at[:, None] + channels[None, :], result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def conv_kernel(
    x,
    weight,
    out,
    addend,
    scale,
    shift,
    upsampled,
    B,
    H,
    W,
    h,
    w,
    weight_stride_n,
    weight_stride_tap,
    tiles,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    TAPS: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_UPSAMPLED: tl.constexpr,
    RELU: tl.constexpr,
):
    """Write out (B, H, W, C_OUT), or with SPLIT > 1 float32 sums (SPLIT, B, H, W, C_OUT).

    x and weight are tensor descriptors with TMA: of (B, H, W, C_IN), or (1, 1, B * H * W, C_IN) for one tap, and of
    (C_OUT, taps * C_IN); else pointers. What is left out is any pointer.
    """
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _tile(
                tile, x, weight, out, addend, scale, shift, upsampled, B, H, W, h, w, weight_stride_n,
                weight_stride_tap, C_IN, C_OUT, TAPS, BH, BW, BN, BK, SPLIT, TMA, PRECISION,
                HAS_ADDEND, HAS_SCALE, HAS_SHIFT, HAS_UPSAMPLED, RELU,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), x, weight, out, addend, scale, shift, upsampled, B, H, W, h, w, weight_stride_n,
            weight_stride_tap, C_IN, C_OUT, TAPS, BH, BW, BN, BK, SPLIT, TMA, PRECISION,
            HAS_ADDEND, HAS_SCALE, HAS_SHIFT, HAS_UPSAMPLED, RELU,
        )  # fmt: skip


@triton.jit
def finish_kernel(
    sums,
    out,
    addend,
    scale,
    shift,
    upsampled,
    B,
    H,
    W,
    h,
    w,
    C_OUT: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_UPSAMPLED: tl.constexpr,
    RELU: tl.constexpr,
):
    """Write the epilogue of the sum of SPLIT maps (B, H, W, C_OUT)."""
    pixel = tl.program_id(0) * BM + tl.arange(0, BM)
    channels = tl.program_id(1) * BN + tl.arange(0, BN)
    b, y, x0 = place(pixel, H, W)
    ok = b < B
    mask = ok[:, None] & (channels < C_OUT)[None, :]
    at = (pixel.to(tl.int64) * C_OUT)[:, None] + channels[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for part in range(SPLIT):
        acc += tl.load(sums + tl.cast(part, tl.int64) * B * H * W * C_OUT + at, mask=mask, other=0.0).to(tl.float32)
    result = epilogue(
        acc, b, y, x0, ok, channels, addend, scale, shift, upsampled, h, w, H, W,
        C_OUT, HAS_ADDEND, HAS_SCALE, HAS_SHIFT, HAS_UPSAMPLED, RELU,
    )  # fmt: skip
    tl.store(out + at, result.to(out.dtype.element_ty), mask=mask)


@on_its_device
def conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    addend: torch.Tensor | None,
    upsampled: torch.Tensor | None,
    relu: bool,
    config: ConvConfig | None = None,
) -> torch.Tensor:
    """Return `conv_bn_relu` of operands that its public function has checked, in channels_last memory.

    Args:
        x: see there, like the others.
        weight: see there.
        scale: see there.
        shift: see there.
        addend: see there.
        upsampled: see there.
        relu: see there.
        config: the kernel's configuration; what was measured for such shapes, or else a heuristic's, where not given.
    """
    batch, channels, height, width = x.shape
    channels_out, _, size, _ = weight.shape
    out = x.new_empty(batch, height, width, channels_out)
    if out.numel() == 0:
        return from_nhwc(out)
    after = Epilogue(scale, shift, addend, upsampled, relu)
    if config is None:
        candidates = partial(_candidates, x, weight, after)
        config = conv_config(x, channels_out, size * size, upsampled is not None, candidates, after.name)
    image, taps = nhwc(x), taps_of(weight)
    if config.way == "tma" and not (has_descriptor(image) and has_descriptor(taps)):
        config = pointers_config(x, upsampled is not None)
    if config.way == "cudnn":
        sums = F.conv2d(from_nhwc(image), weight, padding=size // 2)
        return from_nhwc(nhwc(sums)) if after.is_nothing else from_nhwc(finish(nhwc(sums)[None], out, after))
    split, box = config.split_of(channels, size * size, x.dtype), config.box_of(size * size)
    sums = out if split == 1 else out.new_empty(split, *out.shape, dtype=torch.float32)
    tiles = config.tiles_of(batch, height, width, channels_out, size * size)
    arguments: tuple[Any, Any] = (image, taps)
    if config.way == "tma":
        arguments = _descriptors(image, taps, config)
    programs = min(tiles, multiprocessors(x.device)) if config.persistent else tiles
    conv_kernel[(programs, split)](
        *arguments,
        sums,
        *after.pointers(sums),
        batch,
        height,
        width,
        *after.coarse_size,
        taps.stride(0),
        taps.stride(1),
        tiles,
        C_IN=channels,
        C_OUT=channels_out,
        TAPS=size * size,
        BH=box[0],
        BW=box[1],
        BN=config.channels,
        BK=config.depth_of(x.dtype),
        SPLIT=split,
        TMA=config.way == "tma",
        PERSISTENT=config.persistent,
        PRECISION=precision(x.dtype),
        **after.flags(split == 1),
        num_warps=config.warps,
        num_stages=config.stages_of(channels, size * size, x.dtype),
    )
    return from_nhwc(out if split == 1 else finish(sums, out, after))


def _candidates(x: torch.Tensor, weight: torch.Tensor, after: Epilogue, config: ConvConfig) -> dict[str, Any]:
    """Return the kernel and cuDNN as functions of no arguments, on these operands."""
    addend, upsampled = (None if given is None else from_nhwc(given) for given in (after.addend, after.upsampled))

    run = partial(conv, x, weight, after.scale, after.shift, addend, upsampled, after.relu)
    return {"triton": partial(run, config), "cudnn": partial(run, ConvConfig("cudnn"))}


def _descriptors(image: torch.Tensor, taps: torch.Tensor, config: ConvConfig) -> tuple[Any, Any]:
    batch, height, width, channels = image.shape
    channels_out, count, _ = taps.shape
    depth = config.depth_of(image.dtype)
    if count == 1:  # all pixels in a row
        batch, height, width = 1, 1, batch * height * width
    strides = [height * width * channels, width * channels, channels, 1]
    pixels = TensorDescriptor(image, [batch, height, width, channels], strides, [1, *config.box_of(count), depth])
    # The taps of an output channel side by side in a row. What a box reads beyond the channels of a tap is multiplied
    # by zeros: the pixels have no such channels.
    width = (count - 1) * taps.stride(1) + channels
    row = taps.stride(0) if channels_out > 1 else width  # the stride of a single row says nothing
    weights = TensorDescriptor(taps, [channels_out, width], [row, 1], [config.channels, depth])
    return pixels, weights


@on_its_device
def finish(sums: torch.Tensor, out: torch.Tensor, after: Epilogue) -> torch.Tensor:
    """Write the epilogue of the sum of maps (parts, B, H, W, C) to out, and return it."""
    batch, height, width, channels = out.shape
    block = min(triton.next_power_of_2(channels), 128)
    rows = 1024 // block
    finish_kernel[(triton.cdiv(batch * height * width, rows), triton.cdiv(channels, block))](
        sums,
        out,
        *after.pointers(sums),
        batch,
        height,
        width,
        *after.coarse_size,
        C_OUT=channels,
        SPLIT=len(sums),
        BM=rows,
        BN=block,
        **after.flags(True),
    )
    return out


class Epilogue:
    """What follows a convolution, as the kernels take it."""

    def __init__(
        self,
        scale: torch.Tensor | None,
        shift: torch.Tensor | None,
        addend: torch.Tensor | None,
        upsampled: torch.Tensor | None,
        relu: bool,
    ):
        self.scale, self.shift = (None if vector is None else vector.float().contiguous() for vector in (scale, shift))
        self.addend, self.upsampled = (None if given is None else nhwc(given) for given in (addend, upsampled))
        self.relu = relu
        self.coarse_size = (1, 1) if self.upsampled is None else tuple(self.upsampled.shape[1:3])

    @property
    def name(self) -> str:
        """Its parts, in words."""
        flags = {**self.flags(True), "RELU": self.relu}
        return " ".join(name.removeprefix("HAS_").lower() for name, is_there in flags.items() if is_there) or "alone"

    @property
    def is_nothing(self) -> bool:
        """Whether the convolution is all there is."""
        return not self.relu and all(t is None for t in (self.scale, self.shift, self.addend, self.upsampled))

    def pointers(self, default: torch.Tensor) -> list[torch.Tensor]:
        """Return the kernels' pointers; any tensor stands for one that is left out."""
        given = (self.addend, self.scale, self.shift, self.upsampled)
        return [default if tensor is None else tensor for tensor in given]

    def flags(self, applies: bool) -> dict[str, bool]:
        """Return which parts there are; none where a kernel leaves them to the next one."""
        given = {"ADDEND": self.addend, "SCALE": self.scale, "SHIFT": self.shift, "UPSAMPLED": self.upsampled}
        flags = {f"HAS_{name}": applies and tensor is not None for name, tensor in given.items()}
        return {**flags, "RELU": applies and self.relu}


@torch.library.custom_op("fastuper::conv_bn_relu", mutates_args=())
def conv_bn_relu(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    addend: torch.Tensor | None,
    upsampled: torch.Tensor | None,
    relu: bool,
) -> torch.Tensor:
    """Return what the public function of this name says, in channels_last memory."""
    return conv(x, weight, scale, shift, addend, upsampled, relu)


@conv_bn_relu.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    addend: torch.Tensor | None,
    upsampled: torch.Tensor | None,
    relu: bool,
) -> torch.Tensor:
    return from_nhwc(x.new_empty(x.shape[0], *x.shape[2:], weight.shape[0]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.relu = inputs
    # Where a coarser map was added, the result shows no longer where ReLU was at work.
    ctx.save_for_backward(*tensors, output if ctx.relu and tensors[-1] is None else None)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, scale, shift, addend, upsampled, y = ctx.saved_tensors
    needed = ctx.needs_input_grad
    grads: list[torch.Tensor | None] = [None] * 7
    if needed[5]:
        grads[5] = upsample_transposed(grad, *upsampled.shape[2:])
    if ctx.relu:
        if y is None:
            y = conv_bn_relu(x, weight, scale, shift, addend, None, True)
        grad = grad * (y > 0)
    if needed[3]:
        grads[3] = grad.sum((0, 2, 3), dtype=torch.float32).to(shift.dtype)
    if scale is not None:
        if needed[2]:
            sums = conv_bn_relu(x, weight, None, None, addend, None, False)
            grads[2] = (grad.float() * sums).sum((0, 2, 3)).to(scale.dtype)
        grad = (grad * scale[:, None, None]).to(x.dtype)
    if needed[4]:
        grads[4] = grad
    if needed[0] or needed[1]:
        margin = weight.shape[-1] // 2
        grads[0], grads[1], _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, [1, 1], [margin, margin], [1, 1], False, [0, 0], 1, [needed[0], needed[1], False]
        )
    return tuple(grads)


conv_bn_relu.register_autograd(_backward, setup_context=_keep)

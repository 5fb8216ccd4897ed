"""`conv_bn_relu` on a GPU: a convolution as one implicit GEMM, with the epilogue in registers.

The convolution of an NHWC map is a GEMM over pixels and output channels. Its inner dimension runs over taps and input
channels. One kernel computes it, with tensor descriptors (TMA, on Hopper and later) or with pointers and masks (on any
GPU). The product is transposed (weights times pixels). So a four-dimensional box of the map is an operand of the tensor
cores without a copy through registers.

Small maps have too few tiles for a GPU. Their inner dimension is split among programs, which write float32 sums. A
second kernel adds up the sums and applies the epilogue. If cuDNN is the faster way, that kernel applies the epilogue to
cuDNN's result.
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
from fastuper_kernels.gpu.resample import upsample_add_backward
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
    """Compute one tile of `conv_kernel`, which describes the arguments; `tile` is the tile's number."""
    BM: tl.constexpr = BH * BW
    # Consecutive programs compute other channels of the same pixels, which they read from L2.
    blocks: tl.constexpr = (C_OUT + BN - 1) // BN
    n0 = tile % blocks * BN
    m = tile // blocks
    i = tl.arange(0, BM)
    if TMA and TAPS == 9:  # a tile is a box of an image
        across, down = tl.cdiv(W, BW), tl.cdiv(H, BH)
        image, top, left = m // (across * down), m // across % down * BH, m % across * BW
        y, x0 = top + i // BW, left + i % BW
        b = image + tl.zeros_like(i)
        ok = (y < H) & (x0 < W)
    else:  # a tile is consecutive pixels of the batch
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
            on_map = ok
            offset = c
            if TAPS == 9:
                dy, dx = tap // 3 - 1, tap % 3 - 1
                on_map = ok & (y + dy >= 0) & (y + dy < H) & (x0 + dx >= 0) & (x0 + dx < W)
                offset = (dy * W + dx) * C_IN + c
            valid_k = c + k < C_IN
            pixels = tl.load(
                x + (rows + offset)[:, None] + k[None, :], mask=on_map[:, None] & valid_k[None, :], other=0.0
            )
            weights = tl.load(
                weight + (columns + (tap * weight_stride_tap + c))[:, None] + k[None, :],
                mask=inside[:, None] & valid_k[None, :],
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
    """Write relu((conv(x) + addend) * scale + shift) + upsampled, or with SPLIT > 1 partial sums of conv(x).

    Program (i, part): tile i of BH * BW pixels and BN output channels, part `part` of the inner dimension. With
    PERSISTENT it computes tiles i, i + programs, and so on.

    x: pointer to (B, H, W, C_IN), dense. With TMA a descriptor of it; for one tap of (1, 1, B * H * W, C_IN).
    weight: pointer to (C_OUT, TAPS, C_IN), the channels of a tap contiguous. With TMA a descriptor of the matrix whose
        row is all taps of an output channel.
    out: pointer to (B, H, W, C_OUT), or with SPLIT > 1 to float32 (SPLIT, B, H, W, C_OUT), dense; written.
    addend: pointer to (B, H, W, C_OUT), dense.
    scale, shift: pointers to (C_OUT,) float32.
    upsampled: pointer to a coarser map (B, h, w, C_OUT), dense, which is resampled to (H, W).
    B, H, W: images, rows and columns of the map.
    h, w: the size of the coarser map.
    weight_stride_n, weight_stride_tap: elements between output channels, and between taps, of the weight.
    tiles: the number of tiles.
    C_IN, C_OUT: input and output channels.
    TAPS: 1 for a kernel of 1x1, 9 for 3x3.
    BH, BW: rows and columns of a tile's box of pixels; with BH = 1, BW consecutive pixels of the batch.
    BN: output channels of a tile.
    BK: input channels per step.
    SPLIT: the number of parts of the inner dimension; with more than one, `finish_kernel` applies the epilogue.
    TMA: True if x and weight are tensor descriptors.
    PERSISTENT: True if a program computes several tiles.
    PRECISION: "tf32" or "ieee", the precision of float32 products.
    HAS_ADDEND, HAS_SCALE, HAS_SHIFT, HAS_UPSAMPLED: False to leave the operand out; any pointer stands for it.
    RELU: True to clamp negative values to zero.
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
    """Write relu((sum of the parts + addend) * scale + shift) + upsampled.

    Program: BM consecutive pixels of the batch, BN channels.

    sums: pointer to (SPLIT, B, H, W, C_OUT), dense.
    out: pointer to (B, H, W, C_OUT), dense; written.
    addend: pointer to (B, H, W, C_OUT), dense.
    scale, shift: pointers to (C_OUT,) float32.
    upsampled: pointer to a coarser map (B, h, w, C_OUT), dense, which is resampled to (H, W).
    B, H, W: images, rows and columns of the map.
    h, w: the size of the coarser map.
    C_OUT: channels.
    SPLIT: the number of parts.
    BM, BN: pixels and channels of a program.
    HAS_ADDEND, HAS_SCALE, HAS_SHIFT, HAS_UPSAMPLED: False to leave the operand out; any pointer stands for it.
    RELU: True to clamp negative values to zero.
    """
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
    """Return `conv_bn_relu` of checked operands, in channels_last memory.

    Args:
        x: (B, C, H, W).
        weight: (C_out, C, k, k), k being 1 or 3.
        scale: (C_out,), or None for ones.
        shift: (C_out,), or None for zeros.
        addend: (B, C_out, H, W), or None for zeros.
        upsampled: (B, C_out, h, w), or None for zeros.
        relu: True to clamp negative values to zero.
        config: the kernel's configuration; None for a measured one, or a heuristic's.
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
        return from_nhwc(nhwc(sums)) if after.is_empty else from_nhwc(finish(nhwc(sums)[None], out, after))
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
    """Return the kernel and cuDNN on these operands, as functions of no arguments."""
    addend, upsampled = (None if given is None else from_nhwc(given) for given in (after.addend, after.upsampled))
    run = partial(conv, x, weight, after.scale, after.shift, addend, upsampled, after.relu)
    return {"triton": partial(run, config), "cudnn": partial(run, ConvConfig("cudnn"))}


def _descriptors(image: torch.Tensor, taps: torch.Tensor, config: ConvConfig) -> tuple[Any, Any]:
    """Return the tensor descriptors of a map (B, H, W, C_in) and of a weight (C_out, taps, C_in)."""
    batch, height, width, channels = image.shape
    channels_out, count, _ = taps.shape
    depth = config.depth_of(image.dtype)
    if count == 1:  # consecutive pixels of the batch
        batch, height, width = 1, 1, batch * height * width
    strides = [height * width * channels, width * channels, channels, 1]
    pixels = TensorDescriptor(image, [batch, height, width, channels], strides, [1, *config.box_of(count), depth])
    # A row is all taps of an output channel. A box may read beyond the channels of its tap: the pixels' descriptor has
    # zeros for these channels, and their products are zero.
    width = (count - 1) * taps.stride(1) + channels
    row = taps.stride(0) if channels_out > 1 else width  # the stride of a single row is arbitrary
    weights = TensorDescriptor(taps, [channels_out, width], [row, 1], [config.channels, depth])
    return pixels, weights


@on_its_device
def finish(sums: torch.Tensor, out: torch.Tensor, after: Epilogue) -> torch.Tensor:
    """Write the epilogue of the sum of partial maps to `out`, and return `out`.

    Args:
        sums: (parts, B, H, W, C), dense.
        out: (B, H, W, C), dense.
        after: the epilogue.
    """
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
    """The epilogue of a convolution, in the layouts and dtypes of the kernels.

    Args:
        scale: (C,), or None for ones.
        shift: (C,), or None for zeros.
        addend: (B, C, H, W), or None for zeros.
        upsampled: (B, C, h, w), or None for zeros.
        relu: True to clamp negative values to zero before `upsampled` is added.
    """

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
        """The names of the operands, "relu" among them, separated by spaces; "alone" if there are none."""
        flags = {**self.flags(True), "RELU": self.relu}
        return " ".join(name.removeprefix("HAS_").lower() for name, is_there in flags.items() if is_there) or "alone"

    @property
    def is_empty(self) -> bool:
        """True if the epilogue changes nothing."""
        return not self.relu and all(t is None for t in (self.scale, self.shift, self.addend, self.upsampled))

    def pointers(self, default: torch.Tensor) -> list[torch.Tensor]:
        """Return (addend, scale, shift, upsampled) for a kernel; `default` stands for an operand that is left out."""
        given = (self.addend, self.scale, self.shift, self.upsampled)
        return [default if tensor is None else tensor for tensor in given]

    def flags(self, applies: bool) -> dict[str, bool]:
        """Return the kernels' flags; all False if the kernel leaves the epilogue to the next kernel."""
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
    """The operator of `fastuper_kernels.ops.conv_bn_relu`, without `strip`; the result is in channels_last memory."""
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


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.relu = inputs
    # After the addition of a coarser map, the result's sign no longer shows which values ReLU clamped.
    ctx.save_for_backward(*tensors, output if ctx.relu and tensors[-1] is None else None)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, scale, shift, addend, upsampled, y = ctx.saved_tensors
    needed = ctx.needs_input_grad
    grads: list[torch.Tensor | None] = [None] * 7
    if needed[5]:
        grads[5] = upsample_add_backward(grad, *upsampled.shape[2:])
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


conv_bn_relu.register_autograd(_backward, setup_context=_save)

"""`upsample_cross_entropy` on a GPU: the resampled logits stay in registers, in both passes.

In the forward pass each program compares consecutive pixels of a row with their labels, a few classes at a time. It
writes each pixel's loss and the logarithm of the sum of the pixel's exponentials. In the backward pass each program
owns a tile of coarse pixels and a few classes. It resamples the logits of all pixels that read the tile again, and adds
up their gradients, always in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from fastuper_kernels.cpu.cross_entropy import Options, losses_in_blocks, whole_cross_entropy
from fastuper_kernels.gpu.layout import from_nhwc, nhwc, on_its_device
from fastuper_kernels.gpu.tiles import TAPS, band, taps_of_chain

# Pixels of a row: of a program of the forward pass, and per step of the backward pass.
PIXELS, PIXELS_BACK = 32, 16
# Rows and columns of coarse pixels of a program of the backward pass.
ROWS, COLUMNS = 4, 16
# Classes: per step of the forward pass, and of a program of the backward pass.
BC = 32


@triton.jit
def _resampled(
    image, w, rows, row_weights, columns, column_weights, c, C: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    LIMIT: tl.constexpr,
):  # fmt: skip
    """Return float32 resampled logits (BX, BC) of pixels of one row.

    A logit below -LIMIT counts as -LIMIT: -inf times a weight of zero would be NaN. NaN and +inf stay.

    image: pointer to one image's logits (h, w, C), dense.
    w: columns of the logits.
    rows, row_weights: tuples of R scalars, the logit rows that the pixels' row reads, and their weights.
    columns, column_weights: tuples of K tensors (BX,), the logit columns that each pixel reads, and their weights.
    c: (BC,) int32, the classes.
    C: classes of the logits.
    """
    total = tl.zeros((columns[0].shape[0], c.shape[0]), dtype=tl.float32)
    for i in tl.static_range(R):
        line = image + rows[i].to(tl.int64) * w * C
        for j in tl.static_range(K):
            at = (columns[j] * C)[:, None] + c[None, :]
            value = tl.load(line + at, mask=(c < C)[None, :], other=0.0).to(tl.float32)
            value = tl.where(value < -LIMIT, -LIMIT, value)
            total += value * (row_weights[i] * column_weights[j])[:, None]
    return total


@triton.jit
def _sum_of_weights(weight, C: tl.constexpr, BC: tl.constexpr, HAS_WEIGHT: tl.constexpr):
    """Return the sum of the classes' weights.

    weight: pointer to (C,) float32; not read without HAS_WEIGHT, where all weights are 1.
    C: classes.
    BC: classes per step.
    """
    total = C * 1.0
    if HAS_WEIGHT:
        c = tl.arange(0, BC)
        parts = tl.zeros((BC,), dtype=tl.float32)
        for start in range(0, C, BC):
            parts += tl.load(weight + start + c, mask=start + c < C, other=0.0)
        total = tl.sum(parts)
    return total


@triton.jit
def _readers(first, COUNT: tl.constexpr, sizes, N: tl.constexpr):
    """Return (start, stop): the outputs of a chain of resamplings that may read inputs [first, first + COUNT).

    first: the first input.
    COUNT: the number of inputs.
    sizes: a tuple of N + 1 sizes, input size first.
    N: the number of resamplings.
    """
    start, last = first, tl.minimum(first + COUNT, sizes[0]) - 1
    for n in tl.static_range(N):
        size_in, size_out = sizes[n], sizes[n + 1]
        # Output k reads at ((2 k + 1) size_in - size_out) / (2 size_out), and at most one position from there.
        start = tl.maximum(((2 * start - 1) * size_out - size_in) // (2 * size_in), 0)
        last = tl.minimum(((2 * last + 3) * size_out - size_in) // (2 * size_in), size_out - 1)
    return start, last + 1


@triton.jit
def loss_kernel(
    logits,
    labels,
    weight,
    losses,
    logs,
    heights,
    widths,
    ignore_index,
    smoothing,
    C: tl.constexpr,
    N: tl.constexpr,
    ROW_TAPS: tl.constexpr,
    COLUMN_TAPS: tl.constexpr,
    BX: tl.constexpr,
    BC: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """Write the loss of each pixel, and the logarithm of the sum of its exponentials.

    A label that is neither a class nor ignored makes NaN of both. Program: BX pixels of a row of an image.

    logits: pointer to (B, heights[0], widths[0], C), dense.
    labels: pointer to (B, heights[N], widths[N]) int64, dense.
    weight: pointer to (C,) float32, the classes' weights, or None without HAS_WEIGHT.
    losses, logs: pointers to (B, heights[N], widths[N]) float32, dense; written.
    heights, widths: tuples of N + 1 sizes, the logits' first, the labels' last.
    ignore_index: the label of pixels without loss.
    smoothing: the share of a label that is spread over all classes.
    C: classes.
    N: the number of resamplings.
    ROW_TAPS, COLUMN_TAPS: neighbouring logits that a pixel reads along each axis; see `taps_of_chain`.
    BX: pixels of a program.
    BC: classes per step.
    LIMIT: half of float32's largest number.
    HAS_WEIGHT: False for weights of 1.
    SMOOTH: False for a smoothing of 0.
    """
    h, w, H, W = heights[0], widths[0], heights[N], widths[N]
    y, x = tl.program_id(1), tl.program_id(0) * BX + tl.arange(0, BX)
    ok = x < W
    _, rows, row_weights = band(y, heights, N, ROW_TAPS)
    _, columns, column_weights = band(tl.minimum(x, W - 1), widths, N, COLUMN_TAPS)
    image = logits + tl.program_id(2).to(tl.int64) * h * w * C
    at = (tl.program_id(2).to(tl.int64) * H + y) * W + x
    label = tl.load(labels + at, mask=ok, other=ignore_index)
    valid = label != ignore_index
    known = (label >= 0) & (label < C)
    label = tl.where(known, label, -1).to(tl.int32)

    most = tl.full((BX,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BX,), dtype=tl.float32)
    chosen = tl.where(known, 0.0, float("nan"))
    spread = tl.zeros((BX,), dtype=tl.float32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        value = _resampled(
            image, w, rows, row_weights, columns, column_weights, c, C, ROW_TAPS, COLUMN_TAPS, LIMIT
        )  # fmt: skip
        chosen += tl.sum(tl.where(c[None, :] == label[:, None], value, 0.0), 1)
        if SMOOTH:
            if HAS_WEIGHT:
                spread += tl.sum(value * tl.load(weight + c, mask=c < C, other=0.0)[None, :], 1)
            else:
                spread += tl.sum(value, 1)
        value = tl.where((c < C)[None, :], value, -float("inf"))
        before = most
        most = tl.maximum(before, tl.max(value, 1))
        total = total * tl.exp(before - most) + tl.sum(tl.exp(value - most[:, None]), 1)

    log = most + tl.log(total)
    own = tl.where(valid, 1.0, 0.0)
    if HAS_WEIGHT:
        own = tl.load(weight + label, mask=valid & known, other=0.0)
    loss = (1.0 - smoothing) * own * (most - chosen + tl.log(total))
    if SMOOTH:
        loss += smoothing / C * (_sum_of_weights(weight, C, BC, HAS_WEIGHT) * log - spread)
    tl.store(losses + at, tl.where(valid, loss, 0.0), mask=ok)
    tl.store(logs + at, tl.where(valid & (known == 0), float("nan"), log), mask=ok)


@triton.jit
def loss_backward_kernel(
    grad,
    logits,
    labels,
    weight,
    logs,
    out,
    heights,
    widths,
    ignore_index,
    smoothing,
    C: tl.constexpr,
    N: tl.constexpr,
    ROW_TAPS: tl.constexpr,
    COLUMN_TAPS: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BX: tl.constexpr,
    BC: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """Write the gradient of the logits.

    Program: BI x BJ coarse pixels of an image, BC classes.

    grad: pointer to (B, heights[N], widths[N]) float32, the gradient of the losses, dense.
    logits: pointer to (B, heights[0], widths[0], C), dense.
    labels: pointer to (B, heights[N], widths[N]) int64, dense.
    weight: pointer to (C,) float32, the classes' weights, or None without HAS_WEIGHT.
    logs: pointer to (B, heights[N], widths[N]) float32, from `loss_kernel`.
    out: pointer to (B, heights[0], widths[0], C), dense; written.
    heights, widths: tuples of N + 1 sizes, the logits' first, the labels' last.
    ignore_index: the label of pixels without loss.
    smoothing: the share of a label that is spread over all classes.
    C: classes.
    N: the number of resamplings.
    ROW_TAPS, COLUMN_TAPS: neighbouring logits that a pixel reads along each axis; see `taps_of_chain`.
    BI, BJ, BC: rows and columns of coarse pixels, and classes, of a program.
    BX: pixels of a row per step.
    LIMIT: half of float32's largest number.
    HAS_WEIGHT: False for weights of 1.
    SMOOTH: False for a smoothing of 0.
    """
    h, w, H, W = heights[0], widths[0], heights[N], widths[N]
    tiles = tl.cdiv(h, BI)
    b = (tl.program_id(2) // tiles).to(tl.int64)
    i = (tl.program_id(2) % tiles) * BI + tl.arange(0, BI)
    j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    top, bottom = _readers((tl.program_id(2) % tiles) * BI, BI, heights, N)
    left, right = _readers(tl.program_id(0) * BJ, BJ, widths, N)
    image = logits + b * h * w * C
    of_class = tl.full((BC,), 1.0, dtype=tl.float32)
    if HAS_WEIGHT:
        of_class = tl.load(weight + c, mask=c < C, other=0.0)
    of_all = 0.0
    if SMOOTH:
        of_all = _sum_of_weights(weight, C, BC, HAS_WEIGHT) * smoothing / C

    acc = tl.zeros((BI, BJ, BC), dtype=tl.float32)
    for start in range(left, right, BX):
        x = start + tl.arange(0, BX)
        first, columns, column_weights = band(tl.minimum(x, W - 1), widths, N, COLUMN_TAPS)
        to_column = tl.zeros((BJ, BX), dtype=tl.float32)
        for tap in tl.static_range(COLUMN_TAPS):
            to_column += tl.where((first + tap)[None, :] == j[:, None], column_weights[tap][None, :], 0.0)
        for line in range(top, bottom):
            y = tl.cast(line, tl.int32)
            above, rows, row_weights = band(y, heights, N, ROW_TAPS)
            value = _resampled(
                image, w, rows, row_weights, columns, column_weights, c, C, ROW_TAPS, COLUMN_TAPS, LIMIT
            )  # fmt: skip
            at = (b * H + y) * W + x
            label = tl.load(labels + at, mask=x < W, other=ignore_index)
            factor = tl.load(grad + at, mask=(x < W) & (label != ignore_index), other=0.0)
            log = tl.load(logs + at, mask=x < W, other=float("inf"))
            known = (label >= 0) & (label < C)
            label = tl.where(known, label, -1).to(tl.int32)
            own = factor * (1.0 - smoothing)
            if HAS_WEIGHT:
                own *= tl.load(weight + label, mask=known, other=0.0)
            value = tl.exp(value - log[:, None]) * (own + factor * of_all)[:, None]
            value -= tl.where(c[None, :] == label[:, None], own[:, None], 0.0)
            if SMOOTH:
                value -= (factor * (smoothing / C))[:, None] * of_class[None, :]
            line_sum = tl.dot(to_column, value, input_precision="ieee")
            to_row = tl.zeros((BI,), dtype=tl.float32)
            for tap in tl.static_range(ROW_TAPS):
                to_row += tl.where(above + tap == i, row_weights[tap], 0.0)
            acc += to_row[:, None, None] * line_sum[None, :, :]
    place = ((b * h + i)[:, None] * w + j[None, :])[:, :, None] * C + c[None, None, :]
    mask = ((i < h)[:, None] & (j < w)[None, :])[:, :, None] & (c < C)[None, None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=mask)


def _constants(
    logits: torch.Tensor, weight: torch.Tensor | None, heights: Sequence[int], widths: Sequence[int], smoothing: float
) -> dict[str, Any]:
    """Return the constants that both kernels are compiled for."""
    _, classes, h, w = logits.shape
    return {
        "C": classes,
        "N": len(heights),
        "ROW_TAPS": taps_of_chain([h, *heights]),
        "COLUMN_TAPS": taps_of_chain([w, *widths]),
        "BC": BC,
        "LIMIT": torch.finfo(torch.float32).max / 2,
        "HAS_WEIGHT": weight is not None,
        "SMOOTH": smoothing > 0,
    }


def _options(heights: Sequence[int], widths: Sequence[int], ignore_index: int, smoothing: float) -> Options:
    """Return the options of the loss of each pixel, without reduction."""
    return Options(list(zip(heights, widths, strict=True)), ignore_index, smoothing, "none")


@on_its_device
def forward(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    heights: Sequence[int],
    widths: Sequence[int],
    ignore_index: int,
    smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses, and the logarithms of the sums of exponentials: (B, H, W) float32 each.

    Args:
        logits: (B, classes, h, w).
        labels: (B, H, W) int64.
        weight: (classes,), or None for ones.
        heights: the heights that the logits are resampled through in turn; the last is H.
        widths: the widths that the logits are resampled through in turn; the last is W.
        ignore_index: the label of pixels without loss.
        smoothing: the share of a label that is spread over all classes.
    """
    batch, _, h, w = logits.shape
    losses = logits.new_empty(labels.shape, dtype=torch.float32)
    logs = torch.empty_like(losses)
    if losses.numel() == 0:
        return losses, logs
    constants = _constants(logits, weight, heights, widths, smoothing)
    if max(constants["ROW_TAPS"], constants["COLUMN_TAPS"]) > TAPS:
        options = _options(heights, widths, ignore_index, smoothing)
        return losses_in_blocks(logits, labels, weight, options), logs.zero_()
    loss_kernel[(triton.cdiv(widths[-1], PIXELS), heights[-1], batch)](
        nhwc(logits),
        labels.contiguous(),
        None if weight is None else weight.float(),
        losses,
        logs,
        (h, *heights),
        (w, *widths),
        ignore_index,
        smoothing,
        BX=PIXELS,
        num_warps=4,
        **constants,
    )
    return losses, logs


@on_its_device
def backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    logs: torch.Tensor,
    heights: Sequence[int],
    widths: Sequence[int],
    ignore_index: int,
    smoothing: float,
) -> torch.Tensor:
    """Return the gradient of the logits (B, classes, h, w), in their dtype and in channels_last memory.

    Args:
        grad: (B, H, W), the gradient of the losses.
        logits: (B, classes, h, w).
        labels: (B, H, W) int64.
        weight: (classes,), or None for ones.
        logs: (B, H, W) float32, from `forward`.
        heights: see `forward`.
        widths: see `forward`.
        ignore_index: see `forward`.
        smoothing: see `forward`.
    """
    batch, classes, h, w = logits.shape
    out = logits.new_empty(batch, h, w, classes)
    if out.numel() == 0:
        return from_nhwc(out)
    constants = _constants(logits, weight, heights, widths, smoothing)
    if max(constants["ROW_TAPS"], constants["COLUMN_TAPS"]) > TAPS:
        gradient = torch.zeros_like(out, dtype=torch.float32)
        options = _options(heights, widths, ignore_index, smoothing)
        losses_in_blocks(logits, labels, weight, options, gradient, grad)
        return from_nhwc(gradient.to(logits.dtype))
    loss_backward_kernel[(triton.cdiv(w, COLUMNS), triton.cdiv(classes, BC), batch * triton.cdiv(h, ROWS))](
        grad.contiguous(),
        nhwc(logits),
        labels.contiguous(),
        None if weight is None else weight.float(),
        logs,
        out,
        (h, *heights),
        (w, *widths),
        ignore_index,
        smoothing,
        BI=ROWS,
        BJ=COLUMNS,
        BX=PIXELS_BACK,
        num_warps=8,
        num_stages=1,  # a pipeline of loads would take the registers that the sums need
        **constants,
    )
    return from_nhwc(out)


@torch.library.custom_op("fastuper::upsample_cross_entropy", mutates_args=())
def upsample_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    heights: Sequence[int],
    widths: Sequence[int],
    ignore_index: int,
    smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator of `fastuper_kernels.ops.upsample_cross_entropy`, without reduction; see `forward`."""
    return forward(logits, labels, weight, heights, widths, ignore_index, smoothing)


@upsample_cross_entropy.register_fake
def _(logits: torch.Tensor, labels: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    losses = logits.new_empty(labels.shape, dtype=torch.float32)
    return losses, torch.empty_like(losses)


@torch.library.custom_op("fastuper::upsample_cross_entropy_backward", mutates_args=())
def upsample_cross_entropy_backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    logs: torch.Tensor,
    heights: Sequence[int],
    widths: Sequence[int],
    ignore_index: int,
    smoothing: float,
) -> torch.Tensor:
    """The operator of `upsample_cross_entropy`'s backward pass; see `backward`."""
    return backward(grad, logits, labels, weight, logs, heights, widths, ignore_index, smoothing)


@upsample_cross_entropy_backward.register_fake
def _(grad: torch.Tensor, logits: torch.Tensor, *_: Any) -> torch.Tensor:
    batch, classes, h, w = logits.shape
    return from_nhwc(logits.new_empty(batch, h, w, classes))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels, weight, *ctx.options = inputs
    ctx.save_for_backward(logits, labels, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    result = upsample_cross_entropy_backward(grad, *ctx.saved_tensors, *ctx.options)
    return result, *[None] * 6


def _save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    grad, logits, labels, weight, _, *ctx.options = inputs
    ctx.save_for_backward(grad, logits, labels, weight)


def _double_backward(ctx: Any, grad_of_result: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Differentiate twice by PyTorch's operators, which make the resampled logits: double backward is rare."""
    grad, logits, labels, weight = ctx.saved_tensors
    with torch.enable_grad():
        grad, logits = grad.detach().requires_grad_(), logits.detach().requires_grad_()
        losses = whole_cross_entropy(logits.float(), labels, weight, _options(*ctx.options))
        (result,) = torch.autograd.grad(losses, logits, grad, create_graph=True)
        first, second = torch.autograd.grad(result, [grad, logits], grad_of_result)
    return first, second, *[None] * 7


upsample_cross_entropy.register_autograd(_backward, setup_context=_save)
upsample_cross_entropy_backward.register_autograd(_double_backward, setup_context=_save_for_double_backward)

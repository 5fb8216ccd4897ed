"""`upsample_cross_entropy` by PyTorch's operators: whole, for tracers and transforms, and block by block.

The blocked loss never holds the resampled logits whole. For a scalar loss it computes the gradient in the same pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from fastuper_kernels.cpu.band import bilinear_chain, blocks_of, interpolate_chain
from fastuper_kernels.dispatch.modes import is_eager, without_autocast
from fastuper_kernels.dispatch.torch_private import is_batched

# Rows and columns of pixels per block, and bytes of resampled logits at a time: they stay in a core's own cache.
ROWS, COLUMNS = 64, 64
BLOCK_BYTES = 1 << 20
# A smaller sum of exponentials means a distant largest logit: the exponentials that matter may be denormal or 0.
LEAST_SUM = 1e-20


class Options(NamedTuple):
    """The arguments of `upsample_cross_entropy` that are not tensors; `sizes` is never None here.

    `corners` is `align_corners` of each size, or empty if it is False for all.
    """

    sizes: list[tuple[int, int]]
    ignore_index: int
    label_smoothing: float
    reduction: str
    corners: tuple[bool, ...] = ()


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | None, options: Options
) -> torch.Tensor:
    """Return the loss of checked, ordinary operands, block by block, on any device, with gradients if wanted.

    Args:
        logits: (B, classes, h, w), classes being 2 at least.
        labels: (B, H, W) int64.
        weight: (classes,), or None for ones.
        options: the other arguments.
    """
    if torch.is_grad_enabled() and logits.requires_grad:
        result: torch.Tensor = _CrossEntropy.apply(logits, labels, weight, options)
        return result
    losses = losses_in_blocks(logits.detach(), labels, weight, options)
    return reduced(losses, labels, weight, options, logits.dtype)


def whole_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | None, options: Options
) -> torch.Tensor:
    """Return the loss of whole resampled logits, by operators that can be traced, transformed and differentiated.

    Args:
        logits: (B, classes, h, w), classes being 2 at least.
        labels: (B, H, W) int64.
        weight: (classes,), or None for ones.
        options: the other arguments.
    """
    dtype = logits.dtype
    with without_autocast(logits):
        logits = logits.to(torch.promote_types(dtype, torch.float32))
        if weight is not None:
            weight = weight.to(logits.dtype)
        logits = interpolate_chain(logits, options.sizes, options.corners)
        loss = F.cross_entropy(
            logits,
            labels,
            weight,
            ignore_index=options.ignore_index,
            label_smoothing=options.label_smoothing,
            reduction="none" if options.reduction == "none" else "sum",
        )
        if options.reduction == "mean":
            loss = loss / _divisor(labels, weight, options.ignore_index, loss.dtype)
    return loss.to(dtype)


def reduced(
    losses: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | None, options: Options, dtype: torch.dtype
) -> torch.Tensor:
    """Return losses (B, H, W) reduced as `options.reduction` says, in a dtype."""
    if options.reduction == "none":
        return losses.to(dtype)
    total = losses.sum()
    if options.reduction == "mean":
        total = total / _divisor(labels, weight, options.ignore_index, total.dtype)
    return total.to(dtype)


def _divisor(labels: torch.Tensor, weight: torch.Tensor | None, ignore_index: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the divisor of the mean: the sum of the labels' weights, or 1 if that is 0."""
    valid = labels != ignore_index
    if weight is None:
        total = valid.sum().to(dtype)
    else:
        total = (weight.to(dtype)[labels.masked_fill(~valid, 0).clamp(0, len(weight) - 1)] * valid).sum()
    return total + (total == 0)


class _CrossEntropy(torch.autograd.Function):
    """The blocked loss. For a scalar the gradient comes with the loss: the backward pass is one multiplication."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | None, options: Options
    ) -> torch.Tensor:
        ctx.options = options
        gradient = None if options.reduction == "none" else _zeros(logits)
        losses = losses_in_blocks(logits, labels, weight, options, gradient)
        if gradient is not None and options.reduction == "mean":
            gradient /= _divisor(labels, weight, options.ignore_index, gradient.dtype)
        ctx.save_for_backward(logits, labels, weight, gradient)
        return reduced(losses, labels, weight, options, logits.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        logits, labels, weight, gradient = ctx.saved_tensors
        (grad,) = grads
        many = not is_eager() or is_batched(grad)  # several gradients at once
        twice = torch.is_grad_enabled()
        if twice or (many and gradient is None):
            with torch.enable_grad():
                loss = whole_cross_entropy(logits, labels, weight, ctx.options)
                (result,) = torch.autograd.grad(loss, logits, grad, create_graph=twice)
            return result, None, None, None
        if gradient is None:
            gradient = _zeros(logits)
            losses_in_blocks(logits, labels, weight, ctx.options, gradient, grad.to(gradient.dtype))
        else:
            gradient = gradient * grad.to(gradient.dtype)
        return gradient.permute(0, 3, 1, 2).to(logits.dtype), None, None, None


def _zeros(logits: torch.Tensor) -> torch.Tensor:
    """Return zeros (B, h, w, classes), float32 at least, to add the gradient to."""
    batch, classes, h, w = logits.shape
    return logits.new_zeros(batch, h, w, classes, dtype=torch.promote_types(logits.dtype, torch.float32))


def losses_in_blocks(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    options: Options,
    gradient: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the loss of each pixel, (B, H, W), float32 at least, and add to the gradient of their sum.

    Args:
        logits: (B, classes, h, w), classes being 2 at least.
        labels: (B, H, W) int64.
        weight: (classes,), or None for ones.
        options: the other arguments; `reduction` does not matter.
        gradient: (B, h, w, classes), float32 at least; the logits' gradient is added to it. None for no gradient.
        factor: (B, H, W), multiplied with each pixel's gradient, or None for ones.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses = logits.new_empty(labels.shape, dtype=dtype)
    with torch.no_grad(), without_autocast(logits):
        weight = None if weight is None else weight.to(dtype)
        for n in range(len(logits)):
            _image_losses(
                logits[n].permute(1, 2, 0).to(dtype).contiguous(),
                labels[n],
                weight,
                options,
                losses[n],
                None if gradient is None else gradient[n],
                None if factor is None else factor[n],
            )
    return losses


def _image_losses(
    x: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    options: Options,
    losses: torch.Tensor,
    gradient: torch.Tensor | None,
    factor: torch.Tensor | None,
) -> None:
    """Write the losses (H, W) of one image x (h, w, classes), and add to its gradient (h, w, classes).

    With s the smoothing, w the weights and W the sum of the weights, the loss of a pixel with label y is

        (1 - s) w[y] (lse - x[y]) + s/classes (W lse - sum_c w[c] x[c])    where lse = log sum_c exp(x[c])

    The last sum over the classes is linear: it is taken on the coarse grid, and so is its gradient.
    """
    h, w, classes = x.shape
    smoothing = options.label_smoothing
    # The softmax does not change if a number is subtracted from all logits of a pixel. After the largest logit is
    # subtracted, no logit and no resampled logit is positive. So the exponentials cannot overflow, and nothing searches
    # for the largest resampled logit.
    limit = torch.finfo(x.dtype).max / 2
    x = x.sub(x.amax(2, keepdim=True)).clamp_(min=-limit)
    if smoothing:
        weights = x.new_ones(classes) if weight is None else weight
        share = weights * (smoothing / classes)
        spread = (x * share).sum(2).clamp_(min=-limit)
        spread_gradient = torch.zeros_like(spread)
    heights, widths = (h, *(size[0] for size in options.sizes)), (w, *(size[1] for size in options.sizes))
    rows = blocks_of(bilinear_chain, (heights, options.corners), x.dtype, x.device, size=ROWS)
    columns = blocks_of(bilinear_chain, (widths, options.corners), x.dtype, x.device, size=COLUMNS)
    for block in rows:
        lines = slice(block.first, block.last)
        for part in columns:
            # The resampling runs first along the columns of the few input rows, then along the rows.
            source = x[lines, part.first : part.last]
            wide = torch.bmm(part.matrix.expand(len(source), -1, -1), source).flatten(1)
            wide_gradient = None if gradient is None else torch.zeros_like(wide)
            step = max(1, BLOCK_BYTES // (wide.shape[1] * wide.element_size()))
            for start in range(block.start, block.stop, step):
                stop = min(start + step, block.stop)
                matrix = block.matrix[start - block.start : stop - block.start]
                here = (slice(start, stop), slice(part.start, part.stop))
                label = labels[here].flatten()
                valid = label != options.ignore_index
                index = label.masked_fill(~valid, 0)
                of_label = valid.to(x.dtype) if weight is None else weight[index] * valid
                of_label = of_label * (1 - smoothing)
                terms, total, shift, chosen = _exponentials(matrix, wide, classes, index)
                log = total.log()
                loss, of_softmax = of_label * (log - chosen), of_label
                if smoothing:
                    there = (lines, slice(part.first, part.last))
                    mean = (matrix @ spread[there] @ part.matrix.T).flatten()
                    loss = loss + (share.sum() * (log + shift) - mean)
                    of_softmax = of_label + share.sum() * valid
                losses[here] = torch.where(valid, loss, 0).view(stop - start, -1)
                if wide_gradient is None or gradient is None:
                    continue
                of_pixels = None if factor is None else factor[here].flatten()
                if of_pixels is not None:
                    of_label, of_softmax, valid = of_label * of_pixels, of_softmax * of_pixels, valid * of_pixels
                terms *= (of_softmax / total)[:, None]
                terms.scatter_add_(1, index[:, None], -of_label[:, None])
                wide_gradient.addmm_(matrix.T, terms.view(stop - start, -1))
                if smoothing:
                    plane = valid.to(x.dtype).view(stop - start, -1)
                    spread_gradient[there] += matrix.T @ plane @ part.matrix
            if wide_gradient is not None and gradient is not None:
                wide_gradient = wide_gradient.view(len(source), -1, classes)
                gradient[lines, part.first : part.last] += torch.matmul(part.matrix.T, wide_gradient)
    if smoothing and gradient is not None:
        gradient -= spread_gradient[:, :, None] * share


def _exponentials(
    matrix: torch.Tensor, wide: torch.Tensor, classes: int, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float, torch.Tensor]:
    """Resample along the rows, and return the exponentials of the logits x.

    Args:
        matrix: (rows, input rows), of the rows' band.
        wide: (input rows, columns * classes), logits that are resampled along the columns.
        classes: the number of classes.
        index: (pixels,) int64, a class for each pixel.

    Returns:
        exp(x - shift), (pixels, classes); its sum over the classes; the shift; x - shift of the class `index`; the last
        three (pixels,) each, or a shift of 0.0.
    """
    x = (matrix @ wide).view(-1, classes)
    if x.device.type == "cpu":  # on another device the host would have to wait for the sums
        chosen = x.gather(1, index[:, None]).squeeze(1)
        total = x.exp_().sum(1)
        if total.min() > LEAST_SUM:
            return x, total, 0.0, chosen
        # The neighbouring coarse pixels have their largest logits in different classes, so all logits are small in
        # between.
        x = (matrix @ wide).view(-1, classes)
    shift = x.amax(1, keepdim=True)
    x -= shift
    chosen = x.gather(1, index[:, None]).squeeze(1)
    x.exp_()
    return x, x.sum(1), shift.squeeze(1), chosen

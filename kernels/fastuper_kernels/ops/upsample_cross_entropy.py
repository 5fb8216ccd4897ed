"""The cross entropy of logits on a coarse grid with labels on a fine one, and its gradient on the coarse grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from fastuper_kernels.cpu.band import bilinear_chain, blocks_of
from fastuper_kernels.dispatch.backend import takes_triton
from fastuper_kernels.dispatch.modes import is_autocast, is_eager, is_ordinary, without_autocast
from fastuper_kernels.ops.upsample_argmax import check_sizes

# Rows and columns of pixels that are compared at a time, and bytes of resampled logits: they stay in a core's cache.
ROWS, COLUMNS = 64, 64
BLOCK_BYTES = 1 << 20
# Exponentials that add up to less were taken too far from the largest logit: those that matter may be denormal or 0.
LEAST_SUM = 1e-20
REDUCTIONS = ("mean", "sum", "none")


class Options(NamedTuple):
    """What is not a tensor; `sizes` are given."""

    sizes: list[tuple[int, int]]
    ignore_index: int
    label_smoothing: float
    reduction: str


def upsample_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    sizes: Sequence[tuple[int, int]] | None = None,
    *,
    ignore_index: int = 255,
    weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> torch.Tensor:
    """Resample logits through each size in turn (bilinear, align_corners=False) and compare them with labels.

    The result is that of `F.cross_entropy` on the resampled logits, which are computed block by block, in float32 at
    least, and never held whole: nor is their gradient, which goes straight to the coarse grid. For "mean" and "sum" it
    is found along with the loss, so that the backward pass is one multiplication.

    Args:
        logits: (B, classes, h, w). One class alone is binary cross entropy: the label 0 stands for a second class,
            whose logits are zero, and the label 1 for the one that is given.
        labels: (B, H, W) of integers.
        sizes: [(height, width), ...], applied in turn, the last of them the labels'; None for [(H, W)].
        ignore_index: pixels with this label count for nothing.
        weight: (classes,), of the classes, as `F.cross_entropy` takes it; (2,) where there is one class.
        label_smoothing: from 0 to 1; that share of each label is spread over all classes.
        reduction: "mean" (by the weights of the labels), "sum" or "none".
        backend: "auto", "triton" or "torch"; see `fastuper_kernels.dispatch.backend`.

    Returns:
        A scalar, or (B, H, W) for "none"; in the logits' dtype, under autocast float32. Where the weights of all labels
        add up to zero, nothing is divided: if every pixel is ignored the mean is 0, and so are its gradients. (In
        PyTorch it is NaN.) Logits that are less than their pixel's largest one by more than half of the largest number
        of the type that is computed in, -inf say, count as if by that half: a class that is -inf everywhere is
        without influence. NaN and infinity make NaN of the losses around them.

        It can be differentiated by the logits, twice too, for which PyTorch's operators make the resampled logits.

    Raises:
        ValueError: no logits, no labels, or labels of another batch or device; sizes that do not end in the labels'; a
            weight of another shape, or one that wants a gradient; an unknown reduction or a smoothing that is no share;
            or a backend that cannot take them. On a CPU also labels that are no class: on a GPU, whose values nobody
            waits for, PyTorch's operators stop it at such labels, and Triton's kernels make their losses NaN.
    """
    _check(logits, labels, weight, label_smoothing, reduction)
    sizes = check_sizes([labels.shape[1:]] if sizes is None else sizes)
    if tuple(sizes[-1]) != tuple(labels.shape[1:]):
        raise ValueError(f"the last of sizes must be the labels' {tuple(labels.shape[1:])}, got {sizes}")
    options = Options(sizes, ignore_index, label_smoothing, reduction)
    if is_autocast(logits.device.type) and logits.dtype != torch.float64:
        logits = logits.float()
    logits, labels = as_two_classes(logits), labels.long()
    eager = is_eager() and is_ordinary(logits, labels, weight)
    if eager and logits.device.type == "cpu":
        check_values(labels, logits.shape[1], ignore_index)
    if takes_triton(backend, logits, labels, weight):
        from fastuper_kernels.gpu.upsample_cross_entropy import upsample_cross_entropy as kernel

        heights, widths = (list(side) for side in zip(*sizes, strict=True))
        losses, _ = kernel(logits, labels, weight, heights, widths, ignore_index, label_smoothing)
        return _reduced(losses, labels, weight, options, logits.dtype)
    if not eager:
        return of_pytorch(logits, labels, weight, options)
    if torch.is_grad_enabled() and logits.requires_grad:
        result: torch.Tensor = _CrossEntropy.apply(logits, labels, weight, options)
        return result
    return _reduced(walk(logits.detach(), labels, weight, options), labels, weight, options, logits.dtype)


def reference(
    logits: torch.Tensor,
    labels: torch.Tensor,
    sizes: Sequence[tuple[int, int]] | None = None,
    *,
    ignore_index: int = 255,
    weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """The definition of `upsample_cross_entropy`."""
    sizes = check_sizes([labels.shape[1:]] if sizes is None else sizes)
    options = Options(sizes, ignore_index, label_smoothing, reduction)
    return of_pytorch(as_two_classes(logits), labels.long(), weight, options)


def of_pytorch(
    logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | None, options: Options
) -> torch.Tensor:
    """Return the loss by PyTorch's operators, which anything can trace, transform and differentiate."""
    dtype = logits.dtype
    with without_autocast(logits):
        logits = logits.to(torch.promote_types(dtype, torch.float32))
        if weight is not None:
            weight = weight.to(logits.dtype)
        for size in options.sizes:
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
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


def _check(logits: Any, labels: Any, weight: Any, label_smoothing: float, reduction: str) -> None:
    if logits.ndim != 4 or min(logits.shape[1:]) < 1 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be (B, classes, h, w) of floating-point numbers, got {tuple(logits.shape)} of {logits.dtype}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if labels.ndim != 3 or min(labels.shape[1:]) < 1 or len(labels) != len(logits):
        raise ValueError(f"labels must be ({len(logits)}, H, W), as many as the logits, got {tuple(labels.shape)}")
    if labels.device != logits.device or (weight is not None and weight.device != logits.device):
        devices = [str(t.device) for t in (logits, labels, weight) if t is not None]
        raise ValueError(f"logits, labels and weight must be on one device, got {', '.join(devices)}")
    classes = max(logits.shape[1], 2)
    if weight is not None and (weight.shape != (classes,) or not weight.is_floating_point()):
        raise ValueError(
            f"weight must be ({classes},) floating-point numbers, one a class, got {tuple(weight.shape)} of "
            f"{weight.dtype}"
        )
    if weight is not None and weight.requires_grad:
        raise ValueError("weight takes no gradient: pass weight.detach()")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def check_values(labels: torch.Tensor, classes: int, ignore_index: int) -> None:
    """Look for labels that are neither a class nor ignored.

    Raises:
        ValueError: there are some.
    """
    if labels.numel() == 0:
        return
    least, most = labels.aminmax()
    if least >= 0 and most < classes:
        return
    strangers = labels[((labels < 0) | (labels >= classes)) & (labels != ignore_index)].unique().tolist()
    if strangers:
        found = ", ".join(map(str, strangers[:5])) + (", ..." if len(strangers) > 5 else "")
        raise ValueError(f"labels must be from 0 to {classes - 1}, or ignore_index={ignore_index}; found {found}")


def as_two_classes(logits: torch.Tensor) -> torch.Tensor:
    """Return the logits of two classes, where those of one are given."""
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


def _divisor(labels: torch.Tensor, weight: torch.Tensor | None, ignore_index: int, dtype: torch.dtype) -> torch.Tensor:
    """Return what the sum of losses is divided by for their mean."""
    valid = labels != ignore_index
    if weight is None:
        total = valid.sum().to(dtype)
    else:
        total = (weight.to(dtype)[labels.masked_fill(~valid, 0).clamp(0, len(weight) - 1)] * valid).sum()
    return total + (total == 0)


def _reduced(
    losses: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | None, options: Options, dtype: torch.dtype
) -> torch.Tensor:
    if options.reduction == "none":
        return losses.to(dtype)
    total = losses.sum()
    if options.reduction == "mean":
        total = total / _divisor(labels, weight, options.ignore_index, total.dtype)
    return total.to(dtype)


class _CrossEntropy(torch.autograd.Function):
    """The loss, and for a scalar its gradient too: what comes back for it is a number to multiply it by."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | None, options: Options
    ) -> torch.Tensor:
        ctx.options = options
        gradient = None if options.reduction == "none" else _zeros(logits)
        losses = walk(logits, labels, weight, options, gradient)
        if gradient is not None and options.reduction == "mean":
            gradient /= _divisor(labels, weight, options.ignore_index, gradient.dtype)
        ctx.save_for_backward(logits, labels, weight, gradient)
        return _reduced(losses, labels, weight, options, logits.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        logits, labels, weight, gradient = ctx.saved_tensors
        (grad,) = grads
        many = not is_eager() or torch._C._functorch.is_legacy_batchedtensor(grad)  # several gradients at once
        twice = torch.is_grad_enabled()
        if twice or (many and gradient is None):
            with torch.enable_grad():
                loss = of_pytorch(logits, labels, weight, ctx.options)
                (result,) = torch.autograd.grad(loss, logits, grad, create_graph=twice)
            return result, None, None, None
        if gradient is None:
            gradient = _zeros(logits)
            walk(logits, labels, weight, ctx.options, gradient, grad.to(gradient.dtype))
        else:
            gradient = gradient * grad.to(gradient.dtype)
        return gradient.permute(0, 3, 1, 2).to(logits.dtype), None, None, None


def _zeros(logits: torch.Tensor) -> torch.Tensor:
    """Return zeros (B, h, w, classes) that the gradient is added to."""
    batch, classes, h, w = logits.shape
    return logits.new_zeros(batch, h, w, classes, dtype=torch.promote_types(logits.dtype, torch.float32))


def walk(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    options: Options,
    gradient: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the losses (B, H, W), and add their gradients to (B, h, w, classes), each times its `factor` (B, H, W)."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses = logits.new_empty(labels.shape, dtype=dtype)
    with torch.no_grad(), without_autocast(logits):
        weight = None if weight is None else weight.to(dtype)
        for n in range(len(logits)):
            _compare(
                logits[n].permute(1, 2, 0).to(dtype).contiguous(),
                labels[n],
                weight,
                options,
                losses[n],
                None if gradient is None else gradient[n],
                None if factor is None else factor[n],
            )
    return losses


def _compare(
    x: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    options: Options,
    losses: torch.Tensor,
    gradient: torch.Tensor | None,
    factor: torch.Tensor | None,
) -> None:
    """Write the losses (H, W) of one image (h, w, classes), and add to its gradient.

    With s the smoothing, w the weights and W the sum of them, the loss of a pixel with label y is

        (1 - s) w[y] (lse - x[y]) + s/classes (W lse - sum_c w[c] x[c])    where lse = log sum_c exp(x[c])

    The sum over the classes is taken on the coarse grid, and what it passes back is added there: it is linear.
    """
    h, w, classes = x.shape
    smoothing = options.label_smoothing
    # The softmax stays the same where each pixel's logits are less by one number. Less the largest, none is above zero,
    # nor is what is resampled from them, and exponentials are safe without another look for the largest.
    limit = torch.finfo(x.dtype).max / 2
    x = x.sub(x.amax(2, keepdim=True)).clamp_(min=-limit)
    if smoothing:
        weights = x.new_ones(classes) if weight is None else weight
        share = weights * (smoothing / classes)
        spread = (x * share).sum(2).clamp_(min=-limit)
        spread_gradient = torch.zeros_like(spread)
    rows = blocks_of(bilinear_chain, ((h, *(size[0] for size in options.sizes)),), x.dtype, x.device, size=ROWS)
    columns = blocks_of(bilinear_chain, ((w, *(size[1] for size in options.sizes)),), x.dtype, x.device, size=COLUMNS)
    for block in rows:
        lines = slice(block.first, block.last)
        for part in columns:
            # The columns of the few rows that the block reads, then its rows.
            source = x[lines, part.first : part.last]
            wide = torch.bmm(part.matrix.expand(len(source), -1, -1), source).flatten(1)
            back = None if gradient is None else torch.zeros_like(wide)
            step = max(1, BLOCK_BYTES // (wide.shape[1] * wide.element_size()))
            for start in range(block.start, block.stop, step):
                stop = min(start + step, block.stop)
                matrix = block.matrix[start - block.start : stop - block.start]
                here = (slice(start, stop), slice(part.start, part.stop))
                label = labels[here].flatten()
                valid = label != options.ignore_index
                index = label.masked_fill(~valid, 0)
                own = valid.to(x.dtype) if weight is None else weight[index] * valid
                own = own * (1 - smoothing)
                terms, total, shift, chosen = _exponentials(matrix, wide, classes, index)
                log = total.log()
                loss, all_of_it = own * (log - chosen), own
                if smoothing:
                    there = (lines, slice(part.first, part.last))
                    mean = (matrix @ spread[there] @ part.matrix.T).flatten()
                    loss = loss + (share.sum() * (log + shift) - mean)
                    all_of_it = own + share.sum() * valid
                losses[here] = torch.where(valid, loss, 0).view(stop - start, -1)
                if back is None or gradient is None:
                    continue
                of_pixels = None if factor is None else factor[here].flatten()
                if of_pixels is not None:
                    own, all_of_it, valid = own * of_pixels, all_of_it * of_pixels, valid * of_pixels
                terms *= (all_of_it / total)[:, None]
                terms.scatter_add_(1, index[:, None], -own[:, None])
                back.addmm_(matrix.T, terms.view(stop - start, -1))
                if smoothing:
                    plane = valid.to(x.dtype).view(stop - start, -1)
                    spread_gradient[there] += matrix.T @ plane @ part.matrix
            if back is not None and gradient is not None:
                back = back.view(len(source), -1, classes)
                gradient[lines, part.first : part.last] += torch.matmul(part.matrix.T, back)
    if smoothing and gradient is not None:
        gradient -= spread_gradient[:, :, None] * share


def _exponentials(
    matrix: torch.Tensor, wide: torch.Tensor, classes: int, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float, torch.Tensor]:
    """Return of pixels exp(x - shift) (pixels, classes), its sums, the shift, and x - shift of the classes `index`."""
    x = (matrix @ wide).view(-1, classes)
    if x.device.type == "cpu":  # elsewhere the host would have to wait for the sums
        chosen = x.gather(1, index[:, None]).squeeze(1)
        total = x.exp_().sum(1)
        if total.min() > LEAST_SUM:
            return x, total, 0.0, chosen
        # The coarse pixels around a fine one have little in common.
        x = (matrix @ wide).view(-1, classes)
    shift = x.amax(1, keepdim=True)
    x -= shift
    chosen = x.gather(1, index[:, None]).squeeze(1)
    x.exp_()
    return x, x.sum(1), shift.squeeze(1), chosen

"""The cross entropy of logits on a coarse grid with labels on a fine grid, and its gradient on the coarse grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastuper_kernels.cpu.cross_entropy import Options, cross_entropy, reduced, whole_cross_entropy
from fastuper_kernels.dispatch.backend import takes_triton
from fastuper_kernels.dispatch.modes import is_autocast, is_eager, is_ordinary
from fastuper_kernels.ops.upsample_argmax import ALIGNED, check_corners, check_sizes

REDUCTIONS = ("mean", "sum", "none")


def upsample_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    sizes: Sequence[tuple[int, int]] | None = None,
    *,
    ignore_index: int = 255,
    weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    align_corners: bool | Sequence[bool] = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Resample logits through each size in turn (bilinear) and compare them with labels.

    The result is `F.cross_entropy` of the resampled logits. They are computed block by block, in float32 at least, and
    never held whole. Their gradient is added up on the coarse grid, and is not held whole either. For "mean" and "sum"
    it is computed with the loss, and the backward pass is one multiplication.

    Args:
        logits: (B, classes, h, w). With one class the loss is binary cross entropy: label 1 is the given class, label 0
            is a second class whose logits are zero.
        labels: (B, H, W) of integers.
        sizes: [(height, width), ...], applied in turn; the last size is the labels'. None for [(H, W)].
        ignore_index: pixels with this label have no loss.
        weight: (classes,), the weights of the classes as in `F.cross_entropy`; (2,) if there is one class.
        label_smoothing: from 0 to 1; this share of each label is spread over all classes.
        reduction: "mean" (by the weights of the labels), "sum" or "none".
        align_corners: as for `F.interpolate`, of all steps or of each. Triton's kernels take False only.
        backend: "auto", "triton" or "torch"; see `fastuper_kernels.dispatch.backend`.

    Returns:
        A scalar, or (B, H, W) for "none"; in the logits' dtype, under autocast float32. If the weights of all labels
        add up to zero, the sum is not divided: if every pixel is ignored, the mean and its gradients are 0. (In PyTorch
        they are NaN.) No logit counts as further below its pixel's largest logit than half of the computing dtype's
        largest number. So a class that is -inf everywhere has no influence. NaN and +inf make NaN of the losses around
        them.

        The result has gradients with respect to the logits, and gradients of gradients. For the latter PyTorch's
        operators make the resampled logits.

    Raises:
        ValueError: no logits, no labels, or labels of another batch or device; sizes that do not end with the labels';
            another number of `align_corners` than of sizes;
            a weight of another shape, or a weight that requires a gradient; an unknown reduction, or a smoothing
            outside [0, 1]; or a backend that cannot take the operands. On a CPU also labels that are not a class. On a
            GPU nothing checks the labels, because the host would wait for their values: such labels stop PyTorch's
            operators, and Triton's kernels return NaN.
    """
    _check(logits, labels, weight, label_smoothing, reduction)
    sizes = check_sizes([labels.shape[1:]] if sizes is None else sizes)
    if tuple(sizes[-1]) != tuple(labels.shape[1:]):
        raise ValueError(f"the last of sizes must be the labels' {tuple(labels.shape[1:])}, got {sizes}")
    corners = check_corners(align_corners, len(sizes))
    options = Options(sizes, ignore_index, label_smoothing, reduction, corners)
    if is_autocast(logits.device.type) and logits.dtype != torch.float64:
        logits = logits.float()
    logits, labels = as_two_classes(logits), labels.long()
    eager = is_eager() and is_ordinary(logits, labels, weight)
    if eager and logits.device.type == "cpu":
        check_values(labels, logits.shape[1], ignore_index)
    if takes_triton(backend, logits, labels, weight, obstacle=ALIGNED if corners else None):
        from fastuper_kernels.gpu.upsample_cross_entropy import upsample_cross_entropy as kernel

        heights, widths = (list(side) for side in zip(*sizes, strict=True))
        losses, _ = kernel(logits, labels, weight, heights, widths, ignore_index, label_smoothing)
        return reduced(losses, labels, weight, options, logits.dtype)
    return (cross_entropy if eager else whole_cross_entropy)(logits, labels, weight, options)


def reference(
    logits: torch.Tensor,
    labels: torch.Tensor,
    sizes: Sequence[tuple[int, int]] | None = None,
    *,
    ignore_index: int = 255,
    weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    align_corners: bool | Sequence[bool] = False,
) -> torch.Tensor:
    """The definition of `upsample_cross_entropy`."""
    sizes = check_sizes([labels.shape[1:]] if sizes is None else sizes)
    corners = check_corners(align_corners, len(sizes))
    options = Options(sizes, ignore_index, label_smoothing, reduction, corners)
    return whole_cross_entropy(as_two_classes(logits), labels.long(), weight, options)


def check_values(labels: torch.Tensor, classes: int, ignore_index: int) -> None:
    """Check that each label is a class or ignored.

    Raises:
        ValueError: some labels are neither; the message lists up to five of them.
    """
    if labels.numel() == 0:
        return
    least, most = labels.aminmax()
    if least >= 0 and most < classes:
        return
    unknown = labels[((labels < 0) | (labels >= classes)) & (labels != ignore_index)].unique().tolist()
    if unknown:
        found = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise ValueError(f"labels must be from 0 to {classes - 1}, or ignore_index={ignore_index}; found {found}")


def as_two_classes(logits: torch.Tensor) -> torch.Tensor:
    """Return logits of two classes if there is one class, the logits of the first being zero."""
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


def _check(logits: Any, labels: Any, weight: Any, label_smoothing: float, reduction: str) -> None:
    if logits.ndim != 4 or min(logits.shape[1:]) < 1 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be (B, classes, h, w) of floating-point numbers, got {tuple(logits.shape)} of {logits.dtype}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if labels.ndim != 3 or min(labels.shape[1:]) < 1 or len(labels) != len(logits):
        raise ValueError(f"labels must be ({len(logits)}, H, W), with the logits' batch, got {tuple(labels.shape)}")
    if labels.device != logits.device or (weight is not None and weight.device != logits.device):
        devices = [str(t.device) for t in (logits, labels, weight) if t is not None]
        raise ValueError(f"logits, labels and weight must be on one device, got {', '.join(devices)}")
    classes = max(logits.shape[1], 2)
    if weight is not None and (weight.shape != (classes,) or not weight.is_floating_point()):
        raise ValueError(
            f"weight must be ({classes},) floating-point numbers, one per class, got {tuple(weight.shape)} of "
            f"{weight.dtype}"
        )
    if weight is not None and weight.requires_grad:
        raise ValueError("weight takes no gradient: pass weight.detach()")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")

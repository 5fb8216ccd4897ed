"""Checks of a model's arguments: images, labels and target sizes."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch

from fastuper_kernels.dispatch.modes import is_eager
from fastuper_kernels.ops.upsample_cross_entropy import check_values

TargetSizes: TypeAlias = "Sequence[tuple[int, int]] | torch.Tensor | None"


def check_pixels(pixel_values: torch.Tensor | None) -> torch.Tensor:
    """Return `pixel_values` if they are (B, C, H, W), floating point and not empty.

    Raises:
        TypeError: they are not a tensor.
        ValueError: they are missing, or of another shape or dtype.
    """
    if pixel_values is None:
        raise ValueError("pixel_values are missing: pass the pixel_values of UperNetImageProcessor")
    if not isinstance(pixel_values, torch.Tensor):
        raise TypeError(
            f"pixel_values must be a tensor, got {type(pixel_values).__name__}: "
            "give images to UperNetImageProcessor first"
        )
    if pixel_values.ndim != 4 or 0 in pixel_values.shape:
        raise ValueError(f"pixel_values must be (batch, channels, height, width), got {tuple(pixel_values.shape)}")
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values must be floating point and normalised, got {pixel_values.dtype}: "
            "give the images to UperNetImageProcessor first"
        )
    return pixel_values


def check_labels(labels: torch.Tensor, batch: int, classes: Mapping[str, int], ignore_index: int) -> torch.Tensor:
    """Return labels as int64 if they are integers (B, H, W), of any size but not empty.

    Their values are checked on a CPU only: on a GPU the host would wait for each step. The check comes before the
    forward pass: a refused batch must not change BatchNorm's statistics.

    Args:
        labels: the label maps.
        batch: B, the number of images.
        classes: the number of classes of each head, by the head's name, where it is known. For one class labels are 0
            and 1.
        ignore_index: the label of pixels without a class.

    Raises:
        TypeError: they are not a tensor.
        ValueError: they are of another shape or dtype, or a value is neither a class nor `ignore_index`.
    """
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.ndim != 3 or labels.shape[0] != batch or 0 in labels.shape:
        raise ValueError(f"labels must be (batch, height, width) for the {batch} images, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    labels = labels.long()
    if labels.device.type == "cpu" and is_eager():
        for head, count in classes.items():
            try:
                check_values(labels, max(count, 2), ignore_index)
            except ValueError as error:
                if count == max(classes.values()):
                    raise
                raise ValueError(f"{error}. {head}.classifier has only {count} classes: replace it too") from None
    return labels


def check_target_sizes(target_sizes: TargetSizes, pixel_values: torch.Tensor) -> list[tuple[int, int]]:
    """Return (height, width) of the label map of each image; the images' own size if `target_sizes` is None.

    Raises:
        ValueError: they are not pairs of integers from 1, or not one pair an image.
    """
    batch = len(pixel_values)
    if target_sizes is None:
        return [(pixel_values.shape[2], pixel_values.shape[3])] * batch
    try:
        targets = [(operator.index(height), operator.index(width)) for height, width in target_sizes]
    except (TypeError, ValueError):
        targets = [(0, 0)]
    if any(height < 1 or width < 1 for height, width in targets):
        raise ValueError(f"target_sizes must be a (height, width) for each image, integers from 1, got {target_sizes}")
    if len(targets) != batch:
        raise ValueError(f"{len(targets)} target_sizes for a batch of {batch} images; give one an image")
    return targets

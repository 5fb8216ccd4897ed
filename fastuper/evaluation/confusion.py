"""The confusion matrix of label maps, and the measures that follow from it: IoU, accuracies and their means."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastuper.data.samples import IGNORE_INDEX
from fastuper.evaluation import report


class ConfusionMatrix:
    """Counts of pixels by true and predicted class. Memory depends only on the number of classes.

    With n_ij the number of pixels of class i that were predicted as class j, over a whole dataset,

        IoU_i            = n_ii / (sum_j n_ij + sum_j n_ji - n_ii)
        accuracy_i       = n_ii / sum_j n_ij
        pixel accuracy   = sum_i n_ii / sum_ij n_ij

    Pixels whose label is `ignore_index` are not counted, whether or not a class was predicted there. A class without
    pixels in labels and predictions has no IoU (NaN); a class without pixels in the labels has no accuracy (NaN). The
    means are over the other classes.

    Args:
        num_labels: the number N of classes.
        ignore_index: the label of ignored pixels.
        id2label: the classes' names, for tables and pictures.
        device: the device of the counts, on which pixels are counted.

    Attributes:
        matrix: (N, N) int64, a row for each true class and a column for each predicted class. The sum of several
            processes' matrices (`torch.distributed.all_reduce`) is the matrix of all their pixels.
    """

    def __init__(
        self,
        num_labels: int,
        *,
        ignore_index: int = IGNORE_INDEX,
        id2label: Mapping[int, str] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_labels < 1:
            raise ValueError(f"num_labels is {num_labels}; give at least 1")
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.id2label = dict(id2label or {})
        self.matrix = torch.zeros((num_labels, num_labels), dtype=torch.int64, device=device)

    def update(
        self, predictions: torch.Tensor | NDArray[np.integer], labels: torch.Tensor | NDArray[np.integer]
    ) -> None:
        """Count the pixels of one label map, or of a batch of them.

        Args:
            predictions: integers in [0, N), of any shape.
            labels: integers in [0, N) or `ignore_index`, of the same shape.

        Raises:
            ValueError: the shapes differ, or values are out of range. Then no pixel of this call is counted.
        """
        predictions, labels = (as_tensor(x).to(self.matrix.device) for x in (predictions, labels))
        if predictions.shape != labels.shape:
            raise ValueError(
                f"predictions are {tuple(predictions.shape)}, labels {tuple(labels.shape)}: they must agree"
            )
        labels = labels.long()  # before the comparison: in 8 bits, an ignore index above 255 would wrap around
        kept = labels != self.ignore_index
        predictions, labels = predictions[kept].long(), labels[kept]
        if not labels.numel():
            return
        for name, values in (("predictions", predictions), ("labels", labels)):
            low, high = (int(value) for value in values.aminmax())
            if low < 0 or high >= self.num_labels:
                raise ValueError(
                    f"{name} run from {low} to {high}, but there are {self.num_labels} classes and "
                    f"{self.ignore_index} is ignored"
                )
        counts = torch.bincount(labels * self.num_labels + predictions, minlength=self.num_labels**2)
        self.matrix += counts.reshape(self.num_labels, self.num_labels)

    @property
    def counts(self) -> NDArray[np.int64]:
        """The matrix as an array on the CPU, (N, N)."""
        return self.matrix.cpu().numpy()

    @property
    def pixels(self) -> NDArray[np.int64]:
        """The number of pixels of each class in the labels, (N,)."""
        return self.counts.sum(1)

    @property
    def iou(self) -> NDArray[np.float64]:
        """Each class's intersection over union, (N,); NaN for classes without pixels in labels and predictions."""
        counts = self.counts
        right = np.diagonal(counts)
        return _ratio(right, counts.sum(0) + counts.sum(1) - right)

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """The share of each class's pixels that was predicted right, (N,); NaN for classes without pixels."""
        counts = self.counts
        return _ratio(np.diagonal(counts), counts.sum(1))

    @property
    def mean_iou(self) -> float:
        """The mean of the classes' IoU; NaN if no pixel was counted."""
        return _mean(self.iou)

    @property
    def mean_accuracy(self) -> float:
        """The mean of the classes' accuracy; NaN if no pixel was counted."""
        return _mean(self.accuracy)

    @property
    def pixel_accuracy(self) -> float:
        """The share of all pixels that was predicted right; NaN if no pixel was counted."""
        counts = self.counts
        return float(_ratio(np.trace(counts), counts.sum()))

    def to_dict(self) -> dict[str, Any]:
        """Return the means, a list of the classes, and the matrix, as JSON types; NaN becomes None."""
        return report.to_dict(self)

    def table(self) -> str:
        """Return a table for the terminal: a line for each class that occurs, then the means; in percent."""
        return report.table(self)

    def save_json(self, path: str | os.PathLike[str], failed: Sequence[str] = ()) -> None:
        """Write `to_dict()` as JSON, with a list `failed` if samples are missing; a failed write leaves no file."""
        report.save_json(self, path, failed)

    def save_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a CSV line per class, with id, name, IoU, accuracy and pixels; a failed write leaves no file."""
        report.save_csv(self, path)

    def save_picture(self, path: str | os.PathLike[str]) -> None:
        """Draw the matrix as a PNG: which share of each true class was predicted as which class.

        Up to 20 classes, the cells show the shares as numbers. Classes without pixels in the labels have grey rows. A
        failed write leaves no file.

        Raises:
            ImportError: matplotlib is not installed.
        """
        report.save_picture(self, path)


def as_tensor(values: torch.Tensor | NDArray[np.integer]) -> torch.Tensor:
    """Return an array of integers as a tensor of its own memory, and a tensor itself."""
    if isinstance(values, torch.Tensor):
        return values
    # The array is copied: PyTorch takes no negative strides and warns of read-only arrays. It has few operations for
    # the larger unsigned types.
    unsigned = values.dtype.kind == "u" and values.dtype != np.uint8
    return torch.from_numpy(np.array(values, dtype=np.int64 if unsigned else values.dtype, order="C"))


def _ratio(part: Any, whole: Any) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.true_divide(part, whole)


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan

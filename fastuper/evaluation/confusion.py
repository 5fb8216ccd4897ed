"""How good label maps are: a confusion matrix, and what follows from it."""

from __future__ import annotations

import csv
import json
import math
import os
import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastuper.data.classes import class_name
from fastuper.data.overlay import format_share
from fastuper.data.samples import IGNORE_INDEX
from fastuper_kernels.dispatch.files import atomic_path


class ConfusionMatrix:
    """Counts of pixels by their true and their predicted class; it grows with the classes, never with the images.

    With n_ij the pixels of class i that were taken for class j, over the whole of a dataset,

        IoU_i            = n_ii / (sum_j n_ij + sum_j n_ji - n_ii)
        accuracy_i       = n_ii / sum_j n_ij
        pixel accuracy   = sum_i n_ii / sum_ij n_ij

    Pixels whose label is `ignore_index` are counted nowhere, whatever was predicted for them. A class without a pixel
    in labels and predictions has no IoU (NaN), one without a pixel in the labels no accuracy: the means are over the
    others.

    Args:
        num_labels: the number N of classes.
        ignore_index: the label of pixels that count nowhere.
        id2label: the classes' names, for tables and pictures.
        device: where the counts are, and where they are made.

    Attributes:
        matrix: (N, N) int64, a row for each true class and a column for each predicted one. The sum of several
            processes' matrices (`torch.distributed.all_reduce`) is that of all their pixels.
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
            raise ValueError(f"num_labels is {num_labels}; there must be a class")
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.id2label = dict(id2label or {})
        self.matrix = torch.zeros((num_labels, num_labels), dtype=torch.int64, device=device)

    def update(
        self, predictions: torch.Tensor | NDArray[np.integer], labels: torch.Tensor | NDArray[np.integer]
    ) -> None:
        """Count the pixels of one label map or of a batch of them.

        Args:
            predictions: integers in [0, N), of any shape.
            labels: integers in [0, N) or `ignore_index`, of the same shape.

        Raises:
            ValueError: the shapes differ, or values are out of range; nothing was counted.
        """
        predictions, labels = (_tensor(x).to(self.matrix.device) for x in (predictions, labels))
        if predictions.shape != labels.shape:
            raise ValueError(
                f"predictions are {tuple(predictions.shape)}, labels {tuple(labels.shape)}: they must agree"
            )
        labels = labels.long()  # first: 8 bits would take the ignore index for what it leaves modulo 256
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
    def pixels(self) -> NDArray[np.int64]:
        """The number of pixels whose label is each class, (N,)."""
        return self._counts().sum(1)

    @property
    def iou(self) -> NDArray[np.float64]:
        """Each class's intersection over union, (N,); NaN for classes without a pixel in labels and predictions."""
        counts = self._counts()
        right = np.diagonal(counts)
        return _ratio(right, counts.sum(0) + counts.sum(1) - right)

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """The share of each class's pixels that were found, (N,); NaN for classes without a pixel in the labels."""
        counts = self._counts()
        return _ratio(np.diagonal(counts), counts.sum(1))

    @property
    def mean_iou(self) -> float:
        """The mean of the classes' IoU; NaN where nothing was counted."""
        return _mean(self.iou)

    @property
    def mean_accuracy(self) -> float:
        """The mean of the classes' accuracy; NaN where nothing was counted."""
        return _mean(self.accuracy)

    @property
    def pixel_accuracy(self) -> float:
        """The share of all pixels whose class was found; NaN where nothing was counted."""
        counts = self._counts()
        return float(_ratio(np.trace(counts), counts.sum()))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as what JSON holds: the means, a list of classes, and the matrix; None for NaN."""
        columns = zip(self.iou.tolist(), self.accuracy.tolist(), self.pixels.tolist(), strict=True)
        return {
            "mean_iou": _json_number(self.mean_iou),
            "mean_accuracy": _json_number(self.mean_accuracy),
            "pixel_accuracy": _json_number(self.pixel_accuracy),
            "pixels": int(self.pixels.sum()),
            "classes": [
                {
                    "id": index,
                    "name": class_name(self.id2label, index),
                    "iou": _json_number(iou),
                    "accuracy": _json_number(accuracy),
                    "pixels": pixels,
                }
                for index, (iou, accuracy, pixels) in enumerate(columns)
            ],
            "confusion": self._counts().tolist(),
        }

    def table(self) -> str:
        """Return a table for a terminal: a row for each class that occurs, then the means; percent."""
        counts = self._counts()
        occurring = np.flatnonzero(counts.sum(0) + counts.sum(1))
        iou, accuracy = self.iou, self.accuracy
        shares = self.pixels / max(int(counts.sum()), 1)
        rows = [("class", "IoU", "accuracy", "pixels")]
        rows += [
            (class_name(self.id2label, i), _percent(iou[i]), _percent(accuracy[i]), format_share(shares[i]))
            for i in map(int, occurring)
        ]
        rows.append(("mean", _percent(self.mean_iou), _percent(self.mean_accuracy), ""))
        rows.append(("all pixels", "", _percent(self.pixel_accuracy), f"{int(counts.sum()):,}"))
        widths = [max(_columns(cell) for cell in column) for column in zip(*rows, strict=True)]
        lines = []
        for name, *numbers in rows:
            cells = [name + " " * (widths[0] - _columns(name))]
            cells += [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
            lines.append("  ".join(cells).rstrip())
        rule = "-" * max(map(_columns, lines))
        absent = self.num_labels - len(occurring)
        note = (
            [f"{absent} of {self.num_labels} classes occur neither in the labels nor in the predictions"]
            if absent
            else []
        )
        return "\n".join([lines[0], rule, *lines[1:-2], rule, *lines[-2:], *note])

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict()` as JSON, whole or not at all."""
        text = json.dumps(self.to_dict(), ensure_ascii=False)
        with atomic_path(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    def save_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the classes as CSV, a line each with id, name, IoU, accuracy and pixels, whole or not at all."""
        classes = self.to_dict()["classes"]
        with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(classes[0]))
            writer.writeheader()
            writer.writerows(classes)

    def save_picture(self, path: str | os.PathLike[str]) -> None:
        """Draw the matrix as a PNG, whole or not at all: of each true class, which share was taken for which class.

        Up to 20 classes the shares are written into the cells. Classes without a pixel in the labels have grey rows.

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure = self._figure()
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", bbox_inches="tight")

    def _figure(self) -> Any:
        check_picture()
        from matplotlib.colors import PowerNorm
        from matplotlib.figure import Figure

        number = self.num_labels
        shares = self._counts() / np.where(self.pixels, self.pixels, np.nan)[:, None]
        names = [_drawable(class_name(self.id2label, index), index) for index in range(number)]
        written = number <= 20
        # So many inches a class that its name, and its shares where they are written, can be read; at 300 classes names
        # begin to overlap, and the picture grows no more.
        side = min(max(3.0, number * (0.52 if written else 0.155)), 46.0)
        figure = Figure(figsize=(side + 1.2, side), dpi=130, layout="constrained")
        axes = figure.add_subplot()
        axes.set_facecolor("0.9")
        # The square root: what is confused now and then is seen beside a diagonal near 1.
        image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
        size, large = (9, 11) if written else (7, 7 + side / 2)
        axes.set_xticks(range(number), names, rotation=90, fontsize=size)
        axes.set_yticks(range(number), names, fontsize=size)
        axes.set_xlabel("predicted", fontsize=large)
        axes.set_ylabel("true", fontsize=large)
        axes.set_title(
            f"mean IoU {_percent(self.mean_iou)} %, pixel accuracy {_percent(self.pixel_accuracy)} %", size=large
        )
        if written:
            for (row, column), share in np.ndenumerate(shares):
                if share >= 0.005:
                    colour = "white" if share > 0.3 else "0.2"
                    axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=size, color=colour)
        else:  # the eye has to follow a row from its name
            axes.set_xticks(np.arange(4.5, number, 5), minor=True)
            axes.set_yticks(np.arange(4.5, number, 5), minor=True)
            axes.grid(which="minor", color="0.8", linewidth=0.4)
        axes.tick_params(which="minor", length=0)
        bar = figure.colorbar(image, ax=axes, shrink=0.6, aspect=40, pad=0.01, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1])
        bar.set_label("share of the true class's pixels", fontsize=large)
        bar.ax.set_yticklabels(["0", "1 %", "5 %", "20 %", "50 %", "100 %"], fontsize=large)
        return figure

    def _counts(self) -> NDArray[np.int64]:
        return self.matrix.cpu().numpy()


def check_picture() -> None:
    """See that pictures can be drawn, before there is one.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the picture needs matplotlib ({error}): pip install 'fastuper[train]'") from None


def _tensor(values: torch.Tensor | NDArray[np.integer]) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        return values
    # A copy, as an array may be read-only or run backwards; PyTorch does little with the larger unsigned types.
    unsigned = values.dtype.kind == "u" and values.dtype != np.uint8
    return torch.from_numpy(np.array(values, dtype=np.int64 if unsigned else values.dtype, order="C"))


def _ratio(part: Any, whole: Any) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.true_divide(part, whole)


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _json_number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f}"


def _columns(text: str) -> int:
    """Return how many columns of a terminal a text takes: letters of East Asia take two, accents none."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(unicodedata.combining(letter) > 0 for letter in text)


def _drawable(name: str, index: int) -> str:
    """Return a name if matplotlib's own font has its letters, else the class's number."""
    from matplotlib.font_manager import findfont, get_font

    letters = get_font(findfont("DejaVu Sans")).get_charmap()
    name = name if len(name) <= 24 else name[:23] + "…"
    # A dollar sign would begin a formula.
    return name.replace("$", r"\$") if all(ord(letter) in letters for letter in name) else f"class {index}"

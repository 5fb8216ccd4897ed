"""Reports of a confusion matrix: a table for the terminal, JSON, CSV, and a picture."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastuper.data.classes import class_name
from fastuper.data.overlay import format_share
from fastuper_kernels.dispatch.files import atomic_path

if TYPE_CHECKING:
    from fastuper.evaluation.confusion import ConfusionMatrix


def to_dict(matrix: ConfusionMatrix) -> dict[str, Any]:
    """Return the means, a list of the classes, and the matrix, as JSON types; NaN becomes None."""
    columns = zip(matrix.iou.tolist(), matrix.accuracy.tolist(), matrix.pixels.tolist(), strict=True)
    return {
        "mean_iou": json_number(matrix.mean_iou),
        "mean_accuracy": json_number(matrix.mean_accuracy),
        "pixel_accuracy": json_number(matrix.pixel_accuracy),
        "pixels": int(matrix.pixels.sum()),
        "classes": [
            {
                "id": index,
                "name": class_name(matrix.id2label, index),
                "iou": json_number(iou),
                "accuracy": json_number(accuracy),
                "pixels": pixels,
            }
            for index, (iou, accuracy, pixels) in enumerate(columns)
        ],
        "confusion": matrix.counts.tolist(),
    }


def table(matrix: ConfusionMatrix) -> str:
    """Return a table for the terminal: a line for each class that occurs, then the means; in percent."""
    from rich.box import Box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # The table has only horizontal rules, in ASCII: below the heading and above the means.
    rules = Box("    \n    \n -- \n    \n -- \n -- \n    \n    \n", ascii=True)
    grid = Table(box=rules, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    grid.add_column("class")
    for heading in ("IoU", "accuracy", "pixels"):
        grid.add_column(heading, justify="right")
    counts, iou, accuracy = matrix.counts, matrix.iou, matrix.accuracy
    occurring = [int(index) for index in np.flatnonzero(counts.sum(0) + counts.sum(1))]
    shares = matrix.pixels / max(int(counts.sum()), 1)
    for index in occurring:
        name = Text(class_name(matrix.id2label, index))  # a string would be parsed as rich's markup
        grid.add_row(name, _percent(iou[index]), _percent(accuracy[index]), format_share(shares[index]))
    grid.add_section()
    grid.add_row("mean", _percent(matrix.mean_iou), _percent(matrix.mean_accuracy), "")
    grid.add_row("all pixels", "", _percent(matrix.pixel_accuracy), f"{int(counts.sum()):,}")

    stream = io.StringIO()
    # This is wider than any table: the terminal wraps long lines, and files keep them.
    Console(
        file=stream, force_jupyter=False, width=100_000, color_system=None, force_terminal=False, legacy_windows=False
    ).print(grid)
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    absent = matrix.num_labels - len(occurring)
    if absent:
        lines.append(f"{absent} of {matrix.num_labels} classes occur neither in the labels nor in the predictions")
    return "\n".join(lines)


def save_json(matrix: ConfusionMatrix, path: str | os.PathLike[str], failed: Sequence[str] = ()) -> None:
    """Write `to_dict(matrix)` as JSON, with a list `failed` if samples are missing; a failed write leaves no file."""
    values = to_dict(matrix) | ({"failed": list(failed)} if failed else {})
    text = json.dumps(values, ensure_ascii=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def save_csv(matrix: ConfusionMatrix, path: str | os.PathLike[str]) -> None:
    """Write a CSV line per class, with id, name, IoU, accuracy and pixels; a failed write leaves no file."""
    classes = to_dict(matrix)["classes"]
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(classes[0]))
        writer.writeheader()
        writer.writerows(classes)


def save_picture(matrix: ConfusionMatrix, path: str | os.PathLike[str]) -> None:
    """Draw the matrix as a PNG: which share of each true class was predicted as which class.

    A failed write leaves no file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    drawn = figure(matrix)
    with atomic_path(path) as temporary:
        drawn.savefig(temporary, format="png", bbox_inches="tight")


def check_picture() -> None:
    """Check that pictures can be drawn.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the picture needs matplotlib ({error}): pip install 'fastuper[train]'") from None


def figure(matrix: ConfusionMatrix) -> Any:
    """Return the picture of `save_picture` as a matplotlib figure.

    Up to 20 classes, the cells show the shares as numbers. Classes without pixels in the labels have grey rows.

    Raises:
        ImportError: matplotlib is not installed.
    """
    check_picture()
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    number = matrix.num_labels
    shares = matrix.counts / np.where(matrix.pixels, matrix.pixels, np.nan)[:, None]
    names = [_drawable(class_name(matrix.id2label, index), index) for index in range(number)]
    numbers_shown = number <= 20
    # The inches per class keep names and numbers legible. From 300 classes on the picture stops growing, and names
    # overlap.
    side = min(max(3.0, number * (0.52 if numbers_shown else 0.155)), 46.0)
    drawn = Figure(figsize=(side + 1.2, side), dpi=130, layout="constrained")
    axes = drawn.add_subplot()
    axes.set_facecolor("0.9")
    # The square root makes small shares visible beside a diagonal near 1.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    size, large = (9, 11) if numbers_shown else (7, 7 + side / 2)
    axes.set_xticks(range(number), names, rotation=90, fontsize=size)
    axes.set_yticks(range(number), names, fontsize=size)
    axes.set_xlabel("predicted", fontsize=large)
    axes.set_ylabel("true", fontsize=large)
    axes.set_title(
        f"mean IoU {_percent(matrix.mean_iou)} %, pixel accuracy {_percent(matrix.pixel_accuracy)} %", size=large
    )
    if numbers_shown:
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.005:
                colour = "white" if share > 0.3 else "0.2"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=size, color=colour)
    else:  # lines every five classes, since rows are long
        axes.set_xticks(np.arange(4.5, number, 5), minor=True)
        axes.set_yticks(np.arange(4.5, number, 5), minor=True)
        axes.grid(which="minor", color="0.8", linewidth=0.4)
    axes.tick_params(which="minor", length=0)
    bar = drawn.colorbar(image, ax=axes, shrink=0.6, aspect=40, pad=0.01, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1])
    bar.set_label("share of the true class's pixels", fontsize=large)
    bar.ax.set_yticklabels(["0", "1 %", "5 %", "20 %", "50 %", "100 %"], fontsize=large)
    return drawn


def json_number(value: float) -> float | None:
    """Return the number, None for NaN, which JSON does not have."""
    return None if math.isnan(value) else value


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f}"


def _drawable(name: str, index: int) -> str:
    """Return a class's name for the picture, or `class N` if matplotlib's default font lacks a letter."""
    from matplotlib.font_manager import findfont, get_font

    letters = get_font(findfont("DejaVu Sans")).get_charmap()
    name = name if len(name) <= 24 else name[:23] + "…"
    # Dollar signs delimit formulas.
    return name.replace("$", r"\$") if all(ord(letter) in letters for letter in name) else f"class {index}"

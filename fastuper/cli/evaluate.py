"""`fastuper evaluate --model MODEL --data FOLDER --split validation`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from fastuper.cli.common import (
    EXPECTED,
    DeviceOption,
    Dtype,
    DtypeOption,
    LayoutName,
    LayoutOption,
    ModelOption,
    leave,
    load_model,
    make_folder,
)
from fastuper.io.messages import one_line

# torch is imported inside the functions that need it, so that `--help` answers at once.


def evaluate_model(
    model: ModelOption,
    data: Annotated[Path, typer.Option("--data", "-d", metavar="FOLDER", help="The dataset's folder.")],
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Which part of it; validation unless its folder has no parts."),
    ] = None,
    layout: LayoutOption = LayoutName.auto,
    ignore_index: Annotated[
        int, typer.Option("--ignore-index", metavar="N", help="The label of pixels that count nowhere.")
    ] = 255,
    short_side: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Resize photos to this shorter side, proportions kept, instead of the processor's size.",
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Slide a window of N x N over the photos, by default of their own size."),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="From a window to the next; two thirds of it by default.")
    ] = None,
    scales: Annotated[
        str, typer.Option(metavar="S,S,...", help="Factors of the photos' size, whose probabilities are averaged.")
    ] = "1",
    flip: Annotated[bool, typer.Option("--flip", help="Look at each photo mirrored as well.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Where metrics.json, classes.csv and confusion.png go; else nowhere.",
        ),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.auto,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Photos, or windows, that go through the network together.")
    ] = 1,
) -> None:
    """Measure how good a model is on a dataset: mean IoU, mean and pixel accuracy, and those of each class.

    Layouts: images/SPLIT with labels/SPLIT, or images/ with labels/ (files of the same names; classes.txt or
    id2label.json beside them name the classes); ADE20K's images/SPLIT with annotations/SPLIT, whose label 0 is
    ignored; Cityscapes' leftImg8bit/SPLIT with gtFine/SPLIT.

    Label maps are compared at their own size. Ignored pixels count nowhere, whatever is predicted for them.

    Exit status: 0 it was measured, 1 something failed on the way, 2 nothing could start.
    """
    from tqdm import tqdm

    from fastuper.data.folders import find_splits, open_dataset
    from fastuper.evaluation.loop import check_classes, class_names, evaluate
    from fastuper.evaluation.report import check_picture

    try:
        factors = [float(factor) for factor in scales.split(",")]
    except ValueError:
        factors = [0.0]
    if not all(0 < factor < math.inf for factor in factors):
        leave(f"--scales {scales}: give numbers above 0 with commas between them, such as 0.5,0.75,1")
    if stride is not None and (window is None or stride > window):
        leave(f"--stride {stride}: give a --window that is as large at least")
    if output is not None:
        try:
            check_picture()
        except ImportError as error:
            leave(one_line(error))
        make_folder(output)
    try:
        if split is None and find_splits(data, layout.value):
            split = "validation"
        dataset = open_dataset(data, split, layout.value, ignore_index=ignore_index)
    except (OSError, ValueError) as error:
        leave(one_line(error))
    network, processor = load_model(model, device, dtype)
    if dataset.id2label is not None:
        try:
            check_classes(dataset.id2label, class_names(network))
        except ValueError as error:
            leave(one_line(error))

    note = ", label 0 ignored" if dataset.reduce_labels else ""
    typer.echo(f"{len(dataset)} photos of {data}{f' ({split})' if split else ''}{note}")
    try:
        with tqdm(total=len(dataset), unit="photo", disable=None) as bar:
            matrix = evaluate(
                network,
                dataset,
                processor,
                short_side=short_side,
                window=window,
                stride=stride,
                scales=factors,
                flip=flip,
                batch_size=batch_size,
                on_sample=bar.update,
            )
        typer.echo(matrix.table())
        if output is not None:
            matrix.save_json(output / "metrics.json")
            matrix.save_csv(output / "classes.csv")
            matrix.save_picture(output / "confusion.png")
            typer.echo(f"results in {output}")
    except EXPECTED as error:
        typer.echo(f"fastuper: {one_line(error)}", err=True)
        raise typer.Exit(1) from None

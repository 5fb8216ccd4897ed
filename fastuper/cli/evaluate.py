"""`fastuper evaluate --model MODEL --data FOLDER`: measure a model on a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastuper.cli.common import (
    DeviceOption,
    DtypeOption,
    LayoutOption,
    ModelOption,
    folder,
    leave,
    load_model,
    make_folder,
)
from fastuper.cli.options import expand_dataclasses
from fastuper.cli.prediction import PredictionOptions
from fastuper.io.messages import EXPECTED_ERRORS, about, one_line

# torch is imported inside the functions that need it, so that `--help` answers at once.


@expand_dataclasses
def evaluate_model(
    *,
    model: ModelOption,
    data: Annotated[Path, typer.Option("--data", "-d", parser=folder, metavar="FOLDER", help="Folder of the dataset.")],
    split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Split to measure on.", show_default="validation, or all if there are no splits"
        ),
    ] = None,
    layout: LayoutOption = "auto",
    ignore_index: Annotated[
        int, typer.Option("--ignore-index", metavar="N", help="Label of pixels that are not counted.")
    ] = 255,
    prediction: PredictionOptions,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            parser=folder,
            metavar="FOLDER",
            help="Folder for metrics.json, classes.csv and confusion.png.",
            show_default="writes no files",
        ),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Measure a model on a dataset: mean IoU, accuracies, and the figures of each class.

    Layouts: images/SPLIT with labels/SPLIT, or images/ with labels/ (files of the same names; classes.txt or
    id2label.json beside them names the classes); ADE20K's images/SPLIT with annotations/SPLIT, where label 0 is
    ignored; Cityscapes' leftImg8bit/SPLIT with gtFine/SPLIT.

    Predictions are resampled to the size of the label maps. Pixels with the ignored label count neither as right nor as
    wrong.

    If a photo or its label map cannot be read, the command measures on the others; the last lines list the failures
    with their reasons, as does metrics.json.

    Exit status: 0 measured, 1 some photos or the measurement failed, 2 nothing could start.
    """
    from tqdm import tqdm

    from fastuper.data.folders import find_splits, open_dataset
    from fastuper.data.label_check import check_labels
    from fastuper.evaluation.loop import check_classes, class_names, evaluate
    from fastuper.evaluation.report import check_picture

    if output is not None:
        try:
            check_picture()
        except ImportError as error:
            leave(one_line(error))
        make_folder(output)
    try:
        if split is None and find_splits(data, layout):
            split = "validation"
        dataset = open_dataset(data, split, layout, ignore_index=ignore_index, skip_unreadable=True)
    except (OSError, ValueError) as error:
        leave(one_line(error))
    network, processor = load_model(model, device, dtype)
    try:
        if dataset.id2label is not None:
            check_classes(dataset.id2label, class_names(network))
        check_labels(dataset, class_names(network), training=False, notify=typer.echo)
    except (OSError, ValueError) as error:
        leave(one_line(error))

    note = ", label 0 ignored" if dataset.reduce_labels else ""
    typer.echo(f"{len(dataset)} photos of {data}{f' ({split})' if split else ''}{note}")
    failures = [about(path, why) for path, why in dataset.problems.items()]
    count = len(failures)
    try:
        with tqdm(total=len(dataset), unit="photo", disable=None) as bar:
            matrix = evaluate(
                network,
                dataset,
                processor,
                **prediction.arguments(),
                on_sample=bar.update,
                on_failure=lambda error: failures.append(one_line(error)),
            )
        if len(failures) - count < len(dataset):
            typer.echo(matrix.table())
            if output is not None:
                matrix.save_json(output / "metrics.json", failures)
                matrix.save_csv(output / "classes.csv")
                matrix.save_picture(output / "confusion.png")
                typer.echo(f"results in {output}")
    except EXPECTED_ERRORS as error:
        typer.echo(f"fastuper: {one_line(error)}", err=True)
        raise typer.Exit(1) from None
    if failures:
        typer.echo(f"{len(failures)} could not be used and are not in the figures:", err=True)
        for failure in failures:
            typer.echo(f"  {failure}", err=True)
        raise typer.Exit(1)

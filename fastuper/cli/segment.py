"""`fastuper segment PHOTO... --output FOLDER`: label maps and overlays of photos."""

from __future__ import annotations

from typing import Any

import typer

from fastuper.cli.common import DeviceOption, DtypeOption, OptionalModelOption, load_model
from fastuper.cli.photos import (
    BatchSizeOption,
    ImagesArgument,
    MaxPixelsOption,
    OutputOption,
    PhotoCommand,
    SkipExistingOption,
    listed_shares,
    run_on_photos,
)
from fastuper.cli.prediction import PredictionOptions
from fastuper.data.images import MAX_PIXELS
from fastuper.inference.photos import Found, PhotoSegmenter


def segment_photos(
    images: ImagesArgument,
    output: OutputOption,
    model: OptionalModelOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    batch_size: BatchSizeOption = PredictionOptions.batch_size,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    skip_existing: SkipExistingOption = False,
) -> None:
    """Find the class of every pixel of photos.

    For each photo NAME.jpg two files are written, each whole or not at all. NAME_labels.png has the photo's size; its
    pixel values are the class numbers, with colours as a palette. NAME_overlay.jpg is the photo under the same colours,
    with a legend. A second photo of the same name gets NAME-2_labels.png, a third NAME-3_labels.png. results.jsonl has
    a line for each photo: the photo, model and options that made its files. A photo keeps its files' names in later
    runs. A file that no line names is never overwritten.

    If a photo fails, the command continues with the next; the last lines list the failures with their reasons.

    Exit status: 0 all photos were segmented, 1 some failed, 2 nothing could start.
    """
    run_on_photos(
        images,
        output,
        lambda: _Segment(PhotoSegmenter(*load_model(model, device, dtype))),
        _Segment,
        batch_size=batch_size,
        max_pixels=max_pixels,
        skip_existing=skip_existing,
    )


class _Segment(PhotoCommand):
    """Label maps and overlays."""

    name = "segment"
    done = "segmented"

    def __init__(self, model: PhotoSegmenter) -> None:
        classes = len(model.network.config.id2label)
        if classes > 256:
            typer.echo(f"{classes} classes: the label maps are 16-bit grey PNGs, without colours", err=True)
        super().__init__(model, {})

    def report(self, found: Found) -> tuple[list[dict[str, Any]], str]:
        shares = found.layers["class"].shares()
        return shares, listed_shares(shares)

"""`fastuper segment PHOTO... --output FOLDER`: label maps and overlays of photos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fastuper.cli.common import DeviceOption, DtypeOption, OptionalModelOption, load_model
from fastuper.cli.photos import (
    BatchSizeOption,
    ImagesArgument,
    Job,
    MaxPixelsOption,
    OutputOption,
    PhotoCommand,
    SkipExistingOption,
    run_on_photos,
    shares_of,
)
from fastuper.cli.prediction import PredictionOptions
from fastuper.data.classes import class_palette
from fastuper.data.images import MAX_PIXELS
from fastuper.data.overlay import overlay, save_label_png
from fastuper_kernels.dispatch.files import atomic_path

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from fastuper.data.processor import UperNetImageProcessor
    from fastuper.models.upernet import UperNetForSemanticSegmentation


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
        lambda: _Segment(*load_model(model, device, dtype)),
        _Segment,
        batch_size=batch_size,
        max_pixels=max_pixels,
        skip_existing=skip_existing,
    )


class _Segment(PhotoCommand):
    """Label maps and overlays."""

    name = "segment"
    done = "segmented"
    endings = ("_labels.png", "_overlay.jpg")

    def __init__(self, network: UperNetForSemanticSegmentation, processor: UperNetImageProcessor) -> None:
        from fastuper.evaluation.loop import class_names

        classes = len(network.config.id2label)
        if classes > 256:
            typer.echo(f"{classes} classes: the label maps are 16-bit grey PNGs, without colours", err=True)
        super().__init__(network, processor, {})
        self.id2label = class_names(network)
        self.palette = class_palette(self.id2label, getattr(network.config, "palette", None))

    def prepare(self, photo: Image.Image) -> list[torch.Tensor]:
        return [self.processor(images=[photo], return_tensors="pt")["pixel_values"]]

    def predict(self, pixels: list[torch.Tensor], sizes: list[tuple[int, int]]) -> Sequence[torch.Tensor]:
        """Return label maps, (height, width) of one or two bytes."""
        return self.network.segment(pixels[0], target_sizes=sizes, dtype=None)

    def write(
        self, job: Job, photo: Image.Image, result: torch.Tensor, paths: Mapping[str, Path]
    ) -> tuple[list[dict[str, Any]], str]:
        labels = result.cpu().numpy()
        save_label_png(labels, self.palette, paths["_labels.png"])
        with atomic_path(paths["_overlay.jpg"]) as temporary:
            overlay(photo, labels, self.id2label, self.palette).save(temporary, format="JPEG", quality=90)
        return shares_of(labels, self.id2label)

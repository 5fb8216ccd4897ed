"""`fastuper segment PHOTO... --output FOLDER`: label maps and overlays of photos."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from fastuper.cli.common import (
    EXPECTED_ERRORS,
    DeviceOption,
    DtypeOption,
    OptionalModelOption,
    in_columns,
    leave,
    load_model,
    make_folder,
)
from fastuper.cli.options import field_option
from fastuper.cli.prediction import PredictionOptions
from fastuper.data.classes import class_name, class_palette
from fastuper.data.images import IMAGE_SUFFIXES, MAX_PIXELS, ImageError, read_image
from fastuper.data.overlay import class_shares, format_share, overlay, save_label_png
from fastuper.io.messages import one_line
from fastuper_kernels.dispatch.files import atomic_path

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from PIL import Image

    from fastuper.data.processor import UperNetImageProcessor
    from fastuper.models.upernet import UperNetForSemanticSegmentation

# torch is imported inside the functions that need it, so that `--help` answers at once.


def segment_photos(
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE", help="Photos and folders; of a folder, the photos directly inside."),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FOLDER", help="Folder for the results; made if it is missing."),
    ],
    model: OptionalModelOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    batch_size: Annotated[int, field_option(PredictionOptions, "batch_size")] = PredictionOptions.batch_size,
    max_pixels: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Largest photo to decode, as width x height; larger photos fail."),
    ] = MAX_PIXELS,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Skip photos that have results already.")
    ] = False,
) -> None:
    """Find the class of every pixel of photos.

    For each photo NAME.jpg two files are written, each whole or not at all. NAME_labels.png has the photo's size; its
    pixel values are the class numbers, with colours as a palette. NAME_overlay.jpg is the photo under the same colours,
    with a legend. A second photo of the same name gets NAME-2_labels.png, a third NAME-3_labels.png.

    If a photo fails, the command continues with the next; the last lines list the failures with their reasons.

    Exit status: 0 all photos were segmented, 1 some failed, 2 nothing could start.
    """
    jobs, failures = _plan_jobs(images, output)
    todo = [job for job in jobs if not (skip_existing and job.is_done())]
    skipped = len(jobs) - len(todo)
    make_folder(output)
    written = 0
    if todo:
        network, processor = load_model(model, device, dtype)
        classes = len(network.config.id2label)
        if classes > 256:
            typer.echo(f"{classes} classes: the label maps are 16-bit grey PNGs, without colours", err=True)
        written = _segment_jobs(todo, failures, network, processor, batch_size, max_pixels)

    total = written + len(failures) + skipped
    also = f", {skipped} already there" if skipped else ""
    typer.echo(f"{written} of {total} photos segmented{also}, results in {output}")
    if failures:
        typer.echo(f"{len(failures)} failed:", err=True)
        for failure in failures:
            typer.echo(f"  {failure}", err=True)
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Job:
    """A photo and the files that its results go to."""

    photo: Path
    labels: Path
    overlay: Path

    def is_done(self) -> bool:
        """Return True if the results exist and are newer than the photo.

        Older results belong to another photo: a photo that was added later may take the name of an earlier photo.
        """
        try:
            return min(self.labels.stat().st_mtime, self.overlay.stat().st_mtime) >= self.photo.stat().st_mtime
        except OSError:
            return False


def _plan_jobs(inputs: Iterable[Path], output: Path) -> tuple[list[_Job], list[str]]:
    """Return a job for each photo, and a message for each folder without photos.

    A photo that is named twice has one job, and no two jobs write the same file.
    """
    photos: dict[Path, Path] = {}
    failures = []
    for path in inputs:
        if not os.path.isdir(path):  # unlike Path.is_dir, False where permission is denied
            photos.setdefault(Path(os.path.realpath(path)), path)
            continue
        if path.resolve() == output.resolve():
            leave(
                f"{output} is both read and written, and a second run would segment the results; give another --output"
            )
        try:
            inside = sorted(file for file in path.iterdir() if _looks_like_a_photo(file))
        except OSError as error:
            failures.append(f"{path}: {error.strerror}")
            continue
        if not inside:
            failures.append(f"{path}: holds no photos")
        for file in inside:
            photos.setdefault(file.resolve(), file)

    taken = {str(path).casefold() for path in photos}  # on some file systems A.png and a.png are one file
    numbers: Counter[str] = Counter()
    jobs = []
    folder = output.resolve()
    for photo in photos.values():
        while True:
            numbers[photo.stem.casefold()] += 1
            number = numbers[photo.stem.casefold()]
            name = photo.stem if number == 1 else f"{photo.stem}-{number}"
            job = _Job(photo, output / f"{name}_labels.png", output / f"{name}_overlay.jpg")
            outputs = {str(folder / path.name).casefold() for path in (job.labels, job.overlay)}
            if not outputs & taken:
                break
        taken |= outputs
        jobs.append(job)
    return jobs, failures


def _looks_like_a_photo(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _segment_jobs(
    jobs: Sequence[_Job],
    failures: list[str],
    network: UperNetForSemanticSegmentation,
    processor: UperNetImageProcessor,
    batch_size: int,
    max_pixels: int,
) -> int:
    """Segment the photo of every job and write its files; return the number of photos whose files are written.

    A message for each photo that fails is added to `failures`.
    """
    from tqdm import tqdm

    from fastuper.evaluation.loop import class_names

    id2label = class_names(network)
    palette = class_palette(id2label)
    written = 0
    with tqdm(total=len(jobs), unit="photo", disable=None if len(jobs) > 1 else True) as bar:

        def fail(job: _Job, error: Exception) -> None:
            failures.append(one_line(error if isinstance(error, ImageError) else f"{job.photo}: {error!s}"))
            bar.update()

        for start in range(0, len(jobs), batch_size):
            batch = []
            for job in jobs[start : start + batch_size]:
                try:
                    photo = read_image(job.photo, max_pixels=max_pixels)
                    batch.append((job, photo, processor(images=[photo], return_tensors="pt")["pixel_values"]))
                except EXPECTED_ERRORS as error:
                    fail(job, error)
            for job, photo, result in _segment_batch(network, batch):
                if isinstance(result, Exception):
                    fail(job, result)
                    continue
                try:
                    labels = result.cpu().numpy()
                    save_label_png(labels, palette, job.labels)
                    with atomic_path(job.overlay) as temporary:
                        overlay(photo, labels, id2label, palette).save(temporary, format="JPEG", quality=90)
                except EXPECTED_ERRORS as error:
                    fail(job, error)
                else:
                    bar.write(_describe(job, photo, class_shares(labels, len(palette)), id2label))
                    bar.update()
                    written += 1
    return written


def _segment_batch(
    network: UperNetForSemanticSegmentation, batch: Sequence[tuple[_Job, Image.Image, torch.Tensor]]
) -> Iterator[tuple[_Job, Image.Image, torch.Tensor | Exception]]:
    """Yield each photo of a batch with its labels, (height, width) int64, or with its error.

    A forward pass takes neighbouring photos of equal size together. If it fails, each photo is segmented alone.
    """
    import torch

    for _, same_shape in groupby(batch, key=lambda item: item[2].shape):
        group = list(same_shape)
        results: list[Any] = []
        try:
            pixels = torch.cat([pixels for _, _, pixels in group]).to(network.device, network.dtype)
            sizes = [(photo.height, photo.width) for _, photo, _ in group]
            results = network.segment(pixels, target_sizes=sizes)
        except EXPECTED_ERRORS as error:
            if len(group) == 1:
                results = [error]
        if results:
            yield from ((job, photo, result) for (job, photo, _), result in zip(group, results, strict=True))
        else:  # out of memory, most often; outside the handler, whose traceback keeps the tensors alive
            if network.device.type == "cuda":
                torch.cuda.empty_cache()
            for item in group:
                yield from _segment_batch(network, [item])


def _describe(job: _Job, photo: Image.Image, shares: NDArray[np.float64], id2label: Mapping[int, str]) -> str:
    """Return a line with the photo and its results, and below it the share of each class, largest first."""
    present = [int(index) for index in np.argsort(-shares, kind="stable") if shares[index] > 0]
    classes = [f"{class_name(id2label, index)} {format_share(shares[index])}" for index in present]
    results = f"{job.labels.name}, {job.overlay.name}"
    return f"{one_line(str(job.photo))} ({photo.width} x {photo.height}) -> {results}\n{in_columns(classes)}"

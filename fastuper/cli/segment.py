"""`fastuper segment PHOTO... --output FOLDER`: label maps and overlays of photos."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

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
from fastuper.data.images import IMAGE_SUFFIXES, MAX_PIXELS, read_image
from fastuper.data.listing import list_images
from fastuper.data.overlay import class_shares, format_share, overlay, save_label_png
from fastuper.inference.results import RESULTS, Content, Maker, Results, content_of, identity, model_digest
from fastuper.io.messages import about, name_of, printable
from fastuper_kernels.dispatch.files import atomic_path

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from PIL import Image

    from fastuper.data.processor import UperNetImageProcessor
    from fastuper.models.upernet import UperNetForSemanticSegmentation

# torch is imported inside the functions that need it, so that `--help` answers at once.

ENDINGS = ("_labels.png", "_overlay.jpg")
"""The ends of the names of a photo's files."""


def segment_photos(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE", help="Photos and folders; of a folder, the photos directly inside."),
    ],
    output: Annotated[
        str,
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
        bool,
        typer.Option(
            "--skip-existing",
            help="Skip photos whose results are there, unchanged, from the same photo, model and options.",
        ),
    ] = False,
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
    photos, failures = _find_photos(images, output)
    make_folder(output)
    written = skipped = 0
    if photos:
        network, processor = load_model(model, device, dtype)
        classes = len(network.config.id2label)
        if classes > 256:
            typer.echo(f"{classes} classes: the label maps are 16-bit grey PNGs, without colours", err=True)
        try:
            results = Results(output, notify=lambda message: typer.echo(message, err=True))
        except OSError as error:
            leave(about(os.path.join(output, RESULTS), error))
        with results:
            run = _Run(network, processor, results, max_pixels, skip_existing)
            run.segment(photos, batch_size)
        written, skipped = run.written, run.skipped
        failures += run.failures

    total = written + len(failures) + skipped
    also = f", {skipped} already there" if skipped else ""
    typer.echo(f"{written} of {total} photos segmented{also}, results in {name_of(output)}")
    if failures:
        typer.echo(f"{len(failures)} failed:", err=True)
        for failure in failures:
            typer.echo(f"  {failure}", err=True)
        raise typer.Exit(1)


def _find_photos(inputs: Iterable[str], output: str) -> tuple[list[str], list[str]]:
    """Return the photos that are named and those in the named folders, each once, and a message for each fault."""
    photos: dict[str, str] = {}
    failures = []
    for path in inputs:
        if not os.path.isdir(path):
            if path:
                photos.setdefault(os.path.realpath(path), path)
            else:
                failures.append(about(path, "an empty name; is a variable unset?"))
            continue
        if os.path.realpath(path) == os.path.realpath(output):
            leave(
                f"{name_of(output)} is both read and written, and a second run would segment the results; give another "
                "--output"
            )
        listing = list_images(path, IMAGE_SUFFIXES)
        failures += [about(problem, fault) for problem, fault in listing.problems.items()]
        if not listing.images and not listing.problems:
            failures.append(about(path, "holds no photos"))
        for file in listing.images:
            photos.setdefault(os.path.realpath(file), str(file))
    return list(photos.values()), failures


class _Job(NamedTuple):
    """A photo and the files that its results go to."""

    photo: str
    identity: str
    content: Content | None
    labels: str
    overlay: str


class _Read(NamedTuple):
    """A photo that was read, and its pixels for the model."""

    job: _Job
    photo: Image.Image
    pixels: torch.Tensor


class _Run:
    """Segments photos, writes their files and records them.

    Args:
        network: the model.
        processor: its image processor.
        results: the record of the output folder.
        max_pixels: the limit on a photo's width x height.
        skip_existing: skip photos that have results.

    Attributes:
        written: the number of photos whose files were written.
        skipped: the number of photos that were skipped.
        failures: a message for each photo that failed.
    """

    def __init__(
        self,
        network: UperNetForSemanticSegmentation,
        processor: UperNetImageProcessor,
        results: Results,
        max_pixels: int,
        skip_existing: bool,
    ) -> None:
        from fastuper.evaluation.loop import class_names

        self.network = network
        self.processor = processor
        self.results = results
        self.max_pixels = max_pixels
        self.skip_existing = skip_existing
        self.maker = Maker(model_digest(network, processor), {"dtype": str(network.dtype).removeprefix("torch.")})
        self.id2label = class_names(network)
        self.palette = class_palette(self.id2label)
        self.written = self.skipped = 0
        self.failures: list[str] = []

    def segment(self, photos: Sequence[str], batch_size: int) -> None:
        """Segment photos, and print a line and the shares of the classes for each."""
        from tqdm import tqdm

        avoid = {os.path.realpath(photo) for photo in photos}
        identities = [identity(photo) for photo in photos]
        names = self.results.choose_names(identities, ENDINGS, avoid)
        jobs = [_Job(photo, known, None, *own) for photo, known, own in zip(photos, identities, names, strict=True)]
        with tqdm(total=len(jobs), unit="photo", disable=None if len(jobs) > 1 else True) as bar:
            self.bar = bar
            batch: list[_Read] = []
            for job in jobs:
                read = self._read(job)
                if read is not None:
                    batch.append(read)
                if len(batch) == batch_size:
                    self._segment(batch)
                    batch = []
            self._segment(batch)

    def _read(self, job: _Job) -> _Read | None:
        """Read a job's photo; return None if it fails or is skipped."""
        with suppress(OSError):  # read_image says why
            job = job._replace(content=content_of(job.photo))
        try:
            if self.skip_existing and job.content and self.results.has(job.identity, job.content, self.maker):
                self.skipped += 1
                self.bar.update()
                return None
            photo = read_image(job.photo, max_pixels=self.max_pixels)
            return _Read(job, photo, self.processor(images=[photo], return_tensors="pt")["pixel_values"])
        except EXPECTED_ERRORS as error:
            self._fail(job, error)
            return None

    def _segment(self, batch: Sequence[_Read]) -> None:
        """Segment the photos of a batch, write their files and record them."""
        for (job, photo, _), labels in _label_maps(self.network, batch):
            try:
                if isinstance(labels, Exception):
                    raise labels
                self.bar.write(self._write(job, photo, labels.cpu().numpy()))
            except EXPECTED_ERRORS as error:
                self._fail(job, error)
            else:
                self.written += 1
                self.bar.update()

    def _write(self, job: _Job, photo: Image.Image, labels: NDArray[np.integer]) -> str:
        """Write and record the files of a photo; return a line about it, and below it the shares of the classes."""
        folder = self.results.folder
        before = self.results.owner(job.labels)
        self.results.begin([job.labels, job.overlay])
        save_label_png(labels, self.palette, folder / job.labels)
        with atomic_path(folder / job.overlay) as temporary:
            overlay(photo, labels, self.id2label, self.palette).save(temporary, format="JPEG", quality=90)
        shares = class_shares(labels, len(self.palette))
        present = [int(index) for index in np.argsort(-shares, kind="stable") if shares[index] > 0]
        self.results.add(
            job.identity,
            job.content,
            self.maker,
            size=(photo.height, photo.width),
            names=[job.labels, job.overlay],
            shares=[{"class": index, "name": self.id2label[index], "share": float(shares[index])} for index in present],
        )
        classes = [f"{class_name(self.id2label, index)} {format_share(shares[index])}" for index in present]
        names = f"{printable(job.labels)}, {printable(job.overlay)}"
        if before not in (None, job.identity):
            names += f" (those of {name_of(before)} are replaced)"
        return f"{name_of(job.photo)} ({photo.width} x {photo.height}) -> {names}\n{in_columns(classes)}"

    def _fail(self, job: _Job, error: Exception) -> None:
        """Remove a photo's unfinished files, and record why it failed."""
        message = about(job.photo, error)
        self.results.drop([job.labels, job.overlay])
        try:
            self.results.add(job.identity, job.content, self.maker, error=message)
        except OSError as fault:
            message = f"{message} ({RESULTS} has no line of it: {fault.strerror})"
        self.failures.append(message)
        self.bar.update()


def _label_maps(
    network: UperNetForSemanticSegmentation, batch: Sequence[_Read]
) -> Iterator[tuple[_Read, torch.Tensor | Exception]]:
    """Yield each photo of a batch with its label map, (height, width) of one or two bytes, or with its error.

    A forward pass takes neighbouring photos of equal size together. If it fails, each photo is segmented alone.
    """
    import torch

    for _, same_shape in groupby(batch, key=lambda read: read.pixels.shape):
        group = list(same_shape)
        results: list[Any] = []
        try:
            pixels = torch.cat([read.pixels for read in group]).to(network.device, network.dtype)
            sizes = [(read.photo.height, read.photo.width) for read in group]
            results = network.segment(pixels, target_sizes=sizes, dtype=None)
        except EXPECTED_ERRORS as error:
            if len(group) == 1:
                results = [error]
        if results:
            yield from zip(group, results, strict=True)
        else:  # out of memory, most often; outside the handler, whose traceback keeps the tensors alive
            if network.device.type == "cuda":
                torch.cuda.empty_cache()
            for read in group:
                yield from _label_maps(network, [read])

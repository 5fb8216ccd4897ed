"""`fastuper segment PHOTO... --output FOLDER [--model MODEL]`."""

from __future__ import annotations

import os
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from fastuper.cli.common import (
    EXPECTED,
    DeviceOption,
    Dtype,
    DtypeOption,
    OptionalModelOption,
    leave,
    load_model,
    make_folder,
)
from fastuper.data.classes import class_name, class_palette
from fastuper.data.images import MAX_PIXELS, ImageError, read_image
from fastuper.data.overlay import class_shares, format_share, overlay, save_label_png
from fastuper.io.messages import one_line
from fastuper_kernels.dispatch.files import atomic_path

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from PIL import Image

    from fastuper import UperNetForSemanticSegmentation, UperNetImageProcessor

# torch is imported inside the functions that need it, so that `--help` answers at once.

PHOTO_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".heic", ".tif", ".tiff"),
    *(".bmp", ".gif", ".jp2", ".pgm", ".pnm", ".ppm", ".tga"),
)
"""What counts as a photo in a folder. A file that is named itself is tried whatever it is called."""


def segment_photos(
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE", help="Photos, or folders: of a folder, the photos directly inside it."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the results go; made if it is missing.")
    ],
    model: OptionalModelOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.auto,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Photos that go through the network together.")
    ] = 1,
    max_pixels: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="The largest photo (width x height) that is decoded; larger ones fail."),
    ] = MAX_PIXELS,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Leave out photos whose results are there, instead of redoing them.")
    ] = False,
) -> None:
    """Find the class of every pixel of photos.

    For each photo NAME.jpg two files are written, each whole or not at all: NAME_labels.png, of the photo's own size,
    whose pixel values are the class numbers (with colours, as a palette); and NAME_overlay.jpg, the photo under those
    colours with a legend. A second photo of the same name gets NAME-2_labels.png, a third NAME-3_labels.png.

    A photo that fails does not stop the others: the last lines say which failed and why.

    Exit status: 0 all photos were segmented, 1 some failed, 2 nothing could start.
    """
    jobs, failures = _plan(images, output)
    todo = [job for job in jobs if not (skip_existing and job.is_done())]
    skipped = len(jobs) - len(todo)
    make_folder(output)
    written = 0
    if todo:
        network, processor = load_model(model, device, dtype)
        classes = len(network.config.id2label)
        if classes > 256:
            typer.echo(f"{classes} classes: the label maps are 16-bit grey PNGs, without colours", err=True)
        written = _segment_all(todo, failures, network, processor, batch_size, max_pixels)

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
    photo: Path
    labels: Path
    overlay: Path

    def is_done(self) -> bool:
        """Whether the results are there and newer than the photo: a photo added later may have taken its name."""
        try:
            return min(self.labels.stat().st_mtime, self.overlay.stat().st_mtime) >= self.photo.stat().st_mtime
        except OSError:
            return False


def _plan(inputs: Iterable[Path], output: Path) -> tuple[list[_Job], list[str]]:
    """What is to be written for which photo, and which inputs hold none. Each photo once, no output twice."""
    photos: dict[Path, Path] = {}
    failures = []
    for path in inputs:
        if not os.path.isdir(path):  # unlike Path.is_dir, False where one may not look
            photos.setdefault(Path(os.path.realpath(path)), path)
            continue
        if path.resolve() == output.resolve():
            leave(f"{output} is both read and written, so that a second run would segment the results; name another")
        try:
            inside = sorted(file for file in path.iterdir() if _looks_like_a_photo(file))
        except OSError as error:
            failures.append(f"{path}: {error.strerror}")
            continue
        if not inside:
            failures.append(f"{path}: holds no photos")
        for file in inside:
            photos.setdefault(file.resolve(), file)

    taken = {str(path).casefold() for path in photos}  # some file systems take A.png for a.png
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
    return path.suffix.lower() in PHOTO_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _segment_all(
    jobs: Sequence[_Job],
    failures: list[str],
    network: UperNetForSemanticSegmentation,
    processor: UperNetImageProcessor,
    batch_size: int,
    max_pixels: int,
) -> int:
    """Segment every job's photo and write its files; failures are added to the list. Returns how many were written."""
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
                except EXPECTED as error:
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
                except EXPECTED as error:
                    fail(job, error)
                else:
                    bar.write(_describe(job, photo, class_shares(labels, len(palette)), id2label))
                    bar.update()
                    written += 1
    return written


def _segment_batch(
    network: UperNetForSemanticSegmentation, batch: Sequence[tuple[_Job, Image.Image, torch.Tensor]]
) -> Iterator[tuple[_Job, Image.Image, torch.Tensor | Exception]]:
    """Yield each photo with its (height, width) labels or its error. What fails together is tried one by one."""
    import torch

    for _, same_shape in groupby(batch, key=lambda item: item[2].shape):
        group = list(same_shape)
        results: list[Any] = []
        try:
            pixels = torch.cat([pixels for _, _, pixels in group]).to(network.device, network.dtype)
            sizes = [(photo.height, photo.width) for _, photo, _ in group]
            results = network.segment(pixels, target_sizes=sizes)
        except EXPECTED as error:
            if len(group) == 1:
                results = [error]
        if results:
            yield from ((job, photo, result) for (job, photo, _), result in zip(group, results, strict=True))
        else:  # most often out of memory; outside the handler, which would hold on to the tensors
            if network.device.type == "cuda":
                torch.cuda.empty_cache()
            for item in group:
                yield from _segment_batch(network, [item])


def _describe(job: _Job, photo: Image.Image, shares: NDArray[np.float64], id2label: Mapping[int, str]) -> str:
    """The photo, its results, and the share of every class in it, largest first."""
    present = [int(index) for index in np.argsort(-shares, kind="stable") if shares[index] > 0]
    # A name and its share stay on one line: their spaces are hidden from textwrap.
    classes = [f"{class_name(id2label, index)} {format_share(shares[index])}".replace(" ", "\0") for index in present]
    text = textwrap.fill(
        ", ".join(classes),
        width=100,
        initial_indent="  ",
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    ).replace("\0", " ")
    return (
        f"{one_line(str(job.photo))} ({photo.width} x {photo.height}) -> {job.labels.name}, {job.overlay.name}\n{text}"
    )

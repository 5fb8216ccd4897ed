"""What `fastuper segment` and `fastuper parse` share: finding photos, batches, files, the record, the summary."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import typer

from fastuper.cli.common import in_columns, leave, make_folder
from fastuper.cli.options import field_option
from fastuper.cli.prediction import PredictionOptions
from fastuper.data.classes import class_name
from fastuper.data.images import IMAGE_SUFFIXES, read_image
from fastuper.data.listing import list_images
from fastuper.data.overlay import format_share
from fastuper.inference.photos import Found, PhotoModel
from fastuper.inference.results import RESULTS, Content, Maker, Results, content_of, identity, model_digest
from fastuper.io.messages import EXPECTED_ERRORS, about, name_of, printable

if TYPE_CHECKING:
    import torch
    from PIL import Image

# torch is imported inside the functions that need it, so that `--help` answers at once.

ImagesArgument = Annotated[
    list[str],
    typer.Argument(metavar="IMAGE", help="Photos and folders; of a folder, the photos directly inside."),
]
OutputOption = Annotated[
    str, typer.Option("--output", "-o", metavar="FOLDER", help="Folder for the results; made if it is missing.")
]
BatchSizeOption = Annotated[int, field_option(PredictionOptions, "batch_size")]
MaxPixelsOption = Annotated[
    int, typer.Option(min=1, metavar="N", help="Largest photo to decode, as width x height; larger photos fail.")
]
SkipExistingOption = Annotated[
    bool,
    typer.Option(
        "--skip-existing",
        help="Skip photos whose results are there, unchanged, from the same photo, model and options.",
    ),
]


class Job(NamedTuple):
    """A photo, and the names of the files that its results go to, by their endings."""

    photo: str
    identity: str
    content: Content | None
    names: dict[str, str]


class PhotoCommand(ABC):
    """A model, and what a command records and prints of its results.

    Args:
        model: what computes the results and writes the files.
        options: all options that change the results, of JSON types; the model's dtype is added.

    Attributes:
        name: the command's name.
        done: what has been done with photos, in the summary.
        maker: the model and the options, for the record.
    """

    name: ClassVar[str]
    done: ClassVar[str]

    def __init__(self, model: PhotoModel, options: Mapping[str, Any]) -> None:
        self.model = model
        dtype = str(model.network.dtype).removeprefix("torch.")
        self.maker = Maker(model_digest(model.network, model.processor), {"dtype": dtype, **options})

    @abstractmethod
    def report(self, found: Found) -> tuple[list[dict[str, Any]], str]:
        """Return the classes that occur with their shares, for the record; and what to print below the photo's line."""


def run_on_photos(
    images: Iterable[str],
    output: str,
    load: Callable[[], PhotoCommand],
    command: type[PhotoCommand],
    *,
    batch_size: int,
    max_pixels: int,
    skip_existing: bool,
) -> None:
    """Find photos, run a command on them and print the summary; the command's exit status is 0, 1 or 2.

    Args:
        images: photos and folders.
        output: the folder for the results.
        load: returns the command with its model; it is called only if there are photos.
        command: the class of what `load` returns.
        batch_size: the number of photos in a batch.
        max_pixels: the limit on a photo's width x height.
        skip_existing: skip photos that have results.
    """
    photos, failures = _find_photos(images, output)
    make_folder(output)
    written = skipped = 0
    if photos:
        loaded = load()
        try:
            results = Results(output, command.name, notify=lambda message: typer.echo(message, err=True))
        except OSError as error:
            leave(about(os.path.join(output, RESULTS), error))
        with results:
            run = _Run(loaded, results, max_pixels, skip_existing)
            run.run(photos, batch_size)
        written, skipped = run.written, run.skipped
        failures += run.failures

    total = written + len(failures) + skipped
    also = f", {skipped} already there" if skipped else ""
    typer.echo(f"{written} of {total} photos {command.done}{also}, results in {name_of(output)}")
    if failures:
        typer.echo(f"{len(failures)} failed:", err=True)
        for failure in failures:
            typer.echo(f"  {failure}", err=True)
        raise typer.Exit(1)


def listed_shares(shares: Iterable[Mapping[str, Any]]) -> str:
    """Return classes with their shares, as `Layer.shares` has them, in columns of text."""
    return in_columns(
        [f"{class_name({each['class']: each['name']}, each['class'])} {format_share(each['share'])}" for each in shares]
    )


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
                f"{name_of(output)} is both read and written, and a second run would read the results as photos; give "
                "another --output"
            )
        listing = list_images(path, IMAGE_SUFFIXES)
        failures += [about(problem, fault) for problem, fault in listing.problems.items()]
        if not listing.images and not listing.problems:
            failures.append(about(path, "holds no photos"))
        for file in listing.images:
            photos.setdefault(os.path.realpath(file), str(file))
    return list(photos.values()), failures


class _Read(NamedTuple):
    """A photo that was read, and its pixels for the model at each scale."""

    job: Job
    photo: Image.Image
    pixels: list[torch.Tensor]


class _Run:
    """Runs a command on photos, and records the files.

    Args:
        command: what to compute and to write.
        results: the record of the output folder.
        max_pixels: the limit on a photo's width x height.
        skip_existing: skip photos that have results.

    Attributes:
        written: the number of photos whose files were written.
        skipped: the number of photos that were skipped.
        failures: a message for each photo that failed.
    """

    def __init__(self, command: PhotoCommand, results: Results, max_pixels: int, skip_existing: bool) -> None:
        self.command = command
        self.results = results
        self.max_pixels = max_pixels
        self.skip_existing = skip_existing
        self.written = self.skipped = 0
        self.failures: list[str] = []

    def run(self, photos: Sequence[str], batch_size: int) -> None:
        """Take photos in batches, and print a line and the classes of each."""
        from tqdm import tqdm

        endings = self.command.model.endings
        avoid = {os.path.realpath(photo) for photo in photos}
        identities = [identity(photo) for photo in photos]
        jobs = []
        chosen = self.results.choose_names(identities, endings, avoid)
        for photo, known, names in zip(photos, identities, chosen, strict=True):
            by_ending = dict(zip(endings, names, strict=True))
            jobs.append(Job(photo, known, None, {ending: by_ending[ending] for ending in self.command.model.written}))
        with tqdm(total=len(jobs), unit="photo", disable=None if len(jobs) > 1 else True) as bar:
            self.bar = bar
            batch: list[_Read] = []
            for job in jobs:
                read = self._read(job)
                if read is not None:
                    batch.append(read)
                if len(batch) == batch_size:
                    self._finish(batch)
                    batch = []
            self._finish(batch)

    def _read(self, job: Job) -> _Read | None:
        """Read a job's photo; return None if it fails or is skipped."""
        with suppress(OSError):  # read_image says why
            job = job._replace(content=content_of(job.photo))
        try:
            if self.skip_existing and job.content and self.results.has(job.identity, job.content, self.command.maker):
                self.skipped += 1
                self.bar.update()
                return None
            photo = read_image(job.photo, max_pixels=self.max_pixels)
            return _Read(job, photo, self.command.model.prepare(photo))
        except EXPECTED_ERRORS as error:
            self._fail(job, error)
            return None

    def _finish(self, batch: Sequence[_Read]) -> None:
        """Run the model on the photos of a batch, write their files and record them."""
        for (job, photo, _), result in _predictions(self.command, batch):
            try:
                if isinstance(result, Exception):
                    raise result
                self.bar.write(self._write(job, photo, result))
            except EXPECTED_ERRORS as error:
                self._fail(job, error)
            else:
                self.written += 1
                self.bar.update()

    def _write(self, job: Job, photo: Image.Image, found: Found) -> str:
        """Write and record the files of a photo; return a line about it, and below it the classes."""
        names = list(job.names.values())
        before = self.results.owner(names[0])
        self.results.begin(names)
        paths = {ending: self.results.folder / name for ending, name in job.names.items()}
        self.command.model.write(job.identity, photo, found, paths)
        shares, text = self.command.report(found)
        size = (photo.height, photo.width)
        self.results.add(job.identity, job.content, self.command.maker, size=size, names=names, shares=shares)
        listed = ", ".join(map(printable, names))
        if before not in (None, job.identity):
            listed += f" (those of {name_of(before)} are replaced)"
        return f"{name_of(job.photo)} ({photo.width} x {photo.height}) -> {listed}\n{text}"

    def _fail(self, job: Job, error: Exception) -> None:
        """Remove a photo's unfinished files, and record why it failed."""
        message = about(job.photo, error)
        self.results.drop(list(job.names.values()))
        try:
            self.results.add(job.identity, job.content, self.command.maker, error=message)
        except OSError as fault:
            message = f"{message} ({RESULTS} has no line of it: {fault.strerror})"
        self.failures.append(message)
        self.bar.update()


def _predictions(command: PhotoCommand, batch: Sequence[_Read]) -> Iterator[tuple[_Read, Any]]:
    """Yield each photo of a batch with its result, or with its error.

    A forward pass takes neighbouring photos of equal size together. If it fails, each photo is taken alone.
    """
    import torch

    model = command.model
    network = model.network
    for _, same_shapes in groupby(batch, key=lambda read: [pixels.shape for pixels in read.pixels]):
        group = list(same_shapes)
        results: Sequence[Any] = []
        try:
            scales = zip(*(read.pixels for read in group), strict=True)
            pixels = [torch.cat(scale).to(network.device, network.dtype) for scale in scales]
            results = model.predict(pixels, [(read.photo.height, read.photo.width) for read in group])
        except EXPECTED_ERRORS as error:
            if len(group) == 1:
                results = [error]
        if results:
            yield from zip(group, results, strict=True)
        else:  # out of memory, most often; outside the handler, whose traceback keeps the tensors alive
            if network.device.type == "cuda":
                torch.cuda.empty_cache()
            for read in group:
                yield from _predictions(command, [read])

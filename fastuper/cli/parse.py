"""`fastuper parse PHOTO... --model FOLDER --output FOLDER`: scene, objects, parts, materials and textures of photos."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import typer

from fastuper.cli.common import DeviceOption, DtypeOption, ModelOption, leave, load_parsing_model
from fastuper.cli.options import expand_dataclasses
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
from fastuper.data.classes import class_name
from fastuper.data.images import MAX_PIXELS
from fastuper.data.overlay import format_share
from fastuper.data.panels import shown_names
from fastuper.data.parsing_labels import known_tasks
from fastuper.inference.parsing_report import ReportOptions, check_instances
from fastuper.inference.photos import MAPS, Found, ParsingOptions, PhotoParser
from fastuper.io.messages import name_of, one_line


@expand_dataclasses
def parse_photos(
    images: ImagesArgument,
    *,
    model: ModelOption,
    output: OutputOption,
    parsing: ParsingOptions,
    report: ReportOptions,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    batch_size: BatchSizeOption = PredictionOptions.batch_size,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    skip_existing: SkipExistingOption = False,
) -> None:
    """Find the scene, objects, parts, materials and textures of photos.

    For each photo NAME.jpg these files are written, each whole or not at all. NAME_parsing.jpg is one picture with a
    panel for each task and its legend. NAME_objects.png, NAME_parts.png, NAME_materials.png and NAME_textures.png have
    the photo's size; their pixel values are the class numbers, with colours as a palette, or 16-bit grey for more than
    256 classes. NAME_parsing.json lists the most probable scenes, and each object with its share of the photo, its
    box, its parts, and the materials and textures of object and parts. A second photo of the same name gets
    NAME-2_parsing.jpg.

    results.jsonl has a line for each photo: the photo, model and options that made its files. A photo keeps its files'
    names in later runs. Its results of earlier runs are replaced; those of other tasks are removed. A file that no line
    names is never overwritten. The results of `fastuper segment` in the same folder stay as they are.

    If a photo fails, the command continues with the next; the last lines list the failures with their reasons.

    Exit status: 0 all photos were parsed, 1 some failed, 2 nothing could start.
    """
    if report.instances:
        try:
            check_instances()
        except ImportError as error:
            leave(one_line(error))

    def load() -> _Parse:
        network, processor = load_parsing_model(model, device, dtype)
        known = tuple(network.config.tasks)
        try:
            tasks = known_tasks(parsing.task_names() or known, known)
        except ValueError as error:
            leave(f"--tasks {parsing.tasks}: {error} to the model {name_of(model)}")
        if "part" in tasks and "object" not in known:
            leave(
                "the parts of a pixel depend on its object, and the model knows no objects; give --tasks without part"
            )
        if report.instances and "object" not in tasks:
            leave(f"--instances are of objects; leave out --instances, or add object to the tasks {', '.join(tasks)}")
        for task in tasks:
            classes = len(network.config.labels[task])
            if task in MAPS and classes > 256:
                typer.echo(f"{classes} {MAPS[task]}: their label maps are 16-bit grey PNGs, without colours", err=True)
        return _Parse(PhotoParser(network, processor, model, tasks, parsing, report))

    run_on_photos(
        images, output, load, _Parse, batch_size=batch_size, max_pixels=max_pixels, skip_existing=skip_existing
    )


class _Parse(PhotoCommand):
    """Pictures, label maps and reports."""

    name = "parse"
    done = "parsed"

    def __init__(self, model: PhotoParser) -> None:
        sides = model.parsing.short_sides()
        options = {**asdict(model.parsing), **asdict(model.report), "tasks": list(model.tasks)}
        super().__init__(model, {**options, "scales": sides and list(sides), "min_share": model.report.smallest_object})
        self.labels = model.labels

    def report(self, found: Found) -> tuple[list[dict[str, Any]], str]:
        lines = []
        if found.scene is not None:
            index, probability = found.scene[0]
            name = class_name(shown_names("scene", self.labels["scene"]), index)
            lines.append(f"  scene: {name} {format_share(probability)}")
        shares: list[dict[str, Any]] = []
        for task, layer in list(found.layers.items())[:1]:  # the objects, unless they were not asked for
            classes = layer.shares()
            shares = classes if task == "object" else []
            lines.append(listed_shares(classes))
        return shares, "\n".join(lines)

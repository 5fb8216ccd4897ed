"""`fastuper parse PHOTO... --model FOLDER --output FOLDER`: scene, objects, parts, materials and textures of photos."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fastuper.cli.common import DeviceOption, DtypeOption, ModelOption, leave, load_parsing_model
from fastuper.cli.options import expand_dataclasses
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
from fastuper.data.classes import class_name
from fastuper.data.images import MAX_PIXELS
from fastuper.data.overlay import format_share, save_label_png
from fastuper.data.panels import parsing_picture, shown_names, task_palette
from fastuper.data.parsing_labels import TASKS, known_tasks
from fastuper.inference.parsing_report import ReportOptions, check_instances, parsing_report
from fastuper.io.bounds import WIDEST
from fastuper.io.messages import name_of, one_line
from fastuper.io.options import check_options, option
from fastuper_kernels.dispatch.files import atomic_path

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from fastuper.data.processor import UperNetImageProcessor
    from fastuper.models.outputs import Parsing
    from fastuper.models.parsing import UperNetForUnifiedPerceptualParsing

LONGEST_SIDE = 1000
"""The limit on a photo's longer side with --scales, in pixels, if the image processor sets none."""

_MAPS = {"object": "objects", "part": "parts", "material": "materials", "texture": "textures"}
"""The tasks with label maps: the field of `Parsing`, and the end of the file's name."""


@dataclass(frozen=True)
class ParsingOptions:
    """What a model computes of a photo."""

    tasks: str | None = option(
        None,
        f"What to find, of {', '.join(TASKS)}; the model computes nothing else.",
        default_text="all that the model knows",
        metavar="TASK,TASK,...",
    )
    scales: str | None = option(
        None,
        "Lengths of the photo's shorter side, such as 300,400,500,600; the probabilities of all are averaged. The "
        f"longer side has at most {LONGEST_SIDE} pixels, or as many as the image processor allows.",
        default_text="the processor's size",
        metavar="N,N,...",
    )
    top: int = option(5, "Number of scenes in the report.", at_least=1, metavar="N")
    mask_background: bool = option(
        False, "Never choose class 0, which means no object or no material and is not trained."
    )

    def __post_init__(self) -> None:
        check_options(self)
        self.task_names()
        self.short_sides()

    def task_names(self) -> tuple[str, ...] | None:
        """Return the tasks in their canonical order; None for all of the model."""
        if self.tasks is None:
            return None
        try:
            return known_tasks([name.strip() for name in self.tasks.split(",")], TASKS)
        except ValueError as error:
            raise ValueError(f"--tasks {self.tasks}: {error}") from None

    def short_sides(self) -> tuple[int, ...] | None:
        """Return the lengths of the photo's shorter side; None for the processor's own size."""
        if self.scales is None:
            return None
        try:
            sides = tuple(int(side) for side in self.scales.split(","))
        except ValueError:
            sides = (0,)
        if min(sides) < 1 or max(sides) > WIDEST:
            raise ValueError(
                f"--scales {self.scales}: give numbers of pixels from 1 to {WIDEST}, separated by commas, such as "
                "300,400,500,600"
            )
        return sides


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
            if task in _MAPS and classes > 256:
                typer.echo(f"{classes} {_MAPS[task]}: their label maps are 16-bit grey PNGs, without colours", err=True)
        return _Parse(network, processor, model, tasks, parsing, report)

    run_on_photos(
        images, output, load, _Parse, batch_size=batch_size, max_pixels=max_pixels, skip_existing=skip_existing
    )


class _Parse(PhotoCommand):
    """Pictures, label maps and reports."""

    name = "parse"
    done = "parsed"
    endings = ("_parsing.jpg", *(f"_{ending}.png" for ending in _MAPS.values()), "_parsing.json")

    def __init__(
        self,
        network: UperNetForUnifiedPerceptualParsing,
        processor: UperNetImageProcessor,
        model: str,
        tasks: tuple[str, ...],
        parsing: ParsingOptions,
        report: ReportOptions,
    ) -> None:
        sides = parsing.short_sides()
        options = {**asdict(parsing), **asdict(report), "tasks": list(tasks), "scales": sides and list(sides)}
        super().__init__(network, processor, {**options, "min_share": report.smallest_object})
        self.model = model
        self.tasks = tasks
        self.labels = network.config.labels
        self.parsing = parsing
        self.report = report
        left_out = {f"_{ending}.png" for task, ending in _MAPS.items() if task not in tasks}
        self.written = [ending for ending in self.endings if ending not in left_out]

    def prepare(self, photo: Image.Image) -> list[torch.Tensor]:
        sides = self.parsing.short_sides()
        longest = self.processor.size.get("longest_edge", LONGEST_SIDE)
        sizes = [{"shortest_edge": side, "longest_edge": longest} for side in sides] if sides else [None]
        return [self.processor(images=[photo], size=size, return_tensors="pt")["pixel_values"] for size in sizes]

    def predict(self, pixels: list[torch.Tensor], sizes: list[tuple[int, int]]) -> Sequence[Parsing]:
        return self.network.parse(
            pixels,
            target_sizes=sizes,
            tasks=self.tasks,
            mask_background=self.parsing.mask_background,
            top=self.parsing.top,
            dtype=None,
        )

    def write(
        self, job: Job, photo: Image.Image, result: Parsing, paths: Mapping[str, Path]
    ) -> tuple[list[dict[str, Any]], str]:
        maps = {task: getattr(result, field).cpu().numpy() for task, field in _MAPS.items() if task in self.tasks}
        report = {
            "photo": job.identity,
            "width": photo.width,
            "height": photo.height,
            "model": self.model,
            **parsing_report(result.scene, maps, self.labels, self.report),
        }
        for task, labels in maps.items():
            save_label_png(labels, task_palette(task, len(self.labels[task])), paths[f"_{_MAPS[task]}.png"])
        with atomic_path(paths["_parsing.jpg"]) as temporary:
            parsing_picture(photo, result.scene, maps, self.labels).save(temporary, format="JPEG", quality=90)
        with atomic_path(paths["_parsing.json"]) as temporary:
            Path(temporary).write_text(json.dumps(report, indent=1) + "\n", encoding="ascii")

        lines = []
        if result.scene is not None:
            index, probability = result.scene[0]
            name = class_name(shown_names("scene", self.labels["scene"]), index)
            lines.append(f"  scene: {name} {format_share(probability)}")
        shares: list[dict[str, Any]] = []
        if maps:  # the objects, unless they were not asked for
            task = next(iter(maps))
            classes, columns = shares_of(maps[task], shown_names(task, self.labels[task]))
            shares = classes if task == "object" else []
            lines.append(columns)
        return shares, "\n".join(lines)

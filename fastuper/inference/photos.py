"""What a model finds in a photo, and the files that say it: those of `fastuper segment` and `fastuper parse`.

torch is imported inside the functions that need it: the command line imports this file before it knows what to do.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from fastuper.data.classes import class_palette, classes_of
from fastuper.data.overlay import class_shares, overlay, save_label_png
from fastuper.data.panels import parsing_picture, shown_names, task_palette
from fastuper.data.parsing_labels import TASKS, known_tasks
from fastuper.inference.parsing_report import ReportOptions, parsing_report
from fastuper.io.bounds import WIDEST
from fastuper.io.options import check_options, option
from fastuper_kernels.dispatch.files import atomic_path

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from PIL import Image

    from fastuper.data.processor import UperNetImageProcessor
    from fastuper.models.outputs import Parsing
    from fastuper.models.parsing import UperNetForUnifiedPerceptualParsing
    from fastuper.models.upernet import UperNetForSemanticSegmentation

LONGEST_SIDE = 1000
"""The limit on a photo's longer side with --scales, in pixels, if the image processor sets none."""

MAPS = {"object": "objects", "part": "parts", "material": "materials", "texture": "textures"}
"""The tasks with label maps: the field of `Parsing`, and the end of the file's name."""


class Layer(NamedTuple):
    """A label map, and what its numbers mean.

    Attributes:
        labels: (H, W) integers in [0, N), of the photo's size.
        names: the names of the N classes.
        palette: a colour for each class, (N, 3) uint8.
    """

    labels: NDArray[np.integer]
    names: Mapping[int, str]
    palette: NDArray[np.uint8]

    def shares(self) -> list[dict[str, Any]]:
        """Return the classes that occur, largest first: class number, name, and share of the pixels."""
        shares = class_shares(self.labels, len(self.palette))
        present = [int(index) for index in np.argsort(-shares, kind="stable") if shares[index] > 0]
        return [{"class": index, "name": self.names[index], "share": float(shares[index])} for index in present]


class Found(NamedTuple):
    """What a model found in a photo.

    Attributes:
        layers: the label maps: "class" of a model for semantic segmentation; of a parsing model one for each task.
        scene: the most probable scenes as (number, probability), best first; None if the model names no scene.
    """

    layers: Mapping[str, Layer]
    scene: Sequence[tuple[int, float]] | None = None


class PhotoModel(ABC):
    """A model that runs on photos.

    Args:
        network: the model.
        processor: its image processor.

    Attributes:
        endings: the ends of the names of all files that can be written for a photo.
        written: the endings of the files that this model writes.
    """

    endings: ClassVar[tuple[str, ...]]
    written: Sequence[str]

    def __init__(self, network: Any, processor: UperNetImageProcessor) -> None:
        self.network = network
        self.processor = processor
        self.written = self.endings

    @abstractmethod
    def prepare(self, photo: Image.Image) -> list[torch.Tensor]:
        """Return the photo as the model reads it, (1, C, height, width), at each scale."""

    @abstractmethod
    def predict(self, pixels: list[torch.Tensor], sizes: list[tuple[int, int]]) -> Sequence[Found]:
        """Run the model on photos of equal shapes, (B, C, height, width) a scale.

        Args:
            pixels: what `prepare` returns, on the model's device and in its dtype.
            sizes: (height, width) of each photo.
        """

    @abstractmethod
    def write(self, source: str, photo: Image.Image, found: Found, paths: Mapping[str, Path]) -> None:
        """Write the files of a photo, each whole or not at all.

        Args:
            source: the photo's path or name.
            photo: its pixels.
            found: its result of `predict`.
            paths: the file for each ending in `written`.
        """

    def find(self, photo: Image.Image) -> Found:
        """Run the model on one photo."""
        pixels = [scale.to(self.network.device, self.network.dtype) for scale in self.prepare(photo)]
        (found,) = self.predict(pixels, [(photo.height, photo.width)])
        return found


class PhotoSegmenter(PhotoModel):
    """A model for semantic segmentation: label maps and overlays."""

    endings = ("_labels.png", "_overlay.jpg")

    def __init__(self, network: UperNetForSemanticSegmentation, processor: UperNetImageProcessor) -> None:
        super().__init__(network, processor)
        self.id2label = classes_of(network.config)
        self.palette = class_palette(self.id2label, getattr(network.config, "palette", None))

    def prepare(self, photo: Image.Image) -> list[torch.Tensor]:
        """Return the photo as the model reads it, (1, C, height, width)."""
        return [self.processor(images=[photo], return_tensors="pt")["pixel_values"]]

    def predict(self, pixels: list[torch.Tensor], sizes: list[tuple[int, int]]) -> Sequence[Found]:
        """Return the label map of each photo, of one or two bytes a pixel."""
        maps = self.network.segment(pixels[0], target_sizes=sizes, dtype=None)
        return [Found({"class": Layer(labels.cpu().numpy(), self.id2label, self.palette)}) for labels in maps]

    def write(self, source: str, photo: Image.Image, found: Found, paths: Mapping[str, Path]) -> None:
        """Write the label map and the overlay."""
        labels = found.layers["class"].labels
        save_label_png(labels, self.palette, paths["_labels.png"])
        with atomic_path(paths["_overlay.jpg"]) as temporary:
            overlay(photo, labels, self.id2label, self.palette).save(temporary, format="JPEG", quality=90)


@dataclass(frozen=True)
class ParsingOptions:
    """What a parsing model computes of a photo."""

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


class PhotoParser(PhotoModel):
    """A model for Unified Perceptual Parsing: pictures, label maps and reports.

    Args:
        network: the model.
        processor: its image processor.
        model: the model's name, for the report.
        tasks: what to find, in the canonical order; all that the model knows if None.
        parsing: how to find it; the defaults if None.
        report: what the report lists; the defaults if None.
    """

    endings = ("_parsing.jpg", *(f"_{ending}.png" for ending in MAPS.values()), "_parsing.json")

    def __init__(
        self,
        network: UperNetForUnifiedPerceptualParsing,
        processor: UperNetImageProcessor,
        model: str,
        tasks: Sequence[str] | None = None,
        parsing: ParsingOptions | None = None,
        report: ReportOptions | None = None,
    ) -> None:
        super().__init__(network, processor)
        self.model = model
        self.tasks = tuple(network.config.tasks if tasks is None else tasks)
        self.labels = network.config.labels
        self.parsing = parsing or ParsingOptions()
        self.report = report or ReportOptions()
        left_out = {f"_{ending}.png" for task, ending in MAPS.items() if task not in self.tasks}
        self.written = [ending for ending in self.endings if ending not in left_out]

    def prepare(self, photo: Image.Image) -> list[torch.Tensor]:
        """Return the photo as the model reads it, (1, C, height, width), at each scale."""
        sides = self.parsing.short_sides()
        longest = self.processor.size.get("longest_edge", LONGEST_SIDE)
        sizes = [{"shortest_edge": side, "longest_edge": longest} for side in sides] if sides else [None]
        return [self.processor(images=[photo], size=size, return_tensors="pt")["pixel_values"] for size in sizes]

    def predict(self, pixels: list[torch.Tensor], sizes: list[tuple[int, int]]) -> Sequence[Found]:
        """Return the scenes and the label maps of each photo, of one or two bytes a pixel."""
        parsed = self.network.parse(
            pixels,
            target_sizes=sizes,
            tasks=self.tasks,
            mask_background=self.parsing.mask_background,
            top=self.parsing.top,
            dtype=None,
        )
        return [
            Found({task: self._layer(task, each) for task in MAPS if task in self.tasks}, each.scene) for each in parsed
        ]

    def _layer(self, task: str, parsed: Parsing) -> Layer:
        labels = getattr(parsed, MAPS[task]).cpu().numpy()
        names = self.labels[task]
        return Layer(labels, shown_names(task, names), task_palette(task, len(names)))

    def write(self, source: str, photo: Image.Image, found: Found, paths: Mapping[str, Path]) -> None:
        """Write the label maps, the picture of all tasks, and the report."""
        maps = {task: layer.labels for task, layer in found.layers.items()}
        report = {
            "photo": source,
            "width": photo.width,
            "height": photo.height,
            "model": self.model,
            **parsing_report(found.scene, maps, self.labels, self.report),
        }
        for task, layer in found.layers.items():
            save_label_png(layer.labels, layer.palette, paths[f"_{MAPS[task]}.png"])
        with atomic_path(paths["_parsing.jpg"]) as temporary:
            parsing_picture(photo, found.scene, maps, self.labels).save(temporary, format="JPEG", quality=90)
        with atomic_path(paths["_parsing.json"]) as temporary:
            Path(temporary).write_text(json.dumps(report, indent=1) + "\n", encoding="ascii")

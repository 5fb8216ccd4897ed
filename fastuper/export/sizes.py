"""The sizes of an export: the one at which a graph is traced, and the eight at which the exported model is checked.

A tracer takes a size that it sees as 1 for a constant, and sizes that are equal for one size. So the traced batch is 2,
height and width differ, and the coarsest map has two windows or more in both directions. No checked size is the traced
size. Among them are an image of a single position on the coarsest map, odd sides, sides that whole windows fill, and
coarsest maps whose sides neither 2, 3 nor 6 divides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from fastuper.evaluation.loop import classes_of
from fastuper.export.graph import Graph
from fastuper.export.settings import ExportError
from fastuper.io.messages import one_line
from fastuper.models.backbones.foreign.measuring import FAULTS
from fastuper.models.backbones.layers import pair
from fastuper.models.parsing import UperNetForUnifiedPerceptualParsing

COARSEST = 32
"""The side of a position of the coarsest map in pixels."""

TRIED = (16, 32, 64, 128, 256, 512)
"""The sides of a square image, in pixels, of which the smallest that the model takes is checked."""

LARGEST_BATCH = 2**21
"""The most pixels of a batch of images of one size, if they are more than one."""

LARGEST_UNIT = 768
"""The largest side of a window on the coarsest map, in pixels: Swin V2's windows of 24 positions."""


@dataclass(frozen=True)
class Case:
    """The sizes of one input.

    Attributes:
        batch: the number of images.
        height: of the images, in pixels.
        width: of the images, in pixels.
        target_size: (height, width) of the label maps, where it is an input.
        seed: of the images' values.
    """

    batch: int
    height: int
    width: int
    target_size: tuple[int, int] | None = None
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.batch} x {self.height} x {self.width}"


def traced_case(graph: Graph) -> Case:
    """Return the sizes at which a graph is traced."""
    settings = graph.settings
    if settings.image_size is not None:
        case = Case(1 if settings.format == "executorch" else 2, *settings.image_size)
    else:
        unit = _window(graph)
        case = Case(2, unit + 33, unit + 97)
    return _with_target(case, graph)


def checked_cases(graph: Graph) -> list[Case]:
    """Return the eight sizes at which an exported graph is checked."""
    settings, traced = graph.settings, traced_case(graph)
    if settings.image_size is not None:
        batches = (1,) * 8 if settings.format == "executorch" else (1, 2, 3, 1, 2, 3, 1, 2)
        most = max(1, LARGEST_BATCH // (traced.height * traced.width))
        cases = [replace(traced, batch=min(batch, most), seed=seed) for seed, batch in enumerate(batches, 1)]
    else:
        unit, least = _window(graph), _least(graph)
        wanted = (
            (1, least, least),
            (3, least + 21, least + 7),
            (2, 65, 97),
            (1, 97, 131),
            (3, 131, 197),
            (1, 323, 131),
            (2, unit, unit),
            (1, max(419, unit + 195), max(577, unit + 353)),
        )
        cases = [Case(batch, max(h, least), max(w, least), seed=seed) for seed, (batch, h, w) in enumerate(wanted, 1)]
    return [_with_target(case, graph) for case in cases]


def arrays_of(case: Case, graph: Graph) -> dict[str, np.ndarray]:
    """Return the inputs of a graph by their names: random images, coarse and fine, so that labels differ."""
    channels = 3 if graph.settings.with_preprocessing else channels_of(graph.model)
    images = _drawn(case, channels)
    if graph.settings.with_preprocessing:
        levels = (images * 50 + 127).clip(0, 255).astype(np.uint8)
        arrays = {"images": np.ascontiguousarray(levels.transpose(0, 2, 3, 1))}
    else:
        arrays = {"pixel_values": images}
    if case.target_size is not None:
        arrays["target_size"] = np.array(case.target_size, dtype=np.int64)
    return arrays


def example_inputs(graph: Graph) -> tuple[torch.Tensor, ...]:
    """Return the inputs with which a graph is traced, in the order of `graph.input_names`."""
    arrays = arrays_of(traced_case(graph), graph)
    return tuple(torch.from_numpy(arrays[name]) for name in graph.input_names)


def channels_of(model: nn.Module) -> int:
    """Return the channels of a model's images."""
    config: Any = getattr(model, "config", None)
    return int(getattr(getattr(config, "backbone_config", None), "num_channels", 3))


def output_of(name: str, graph: Graph) -> dict[str, Any]:
    """Return the dtype of an output of a graph, and the number of its classes."""
    config: Any = graph.model.config
    if isinstance(graph.model, UperNetForUnifiedPerceptualParsing):
        classes, is_map = len(config.labels[name]), graph.settings.labels and name != "scene"
    else:
        classes, is_map = len(classes_of(config)), graph.settings.labels
    return {"dtype": "float32" if not is_map else "uint8" if classes <= 256 else "int32", "classes": classes}


def check_size(graph: Graph) -> None:
    """Check that a model takes the size of its export.

    Raises:
        ExportError: it takes images of one size, and the export is for any; or it refuses the size.
    """
    settings = graph.settings
    if settings.with_preprocessing:
        return
    if settings.image_size is None:
        sizes: Any = graph.model.image_sizes
        if sizes.largest is not None:
            height, width = sizes.largest
            raise ExportError(
                f"{sizes.name} takes images of at most {height} x {width} pixels, and size=any is every size; give "
                f"size={height}x{width}"
            )
        _least(graph)
    elif (fault := _fault(graph.model, *settings.image_size)) is not None:
        raise ExportError(f"size={settings.size}: the model takes no images of this size: {one_line(fault)}")


def _drawn(case: Case, channels: int) -> np.ndarray:
    """Return noise (B, C, H, W), float32, of standard deviation 1: half of it fine, half in squares of 16 pixels."""
    generator = np.random.Generator(np.random.PCG64(case.seed))
    shape = (case.batch, channels, case.height, case.width)
    fine = generator.standard_normal(shape, dtype=np.float32)
    squares = generator.standard_normal((*shape[:2], -(-case.height // 16), -(-case.width // 16)), dtype=np.float32)
    coarse = squares.repeat(16, axis=2).repeat(16, axis=3)[:, :, : case.height, : case.width]
    return (fine + coarse) * np.float32(0.5**0.5)


def _with_target(case: Case, graph: Graph) -> Case:
    """Return a case with the size of the label maps, where that is an input: larger or smaller than the images."""
    if not graph.settings.target_size:
        return case
    height, width = (2 * case.height + 5, case.width + 13) if case.seed % 2 else (case.height // 2 + 9, case.width + 3)
    return replace(case, target_size=(height, width))


def _window(graph: Graph) -> int:
    """Return the side of a window on the coarsest map in pixels; of four positions for a network without windows."""
    windows = [
        side
        for part in graph.model.modules()
        if isinstance(window := getattr(part, "window_size", None), int | tuple | list) and window
        for side in pair(window)
        if isinstance(side, int)
    ]
    return min(COARSEST * max([4, *windows]), LARGEST_UNIT)


def _least(graph: Graph) -> int:
    """Return the smallest side of an image that a model takes, of `TRIED`.

    Raises:
        ExportError: the model takes none of them.
    """
    if graph.settings.with_preprocessing:
        return TRIED[0]
    for side in TRIED:
        if _fault(graph.model, side, side) is None:
            return side
    raise ExportError(
        f"size=any: the model takes no images of {TRIED[0]} x {TRIED[0]} to {TRIED[-1]} x {TRIED[-1]} pixels "
        f"({one_line(str(_fault(graph.model, TRIED[-1], TRIED[-1])))}); give the size that it takes, size=HEIGHTxWIDTH"
    )


@torch.no_grad()
def _fault(model: Any, height: int, width: int) -> Exception | None:
    """Return the error with which a model refuses an image of a size; None if it takes the image."""
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    try:
        model(torch.zeros(1, channels_of(model), height, width, dtype=dtype))
    except FAULTS as error:
        return error
    return None

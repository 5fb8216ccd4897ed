"""A program of torch.export, model.pt2; `torch.export.load(...).module()` runs it, with torch alone."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.export import Dim

from fastuper.export.settings import ExportError, ExportSettings
from fastuper.export.sizes import checked_cases, example_inputs
from fastuper.io.messages import reason

if TYPE_CHECKING:
    from fastuper.export.formats import Arrays, Runner
    from fastuper.export.graph import Graph

EXTRA: str | None = None
PACKAGES: tuple[str, ...] = ("torch",)
RUNTIME = "torch"
MODEL_FILES: tuple[str, ...] = ("model.pt2",)

METADATA = "metadata.json"
"""The file inside model.pt2 that holds the metadata."""


def write(graph: Graph, settings: ExportSettings, folder: Path, metadata: Mapping[str, str]) -> None:
    """Write model.pt2; see `ExportFormat`."""
    program = program_of(graph, settings)
    extra = {METADATA: json.dumps(with_names(metadata, graph))}
    file = io.BytesIO()  # on a full disk PyTorch's own file ends the process
    torch.export.save(program, file, extra_files=extra)
    (folder / MODEL_FILES[0]).write_bytes(file.getbuffer())


def load(folder: Path, settings: ExportSettings) -> Runner:
    """Return the program as a function of arrays; see `ExportFormat`."""
    extra: dict[str, Any] = {METADATA: ""}
    program = torch.export.load(folder / MODEL_FILES[0], extra_files=extra)
    return runner(program.module(), json.loads(extra[METADATA]))


def versions() -> dict[str, str]:
    """Return PyTorch's version."""
    return {"torch": torch.__version__}


def program_of(graph: Graph, settings: ExportSettings) -> torch.export.ExportedProgram:
    """Return the program of a graph, for inputs of all sizes or of one.

    Raises:
        ExportError: torch.export refuses the model, or fixes a size that must be free.
    """
    inputs = example_inputs(graph)
    shapes = [_free_dimensions(graph, settings), *[None for _ in inputs[1:]]]
    try:
        with torch.no_grad():
            return torch.export.export(graph, inputs, dynamic_shapes=tuple(shapes), strict=False)
    except Exception as error:
        raise ExportError(f"torch.export refuses the model: {reason(error)}") from error


def _free_dimensions(graph: Graph, settings: ExportSettings) -> dict[int, Dim]:
    """Return the free dimensions of the images with their ranges; an export fails if the model fixes one."""
    if settings.format == "executorch":
        return {}
    batch = {0: Dim("batch", min=1)}
    if settings.image_size is not None:
        return batch
    first = 1 if settings.with_preprocessing else 2
    # The range begins where the proof does: what a small image needs, such as padding, is then left out elsewhere.
    least = min(min(case.height, case.width) for case in checked_cases(graph))
    return {**batch, first: Dim("height", min=least), first + 1: Dim("width", min=least)}


def with_names(metadata: Mapping[str, str], graph: Graph) -> dict[str, str]:
    """Return metadata with the names of a graph's inputs and outputs, which a program does not keep."""
    names = {"inputs": graph.input_names, "outputs": graph.output_names}
    return {**metadata, **{key: json.dumps(value) for key, value in names.items()}}


def runner(call: Callable[..., Any], metadata: Mapping[str, str]) -> Runner:
    """Return a function of arrays for a function of tensors.

    Args:
        call: takes the inputs in the order of their names, and returns the outputs in theirs.
        metadata: of `with_names`.
    """
    inputs, outputs = json.loads(metadata["inputs"]), json.loads(metadata["outputs"])

    def run(arrays: Arrays) -> dict[str, np.ndarray]:
        with torch.no_grad():
            results = call(*(torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in inputs))
        results = results if isinstance(results, list | tuple) else (results,)
        return {name: result.numpy() for name, result in zip(outputs, results, strict=True)}

    return run

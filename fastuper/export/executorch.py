"""ExecuTorch, model.pte: a program for images of one size, batch 1, because it plans all memory when it is written.

XNNPACK computes what it knows, ExecuTorch's portable operators the rest.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastuper.export.settings import ExportError, ExportSettings
from fastuper.export.torch_program import program_of, runner, with_names
from fastuper.io.messages import reason

if TYPE_CHECKING:
    from fastuper.export.formats import Runner
    from fastuper.export.graph import Graph

EXTRA: str | None = "executorch"
PACKAGES: tuple[str, ...] = ("executorch",)
RUNTIME = "executorch"
MODEL_FILES: tuple[str, ...] = ("model.pte",)


def write(graph: Graph, settings: ExportSettings, folder: Path, metadata: Mapping[str, str]) -> None:
    """Write model.pte; see `ExportFormat`. The metadata are methods that return them."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = program_of(graph, settings)
    try:
        edge = to_edge_transform_and_lower(
            program, partitioner=[XnnpackPartitioner()], constant_methods=with_names(metadata, graph)
        )
        made = edge.to_executorch()
    except Exception as error:
        raise ExportError(f"ExecuTorch has no form of the model: {reason(error)}") from error
    made.save(str(folder / MODEL_FILES[0]))


def load(folder: Path, settings: ExportSettings) -> Runner:
    """Return the program as a function of arrays; see `ExportFormat`."""
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(folder / MODEL_FILES[0])
    method = program.load_method("forward")
    names = {name: program.load_method(name).execute([])[0] for name in ("inputs", "outputs")}
    return runner(lambda *inputs: method.execute(inputs), names)


def versions() -> dict[str, str]:
    """Return the versions of PyTorch and ExecuTorch."""
    return {"torch": torch.__version__, "executorch": importlib.metadata.version("executorch")}

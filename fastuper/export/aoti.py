"""A package of AOTInductor, model.pt2: compiled code, which `torch._inductor.aoti_load_package` runs.

The code is made for this kind of processor and for this version of PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastuper.export.settings import ExportError, ExportSettings
from fastuper.export.torch_program import program_of, runner, versions, with_names
from fastuper.io.messages import reason
from fastuper_kernels.dispatch.torch_private import aoti_compile, aoti_load, has_cpp_compiler

if TYPE_CHECKING:
    from fastuper.export.formats import Runner
    from fastuper.export.graph import Graph

__all__ = ["EXTRA", "MODEL_FILES", "PACKAGES", "RUNTIME", "load", "versions", "write"]

EXTRA: str | None = None
PACKAGES: tuple[str, ...] = ("torch",)
RUNTIME = "torch"
MODEL_FILES: tuple[str, ...] = ("model.pt2",)


def write(graph: Graph, settings: ExportSettings, folder: Path, metadata: Mapping[str, str]) -> None:
    """Write model.pt2; see `ExportFormat`."""
    check_compiler()
    program = program_of(graph, settings)
    configs: dict[str, Any] = {"aot_inductor.metadata": with_names(metadata, graph)}
    try:
        with torch.no_grad():
            package = aoti_compile(program, configs)
    except Exception as error:
        raise ExportError(f"AOTInductor cannot compile the model: {reason(error)}") from error
    (folder / MODEL_FILES[0]).write_bytes(package)


def load(folder: Path, settings: ExportSettings) -> Runner:
    """Return the compiled model as a function of arrays; see `ExportFormat`."""
    model = aoti_load(str(folder / MODEL_FILES[0]))
    return runner(model, model.get_metadata())


def check_compiler() -> None:
    """Check that Inductor finds a C++ compiler.

    Raises:
        ExportError: it finds none.
    """
    if not has_cpp_compiler():
        raise ExportError(
            "format aoti compiles C++, and no compiler works: install one, such as Debian's package g++, or name it "
            "in the environment variable CXX"
        )

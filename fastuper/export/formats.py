"""The formats: what a file of this folder must have to be one, and the list of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, TypeAlias, cast

import numpy as np
import torch

from fastuper.export.graph import Graph
from fastuper.export.settings import ExportSettings

Arrays: TypeAlias = Mapping[str, np.ndarray]
Runner: TypeAlias = Callable[[Arrays], dict[str, np.ndarray]]
"""From inputs to outputs, by their names in `Graph`."""

FILES = {
    "onnx": "fastuper.export.onnx",
    "openvino": "fastuper.export.openvino",
    "torch": "fastuper.export.torch_program",
    "aoti": "fastuper.export.aoti",
    "executorch": "fastuper.export.executorch",
}


class ExportFormat(Protocol):
    """A format: the module of a file in FILES has these names."""

    EXTRA: str | None
    """The extra of fastuper that installs the runtime, such as "onnx"; None if torch is enough."""
    PACKAGES: tuple[str, ...]
    """The packages that writing needs, as they are imported."""
    RUNTIME: str
    """The package that runs the exported model."""
    MODEL_FILES: tuple[str, ...]
    """The files of the exported model, the main one first."""

    def write(self, graph: Graph, settings: ExportSettings, folder: Path, metadata: Mapping[str, str]) -> None:
        """Write the model's files to an existing folder.

        Args:
            graph: the module to export.
            settings: its settings.
            folder: an empty folder.
            metadata: names and values to store inside the model's file, where the format has a place for them.

        Raises:
            ExportError: the model or a setting has no form in this format.
        """

    def load(self, folder: Path, settings: ExportSettings) -> Runner:
        """Return the exported model in its runtime, on the CPU, with float32 arithmetic unless the dtype is another."""

    def versions(self) -> dict[str, str]:
        """Return the versions of the packages and of the format, for export.json."""


def runtime_dtype(settings: ExportSettings) -> torch.dtype:
    """Return the dtype in which the runtime computes most, see `dispatch.modes.writing_for`."""
    dtype: torch.dtype = torch.int8 if settings.int8 is not None else getattr(torch, settings.dtype)
    return dtype


def format_of(name: str) -> ExportFormat:
    """Return a format by its name in FILES."""
    return cast(ExportFormat, importlib.import_module(FILES[name]))

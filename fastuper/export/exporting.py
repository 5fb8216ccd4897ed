"""`export_model` writes a model for another runtime: traced, run there at eight sizes, then put in its place."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastuper.evaluation.loop import classes_of
from fastuper.export.folder import metadata_of, write_beside
from fastuper.export.formats import ExportFormat, format_of
from fastuper.export.graph import Graph
from fastuper.export.int8 import Photos, quantize
from fastuper.export.preparing import Prepared, prepare
from fastuper.export.proof import prove
from fastuper.export.settings import QUANTISED, ExportError, ExportSettings
from fastuper.export.sizes import arrays_of, check_size, checked_cases
from fastuper.io.files import atomic_folder, new_folder
from fastuper.io.messages import one_line
from fastuper.io.silence import silent
from fastuper.models.parsing import UperNetForUnifiedPerceptualParsing

Result = TypeVar("Result")


def export_model(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    format: str = "onnx",
    processor: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """Write a model for another runtime, after it has given the model's results there.

    The folder has the model's files, export.json, preprocessor_config.json and run.py, which segments a photo. It is
    written whole or not at all.

    Args:
        model: a model of fastuper, Transformers' UperNetForSemanticSegmentation, a folder, a Hub id, or a checkpoint of
            another library. The model does not change. Its copy is exported in evaluation mode.
        folder: a new or empty folder.
        format: "onnx", "openvino", "torch", "aoti" or "executorch".
        processor: the image processor; if None, the one of the checkpoint.
        **options: the other fields of `ExportSettings`.

    Returns:
        The content of export.json.

    Raises:
        ExportError: the model cannot be exported so, a package is missing, or the folder is not new.
        ProofError: the exported model does not run in its runtime, or gives other results. Nothing was written.
        OSError: the folder cannot be written.
        TypeError, ValueError: an option is unknown or not valid.
    """
    settings = ExportSettings(format=format, **options)  # type: ignore[arg-type]
    try:
        target = new_folder(folder)
    except ValueError as error:
        raise ExportError(str(error)) from None
    exporter = format_of(settings.format)
    _check_packages(exporter, settings)
    with silent(), torch.no_grad():
        prepared = prepare(model, processor)
        own = copy.deepcopy(prepared.model).to(getattr(torch, settings.dtype))
        graph = Graph(own, settings, prepared.processor).eval()
        check_size(graph)
        photos = None if settings.int8 is None else _photos(settings, prepared)
        with _written(target) as temporary:
            metadata = metadata_of(prepared)
            step = partial(_step, exporter, settings, temporary)
            step("written", lambda: exporter.write(graph, settings, temporary, metadata))
            checked = int8 = None
            if settings.check:
                runner = step("loaded", lambda: exporter.load(temporary, settings))
                checked = prove(runner, graph, prepared.model)
                if photos is not None:
                    others = [arrays_of(case, graph) for case in checked_cases(graph)]
                    int8 = step("quantised", partial(quantize, settings, temporary, photos, runner, others))
            return write_beside(temporary, prepared, graph, exporter, checked, int8)


def _photos(settings: ExportSettings, prepared: Prepared) -> Photos:
    """Return the photos that calibrate and judge int8."""
    assert settings.int8 is not None
    parses = isinstance(prepared.model, UperNetForUnifiedPerceptualParsing)
    names = None if parses else classes_of(prepared.model.config)
    return Photos(Path(settings.int8), settings, prepared.processor, names)


@contextlib.contextmanager
def _written(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` at the end of the block; a block that fails leaves nothing."""
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(target) as temporary:
            yield temporary
            if target.exists():
                target.rmdir()
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def _check_packages(exporter: ExportFormat, settings: ExportSettings) -> None:
    """Check that the packages are installed which an export needs.

    Raises:
        ExportError: one is not; the message names the extra.
    """
    needed = [*exporter.PACKAGES, *([exporter.RUNTIME] if settings.check else [])]
    if settings.int8 is not None:
        needed.append(QUANTISED[settings.format])
    for package in needed:
        if importlib.util.find_spec(package) is None:
            unproven = package == exporter.RUNTIME and package not in exporter.PACKAGES and settings.int8 is None
            raise ExportError(
                f"format={settings.format} needs {package}, which is not installed: {_install(exporter)}"
                + (", or give no-check to write the model unproven" if unproven else "")
            )


def _install(exporter: ExportFormat) -> str:
    return f"install fastuper[{exporter.EXTRA}]" if exporter.EXTRA else "install it"


def _step(
    exporter: ExportFormat, settings: ExportSettings, folder: Path, done: str, step: Callable[[], Result]
) -> Result:
    """Return the result of an exporter's step in a folder; a library's error becomes one line.

    Raises:
        ExportError: the step failed.
        OSError: a file cannot be written.
    """
    try:
        return step()
    except (OSError, MemoryError):
        raise
    except ExportError:
        _check_space(folder)
        raise
    except ImportError as error:
        raise ExportError(f"format={settings.format}: {one_line(error)}: {_install(exporter)}") from None
    except Exception as error:  # the classes of several libraries
        _check_space(folder)
        raise ExportError(
            f"format={settings.format}: the model cannot be {done} in this format ({type(error).__name__}: "
            f"{one_line(error)}); give another format, or size=HEIGHTxWIDTH"
        ) from error


def _check_space(folder: Path) -> None:
    """Write a file that is deleted at once: libraries in C++ do not say that the disk is full.

    Raises:
        OSError: the disk is full.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(2**20))

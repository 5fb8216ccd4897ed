"""`export_model` writes a model for another runtime: traced, run there at eight sizes, then put in its place."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import os
import warnings
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
from fastuper.export.settings import ExportError, ExportSettings
from fastuper.export.sizes import arrays_of, check_size, checked_cases
from fastuper.io.files import atomic_folder
from fastuper.io.messages import name_of, one_line
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
    target = _new_folder(folder)
    exporter = format_of(settings.format)
    if settings.check:
        _check_packages(exporter, settings)
    prepared = prepare(model, processor)
    with _quiet(), torch.no_grad():
        own = copy.deepcopy(prepared.model).to(getattr(torch, settings.dtype))
        graph = Graph(own, settings, prepared.processor).eval()
        check_size(graph)
        photos = None if settings.int8 is None else _photos(settings, prepared)
        with _written(target) as temporary:
            metadata = metadata_of(prepared)
            _run("written", exporter, settings, lambda: exporter.write(graph, settings, temporary, metadata))
            checked = int8 = None
            if settings.check:
                runner = _run("loaded", exporter, settings, lambda: exporter.load(temporary, settings))
                checked = prove(runner, graph, prepared.model)
                if photos is not None:
                    others = [arrays_of(case, graph) for case in checked_cases(graph)]
                    step = partial(quantize, settings, temporary, photos, runner, others)
                    int8 = _run("quantised", exporter, settings, step)
            return write_beside(temporary, prepared, graph, exporter, checked, int8)


def _photos(settings: ExportSettings, prepared: Prepared) -> Photos:
    """Return the photos that calibrate and judge int8."""
    assert settings.int8 is not None
    parses = isinstance(prepared.model, UperNetForUnifiedPerceptualParsing)
    names = None if parses else classes_of(prepared.model.config)
    return Photos(Path(settings.int8), settings, prepared.processor, names)


def _new_folder(folder: str | os.PathLike[str]) -> Path:
    """Return the place of a folder that is new or empty.

    Raises:
        ExportError: it is not.
    """
    target = Path(os.path.realpath(folder))
    try:
        if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
            fault = "is not empty" if target.is_dir() else "is a file"
            raise ExportError(f"{name_of(folder)} {fault}; give a new folder")
    except OSError as error:
        raise ExportError(
            f"cannot use the output folder {name_of(folder)}: {one_line(error.strerror or error)}"
        ) from None
    return target


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
    """Check that the packages of a format are installed.

    Raises:
        ExportError: one is not; the message names the extra.
    """
    for package in exporter.PACKAGES:
        if importlib.util.find_spec(package.partition(".")[0]) is None:
            raise ExportError(
                f"format={settings.format} needs {package}, which is not installed: {_install(exporter)}, or give "
                "no-check to write the model unproven"
            )


def _install(exporter: ExportFormat) -> str:
    return f"install fastuper[{exporter.EXTRA}]" if exporter.EXTRA else "install it"


def _run(done: str, exporter: ExportFormat, settings: ExportSettings, step: Callable[[], Result]) -> Result:
    """Return the result of an exporter's step; a library's error becomes one line.

    Raises:
        ExportError: the step failed.
        OSError: a file cannot be written.
    """
    try:
        return step()
    except (ExportError, OSError, MemoryError):
        raise
    except ImportError as error:
        raise ExportError(f"format={settings.format}: {one_line(error)}: {_install(exporter)}") from None
    except Exception as error:  # the classes of several libraries
        raise ExportError(
            f"format={settings.format}: the model cannot be {done} in this format ({type(error).__name__}: "
            f"{one_line(error)}); give another format, or size=HEIGHTxWIDTH"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within this context libraries warn, log and print nothing."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)

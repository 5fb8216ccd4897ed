"""Shared parts of the commands: options, device, loading a model, columns of text, and one-line errors."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from fastuper.io.messages import about

if TYPE_CHECKING:
    from fastuper.data.processor import UperNetImageProcessor
    from fastuper.models.parsing import UperNetForUnifiedPerceptualParsing
    from fastuper.models.upernet import UperNetForSemanticSegmentation

# torch, and modules that import it, are imported inside functions, so that `--help` answers at once.

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
LayoutName = Literal["auto", "ade20k", "cityscapes", "folders"]
"""The values of `fastuper.data.folders.Layout`, whose file imports torch."""


def not_empty(text: str) -> str:
    """Return the value of an option; an empty one, as of a variable that is unset, ends the command with status 2."""
    if not text:
        raise typer.BadParameter("it is empty; is a variable unset?")
    return text


def folder(text: str) -> Path:
    """Return the folder that an option names; `Path("")` would be the current folder."""
    return Path(not_empty(text))


_model_option = partial(
    typer.Option,
    "--model",
    "-m",
    parser=not_empty,
    metavar="FOLDER|HUB_ID",
    help="Checkpoint: a folder, or the id of a Hub repository; or a file of another library (see `fastuper convert`).",
)
ModelOption = Annotated[str, _model_option()]
OptionalModelOption = Annotated[
    str | None,
    _model_option(show_default="the demo model of the package, which only knows generated street scenes"),
]
DeviceOption = Annotated[
    str, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, mps or auto; auto uses a GPU if there is one.")
]
DtypeOption = Annotated[
    Dtype, typer.Option(help="Floating-point type to compute in; auto uses the type of the stored weights.")
]
LayoutOption = Annotated[
    LayoutName, typer.Option(help="Layout of the dataset's folder; auto finds it by the names of the subfolders.")
]


def load_model(
    model: str | None, device: str, dtype: Dtype
) -> tuple[UperNetForSemanticSegmentation, UperNetImageProcessor]:
    """Load a checkpoint for semantic segmentation, in evaluation mode, and its image processor.

    Without `model` the demo model of the package is loaded, and a line on stderr says so. If loading fails, the
    command ends with status 2.
    """
    from fastuper.models.upernet import UperNetForSemanticSegmentation

    if model is None:
        typer.echo(
            "no --model: using the demo model, which only knows generated street scenes; for photos, give --model a "
            "checkpoint, such as openmmlab/upernet-convnext-tiny",
            err=True,
        )
    return _load(UperNetForSemanticSegmentation, model, device, dtype)


def load_parsing_model(
    model: str, device: str, dtype: Dtype
) -> tuple[UperNetForUnifiedPerceptualParsing, UperNetImageProcessor]:
    """Load a checkpoint for Unified Perceptual Parsing, in evaluation mode, and its image processor.

    If loading fails, the command ends with status 2.
    """
    from fastuper.models.parsing import UperNetForUnifiedPerceptualParsing

    return _load(UperNetForUnifiedPerceptualParsing, model, device, dtype)


def _load(network_class: Any, model: str | None, device: str, dtype: Dtype) -> tuple[Any, UperNetImageProcessor]:
    from fastuper.inference.loading import LoadError, choose_device, load

    try:
        return load(network_class, model, choose_device(device), dtype, lambda line: typer.echo(line, err=True))
    except LoadError as error:
        leave(str(error))


def make_folder(output: str | os.PathLike[str]) -> None:
    """Make the output folder and its parents; if no file can be made in it, the command ends with status 2."""
    try:
        os.makedirs(output, exist_ok=True)
    except FileExistsError:
        fault = "is a file, not a folder" if os.path.exists(output) else "is a link that leads nowhere or in a circle"
        leave(f"cannot make the output folder {about(output, fault)}")
    except OSError as error:
        leave(f"cannot make the output folder {about(output, error)}")
    try:
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        leave(f"cannot write into the output folder {about(output, error)}")


def in_columns(items: Sequence[str], indent: int = 2) -> str:
    """Return short texts in columns of one width, row by row, as wide as the terminal (100 if there is none)."""
    from rich.columns import Columns
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    width = shutil.get_terminal_size((100, 24)).columns
    console = Console(force_jupyter=False, width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(Padding(Columns([Text(item) for item in items], padding=(0, 2)), (0, 0, 0, indent)))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def leave(message: str) -> NoReturn:
    """Print why nothing can start, and end the command with status 2."""
    typer.echo(f"fastuper: {message}", err=True)
    raise typer.Exit(2)

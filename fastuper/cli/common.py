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

from fastuper.io.messages import about, name_of, one_line

if TYPE_CHECKING:
    import torch

    from fastuper.data.processor import UperNetImageProcessor
    from fastuper.models.parsing import UperNetForUnifiedPerceptualParsing
    from fastuper.models.upernet import UperNetForSemanticSegmentation

# torch, and modules that import it, are imported inside functions, so that `--help` answers at once.

EXPECTED_ERRORS = (OSError, ValueError, RuntimeError, MemoryError)
"""Errors that bad input or a full machine can cause: a file, its values, torch out of memory, a full disk."""

KINDS = {
    "upernet": ("semantic segmentation", "segment"),
    "fastuper_upernet": ("semantic segmentation", "segment"),
    "unified_perceptual_parsing": ("Unified Perceptual Parsing", "parse"),
}
"""What a model is for, and the command that runs it on photos, by the `model_type` in config.json."""

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
    from fastuper.scenes.dataset import MODEL

    if model is None:
        typer.echo(
            "no --model: using the demo model, which only knows generated street scenes; for photos, give --model a "
            "checkpoint, such as openmmlab/upernet-convnext-tiny",
            err=True,
        )
        model = str(MODEL)
        if dtype == "auto":
            dtype = "float32"  # the weights are stored in bfloat16 to be small
    return _load(UperNetForSemanticSegmentation, model, device, dtype)


def load_parsing_model(
    model: str, device: str, dtype: Dtype
) -> tuple[UperNetForUnifiedPerceptualParsing, UperNetImageProcessor]:
    """Load a checkpoint for Unified Perceptual Parsing, in evaluation mode, and its image processor.

    If loading fails, the command ends with status 2.
    """
    from fastuper.models.parsing import UperNetForUnifiedPerceptualParsing

    return _load(UperNetForUnifiedPerceptualParsing, model, device, dtype)


def _load(network_class: Any, model: str, device: str, dtype: Dtype) -> tuple[Any, UperNetImageProcessor]:
    from safetensors import SafetensorError

    from fastuper.data.processor import UperNetImageProcessor
    from fastuper.io.files import read_json
    from fastuper.io.hub import find_file
    from fastuper.weights.dialects import is_foreign

    chosen = choose_device(device)
    try:
        config = None if is_foreign(model) else find_file(model, "config.json")
        kind = read_json(config).get("model_type") if config else None
        for model_type, (task, command) in KINDS.items():
            if kind == model_type and not network_class.config_class.reads(kind):
                raise ValueError(f"it is a model for {task}; use it with `fastuper {command}`")
        network = network_class.from_pretrained(model, dtype=dtype, device=chosen).eval()
        if is_foreign(model) or find_file(model, "preprocessor_config.json"):
            processor = UperNetImageProcessor.from_pretrained(model)
        else:
            processor = UperNetImageProcessor()
            typer.echo(
                f"{model} has no preprocessor_config.json: photos are prepared with the default settings", err=True
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        leave(f"cannot load the model {name_of(model)}: {one_line(error)}")
    return network, processor


def choose_device(name: str) -> torch.device:
    """Return the device of a name; "auto" chooses a GPU if there is one.

    If the device cannot be used, the command ends with status 2.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        leave(f"--device {name} cannot be used: {one_line(error)}")
    return device


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

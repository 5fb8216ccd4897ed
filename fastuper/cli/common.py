"""What the commands share: where and in what type to compute, loading a model, and errors that are one line."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from fastuper.io.hub import find_file
from fastuper.io.messages import one_line

if TYPE_CHECKING:
    import torch

    from fastuper import UperNetForSemanticSegmentation, UperNetImageProcessor

# torch is imported inside the functions that need it, so that `--help` answers at once.

EXPECTED = (OSError, ValueError, RuntimeError, MemoryError)
"""What a single photo may fail with: the file, its values, torch's own errors (out of memory), a full disk."""


class Dtype(str, Enum):
    """The types that `--dtype` takes."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class LayoutName(str, Enum):
    """The layouts that `--layout` takes."""

    auto = "auto"
    ade20k = "ade20k"
    cityscapes = "cityscapes"
    folders = "folders"


ModelOption = Annotated[
    str,
    typer.Option(
        "--model", "-m", metavar="FOLDER|HUB_ID", help="A checkpoint's folder, or its repository's id on the Hub."
    ),
]
OptionalModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="FOLDER|HUB_ID",
        help="A checkpoint's folder, or its repository's id on the Hub.  [default: the package's own small model, "
        "which knows generated street scenes and nothing else]",
    ),
]
DeviceOption = Annotated[
    str, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, mps, or auto: a GPU where there is one.")
]
LayoutOption = Annotated[
    LayoutName, typer.Option(help="How the dataset's folder is laid out; auto: found by its folders' names.")
]
DtypeOption = Annotated[Dtype, typer.Option(help="The type to compute in; auto: the one the weights are stored in.")]


def load_model(
    model: str | None, device: str, dtype: Dtype
) -> tuple[UperNetForSemanticSegmentation, UperNetImageProcessor]:
    """Return a checkpoint's network, in evaluation, and its image processor; leave where they cannot be had.

    Without a model it is the package's own, and a line says so.
    """
    from safetensors import SafetensorError

    from fastuper import UperNetForSemanticSegmentation, UperNetImageProcessor
    from fastuper.scenes.dataset import MODEL

    chosen = choose_device(device)
    if model is None:
        typer.echo(
            "no --model: taking the package's own, a small UPerNet-ConvNeXt that has seen generated street scenes "
            "(fastuper.scenes.dataset) and nothing else; of photographs it knows nothing",
            err=True,
        )
        model = str(MODEL)
        if dtype is Dtype.auto:
            dtype = Dtype.float32  # it is stored in bfloat16 to be small
    try:
        network = UperNetForSemanticSegmentation.from_pretrained(model, dtype=dtype.value, device=chosen).eval()
        if find_file(model, "preprocessor_config.json"):
            processor = UperNetImageProcessor.from_pretrained(model)
        else:
            processor = UperNetImageProcessor()
            typer.echo(
                f"{model} has no preprocessor_config.json: photos are prepared with the default settings", err=True
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        leave(f"cannot load the model {model}: {one_line(error)}")
    return network, processor


def choose_device(name: str) -> torch.device:
    """Return the device of a name, for "auto" a GPU where there is one; leave where it cannot be used."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        leave(f"--device {name} cannot be used: {one_line(error)}")
    return device


def make_folder(output: Path) -> None:
    """Make the output folder, and its parents; leave where that fails."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        leave(f"cannot make the output folder {output}: {error.strerror}")


def leave(message: str) -> NoReturn:
    """Say why nothing can start, and end with status 2."""
    typer.echo(f"fastuper: {message}", err=True)
    raise typer.Exit(2)

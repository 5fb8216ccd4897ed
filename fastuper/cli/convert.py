"""`fastuper convert SOURCE OUTPUT`: turn another library's checkpoint into a model folder."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial, wraps
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fastuper.cli.common import folder, leave, make_folder, not_empty
from fastuper.io.messages import EXPECTED_ERRORS, about, name_of, one_line, printable
from fastuper.weights.options import OPTIONS, Option

if TYPE_CHECKING:
    from fastuper.weights.conversion import Row

# torch is imported inside the functions that need it, so that `--help` answers at once.

REPORTS = (".md", ".txt", ".csv", ".json")


def _numbers(text: str) -> int | float | list[int | float]:
    """Return the numbers of an option: "7", or "3,6,12,24"."""
    try:
        numbers = [int(part) if part.strip().lstrip("+-").isdigit() else float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number, and no list of numbers such as 3,6,12,24") from None
    return numbers if len(numbers) > 1 else numbers[0]


def _flag(name: str, option: Option) -> Any:
    """Return the typer annotation of an option of a conversion."""
    flag, text = "--" + name.replace("_", "-"), option.text[0].upper() + option.text[1:] + "."
    if option.kind == "flag":
        return Annotated[bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", help=text)]
    if option.kind == "choice":
        return Annotated[Literal[option.values] | None, typer.Option(flag, help=text)]
    return Annotated[Any, typer.Option(flag, parser=_numbers, metavar="N,N,...", help=text)]


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each of `OPTIONS`; its parameter `given` gets their values."""
    parameters = [
        each.replace(kind=Parameter.KEYWORD_ONLY)
        for name, each in inspect.signature(command, eval_str=True).parameters.items()
        if name != "given"
    ]
    parameters += [
        Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=_flag(name, option))
        for name, option in OPTIONS.items()
    ]

    @wraps(command)
    def run(**values: Any) -> None:
        given = {name: values.pop(name) for name in OPTIONS}
        command(given=given, **values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


@_with_options
def convert_checkpoint(
    source: Annotated[
        Path,
        typer.Argument(
            parser=folder,
            metavar="SOURCE",
            help="Checkpoint: a file (.pth, .pt, .bin, .ckpt, .safetensors), or a folder of timm, of "
            "segmentation_models_pytorch, of mmengine's Runner, or of Unified Perceptual Parsing's official code.",
        ),
    ],
    output: Annotated[
        Path, typer.Argument(parser=folder, metavar="OUTPUT", help="Folder to write; it must be new or empty.")
    ],
    *,
    weights_key: Annotated[
        str | None,
        typer.Option(
            parser=not_empty,
            metavar="NAME",
            help="Name of the state dict in a file that has several, such as state_dict_ema.",
            show_default="plain weights before averaged ones",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            parser=folder,
            metavar="FILE",
            help="Write what became of each tensor to a new file: a table (.md, .txt), .csv or .json.",
        ),
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option(
            help="Run the source's own library beside the converted model on a drawn image, and write nothing if they "
            "differ by more than 1e-4.",
            show_default="verify if that library is installed",
        ),
    ] = None,
    to: Annotated[
        Literal["fastuper", "timm"],
        typer.Option(help="timm: write the backbone of a model folder by timm's names, as model.safetensors."),
    ] = "fastuper",
    given: dict[str, Any],
) -> None:
    """Turn another library's checkpoint into a model folder.

    Checkpoints of mmsegmentation, segmentation_models_pytorch, timm, the authors of Swin and ConvNeXt, and Unified
    Perceptual Parsing's official code are recognised by their tensors. A UPerNet becomes a folder that --model and
    from_pretrained read; a classifier becomes a backbone, for `fastuper train --backbone`. Every tensor is accounted
    for. No code of a file runs.

    The options after --verify say what a checkpoint may not say itself. An option that contradicts it is refused.

    Exit status: 0 written, 1 the folder could not be written, 2 nothing could start.
    """
    from fastuper.io.files import atomic_folder, new_folder

    try:
        target = new_folder(output)
    except ValueError as error:
        leave(str(error))
    if report is not None:
        _check_report(report, target)

    try:
        if to == "timm":
            if weights_key is not None or verify or any(value is not None for value in given.values()):
                raise ValueError("--to timm takes a model folder of fastuper, and no option but --report")
            rows, initial, lines, save = _for_timm(source)
        else:
            rows, initial, lines, save = _from_library(source, weights_key, given, verify)
    except (*EXPECTED_ERRORS, TypeError, ImportError) as error:
        # Most messages name a file of the folder already.
        leave(f"cannot convert {one_line(error) if str(source) in str(error) else about(source, error)}")
    for line in lines:
        typer.echo(printable(line))

    from fastuper.models.converted import report_text
    from fastuper_kernels.dispatch.files import atomic_path

    make_folder(target.parent)
    place = output
    try:
        with ExitStack() as files:  # the folder first, then the report: the last that was entered leaves first
            if report is not None:
                place = report
                path = files.enter_context(atomic_path(report))
                path.write_text(report_text(rows, initial, lines, report.suffix.lower()), encoding="utf-8")
                place = output
            temporary = files.enter_context(atomic_folder(target))
            save(temporary)
            if target.exists():
                target.rmdir()
    except EXPECTED_ERRORS as error:
        typer.echo(f"fastuper: cannot write {about(place, error)}", err=True)
        raise typer.Exit(1) from None
    typer.echo(printable(f"written to {output}"))
    if report is not None:
        typer.echo(printable(f"report in {report}"))


Result = tuple[Sequence["Row"], Sequence[str], list[str], Callable[[Path], None]]
"""The rows of all tensors, the names of tensors with initial values, lines to print, and what writes a folder."""


def _from_library(source: Path, weights_key: str | None, given: dict[str, Any], verify: bool | None) -> Result:
    """Convert another library's checkpoint."""
    import numpy as np

    from fastuper.models.converted import build_converted, save_converted, summary
    from fastuper.models.verification import verify_converted
    from fastuper.scenes.dataset import scene
    from fastuper.weights.checkpoints import read_source
    from fastuper.weights.conversion import Choices
    from fastuper.weights.convert import convert_source

    choices = Choices(given)
    read = read_source(source, weights_key)
    converted = build_converted(read.place, convert_source(read, choices))
    lines = summary(converted)
    if verify is not False:
        lines.append(verify_converted(read, converted, lambda size: np.asarray(scene(0, size)[0]), bool(verify)))
    return converted.conversion.rows, converted.initial, lines, partial(save_converted, converted)


def _for_timm(source: Path) -> Result:
    """Give the backbone of a model folder timm's names."""
    from fastuper.models.converted import backbone_for_timm
    from fastuper.weights.writing import as_independent, atomic_weights, split_weights

    translated, lines = backbone_for_timm(source)

    def save(folder: Path) -> None:
        tensors = as_independent(translated.tensors)
        with atomic_weights(folder, tensors, split_weights(tensors, True, "5GB", None)):
            pass

    return translated.rows, (), lines, save


def _check_report(report: Path, target: Path) -> None:
    """End the command with status 2 unless a report's file can be made."""
    if report.suffix.lower() not in REPORTS:
        leave(f"--report {name_of(report)}: its name must end with {', '.join(REPORTS)}")
    if os.path.lexists(report):
        leave(f"--report {name_of(report)} exists; give a new file")
    if not report.absolute().parent.is_dir():
        leave(f"--report {name_of(report)}: there is no folder {name_of(report.absolute().parent)}")
    if target in [Path(os.path.realpath(report)), *Path(os.path.realpath(report)).parents]:
        leave(f"--report {name_of(report)} lies in the output folder; give another place")

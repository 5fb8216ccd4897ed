"""`fastuper convert FOLDER OUTPUT`: turn another library's checkpoint into a model folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fastuper.cli.common import EXPECTED_ERRORS, folder, leave, make_folder
from fastuper.io.messages import about, name_of, one_line

if TYPE_CHECKING:
    from fastuper.data.processor import UperNetImageProcessor
    from fastuper.models.pyramid_model import PyramidModel

# torch is imported inside the functions that need it, so that `--help` answers at once.

Pooling = Literal["precise_roi", "adaptive"]


@dataclass(frozen=True)
class Options:
    """The options that a dialect may read."""

    pooling: Pooling
    texture_head: bool


@dataclass(frozen=True)
class Converted:
    """A model, its image processor, and the lines that say what was done."""

    model: PyramidModel
    processor: UperNetImageProcessor
    report: list[str]


@dataclass(frozen=True)
class Dialect:
    """A kind of checkpoint that can be converted.

    Attributes:
        name: in the message that lists the kinds.
        recognises: whether a folder is of this kind, by the names of its files.
        convert: reads a folder.
    """

    name: str
    recognises: Callable[[Path], bool]
    convert: Callable[[Path, Options], Converted]


def convert_checkpoint(
    source: Annotated[
        Path,
        typer.Argument(
            parser=folder,
            metavar="FOLDER",
            help="Folder with encoder_*.pth and decoder_*.pth of Unified Perceptual Parsing's official code, and "
            "labels.json if there is one. Of several epochs the highest is taken.",
        ),
    ],
    output: Annotated[
        Path, typer.Argument(parser=folder, metavar="OUTPUT", help="Folder to write; it must be new or empty.")
    ],
    *,
    pooling: Annotated[
        Pooling,
        typer.Option(
            help="Pooling of the pyramid. The official code pools with precise_roi; try adaptive if results look wrong."
        ),
    ] = "precise_roi",
    texture_head: Annotated[
        bool,
        typer.Option(
            "--texture-head",
            help="Add a head for textures, which the official code lacks. It has random weights: train it before use.",
        ),
    ] = False,
) -> None:
    """Turn a checkpoint of Unified Perceptual Parsing's official code into a model folder.

    The folder gets config.json, model.safetensors and preprocessor_config.json, all or none; `--model` and
    `from_pretrained` read it.

    Exit status: 0 written, 1 the folder could not be written, 2 nothing could start.
    """
    target = Path(os.path.realpath(output))
    _check_new(output, target)
    try:
        converted = _dialect_of(source).convert(source, Options(pooling, texture_head))
    except (*EXPECTED_ERRORS, TypeError) as error:
        # Most messages name a file of the folder already.
        leave(f"cannot convert {one_line(error) if str(source) in str(error) else about(source, error)}")
    for line in converted.report:
        typer.echo(line)

    from fastuper.io.files import atomic_folder

    make_folder(target.parent)
    try:
        with atomic_folder(target) as temporary:
            converted.model.save_pretrained(temporary)
            converted.processor.save_pretrained(temporary)
            if target.exists():
                target.rmdir()
    except EXPECTED_ERRORS as error:
        typer.echo(f"fastuper: cannot write {about(output, error)}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"model in {output}")


def _check_new(output: Path, target: Path) -> None:
    """End the command with status 2 unless a folder is new or empty."""
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            fault = "is not empty" if target.is_dir() else "is a file"
            leave(f"{name_of(output)} {fault}; give a new folder")
    except OSError as error:
        leave(f"cannot use the output folder {about(output, error)}")


def _dialect_of(source: Path) -> Dialect:
    """Return the dialect of a folder.

    Raises:
        ValueError: it is no folder, or of a kind that cannot be converted; the message names the kind.
    """
    if not source.is_dir():
        raise ValueError(
            "it is a file; give the folder that contains it" if source.exists() else "there is no such folder"
        )
    for dialect in DIALECTS:
        if dialect.recognises(source):
            return dialect
    known = ", ".join(dialect.name for dialect in DIALECTS)
    raise ValueError(f"{_foreign(source)}; what can be converted: {known}")


def _foreign(source: Path) -> str:
    """Return a clause that names the kind of a checkpoint that cannot be converted."""
    from fastuper.io.files import read_json
    from fastuper.models.configuration import LIBRARIES
    from fastuper.weights.dialects import library_of
    from fastuper.weights.reading import stored_tensors

    if (source / "config.json").is_file():
        values = read_json(source / "config.json")
        if "model_type" in values:
            return "it is a model folder of Transformers or fastuper already; load it with from_pretrained"
        for key, library in LIBRARIES.items():
            if key in values:
                return f"it is a checkpoint of {library}"
    for path in sorted(source.iterdir()):
        if path.suffix in (".pth", ".pt", ".bin", ".safetensors"):
            found = library_of(stored_tensors({path: set()}))
            return f"{path.name} is a checkpoint of {found[0] if found else 'an unknown library'}"
    return "it has no checkpoint: no encoder_*.pth and decoder_*.pth"


def _has_official_files(source: Path) -> bool:
    return any(path.name.startswith(("encoder_", "decoder_")) for path in source.iterdir())


def _convert_official(source: Path, options: Options) -> Converted:
    """Read a folder of the official code of Unified Perceptual Parsing."""
    from fastuper.data.processor import UperNetImageProcessor
    from fastuper.models.parsing import UperNetForUnifiedPerceptualParsing
    from fastuper.models.parsing_configuration import UnifiedPerceptualParsingConfig
    from fastuper.weights.official import load_parsing, read_official

    checkpoint = read_official(source)
    values = {**checkpoint.values(), "pooling": options.pooling}
    if options.texture_head:
        values["tasks"] = [*values["tasks"], "texture"]
    model = UperNetForUnifiedPerceptualParsing(UnifiedPerceptualParsingConfig(**values))
    report = [*checkpoint.notes, *str(load_parsing(model, checkpoint.encoder, checkpoint.decoder)).splitlines()]
    if options.texture_head:
        report.append("the texture head has random weights: train it before use")
    else:
        report.append("no texture head: the official code has none (--texture-head adds one with random weights)")
    return Converted(model, UperNetImageProcessor.for_parsing(), report)


DIALECTS = (Dialect("Unified Perceptual Parsing's official code", _has_official_files, _convert_official),)
"""The kinds of checkpoints that can be converted; the first that recognises a folder reads it."""

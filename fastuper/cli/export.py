"""`fastuper export MODEL --output FOLDER`: write a model for another runtime, proved there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fastuper.cli.common import folder, leave, not_empty
from fastuper.cli.options import expand_dataclasses
from fastuper.export.settings import ExportError, ExportSettings, ProofError
from fastuper.io.messages import about, name_of, one_line, printable, reason

# torch is imported inside the functions that need it, so that `--help` answers at once.


@expand_dataclasses
def export(
    model: Annotated[
        str,
        typer.Argument(
            parser=not_empty,
            metavar="MODEL",
            help="Checkpoint: a folder, or the id of a Hub repository; or a file of another library (see `fastuper "
            "convert`).",
        ),
    ],
    *,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", parser=folder, metavar="FOLDER", help="Folder to write; it must be new or empty."
        ),
    ],
    settings: ExportSettings,
) -> None:
    """Write a model for another runtime, after it has given the model's results there.

    The exported model runs in its runtime at eight sizes, none of them the size at which it was traced. If its logits
    or labels are not the model's, nothing is written. FOLDER has the model's files, export.json (versions, inputs, the
    error at each size, class names, preprocessing), preprocessor_config.json, and run.py, which segments a photo.

    Exit status: 0 written, 1 the exported model is wrong or the folder could not be written, 2 nothing could start.
    """
    try:
        from fastuper.export.exporting import export_model

        values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
        report = export_model(model, output, **values)
    except KeyboardInterrupt:
        typer.echo("fastuper: stopped; nothing was written", err=True)
        raise typer.Exit(130) from None
    except ProofError as error:
        typer.echo(f"fastuper: {reason(error)}", err=True)
        raise typer.Exit(1) from None
    except OSError as error:
        typer.echo(f"fastuper: cannot write {about(output, error)}", err=True)
        raise typer.Exit(1) from None
    except MemoryError:
        typer.echo("fastuper: not enough memory for the export; nothing was written", err=True)
        raise typer.Exit(1) from None
    except (ExportError, ValueError, RuntimeError, ImportError) as error:
        leave(one_line(error))
    for line in report.get("notes", ()):
        typer.echo(printable(line), err=True)
    for line in _summary(report, output):
        typer.echo(printable(line))


def _summary(report: Mapping[str, Any], output: Path) -> list[str]:
    """Return what was written and what was checked, in lines."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    size = sum((output / name).stat().st_size for name in report["files"])
    lines = [f"exported to {name_of(output)}: {', '.join(report['files'])} ({size / 2**20:.1f} MiB); {versions}"]
    if not report["checked"]:
        lines.append("not checked: nothing has shown that it gives the model's results")
    else:
        sizes = report["proof"]["sizes"]
        places = ", ".join(f"{each['batch']} x {each['height']} x {each['width']}" for each in sizes)
        lines.append(f"checked in its runtime at {len(sizes)} sizes: {places}")
        errors = [each["error"] for each in sizes if "error" in each]
        if errors:
            lines.append(f"largest relative error {max(errors):.1e}, at most {report['proof']['bound']:.0e} is allowed")
        if "labels_undecided" in sizes[0]:
            undecided = max(each["labels_undecided"] for each in sizes)
            lines.append(f"labels equal wherever the reference decides: all but {undecided:.2%} of the pixels")
    return [*lines, f"segment a photo: python {name_of(output / 'run.py')} PHOTO"]

"""The command line: `fastuper COMMAND ...`, a command a file beside this one.

Exit status: 0 where everything asked for was done, 1 where some of it was not, 2 where nothing could start.
"""

from __future__ import annotations

import signal
import sys
import warnings
from io import TextIOWrapper
from typing import Annotated

import typer

from fastuper import __version__
from fastuper.cli.evaluate import evaluate_model
from fastuper.cli.segment import segment_photos
from fastuper.cli.train import train_model

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command("segment")(segment_photos)
app.command("train")(train_model)
app.command("evaluate")(evaluate_model)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastuper {__version__}")
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """UPerNet for semantic segmentation: which class each pixel of a photo belongs to."""


def main() -> None:
    """Run the command line; the console script `fastuper`."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # temporary files go when it unwinds
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # Pillow's and torch's remarks to programmers; what matters is an error here
    for stream in (sys.stdout, sys.stderr):  # file and class names that the terminal's encoding lacks
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="fastuper")

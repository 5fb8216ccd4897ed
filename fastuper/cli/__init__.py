"""The command line: `fastuper COMMAND ...`; each command is a file beside this one.

Exit status: 0 if everything succeeded, 1 if a part failed, 2 if nothing could start.
"""

from __future__ import annotations

import signal
import sys
import warnings
from typing import Annotated

import typer

from fastuper.cli.convert import convert_checkpoint
from fastuper.cli.evaluate import evaluate_model
from fastuper.cli.export import export
from fastuper.cli.parse import parse_photos
from fastuper.cli.segment import segment_photos
from fastuper.cli.serve import serve_page
from fastuper.cli.streams import Streams
from fastuper.cli.train import train_model
from fastuper.io.version import __version__

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command("segment")(segment_photos)
app.command("parse")(parse_photos)
app.command("train")(train_model)
app.command("evaluate")(evaluate_model)
app.command("convert")(convert_checkpoint)
app.command("export")(export)
app.command("serve")(serve_page)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastuper {__version__}")
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """UPerNet: the class of every pixel of a photo; or its scene, objects, parts, materials and textures."""


def main() -> None:
    """Run the command line; the console script `fastuper`."""
    # An exception, unlike the signal's default, runs the clean-up of temporary files.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # Pillow's and torch's warnings address programmers; real faults raise here
    streams = Streams()
    try:
        app(prog_name="fastuper")
    except SystemExit as ended:
        streams.leave(ended.code)

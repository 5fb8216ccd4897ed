"""`fastuper serve [MODEL...]`: a page to try models on, in the browser."""

from __future__ import annotations

from typing import Annotated

import typer

from fastuper.cli.common import DeviceOption, DtypeOption, leave, not_empty
from fastuper.cli.photos import MaxPixelsOption
from fastuper.data.images import MAX_PIXELS


def serve_page(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            parser=not_empty,
            help="Checkpoints to choose from: folders, ids of Hub repositories, or files of other libraries.",
            show_default="the demo model of the package, which only knows generated street scenes",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(parser=not_empty, metavar="NAME", help="Name or address to listen on; 0.0.0.0 for all.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="N", help="Port to listen on; 0 for any free port.")
    ] = 7860,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    queue: Annotated[
        int, typer.Option(min=0, metavar="N", help="Photos that may wait while one is computed; others are refused.")
    ] = 8,
) -> None:
    """Serve a page to try models on.

    Drop a photo on the page, or take one. The page shows the classes over the photo, with their names and shares, and
    has the files that `fastuper segment` and `fastuper parse` write. POST /api/photo gives the same as JSON.

    One model is in memory, and one photo is computed at a time. Photos and results are in one temporary folder, for an
    hour at most, and are removed at the end. The page loads nothing from other machines.

    Exit status: 0 after Ctrl-C, 2 nothing could start.
    """
    from fastuper.inference.loading import LoadError
    from fastuper.serve.server import ServeError, serve

    try:
        serve(
            models or [],
            host=host,
            port=port,
            device=device,
            dtype=dtype,
            max_pixels=max_pixels,
            queue=queue,
            notify=lambda line: typer.echo(line, err=True),
            ready=lambda address: typer.echo(f"the page is at {address} (Ctrl-C ends it)"),
        )
    except (LoadError, ServeError) as error:
        leave(str(error))

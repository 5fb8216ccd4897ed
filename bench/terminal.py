"""Tables for a terminal, by rich."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

WIDTH = 120  # columns at least, also in a file or a narrower terminal


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table whose columns after the first are aligned to the right."""
    made = Table(title=title, title_justify="left", show_edge=False)
    for place, column in enumerate(columns):
        made.add_column(column, justify="right" if place else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def text(tables: Iterable[Table]) -> str:
    """Return the tables that have rows as text without colours."""
    width = max(WIDTH, shutil.get_terminal_size().columns)
    console = Console(
        force_jupyter=False,
        width=width,
        color_system=None,
        force_terminal=False,
        markup=False,
        emoji=False,
        highlight=False,
    )
    with console.capture() as capture:
        for made in tables:
            if made.row_count:
                console.print(made, "")
    return capture.get()

"""One picture of a parsed photo: a named panel with a legend for each task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fastuper.data.classes import class_palette
from fastuper.data.overlay import (
    INK,
    WHITE,
    LegendLine,
    class_lines,
    class_shares,
    draw_legend,
    legend_name,
    resized,
    tinted,
)

TITLES = {"scene": "Scene", "object": "Objects", "part": "Parts", "material": "Materials", "texture": "Textures"}
"""The names of the panels, in their order, by task."""

NOTHING = {"object": "no object", "part": "no part", "material": "no material"}
"""What the legends call class 0 of the tasks in which it means that a pixel has no class."""

LONGEST, SHORTEST = 1024, 640
"""Photos whose longer side exceeds the first number of pixels are shrunk to it in each panel. Photos of less than half
of the second are enlarged."""

_SHAPE = 1.5  # width / height that the picture's grid comes closest to
_SCENES = 12


def task_palette(task: str, classes: int) -> NDArray[np.uint8]:
    """Return a colour for each class of a task, (classes, 3) uint8; the same number always has the same colour.

    No two classes share a colour. Black is class 0 of the tasks in which it means that a pixel has no class.
    """
    palette = class_palette(classes)
    if task in NOTHING:
        palette[0] = 0
    return palette


def shown_names(task: str, labels: Sequence[str]) -> dict[int, str]:
    """Return the names of a task's classes, as legends show them: class 0 by what it means."""
    names = dict(enumerate(labels))
    return names | {0: NOTHING[task]} if task in NOTHING else names


def parsing_picture(
    photo: Image.Image,
    scene: Sequence[tuple[int, float]] | None,
    maps: Mapping[str, NDArray[np.integer]],
    labels: Mapping[str, Sequence[str]],
) -> Image.Image:
    """Return one picture with a named panel for each task, in rows.

    The first panel is the photo beside its most probable scenes. The others are the photo in grey under the colours of
    their label map, beside a legend with the names and shares of the classes, largest first. What has no object, part
    or material is darkened.

    Args:
        photo: the photo, RGB.
        scene: the scenes as (number, probability), best first; None for no such panel.
        maps: the label maps by task ("object", "part", "material", "texture"), each (H, W) of the photo's size; tasks
            that are left out have no panel.
        labels: the names of each task's classes.

    Raises:
        ValueError: there is nothing to show, a map has another size than the photo, or a label has no name.
    """
    plain = resized(photo, LONGEST, SHORTEST)
    grey = plain.convert("L").convert("RGB")  # the photo's own colours would change those of the classes
    font_size = max(14, round(max(plain.size) / 48))
    panels: dict[str, tuple[Image.Image, list[LegendLine]]] = {}
    if scene is not None:
        names = shown_names("scene", labels["scene"])
        lines = [LegendLine(legend_name(names, index), value, None) for index, value in scene[:_SCENES]]
        panels["scene"] = (plain, lines)
    for task, layer in maps.items():
        if layer.shape != (photo.height, photo.width):
            raise ValueError(
                f"the photo is {(photo.height, photo.width)} (height, width), its label map of {TITLES[task].lower()} "
                f"{layer.shape}"
            )
        names = shown_names(task, labels[task])
        palette = task_palette(task, len(names))
        shares = class_shares(layer, len(names))
        lines = class_lines(shares, names, palette, font_size, plain.height)
        panels[task] = (tinted(grey, layer, palette), lines)
    if not panels:
        raise ValueError("there is nothing to show: no scene and no label map")
    return _in_rows([_panel(TITLES[task], *panels[task], font_size) for task in TITLES if task in panels], font_size)


def _panel(title: str, shown: Image.Image, lines: Sequence[LegendLine], font_size: int) -> Image.Image:
    """Return a picture under its title, with a legend beside it."""
    size = round(font_size * 1.4)
    font = ImageFont.load_default(size=size)
    top = round(size * 1.7)
    legend = draw_legend(lines, font_size)
    width = max(shown.width + legend.width, math.ceil(font.getlength(title)))
    panel = Image.new("RGB", (width, top + max(shown.height, legend.height)), WHITE)
    ImageDraw.Draw(panel).text((0, top // 2), title, font=font, fill=INK, anchor="lm")
    panel.paste(shown, (0, top))
    panel.paste(legend, (shown.width, top))
    return panel


def _in_rows(panels: Sequence[Image.Image], gap: int) -> Image.Image:
    """Return panels in rows, so many in a row that the picture's shape comes closest to `_SHAPE`."""

    def cells(columns: int) -> tuple[list[int], list[int]]:
        """Return the widths of the columns and the heights of the rows, with a gap behind each."""
        widths = [max(panel.width for panel in panels[column::columns]) + gap for column in range(columns)]
        starts = range(0, len(panels), columns)
        return widths, [max(panel.height for panel in panels[start : start + columns]) + gap for start in starts]

    def distance(columns: int) -> float:
        widths, heights = cells(columns)
        return abs(math.log(sum(widths) / sum(heights) / _SHAPE))

    columns = min(range(1, len(panels) + 1), key=distance)
    widths, heights = cells(columns)
    picture = Image.new("RGB", (sum(widths) + gap, sum(heights) + gap), WHITE)
    for position, panel in enumerate(panels):
        row, column = divmod(position, columns)
        picture.paste(panel, (gap + sum(widths[:column]), gap + sum(heights[:row])))
    return picture

"""Class names and class colours."""

from __future__ import annotations

import colorsys
import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from itertools import count

import numpy as np
from numpy.typing import NDArray

from fastuper.scenes import street


@lru_cache(maxsize=1)
def _ade20k() -> tuple[tuple[str, ...], NDArray[np.uint8]]:
    content = json.loads(files(__package__).joinpath("ade20k.json").read_text(encoding="utf-8"))
    return tuple(content["names"]), np.array(content["palette"], dtype=np.uint8)


def ade20k_names() -> tuple[str, ...]:
    """Return the names of the 150 classes of ADE20K's scene parsing benchmark, in order."""
    return _ade20k()[0]


def ade20k_palette() -> NDArray[np.uint8]:
    """Return the usual colours of ADE20K's 150 classes, (150, 3) uint8.

    They are mmsegmentation's. Two classes share one: road (6) and skyscraper (48) are both (140, 140, 140).
    """
    return _ade20k()[1].copy()


def class_palette(classes: int | Mapping[int, str]) -> NDArray[np.uint8]:
    """Return a colour for each class, (N, 3) uint8; the same ones at every call.

    Args:
        classes: how many, or a checkpoint's `id2label`. ADE20K's own colours are returned where the names are
            ADE20K's, the scenes' own where they are theirs (`fastuper.scenes`), otherwise N different ones: hues a
            golden angle apart, so that neighbours differ most.
    """
    if isinstance(classes, Mapping):
        names = tuple(str(classes.get(index, "")).strip() for index in range(len(classes)))
        if names == ade20k_names():
            return ade20k_palette()
        if names == tuple(street.ID2LABEL.values()):
            return street.PALETTE.copy()
        classes = len(classes)
    # Steps that are badly approximable by fractions: no short cycle in hue, saturation or value.
    colours: dict[tuple[int, int, int], None] = {}
    for index in count():
        if len(colours) == classes:
            break
        hue = (0.58 + index * 0.6180339887498949) % 1
        saturation = 0.45 + 0.5 * (index * 0.7548776662466927 % 1)
        value = 0.6 + 0.4 * (index * 0.5698402909980532 % 1)
        red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
        colours.setdefault((round(red * 255), round(green * 255), round(blue * 255)))
    return np.array(list(colours), dtype=np.uint8).reshape(classes, 3)


def class_name(id2label: Mapping[int, str], index: int) -> str:
    """Return the name of a class on one line, "class N" where it has none."""
    return " ".join(str(id2label.get(index, "")).split()) or f"class {index}"

"""Names and colours of classes: ADE20K, generated scenes, and generated colours for all other classes."""

from __future__ import annotations

import colorsys
import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastuper.io.messages import printable

SCENE_ID2LABEL = {
    0: "sky",
    1: "building",
    2: "wall",
    3: "road",
    4: "pavement",
    5: "grass",
    6: "tree",
    7: "car",
    8: "person",
    9: "sign",
}
"""The classes of generated scenes (`fastuper.scenes`) by their numbers."""

SCENE_PALETTE = np.array(
    [
        [120, 180, 235],
        [150, 95, 75],
        [255, 190, 90],
        [95, 90, 115],
        [205, 155, 205],
        [160, 225, 90],
        [25, 120, 60],
        [40, 70, 210],
        [230, 40, 60],
        [255, 240, 40],
    ],
    dtype=np.uint8,
)
"""The colours of the classes of generated scenes, (10, 3)."""


@lru_cache(maxsize=1)
def _ade20k() -> tuple[tuple[str, ...], NDArray[np.uint8]]:
    content = json.loads(files(__package__).joinpath("ade20k.json").read_text(encoding="utf-8"))
    return tuple(content["names"]), np.array(content["palette"], dtype=np.uint8)


def ade20k_names() -> tuple[str, ...]:
    """Return the names of the 150 classes of ADE20K's scene parsing benchmark, in order."""
    return _ade20k()[0]


def ade20k_palette() -> NDArray[np.uint8]:
    """Return the usual colours of ADE20K's 150 classes, (150, 3) uint8.

    They are mmsegmentation's. Road (6) and skyscraper (48) share a colour, (140, 140, 140).
    """
    return _ade20k()[1].copy()


def class_palette(classes: int | Mapping[int, str], stored: Any = None) -> NDArray[np.uint8]:
    """Return a colour for each class, (N, 3) uint8; the same classes always get the same colours.

    Args:
        classes: the number N of classes, or a checkpoint's `id2label`. The names of ADE20K or of generated scenes get
            their usual colours. All other classes get N different colours. Their hues are a golden angle apart, so that
            neighbouring classes differ most.
        stored: the value `palette` of a config.json: (red, green, blue) of each class, 0 to 255. It is used if it has a
            colour for each class.
    """
    count_of_classes = classes if isinstance(classes, int) else len(classes)
    if isinstance(stored, list | tuple) and len(stored) == count_of_classes and all(map(_is_colour, stored)):
        return np.array(stored, dtype=np.uint8)
    if isinstance(classes, Mapping):
        names = tuple(str(classes.get(index, "")).strip() for index in range(len(classes)))
        if names == ade20k_names():
            return ade20k_palette()
        if names == tuple(SCENE_ID2LABEL.values()):
            return SCENE_PALETTE.copy()
        classes = len(classes)
    # The steps are badly approximable by fractions: hue, saturation and value have no short cycle.
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


def _is_colour(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(level in range(256) for level in value)


def classes_of(config: Any) -> dict[int, str]:
    """Return the names of the classes in the label maps of a model with this configuration, a `UperNetConfig`.

    A model of one class has two: 0 is the background.
    """
    if config.num_labels == 1:
        return {0: "background", 1: str(config.id2label[0])}
    return {index: str(config.id2label.get(index, f"class {index}")) for index in range(config.num_labels)}


def class_name(id2label: Mapping[int, str], index: int) -> str:
    """Return a class's name for display: one line, control characters escaped; `class N` if it has no name."""
    return printable(" ".join(str(id2label.get(index, "")).split())) or f"class {index}"

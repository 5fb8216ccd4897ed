"""The sizes to which an image processor resizes: fixed, by the shorter side, or inside a frame."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from fastuper.io.bounds import check_bounds
from fastuper.io.messages import shown

FORMS = (
    ("height", "width"),
    ("shortest_edge",),
    ("shortest_edge", "longest_edge"),
    ("max_height", "max_width"),
)
# Transformers' class accepts these, and fails when it resizes.
FORMS_WITHOUT_RESIZING = (("longest_edge",), ("min_pixels", "max_pixels"))
NAMES = sorted({name for form in (*FORMS, *FORMS_WITHOUT_RESIZING) for name in form})
HELP = (
    '{"height": ..., "width": ...}, {"shortest_edge": ...} (with or without "longest_edge") or '
    '{"max_height": ..., "max_width": ...}'
)


class SizeDict(dict[str, int]):
    """A dictionary whose keys are also attributes; an attribute of another form of size is None."""

    def __getattr__(self, name: str) -> int | None:
        if name in NAMES:
            return self.get(name)
        raise AttributeError(f"a size has no {name!r}; there are {', '.join(NAMES)}")


def checked_size(size: Any, square: bool = True) -> SizeDict:
    """Return a size as a dictionary of whole numbers.

    Args:
        size: a dictionary or Transformers' `SizeDict`, a pair (height, width), or one number.
        square: what one number is: the sides of a square, or with False the shorter side.

    Raises:
        ValueError: the size has no known form, or a number is less than 1 or larger than a side of a network's input.
    """
    given: Any = size
    try:
        if isinstance(size, (list, tuple)) and len(size) == 2:
            given = {"height": size[0], "width": size[1]}
        elif not isinstance(size, Mapping) and hasattr(size, "__index__"):
            given = {"height": size, "width": size} if square else {"shortest_edge": size}
        result = SizeDict({name: operator.index(value) for name, value in dict(given).items() if value is not None})
    except (TypeError, ValueError):
        result = SizeDict()
    if {*result} not in map(set, (*FORMS, *FORMS_WITHOUT_RESIZING)) or min(result.values()) < 1:
        raise ValueError(f"size is {shown(size)}; give {HELP}, each at least 1, or one number for a square")
    check_bounds(result)
    return result


def output_size(size: Mapping[str, int], height: int, width: int, divisor: int | None = None) -> tuple[int, int]:
    """Return the (height, width) to which an image is resized.

    Args:
        size: one of the forms of `HELP`.
        height: of the image.
        width: of the image.
        divisor: None to round as Transformers does. Otherwise the rule of Unified Perceptual Parsing's official code:
            with "shortest_edge", one factor for both sides, `min(shortest_edge / short, longest_edge / long)`, and
            both products truncated. Each side, of every form, is then rounded up to a multiple of `divisor`.

    Raises:
        ValueError: the size does not say, or a side would have no pixels.
    """
    short, long = min(height, width), max(height, width)
    if "height" in size:
        result = size["height"], size["width"]
    elif "max_height" in size:
        scale = min(size["max_height"] / height, size["max_width"] / width)
        result = int(height * scale), int(width * scale)
    elif "shortest_edge" in size and divisor is not None:
        # In floating point, as there: 600 / 900 * 900 may be just below 600.
        scale = size["shortest_edge"] / short
        if size.get("longest_edge") is not None:
            scale = min(scale, size["longest_edge"] / long)
        result = int(height * scale), int(width * scale)
    elif "shortest_edge" in size:
        edge = size["shortest_edge"]
        longest = size.get("longest_edge")
        if longest is not None and long / short * edge > longest:
            exact = longest * float(short) / long
            edge, other = round(exact), int(exact * long / short)
        else:
            other = int(edge * long / short)
        if longest is not None and edge == short:
            other = long
        result = (edge, other) if height <= width else (other, edge)
    else:
        raise ValueError(f"images cannot be resized to the size {dict(size)}; give {HELP}")
    if divisor is not None:
        result = -(-result[0] // divisor) * divisor, -(-result[1] // divisor) * divisor
    if min(result) < 1:
        raise ValueError(f"{height} x {width} (height x width) would have no pixels at the size {dict(size)}")
    return result

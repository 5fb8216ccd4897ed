"""Pictures of label maps: PNG files with class colours, and overlays on the photo with a legend."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from fastuper.data.classes import class_name
from fastuper_kernels.dispatch.files import atomic_path

OVERLAY_SIDE = 4096
"""The longest side of an overlay's photo. Larger photos are shrunk for the overlay; label maps keep their size."""

_TINY = 96  # the longer side up to which tiny photos are enlarged
_STRIP_LABELS = 1 << 20  # labels that are counted at a time
WHITE = (255, 255, 255)
INK = (32, 33, 36)
_FAINT = (128, 132, 138)


def class_shares(labels: ArrayLike, num_classes: int) -> NDArray[np.float64]:
    """Return the share of each class in a label map, (num_classes,) float64, summing to 1.

    Args:
        labels: (H, W) integers in [0, num_classes).
        num_classes: the number of classes.

    Raises:
        ValueError: a label is out of range, or the map is empty.
    """
    labels = checked_labels(labels, num_classes)
    counts = np.zeros(num_classes, dtype=np.int64)
    # bincount copies its argument as int64: 8 bytes a label.
    rows = max(1, _STRIP_LABELS // labels.shape[1])
    for start in range(0, len(labels), rows):
        counts += np.bincount(labels[start : start + rows].ravel(), minlength=num_classes)
    return counts / labels.size


def save_label_png(labels: ArrayLike, palette: ArrayLike, path: str | os.PathLike[str]) -> None:
    """Write a label map as a PNG whose pixel values are the class numbers; a failed write leaves no file.

    Up to 256 classes: 8 bits with the palette in the file (mode "P"). Viewers show the colours, and
    `np.asarray(Image.open(path))` gives the labels. More than 256 classes: 16-bit grey, the labels without colours.

    Args:
        labels: (H, W) integers in [0, N).
        palette: (N, 3) uint8, a colour for each class; N at most 65,536.
        path: the file to write.

    Raises:
        ValueError: a label is out of range, or there are more classes than 16 bits hold.
    """
    palette = np.asarray(palette, dtype=np.uint8)
    if len(palette) > 65536:
        raise ValueError(f"{len(palette):,} classes do not fit in a 16-bit PNG (65,536 at most)")
    labels = checked_labels(labels, len(palette))
    if len(palette) > 256:
        image = Image.fromarray(labels.astype(np.uint16, copy=False))
    else:
        image = Image.fromarray(labels.astype(np.uint8, copy=False))
        image.putpalette(palette.tobytes())
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def checked_labels(labels: ArrayLike, num_classes: int) -> NDArray[np.integer]:
    """Return a label map as an array, (H, W).

    Raises:
        ValueError: it is not a map of integers in [0, num_classes), or it is empty.
    """
    array = np.asarray(labels)
    if array.ndim != 2 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"a label map is (H, W) integers and not empty, got {array.dtype} of shape {array.shape}")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels run from {low} to {high}, but there are {num_classes} classes")
    return array


def overlay(
    photo: Image.Image,
    labels: ArrayLike,
    id2label: Mapping[int, str],
    palette: ArrayLike,
    alpha: float = 0.55,
    *,
    max_side: int = OVERLAY_SIDE,
) -> Image.Image:
    """Return the photo under the class colours, with a legend beside it: colour, name, share, largest first.

    Args:
        photo: the photo, RGB, of the labels' size.
        labels: (H, W) integers in [0, N).
        id2label: the class names.
        palette: (N, 3) uint8, a colour for each class.
        alpha: 0 shows the photo alone, 1 the colours alone.
        max_side: the longest side of the shown photo; larger photos are shrunk. Tiny photos are enlarged, so that
            they are visible beside the legend.

    Returns:
        An RGB image, as wide as photo and legend together and as high as the higher of both.

    Raises:
        ValueError: the sizes differ, or a label has no colour.
    """
    palette = np.asarray(palette, dtype=np.uint8)
    labels = checked_labels(labels, len(palette))
    if (photo.height, photo.width) != labels.shape:
        raise ValueError(f"the photo is {(photo.height, photo.width)} (height, width), its label map {labels.shape}")
    shares = class_shares(labels, len(palette))
    blended = blend(photo, labels, palette, alpha, max_side=max_side)
    font_size = max(13, round(max(blended.size) / 60))
    legend = draw_legend(class_lines(shares, id2label, palette, font_size, blended.height), font_size)
    picture = Image.new("RGB", (blended.width + legend.width, max(blended.height, legend.height)), WHITE)
    picture.paste(blended, (0, (picture.height - blended.height) // 2))
    picture.paste(legend, (blended.width, (picture.height - legend.height) // 2))
    return picture


def blend(
    photo: Image.Image, labels: ArrayLike, palette: ArrayLike, alpha: float = 0.55, *, max_side: int = OVERLAY_SIDE
) -> Image.Image:
    """Return the photo under the class colours, without a legend; for the arguments see `overlay`."""
    return tinted(resized(photo, max_side, _TINY), labels, palette, alpha)


def tinted(shown: Image.Image, labels: ArrayLike, palette: ArrayLike, alpha: float = 0.55) -> Image.Image:
    """Return a picture, of any size, under the class colours of a label map; for the arguments see `overlay`."""
    layer = np.asarray(palette, dtype=np.uint8)[resized_labels(labels, shown.height, shown.width)]
    return Image.blend(shown, Image.fromarray(layer), alpha)


def resized_labels(labels: ArrayLike, height: int, width: int) -> NDArray[np.integer]:
    """Return a label map (H, W) in another size, (height, width); each pixel has the label of a pixel of the map."""
    layer = np.asarray(labels)
    if layer.shape == (height, width):
        return layer
    rows = np.arange(height) * layer.shape[0] // height
    columns = np.arange(width) * layer.shape[1] // width
    return layer[rows[:, None], columns]


def resized(photo: Image.Image, max_side: int, min_side: int) -> Image.Image:
    """Return a photo as it is shown.

    Args:
        photo: the photo.
        max_side: a photo whose longer side exceeds this number of pixels is shrunk to it.
        min_side: a smaller photo is enlarged by the largest whole factor that keeps its longer side within this number.
    """
    width, height = photo.size
    longest = max(photo.size)
    if longest > max_side:
        size = max(1, round(width * max_side / longest)), max(1, round(height * max_side / longest))
        return photo.resize(size, Image.Resampling.BOX)
    factor = max(1, min_side // longest)
    return photo if factor == 1 else photo.resize((width * factor, height * factor), Image.Resampling.NEAREST)


class LegendLine(NamedTuple):
    """A line of a legend: a class's name and share, and its colour; None if it has no colour."""

    name: str
    share: float
    colour: tuple[int, ...] | None


def class_lines(
    shares: NDArray[np.float64], id2label: Mapping[int, str], palette: NDArray[np.uint8], font_size: int, height: int
) -> list[LegendLine]:
    """Return the lines of the classes that occur: 4 to 12, as they fit the height; the last sums up the rest."""
    present = [int(index) for index in np.argsort(-shares, kind="stable") if shares[index] > 0]
    most = min(12, max(4, (height - 2 * _margin(font_size)) // _line_height(font_size)))
    shown = present if len(present) <= most else present[: most - 1]
    others = present[len(shown) :]
    lines = [
        LegendLine(legend_name(id2label, index), float(shares[index]), tuple(palette[index].tolist()))
        for index in shown
    ]
    return lines + [LegendLine(f"{len(others)} others", float(shares[others].sum()), None)] * bool(others)


def draw_legend(lines: Sequence[LegendLine], font_size: int) -> Image.Image:
    """Draw a legend. If no line has a colour, there is no room for colours."""
    font = ImageFont.load_default(size=font_size)
    line, margin = _line_height(font_size), _margin(font_size)
    names = [_shortened(name, font, 14 * font_size) for name, _, _ in lines]
    percents = [format_share(share) for _, share, _ in lines]
    coloured = any(colour for _, _, colour in lines)
    swatch = round(font_size * 1.1)
    name_left = margin + (swatch + round(font_size * 0.6) if coloured else 0)
    name_width = max(font.getlength(name) for name in names)
    right = round(name_left + name_width + font_size * 1.5 + max(font.getlength(percent) for percent in percents))

    panel = Image.new("RGB", (right + margin, len(lines) * line + 2 * margin), WHITE)
    draw = ImageDraw.Draw(panel)
    for position, (name, percent, (_, _, colour)) in enumerate(zip(names, percents, lines, strict=True)):
        middle = margin + position * line + line // 2
        ink = INK if colour or not coloured else _FAINT
        if coloured:
            box = (margin, middle - swatch // 2, margin + swatch, middle - swatch // 2 + swatch)
            draw.rounded_rectangle(box, radius=swatch // 5, fill=colour, outline=_FAINT)
        draw.text((name_left, middle), name, font=font, fill=ink, anchor="lm")
        draw.text((right, middle), percent, font=font, fill=ink, anchor="rm")
    return panel


def _line_height(font_size: int) -> int:
    return round(font_size * 1.6)


def _margin(font_size: int) -> int:
    return round(font_size * 1.1)


def legend_name(id2label: Mapping[int, str], index: int) -> str:
    """Return a class's name in ASCII, the characters of Pillow's built-in font; `class N` if no letter is left."""
    decomposed = unicodedata.normalize("NFKD", class_name(id2label, index))
    name = "".join(letter for letter in decomposed if not unicodedata.combining(letter))
    name = name.encode("ascii", "replace").decode()
    return name if any(letter.isalnum() for letter in name) else f"class {index}"


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def format_share(share: float) -> str:
    """Write a share between 0 and 1 as a percentage with one decimal."""
    return "< 0.1 %" if 0 < share < 0.0005 else f"{share:.1%}".replace("%", " %")

"""Label maps as pictures: PNG files, and overlays with a legend."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from fastuper.data.classes import class_name
from fastuper_kernels.dispatch.files import atomic_path

OVERLAY_SIDE = 4096
"""The longest side of the photo in an overlay; larger photos are shrunk for it (their label maps never are)."""


_WHITE = (255, 255, 255)


_INK = (32, 33, 36)


_FAINT = (128, 132, 138)


def class_shares(labels: ArrayLike, num_classes: int) -> NDArray[np.float64]:
    """Return the share of each class in a label map, (num_classes,) float64, summing to 1.

    Args:
        labels: (H, W) integers in [0, num_classes).
        num_classes: how many classes there are.

    Raises:
        ValueError: a label is out of range, or the map is empty.
    """
    labels = _checked_labels(labels, num_classes)
    return np.bincount(labels.ravel(), minlength=num_classes) / labels.size


def save_label_png(labels: ArrayLike, palette: ArrayLike, path: str | os.PathLike[str]) -> None:
    """Write a label map as a PNG whose pixel values are the class numbers, whole or not at all.

    Up to 256 classes: 8 bit with the palette inside (mode "P"), so that a viewer shows the colours and
    `np.asarray(Image.open(path))` gives the labels. Above: 16-bit grey, the same labels without colours.

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
    labels = _checked_labels(labels, len(palette))
    if len(palette) > 256:
        image = Image.fromarray(labels.astype(np.uint16))
    else:
        image = Image.fromarray(labels.astype(np.uint8))
        image.putpalette(palette.tobytes())
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def _checked_labels(labels: ArrayLike, num_classes: int) -> NDArray[np.integer]:
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
    """Return the photo with each class in its colour, and a legend beside it: colour, name, share, largest first.

    Args:
        photo: the photo, RGB, of the labels' size.
        labels: (H, W) integers in [0, N).
        id2label: the class names.
        palette: (N, 3) uint8, a colour for each class.
        alpha: 0 shows the photo alone, 1 the colours alone.
        max_side: a photo that is larger is shrunk until its longer side is this long. Tiny photos are enlarged, so
            that they can be seen beside their legend.

    Returns:
        An RGB image, wider than the photo by the legend and at least as high as both.

    Raises:
        ValueError: the sizes differ, or a label has no colour.
    """
    palette = np.asarray(palette, dtype=np.uint8)
    labels = _checked_labels(labels, len(palette))
    if (photo.height, photo.width) != labels.shape:
        raise ValueError(f"the photo is {(photo.height, photo.width)} (height, width), its label map {labels.shape}")
    shares = class_shares(labels, len(palette))
    blended = blend(photo, labels, palette, alpha, max_side=max_side)
    font_size = max(13, round(max(blended.size) / 60))
    panel = _legend(shares, id2label, palette, font_size, blended.height)
    picture = Image.new("RGB", (blended.width + panel.width, max(blended.height, panel.height)), _WHITE)
    picture.paste(blended, (0, (picture.height - blended.height) // 2))
    picture.paste(panel, (blended.width, (picture.height - panel.height) // 2))
    return picture


def blend(
    photo: Image.Image, labels: ArrayLike, palette: ArrayLike, alpha: float = 0.55, *, max_side: int = OVERLAY_SIDE
) -> Image.Image:
    """Return the photo with each class in its colour, without a legend; the arguments are `overlay`'s."""
    palette = np.asarray(palette, dtype=np.uint8)
    labels = np.asarray(labels)
    size = _shown_size(photo.size, max_side)
    if size != photo.size:
        enlarged = size > photo.size
        rows = np.arange(size[1]) * photo.height // size[1]
        columns = np.arange(size[0]) * photo.width // size[0]
        labels = labels[rows[:, None], columns]
        photo = photo.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.BOX)
    return Image.blend(photo, Image.fromarray(palette[labels]), alpha)


def _shown_size(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    width, height = size
    longest = max(size)
    if longest > max_side:
        return max(1, round(width * max_side / longest)), max(1, round(height * max_side / longest))
    factor = max(1, 96 // longest)
    return width * factor, height * factor


def _legend(
    shares: NDArray[np.float64], id2label: Mapping[int, str], palette: NDArray[np.uint8], font_size: int, height: int
) -> Image.Image:
    """The panel beside a photo of this height: as many rows as fit it, from 4 to 12, the rest as one row of others."""
    font = ImageFont.load_default(size=font_size)
    row = round(font_size * 1.6)
    margin = round(font_size * 1.1)
    present = [int(index) for index in np.argsort(-shares, kind="stable") if shares[index] > 0]
    most = min(12, max(4, (height - 2 * margin) // row))
    shown = present if len(present) <= most else present[: most - 1]
    others = present[len(shown) :]

    rows: list[tuple[str, float, tuple[int, ...] | None]] = [
        (_legend_name(id2label, index), float(shares[index]), tuple(palette[index].tolist())) for index in shown
    ]
    if others:
        rows.append((f"{len(others)} others", float(shares[others].sum()), None))
    names = [_shortened(name, font, 14 * font_size) for name, _, _ in rows]
    percents = [format_share(share) for _, share, _ in rows]
    swatch = round(font_size * 1.1)
    name_left = margin + swatch + round(font_size * 0.6)
    name_width = max(font.getlength(name) for name in names)
    right = round(name_left + name_width + font_size * 1.5 + max(font.getlength(percent) for percent in percents))

    panel = Image.new("RGB", (right + margin, len(rows) * row + 2 * margin), _WHITE)
    draw = ImageDraw.Draw(panel)
    for position, (name, percent, (_, _, colour)) in enumerate(zip(names, percents, rows, strict=True)):
        middle = margin + position * row + row // 2
        box = (margin, middle - swatch // 2, margin + swatch, middle - swatch // 2 + swatch)
        draw.rounded_rectangle(box, radius=swatch // 5, fill=colour, outline=_FAINT)
        draw.text((name_left, middle), name, font=font, fill=_INK if colour else _FAINT, anchor="lm")
        draw.text((right, middle), percent, font=font, fill=_INK if colour else _FAINT, anchor="rm")
    return panel


def _legend_name(id2label: Mapping[int, str], index: int) -> str:
    """The class name in the characters that Pillow's built-in font has, which are ASCII's."""
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

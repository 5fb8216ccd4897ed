"""Photos in, pictures out: reading image files, class colours, label maps as PNG, and overlays with a legend."""

from __future__ import annotations

import colorsys
import json
import os
import threading
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from fastuper.io.hub import atomic_path, reason
from fastuper.scenes import street

MAX_PIXELS = 250_000_000
"""The largest photo that `read_image` decodes unless told otherwise: 750 MB of RGB."""

OVERLAY_SIDE = 4096
"""The longest side of the photo in an overlay; larger photos are shrunk for it (their label maps never are)."""

_GREY_TO_8_BIT = 257  # 65535 / 255: white stays white
_SPREAD = {"L;2": 85, "L;4": 17}  # greys of 2 and 4 bits: Pillow multiplies them, so that white is white
_WHITE = (255, 255, 255)
_INK = (32, 33, 36)
_FAINT = (128, 132, 138)

_pillow_limit = threading.Lock()


class ImageError(ValueError):
    """A file that is not a usable image; the message is one line with the file's name and the reason."""


def read_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file as 8-bit RGB, upright.

    The EXIF orientation is applied. Transparent pixels are laid over white. 16-bit grey is scaled to 8 bit (65535
    becomes 255); 1-bit, grey, palette, CMYK, YCbCr and HSV are converted. Of an animation or a file of several pages
    the first is read. Colour profiles are ignored.

    Args:
        path: the file; the format is told by its content, not by its name.
        max_pixels: the largest width x height that is decoded.

    Returns:
        An image in mode "RGB".

    Raises:
        ImageError: the file is missing, empty, truncated, not an image, too large, or of a kind that has no one
            conversion to 8 bit (32-bit integers and floats). One line that names the file, the reason and, where
            there is one, the remedy.
    """
    upright, file_format, _ = _decode(Path(path), max_pixels)
    try:
        return _to_rgb(upright, file_format)
    except ValueError as error:
        raise ImageError(f"{path}: {error}; save it as 8-bit RGB or 16-bit grey") from None


def read_labels(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> NDArray[np.integer]:
    """Read a label map: an image of one channel whose pixel values are class numbers.

    Grey of 1, 2, 4, 8 and 16 bits (of TIFF also 32), and palettes, of which the indices are taken and not the colours.
    The EXIF orientation is applied, as to the photo.

    Args:
        path: the file; the format is told by its content, not by its name.
        max_pixels: the largest width x height that is decoded.

    Returns:
        (H, W), uint8 for files of up to 8 bits, otherwise int32.

    Raises:
        ImageError: as `read_image`; or the file has several channels, holds fractions, or is a JPEG, whose values are
            not those that were saved.
    """
    upright, file_format, raw_mode = _decode(Path(path), max_pixels)
    if file_format in ("JPEG", "MPO"):
        raise ImageError(f"{path}: is a JPEG, whose values are not those that were saved; save label maps as PNG")
    if len(upright.getbands()) > 1:
        raise ImageError(
            f"{path}: has the {len(upright.getbands())} channels {', '.join(upright.getbands())}, where one of class "
            "numbers is expected; give each colour its number and save it as an 8-bit grey or palette PNG"
        )
    if upright.mode == "F":
        raise ImageError(f"{path}: holds 32-bit floats, where class numbers are expected; save it as an 8-bit grey PNG")
    labels = np.array(upright, dtype=np.uint8 if upright.mode in ("1", "L", "P") else np.int32)
    return labels // _SPREAD.get(raw_mode[:3], 1)


def _decode(path: Path, max_pixels: int) -> tuple[Image.Image, str | None, str]:
    """Return a file's first picture, upright, in the mode it has; its format; and what Pillow calls its pixels."""
    try:
        if path.is_dir():
            raise ImageError(f"{path}: is a folder, not an image")
        if path.stat().st_size == 0 and path.is_file():
            raise ImageError(f"{path}: the file is empty")
        if not path.is_file():
            raise ImageError(f"{path}: is not a regular file")
        with _open(path) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(
                    f"{path}: {width} x {height} = {width * height:,} pixels is over the limit of {max_pixels:,}; "
                    "a larger one is read with max_pixels=N (--max-pixels N)"
                )
            tiles = getattr(image, "tile", None)  # gone once it is loaded
            arguments = tiles[0][3] if tiles else None
            raw_mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
            image.load()
            return ImageOps.exif_transpose(image), image.format, raw_mode if isinstance(raw_mode, str) else ""
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except PermissionError:
        raise ImageError(f"{path}: no permission to read it") from None
    except Image.UnidentifiedImageError:
        raise ImageError(f"{path}: is not an image in a format that can be read here") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, EOFError, struct.error, ...
        raise ImageError(f"{path}: cannot be decoded ({reason(error)}); the file is truncated or damaged") from error


def _open(path: Path) -> Image.Image:
    """`Image.open` without Pillow's own limit on pixels (a module-wide one, too low for a 200-megapixel photo)."""
    with _pillow_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _to_rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    # Older Pillow opens 16-bit PNG as 32-bit integers, and so does every Pillow 16-bit PGM.
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.uint32)
        grey = (values + _GREY_TO_8_BIT // 2) // _GREY_TO_8_BIT
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"holds 32-bit {'integers' if image.mode == 'I' else 'floats'}, whose range is not known")
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), with_alpha).convert("RGB")
    return image.convert("RGB")


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


def class_name(id2label: Mapping[int, str], index: int) -> str:
    """Return the name of a class on one line, "class N" where it has none."""
    return " ".join(str(id2label.get(index, "")).split()) or f"class {index}"


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

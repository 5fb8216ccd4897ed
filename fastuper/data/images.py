"""The decoder of photos and the decoder of label maps, and their one rule for every kind of pixel.

The command line, `UperNetImageProcessor`, `FolderDataset` and `as_samples` read images through this file. A picture
therefore has the same pixels in all of them, whether it comes as a file or as an open PIL image.

A photo becomes 8-bit RGB:

- 8-bit RGB and grey, 1-bit, palette, CMYK, YCbCr, LAB and HSV: by Pillow's conversion to RGB.
- Alpha (RGBA, LA, PA, transparent palette entries, a transparent colour): dropped. A pixel has the colour that is
  stored in the file, also where it is transparent.
- 16-bit grey (PNG, TIFF, PGM): scaled, round(value / 257), so that 65535 becomes 255.
- 32-bit integers and floats (modes I and F): refused, since no value stands for white.
- EXIF orientation: applied to files. An open image keeps its orientation, as does the label map beside it.
- Colour profiles: ignored. Of an animation or a file of several pages, the first picture counts.

Transformers' `SegformerImageProcessor` (5.x) reads the same pixels from a file, bit for bit, with two exceptions: it
clips 16-bit grey and 32-bit values at 255, which makes nearly every pixel white.

A label map becomes integers, the numbers stored in the file:

- Grey of 1, 2, 4, 8 and 16 bits, 32-bit integers: the values. An open image of 2-bit or 4-bit grey has Pillow's values
  instead, which are multiples of 85 or 17.
- Palettes: the indices, never the colours.
- Several channels, and files of floats: refused. JPEG files: refused, since compression changes the values.
- EXIF orientation: applied to files, as to the photo.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fastuper.io.messages import reason


class Format(NamedTuple):
    """A format of image files that is read.

    Attributes:
        name: Pillow's name.
        suffixes: the endings of file names that are taken for this format; the content decides.
        keeps_numbers: files hold one channel of exact numbers, and so label maps.
    """

    name: str
    suffixes: tuple[str, ...]
    keeps_numbers: bool


FORMATS = (
    Format("JPEG", (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), False),
    Format("PNG", (".png", ".apng"), True),
    Format("WEBP", (".webp",), False),
    Format("AVIF", (".avif",), False),
    Format("TIFF", (".tif", ".tiff"), True),
    Format("BMP", (".bmp",), True),
    Format("GIF", (".gif",), True),
    Format("PPM", (".ppm", ".pgm", ".pbm", ".pnm"), True),
    Format("JPEG2000", (".jp2", ".j2k"), False),
)
"""The formats that are read. No other format is opened."""

IMAGE_SUFFIXES = tuple(suffix for format in FORMATS for suffix in format.suffixes)
"""The endings of photos, in lower case."""

LABEL_SUFFIXES = tuple(suffix for format in FORMATS if format.keeps_numbers for suffix in format.suffixes)
"""The endings of label maps, in lower case."""

MAX_PIXELS = 250_000_000
"""The default limit on width x height of a decoded image: 750 MB of RGB."""

_GREY_TO_8_BIT = 257  # 65535 / 255
_SPREAD = {"L;2": 85, "L;4": 17}  # Pillow's factors for grey of 2 and 4 bits, whose largest value becomes 255
_pillow_limit = threading.Lock()


class ImageError(ValueError, OSError):
    """An image that cannot be used. The message is one line with the file's name, the fault and the remedy."""


class _MissingImageError(ImageError, FileNotFoundError):
    """The image's file does not exist."""


def read_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a photo as 8-bit RGB, upright, by the rule in this module's docstring.

    Args:
        path: the file. Its content determines the format, its name does not.
        max_pixels: the limit on width x height.

    Returns:
        An image in mode "RGB".

    Raises:
        ImageError: the file is missing (then also a FileNotFoundError), empty, damaged, no image, larger than the
            limit, or holds 32-bit integers or floats.
    """
    return as_rgb(open_image(path, max_pixels=max_pixels), str(path))


def read_labels(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> NDArray[np.integer]:
    """Read a label map, upright, by the rule in this module's docstring.

    Args:
        path: the file. Its content determines the format, its name does not.
        max_pixels: the limit on width x height.

    Returns:
        (H, W): uint8 for files of up to 8 bits, otherwise int32.

    Raises:
        ImageError: as in `read_image`, or the file has several channels, holds floats, or is a JPEG.
    """
    image, file_format, raw_mode = _decode(Path(path), max_pixels)
    if file_format in ("JPEG", "MPO"):
        raise ImageError(f"{path}: is a JPEG, whose compression changes class numbers; save label maps as PNG")
    return as_labels(image, str(path)) // _SPREAD.get(raw_mode[:3], 1)


def open_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file, upright, in the mode of the file; `as_rgb`, `as_grey` and `as_labels` convert it.

    Raises:
        ImageError: the file is missing (then also a FileNotFoundError), empty, damaged, no image, or larger than the
            limit.
    """
    return _decode(Path(path), max_pixels)[0]


def as_rgb(image: Image.Image, name: str) -> Image.Image:
    """Return an open image as 8-bit RGB; errors call it `name`.

    Raises:
        ImageError: the image holds 32-bit integers or floats, or Pillow cannot convert its mode.
    """
    image = _as_16_bits(image, image.format)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255.
        values = np.asarray(image).astype(np.uint32)
        grey = (values + _GREY_TO_8_BIT // 2) // _GREY_TO_8_BIT
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if holds_32_bits(image):
        kind = "integers" if image.mode == "I" else "floats"
        raise ImageError(
            f"{name}: holds 32-bit {kind}, mode {image.mode}, in which no value stands for white; scale them to 8 or "
            "16 bits and save it as 8-bit RGB or 16-bit grey"
        )
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; Pillow warns of the direct conversion
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(
            f"{name}: has mode {image.mode}, which Pillow cannot make RGB ({reason(error)}); save it as 8-bit RGB"
        ) from None


def as_grey(image: Image.Image, name: str) -> Image.Image:
    """Return an open image as 8-bit grey, mode "L": Pillow's grey of its RGB colours.

    Raises:
        ImageError: as in `as_rgb`.
    """
    return image if image.mode == "L" else as_rgb(image, name).convert("L")


def as_labels(image: Image.Image, name: str) -> NDArray[np.integer]:
    """Return the class numbers of an open image; errors call it `name`.

    Returns:
        (H, W): uint8 for modes 1, L and P, otherwise int32.

    Raises:
        ImageError: the image has several channels or holds floats.
    """
    channels = image.getbands()
    if len(channels) > 1:
        raise ImageError(
            f"{name}: has the {len(channels)} channels {', '.join(channels)}, but a label map has one channel; "
            "give each colour its number and save it as an 8-bit grey or palette PNG"
        )
    if image.mode == "F":
        raise ImageError(f"{name}: holds 32-bit floats, where class numbers are expected; save it as an 8-bit grey PNG")
    return np.array(image, dtype=np.uint8 if image.mode in ("1", "L", "P") else np.int32)


def holds_32_bits(image: Image.Image) -> bool:
    """Return True for 32-bit integers and floats, False for 16-bit grey that Pillow opened as 32-bit integers."""
    return image.mode in ("I", "F") and not _is_16_bit_file(image.mode, image.format)


def image_size(image: Any) -> tuple[int, int]:
    """Return (height, width) of a PIL image or of an array (H, W, ...)."""
    return (image.height, image.width) if isinstance(image, Image.Image) else tuple(image.shape[:2])


def _decode(path: Path, max_pixels: int) -> tuple[Image.Image, str | None, str]:
    """Decode a file.

    Returns:
        The first picture, upright; the file's format; Pillow's name for the layout of its pixels ("L;4"), or "".
    """
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
                    "max_pixels=N (--max-pixels N) raises it"
                )
            tiles = getattr(image, "tile", None)  # Pillow clears the list when it decodes the pixels
            arguments = tiles[0][3] if tiles else None
            raw_mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
            image.load()
            upright = _as_16_bits(ImageOps.exif_transpose(image), image.format)
            return upright, image.format, raw_mode if isinstance(raw_mode, str) else ""
    except ImageError:
        raise
    except FileNotFoundError:
        raise _MissingImageError(f"{path}: no such file") from None
    except PermissionError:
        raise ImageError(f"{path}: no permission to read it") from None
    except Image.UnidentifiedImageError:
        raise ImageError(f"{path}: is not an image in a format that Pillow can read here") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, EOFError, struct.error, ...
        raise ImageError(f"{path}: cannot be decoded ({reason(error)}); the file is truncated or damaged") from error


def _open(path: Path) -> Image.Image:
    """Open a file without Pillow's own limit on pixels: it is global, and too low for a 200-megapixel photo."""
    with _pillow_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _as_16_bits(image: Image.Image, file_format: str | None) -> Image.Image:
    """Return 16-bit grey in a 16-bit mode; Pillow opens PGM, and PNG in old versions, as 32-bit integers."""
    if _is_16_bit_file(image.mode, file_format):
        return Image.fromarray(np.asarray(image).astype(np.uint16))
    return image


def _is_16_bit_file(mode: str, file_format: str | None) -> bool:
    return mode == "I" and file_format in ("PNG", "PPM")

"""The decoder of photos and the decoder of label maps, and their one rule for every kind of pixel.

The command line, `UperNetImageProcessor`, `FolderDataset` and `as_samples` read images through this file. A picture
therefore has the same pixels in all of them, whether it comes as a file or as an open PIL image.

Files in the formats of `fastuper.data.formats` are read, others are refused by name. One limit, `max_pixels`, holds
for all formats before anything is decoded; Pillow's own limit has no effect. (The decoder of AVIF has a second limit
of 268 megapixels. It alone holds for a damaged file whose header names a smaller picture than it contains.)

A photo becomes 8-bit RGB:

- 8-bit RGB and grey, 1-bit, palette, CMYK, YCbCr, LAB and HSV: by Pillow's conversion to RGB.
- Alpha (RGBA, LA, PA, transparent palette entries, a transparent colour): dropped. A pixel has the colour that is
  stored in the file, also where it is transparent. Colours that are multiplied by alpha (modes RGBa and La, TIFF files
  that say so) are divided by it first.
- Further channels of a TIFF (a fourth band without a meaning): dropped.
- Grey of other ranges is scaled: 16-bit grey (PNG, TIFF, JPEG 2000), round(value / 257), so that 65535 becomes 255;
  12-bit grey (TIFF); PGM and PPM by their largest value. In a TIFF whose 0 is white, and in PBM, the photo is bright
  where the numbers are small.
- 16-bit colours: the high byte, value // 256.
- Signed integers, 32-bit integers and floats (modes I and F): refused, since no value stands for white.
- EXIF orientation: applied to files. An open image keeps its orientation, as does the label map beside it.
- Colour profiles: ignored. Of an animation or a file of several pages, the first picture counts.

Transformers' `SegformerImageProcessor` (5.x) reads the same pixels from a file, bit for bit, with these exceptions: it
clips 16-bit grey and 32-bit values at 255, which makes nearly every pixel white; it inverts no 16-bit TIFF whose 0 is
white; it takes the palette of a TIFF for 16 bits also where it has 8; it mixes up the pixels of uncompressed TIFF files
of one or four channels that EXIF data turn. What Pillow is known to misread is refused by name: see `read_layout` in
`fastuper.data.tiff`, and `fastuper.data.headers`.

A label map becomes integers, the numbers stored in the file:

- Grey of 1, 2, 4, 8, 12, 16 and 32 bits: the values, whatever stands for white, and without scaling. An open image has
  Pillow's values instead: its 2-bit and 4-bit grey are multiples of 85 or 17, its PGM is scaled to 255 or 65535.
- Palettes: the indices, never the colours.
- Several channels, and files of floats: refused. JPEG, WebP, AVIF and JPEG 2000 files, and TIFF files compressed as
  JPEG: refused, since compression changes the values.
- EXIF orientation: applied to files, as to the photo.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ImageFile import ImageFile

from fastuper.data import headers, netpbm, png, tiff
from fastuper.data.formats import FORMATS, OTHER_PHOTOS, Format, RefusedError, identify, one_channel
from fastuper.io.messages import reason

IMAGE_SUFFIXES = (*(suffix for form in FORMATS for suffix in form.suffixes), *OTHER_PHOTOS)
"""The endings of photos, in lower case. Files of some are refused by name, so that a folder reports them."""

LABEL_SUFFIXES = tuple(suffix for form in FORMATS if form.keeps_numbers for suffix in form.suffixes)
"""The endings of label maps, in lower case."""

MAX_PIXELS = 250_000_000
"""The default limit on width x height of a decoded image: 750 MB of RGB."""

_GREY_TO_8_BIT = 257  # 65535 / 255
_SPREAD = {"L;2": 85, "L;4": 17}  # Pillow's factors for grey of 2 and 4 bits, whose largest value becomes 255
_ROWS = 256  # rows of 16-bit grey that are scaled at a time
_ORIENTATION = 0x0112  # EXIF's tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_UNSUPPORTED = re.compile("unsupported|not supported|cannot handle", re.IGNORECASE)  # in Pillow's messages
_pillow_limit = threading.Lock()


class ImageError(ValueError, OSError):
    """An image that cannot be used. The message is one line with the file's name, the fault and the remedy."""


class _MissingImageError(ImageError, FileNotFoundError):
    """The image's file does not exist."""


def read_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a photo as 8-bit RGB, upright, by the rule in this module's docstring.

    Args:
        path: the file. Its content determines the format; its name only of TGA.
        max_pixels: the limit on width x height.

    Returns:
        An image in mode "RGB".

    Raises:
        ImageError: the file is missing (then also a FileNotFoundError), empty, damaged, in no format that is read,
            larger than the limit, or holds signed or 32-bit integers or floats.
    """
    return as_rgb(_read(Path(path), max_pixels, partial(_photo, alpha=False)), str(path))


def read_labels(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> NDArray[np.integer]:
    """Read a label map, upright, by the rule in this module's docstring.

    Args:
        path: the file. Its content determines the format; its name only of TGA.
        max_pixels: the limit on width x height.

    Returns:
        (H, W): uint8 for files of up to 8 bits, int64 for numbers from 2**31, otherwise int32.

    Raises:
        ImageError: the file is missing (then also a FileNotFoundError), empty, damaged, in no format that is read,
            larger than the limit, has several channels, holds floats, or is compressed in a way that changes numbers.
    """
    return _read(Path(path), max_pixels, _labels)


def open_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a photo, upright, in a mode that fits its file; `as_rgb` and `as_grey` convert it.

    Raises:
        ImageError: the file is missing (then also a FileNotFoundError), empty, damaged, in no format that is read, or
            larger than the limit.
    """
    return _read(Path(path), max_pixels, _photo)


def as_rgb(image: Image.Image, name: str) -> Image.Image:
    """Return an open image as 8-bit RGB; errors call it `name`.

    Raises:
        ImageError: the image holds signed or 32-bit integers or floats, or Pillow cannot convert its mode.
    """
    image = _as_16_bits(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255.
        grey = np.empty(image.size[::-1], np.uint8)
        for row in range(0, image.height, _ROWS):
            values = np.asarray(image.crop((0, row, image.width, min(row + _ROWS, image.height))))
            grey[row : row + _ROWS] = (values.astype(np.uint32) + _GREY_TO_8_BIT // 2) // _GREY_TO_8_BIT
        return Image.fromarray(grey).convert("RGB")
    if holds_32_bits(image):
        kind = "integers" if image.mode == "I" else "floats"
        raise ImageError(
            f"{name}: holds 32-bit {kind}, mode {image.mode}, in which no value stands for white; scale them to 8 or "
            "16 bits and save it as 8-bit RGB or 16-bit grey"
        )
    if image.mode == "P" and "transparency" in image.info:
        image = image.copy()
        del image.info["transparency"]  # Pillow warns of it, and does not need it
    if image.mode in ("RGBa", "La"):
        image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
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
    try:
        return _numbers(image)
    except RefusedError as error:
        raise ImageError(f"{name}: {error}") from None


def holds_32_bits(image: Image.Image) -> bool:
    """Return True for 32-bit integers and floats, False for 16-bit grey that Pillow opened as 32-bit integers."""
    return image.mode in ("I", "F") and not _is_16_bit_file(image)


def image_size(image: Any) -> tuple[int, int]:
    """Return (height, width) of a PIL image or of an array (H, W, ...)."""
    return (image.height, image.width) if isinstance(image, Image.Image) else tuple(image.shape[:2])


def _read(path: Path, max_pixels: int, decode: Callable[[BinaryIO, Format, Callable[[int, int], None]], Any]) -> Any:
    """Return what `decode` makes of a file, its format and a check of its size; errors become an ImageError."""

    def check_size(width: int, height: int) -> None:
        if width * height > max_pixels:
            raise RefusedError(
                f"{width} x {height} = {width * height:,} pixels is over the limit of {max_pixels:,}; "
                "max_pixels=N (--max-pixels N) raises it"
            )

    try:
        if path.is_dir():
            raise RefusedError("is a folder, not an image")
        status = path.stat()
        if not path.is_file():
            raise RefusedError("is not a regular file")
        if status.st_size == 0:
            raise RefusedError("the file is empty")
        file = path.open("rb")
    except RefusedError as error:
        raise ImageError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise _MissingImageError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: {_system_reason(error)}") from None
    with file:
        try:
            form = identify(path, file.read(64))
            return decode(file, form, check_size)
        except RefusedError as error:
            raise ImageError(f"{path}: {error}") from None
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, EOFError, struct.error
            if isinstance(error, OSError) and error.errno is not None:
                raise ImageError(f"{path}: {_system_reason(error)}") from None
            text = reason(error)
            rest = "save it as PNG" if _UNSUPPORTED.search(text) else "the file is truncated or damaged"
            raise ImageError(f"{path}: cannot be decoded ({text}); {rest}") from error


def _system_reason(error: OSError | ValueError) -> str:
    if isinstance(error, PermissionError):
        return "no permission to read it"
    text = error.strerror if isinstance(error, OSError) else None
    return f"cannot be read ({text or reason(error)})"


def _photo(file: BinaryIO, form: Format, check_size: Callable[[int, int], None], *, alpha: bool = True) -> Image.Image:
    """Decode a photo, upright, without its metadata; without `alpha`, where the decoder can leave it out."""
    if form.name == "PPM":
        return netpbm.read(file, check_size).photo()
    image, layout, _ = _pillow(file, form, check_size, "photo" if alpha else "colours")
    # Pillow turns TIFF files itself.
    image = _as_16_bits(_upright(image)) if layout is None else layout.photo(image)
    if image.mode == "LA" and not alpha:
        return image.getchannel("L")
    # The pixels as an image of their own: a converted copy would take the memory of the photo again.
    bare = image._new(image.im)
    bare.info = {}
    return bare


def _labels(file: BinaryIO, form: Format, check_size: Callable[[int, int], None]) -> NDArray[np.integer]:
    """Decode a label map, upright."""
    if not form.keeps_numbers:
        raise RefusedError(f"is {form.name}, whose compression changes class numbers; save label maps as PNG")
    if form.name == "PPM":
        values = netpbm.read(file, check_size).values
        one_channel("RGB" if values.ndim == 3 else "L")
        return values.astype(np.uint8 if values.dtype == np.uint8 else np.int32)
    image, layout, raw_mode = _pillow(file, form, check_size, "labels")
    if layout is not None:
        return layout.labels(image)
    return _numbers(_upright(image)) // _SPREAD.get(raw_mode[:3], 1)


def _numbers(image: Image.Image) -> NDArray[np.integer]:
    one_channel(image.getbands(), floats=image.mode == "F")
    return np.array(image, dtype=np.uint8 if image.mode in ("1", "L", "P") else np.int32)


def _pillow(
    file: BinaryIO, form: Format, check_size: Callable[[int, int], None], what: Literal["photo", "colours", "labels"]
) -> tuple[Image.Image, tiff.Layout | None, str]:
    """Decode a file with Pillow.

    Returns:
        The first picture; a TIFF's layout; Pillow's name for the layout of the pixels ("L;4"), or "".
    """
    layout, stream = None, file
    if form.name == "TIFF":
        layout = tiff.read_layout(file)
        check_size(layout.width, layout.height)
        if what == "labels":
            layout.check_labels()
    elif form.name == "PNG":
        stream = png.pixels_only(file)
    elif form.name == "WEBP":
        headers.check_webp(file, check_size)
    elif form.name == "JPEG2000":
        headers.check_jpeg2000(file)
    with _opened(stream, form) as image:
        check_size(*image.size)
        if form.name == "BMP":
            headers.check_bmp(file, image.mode)
        if layout is not None:  # else Pillow compares the size with its own limit again
            image.im = Image.new(image.mode, (layout.width, layout.height)).im
        arguments = image.tile[0][3] if image.tile else None  # Pillow clears the list when it decodes the pixels
        raw_mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
        if what == "colours" and form.name == "PNG" and str(raw_mode).startswith("RGBA"):
            # Pillow has the unpackers of this; a copy of the colours would take their memory again.
            image._mode = "RGB"
            image.tile = [image.tile[0]._replace(args=str(raw_mode).replace("RGBA", "RGBX"))]
        image.load()
        return image, layout, raw_mode if isinstance(raw_mode, str) else ""


@contextmanager
def _opened(stream: BinaryIO, form: Format) -> Iterator[ImageFile]:
    """Open a file without Pillow's own limit on pixels: it is global, and too low for a 200-megapixel photo."""
    with _pillow_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(stream, formats=[form.name])
        except KeyError:
            raise RefusedError(
                f"is {form.name}, which the installed Pillow cannot read; install a newer Pillow, or save it as PNG"
            ) from None
        except Image.UnidentifiedImageError:  # its message names the stream
            raise ValueError(f"Pillow cannot read its {form.name} header") from None
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with image:
        yield image


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF data says; damaged data count as none."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow's readers of metadata raise anything
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _as_16_bits(image: Image.Image) -> Image.Image:
    """Return 16-bit grey in a 16-bit mode; Pillow opens PGM, and PNG in old versions, as 32-bit integers."""
    if _is_16_bit_file(image):
        return Image.fromarray(np.asarray(image).astype(np.uint16))
    return image


def _is_16_bit_file(image: Image.Image) -> bool:
    return image.mode == "I" and image.format in ("PNG", "PPM")

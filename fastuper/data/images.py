"""The decoder of photos and the decoder of label maps."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fastuper.data.overlay import _WHITE
from fastuper.io.messages import reason

MAX_PIXELS = 250_000_000
"""The largest photo that `read_image` decodes unless told otherwise: 750 MB of RGB."""


_GREY_TO_8_BIT = 257  # 65535 / 255: white stays white


_SPREAD = {"L;2": 85, "L;4": 17}  # greys of 2 and 4 bits: Pillow multiplies them, so that white is white


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

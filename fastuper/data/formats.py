"""The formats of image files that are read, and the names of others.

A file's first bytes determine its format. Pillow can open some fifty formats: some of its readers start programs
(EPS), or decode pictures before their size is known (ICO, ICNS, IPTC). Only the formats in `FORMATS` are opened. Others
are refused by name, without reading further. TGA files have no first bytes of their own, so their ending counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class RefusedError(ValueError):
    """A file that is not read. The message has the reason and the remedy, without the file's name."""


class Format(NamedTuple):
    """A format of image files that is read.

    Attributes:
        name: Pillow's name.
        suffixes: the usual endings of such files, in lower case.
        starts: the first bytes of such files ("." is any byte); empty if the ending determines the format.
        keeps_numbers: files may hold one channel of exact numbers, and so a label map.
    """

    name: str
    suffixes: tuple[str, ...]
    starts: tuple[bytes, ...]
    keeps_numbers: bool


FORMATS = (
    Format("JPEG", (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), (b"\xff\xd8\xff",), False),
    Format("PNG", (".png", ".apng"), (b"\x89PNG\r\n\x1a\n",), True),
    Format("WEBP", (".webp",), (b"RIFF....WEBP",), False),
    Format("AVIF", (".avif",), (b"....ftypavif", b"....ftypavis"), False),
    Format("TIFF", (".tif", ".tiff"), (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), True),
    Format("BMP", (".bmp",), (b"BM",), True),
    Format("GIF", (".gif",), (b"GIF87a", b"GIF89a"), True),
    Format("PPM", (".ppm", ".pgm", ".pbm", ".pnm"), tuple(b"P%d" % kind for kind in range(1, 7)), True),
    Format("JPEG2000", (".jp2", ".j2k"), (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"), False),
    Format("TGA", (".tga",), (), True),
)
"""The formats that are read."""

OTHER_PHOTOS = (".heic", ".heif", ".jxl")
"""Endings of photos in formats that are not read: in a folder of photos they are reported, not left out."""

_ISO_MEDIA = b"....ftyp"
_OTHERS = (
    ("HEIC", (b"....ftyphei", b"....ftyphev", b"....ftypmif1", b"....ftypmsf1")),
    ("JPEG XL", (b"\xff\x0a", b"\0\0\0\x0cJXL ")),
    ("a video", (_ISO_MEDIA, b"\x1aE\xdf\xa3", b"RIFF....AVI ", b"\0\0\x01\xba", b"\0\0\x01\xb3")),
    ("EPS or PostScript", (b"%!", b"\xc5\xd0\xd3\xc6")),
    ("PDF", (b"%PDF",)),
    ("SVG or XML", (b"<svg", b"<?xml", b"\xef\xbb\xbf<")),
    ("HTML, a web page", (b"<!DOCTYPE", b"<!doctype", b"<html", b"<HTML")),
    ("PSD", (b"8BPS",)),
    ("ICO", (b"\0\0\x01\0",)),
    ("CUR", (b"\0\0\x02\0",)),
    ("ICNS", (b"icns",)),
    ("WMF or EMF", (b"\xd7\xcd\xc6\x9a", b"\x01\0\x09\0", b"\x01\0\0\0")),
    ("DDS", (b"DDS ",)),
    ("OpenEXR", (b"v/1\x01",)),
    ("Radiance HDR", (b"#?RADIANCE", b"#?RGBE")),
    ("FITS", (b"SIMPLE  ",)),
    ("HDF5", (b"\x89HDF\r\n\x1a\n",)),
    ("GRIB", (b"GRIB",)),
    ("BUFR", (b"BUFR",)),
    ("an OLE file (FPX, MIC)", (b"\xd0\xcf\x11\xe0",)),
    ("a ZIP archive", (b"PK\x03\x04",)),
    ("a NumPy array", (b"\x93NUMPY",)),
    ("PAM or PFM", (b"P7", b"Pf", b"PF")),
    ("Pillow's own PNM", (b"PyP", b"PyRGBA", b"PyCMYK", b"P0CMYK")),
    ("QOI", (b"qoif",)),
    ("BLP", (b"BLP",)),
    ("FTEX", (b"FTEX",)),
    ("Sun raster", (b"\x59\xa6\x6a\x95",)),
    ("SGI", (b"\x01\xda",)),
    ("MSP", (b"DanM", b"LinS")),
    ("XPM", (b"/* XPM */",)),
    ("XBM", (b"#define",)),
    ("IPTC", (b"\x1c\x01", b"\x1c\x02", b"\x1c\x03", b"\x1c\x08")),
    ("PCX", (b"\x0a.\x01",)),
    ("DCX", (b"\xb1\x68\xde\x3a",)),
    ("Git LFS's pointer to a file, which was not downloaded", (b"version https://git-lfs",)),
)
"""Names of formats that are not read, with their first bytes ("." is any byte); the first that fits counts."""

_NAMES = {".pcd": "PCD", ".dib": "DIB", ".im": "IM", ".spider": "SPIDER", ".dcm": "DICOM"}
"""Formats without first bytes of their own, by their endings."""


def identify(path: Path, start: bytes) -> Format:
    """Return the format of a file that begins with `start`, its first 64 bytes or more.

    Raises:
        RefusedError: the format is not read. The message has its name, if it is known.
    """
    for form in FORMATS:
        if any(_fits(start, pattern) for pattern in form.starts):
            return form
    if _fits(start, _ISO_MEDIA) and {b"avif", b"avis"} & _brands(start):
        return next(form for form in FORMATS if form.name == "AVIF")
    for form in FORMATS:
        if not form.starts and path.suffix.lower() in form.suffixes:
            return form
    names = [name for name, patterns in _OTHERS if any(_fits(start, pattern) for pattern in patterns)]
    name = _NAMES.get(path.suffix.lower()) or next(iter(names), None)
    known = ", ".join(form.name for form in FORMATS)
    if name is None:
        raise RefusedError(
            f"is not an image in a format that Pillow can read, of those read here ({known}); save it as PNG or JPEG"
        )
    raise RefusedError(f"is {name}, which is not read here; save it as PNG or JPEG (formats: {known})")


def one_channel(channels: Sequence[str], *, floats: bool = False) -> None:
    """Raise RefusedError if a label map has several channels or holds floats.

    Args:
        channels: the names of the channels.
        floats: True if the numbers are floats.
    """
    if len(channels) > 1:
        raise RefusedError(
            f"has the {len(channels)} channels {', '.join(channels)}, but a label map has one channel; "
            "give each colour its number and save it as an 8-bit grey or palette PNG"
        )
    if floats:
        raise RefusedError("holds 32-bit floats, where class numbers are expected; save it as an 8-bit grey PNG")


def _fits(start: bytes, pattern: bytes) -> bool:
    return len(start) >= len(pattern) and all(
        wanted in (ord("."), byte) for wanted, byte in zip(pattern, start, strict=False)
    )


def _brands(start: bytes) -> set[bytes]:
    """Return the brands that a file of the ISO media family names in its first box."""
    end = min(len(start), int.from_bytes(start[:4], "big"))
    return {start[8:12], *(start[at : at + 4] for at in range(16, end - 3, 4))}

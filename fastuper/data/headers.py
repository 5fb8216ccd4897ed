"""Checks of headers before Pillow opens a file: sizes for which its readers allocate, layouts that they misread."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import BinaryIO

from fastuper.data.formats import RefusedError

_SMALLEST_START_OF_CODE = b"\xff\x4f\xff\x51"  # of a JPEG 2000 picture
_SEARCHED = 1 << 16  # bytes in which it is looked for


def check_webp(file: BinaryIO, check_size: Callable[[int, int], None]) -> None:
    """Check the size of a WebP picture, whose decoder allocates all memory when it is opened."""
    file.seek(0)
    start = file.read(30)
    if len(start) < 30:
        raise ValueError("its header is missing")
    kind = start[12:16]
    if kind == b"VP8X":
        check_size(*(1 + int.from_bytes(start[at : at + 3], "little") for at in (24, 27)))
    elif kind == b"VP8L":
        packed = int.from_bytes(start[21:25], "little")
        check_size(1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF))
    else:
        check_size(*(size & 0x3FFF for size in struct.unpack_from("<HH", start, 26)))


def check_jpeg2000(file: BinaryIO) -> None:
    """Refuse JPEG 2000 pictures that Pillow misreads: few bits (too dark), colours of 16 bits (white becomes black)."""
    file.seek(0)
    start = file.read(_SEARCHED)
    at = start.find(_SMALLEST_START_OF_CODE)
    if at < 0 or len(start) < at + 44:
        raise RefusedError("is a JPEG 2000 picture behind a large header; save it as PNG or JPEG")
    (channels,) = struct.unpack_from(">H", start, at + 40)
    depths = sorted({start[at + 42 + 3 * index] for index in range(channels) if at + 42 + 3 * index < len(start)})
    most = 16 if channels == 1 else 8
    if any(depth >> 7 or not 8 <= depth + 1 <= most for depth in depths):
        bits = ", ".join(f"{'signed ' if depth >> 7 else ''}{(depth & 127) + 1}" for depth in depths)
        raise RefusedError(f"is a JPEG 2000 picture of {bits} bits, which is not read here; save it with 8 bits")


def check_bmp(file: BinaryIO, mode: str) -> None:
    """Refuse BMP pictures whose grey palette Pillow takes for another number of bits.

    Args:
        file: the file.
        mode: the mode in which Pillow opened it.
    """
    file.seek(14)
    header = file.read(16)
    bits = struct.unpack_from("<H", header, 10 if header[:4] == b"\x0c\0\0\0" else 14)[0]
    if (mode == "1" and bits != 1) or (mode == "L" and bits != 8):
        raise RefusedError(f"is a BMP of {bits} bits with a palette of few greys, which is misread; save it as PNG")

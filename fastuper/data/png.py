"""PNG files without the parts that no reader of pixels needs.

Pillow unpacks colour profiles and texts, refuses pictures whose texts are large, and plays animations. The chunks that
determine the pixels, and the metadata that may hold the orientation, are all it gets from here.
"""

from __future__ import annotations

import io
import struct
import zlib
from bisect import bisect_right
from typing import Any, BinaryIO

_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf")
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_ORIENTATION = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
_TEXT_LIMIT = 1 << 20  # bytes of a text; orientations are in short texts
_SIGNATURE = 8


def pixels_only(file: BinaryIO) -> BinaryIO:
    """Return a PNG file as a stream of the chunks that determine its pixels and its orientation.

    The stream reads from the file, which must stay open.

    Raises:
        ValueError: the file has no header chunk at its beginning.
    """
    length = file.seek(0, io.SEEK_END)
    ranges = [(0, _SIGNATURE)]
    at = _SIGNATURE
    while at + 8 <= length:
        file.seek(at)
        size, name = struct.unpack(">I4s", file.read(8))
        if at == _SIGNATURE and name != b"IHDR":
            raise ValueError("its first chunk is no header")
        end = min(at + 12 + size, length)
        if name in _PIXELS or (name in _TEXTS and size <= _TEXT_LIMIT and _may_have_orientation(name, file.read(size))):
            if ranges[-1][1] == at:
                ranges[-1] = (ranges[-1][0], end)
            else:
                ranges.append((at, end))
        if name == b"IEND":
            break
        at = end
    return io.BufferedReader(_Ranges(file, ranges), 1 << 16)


def _may_have_orientation(name: bytes, content: bytes) -> bool:
    keyword = next((word for word in _ORIENTATION if content.startswith(word)), None)
    if keyword is None:
        return False
    rest = content[len(keyword) :]
    if name == b"tEXt":
        return True
    if name == b"iTXt":
        return rest[:1] == b"\0"  # not compressed
    unpacker = zlib.decompressobj()
    try:
        unpacker.decompress(rest[1:], _TEXT_LIMIT)
    except zlib.error:
        return False
    return unpacker.eof


class _Ranges(io.RawIOBase):
    """A stream of ranges (start, end) of a file."""

    def __init__(self, file: BinaryIO, ranges: list[tuple[int, int]]) -> None:
        self._file, self._ranges, self._at = file, ranges, 0
        self._starts = [0]
        for start, end in ranges:
            self._starts.append(self._starts[-1] + end - start)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._starts[-1]}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        index = bisect_right(self._starts, self._at) - 1
        if index >= len(self._ranges):
            return 0
        offset = self._at - self._starts[index]
        start, end = self._ranges[index]
        self._file.seek(start + offset)
        block = self._file.read(min(len(buffer), end - start - offset))
        buffer[: len(block)] = block
        self._at += len(block)
        return len(block)

"""PBM, PGM and PPM files: their numbers exactly as stored.

Pillow multiplies the numbers so that they fill 8 or 16 bits, replaces numbers above the file's largest by it, and reads
pixel by pixel in Python.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_BLOCK = 1 << 20  # bytes of text that are read at a time
_ROWS = 256
_COMMENT = re.compile(rb"#[^\r\n]*")
_NO_NUMBERS = re.compile(rb"[^\d\s]|\d{11}")
_NO_DIGITS = re.compile(rb"[^01\s]")


class Netpbm(NamedTuple):
    """The content of a file.

    Attributes:
        values: (H, W) or (H, W, 3), uint8 or big-endian uint16.
        largest: the number that stands for full brightness; in a PBM the number 1, which stands for black.
        black_is_largest: True for PBM.
    """

    values: NDArray[np.unsignedinteger]
    largest: int
    black_is_largest: bool

    def photo(self) -> Image.Image:
        """Return the picture in 8 bits, mode "L" or "RGB": Pillow's scaling, also above 8 bits."""
        levels = np.rint(np.arange(self.largest + 1) / self.largest * 255).astype(np.uint8)
        if self.black_is_largest:
            levels = levels[::-1]
        if self.values.dtype == np.uint8 and np.array_equal(levels, np.arange(256)):
            return Image.fromarray(self.values)
        scaled = np.empty(self.values.shape, np.uint8)
        for row in range(0, len(scaled), _ROWS):
            scaled[row : row + _ROWS] = levels[self.values[row : row + _ROWS]]
        return Image.fromarray(scaled)


def read(file: BinaryIO, check_size: Callable[[int, int], None]) -> Netpbm:
    """Read a file from its beginning.

    Args:
        file: the file, seekable.
        check_size: raises an error if the size (width, height) is not acceptable; nothing is allocated before.

    Raises:
        ValueError: the file is truncated or damaged.
    """
    file.seek(0)
    kind = int(file.read(2)[1:])
    width, height = _header_number(file), _header_number(file)
    largest = 1 if kind in (1, 4) else _header_number(file)
    if not 0 < largest < 65536:
        raise ValueError(f"its largest value is {largest}, outside 1 to 65535")
    if not (width and height):
        raise ValueError(f"its size is {width} x {height}")
    check_size(width, height)
    shape = (height, width, 3) if kind in (3, 6) else (height, width)
    if kind == 4:
        packed = _binary(file, (height, (width + 7) // 8), np.dtype(np.uint8))
        values: NDArray[np.unsignedinteger] = np.unpackbits(packed, axis=1, count=width)
    elif kind > 4:
        values = _binary(file, shape, np.dtype(np.uint8 if largest < 256 else ">u2"))
    else:
        values = _text(file, shape, largest, digits=kind == 1)
    if kind in (5, 6) and largest not in (255, 65535) and (top := int(values.max())) > largest:
        raise ValueError(f"it holds the value {top} above its largest value {largest}")
    return Netpbm(values, largest, kind in (1, 4))


def _header_number(file: BinaryIO) -> int:
    """Read a number of the header, and the single whitespace behind it."""
    token = b""
    while len(token) < 11:
        letter = file.read(1)
        if letter == b"#":
            while letter not in (b"\n", b"\r", b""):
                letter = file.read(1)
        if letter.isdigit():
            token += letter
        elif token or not letter or not letter.isspace():
            break
    if not 0 < len(token) < 11:
        raise ValueError("its header has no size")
    return int(token)


def _binary(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
    values = np.empty(shape, dtype)
    target, done = values.reshape(-1).view(np.uint8), 0
    while done < values.nbytes:
        block = file.read(min(_BLOCK, values.nbytes - done))
        if not block:
            raise ValueError(f"{values.nbytes - done} of {values.nbytes} bytes of its pixels are missing")
        target[done : done + len(block)] = np.frombuffer(block, np.uint8)
        done += len(block)
    return values


def _text(file: BinaryIO, shape: tuple[int, ...], largest: int, *, digits: bool) -> NDArray[np.unsignedinteger]:
    """Read numbers written as text; `digits`: each digit is a number, with or without spaces."""
    values = np.empty(shape, np.uint8 if largest < 256 else np.uint16)
    flat, done, rest = values.reshape(-1), 0, b""
    while done < len(flat):
        block = file.read(_BLOCK)
        # A number or a comment may go on in the next block.
        text = rest + block
        end = _end_of_whole(text) if block else len(text)
        text, rest = text[:end], text[end:]
        if len(rest) > _BLOCK:
            raise ValueError("it holds a word or a comment of a million letters")
        text = _COMMENT.sub(b" ", text)
        if (_NO_DIGITS if digits else _NO_NUMBERS).search(text):
            raise ValueError("it holds other text than numbers")
        if digits:
            found = np.frombuffer(b"".join(text.split()), np.uint8) - ord("0")
        else:
            found = np.fromstring(text, np.int64, sep=" ")
        found = found[: len(flat) - done]
        if found.size and int(found.max()) > largest:
            raise ValueError(f"it holds the value {found.max()} above its largest value {largest}")
        flat[done : done + len(found)] = found
        done += len(found)
        if not block and done < len(flat):
            raise ValueError(f"{len(flat) - done} of {len(flat)} numbers of its pixels are missing")
    return values


def _end_of_whole(text: bytes) -> int:
    """Return the length of the part of a text that ends with a whole number or a whole comment."""
    end = max(text.rfind(b"\n"), text.rfind(b"\r"))
    if end < 0:
        end = text.find(b"#")
    if end < 0:
        end = max(text.rfind(b" "), text.rfind(b"\t"))
    return max(end, 0)

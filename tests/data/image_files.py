"""Image files written by hand: every layout that a format allows, also those that no library writes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np

_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def packed_rows(values: np.ndarray, bits: int) -> list[bytes]:
    """Return the rows of an array as numbers of `bits` bits, the first number in the highest bits of a byte."""
    rows = values.reshape(len(values), -1)
    if bits == 16:
        return [row.astype(">u2").tobytes() for row in rows]
    digits = (rows[..., None] >> np.arange(bits)[::-1] & 1).astype(np.uint8)
    return [np.packbits(row).tobytes() for row in digits.reshape(len(rows), -1)]


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(
    values: np.ndarray, bits: int, colour: int, *, interlace: bool = False, chunks: Sequence[tuple[bytes, bytes]] = ()
) -> bytes:
    """Return a PNG of values (H, W) or (H, W, C), with chunks before its pixels."""

    def lines(part: np.ndarray) -> bytes:
        return b"".join(b"\0" + row for row in packed_rows(part, bits)) if part.size else b""

    passes = [values[y::down, x::right] for x, y, right, down in _ADAM7] if interlace else [values]
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, colour, 0, 0, interlace)
    content = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"".join(map(lines, passes)))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in content)


def netpbm(values: np.ndarray, kind: int, largest: int) -> bytes:
    """Return a PBM, PGM or PPM (P1 to P6) of values (H, W) or (H, W, 3)."""
    head = f"P{kind}\n# a comment\n{values.shape[1]} {values.shape[0]}\n"
    if kind in (1, 4):
        rows = packed_rows(values, 1) if kind == 4 else ["".join(map(str, row)).encode() + b"\n" for row in values]
        return head.encode() + b"".join(rows)
    head += f"{largest}\n"
    if kind > 4:
        return head.encode() + values.astype("u1" if largest < 256 else ">u2").tobytes()
    rows = [" ".join(map(str, row)) for row in values.reshape(len(values), -1)]
    return (head + "\n".join(rows) + "\n# the end").encode()


def tiff(
    parts: Sequence[bytes],
    size: tuple[int, int],
    tags: dict[int, Sequence[int]],
    *,
    order: str = "<",
    big: bool = False,
    rows: int | None = None,
) -> bytes:
    """Return a TIFF of encoded strips, or tiles if `tags` has their size.

    Args:
        parts: the strips' or tiles' bytes.
        size: (height, width).
        tags: further tags, as 32-bit numbers; (320, 338, 258, 339: 16-bit numbers).
        order: "<" or ">".
        big: write a BigTIFF.
        rows: rows of a strip.
    """
    height, width = size
    start = 16
    offsets = [start + sum(map(len, parts[:index])) for index in range(len(parts))]
    lengths = [len(part) for part in parts]
    place = {324: offsets, 325: lengths} if 322 in tags else {273: offsets, 279: lengths, 278: [rows or height]}
    body = b"".join(parts)
    body += b"\0" * (len(body) % 2)
    values_at, values, entries = start + len(body), b"", b""
    word, inline = ("Q", 8) if big else ("I", 4)
    for tag, numbers in sorted({256: [width], 257: [height], **place, **tags}.items()):
        short = tag in (258, 320, 338, 339)
        content = struct.pack(f"{order}{len(numbers)}{'H' if short else 'I'}", *numbers)
        if len(content) > inline:
            at = values_at + len(values)
            values += content + b"\0" * (len(content) % 2)
            content = struct.pack(order + word, at)
        entries += struct.pack(f"{order}HH{word}", tag, 3 if short else 4, len(numbers)) + content.ljust(inline, b"\0")
    directory = values_at + len(values)
    head = (b"II" if order == "<" else b"MM") + (
        struct.pack(order + "HHHQ", 43, 8, 0, directory) if big else struct.pack(order + "HI", 42, directory)
    )
    count = struct.pack(order + ("Q" if big else "H"), len(entries) // (20 if big else 12))
    return head.ljust(start, b"\0") + body + values + count + entries + b"\0" * 8


def bmp(values: np.ndarray, bits: int, palette: Sequence[Sequence[int]], *, top_down: bool = False) -> bytes:
    """Return a BMP of palette indices (H, W)."""
    height, width = values.shape
    rows = [row.ljust(-(-len(row) // 4) * 4, b"\0") for row in packed_rows(values, bits)]
    pixels = b"".join(rows if top_down else rows[::-1])
    colours = b"".join(bytes([blue, green, red, 0]) for red, green, blue in palette)
    signed_height = -height if top_down else height
    header = struct.pack("<IiiHHIIiiII", 40, width, signed_height, 1, bits, 0, 0, 0, 0, len(palette), 0)
    start = 14 + len(header) + len(colours)
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + header + colours + pixels


def tga(size: tuple[int, int]) -> bytes:
    return struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, size[1], size[0], 24, 0) + bytes(3 * size[0] * size[1])

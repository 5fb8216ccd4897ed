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


def bmp_of_bit_fields(pixels: np.ndarray, masks: np.ndarray, size: int) -> bytes:
    """Return a BMP of 32-bit pixels (H, W), the masks of red, green, blue and alpha, and a header of `size` bytes."""
    height, width = pixels.shape
    header = struct.pack("<IiiHHIIiiII", size, width, height, 1, 32, 3, 0, 0, 0, 0, 0) + masks.astype("<u4").tobytes()
    header = header[:52] if size == 40 else header.ljust(size, b"\0")  # alpha's mask is in the larger headers
    start = 14 + len(header)
    content = pixels[::-1].astype("<u4").tobytes()
    return b"BM" + struct.pack("<IHHI", start + len(content), 0, 0, start) + header + content


def tga(
    values: np.ndarray,
    palette: Sequence[Sequence[int]] = (),
    *,
    packed: bool = False,
    top_down: bool = False,
    mirrored: bool = False,
) -> bytes:
    """Return a TGA of values (H, W) or (H, W, C); `packed`: run lengths, each a single pixel."""
    height, width = values.shape[:2]
    pixels = values.reshape(height, width, -1)[:: 1 if top_down else -1, :: -1 if mirrored else 1].astype(np.uint8)
    channels = pixels.shape[2]
    if channels > 2:
        pixels = pixels[..., [2, 1, 0, 3][:channels]]
    if packed:
        pixels = np.concatenate([np.full((height, width, 1), 0x80, np.uint8), pixels], -1)
    kind = (1 if palette else 2 if channels > 2 else 3) + 8 * packed
    flags = 0x20 * top_down + 0x10 * mirrored + (8 if channels in (2, 4) else 0)
    colours = b"".join(bytes([blue, green, red]) for red, green, blue in palette)
    header = struct.pack(
        "<BBBHHBHHHH", 0, bool(palette), kind, 0, len(palette), 24 * bool(palette), 0, 0, width, height
    )
    footer = bytes(26)  # Pillow looks for one, and fails at a file that is shorter
    return header + bytes([8 * channels, flags]) + colours + pixels.tobytes() + footer

"""TIFF files: what their tags say about the numbers of their pixels, and which of them Pillow reads rightly.

Pillow inverts some pictures in which 0 is white and leaves others, does not scale 12 bits, mixes up the planes of
16-bit colours and the bytes of signed integers, and takes the 16 bits of a palette's colours for granted. Of the
layouts that TIFF allows, those are read for which `_is_checked` is true: the tests compare them with tifffile's
numbers.
"""

from __future__ import annotations

import io
import struct
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastuper.data.formats import RefusedError, one_channel

_TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_INTEGERS = {1: "B", 3: "H", 4: "I", 16: "Q"}
_TAGS = {
    "subfile": 254,
    "width": 256,
    "height": 257,
    "bits": 258,
    "compression": 259,
    "photometric": 262,
    "fill_order": 266,
    "strips": 273,
    "channels": 277,
    "rows": 278,
    "planar": 284,
    "predictor": 317,
    "palette": 320,
    "tile_width": 322,
    "tile_height": 323,
    "tiles": 324,
    "extra": 338,
    "format": 339,
    "subsampling": 530,
}
_NAMES = {number: name for name, number in _TAGS.items()}
_MOST_VALUES = 3 << 16  # of a tag whose values are read: a palette of 16 bits
_MOST_STRIPS = 1 << 20
_SMALL = 1 << 22  # pixels of a tile that every picture may have, however small

_COMPRESSIONS = {1: "none", 2: "CCITT", 3: "CCITT fax 3", 4: "CCITT fax 4", 5: "LZW", 7: "JPEG", 8: "deflate"} | {
    32773: "PackBits",
    32946: "deflate",
    34925: "LZMA",
    50000: "Zstandard",
}
_FAX = (2, 3, 4)
_JPEG = 7
_PACKED = (5, 8, 32773, 32946, 34925, 50000)
_PREDICTED = (5, 8, 32946, 34925, 50000)
_ONE_CHANNEL = {0: (1, 2, 4, 8, 16), 1: (1, 2, 4, 8, 12, 16, 32), 3: (1, 2, 4, 8)}  # photometric: bits
_ANY_ALPHA = ((), (0,), (1,), (2,))
_SEVERAL_CHANNELS = {  # (photometric, bits): meanings of the channels beside the colours
    (1, 8): ((0,), (1,), (2,)),
    (2, 8): (*_ANY_ALPHA, (0, 0), (1, 0), (2, 0), (0, 0, 0), (1, 0, 0), (2, 0, 0)),
    (2, 16): _ANY_ALPHA,
    (3, 8): ((0,), (2,)),
    (5, 8): ((), (0,), (0, 0)),
    (5, 16): ((),),
    (8, 8): ((),),
}
_AS_JPEG = ((1, 1, ()), (2, 3, ()), (2, 4, (0,)), (2, 4, (2,)), (5, 4, ()), (6, 3, ()))  # photometric, channels, extra
_COLOURS = {0: "grey (0 is white)", 1: "grey", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK", 6: "YCbCr", 8: "Lab"}
_KINDS = {1: "unsigned integers", 2: "signed integers", 3: "floats"}


class Layout(NamedTuple):
    """What a file's tags say about its first picture.

    Attributes:
        width: in pixels, as stored.
        height: in pixels, as stored.
        bits: bits of a number.
        kind: 1 for unsigned integers, 2 for signed integers, 3 for floats.
        channels: numbers of a pixel.
        white_is_zero: True if 0 stands for white.
        lossy: True if compression changed the numbers.
        palette: the colours, first all red, then all green, then all blue; empty without a palette.
    """

    width: int
    height: int
    bits: int
    kind: int
    channels: int
    white_is_zero: bool
    lossy: bool
    palette: tuple[int, ...]

    def check_labels(self) -> None:
        """Raise RefusedError if the file is no label map."""
        one_channel([str(number) for number in range(1, self.channels + 1)], floats=self.kind == 3)
        if self.lossy:
            raise RefusedError("is a TIFF compressed as JPEG, which changes class numbers; save label maps as PNG")

    def photo(self, image: Image.Image) -> Image.Image:
        """Return the picture that Pillow decoded with its numbers scaled so that white is white.

        Raises:
            RefusedError: the numbers are signed, with fewer than 32 bits; of 32 bits, `as_rgb` refuses them.
        """
        if self.kind == 2 and self.bits < 32:
            raise RefusedError(
                f"holds signed integers of {self.bits} bits, in which no value stands for white; scale them to 8 or 16 "
                "bits and save it as 8-bit RGB or 16-bit grey"
            )
        if self.palette and max(self.palette) < 256:  # written in 8 bits, where the format has 16
            image.putpalette(np.array(self.palette, np.uint8).reshape(3, -1).T.tobytes())
        if self.bits == 12:
            levels = np.rint(np.arange(4096) / 4095 * 65535).astype(np.uint16)
            return Image.fromarray(levels[np.asarray(image) & 4095])
        if self.bits == 16 and self.kind == 1 and self.white_is_zero:
            return Image.fromarray(65535 - np.asarray(image))
        return image

    def labels(self, image: Image.Image) -> NDArray[np.integer]:
        """Return the stored numbers (H, W) of a picture that Pillow decoded."""
        values = np.array(image)
        if self.bits < 8 or (self.bits == 8 and self.white_is_zero):
            values = values.astype(np.uint8)
            if not self.palette and image.mode != "1":
                values //= 255 // (2**self.bits - 1)  # Pillow spreads 2 and 4 bits over 8
            return (2**self.bits - 1 - values).astype(np.uint8) if self.white_is_zero else values
        if self.bits == 8:
            return values.view(np.int8).astype(np.int32) if self.kind == 2 else values
        if self.bits == 32 and self.kind == 1:
            values = values.view(np.uint32)
            return values.astype(np.int64 if values.size and values.max() >= 2**31 else np.int32)
        return values.astype(np.int32)


def read_layout(file: BinaryIO) -> Layout:
    """Read the tags of a file's first picture.

    Raises:
        RefusedError: Pillow does not read this layout, or reads it wrongly.
        ValueError: the file is damaged.
    """
    tags = _read_tags(file)

    def one(name: str, default: int | None = None) -> int:
        values = tags.get(name, () if default is None else (default,))
        if len(values) != 1:
            raise ValueError(f"it has {len(values)} values of the tag {_TAGS[name]} ({name})")
        return values[0]

    width, height = one("width"), one("height")
    channels = one("channels", 1)
    compression, photometric, predictor = one("compression", 1), one("photometric", 0), one("predictor", 1)
    planar = one("planar", 1) == 2 and channels > 1
    bits = set(tags.get("bits", (1,)))
    kinds = set(tags.get("format", (1,)))
    if not (0 < width < 2**31 and 0 < height < 2**31 and channels > 0):
        raise ValueError(f"its size is {width} x {height} with {channels} channels")
    description = (
        f"a TIFF of {_COLOURS.get(photometric, f'colours {photometric}')}, {channels} x "
        f"{'/'.join(map(str, sorted(bits)))} bits, {'/'.join(_KINDS.get(kind, str(kind)) for kind in sorted(kinds))}, "
        f"{'planes' if planar else 'interleaved'}, compression {_COMPRESSIONS.get(compression, compression)}, "
        f"predictor {predictor}"
    )
    if one("subfile", 0) & 1:
        raise RefusedError("is a TIFF whose first picture is a thumbnail; save the full picture first in the file")
    layout = Layout(
        width,
        height,
        bits=min(bits),
        kind=min(kinds),
        channels=channels,
        white_is_zero=photometric == 0,
        lossy=compression == _JPEG,
        palette=tags.get("palette", ()) if photometric == 3 else (),
    )
    if not (len(bits) == len(kinds) == 1 and _is_checked(layout, tags, photometric, compression, predictor, planar)):
        raise RefusedError(
            f"is {description}, which is not read here; save it as PNG, or as TIFF with interleaved channels of 8 bits"
        )
    _check_parts(tags, layout, planar)
    if photometric == 3 and len(layout.palette) != 3 << layout.bits:
        raise ValueError(f"its palette has {len(layout.palette)} numbers, not {3 << layout.bits}")
    return layout


def _is_checked(
    layout: Layout, tags: dict[str, tuple[int, ...]], photometric: int, compression: int, predictor: int, planar: bool
) -> bool:
    """Return True for a layout that Pillow reads as tifffile does."""
    bits, kind, channels, extra = layout.bits, layout.kind, layout.channels, tags.get("extra", ())
    little, packed = tags["little"] == (1,), compression in _PACKED
    if tags.get("fill_order", (1,)) != (1,) and not (bits == 1 and photometric < 2 and compression in (1, *_FAX)):
        return False
    if predictor != 1 and not (compression in _PREDICTED and predictor == (3 if kind == 3 else 2) and bits >= 8):
        return False
    if compression in _FAX:
        return (bits, kind, channels) == (1, 1, 1) and photometric in (0, 1)
    if compression == _JPEG:
        return (bits, kind, planar) == (8, 1, False) and (photometric, channels, extra) in _AS_JPEG
    if not (compression == 1 or packed):
        return False
    if photometric == 6:
        return (bits, kind, channels, planar, tags.get("subsampling")) == (8, 1, 3, False, (1, 1))
    if kind == 3:  # refused later, since no float stands for white
        return (bits, channels) == (32, 1) and photometric in (0, 1)
    if kind == 2:
        return (photometric, channels) == (1, 1) and (bits == 8 or (bits in (16, 32) and (little or not packed)))
    if channels == 1:
        return (
            bits in _ONE_CHANNEL.get(photometric, ())
            and (little or (bits not in (12, 32) and (photometric, bits) != (0, 16)))
            and not (bits == 12 and packed)
        )
    if planar:
        return photometric == 2 and (
            (bits == 8 and (channels, extra) in ((3, ()), (4, (2,))))
            or (bits in (8, 16) and packed and (channels, extra) in ((3, ()), (4, (0,)), (4, (2,))))
        )
    meanings = _SEVERAL_CHANNELS.get((photometric, bits), ())
    colours = {1: 1, 3: 1, 5: 4}.get(photometric, 3)
    return extra in meanings and (channels == colours + len(extra) or (photometric, channels, extra) == (2, 4, ()))


def _check_parts(tags: dict[str, tuple[int, ...]], layout: Layout, planar: bool) -> None:
    """Raise an error if strips or tiles do not cover the picture, are too many or too large."""
    if "tiles" in tags:
        wide, high = (tags.get(name, (0,))[0] for name in ("tile_width", "tile_height"))
        across = -(-layout.width // max(wide, 1))
        count = tags["tiles"][0]
    else:
        wide, high, across = layout.width, min(tags.get("rows", (layout.height,))[0], layout.height), 1
        count = tags.get("strips", (0,))[0]
    if not wide * high:
        raise ValueError(f"its tiles or strips are {wide} x {high} pixels")
    if "tiles" in tags and wide * high > max(layout.width * layout.height, _SMALL):
        raise RefusedError(f"is a TIFF with tiles of {wide} x {high} pixels; save it with smaller tiles")
    wanted = across * -(-layout.height // high) * (layout.channels if planar else 1)
    if wanted > _MOST_STRIPS:
        raise RefusedError(f"is a TIFF of {wanted:,} parts; save it with larger strips or tiles")
    if count != wanted:
        raise ValueError(f"it has {count} strips or tiles where its size needs {wanted}")


def _read_tags(file: BinaryIO) -> dict[str, tuple[int, ...]]:
    """Return the integers of the tags in `_TAGS` of a file's first picture; of strips and tiles, their number.

    Raises:
        RefusedError: Pillow cannot read the file's header.
        ValueError: a tag occurs twice or has no integers, or the values of all tags are larger than the file.
    """
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    start = file.read(16)
    order = "<" if start[:2] == b"II" else ">"
    big = start[2:4] in (b"+\0", b"\0+")
    if big and order == ">":
        raise RefusedError("is a big-endian BigTIFF, which is not read here; save it as PNG, or as little-endian TIFF")
    offset = struct.unpack_from(order + ("8xQ" if big else "4xI"), start)[0]
    file.seek(offset)
    (count,) = struct.unpack(order + ("Q" if big else "H"), file.read(8 if big else 2))
    size, inline = (20, 8) if big else (12, 4)
    if count * size > length:
        raise ValueError(f"it has {count} tags")
    entries = struct.iter_unpack(order + ("HHQ8s" if big else "HHI4s"), file.read(count * size))
    tags: dict[str, tuple[int, ...]] = {"little": (order == "<",)}
    total = 0
    for tag, kind, number, value in entries:
        used = number * _TYPE_SIZES.get(kind, 0)
        total += used if used > inline else 0
        if total > length:
            raise ValueError("its tags are larger than the file")
        name = _NAMES.get(tag)
        if name is None:
            continue
        if name in tags or kind not in _INTEGERS:
            raise ValueError(f"its tag {tag} ({name}) occurs twice or has no integers")
        if name in ("strips", "tiles"):
            tags[name] = (number,)
            continue
        if number > _MOST_VALUES:
            raise ValueError(f"its tag {tag} ({name}) has {number} values")
        if used > inline:
            file.seek(struct.unpack(order + ("Q" if big else "I"), value)[0])
            value = file.read(used)
        tags[name] = struct.unpack_from(f"{order}{number}{_INTEGERS[kind]}", value)
    return tags

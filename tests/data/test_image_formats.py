"""Which files are opened, that their numbers are read exactly or refused by name, and that nothing else happens."""

from __future__ import annotations

import errno
import io
import itertools
import os
import pickle
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import cv2
import imageio.v3 as imageio
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, features

from fastuper.data import as_samples
from fastuper.data.formats import FORMATS
from fastuper.data.images import (
    IMAGE_SUFFIXES,
    LABEL_SUFFIXES,
    ImageError,
    as_labels,
    as_rgb,
    open_image,
    read_image,
    read_labels,
)
from fastuper.data.processor import UperNetImageProcessor
from tests.data import image_files

RANDOM = np.random.default_rng(0)
SIZES = ((1, 1), (5, 9), (19, 12))
EXAMPLES = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
seeds = st.integers(0, 2**32 - 1)


def picture(mode: str = "RGB", size: tuple[int, int] = (60, 50)) -> Image.Image:
    """Return noise on a gradient, which compresses a little."""
    shade = np.add.outer(np.arange(size[1]), np.arange(size[0]))[..., None]
    values = (shade + RANDOM.integers(0, 40, (size[1], size[0], 3))).astype(np.uint8)
    return Image.fromarray(values).convert(mode)


def write_all(folder: Path) -> dict[str, Path]:
    """Write a photo of 60 x 50 pixels in every format that is read, and return the files by their formats."""
    photo = picture()
    files = {}
    for form in FORMATS:
        path = files[form.name] = folder / f"photo{form.suffixes[0]}"
        if form.name == "AVIF" and not features.check("avif"):
            del files[form.name]
            continue
        photo.save(path, **({"compression": "tiff_lzw"} if form.name == "TIFF" else {}))
    return files


def attempt(read: Callable[[Any], Any], path: Path) -> np.ndarray | str:
    """Return what a file is read as, or the reason why it is not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return np.asarray(read(path))
        except ImageError as error:
            message = str(error)
            assert message.startswith(f"{path}: ")
            assert "\n" not in message
            return message.removeprefix(f"{path}: ")


def exact(path: Path, labels: np.ndarray | None, photo: np.ndarray | None, *refusals: str) -> None:
    """Check that a file is read exactly, or refused for one of the reasons; None: it has to be refused."""
    for read, wanted in ((read_labels, labels), (read_image, photo)):
        found = attempt(read, path)
        if isinstance(found, str):
            assert wanted is None or any(reason in found for reason in refusals), found
            assert "damaged" not in found, found
        else:
            assert wanted is not None, f"{read.__name__} did not refuse it"
            np.testing.assert_array_equal(found, wanted)


def grey(values: np.ndarray, largest: int) -> np.ndarray:
    """Return the 8-bit RGB of grey numbers."""
    return np.repeat(np.rint(values[..., None] / largest * 255), 3, axis=-1).astype(np.uint8)


# Formats


def test_the_endings_come_from_the_table() -> None:
    assert {".jpg", ".png", ".webp", ".avif", ".tif", ".bmp", ".gif", ".pnm", ".jp2", ".heic", ".tga"} < {
        *IMAGE_SUFFIXES
    }
    assert set(LABEL_SUFFIXES) < set(IMAGE_SUFFIXES)
    assert {".png", ".tiff", ".bmp", ".pgm", ".gif"} < set(LABEL_SUFFIXES)
    assert not {".jpg", ".webp", ".avif", ".jp2"} & set(LABEL_SUFFIXES)
    assert len(set(IMAGE_SUFFIXES)) == len(IMAGE_SUFFIXES)


def test_every_format_is_read(tmp_path: Path) -> None:
    for name, path in write_all(tmp_path).items():
        image = read_image(path)
        assert (image.mode, image.size) == ("RGB", (60, 50)), name
        assert np.abs(np.asarray(image).astype(int) - np.asarray(picture()).astype(int)).mean() < 60, name


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
FOREIGN = {
    "EPS": EPS,
    "EPS or PostScript": b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, len(EPS)) + bytes(18) + EPS,
    "PDF": b"%PDF-1.7\n",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "PSD": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(40),
    "ICO": b"\0\0\1\0\1\0" + bytes(60),
    "CUR": b"\0\0\2\0\1\0" + bytes(60),
    "ICNS": b"icns" + struct.pack(">I", 80) + b"ic09" + bytes(60),
    "IPTC": b"\x1c\2\0\0\2" + bytes(60),
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + bytes(60),
    "EMF": b"\1\0\0\0" + bytes(36) + b" EMF" + bytes(40),
    "DDS": b"DDS " + struct.pack("<I", 124) + bytes(120),
    "FITS": b"SIMPLE  =                    T" + bytes(60),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(60),
    "GRIB": b"GRIB" + bytes(60),
    "BUFR": b"BUFR" + bytes(60),
    "MIC": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(60),
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(60),
    "JPEG XL": b"\xff\x0a" + bytes(60),
    "PFM": b"Pf\n2 1\n-1.0\n" + bytes(8),
    "PAM": b"P7\nWIDTH 2\nHEIGHT 1\nDEPTH 1\nMAXVAL 255\nENDHDR\n" + bytes(2),
    "SGI": b"\1\xda\0\1\0\3" + bytes(512),
    "PCX": b"\x0a\5\1\x08" + bytes(128),
    "QOI": b"qoif" + bytes(60),
    "XBM": b"#define im_width 8\n#define im_height 1\nstatic char im_bits[] = {0xff};\n",
    "XPM": b"/* XPM */\nstatic char *x[] = {};\n",
    "a video": b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + bytes(60),
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "not an image": b"a text about photos\n" * 9,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_formats_are_refused_by_name_and_not_opened(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> NoReturn:
        raise AssertionError("opened")

    monkeypatch.setattr(Image, "open", fail)
    monkeypatch.setattr(subprocess, "Popen", fail)
    path = tmp_path / "photo.png"
    path.write_bytes(FOREIGN[name])
    for read in (read_image, read_labels, open_image):
        found = attempt(read, path)
        assert isinstance(found, str)
        assert name in found
        assert "save it as PNG" in found


def test_formats_without_first_bytes_are_named_by_their_ending(tmp_path: Path) -> None:
    path = tmp_path / "photo.pcd"
    path.write_bytes(bytes(4096))
    assert "is PCD, which is not read here; save it as PNG" in str(attempt(read_image, path))


@pytest.mark.parametrize("channels", [0, 1, 2, 3, 4])
def test_tga(channels: int, tmp_path: Path) -> None:
    """No channels: a palette. A TGA with another ending is refused: nothing in it says what it is."""
    path = tmp_path / "picture.TGA"
    for size, packed, top_down, mirrored in itertools.product(SIZES, *[(False, True)] * 3):
        count = 200
        palette = RANDOM.integers(0, 256, (count, 3)) if channels == 0 else np.empty((0, 3), int)
        values = RANDOM.integers(0, count, (*size, channels) if channels > 1 else size)
        path.write_bytes(image_files.tga(values, palette.tolist(), packed=packed, top_down=top_down, mirrored=mirrored))
        if channels > 1:
            exact(path, None, np.repeat(values[..., :1], 3, -1) if channels == 2 else values[..., :3])
        else:
            exact(path, values, grey(values, 255) if channels else palette[values])
    path.write_bytes(path.read_bytes()[:20])
    assert "truncated or damaged" in str(attempt(read_image, path))
    path.write_text("a text about photos, longer than the header of a file\n")
    assert "truncated or damaged" in str(attempt(read_image, path))
    (tmp_path / "picture.jpg").write_bytes(image_files.tga(np.zeros((4, 4, 3))))
    assert "not read here" in str(attempt(read_image, tmp_path / "picture.jpg"))


def test_a_missing_reader_of_pillow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_all(tmp_path)["WEBP"]
    read_image(path)
    monkeypatch.delitem(Image.OPEN, "WEBP")
    assert "is WEBP, which the installed Pillow cannot read; install a newer" in str(attempt(read_image, path))


@pytest.mark.parametrize("name", ["JPEG", "WEBP", "AVIF", "JPEG2000"])
def test_formats_that_change_numbers_hold_no_label_maps(name: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.png"
    path.write_bytes(
        {"JPEG": b"\xff\xd8\xff", "WEBP": b"RIFF\0\0\0\0WEBP", "AVIF": b"\0\0\0\x18ftypavif"}.get(name, b"")
    )
    if name == "JPEG2000":
        picture("L").save(path, format=name)
    assert attempt(read_labels, path) == (f"is {name}, whose compression changes class numbers; save label maps as PNG")


# The limit


def test_the_limit_holds_before_anything_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> NoReturn:
        raise AssertionError("decoded")

    files = write_all(tmp_path)
    monkeypatch.setattr(Image, "_getdecoder", fail)
    for path in files.values():
        for read in (read_image, read_labels) if path.suffix in LABEL_SUFFIXES else (read_image,):
            found = attempt(lambda path, read=read: read(path, max_pixels=2999), path)
            assert "60 x 50 = 3,000 pixels is over the limit of 2,999; max_pixels=N" in str(found), path


def test_pillows_limit_has_no_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_all(tmp_path)
    picture("P").save(tmp_path / "screen.gif")
    content = bytearray((tmp_path / "screen.gif").read_bytes())
    content[6:10] = struct.pack("<HH", 1, 1)  # the picture is larger than the screen
    (tmp_path / "screen.gif").write_bytes(content)
    picture().save(tmp_path / "plain.tif")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    failures: list[object] = []

    def read_them() -> None:
        for path in (*files.values(), tmp_path / "plain.tif", tmp_path / "screen.gif"):
            try:
                assert read_image(path).size == (60, 50)
            except Exception as error:
                failures.append((path, error))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        threads = [threading.Thread(target=read_them) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    assert Image.MAX_IMAGE_PIXELS == 10


def test_headers_with_two_sizes_are_refused_before_decoding(tmp_path: Path) -> None:
    path = tmp_path / "photo.jp2"
    picture().save(path)
    content = path.read_bytes()
    at = content.index(b"ihdr") + 4
    path.write_bytes(content[:at] + struct.pack(">II", 5, 6) + content[at + 8 :])
    assert isinstance(attempt(read_image, path), str)


def test_large_metadata_do_not_lose_a_photo_or_fill_the_memory(tmp_path: Path) -> None:
    values = RANDOM.integers(0, 256, (5, 9, 3))
    bomb = zlib.compress(bytes(50_000_000))
    chunks = [
        (b"iCCP", b"profile\0\0" + bomb),
        (b"zTXt", b"Comment\0\0" + bomb),
        (b"zTXt", b"Raw profile type exif\0\0" + bomb),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb),
        (b"tEXt", b"Comment\0" + b"x" * 2_000_000),
        (b"acTL", struct.pack(">II", 2**31, 0)),
        (b"prVt", bytes(3_000_000)),
    ]
    content = image_files.png(values, 8, 2, chunks=chunks)
    end = image_files.png_chunk(b"IEND", b"")
    content = content.removesuffix(end) + image_files.png_chunk(b"zTXt", b"Comment\0\0" + bomb) + end
    (tmp_path / "photo.png").write_bytes(content)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "photo.png")), values)


def test_orientation_in_a_pngs_texts_is_applied(tmp_path: Path) -> None:
    values = RANDOM.integers(0, 256, (5, 9, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = exif.tobytes().hex()
    profile = f"\nexif\n{len(raw) // 2:8}\n{raw}\n".encode()
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    for chunk in (
        (b"tEXt", b"Raw profile type exif\0" + profile),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile)),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
    ):
        (tmp_path / "photo.png").write_bytes(image_files.png(values, 8, 2, chunks=[chunk]))
        np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "photo.png")), np.rot90(values, -1))


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({322: [1 << 15], 323: [1 << 15]}, "tiles of 32768 x 32768 pixels; save it with smaller tiles"),
        ({322: [0], 323: [16]}, "tiles or strips are 0 x 16"),
        ({256: [1], 257: [1 << 27], 278: [1]}, "134,217,728 parts; save it with larger strips"),
        ({257: [1000], 278: [1]}, "1 strips or tiles where its size needs 1000"),
        ({256: [1 << 20], 257: [1 << 20], 278: [1 << 20]}, "over the limit"),
        ({256: [0]}, "its size is 0 x 4"),
        ({277: [1 << 30]}, "not read here; save it as PNG"),
        ({254: [1]}, "first picture is a thumbnail"),
        ({320: [0] * 70_000, 262: [3]}, "its palette has 70000 numbers, not 768"),
    ],
)
def test_hostile_tiff_tags(tags: dict[int, list[int]], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "photo.tif"
    path.write_bytes(image_files.tiff([bytes(16)], (4, 4), {258: [8], 262: [1], **tags}))
    for read in (read_image, read_labels):
        found = attempt(read, path)
        assert isinstance(found, str)
        assert reason in found


def test_tiff_tags_larger_than_the_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "photo.tif"
    entries = b"".join(struct.pack("<HHII", 40_000 + index, 7, 900, 8) for index in range(100))
    base = image_files.tiff([bytes(16)], (4, 4), {258: [8], 262: [1]})
    directory = struct.unpack_from("<I", base, 4)[0]
    count = struct.unpack_from("<H", base, directory)[0]
    path.write_bytes(
        base[:directory] + struct.pack("<H", count + 100) + base[directory + 2 : directory + 2 + 12 * count] + entries
    )
    assert "its tags are larger than the file" in str(attempt(read_image, path))
    path.write_bytes(base[:4] + struct.pack("<I", 2**31) + base[8:])
    assert "damaged" in str(attempt(read_image, path))


# Errors of the system


def test_errors_of_the_system_have_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "dangling.png").symlink_to("nothing.png")
    (tmp_path / "file").write_text("x")
    for name, number in [
        ("loop.png", errno.ELOOP),
        ("Q" * 300 + ".png", errno.ENAMETOOLONG),
        ("file/photo.png", errno.ENOTDIR),
        ("dangling.png", errno.ENOENT),
    ]:
        found = attempt(read_image, tmp_path / name)
        assert isinstance(found, str)
        reason = "no such file" if number == errno.ENOENT else f"cannot be read ({os.strerror(number)})"
        assert found == reason
    for name in ("a\0b.png", "\ud800.png"):
        assert "cannot be read (" in str(attempt(read_image, Path(name)))
    path = write_all(tmp_path)["PNG"]

    def break_off(*arguments: object, **options: object) -> NoReturn:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Image, "_getdecoder", break_off)
    assert attempt(read_image, path) == f"cannot be read ({os.strerror(errno.EIO)})"


# Exact numbers


@pytest.mark.parametrize("interlace", [False, True])
@pytest.mark.parametrize(
    ("colour", "bits"),
    [*((0, bits) for bits in (1, 2, 4, 8, 16)), *((3, bits) for bits in (1, 2, 4, 8))]
    + [(colour, bits) for colour in (2, 4, 6) for bits in (8, 16)],
)
def test_png(colour: int, bits: int, interlace: bool, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    channels = {2: 3, 4: 2, 6: 4}.get(colour, 1)
    for size, transparent in itertools.product(SIZES, (False, True)):
        values = RANDOM.integers(0, 2**bits, (*size, channels))
        palette = RANDOM.integers(0, 256, (2**bits, 3)).astype(np.uint8)
        chunks = [(b"PLTE", palette.tobytes())] if colour == 3 else []
        if transparent and colour == 3:
            chunks.append((b"tRNS", RANDOM.integers(0, 256, 2**bits).astype(np.uint8).tobytes()))
        elif transparent and colour in (0, 2):
            chunks.append((b"tRNS", values[0, 0].astype(">u2").tobytes()))
        path.write_bytes(
            image_files.png(
                values[..., 0] if channels == 1 else values, bits, colour, interlace=interlace, chunks=chunks
            )
        )
        first = values[..., 0]
        if colour == 3:
            exact(path, first, palette[first])
        elif colour == 0:
            exact(path, first, grey(first, 2**bits - 1))
        else:
            exact(
                path,
                None,
                np.repeat(values[..., :1], 3, -1) >> bits - 8 if colour == 4 else values[..., :3] >> bits - 8,
            )


@pytest.mark.parametrize("kind", range(1, 7))
def test_netpbm(kind: int, tmp_path: Path) -> None:
    path = tmp_path / "picture.pgm"
    for size, largest in itertools.product(SIZES, (1, 2, 3, 18, 170, 254, 255, 256, 1000, 4095, 65534, 65535)):
        if kind in (1, 4) and largest > 1:
            continue
        values = RANDOM.integers(0, largest + 1, (*size, 3) if kind in (3, 6) else size)
        path.write_bytes(image_files.netpbm(values, kind, largest))
        if kind in (3, 6):
            exact(path, None, np.rint(values / largest * 255))
        else:
            exact(path, values, grey(1 - values if kind in (1, 4) else values, largest))


def test_netpbm_of_other_writers(tmp_path: Path) -> None:
    path = tmp_path / "picture.pgm"
    for content, values in {
        b"P2 3 2 9\n1 2 3 4 5 6": [[1, 2, 3], [4, 5, 6]],
        b"P2#a\n3#b\n2#c\r9\n1 2#d\n3\t4\r\n5 6 7 8": [[1, 2, 3], [4, 5, 6]],
        b"P1 3 2\n1 0 1\n#x\n010": [[1, 0, 1], [0, 1, 0]],
        b"P5\n3 2\n9\n" + bytes([1, 2, 3, 4, 5, 6]) + b"P5 another picture": [[1, 2, 3], [4, 5, 6]],
    }.items():
        path.write_bytes(content)
        np.testing.assert_array_equal(read_labels(path), values)
    for content, reason in {
        b"P5\n3 2\n9\n" + bytes([1, 2, 3, 4, 5, 10]): "it holds the value 10 above its largest value 9",
        b"P2\n3 2\n9\n1 2 3 4 5 10": "it holds the value 10 above its largest value 9",
        b"P2\n3 2\n9\n1 2 3 4 5": "1 of 6 numbers of its pixels are missing",
        b"P2\n3 2\n9\n1 2 3 4 5 -6": "it holds other text than numbers",
        b"P2\n3 2\n9\n1 2 3 4 5 99999999999999999999": "it holds other text than numbers",
        b"P1\n3 2\n101012": "it holds other text than numbers",
        b"P5\n3 2\n9\n1234": "2 of 6 bytes of its pixels are missing",
        b"P5\n3 2\n0\n123456": "its largest value is 0",
        b"P5\n3 2\n65536\n" + bytes(12): "its largest value is 65536",
        b"P5\n0 2\n9\n": "its size is 0 x 2",
        b"P5\n-3 2\n9\n123456": "its header has no size",
        b"P5\n" + b"1" * 5000 + b" 2\n9\n": "its header has no size",
        b"P2\n3 2\n9\n" + b"#" * 3_000_000: "a word or a comment of a million letters",
        b"P6\n90000 90000\n255\n": "over the limit",
    }.items():
        path.write_bytes(content)
        for read in (read_labels, read_image):
            assert reason in str(attempt(read, path)), content[:40]


def test_netpbm_across_blocks_of_text(tmp_path: Path) -> None:
    values = RANDOM.integers(0, 65536, (450, 451))
    (tmp_path / "large.pgm").write_bytes(image_files.netpbm(values, 2, 65535))
    np.testing.assert_array_equal(read_labels(tmp_path / "large.pgm"), values)
    one_line = b"P2 451 450 65535 " + b" ".join(str(value).encode() for value in values.ravel().tolist())
    (tmp_path / "line.pgm").write_bytes(one_line)
    np.testing.assert_array_equal(read_labels(tmp_path / "line.pgm"), values)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_bmp_palettes(bits: int, tmp_path: Path) -> None:
    path = tmp_path / "picture.bmp"
    for count, top_down in itertools.product({1, 2, 3, 2**bits}, (False, True)):
        if count > 2**bits:
            continue
        for palette in (
            [(index,) * 3 for index in range(count)],
            ([(0, 0, 0), (255, 255, 255)] * count)[:count],
            ([(255, 255, 255), (0, 0, 0)] * count)[:count],
            RANDOM.integers(0, 256, (count, 3)).tolist(),
        ):
            values = RANDOM.integers(0, count, (5, 9))
            path.write_bytes(image_files.bmp(values, bits, palette, top_down=top_down))
            exact(path, values, np.array(palette)[values], "a palette of few greys, which is misread; save it as PNG")


@pytest.mark.parametrize("size", [40, 56, 108, 124])
def test_bmp_bit_fields(size: int, tmp_path: Path) -> None:
    """Every order of four bytes, with every size of header."""
    path = tmp_path / "picture.bmp"
    values = RANDOM.integers(0, 256, (5, 9, 4)).astype(np.uint32)
    for shifts in itertools.permutations((0, 8, 16, 24)):
        pixels = sum(values[..., index] << shift for index, shift in enumerate(shifts))
        masks = np.left_shift(np.uint32(255), np.array(shifts, np.uint32))
        path.write_bytes(image_files.bmp_of_bit_fields(np.asarray(pixels), masks, size))
        exact(path, None, values[..., :3], "Unsupported BMP bitfields layout); save it as PNG")
        if shifts == (16, 8, 0, 24):
            assert not isinstance(attempt(read_image, path), str)


COMPRESSIONS = (None, "zlib")  # others need imagecodecs
KINDS = ("u1", "u2", "u4", "i1", "i2", "i4", "f2", "f4", "f8", "u8")
NOT_READ = ("which is not read here; save it as PNG, or as TIFF", "in which no value stands for white", "32-bit floats")


@EXAMPLES
@given(
    seed=seeds,
    kind=st.sampled_from(KINDS),
    layout=st.sampled_from(
        (
            *(
                ("minisblack", 1, ()),
                ("miniswhite", 1, ()),
                ("palette", 1, ()),
                ("minisblack", 2, (2,)),
                ("rgb", 3, ()),
            ),
            *(("rgb", 4, (0,)), ("rgb", 4, (2,)), ("rgb", 5, (0, 0)), ("separated", 4, ()), ("minisblack", 2, (0,))),
        )
    ),
    order=st.sampled_from("<>"),
    planar=st.booleans(),
    compression=st.sampled_from(COMPRESSIONS),
    predictor=st.booleans(),
    tile=st.sampled_from((None, (16, 16), (32, 16))),
    big=st.booleans(),
    rows=st.sampled_from((None, 1, 4)),
)
def test_tiff_of_tifffile(
    tmp_path: Path,
    seed: int,
    kind: str,
    layout: tuple[str, int, tuple[int, ...]],
    order: str,
    planar: bool,
    compression: str | None,
    predictor: bool,
    tile: tuple[int, int] | None,
    big: bool,
    rows: int | None,
) -> None:
    photometric, channels, extra = layout
    path = tmp_path / "picture.tif"
    random = np.random.default_rng(seed)
    size = (int(random.integers(1, 40)), int(random.integers(1, 40)))
    shape = size if channels == 1 else (channels, *size) if planar else (*size, channels)
    if kind[0] == "f":
        values = random.normal(size=shape).astype(kind)
    else:
        limits = np.iinfo(kind)
        values = random.integers(limits.min, limits.max, shape, kind, endpoint=True)
    options: dict[str, Any] = {"photometric": photometric, "byteorder": order, "bigtiff": big}
    if photometric == "palette":
        if kind != "u1":
            return
        options["colormap"] = random.integers(0, 65536, (3, 256)).astype(np.uint16)
        if seed % 2:
            options["colormap"] >>= 8  # as some writers do
    if channels > 1:
        options["planarconfig"] = "separate" if planar else "contig"
    if extra:
        options["extrasamples"] = extra
    if compression:
        options |= {"compression": compression, "predictor": predictor and kind[0] != "f" and kind != "u8"}
    options |= {"tile": tile} if tile else {"rowsperstrip": rows}
    tifffile.imwrite(path, values, **options)
    np.testing.assert_array_equal(tifffile.imread(path), values)

    pixels = np.moveaxis(values, 0, -1) if planar and channels > 1 else values
    photo = None
    if kind in ("u1", "u2"):
        largest = np.iinfo(kind).max
        if photometric == "palette":
            colours = options["colormap"]
            photo = (colours if colours.max() < 256 else colours >> 8).T[values]
        elif photometric == "separated":
            high = (pixels >> (8 if kind == "u2" else 0)).astype(np.uint8)
            photo = np.asarray(Image.frombytes("CMYK", size[::-1], high.tobytes()).convert("RGB"))
        elif photometric == "rgb":
            photo = pixels[..., :3] >> (8 if kind == "u2" else 0)
        else:
            first = pixels if channels == 1 else pixels[..., 0]
            photo = grey(largest - first if photometric == "miniswhite" else first, largest)
    labels = values if channels == 1 and kind[0] != "f" else None
    exact(path, labels, photo, *NOT_READ, "big-endian BigTIFF")
    common = ("minisblack", 1), ("miniswhite", 1), ("palette", 1), ("rgb", 3), ("rgb", 4)
    if kind in ("u1", "u2") and order == "<" and not planar and (photometric, channels) in common:
        assert not isinstance(attempt(read_image, path), str)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("photometric", [0, 1, 3])
def test_tiff_of_few_bits(bits: int, photometric: int, tmp_path: Path) -> None:
    path = tmp_path / "picture.tif"
    reversed_bits = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
    for order, compression, fill_order, rows, big in itertools.product("<>", (1, 8), (1, 2), (4, 13), (False, True)):
        values = RANDOM.integers(0, 2**bits, (13, 21))
        lines = image_files.packed_rows(values, bits)
        strips = [b"".join(lines[row : row + rows]) for row in range(0, 13, rows)]
        strips = [zlib.compress(strip) if compression == 8 else strip for strip in strips]
        strips = [strip.translate(reversed_bits) if fill_order == 2 else strip for strip in strips]
        tags = {258: [bits], 259: [compression], 262: [photometric], 266: [fill_order]}
        colours = RANDOM.integers(0, 65536, (3, 2**bits))
        if photometric == 3:
            tags[320] = colours.ravel().tolist()
        path.write_bytes(image_files.tiff(strips, (13, 21), tags, order=order, rows=rows, big=big))
        largest = 2**bits - 1
        photo = (
            (colours >> 8).T[values] if photometric == 3 else grey(values if photometric else largest - values, largest)
        )
        exact(path, values, photo, "which is not read here")
        if fill_order == 1 and not (big and order == ">"):
            assert not isinstance(attempt(read_labels, path), str)


def test_tiff_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "picture.tif"
    values = RANDOM.integers(0, 4096, (13, 20))
    digits = values[..., None] >> np.arange(12)[::-1] & 1
    lines = [np.packbits(line.astype(np.uint8)).tobytes() for line in digits.reshape(13, -1)]
    path.write_bytes(image_files.tiff([b"".join(lines)], (13, 20), {258: [12], 262: [1]}))
    exact(path, values, np.asarray(grey(values, 4095)))
    for mode, options in [
        *(("YCbCr", {"compression": name}) for name in (None, "tiff_lzw", "tiff_deflate", "packbits", "jpeg")),
        *((mode, {"compression": "jpeg"}) for mode in ("RGBA", "CMYK")),
    ]:
        image = Image.linear_gradient("L").convert("RGB").convert(mode)
        image.save(path, **options)
        np.testing.assert_allclose(np.asarray(read_image(path)), np.asarray(image.convert("RGB")), atol=4)
    for suffix, options in (("zlib", {"compression": "jpeg"}), ("fax", {"compression": "group4"})):
        image = picture("L" if suffix == "zlib" else "1")
        image.save(path, **options)
        found = attempt(read_labels, path)
        if suffix == "zlib":
            assert found == "is a TIFF compressed as JPEG, which changes class numbers; save label maps as PNG"
        else:
            np.testing.assert_array_equal(found, np.asarray(image))
        np.testing.assert_allclose(np.asarray(read_image(path))[..., 0], np.asarray(image.convert("L")), atol=40)
    # The fourth channel has no meaning, or is alpha by which the colours were multiplied.
    alpha = RANDOM.integers(1, 256, (5, 9, 1)).astype(np.uint8)
    colours = (RANDOM.integers(0, 256, (5, 9, 3)) * (alpha / 255)).astype(np.uint8)
    band = np.concatenate([colours, alpha], -1).tobytes()
    path.write_bytes(image_files.tiff([band], (5, 9), {258: [8] * 4, 262: [2], 277: [4]}))
    exact(path, None, colours)
    path.write_bytes(image_files.tiff([band], (5, 9), {258: [8] * 4, 262: [2], 277: [4], 338: [1]}))
    np.testing.assert_allclose(np.asarray(read_image(path)), np.minimum(colours / (alpha / 255), 255), atol=1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [None, "tiff_deflate"])
def test_turned_tiff_and_png(orientation: int, compression: str | None, tmp_path: Path) -> None:
    """Pillow mixes up the pixels of uncompressed TIFF files that it opens by their names and turns."""
    values = RANDOM.integers(0, 256, (5, 9)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "labels.tif"
    Image.fromarray(values).save(path, exif=exif, compression=compression)
    Image.fromarray(values).save(tmp_path / "labels.png", exif=exif)
    upright = {1: values, 2: values[:, ::-1], 3: values[::-1, ::-1], 4: values[::-1], 5: values.T} | {
        6: np.rot90(values, -1),
        7: np.rot90(values, 2).T,
        8: np.rot90(values),
    }
    for file in (path, tmp_path / "labels.png"):
        exact(file, upright[orientation], grey(upright[orientation], 255))


@EXAMPLES
@given(
    seed=seeds,
    suffix=st.sampled_from((".png", ".tif", ".bmp", ".pgm", ".ppm", ".pbm", ".webp", ".jp2")),
    sixteen=st.booleans(),
    channels=st.sampled_from((1, 3, 4)),
    writer=st.sampled_from(("opencv", "imageio")),
)
def test_files_of_opencv_and_imageio(
    tmp_path: Path, seed: int, suffix: str, sixteen: bool, channels: int, writer: str
) -> None:
    random = np.random.default_rng(seed)
    least = 64 if suffix == ".jp2" else 1  # OpenCV writes no smaller JPEG 2000
    size = tuple(int(side) for side in random.integers(least, least + 40, 2))
    sixteen = sixteen and suffix in (".png", ".tif", ".pgm", ".jp2") and (channels == 1 or writer == "opencv")
    if suffix in (".pgm", ".pbm"):
        channels = 1
    elif suffix == ".ppm" or (suffix in (".webp", ".jp2") and channels == 1):
        channels = 3
    values = random.integers(0, 65536 if sixteen else 256, (*size, channels)).astype(np.uint16 if sixteen else np.uint8)
    if channels == 1:
        values = values[..., 0]
    if suffix == ".pbm":
        values = values % 2 * np.uint8(255)
    if suffix == ".webp":
        values |= np.array([0, 0, 0, 1][:channels], np.uint8)  # OpenCV drops the colours of pixels whose alpha is 0
    path = tmp_path / f"picture{suffix}"
    if writer == "opencv":
        swapped = values if channels == 1 else values[..., [2, 1, 0, 3][:channels]]
        options = {".webp": [cv2.IMWRITE_WEBP_QUALITY, 101], ".jp2": [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000]}
        assert cv2.imwrite(str(path), swapped, options.get(suffix, []))
    else:
        if suffix in (".jp2", ".pbm"):
            return
        imageio.imwrite(path, values, **({"lossless": True, "exact": True} if suffix == ".webp" else {}))
    largest = 65535 if sixteen else 255
    labels = values if channels == 1 else None
    photo = grey(values, largest) if channels == 1 else values[..., :3] >> (8 if sixteen else 0)
    if suffix == ".pbm":
        labels = values // 255 if np.array_equal(read_labels(path), values // 255) else 1 - values // 255
    exact(path, labels, photo, "class numbers; save label maps as PNG", "save it with 8 bits", *NOT_READ)


@pytest.mark.parametrize("count", [2, 3, 16, 256])
def test_gif_palettes(count: int, tmp_path: Path) -> None:
    """Global and local colours, grey colours, interlacing, transparency and disposal: the indices are the numbers."""
    path = tmp_path / "labels.gif"
    for palette, interlace, disposal in itertools.product(
        (RANDOM.integers(0, 256, (count, 3)), np.repeat(np.arange(count)[:, None], 3, 1)), (0, 1), (0, 2, 3)
    ):
        values = RANDOM.integers(0, count, (9, 12)).astype(np.uint8)
        image = Image.fromarray(values)
        image.putpalette(palette.astype(np.uint8).tobytes())
        other = image.transpose(Image.Transpose.ROTATE_180)
        image.save(
            path,
            save_all=True,
            append_images=[other],
            interlace=interlace,
            disposal=disposal,
            transparency=1,
            optimize=False,
        )
        exact(path, values, palette[values])


# Damage


def damaged(content: bytes, seed: int) -> bytes:
    """Return a file with some bytes changed, cut off, repeated or left out."""
    random = np.random.default_rng(seed)
    changed = bytearray(content)
    near = int(random.choice([16, 64, 512, len(content)]))  # headers are hit often
    for _ in range(int(random.integers(0, 5))):
        changed[int(random.integers(0, min(near, len(changed))))] = int(
            random.choice([0, 1, 127, 128, 255, *range(256)])
        )
    kind = random.integers(0, 4)
    at, length = int(random.integers(0, len(changed))), int(random.integers(1, 40))
    if kind == 0:
        del changed[at:]
    elif kind == 1:
        del changed[at : at + length]
    elif kind == 2:
        changed[at:at] = changed[at : at + length]
    return bytes(changed)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The content of a file of every format and of several kinds."""
    folder = tmp_path_factory.mktemp("whole")
    files = {name: path.read_bytes() for name, path in write_all(folder).items()}
    for name, mode, options in [
        ("png", "P", {}),
        ("png", "I;16", {}),
        ("tif", "L", {}),
        ("tif", "RGBA", {"compression": "tiff_deflate"}),
        ("tif", "P", {"compression": "packbits"}),
        ("tif", "1", {"compression": "group4"}),
        ("tif", "RGB", {"compression": "jpeg"}),
        ("webp", "RGBA", {"lossless": True}),
        ("bmp", "P", {}),
        ("jpg", "CMYK", {"progressive": True}),
    ]:
        image = picture("L").convert(mode) if mode == "I;16" else picture(mode)
        exif = (
            {"exif": b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"}
            if name in ("jpg", "webp")
            else {}
        )
        image.save(folder / f"x.{name}", **options, **exif)
        files[f"{name} {mode} {options}"] = (folder / f"x.{name}").read_bytes()
    tifffile.imwrite(folder / "x.tif", np.asarray(picture()), tile=(16, 16), compression="zlib", predictor=True)
    files["tiled"] = (folder / "x.tif").read_bytes()
    values = np.asarray(picture("L"))
    for kind in (1, 2, 4, 5):
        files[f"P{kind}"] = image_files.netpbm(values % 2 if kind in (1, 4) else values, kind, 255)
    return files


def check_damage(whole: dict[str, bytes], path: Path, seed: int) -> None:
    for name, content in whole.items():
        path.write_bytes(damaged(content, seed + len(name)))
        for read in (read_image, read_labels):
            try:
                result = attempt(lambda path, read=read: read(path, max_pixels=1_000_000), path)
            except Exception as error:
                raise AssertionError(f"{name}, seed {seed}") from error
            assert isinstance(result, str) or result.shape[0] * result.shape[1] <= 1_000_000


@settings(EXAMPLES, max_examples=12)
@given(seed=seeds)
def test_damaged_files_are_refused_or_read(whole: dict[str, bytes], tmp_path: Path, seed: int) -> None:
    check_damage(whole, tmp_path / "photo", seed)


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_many_damaged_files_are_refused_or_read(whole: dict[str, bytes], tmp_path: Path) -> None:
    for seed in range(400):
        check_damage(whole, tmp_path / "photo", seed)


# Open images


MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "I;16")


@pytest.mark.parametrize("mode", [*MODES, "I;16L", "I;16B", "I;16N", "I", "F"])
def test_open_images_are_the_same_everywhere(mode: str, tmp_path: Path) -> None:
    """`as_samples`, the processor and, where a file can hold the mode, the file's reader make the same pixels."""
    values = RANDOM.integers(0, 65536, (4, 5)).astype(np.uint16)
    if mode.startswith("I;16"):
        image = Image.frombytes(mode, (5, 4), values.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    elif mode in ("I", "F"):
        image = Image.fromarray(values.astype(np.int32 if mode == "I" else np.float32))
    elif mode in ("LAB", "HSV", "La", "RGBa"):
        image = Image.frombytes(mode, (5, 4), RANDOM.integers(100, 256, 20 * len(mode[:4]), np.uint8).tobytes())
    elif mode == "PA":
        image = picture("P", (5, 4)).convert("PA")
    else:
        image = picture("RGBA", (5, 4)).convert(mode)
    sample = attempt_sample(image)
    plain = {"do_resize": False, "do_rescale": False, "do_normalize": False}
    if mode in ("I", "F"):
        assert "no value stands for white" in str(sample)
        with pytest.raises(ValueError, match="no value stands for white"):
            UperNetImageProcessor()(image)
        return
    processed = np.moveaxis(UperNetImageProcessor(**plain)(image)["pixel_values"][0], 0, -1)
    np.testing.assert_array_equal(processed, sample)
    np.testing.assert_array_equal(np.asarray(as_rgb(image, "image")), sample)
    if mode.startswith("I;16"):
        np.testing.assert_array_equal(sample[..., 0], np.rint(values / 257))
        np.testing.assert_array_equal(as_labels(image, "labels"), values)
    if mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        image.save(tmp_path / "image.png")
        np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "image.png")), sample)
    if mode in ("CMYK", "LAB", "RGBX"):
        image.save(tmp_path / "image.tif")
        np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "image.tif")), sample)


def attempt_sample(image: Image.Image) -> Any:
    try:
        return np.asarray(as_samples([(image, np.zeros(image.size[::-1], np.uint8))])[0].image)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "shape", [(2, 5, 3), (3, 5, 3), (5, 3, 3), (3, 3, 3), (1, 1, 3), (3, 1, 1), (3, 2, 5), (3, 3, 5)]
)
def test_small_arrays(shape: tuple[int, int, int]) -> None:
    """The label map's size tells which dimension of an array has the channels."""
    values = RANDOM.integers(0, 256, shape).astype(np.uint8)
    sizes = [size for size, channels in ((shape[:2], shape[2]), (shape[1:], shape[0])) if channels == 3]
    for size in sizes:
        image = np.asarray(as_samples([(values, np.zeros(size, np.uint8))])[0].image)
        last = values if shape[:2] == size else np.moveaxis(values, 0, -1)
        np.testing.assert_array_equal(image, last)


def test_a_photo_that_was_read_can_be_sent_to_another_process(tmp_path: Path) -> None:
    for path in write_all(tmp_path).values():
        image = read_image(path)
        assert image.info == {}
        np.testing.assert_array_equal(np.asarray(pickle.loads(pickle.dumps(image))), np.asarray(image))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")


# Memory


@pytest.mark.parametrize(("mode", "most"), [("RGBA", 5.2), ("LA", 6.2), ("P", 6.2), ("I;16", 8.4)])
def test_memory_of_opening(mode: str, most: float, tmp_path: Path) -> None:
    """Pillow's RGB has 4 bytes a pixel. Beside it the decoder's picture is in memory, and of RGBA not even that."""
    side = 2500
    image = Image.new(mode, (side, side))
    options = {}
    if mode == "P":
        image.putpalette([1, 2, 3, 4, 5, 6])
        options = {"transparency": b"\x80\x10"}
    image.save(tmp_path / "photo.png", compress_level=1, **options)
    script = (
        "import resource, sys; from fastuper.data.images import read_image; peak = lambda: "
        "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; from PIL import PngImagePlugin; before = peak(); "
        "image = read_image(sys.argv[1]); print(peak() - before)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "photo.png")]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(found.stdout) * unit / side**2 < most

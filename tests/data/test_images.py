"""The decoder of photos, class colours, label maps as PNG, overlays."""

from __future__ import annotations

import os
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from fastuper.data import classes
from fastuper.data import overlay as overlays
from fastuper.data.classes import class_palette
from fastuper.data.images import ImageError, as_grey, as_rgb, read_image
from fastuper.data.overlay import class_shares, overlay, save_label_png


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(data.chelsea()).resize((45, 30))


def png_header(width: int, height: int) -> bytes:
    """Return a PNG whose header declares a size and which has no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 1000) + b"IDAT"


# Reading


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_every_mode_reads_as_the_conversion_of_its_pixels(photo: Image.Image, mode: str, tmp_path: Path) -> None:
    converted = photo.convert(mode)
    path = tmp_path / f"photo.{({'CMYK': 'tif', 'YCbCr': 'jpg'}).get(mode, 'png')}"
    converted.save(path, quality=100, subsampling=0)
    image = read_image(path)
    assert image.mode == "RGB"
    with Image.open(path) as reopened:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(reopened.convert("RGB")))
    assert np.abs(np.asarray(image).astype(int) - np.asarray(converted.convert("RGB")).astype(int)).max() <= 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_transparent_pixels_have_their_stored_colours(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "transparent.png"
    if mode in ("RGBA", "LA"):
        image = Image.new(mode, (2, 1), (40, 50, 60, 0) if mode == "RGBA" else (40, 0))
        image.putpixel((1, 0), (255, 0, 0, 128) if mode == "RGBA" else (100, 255))
        expected = [(40, 50, 60), (255, 0, 0)] if mode == "RGBA" else [(40, 40, 40), (100, 100, 100)]
        image.save(path)
    elif mode == "P":
        image = Image.new("P", (2, 1), 0)
        image.putpalette([40, 50, 60, 10, 20, 30])
        image.putpixel((1, 0), 1)
        image.save(path, transparency=b"\x00\x80")
        expected = [(40, 50, 60), (10, 20, 30)]
    else:  # the file names a transparent colour
        image = Image.new(mode, (2, 1), 40 if mode == "L" else (40, 50, 60))
        image.putpixel((1, 0), 77 if mode == "L" else (7, 8, 9))
        image.save(path, transparency=40 if mode == "L" else (40, 50, 60))
        expected = [(40, 40, 40), (77, 77, 77)] if mode == "L" else [(40, 50, 60), (7, 8, 9)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(np.asarray(read_image(path)), np.array([expected], np.uint8))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "1", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I;16B"])
def test_grey_is_that_of_the_colours(photo: Image.Image, mode: str) -> None:
    if mode == "LAB":
        image = Image.frombytes("LAB", photo.size, photo.tobytes())
    elif mode.startswith("I;16"):
        values = np.arange(photo.width * photo.height, dtype=np.uint16) * 48
        image = Image.frombytes(mode, photo.size, values.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    else:
        image = photo.convert("P").convert("PA") if mode == "PA" else photo.convert(mode)
    grey = as_grey(image, "photo")
    assert grey.mode == "L"
    np.testing.assert_array_equal(np.asarray(grey), np.asarray(as_rgb(image, "photo").convert("L")))
    if not mode.startswith("I;16"):
        np.testing.assert_array_equal(np.asarray(grey), np.asarray(image.convert("RGB").convert("L")))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_not_clipped(suffix: str, tmp_path: Path) -> None:
    values = np.array([[0, 257, 1000, 32768, 65535]], dtype=np.uint16)
    path = tmp_path / f"grey.{suffix}"
    Image.fromarray(values).save(path)
    result = np.asarray(read_image(path))
    np.testing.assert_array_equal(result[..., 0], np.round(values / 257).astype(np.uint8))
    assert (result == result[..., :1]).all()
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(as_rgb(image, "grey")), result)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_values_are_refused_with_the_remedy(dtype: type, tmp_path: Path) -> None:
    path = tmp_path / "depth.tif"
    Image.fromarray(np.ones((3, 4), dtype=dtype)).save(path)
    message = r"depth\.tif: holds 32-bit .*no value stands for white; .*save it as 8-bit RGB or 16-bit grey"
    with pytest.raises(ImageError, match=message):
        read_image(path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(photo: Image.Image, orientation: int, tmp_path: Path) -> None:
    operations = Image.Transpose
    undo = {
        2: operations.FLIP_LEFT_RIGHT,
        3: operations.ROTATE_180,
        4: operations.FLIP_TOP_BOTTOM,
        5: operations.TRANSPOSE,
        6: operations.ROTATE_90,
        7: operations.TRANSVERSE,
        8: operations.ROTATE_270,
    }
    stored = photo.transpose(undo[orientation]) if orientation in undo else photo
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "rotated.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "rotated.png")), np.asarray(photo))


def test_damaged_exif_does_not_lose_the_photo(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert read_image(tmp_path / "photo.jpg").size == photo.size


def test_one_pixel(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "pixel.png")
    assert read_image(tmp_path / "pixel.png").getpixel((0, 0)) == (1, 2, 3)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "animated.gif").getpixel((0, 0)) == (255, 0, 0)


def test_extension_does_not_matter(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.jpg", format="PNG")
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "photo.jpg")), np.asarray(photo))


def test_missing_empty_folder_and_foreign_files_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("not a photo\n" * 40)
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in [
        ("missing.png", "no such file"),
        ("empty.png", "the file is empty"),
        ("text.jpg", "is not an image"),
        ("pipe.png", "not a regular file"),
        (".", "is a folder"),
    ]:
        with pytest.raises(FileNotFoundError if name == "missing.png" else ImageError, match=reason) as caught:
            read_image(tmp_path / name)
        assert isinstance(caught.value, ImageError)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_refused(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "secret.png")
    (tmp_path / "secret.png").chmod(0)
    with pytest.raises(ImageError, match=r"secret\.png: no permission"):
        read_image(tmp_path / "secret.png")


def test_refused_permission_is_named(photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> Image.Image:
        raise PermissionError(13, "Permission denied")

    photo.save(tmp_path / "secret.png")
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(ImageError, match=r"secret\.png: no permission to read it$"):
        read_image(tmp_path / "secret.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tif", "bmp"])
@pytest.mark.parametrize("kept", [0.1, 0.6])
def test_truncated_file_is_refused(suffix: str, kept: float, tmp_path: Path) -> None:
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(data.chelsea()).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ImageError, match=rf"photo\.{suffix}: ") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_pixel_limit_is_checked_before_decoding(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(50_000, 50_000))
    with pytest.raises(
        ImageError, match=r"bomb\.png: 50000 x 50000 = 2,500,000,000 pixels is over the limit of 250,000"
    ):
        read_image(path)


def test_own_limit_stands_in_for_pillows(photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo.save(tmp_path / "photo.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert read_image(tmp_path / "photo.png").size == photo.size
    assert Image.MAX_IMAGE_PIXELS == 10
    with pytest.raises(ImageError, match="over the limit of 1,349;"):
        read_image(tmp_path / "photo.png", max_pixels=45 * 30 - 1)


# Colours


def test_ade20k_names_and_colours() -> None:
    names, palette = classes.ade20k_names(), classes.ade20k_palette()
    assert len(names) == len(set(names)) == 150
    assert names[:5] == ("wall", "building", "sky", "floor", "tree")
    assert names[-5:] == ("shower", "radiator", "glass", "clock", "flag")
    assert all(name == name.strip() for name in names)
    assert palette.shape == (150, 3)
    assert palette.dtype == np.uint8
    assert palette[:5].tolist() == [[120, 120, 120], [180, 120, 120], [6, 230, 230], [80, 50, 50], [4, 200, 3]]
    assert (
        palette[-5:].tolist()
        == [[184, 255, 0], [0, 133, 255], [255, 214, 0], [25, 194, 194], [102, 255, 0], [92, 0, 255]][1:]
    )
    # As published: road and skyscraper share a grey, all others are distinct.
    assert palette[names.index("road")].tolist() == palette[names.index("skyscraper")].tolist()
    assert len(np.unique(palette, axis=0)) == 149


def test_ade20k_palette_is_a_copy() -> None:
    classes.ade20k_palette()[:] = 0
    assert classes.ade20k_palette().any()


def test_ade20k_colours_are_used_for_ade20k_names_only() -> None:
    names = dict(enumerate(classes.ade20k_names()))
    as_on_the_hub = names | {7: "bed "}
    np.testing.assert_array_equal(class_palette(as_on_the_hub), classes.ade20k_palette())
    assert not np.array_equal(class_palette(names | {7: "cot"}), classes.ade20k_palette())
    np.testing.assert_array_equal(class_palette(names | {7: "cot"}), class_palette(150))


@pytest.mark.parametrize(
    ("stored", "used"),
    [
        ([[1, 2, 3], [0, 255, 0]], True),
        (((1, 2, 3), (0, 255, 0)), True),
        ([[1, 2, 3]], False),
        ([[1, 2, 3], [0, 256, 0]], False),
        ([[1, 2, 3], "red"], False),
        ("ab", False),
    ],
)
def test_colours_of_a_configuration_are_used_if_each_class_has_one(stored, used) -> None:
    expected = np.array(stored, dtype=np.uint8) if used else class_palette(2)
    np.testing.assert_array_equal(class_palette({0: "a", 1: "b"}, stored), expected)


@pytest.mark.parametrize("count", [1, 2, 19, 256, 3000])
def test_class_colours_are_distinct_and_repeatable(count: int) -> None:
    palette = class_palette(count)
    assert palette.shape == (count, 3)
    assert len(np.unique(palette, axis=0)) == count
    np.testing.assert_array_equal(palette, class_palette(count))
    np.testing.assert_array_equal(palette, class_palette(count + 1)[:count])


# Label maps


def test_shares() -> None:
    np.testing.assert_array_equal(class_shares([[0, 0], [2, 0]], 4), [0.75, 0, 0.25, 0])
    for labels in ([[0, 4]], [[-1, 0]], [[0.5]], [0], [[]]):
        with pytest.raises(ValueError, match=r"label"):
            class_shares(labels, 4)


def test_shares_of_a_large_map_take_little_memory() -> None:
    labels = np.zeros((4000, 4000), dtype=np.uint8)
    labels[1000:] = 2
    tracemalloc.start()
    np.testing.assert_array_equal(class_shares(labels, 3), [0.25, 0, 0.75])
    assert tracemalloc.get_traced_memory()[1] < 1.5 * labels.nbytes
    tracemalloc.stop()


def test_label_png_holds_the_labels_and_the_colours(tmp_path: Path) -> None:
    labels = np.arange(256).reshape(8, 32)
    palette = class_palette(256)
    save_label_png(labels, palette, tmp_path / "labels.png")
    with Image.open(tmp_path / "labels.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), labels)
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), palette[labels])


def test_more_than_256_classes_make_a_16_bit_png(tmp_path: Path) -> None:
    labels = np.array([[0, 256, 299]])
    save_label_png(labels, class_palette(300), tmp_path / "labels.png")
    with Image.open(tmp_path / "labels.png") as image:
        assert image.mode.startswith("I")
        np.testing.assert_array_equal(np.asarray(image), labels)
    with pytest.raises(ValueError, match="65,537 classes"):
        save_label_png(labels, np.zeros((65537, 3)), tmp_path / "labels.png")


def test_label_png_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_half_way(self: Image.Image, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    save_label_png([[1]], class_palette(2), tmp_path / "labels.png")
    before = (tmp_path / "labels.png").read_bytes()
    monkeypatch.setattr(Image.Image, "save", fail_half_way)
    with pytest.raises(OSError, match="disk full"):
        save_label_png([[0]], class_palette(2), tmp_path / "labels.png")
    assert [path.name for path in tmp_path.iterdir()] == ["labels.png"]
    assert (tmp_path / "labels.png").read_bytes() == before


def test_label_out_of_the_palette_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="from 0 to 3, but there are 3 classes"):
        save_label_png([[0, 3]], class_palette(3), tmp_path / "labels.png")
    assert not any(tmp_path.iterdir())


# Overlays


def test_overlay_mixes_photo_and_colours_and_puts_the_legend_beside() -> None:
    photo = Image.fromarray(data.coffee())
    labels = np.zeros((400, 600), dtype=np.int64)
    labels[:, 300:] = 1
    palette = np.array([[255, 0, 0], [0, 0, 255]], dtype=np.uint8)
    picture = overlay(photo, labels, {0: "left", 1: "right"}, palette, alpha=0.25)
    assert picture.mode == "RGB"
    assert picture.width > 600
    assert picture.height == 400
    expected = 0.75 * data.coffee() + 0.25 * palette[labels]
    np.testing.assert_allclose(np.asarray(picture)[:, :600], expected, atol=1.01)
    legend = np.asarray(picture)[:, 600:].reshape(-1, 3)
    assert {(255, 0, 0), (0, 0, 255)} <= set(map(tuple, legend.tolist()))


def test_legend_has_the_largest_share_first() -> None:
    labels = np.repeat([2, 0, 3, 1], [10, 40, 20, 130])[None].repeat(200, axis=0)
    palette = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 0, 255]], dtype=np.uint8)
    picture = overlay(Image.new("RGB", (200, 200)), labels, {}, palette)
    legend = np.asarray(picture)[:, 200:]
    tops = {index: np.argwhere((legend == palette[index]).all(-1))[:, 0].min() for index in range(4)}
    assert sorted(tops, key=tops.__getitem__) == [1, 0, 3, 2]


@pytest.mark.parametrize(
    "size", [(1, 1), (200, 133), (3000, 7), (7, 3000), (5000, 3000)], ids=lambda size: f"{size[0]}x{size[1]}"
)
def test_overlay_of_any_size(size: tuple[int, int]) -> None:
    width, height = size
    labels = np.arange(width * height).reshape(height, width) % 40
    picture = overlay(Image.new("RGB", size, "white"), labels, {}, class_palette(40))
    assert 96 <= max(picture.size) <= overlays.OVERLAY_SIDE + 1500
    assert picture.height >= 96


def test_overlay_survives_any_class_name() -> None:
    names = [
        "家",
        "naïve façade Ω",
        "a name that goes on and on " * 9,
        "",
        "line\nbreak",
        "\U0001f600",
        "\udcff",
        "\x00",
    ]
    labels = np.arange(64).reshape(8, 8) % len(names)
    overlay(Image.new("RGB", (8, 8)), labels, dict(enumerate(names)), class_palette(len(names)))


def test_overlay_refuses_a_label_map_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"\(8, 9\).*\(9, 8\)"):
        overlay(Image.new("RGB", (9, 8)), np.zeros((9, 8), dtype=int), {}, class_palette(1))


@pytest.mark.parametrize(
    ("share", "text"), [(1, "100.0 %"), (0.1234, "12.3 %"), (0.0005, "0.1 %"), (0.0004, "< 0.1 %"), (0, "0.0 %")]
)
def test_shares_are_written_as_percentages(share: float, text: str) -> None:
    assert overlays.format_share(share) == text

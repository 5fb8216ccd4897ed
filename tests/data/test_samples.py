"""Datasets in their layouts, errors of bad datasets, and reproducible augmentation."""

from __future__ import annotations

import json
import os
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from fastuper import UperNetImageProcessor
from fastuper.data.augment import TrainingDataset, TrainingTransform, scaled_size
from fastuper.data.class_lists import read_class_list
from fastuper.data.classes import ade20k_names, class_palette
from fastuper.data.folders import CITYSCAPES_CLASSES, FolderDataset, find_splits, open_dataset
from fastuper.data.images import ImageError, read_image, read_labels
from fastuper.data.label_check import check_labels
from fastuper.data.samples import DataError, Sample, as_samples
from fastuper.io.messages import one_line

RANDOM = np.random.default_rng(0)


def photo(path: Path, height: int = 6, width: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


def label_map(path: Path, values: object = 0, height: int = 6, width: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.broadcast_to(np.asarray(values), (height, width))
    Image.fromarray(array.astype(np.uint16 if array.max() > 255 else np.uint8)).save(path)
    return path


def pair(root: Path, name: str = "a", values: object = 0) -> None:
    photo(root / "images" / f"{name}.jpg")
    label_map(root / "labels" / f"{name}.png", values)


# Layouts


def test_folders_are_paired_by_name_in_their_subfolders(tmp_path: Path) -> None:
    for number, name in enumerate(("b", "deep/er/a", "deep/b", "a.b")):
        pair(tmp_path, name, number)
    (tmp_path / "images" / ".hidden.jpg").write_bytes(b"")
    (tmp_path / "labels" / "notes.txt").write_text("no label map")
    dataset = open_dataset(tmp_path)
    found = {Path(sample.name).relative_to(tmp_path / "images").as_posix(): sample.label[0, 0] for sample in dataset}
    assert found == {"b.jpg": 0, "deep/er/a.jpg": 1, "deep/b.jpg": 2, "a.b.jpg": 3}
    assert dataset.id2label is None
    assert find_splits(tmp_path) == []
    assert dataset[0].image.mode == "RGB"


def test_splits_by_any_of_their_names(tmp_path: Path) -> None:
    for split, value in (("train", 1), ("val", 2), ("extra", 3)):
        photo(tmp_path / "images" / split / "x.png")
        label_map(tmp_path / "labels" / split / "x.png", value)
    assert find_splits(tmp_path) == ["extra", "train", "val"]
    for split, value in (("training", 1), ("train", 1), ("validation", 2), ("extra", 3)):
        (sample,) = open_dataset(tmp_path, split)
        assert (sample.label == value).all()
    with pytest.raises(DataError, match="has no split test; it has extra, train, val"):
        open_dataset(tmp_path, "test")
    with pytest.raises(DataError, match="has the splits extra, train, val; say which"):
        open_dataset(tmp_path)


def test_ade20k(tmp_path: Path) -> None:
    values = np.arange(48).reshape(6, 8)
    values[5] = [0, 150, 149, 1, 255, 0, 150, 2]
    photo(tmp_path / "images" / "validation" / "ADE_val_00000001.jpg")
    label_map(tmp_path / "annotations" / "validation" / "ADE_val_00000001.png", values)
    dataset = open_dataset(tmp_path, "val")
    assert dataset.id2label == dict(enumerate(ade20k_names()))
    processor = UperNetImageProcessor(do_resize=False, do_reduce_labels=True)
    images, labels = (Image.open(path) for path in dataset.files[0])
    expected = processor([images], [labels], return_tensors="np")["labels"][0]
    np.testing.assert_array_equal(dataset[0].label, expected)
    assert set(expected[5].tolist()) == {255, 149, 148, 0, 1}

    label_map(dataset.files[0][1], 151)
    with pytest.raises(DataError, match=r"00000001.png: holds the label 150, but there are 150 classes \(0 to 149\)"):
        dataset[0]


def test_annotations_that_are_not_ade20k_keep_their_label_0_unless_told(tmp_path: Path) -> None:
    photo(tmp_path / "images" / "train" / "x.png")
    label_map(tmp_path / "annotations" / "train" / "x.png", 1)
    with pytest.raises(DataError, match="not its splits; say layout ade20k if label 0 is to be ignored, or rename"):
        open_dataset(tmp_path, "train")
    assert (open_dataset(tmp_path, "train", "ade20k")[0].label == 0).all()
    (tmp_path / "images" / "train").rename(tmp_path / "images" / "training")
    (tmp_path / "annotations" / "train").rename(tmp_path / "annotations" / "training")
    assert len(open_dataset(tmp_path, "train")) == 1
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match="not its classes; say layout ade20k"):
        open_dataset(tmp_path, "train")


@pytest.mark.parametrize("by_train_id", [True, False])
def test_cityscapes(tmp_path: Path, by_train_id: bool) -> None:
    ids = np.arange(34).repeat(2)[:48].reshape(6, 8)
    ids[0, :7] = [33, 32, 31, 28, 27, 26, 255]
    classes = list(CITYSCAPES_CLASSES)
    train_ids = np.vectorize(lambda value: classes.index(value) if value in classes else 255)(ids)
    start = tmp_path / "gtFine" / "train" / "ulm" / "ulm_000001_000019_gtFine"
    photo(tmp_path / "leftImg8bit" / "train" / "ulm" / "ulm_000001_000019_leftImg8bit.png")
    label_map(start.with_name(start.name + "_labelIds.png"), ids)
    label_map(start.with_name(start.name + "_color.png"), 9)
    if by_train_id:
        label_map(start.with_name(start.name + "_labelTrainIds.png"), train_ids)
    dataset = open_dataset(tmp_path, "training")
    (sample,) = dataset
    np.testing.assert_array_equal(sample.label, train_ids)
    assert sample.name.endswith("ulm_000001_000019_leftImg8bit.png")
    assert len(dataset.id2label) == 19
    assert (dataset.id2label[0], dataset.id2label[18]) == ("road", "bicycle")


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_labels_of_few_bits(bits: int, tmp_path: Path) -> None:
    """PNG optimizers write them; Pillow multiplies grey of 2 and 4 bits so that it fills 8 bits."""
    values = (np.arange(5 * 7).reshape(5, 7) % (1 << bits)).astype(np.uint8)
    digits = values[..., None] >> np.arange(bits)[::-1] & 1
    lines = b"".join(b"\0" + np.packbits(line).tobytes() for line in digits.reshape(5, -1))

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 7, 5, bits, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    path = tmp_path / "labels.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in chunks))
    np.testing.assert_array_equal(read_labels(path), values)
    assert read_labels(path).dtype == np.uint8


def test_class_names_beside_the_folders(tmp_path: Path) -> None:
    pair(tmp_path, values=2)
    (tmp_path / "classes.txt").write_text("cat\ndog\n  red fox \n\n", encoding="utf-8")
    assert open_dataset(tmp_path).id2label == {0: "cat", 1: "dog", 2: "red fox"}
    assert open_dataset(tmp_path, id2label={0: "x", 1: "y", 2: "z"}).id2label[2] == "z"
    (tmp_path / "classes.txt").write_text("cat\ndog", encoding="utf-8-sig")  # Windows editors write a byte order mark
    assert open_dataset(tmp_path).id2label == {0: "cat", 1: "dog"}
    (tmp_path / "classes.txt").write_text("café", encoding="cp1252")
    with pytest.raises(DataError, match=r"classes\.txt: is not UTF-8"):
        open_dataset(tmp_path)
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "id2label.json").write_text(json.dumps({"1": "dog", "0": "cat", "2": "fox"}))
    assert list(open_dataset(tmp_path).id2label.items()) == [(0, "cat"), (1, "dog"), (2, "fox")]
    for wrong in ({"1": "dog"}, {"a": "cat"}, {}):
        (tmp_path / "id2label.json").write_text(json.dumps(wrong))
        with pytest.raises(DataError, match=r"id2label\.json: write"):
            open_dataset(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "cat\r\ndog\r\nred fox\r\n",
        "\ufeffcat\ndog\nred fox",
        " cat \ndog\t\nred fox\n\n \n",
        "cat\rdog\rred fox\r",
        "0: cat\n1: dog\n2: red fox",
        "0\tcat\n1\tdog\n2\tred fox",
        "0,cat\n1,dog\n2,red fox",
    ],
)
def test_class_lists_of_every_kind(text: str, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes(text.encode())
    assert read_class_list(tmp_path) == {0: "cat", 1: "dog", 2: "red fox"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"sky\n\nroad\n", "line 2 is empty"),
        (b"\nsky\nroad", "line 1 is empty"),
        (b"sky\nroad\nsky", "lines 1 and 3 have the same name sky"),
        (b"# classes\nsky", "line 1 begins with #"),
        (b"1: sky\n2: road", "line 1 has the number 1, but the classes of the lines count from 0"),
        (b"0: sky\n2: road", "line 2 has the number 2"),
        (b"sky\t0\t0\t0", "line 1 has a tab inside"),
        (b"sky\nro\x00ad", "line 2 has the control character"),
        (b"caf\xe9", "is not UTF-8"),
        ("sky\nroad".encode("utf-16"), "is not UTF-8"),
        (b" \n\n", "is empty"),
    ],
)
def test_class_lists_that_could_be_misread_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"classes\.txt: {message}") as error:
        read_class_list(tmp_path)
    assert "\n" not in str(error.value)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1), min_size=1, max_size=6))
def test_class_lists_are_read_as_written_or_refused(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    folder = tmp_path_factory.mktemp("names")
    (folder / "classes.txt").write_text("\n".join(names), encoding="utf-8", newline="")
    try:
        found = read_class_list(folder)
    except DataError:
        return
    expected = [name.strip() for name in names]
    numbered = [re.sub(r"^\d+\s*[:,;=]\s*", "", name) for name in expected]
    while not expected[-1]:
        del expected[-1], numbered[-1]
    assert found is not None
    assert list(found.values()) in (expected, numbered)


def test_class_lists_that_cannot_be_read_or_differ(tmp_path: Path) -> None:
    assert read_class_list(tmp_path) is None
    listed, mapped = tmp_path / "classes.txt", tmp_path / "id2label.json"
    listed.symlink_to("nowhere")
    with pytest.raises(DataError, match=r"classes\.txt: No such file or directory; a link must lead"):
        read_class_list(tmp_path)
    listed.unlink()
    os.mkfifo(listed)
    with pytest.raises(DataError, match=r"classes\.txt: is no file"):
        read_class_list(tmp_path)
    listed.unlink()
    listed.write_text("sky\nroad")
    mapped.write_text('{"0": "road", "1": "sky"}')
    with pytest.raises(DataError, match="name different classes"):
        read_class_list(tmp_path)
    mapped.write_text('{"1": "road", "0": "sky"}')
    assert read_class_list(tmp_path) == {0: "sky", 1: "road"}
    for wrong in ('{"0": null}', '{"0": ""}', '{" 0": "a"}', '{"0": "a", "00": "b"}'):
        mapped.write_text(wrong)
        with pytest.raises(DataError, match=r"id2label\.json: write"):
            read_class_list(tmp_path)


def test_a_class_can_be_ignored_with_names_too(tmp_path: Path) -> None:
    pair(tmp_path, values=np.arange(8) % 3)
    (tmp_path / "classes.txt").write_text("background\ncat\ndog")
    dataset = open_dataset(tmp_path, ignore_index=0)
    assert dataset.ignore_index == 0
    assert set(dataset[0].label.ravel().tolist()) == {0, 1, 2}


def test_reduced_labels_are_never_lost(tmp_path: Path) -> None:
    """Label 256 less one is 255, the ignored label."""
    pair(tmp_path, values=np.array([0, 1, 2, 254, 256, 3, 4, 5]))
    folders = tmp_path / "images", tmp_path / "labels"
    with pytest.raises(DataError, match=r"a\.png: holds the label 256, which reduced by one is 255, the ignored label"):
        FolderDataset(*folders, reduce_labels=True)[0]
    label = FolderDataset(*folders, reduce_labels=True, ignore_index=65535)[0].label
    assert label[0].tolist() == [65535, 0, 1, 253, 255, 2, 3, 4]
    with pytest.raises(ValueError, match="ignore_index 3 is a class, or the value of a class in files whose labels"):
        FolderDataset(*folders, reduce_labels=True, id2label={0: "a", 1: "b", 2: "c"}, ignore_index=3)


def test_more_classes_than_255_need_another_ignore_index(tmp_path: Path) -> None:
    classes = {number: str(number) for number in range(300)}
    pair(tmp_path, values=299)
    with pytest.raises(ValueError, match="ignore_index 255 is also a class"):
        open_dataset(tmp_path, id2label=classes)
    dataset = open_dataset(tmp_path, id2label=classes, ignore_index=65535)
    assert dataset[0].label.max() == 299
    label_map(tmp_path / "labels" / "a.png", 65535)
    assert dataset[0].label.max() == 65535


def test_labels_that_may_be_reduced_twice_are_reported(tmp_path: Path) -> None:
    names = {0: "a", 1: "b"}
    for value, lines in ((255, 1), (0, 0)):
        pair(tmp_path, values=np.array([value, 1, 2, 1, 2, 1, 2, 1]))
        dataset = FolderDataset(tmp_path / "images", tmp_path / "labels", reduce_labels=True, id2label=names)
        said: list[str] = []
        check_labels(dataset, names, training=True, notify=said.append)
        assert len(said) == lines
    pair(tmp_path, values=np.array([0, 255, 0, 255, 0, 255, 0, 255]))
    with pytest.raises(DataError, match=r"all pixels of the label map are ignored \(label 255 and 0\)"):
        check_labels(dataset, names, training=False)


def test_a_class_that_another_split_holds_may_be_missing(tmp_path: Path) -> None:
    names = {0: "a", 1: "b"}
    pair(tmp_path, values=np.array([0, 255, 0, 255, 0, 255, 0, 255]))
    dataset = FolderDataset(tmp_path / "images", tmp_path / "labels", id2label=names)
    said: list[str] = []
    seen = check_labels(dataset, names, training=False, known={0, 1}, notify=said.append)
    assert (seen.classes, seen.ignored, said) == ({0}, True, [])
    with pytest.raises(DataError, match="if 255 is a class, as in masks of 0 and 255, renumber it to 1"):
        check_labels(dataset, names, training=False, known={0})


# Links, names, and what cannot be read


@pytest.mark.parametrize("links", [["a"], ["a", "b"], ["deep/parent"]], ids=" ".join)
@pytest.mark.parametrize("sides", [("images", "labels"), ("images",), ("labels",)], ids=" ".join)
def test_links_to_folders_end(links: list[str], sides: tuple[str, ...], tmp_path: Path) -> None:
    pair(tmp_path, "x", 1)
    pair(tmp_path, "deep/y", 2)
    for side in sides:
        for link in links:
            (tmp_path / side / link).symlink_to("../" * link.count("/") or ".")
    dataset = open_dataset(tmp_path)
    names = [Path(sample.name).relative_to(tmp_path / "images").as_posix() for sample in dataset]
    assert names == ["deep/y.jpg", "x.jpg"]


def test_folders_that_all_link_to_each_other_end(tmp_path: Path) -> None:
    for name in "abcdefgh":
        pair(tmp_path, f"{name}/x")
        for other in "abcdefgh":
            for side in ("images", "labels"):
                if other != name:
                    (tmp_path / side / name / other).symlink_to(f"../{other}")
    assert len(open_dataset(tmp_path)) == 8


def test_two_photos_may_share_a_label_map_through_links(tmp_path: Path) -> None:
    """A second camera's photos have the first camera's label maps; a link to a file is another name of it."""
    pair(tmp_path, "left/x", 1)
    photo(tmp_path / "images" / "right" / "x.jpg")
    (tmp_path / "labels" / "right").symlink_to("left")
    photo(tmp_path / "images" / "left" / "y.jpg")
    (tmp_path / "labels" / "left" / "y.png").symlink_to("x.png")
    (tmp_path / "images" / "right" / "y.jpg").symlink_to("x.jpg")  # the same two files as right/x
    dataset = open_dataset(tmp_path)
    names = [Path(sample.name).relative_to(tmp_path / "images").as_posix() for sample in dataset]
    assert names == ["left/x.jpg", "left/y.jpg", "right/x.jpg"]
    for side, name in (("images", "left/z.jpg"), ("labels", "left/z.png")):
        (tmp_path / side / name).symlink_to("x" + name[-4:])
    assert len(open_dataset(tmp_path)) == 3


def test_names_in_two_forms_are_one_name(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    photo(tmp_path / "images" / composed / f"{decomposed}.JPG")
    label_map(tmp_path / "labels" / decomposed / f"{composed}.PNG")
    assert len(open_dataset(tmp_path)) == 1
    photo(tmp_path / "images" / composed / f"{composed}.jpg")
    with pytest.raises(DataError, match="have the same name; take one of them away"):
        open_dataset(tmp_path)
    (tmp_path / "images" / composed / f"{composed}.jpg").unlink()
    (tmp_path / "images" / decomposed).mkdir()
    with pytest.raises(DataError, match="have the same name; rename one of them"):
        open_dataset(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    pair(tmp_path, name)
    (sample,) = open_dataset(tmp_path)
    assert name in sample.name
    (tmp_path / "labels" / f"{name}.png").unlink()
    label_map(tmp_path / "labels" / "x.png")
    with pytest.raises(DataError) as error:
        open_dataset(tmp_path)
    assert "caf" in one_line(error.value)


def broken(root: Path, kind: str, name: str) -> None:
    for side, suffix in (("images", ".jpg"), ("labels", ".png")):
        path = root / side / f"{name}{suffix}"
        if kind == "photo" and side == "labels":
            label_map(path)
        elif kind == "label map" and side == "images":
            photo(path)
        elif kind == "folder":
            (root / side / name).mkdir() if side == "labels" else (root / side / name).symlink_to("nowhere")
        else:
            path.symlink_to(path.name)


@pytest.mark.parametrize("kind", ["photo", "label map", "both", "folder"])
def test_what_cannot_be_read_is_named_or_left_out_and_listed(kind: str, tmp_path: Path) -> None:
    pair(tmp_path, "good")
    for number in range(5):
        broken(tmp_path, kind, f"bad{number}")
    with pytest.raises(DataError) as error:
        open_dataset(tmp_path)
    count = 10 if kind == "both" else 5
    assert str(error.value).startswith(f"{count} files or folders cannot be read: {tmp_path}")
    assert f", and {count - 3} more; mend them" in str(error.value)
    dataset = open_dataset(tmp_path, skip_unreadable=True)
    assert [Path(name).stem for _, _, name in dataset] == ["good"]
    assert len(dataset.problems) == count


def test_broken_links_at_the_folders_of_a_layout_are_named(tmp_path: Path) -> None:
    pair(tmp_path, "training/x")
    for side in ("images", "labels"):
        (tmp_path / side / "validation").symlink_to("nowhere")
    with pytest.raises(DataError, match="images/validation: is a link to nowhere, which does not exist; mend it"):
        find_splits(tmp_path)
    (tmp_path / "annotations").symlink_to("nowhere")
    with pytest.raises(DataError, match="annotations: is a link to nowhere"):
        find_splits(tmp_path)


def test_folder_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair(tmp_path, "open/x")
    pair(tmp_path, "locked/x")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith(locked):  # the tests may run as root, whom no permission stops
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    locked = "images/locked"
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"1 file or folder cannot be read: .*images/locked: no permission to read it"):
        open_dataset(tmp_path)
    assert len(open_dataset(tmp_path, skip_unreadable=True)) == 1
    for locked in ("images", "labels", str(tmp_path)):
        for options in ({}, {"skip_unreadable": True}):
            with pytest.raises(DataError, match=rf"{locked}: no permission to read it; mend it, or take it away"):
                open_dataset(tmp_path, **options)


def test_items_of_other_datasets_that_cannot_be_read_are_named() -> None:
    class Broken(Foreign):
        def __getitem__(self, index: int) -> object:
            raise self.items[index]

    errors = (OSError("cannot identify image file"), SyntaxError("broken PNG file"), struct.error("unpack"), EOFError())
    samples = as_samples(Broken(*errors))
    for index, error in enumerate(errors):
        with pytest.raises(DataError, match=rf"^Broken\[{index}\]: cannot be read \(") as raised:
            samples[index]
        assert raised.value.__cause__ is error


# Bad input


def test_what_has_no_counterpart_is_counted_and_named(tmp_path: Path) -> None:
    for number in range(6):
        photo(tmp_path / "images" / f"{number}.jpg")
    label_map(tmp_path / "labels" / "5.png")
    with pytest.raises(DataError) as error:
        open_dataset(tmp_path)
    some = ", ".join(str(tmp_path / "images" / f"{number}.jpg") for number in range(3))
    assert f"5 of 6 photos have no label map of the same name in {tmp_path / 'labels'}: {some}, ...;" in str(
        error.value
    )
    for number in range(5):
        (tmp_path / "images" / f"{number}.jpg").unlink()
    label_map(tmp_path / "labels" / "6.png")
    with pytest.raises(DataError, match=r"1 of 2 label maps have no photo of the same name in .*images: .*6\.png; add"):
        open_dataset(tmp_path)
    photo(tmp_path / "images" / "5.png")
    with pytest.raises(DataError, match=r"5\.jpg and .*5\.png have the same name"):
        open_dataset(tmp_path)


def test_folders_that_are_empty_or_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing: there is no such folder"):
        open_dataset(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"holds none of images/ and annotations/ \(ade20k\), leftImg8bit/"):
        open_dataset(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    with pytest.raises(DataError, match=r"images: holds no photos \(names end in one of \.jpg"):
        open_dataset(tmp_path)
    photo(tmp_path / "images" / "a.jpg")
    with pytest.raises(DataError, match="labels: holds no label maps"):
        open_dataset(tmp_path)
    with pytest.raises(DataError, match="has no splits, so no validation: put its files into images/validation"):
        open_dataset(tmp_path, "validation")
    (tmp_path / "annotations").mkdir()
    with pytest.raises(DataError, match="fits the layouts ade20k and folders; say which"):
        open_dataset(tmp_path)
    with pytest.raises(ValueError, match="layout is 'coco'; give auto, ade20k"):
        open_dataset(tmp_path, layout="coco")


def test_sizes_that_differ(tmp_path: Path) -> None:
    pair(tmp_path)
    label_map(tmp_path / "labels" / "a.png", height=8, width=6)
    with pytest.raises(DataError, match=r"labels.a\.png: the label map is 8 x 6 and its image .*a\.jpg 6 x 8 \(height"):
        open_dataset(tmp_path)[0]


def test_labels_that_are_no_classes(tmp_path: Path) -> None:
    pair(tmp_path, values=np.array([0, 1, 2, 3, 4, 5, 255, 200]))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(
        DataError, match=r"a\.png: holds the labels 2, 3, 4, 5, 200, but there are 2 classes \(0 to 1\)"
    ):
        open_dataset(tmp_path)[0]
    label_map(tmp_path / "labels" / "a.png", 40_000)
    with pytest.raises(DataError, match="holds the label 40000, but there are 2 classes"):
        open_dataset(tmp_path)[0]


def test_label_files_of_every_kind(tmp_path: Path) -> None:
    values = np.arange(48).reshape(6, 8) % 3
    grey = Image.fromarray(values.astype(np.uint8))
    palette = grey.copy()
    palette.putpalette(class_palette(3).tobytes())
    for name, image in {
        "grey.png": grey,
        "palette.png": palette,
        "deep.png": Image.fromarray(values.astype(np.uint16)),
        "wide.tif": Image.fromarray(values.astype(np.int32)),
    }.items():
        image.save(tmp_path / name)
        read = read_labels(tmp_path / name)
        np.testing.assert_array_equal(read, values)
        assert read.dtype == (np.uint8 if name in ("grey.png", "palette.png") else np.int32)
    Image.fromarray(values == 1).save(tmp_path / "black.png")
    np.testing.assert_array_equal(read_labels(tmp_path / "black.png"), values == 1)


def test_label_files_that_are_none(tmp_path: Path) -> None:
    grey = Image.new("L", (8, 6))
    grey.convert("RGB").save(tmp_path / "rgb.png")
    grey.save(tmp_path / "grey.jpg")
    grey.convert("F").save(tmp_path / "floats.tif")
    grey.convert("LA").save(tmp_path / "alpha.png")
    label_map(tmp_path / "cut.png", RANDOM.integers(0, 200, (60, 80)), 60, 80)
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:900])
    (tmp_path / "empty.png").touch()
    for name, reason in {
        "rgb.png": r"has the 3 channels R, G, B, but a label map has one channel; .* save it as",
        "alpha.png": "has the 2 channels L, A",
        "grey.jpg": "is JPEG, whose compression changes class numbers; save label maps as PNG",
        "floats.tif": "holds 32-bit floats",
        "cut.png": "truncated or damaged",
        "empty.png": "the file is empty",
        "gone.png": "no such file",
    }.items():
        with pytest.raises(ImageError, match=f"^{re.escape(str(tmp_path / name))}: .*{reason}") as error:
            read_labels(tmp_path / name)
        assert "\n" not in str(error.value)


def test_options_that_contradict(tmp_path: Path) -> None:
    pair(tmp_path)
    with pytest.raises(ValueError, match="give one of them"):
        FolderDataset(tmp_path / "images", tmp_path / "labels", reduce_labels=True, label_ids={1: 0})
    with pytest.raises(ValueError, match="from 0 without gaps"):
        FolderDataset(tmp_path / "images", tmp_path / "labels", id2label={1: "one"})


# Other datasets


class Foreign(Dataset):
    def __init__(self, *items: object) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> object:
        return self.items[index]


def test_any_dataset_becomes_samples() -> None:
    pixels = RANDOM.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    label = RANDOM.integers(0, 3, (6, 8))
    picture = Image.fromarray(pixels)
    grey = Image.fromarray(label.astype(np.uint8))
    dataset = Foreign(
        (picture, grey),
        [torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(label)[None]],
        {"image": pixels, "annotation": grey},
        {"pixel_values": picture.convert("RGBA"), "labels": label.astype(np.uint16), "name": "third"},
        Sample(picture, label, "fourth"),
    )
    samples = as_samples(dataset, id2label={0: "a", 1: "b", 2: "c"})
    assert len(samples) == 5
    for sample in samples:
        np.testing.assert_array_equal(np.asarray(sample.image), pixels)
        np.testing.assert_array_equal(sample.label, label)
    assert [sample.name for sample in samples] == ["Foreign[0]", "Foreign[1]", "Foreign[2]", "third", "fourth"]
    assert samples.ignore_index == 255
    assert as_samples(samples) is samples
    assert as_samples(samples, ignore_index=-1).id2label == samples.id2label


@pytest.mark.parametrize("shape", [(2, 5, 3), (5, 2, 3), (1, 1, 3), (3, 5, 3), (2, 3, 13)])
def test_the_label_map_determines_the_layout_of_an_array(shape: tuple[int, int, int]) -> None:
    pixels = RANDOM.integers(0, 256, shape, dtype=np.uint8)
    label = np.zeros(shape[:2], int)
    for array in (pixels, np.moveaxis(pixels, -1, 0).copy()):
        np.testing.assert_array_equal(as_samples(Foreign((array, label)))[0].image, pixels)


def modes() -> dict[str, Image.Image]:
    """A picture in every mode that a file can have."""
    rgb = Image.fromarray(RANDOM.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    alpha = Image.fromarray(RANDOM.integers(0, 256, (6, 8), dtype=np.uint8))
    pictures = {mode: rgb.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")}
    for mode in ("LA", "RGBA"):
        pictures[mode].putalpha(alpha)
    pictures["P transparent"] = rgb.convert("P")
    pictures["P transparent"].info["transparency"] = bytes(range(256))
    pictures["L transparent"] = rgb.convert("L")
    pictures["L transparent"].info["transparency"] = pictures["L"].getpixel((3, 3))
    pictures["I;16"] = Image.fromarray(RANDOM.integers(0, 65536, (6, 8), dtype=np.uint16))
    return pictures


@pytest.mark.parametrize("mode", modes())
def test_a_picture_has_the_same_pixels_everywhere(mode: str, tmp_path: Path) -> None:
    """The decoder, the processor, `as_samples` and `FolderDataset` agree, on files and on open images."""
    image = modes()[mode]
    path = tmp_path / "images" / f"a.{'tif' if mode == 'CMYK' else 'png'}"
    path.parent.mkdir()
    image.save(path)
    label_map(tmp_path / "labels" / "a.png")
    expected = np.asarray(read_image(path))
    processor = UperNetImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)
    with Image.open(path) as opened:
        found = {
            "processor, file": processor(path, data_format="channels_last")["pixel_values"][0],
            "processor, image": processor(opened, data_format="channels_last")["pixel_values"][0],
            "as_samples": as_samples(Foreign((opened, np.zeros((6, 8), int))))[0].image,
            "FolderDataset": open_dataset(tmp_path)[0].image,
        }
    for way, pixels in found.items():
        np.testing.assert_array_equal(np.asarray(pixels), expected, err_msg=way)


@pytest.mark.parametrize("kind", ["1", "L", "P", "I;16", "I", "upside down"])
def test_a_label_map_has_the_same_labels_everywhere(kind: str, tmp_path: Path) -> None:
    values = np.arange(48).reshape(6, 8) * (1000 if kind.startswith("I") else 1) % (2 if kind == "1" else 10**6)
    dtype = {"1": bool, "I;16": np.uint16, "I": np.int32}.get(kind, np.uint8)
    image = Image.fromarray(values.astype(dtype))
    if kind == "P":
        image.putpalette(class_palette(256).tobytes())
    exif = Image.Exif()
    exif[0x0112] = 3 if kind == "upside down" else 1
    path = tmp_path / "labels" / ("a.tif" if kind == "I" else "a.png")
    path.parent.mkdir()
    image.save(path, exif=exif)
    photo(tmp_path / "images" / "a.png")
    expected = np.rot90(values, 2) if kind == "upside down" else values
    pixels = np.zeros((6, 8, 3), np.uint8)
    processor = UperNetImageProcessor(do_resize=False)
    np.testing.assert_array_equal(read_labels(path), expected)
    np.testing.assert_array_equal(open_dataset(tmp_path)[0].label, expected)
    np.testing.assert_array_equal(processor(pixels, path)["labels"][0], expected)
    with Image.open(path) as opened:  # an open image keeps its orientation
        np.testing.assert_array_equal(processor(pixels, opened)["labels"][0], values)
        np.testing.assert_array_equal(as_samples(Foreign((pixels, opened)))[0].label, values)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            (Image.new("I", (8, 6)), np.zeros((6, 8), int)),
            r"Foreign\[0\]: holds 32-bit integers, mode I, in which no value stands for white; scale them",
        ),
        ((Image.new("F", (8, 6)), np.zeros((6, 8), int)), r"Foreign\[0\]: holds 32-bit floats, mode F"),
        ((np.zeros((6, 8, 3), np.uint8), Image.new("RGB", (8, 6))), r"Foreign\[0\]: has the 3 channels R, G, B"),
        ((np.zeros((6, 8, 3), np.uint8), Image.new("F", (8, 6))), r"Foreign\[0\]: holds 32-bit floats, where class"),
        ((np.zeros((6, 8, 3), np.float32), np.zeros((6, 8), int)), r"Foreign\[0\]: the image is float32 of shape"),
        ((np.zeros((6, 8, 3), np.uint8), np.zeros((6, 8))), r"Foreign\[0\]: the label map is float64"),
        ((np.zeros((6, 8, 3), np.uint8), np.zeros((8, 6), int)), r"is 8 x 6 and its image Foreign\[0\] 6 x 8"),
        ((np.zeros((6, 8, 3), np.uint8), np.full((6, 8), -1)), "holds the label -1, but there are 2 classes"),
        ({"image": np.zeros((6, 8, 3), np.uint8), "mask": 0}, "has no label or labels or annotation; it has image, m"),
        (np.zeros((6, 8, 3)), r"Foreign\[0\] is a ndarray; an item is"),
    ],
)
def test_items_that_are_no_samples(item: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_samples(Foreign(item), id2label={0: "a", 1: "b"})[0]


def test_a_dataset_without_numbers_is_refused() -> None:
    with pytest.raises(TypeError, match="generator has no length"):
        as_samples(item for item in ())


# Augmentation

torchvision = pytest.importorskip("torchvision")


def blocks(height: int = 96, width: int = 128) -> Sample:
    """Return a photo in blocks of 16 x 16 whose colour encodes the label; the first row of blocks is ignored.

    Red is 60 times the label and blue 25 times its square, so that no mixture of two colours is a third.
    """
    label = np.add.outer(np.arange(height // 16), 2 * np.arange(width // 16)) % 4
    label = np.kron(label, np.ones((16, 16), int)).astype(np.uint8)
    pixels = np.stack([label * 60, np.full_like(label, 128), label * label * 25], -1)
    label[:16] = 255
    return Sample(Image.fromarray(pixels), label, "blocks")


def test_an_epoch_is_the_same_whoever_makes_it() -> None:
    samples = as_samples(Foreign(*([blocks()] * 4)))
    dataset = TrainingDataset(samples, TrainingTransform(UperNetImageProcessor(), 48), seed=7)
    keys = [(epoch, index) for epoch in (0, 1) for index in range(4)]
    torch.manual_seed(1)
    here = [dataset[key] for key in keys]
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    for workers in (0, 2):
        loader = DataLoader(dataset, batch_size=None, sampler=keys[::-1], num_workers=workers)
        for item, expected in zip(list(loader)[::-1], here, strict=True):
            assert torch.equal(item["pixel_values"], expected["pixel_values"])
            assert torch.equal(item["labels"], expected["labels"])
    assert len({tuple(item["pixel_values"].flatten().tolist()) for item in here}) == 8
    other = TrainingDataset(samples, dataset.transform, seed=8)
    assert not torch.equal(other[0, 0]["pixel_values"], here[0]["pixel_values"])
    batch = next(iter(DataLoader(dataset, batch_size=2, sampler=keys)))
    assert batch["pixel_values"].shape == (2, 3, 48, 48)
    assert batch["labels"].dtype == torch.int64
    assert batch["name"] == ["blocks", "blocks"]


def test_pixels_and_labels_stay_together() -> None:
    processor = UperNetImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.25, 0.2])
    transform = TrainingTransform(processor, (120, 104), base_size=96, photometric=False)
    mean, std = (torch.tensor(value)[:, None, None] for value in (processor.image_mean, processor.image_std))
    seen = set()
    for seed in range(12):
        item = transform(blocks(), np.random.default_rng(seed))
        pixels, labels = item["pixel_values"], item["labels"]
        assert pixels.dtype == torch.float32
        assert pixels.shape == (3, 120, 104)
        assert labels.shape == (120, 104)
        levels = (pixels * std + mean) * 255
        padding = (pixels == 0).all(0)  # the mean
        assert (labels[padding] == 255).all()
        seen.add(bool(padding.any()))
        # Colours mix at the edges of blocks; elsewhere the colour encodes the label.
        number = (levels[0] / 60).round()
        pure = ((levels[0] - 60 * number).abs() < 0.01) & ((levels[2] - 25 * number**2).abs() < 0.01)
        inside = pure & (labels != 255) & ~padding
        assert inside.float().mean() > 0.1
        assert torch.equal(number[inside], labels[inside].float())
    assert seen == {True, False}


def test_without_chance_it_is_the_processor() -> None:
    sample = blocks()
    processor = UperNetImageProcessor(size=(96, 128))
    transform = TrainingTransform(processor, scale=(1, 1), flip=0, photometric=False, base_size=96)
    item = transform(sample, np.random.default_rng(0))
    expected = processor([sample.image], [sample.label], return_tensors="pt")
    torch.testing.assert_close(item["pixel_values"][None], expected["pixel_values"], rtol=1e-5, atol=1e-5)
    assert torch.equal(item["labels"][None], expected["labels"])
    flipped = TrainingTransform(processor, scale=(1, 1), flip=1, photometric=False, base_size=96)
    mirrored = flipped(sample, np.random.default_rng(0))
    assert torch.equal(mirrored["pixel_values"], item["pixel_values"].flip(-1))
    assert torch.equal(mirrored["labels"], item["labels"].flip(-1))
    bare = UperNetImageProcessor(size=(96, 128), do_normalize=False, do_rescale=False)
    item = TrainingTransform(bare, scale=(1, 1), flip=0, photometric=False, base_size=96)(
        sample, np.random.default_rng(0)
    )
    np.testing.assert_array_equal(item["pixel_values"].permute(1, 2, 0).numpy(), np.asarray(sample.image))


def test_one_class_does_not_fill_the_crop() -> None:
    label = np.zeros((64, 256), np.uint8)
    label[:, 200:] = 1
    label[:, 100:150] = 255
    sample = Sample(np.zeros((64, 256, 3), np.uint8), label, "mostly 0")

    def largest_shares(limit: float) -> list[float]:
        transform = TrainingTransform(
            UperNetImageProcessor(), 64, scale=(1, 1), photometric=False, max_class_share=limit
        )
        shares = []
        for seed in range(40):
            labels = transform(sample, np.random.default_rng(seed))["labels"]
            counts = np.bincount(labels[labels != 255].numpy(), minlength=2)
            shares.append(counts.max() / max(counts.sum(), 1))
        return shares

    assert np.mean(np.array(largest_shares(1.0)) > 0.75) > 0.4
    assert np.mean(np.array(largest_shares(0.75)) > 0.75) < 0.2  # all ten tries may fail


def test_sizes_are_those_of_mmsegmentation() -> None:
    assert scaled_size(512, 683, 512) == (512, 683)
    assert scaled_size(256, 341, 512, 0.5) == (256, 341)
    assert scaled_size(100, 1000, 512, 2.0) == (410, 4096)  # 2048 x 512 bounds the longer side
    assert scaled_size(1024, 2048, 1024, 2.0) == (2048, 4096)


def test_colours_change_and_images_of_more_channels_do_not() -> None:
    sample = blocks()
    plain = TrainingTransform(UperNetImageProcessor(), 96, scale=(1, 1), flip=0, photometric=False)
    vivid = TrainingTransform(UperNetImageProcessor(), 96, scale=(1, 1), flip=0)
    differences = [
        (
            vivid(sample, np.random.default_rng(s))["pixel_values"]
            - plain(sample, np.random.default_rng(s))["pixel_values"]
        )
        for s in range(8)
    ]
    assert sum(bool(difference.any()) for difference in differences) >= 6
    processor = UperNetImageProcessor(image_mean=[0.5] * 5, image_std=[0.2] * 5)
    image = RANDOM.integers(0, 256, (96, 96, 5), dtype=np.uint8)
    item = TrainingTransform(processor, 96, scale=(1, 1), flip=0)(
        Sample(image, np.zeros((96, 96), np.uint8), "five channels"), np.random.default_rng(0)
    )
    expected = (image / 255 - 0.5) / 0.2
    np.testing.assert_allclose(item["pixel_values"].permute(1, 2, 0).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_labels_above_8_bits_and_below_0_survive() -> None:
    label = np.array([[-100, 300], [70_000, 5]]).repeat(32, 0).repeat(32, 1)
    sample = Sample(np.zeros((64, 64, 3), np.uint8), label, "many classes")
    transform = TrainingTransform(UperNetImageProcessor(), 100, scale=(1.3, 1.3), ignore_index=-100, base_size=64)
    labels = transform(sample, np.random.default_rng(0))["labels"]
    assert set(labels.unique().tolist()) == {-100, 300, 70_000, 5}
    assert (labels[:, 90:] == -100).all()


def test_arguments_without_meaning_and_a_missing_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = UperNetImageProcessor()
    for wrong in ({"crop_size": 0}, {"base_size": 0}, {"scale": (2, 1)}, {"max_class_share": 0}, {"flip": 2}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TrainingTransform(processor, **wrong)
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    with pytest.raises(ImportError, match=r"pip install 'fastuper\[train\]'"):
        TrainingTransform(processor)

"""Datasets in folders: ADE20K, Cityscapes, and images/ beside labels/."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastuper.data.class_lists import read_class_list
from fastuper.data.classes import ade20k_names
from fastuper.data.images import IMAGE_SUFFIXES, LABEL_SUFFIXES, read_image, read_labels
from fastuper.data.listing import list_images, normal_name
from fastuper.data.pairs import Side, described, pair_files
from fastuper.data.samples import (
    IGNORE_INDEX,
    DataError,
    Sample,
    SampleDataset,
    checked_classes,
    checked_sample,
)

CITYSCAPES_CLASSES = {
    **{7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light"},
    **{20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car"},
    **{27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"},
}
"""The 19 classes of Cityscapes' evaluation, by their numbers in `_gtFine_labelIds.png`, in the order of train ids."""

SPLIT_NAMES = (("training", "train"), ("validation", "val", "valid"), ("testing", "test"))
"""Names of the same split in different layouts."""

Layout = Literal["auto", "ade20k", "cityscapes", "folders"]


class FolderDataset(SampleDataset):
    """A folder of photos and a folder of label maps; a photo and its label map have one name, in the same subfolder.

    A link counts as the file or folder that it leads to; two files are one sample once, however many links lead to
    them. Names are compared in Unicode's composed form. Entries whose names begin with a dot are left out, and files
    without an image's suffix.

    Args:
        images: the folder of photos, with or without subfolders.
        labels: the folder of label maps: images of one channel whose pixel values are class numbers.
        image_ending: the end of photos' names before the suffix, which label maps' names lack. Photos with another
            ending are left out.
        label_ending: the end of label maps' names before the suffix, which photos' names lack.
        reduce_labels: label 0 becomes ignored and every other label one less, as in ADE20K (the image processor's
            `do_reduce_labels`).
        label_ids: the class of each value in the files, for files with other numbers. Values that it lacks are
            ignored.
        id2label: the classes' names, numbered from 0. None accepts any label from 0.
        ignore_index: the label of ignored pixels, in the files (before and after `reduce_labels`) and in the samples.
            It may be a class, whose pixels are then ignored, except for 255.
        skip_unreadable: whether to leave out files and folders that cannot be read, with their counterparts, instead
            of raising the error.

    Attributes:
        files: the pairs of photo and label map.
        problems: the reason for each file or folder that is left out because it cannot be read.

    Raises:
        DataError: a folder is missing or empty, a photo has no label map, a label map has no photo, two files have
            one name, or a file or folder cannot be read (broken links, no permission, FIFOs, sockets, devices).
    """

    def __init__(
        self,
        images: str | os.PathLike[str],
        labels: str | os.PathLike[str],
        *,
        image_ending: str = "",
        label_ending: str = "",
        reduce_labels: bool = False,
        label_ids: Mapping[int, int] | None = None,
        id2label: Mapping[int, str] | None = None,
        ignore_index: int = IGNORE_INDEX,
        skip_unreadable: bool = False,
    ) -> None:
        if reduce_labels and label_ids is not None:
            raise ValueError("reduce_labels and label_ids both renumber the files' values; give one of them")
        if reduce_labels and id2label is not None and 0 <= ignore_index <= len(id2label):
            raise ValueError(
                f"ignore_index {ignore_index} is a class, or the value of a class in files whose labels are reduced; "
                f"give one above {len(id2label)}"
            )
        self.id2label = checked_classes(id2label, ignore_index)
        self.ignore_index = ignore_index
        self.reduce_labels = reduce_labels
        self.label_ids = None if label_ids is None else dict(label_ids)
        self.files, self.problems = pair_files(
            Side(Path(images), "photos", IMAGE_SUFFIXES, image_ending),
            Side(Path(labels), "label maps", LABEL_SUFFIXES, label_ending),
        )
        if self.problems and not (skip_unreadable and self.files):
            count = len(self.problems)
            what, them = ("file or folder", "it") if count == 1 else ("files or folders", "them")
            raise DataError(
                f"{count} {what} cannot be read: {described(self.problems)}; mend {them}, or take {them} away"
            )

    def __len__(self) -> int:
        """Return the number of photos."""
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        """Read a photo and its label map."""
        photo, label_map = self.files[index]
        sample = Sample(read_image(photo), self.read_label(index), str(photo))
        return checked_sample(sample, self.id2label, self.ignore_index, str(label_map))

    def read_label(self, index: int) -> NDArray[np.integer]:
        """Read a photo's label map alone, (H, W): classes or ignored, if the file is right.

        Raises:
            DataError: a value becomes the ignored label when it is renumbered.
            fastuper.data.images.ImageError: the file cannot be used.
        """
        label_map = self.files[index][1]
        return self.renumbered(read_labels(label_map), str(label_map))

    def renumbered(self, label: NDArray[np.integer], name: str) -> NDArray[np.integer]:
        """Return the classes of the numbers in a file, (H, W), by `reduce_labels` or `label_ids`.

        Raises:
            DataError: a value becomes the ignored label when it is renumbered; the message calls the file `name`.
        """
        if self.reduce_labels and self.ignore_index >= 0 and (label == self.ignore_index + 1).any():
            raise DataError(
                f"{name}: holds the label {self.ignore_index + 1}, which reduced by one is {self.ignore_index}, "
                "the ignored label; give another --ignore-index (ignore_index), such as 65535"
            )
        if self.reduce_labels or self.label_ids is not None:
            # A table of 256 entries renumbers 8-bit labels faster than arithmetic on every pixel.
            eight_bits = label.dtype == np.uint8
            numbers = self._classes_of(np.arange(256) if eight_bits else label)
            label = numbers[label] if eight_bits else numbers
        return label

    def _classes_of(self, values: NDArray[np.integer]) -> NDArray[np.integer]:
        """Return the classes of values in the files, as uint8 if they fit."""
        numbers = np.full(values.shape, self.ignore_index, dtype=np.int32)
        if self.label_ids is None:
            kept = (values != 0) & (values != self.ignore_index)
            numbers[kept] = values[kept] - 1
        else:
            for value, number in self.label_ids.items():
                numbers[values == value] = number
        return numbers.astype(np.uint8) if numbers.min() >= 0 and numbers.max() < 256 else numbers


def find_splits(path: str | os.PathLike[str], layout: Layout = "auto") -> list[str]:
    """Return the names of the splits in a dataset's folder; an empty list if images/ and labels/ have no splits.

    Raises:
        DataError: the folder is missing, or its layout is unknown.
    """
    root = Path(path)
    images, labels = _LAYOUTS[_layout(root, layout)]
    return list(_splits(root / images, root / labels))


def open_dataset(
    path: str | os.PathLike[str],
    split: str | None = None,
    layout: Layout = "auto",
    *,
    id2label: Mapping[int, str] | None = None,
    ignore_index: int = IGNORE_INDEX,
    skip_unreadable: bool = False,
) -> FolderDataset:
    """Open a dataset's folder.

    - "ade20k": images/SPLIT and annotations/SPLIT, SPLIT being training or validation; label 0 is ignored and 1 is
      class 0.
    - "cityscapes": leftImg8bit/SPLIT/CITY/*_leftImg8bit.png with gtFine/SPLIT/CITY/*_gtFine_labelTrainIds.png, or
      with *_gtFine_labelIds.png if there are no train ids.
    - "folders": images/SPLIT and labels/SPLIT, or images/ and labels/ without splits; files are paired by their names.

    Args:
        path: the folder.
        split: "training", "validation" or another folder's name (train, val and test are the same splits as
            training, validation and testing). None opens a folder without splits.
        layout: a layout above; "auto" determines it from the folders' names.
        id2label: the classes' names. None takes the names in the folder's classes.txt (a name a line) or id2label.json.
            Without these files it takes the names of ADE20K or Cityscapes; in the layout "folders" the names are then
            unknown.
        ignore_index: the label of ignored pixels.
        skip_unreadable: as in `FolderDataset`.

    Raises:
        DataError: the folder is missing, its layout is unknown, it has no such split, the classes are not listed as in
            `fastuper.data.class_lists`, or as in `FolderDataset`.
    """
    root = Path(path)
    found = _layout(root, layout)
    images, labels = (root / name for name in _LAYOUTS[found])
    splits = _splits(images, labels)
    if not splits and split and all(os.path.isdir(folder / split) for folder in (images, labels)):
        splits = {split: (images / split, labels / split)}  # an explicit name may be any folder's
    if splits:
        if split is None:
            raise DataError(f"{root} has the splits {', '.join(splits)}; say which")
        aliases = next((names for names in SPLIT_NAMES if split in names), (split,))
        chosen = next((name for name in map(normal_name, (split, *aliases)) if name in splits), None)
        if chosen is None:
            raise DataError(f"{root} has no split {split}; it has {', '.join(splits)}")
        images, labels = splits[chosen]
    elif split is not None:
        raise DataError(
            f"{root} has no splits, so no {split}: put its files into images/{split} and labels/{split}, or leave "
            "the split out"
        )
    if id2label is None:
        id2label = read_class_list(root)
    options: dict[str, Any] = {"ignore_index": ignore_index, "skip_unreadable": skip_unreadable}
    if found == "ade20k":
        names = dict(enumerate(ade20k_names())) if id2label is None else id2label
        return FolderDataset(images, labels, reduce_labels=True, id2label=names, **options)
    if found == "cityscapes":
        by_train_id = any(labels.glob("*/*_gtFine_labelTrainIds.png"))
        return FolderDataset(
            images,
            labels,
            image_ending="_leftImg8bit",
            label_ending="_gtFine_labelTrainIds" if by_train_id else "_gtFine_labelIds",
            label_ids=None if by_train_id else {number: index for index, number in enumerate(CITYSCAPES_CLASSES)},
            id2label=dict(enumerate(CITYSCAPES_CLASSES.values())) if id2label is None else id2label,
            **options,
        )
    return FolderDataset(images, labels, id2label=id2label, **options)


_LAYOUTS = {
    "ade20k": ("images", "annotations"),
    "cityscapes": ("leftImg8bit", "gtFine"),
    "folders": ("images", "labels"),
}


def _layout(root: Path, layout: str) -> str:
    if not os.path.isdir(root):
        raise DataError(f"{root}: there is no such folder")
    broken = {path: why for path, why in list_images(root, ()).problems.items() if path == root or _is_part(path.name)}
    if broken:
        raise DataError(f"{described(broken)}; mend it, or take it away")
    if layout != "auto":
        if layout not in _LAYOUTS:
            raise ValueError(f"layout is {layout!r}; give auto, {', '.join(_LAYOUTS)}")
        return layout
    fitting = [name for name, folders in _LAYOUTS.items() if all(os.path.isdir(root / folder) for folder in folders)]
    if len(fitting) != 1:
        expected = ", ".join(f"{images}/ and {labels}/ ({name})" for name, (images, labels) in _LAYOUTS.items())
        fault = f"fits the layouts {' and '.join(fitting)}; say which" if fitting else f"holds none of {expected}"
        raise DataError(f"{root}: {fault}")
    own_splits = any(os.path.isdir(root / "images" / name) for name in ("training", "validation"))
    if fitting == ["ade20k"] and (read_class_list(root) or not own_splits):
        # This is probably another dataset, whose label 0 must not be ignored silently.
        raise DataError(
            f"{root}: has annotations/ as ADE20K, but not its {'classes' if own_splits else 'splits'}; say layout "
            "ade20k if label 0 is to be ignored, or rename annotations/ to labels/"
        )
    return fitting[0]


def _is_part(name: str) -> bool:
    """Return True for a folder of a layout: images, labels and so on."""
    return any(name in folders for folders in _LAYOUTS.values())


def _splits(images: Path, labels: Path) -> dict[str, tuple[Path, Path]]:
    """Return the subfolders that both folders have, by name, if at least one has a split's usual name."""
    found = []
    for folder in (images, labels):
        if not os.path.isdir(folder):
            raise DataError(f"{folder}: there is no such folder")
        listing = list_images(folder, ())
        usual = {path: why for path, why in listing.problems.items() if _is_split(path.name) or path == folder}
        if usual:
            raise DataError(f"{described(usual)}; mend it, or take it away")
        found.append({normal_name(path.name): path for path in listing.folders})
    both = {name: (found[0][name], found[1][name]) for name in sorted(found[0].keys() & found[1].keys())}
    return both if any(_is_split(name) for name in both) else {}


def _is_split(name: str) -> bool:
    return any(name in names for names in SPLIT_NAMES)

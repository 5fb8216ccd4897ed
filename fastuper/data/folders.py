"""Datasets in folders: ADE20K, Cityscapes, and images/ beside labels/."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastuper.data.classes import ade20k_names
from fastuper.data.images import IMAGE_SUFFIXES, LABEL_SUFFIXES, read_image, read_labels
from fastuper.data.samples import (
    IGNORE_INDEX,
    DataError,
    Sample,
    SampleDataset,
    are_numbered,
    checked_classes,
    checked_sample,
)
from fastuper.io.files import read_json
from fastuper.io.messages import listed

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

    Raises:
        DataError: a folder is missing or empty, a photo has no label map, a label map has no photo, or two files have
            one name.
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
    ) -> None:
        if reduce_labels and label_ids is not None:
            raise ValueError("reduce_labels and label_ids both renumber the files' values; give one of them")
        self.id2label = checked_classes(id2label, ignore_index)
        self.ignore_index = ignore_index
        self.reduce_labels = reduce_labels
        self.label_ids = None if label_ids is None else dict(label_ids)
        photos = _files(Path(images), IMAGE_SUFFIXES, image_ending, "photos")
        maps = _files(Path(labels), LABEL_SUFFIXES, label_ending, "label maps")
        for here, there, of, what, folder in (
            (photos, maps, "photos", "label map", labels),
            (maps, photos, "label maps", "photo", images),
        ):
            alone = [path for key, path in here.items() if key not in there]
            if alone:
                raise DataError(
                    f"{len(alone)} of {len(here)} {of} have no {what} of the same name in {folder}: {listed(alone)}; "
                    f"add the {what}s or take the {of} away"
                )
        self.files = [(photos[key], maps[key]) for key in sorted(photos)]

    def __len__(self) -> int:
        """Return the number of photos."""
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        """Read a photo and its label map."""
        photo, label_map = self.files[index]
        label = read_labels(label_map)
        if self.reduce_labels or self.label_ids is not None:
            # A table of 256 entries renumbers 8-bit labels faster than arithmetic on every pixel.
            eight_bits = label.dtype == np.uint8
            numbers = self._renumbered(np.arange(256) if eight_bits else label)
            label = numbers[label] if eight_bits else numbers
        sample = Sample(read_image(photo), label, str(photo))
        return checked_sample(sample, self.id2label, self.ignore_index, str(label_map))

    def _renumbered(self, values: NDArray[np.integer]) -> NDArray[np.integer]:
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
    return _splits(root / images, root / labels)


def open_dataset(
    path: str | os.PathLike[str],
    split: str | None = None,
    layout: Layout = "auto",
    *,
    id2label: Mapping[int, str] | None = None,
    ignore_index: int = IGNORE_INDEX,
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

    Raises:
        DataError: the folder is missing, its layout is unknown, it has no such split, or as in `FolderDataset`.
    """
    root = Path(path)
    found = _layout(root, layout)
    images, labels = (root / name for name in _LAYOUTS[found])
    splits = _splits(images, labels)
    if not splits and split and all((folder / split).is_dir() for folder in (images, labels)):
        splits = [split]  # an explicit name may be any folder's
    if splits:
        if split is None:
            raise DataError(f"{root} has the splits {', '.join(splits)}; say which")
        aliases = next((names for names in SPLIT_NAMES if split in names), (split,))
        chosen = next((name for name in (split, *aliases) if name in splits), None)
        if chosen is None:
            raise DataError(f"{root} has no split {split}; it has {', '.join(splits)}")
        images, labels = images / chosen, labels / chosen
    elif split is not None:
        raise DataError(
            f"{root} has no splits, so no {split}: put its files into images/{split} and labels/{split}, or leave "
            "the split out"
        )
    if id2label is None:
        id2label = _listed_classes(root)
    if found == "ade20k":
        names = dict(enumerate(ade20k_names())) if id2label is None else id2label
        return FolderDataset(images, labels, reduce_labels=True, id2label=names, ignore_index=ignore_index)
    if found == "cityscapes":
        by_train_id = any(labels.glob("*/*_gtFine_labelTrainIds.png"))
        return FolderDataset(
            images,
            labels,
            image_ending="_leftImg8bit",
            label_ending="_gtFine_labelTrainIds" if by_train_id else "_gtFine_labelIds",
            label_ids=None if by_train_id else {number: index for index, number in enumerate(CITYSCAPES_CLASSES)},
            id2label=dict(enumerate(CITYSCAPES_CLASSES.values())) if id2label is None else id2label,
            ignore_index=ignore_index,
        )
    return FolderDataset(images, labels, id2label=id2label, ignore_index=ignore_index)


def _files(folder: Path, suffixes: Sequence[str], ending: str, what: str) -> dict[str, Path]:
    """Return the files of a folder and its subfolders, by their paths inside it without ending and suffix."""
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder of {what}")
    found: dict[str, Path] = {}
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if name.startswith(".") or suffix.lower() not in suffixes or not stem.endswith(ending):
                continue
            path = Path(parent, name)
            key = str(Path(parent).relative_to(folder) / stem[: len(stem) - len(ending)])
            if key in found:
                raise DataError(f"{found[key]} and {path} have the same name; take one of them away")
            found[key] = path
    if not found:
        pattern = f"names end in {ending} and one of" if ending else "names end in one of"
        raise DataError(f"{folder}: holds no {what} ({pattern} {', '.join(suffixes)})")
    return found


_LAYOUTS = {
    "ade20k": ("images", "annotations"),
    "cityscapes": ("leftImg8bit", "gtFine"),
    "folders": ("images", "labels"),
}


def _layout(root: Path, layout: str) -> str:
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder")
    if layout != "auto":
        if layout not in _LAYOUTS:
            raise ValueError(f"layout is {layout!r}; give auto, {', '.join(_LAYOUTS)}")
        return layout
    fitting = [name for name, folders in _LAYOUTS.items() if all((root / folder).is_dir() for folder in folders)]
    if len(fitting) != 1:
        expected = ", ".join(f"{images}/ and {labels}/ ({name})" for name, (images, labels) in _LAYOUTS.items())
        fault = f"fits the layouts {' and '.join(fitting)}; say which" if fitting else f"holds none of {expected}"
        raise DataError(f"{root}: {fault}")
    own_splits = any((root / "images" / name).is_dir() for name in ("training", "validation"))
    if fitting == ["ade20k"] and (_listed_classes(root) or not own_splits):
        # This is probably another dataset, whose label 0 must not be ignored silently.
        raise DataError(
            f"{root}: has annotations/ as ADE20K, but not its {'classes' if own_splits else 'splits'}; say layout "
            "ade20k if label 0 is to be ignored, or rename annotations/ to labels/"
        )
    return fitting[0]


def _splits(images: Path, labels: Path) -> list[str]:
    """Return the subfolders that both folders have, if at least one has a split's usual name."""
    for folder in (images, labels):
        if not folder.is_dir():
            raise DataError(f"{folder}: there is no such folder")
    both = sorted(path.name for path in images.iterdir() if path.is_dir() and (labels / path.name).is_dir())
    return both if any(name in names for name in both for names in SPLIT_NAMES) else []


def _listed_classes(root: Path) -> dict[int, str] | None:
    """Return the class names of a folder's classes.txt or id2label.json; None if it has neither file."""
    listed, mapped = root / "classes.txt", root / "id2label.json"
    if listed.is_file():
        try:
            lines = listed.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise DataError(f"{listed}: is not UTF-8; save it in that encoding") from None
        names = [line.strip() for line in lines if line.strip()]
        if not names:
            raise DataError(f"{listed}: is empty; write a class name on each line, class 0 first")
        return dict(enumerate(names))
    if mapped.is_file():
        content = read_json(mapped)
        try:
            classes = {int(number): str(name) for number, name in content.items()}
        except ValueError:
            classes = {}
        if not are_numbered(classes):
            raise DataError(f'{mapped}: write {{"0": "name", "1": "name", ...}}, numbered from 0 without gaps')
        return classes
    return None

"""Photos with their label maps: folders of them in the usual layouts, any Dataset of theirs, and augmentation.

A dataset here is a map-style `torch.utils.data.Dataset` of `Sample`s. Its `id2label` are the names of the classes,
where they are known, and its `ignore_index` is the label of pixels that count nowhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from fastuper.data.images import ade20k_names, read_image, read_labels
from fastuper.io.hub import read_json

if TYPE_CHECKING:
    from fastuper.data.processor import UperNetImageProcessor

IGNORE_INDEX = 255
"""The label of ignored pixels in every common layout, and a model's `loss_ignore_index` unless told otherwise."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".jp2")
LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".pgm", ".gif", ".webp")

CITYSCAPES_CLASSES = {
    **{7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light"},
    **{20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car"},
    **{27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"},
}
"""The 19 classes that Cityscapes evaluates, by their numbers in `_gtFine_labelIds.png`, in the order of train ids."""

SPLIT_NAMES = (("training", "train"), ("validation", "val", "valid"), ("testing", "test"))
"""What the same split is called in different layouts."""

Layout = Literal["auto", "ade20k", "cityscapes", "folders"]


class DataError(ValueError):
    """A dataset that cannot be used as it is; the message is one line with the file, the fault and the remedy."""


class Sample(NamedTuple):
    """One photo with its label map.

    Attributes:
        image: a PIL image, or (H, W, C) uint8.
        label: (H, W) integers: the model's class numbers, and the dataset's `ignore_index`.
        name: the photo's file, or whatever else a message can call it.
    """

    image: Image.Image | NDArray[np.uint8]
    label: NDArray[np.integer]
    name: str


class SampleDataset(Dataset[Sample]):
    """What every dataset here is.

    Attributes:
        id2label: the classes' names by their numbers, 0 to N - 1; None where they are not known.
        ignore_index: the label of pixels that count nowhere.
    """

    id2label: dict[int, str] | None
    ignore_index: int

    def __len__(self) -> int:
        """Return the number of samples."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        """Return a sample, checked: sizes are equal, labels are classes or ignored.

        Raises:
            DataError, fastuper.data.images.ImageError: the sample cannot be used; the message names the file.
        """
        raise NotImplementedError


class FolderDataset(SampleDataset):
    """A folder of photos and a folder of label maps: each photo's has its name, in the same subfolder.

    Args:
        images: the folder of photos, and of folders of photos.
        labels: the folder of label maps: images of one channel whose pixel values are class numbers.
        image_ending: what the photos' names have before the suffix and after what they share with their label maps';
            other photos are left out.
        label_ending: likewise for the label maps.
        reduce_labels: 0 becomes ignored and every other label one less, as ADE20K needs (the image processor's
            `do_reduce_labels`).
        label_ids: the class of each value in the files, where they are numbered in another way; values that are not
            named are ignored.
        id2label: the classes' names, numbered from 0. Without them labels are not checked against their number.
        ignore_index: the label of ignored pixels, in the files (before `reduce_labels` as after) and in the samples.

    Raises:
        DataError: a folder is missing or empty, a photo has no label map or the reverse, or two have one name.
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
            raise ValueError("reduce_labels and label_ids both say what the files' values mean; give one of them")
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
                some = ", ".join(map(str, alone[:3])) + (", ..." if len(alone) > 3 else "")
                raise DataError(
                    f"{len(alone)} of {len(here)} {of} have no {what} of the same name in {folder}: {some}; "
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
            # 8-bit labels are looked up: 256 are renumbered and not as many as the map has pixels.
            eight_bits = label.dtype == np.uint8
            numbers = self._renumbered(np.arange(256) if eight_bits else label)
            label = numbers[label] if eight_bits else numbers
        sample = Sample(read_image(photo), label, str(photo))
        return checked_sample(sample, self.id2label, self.ignore_index, str(label_map))

    def _renumbered(self, values: NDArray[np.integer]) -> NDArray[np.integer]:
        """Return the classes of the files' values, in 8 bits where they fit."""
        numbers = np.full(values.shape, self.ignore_index, dtype=np.int32)
        if self.label_ids is None:
            kept = (values != 0) & (values != self.ignore_index)
            numbers[kept] = values[kept] - 1
        else:
            for value, number in self.label_ids.items():
                numbers[values == value] = number
        return numbers.astype(np.uint8) if numbers.min() >= 0 and numbers.max() < 256 else numbers


class _ForeignDataset(SampleDataset):
    """Samples made of what somebody else's Dataset gives."""

    def __init__(self, dataset: Dataset[Any], id2label: Mapping[int, str] | None, ignore_index: int) -> None:
        self.dataset = dataset
        self.id2label = checked_classes(id2label, ignore_index)
        self.ignore_index = ignore_index

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Sample:
        if index >= len(self):
            raise IndexError(index)
        name = f"{type(self.dataset).__name__}[{index}]"
        item = self.dataset[index]
        if isinstance(item, Mapping):
            image = _first_of(item, ("image", "pixel_values"), name)
            label = _first_of(item, ("label", "labels", "annotation"), name)
            name = str(item.get("name", name))
        elif isinstance(item, Sample):
            image, label, name = item
        elif isinstance(item, tuple | list) and len(item) == 2:
            image, label = item
        else:
            raise DataError(
                f"{name} is a {type(item).__name__}; an item is (image, label), or a dictionary with the keys image "
                "and label"
            )
        sample = Sample(_as_image(image, name), _as_label(label, name), name)
        return checked_sample(sample, self.id2label, self.ignore_index)


def as_samples(
    dataset: Dataset[Any], *, id2label: Mapping[int, str] | None = None, ignore_index: int | None = None
) -> SampleDataset:
    """Return a dataset as one of samples.

    Args:
        dataset: one of ours, which is returned as it is, or any map-style Dataset. Its items are (image, label), or
            dictionaries with the keys image or pixel_values, and label, labels or annotation; a key name is used in
            messages. Images are PIL images, or uint8 arrays or tensors (H, W, C) or (C, H, W); labels are PIL images
            of one channel, or integer arrays or tensors (H, W) or (1, H, W).
        id2label: the classes' names; the dataset's own attribute of this name where None.
        ignore_index: the label of ignored pixels; likewise, and 255 where it has none.

    Raises:
        TypeError: the dataset has no length or no items by number.
        DataError: at an item that cannot be used; the message names it.
    """
    if isinstance(dataset, SampleDataset) and id2label is None and ignore_index is None:
        return dataset
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(f"{type(dataset).__name__} has no length or no items by number; give a map-style Dataset")
    if id2label is None:
        id2label = getattr(dataset, "id2label", None)
    if ignore_index is None:
        ignore_index = getattr(dataset, "ignore_index", IGNORE_INDEX)
    return _ForeignDataset(dataset, id2label, ignore_index)


def find_splits(path: str | os.PathLike[str], layout: Layout = "auto") -> list[str]:
    """Return the names of the splits in a dataset's folder; none where it holds images/ and labels/ without splits.

    Raises:
        DataError: the folder is missing, or its layout is none of those known.
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

    - "ade20k": images/training, images/validation, and annotations/ likewise; label 0 is ignored and 1 is class 0.
    - "cityscapes": leftImg8bit/SPLIT/CITY/*_leftImg8bit.png with gtFine/SPLIT/CITY/*_gtFine_labelTrainIds.png, or
      *_gtFine_labelIds.png where there are none of those.
    - "folders": images/SPLIT and labels/SPLIT, or images/ and labels/ without splits; files are paired by their names.

    Args:
        path: the folder.
        split: "training", "validation" or any other folder's name (train, val and test are the same splits as
            training, validation and testing). None: everything, of a folder without splits.
        layout: one of those above; "auto" finds it by the folders' names.
        id2label: the classes' names. None: those in the folder's classes.txt (a name a line) or id2label.json, else
            ADE20K's or Cityscapes', else None.
        ignore_index: the label of ignored pixels.

    Raises:
        DataError: the folder is missing, its layout is none of those, the split is not there, or as `FolderDataset`.
    """
    root = Path(path)
    found = _layout(root, layout)
    images, labels = (root / name for name in _LAYOUTS[found])
    splits = _splits(images, labels)
    if not splits and split and all((folder / split).is_dir() for folder in (images, labels)):
        splits = [split]  # whoever names a folder means it, however it is called
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


def scaled_size(height: int, width: int, short_side: int, factor: float = 1.0) -> tuple[int, int]:
    """Return an image's size once its shorter side is `short_side` times `factor` long, the proportions kept.

    The longer side becomes at most four times as long: mmsegmentation's 2048 x 512.
    """
    ratio = factor * min(short_side / min(height, width), 4 * short_side / max(height, width))
    return max(1, round(height * ratio)), max(1, round(width * ratio))


def checked_sample(
    sample: Sample, id2label: Mapping[int, str] | None, ignore_index: int, label_name: str | None = None
) -> Sample:
    """Return a sample as it is.

    Args:
        sample: what to look at.
        id2label: the classes; None: any label from 0 is one.
        ignore_index: the label of ignored pixels.
        label_name: what to call the label map; the sample's name where None.

    Raises:
        DataError: the sizes differ, or labels are neither classes nor ignored; the message names the file.
    """
    label_name = label_name or sample.name
    image = sample.image
    size = (image.height, image.width) if isinstance(image, Image.Image) else image.shape[:2]
    if size != sample.label.shape:
        raise DataError(
            f"{label_name}: the label map is {_by(sample.label.shape)} and its image {sample.name} {_by(size)} "
            "(height x width); they must have the same size"
        )
    limit = None if id2label is None else len(id2label)
    wrong = [
        value
        for value in _values(sample.label)
        if value != ignore_index and (value < 0 or (limit is not None and value >= limit))
    ]
    if wrong:
        classes = "classes count from 0" if limit is None else f"there are {limit} classes (0 to {limit - 1})"
        some = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        raise DataError(
            f"{label_name}: holds the label{'s' if len(wrong) > 1 else ''} {some}, but {classes} and {ignore_index} "
            "is ignored; renumber it, name all classes, or check the layout"
        )
    return sample


def _values(label: NDArray[np.integer]) -> list[int]:
    """Return the different labels of a map; counting is ten times quicker than sorting."""
    if label.size and label.min() >= 0 and label.max() < 2**16:
        return np.flatnonzero(np.bincount(label.ravel())).tolist()
    return np.unique(label).tolist()


def checked_classes(id2label: Mapping[int, str] | None, ignore_index: int) -> dict[int, str] | None:
    """Return classes in their order; ValueError where numbers are missing, or one is the ignored label."""
    if id2label is None:
        return None
    classes = {int(number): str(name) for number, name in id2label.items()}
    if not classes or sorted(classes) != list(range(len(classes))):
        raise ValueError(f"id2label must number its classes from 0 without gaps, got {sorted(classes)[:5]}...")
    if ignore_index in classes:
        raise ValueError(
            f"ignore_index {ignore_index} is also a class ({classes[ignore_index]}); give one outside 0 to "
            f"{len(classes) - 1}, such as -100"
        )
    return dict(sorted(classes.items()))


def _files(folder: Path, suffixes: Sequence[str], ending: str, what: str) -> dict[str, Path]:
    """Return the files of a folder and its subfolders, by their paths in it without ending and suffix."""
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
        # Somebody's own classes, most likely: taking label 0 away from them must not happen unseen.
        raise DataError(
            f"{root}: has annotations/ as ADE20K, but not its {'classes' if own_splits else 'splits'}; say layout "
            "ade20k if label 0 is to be ignored, or rename annotations/ to labels/"
        )
    return fitting[0]


def _splits(images: Path, labels: Path) -> list[str]:
    """Return the subfolders that both have, if one of them is called as splits are."""
    for folder in (images, labels):
        if not folder.is_dir():
            raise DataError(f"{folder}: there is no such folder")
    both = sorted(path.name for path in images.iterdir() if path.is_dir() and (labels / path.name).is_dir())
    return both if any(name in names for name in both for names in SPLIT_NAMES) else []


def _listed_classes(root: Path) -> dict[int, str] | None:
    """Return the names in a folder's classes.txt or id2label.json."""
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
        if not classes or sorted(classes) != list(range(len(classes))):
            raise DataError(f'{mapped}: write {{"0": "name", "1": "name", ...}}, numbered from 0 without gaps')
        return classes
    return None


def _first_of(item: Mapping[str, Any], keys: Iterable[str], name: str) -> Any:
    for key in keys:
        if key in item:
            return item[key]
    raise DataError(f"{name} has no {' or '.join(keys)}; it has {', '.join(map(str, item))}")


def _as_image(image: Any, name: str) -> Image.Image | NDArray[np.uint8]:
    if isinstance(image, Image.Image):
        return image if image.mode == "RGB" else image.convert("RGB")
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise DataError(
            f"{name}: the image is {array.dtype} of shape {array.shape}; give a PIL image, or uint8 (H, W, C), before "
            "it is scaled or normalised"
        )
    if array.ndim == 2:
        return Image.fromarray(array).convert("RGB")
    # Channels are few: three or four, a dozen in a satellite's image.
    return np.ascontiguousarray(np.moveaxis(array, 0, -1)) if array.shape[0] < array.shape[2] else array


def _as_label(label: Any, name: str) -> NDArray[np.integer]:
    array = np.asarray(label)
    if array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    if array.dtype == bool:
        array = array.astype(np.uint8)
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise DataError(f"{name}: the label map is {array.dtype} of shape {array.shape}; give (H, W) integers")
    # PyTorch does little with the unsigned types above 8 bits.
    return array.astype(np.int64) if array.dtype.kind == "u" and array.dtype != np.uint8 else array


def _by(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))


class TrainingTransform:
    """From a sample to what the model trains on, as mmsegmentation's recipes do it.

    In order: resize to `base_size` times a random factor; crop, again while one class has more of the crop than
    `max_class_share` (ten tries at most); flip horizontally half the time; distort brightness, contrast, saturation
    and hue, each half the time; rescale and normalize as the processor does; pad to the crop's size below and to the
    right, the pixels with the mean (0 once normalised) and the labels with the ignore index.

    Args:
        processor: whose `rescale_factor`, `image_mean` and `image_std` are used (and its `size`, see `crop_size`).
        crop_size: (height, width) of the result, or one number for a square; the processor's `size` where None.
        base_size: the length of the image's shorter side that is factor 1 (see `scaled_size`); the crop's shorter side
            where None.
        scale: the smallest and the largest factor.
        max_class_share: of the crop's pixels that are not ignored; 1 takes the first crop with any.
        flip: how likely an image is flipped.
        photometric: whether colours are distorted; images of other than three channels never are.

    Raises:
        ImportError: torchvision is not installed.
        ValueError: an argument has no meaning.
    """

    def __init__(
        self,
        processor: UperNetImageProcessor,
        crop_size: int | tuple[int, int] | None = None,
        *,
        base_size: int | None = None,
        scale: tuple[float, float] = (0.5, 2.0),
        max_class_share: float = 0.75,
        flip: float = 0.5,
        photometric: bool = True,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        _torchvision()
        if crop_size is None:
            crop_size = (processor.size["height"], processor.size["width"])
        self.crop_size = (crop_size, crop_size) if isinstance(crop_size, int) else (crop_size[0], crop_size[1])
        self.base_size = min(self.crop_size) if base_size is None else base_size
        if min(*self.crop_size, self.base_size) < 1:
            raise ValueError(f"crop_size {self.crop_size} and base_size {self.base_size} must be at least 1")
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale is {scale}; give the smallest and the largest factor, above 0")
        if not (0 < max_class_share <= 1 and 0 <= flip <= 1):
            raise ValueError(f"max_class_share {max_class_share} and flip {flip} must be shares of 1")
        self.scale = scale
        self.max_class_share = max_class_share
        self.flip = flip
        self.photometric = photometric
        self.ignore_index = ignore_index
        factor = processor.rescale_factor if processor.do_rescale else 1.0
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
        # (pixels * factor - mean) / std as one multiplication and one addition.
        self._multiplier = torch.tensor(factor / np.asarray(std), dtype=torch.float32).reshape(-1, 1, 1)
        self._addend = torch.tensor(-np.asarray(mean) / np.asarray(std), dtype=torch.float32).reshape(-1, 1, 1)

    def __call__(self, sample: Sample, generator: np.random.Generator) -> dict[str, Any]:
        """Augment a sample.

        Args:
            sample: the photo and its label map.
            generator: of all that is random here: the same one gives the same result.

        Returns:
            `pixel_values`, float32 (C, height, width); `labels`, int64 (height, width); `name`, the sample's.
        """
        functional = _torchvision()
        bilinear, nearest = functional.InterpolationMode.BILINEAR, functional.InterpolationMode.NEAREST_EXACT
        pixels = torch.from_numpy(np.array(sample.image)).permute(2, 0, 1)
        labels = torch.from_numpy(np.array(sample.label))[None]
        size = scaled_size(pixels.shape[1], pixels.shape[2], self.base_size, generator.uniform(*self.scale))
        labels = functional.resize(labels, size, nearest)
        top, left, height, width = self._crop(labels[0], generator)
        labels = functional.crop(labels, top, left, height, width)
        pixels = functional.resize(pixels, size, bilinear, antialias=True)
        pixels = functional.crop(pixels, top, left, height, width)
        if generator.random() < self.flip:
            pixels, labels = functional.horizontal_flip(pixels), functional.horizontal_flip(labels)
        if self.photometric and len(pixels) == 3:
            pixels = self._distort(pixels, generator)
        pixels = pixels * self._multiplier + self._addend
        padding = [0, 0, self.crop_size[1] - width, self.crop_size[0] - height]
        return {
            "pixel_values": functional.pad(pixels, padding, fill=0.0),
            "labels": functional.pad(labels.long(), padding, fill=self.ignore_index)[0],
            "name": sample.name,
        }

    def _crop(self, labels: torch.Tensor, generator: np.random.Generator) -> tuple[int, int, int, int]:
        """Return top, left, height and width of a crop of a label map (H, W)."""
        height, width = (min(have, want) for have, want in zip(labels.shape, self.crop_size, strict=True))
        for _ in range(10):
            top = int(generator.integers(labels.shape[0] - height + 1))
            left = int(generator.integers(labels.shape[1] - width + 1))
            inside = labels[top : top + height, left : left + width].long()
            counts = torch.bincount(inside[inside != self.ignore_index])
            if len(counts) and counts.max() <= self.max_class_share * counts.sum():
                break
        return top, left, height, width

    @staticmethod
    def _distort(pixels: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
        """Distort colours by the amounts of torchvision's `RandomPhotometricDistort`; channels are not exchanged."""
        functional = _torchvision()
        steps = [
            (functional.adjust_brightness, generator.uniform(0.875, 1.125)),
            (functional.adjust_saturation, generator.uniform(0.5, 1.5)),
            (functional.adjust_hue, generator.uniform(-0.05, 0.05)),
        ]
        # Contrast comes early or late: scaled before the hue it is not what it is after.
        steps.insert(int(generator.choice([1, 3])), (functional.adjust_contrast, generator.uniform(0.5, 1.5)))
        for step, amount in steps:
            if generator.random() < 0.5:
                pixels = step(pixels, amount)
        return pixels


class TrainingDataset(Dataset[dict[str, Any]]):
    """Augmented samples, each the same whenever and wherever it is made.

    An item is asked for by (epoch, index): its randomness comes from `seed`, epoch and index alone, whatever worker,
    rank or run makes it, so that a run which was stopped goes on with the same data.

    Args:
        samples: the dataset.
        transform: what is done to a sample, with a generator of all that is random: a `TrainingTransform`, or another
            function that returns `pixel_values`, `labels` and `name`.
        seed: of everything random.
    """

    def __init__(
        self, samples: SampleDataset, transform: Callable[[Sample, np.random.Generator], dict[str, Any]], seed: int = 0
    ) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        """Return the number of samples in an epoch."""
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Return what `transform` makes of a sample, for a pair (epoch, index)."""
        epoch, index = key
        return self.transform(self.samples[index], np.random.default_rng((self.seed, epoch, index)))


def _torchvision() -> Any:
    try:
        from torchvision.transforms.v2 import functional
    except ImportError as error:
        raise ImportError(f"augmentation needs torchvision ({error}): pip install 'fastuper[train]'") from None
    return functional

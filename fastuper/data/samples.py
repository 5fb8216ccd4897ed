"""Samples (a photo with its label map), datasets of samples, and the checks on both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

if TYPE_CHECKING:
    pass


IGNORE_INDEX = 255
"""The label of ignored pixels in every common layout, and a model's `loss_ignore_index` unless told otherwise."""


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

"""Samples (a photo with its label map), datasets of samples, and the checks on both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from fastuper.data.images import ImageError, as_labels, as_rgb, image_size
from fastuper.io.messages import format_size, listed, reason

IGNORE_INDEX = 255
"""The usual label of ignored pixels: in all common layouts, and the default of a model's `loss_ignore_index`."""


class DataError(ValueError):
    """A dataset that cannot be used. The message is one line with the file, the fault and the remedy."""


class Sample(NamedTuple):
    """A photo with its label map.

    Attributes:
        image: a PIL image, or (H, W, C) uint8.
        label: (H, W) integers: the model's class numbers, and the dataset's `ignore_index`.
        name: the photo's file, or another name for messages.
    """

    image: Image.Image | NDArray[np.uint8]
    label: NDArray[np.integer]
    name: str


class SampleDataset(Dataset[Sample]):
    """The base class of this package's datasets.

    Attributes:
        id2label: the classes' names by their numbers, 0 to N - 1; None if the names are unknown.
        ignore_index: the label of ignored pixels.
    """

    id2label: dict[int, str] | None
    ignore_index: int

    def __len__(self) -> int:
        """Return the number of samples."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        """Return a sample whose image and label map have one size, and whose labels are classes or ignored.

        Raises:
            DataError, fastuper.data.images.ImageError: the sample cannot be used; the message names the file.
        """
        raise NotImplementedError


class _ForeignDataset(SampleDataset):
    """Samples made from the items of any Dataset."""

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
        try:
            item = self.dataset[index]
        except (DataError, MemoryError):
            raise
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, EOFError, struct.error, ...
            raise DataError(f"{name}: cannot be read ({reason(error)})") from error
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
        try:
            numbers = _label_of(label, name)
            sample = Sample(_image_of(image, numbers.shape, name), numbers, name)
        except ImageError as error:
            raise DataError(str(error)) from None
        return checked_sample(sample, self.id2label, self.ignore_index)


def as_samples(
    dataset: Dataset[Any], *, id2label: Mapping[int, str] | None = None, ignore_index: int | None = None
) -> SampleDataset:
    """Return a dataset of samples made from another dataset.

    Args:
        dataset: a `SampleDataset`, which is returned unchanged, or any map-style Dataset. Its items are (image, label),
            or dictionaries with the keys image or pixel_values, and label, labels or annotation; the key name, if there
            is one, names the sample in messages. Images are PIL images, decoded by the rule in `fastuper.data.images`,
            or uint8 arrays or tensors (H, W, C) or (C, H, W). Labels are PIL images of one channel, or integer arrays
            or tensors (H, W) or (1, H, W).
        id2label: the classes' names; None takes the dataset's attribute of this name.
        ignore_index: the label of ignored pixels; None takes the dataset's attribute of this name, or 255 if it has
            none.

    Raises:
        TypeError: the dataset has no length or no items by number.
        DataError: an item that is read cannot be used; the message names it.
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
    """Return a sample unchanged, or raise the error of its first fault.

    Args:
        sample: the sample.
        id2label: the classes; None accepts any label from 0.
        ignore_index: the label of ignored pixels.
        label_name: the label map's name in messages; the sample's name if None.

    Raises:
        DataError: image and label map differ in size, or labels are neither classes nor ignored; the message names
            the file.
    """
    label_name = label_name or sample.name
    size = image_size(sample.image)
    if size != sample.label.shape:
        raise DataError(
            f"{label_name}: the label map is {format_size(sample.label.shape)} and its image {sample.name} "
            f"{format_size(size)} (height x width); they must have the same size"
        )
    check_values(sample.label, id2label, ignore_index, label_name)
    return sample


def check_values(label: NDArray[np.integer], id2label: Mapping[int, str] | None, ignore_index: int, name: str) -> None:
    """Check that all labels of a map are classes or ignored.

    Args:
        label: (H, W).
        id2label: the classes; None accepts any label from 0.
        ignore_index: the label of ignored pixels.
        name: the label map's name in messages.

    Raises:
        DataError: a label is neither a class nor ignored.
    """
    limit = None if id2label is None else len(id2label)
    wrong = [
        value
        for value in values_of(label)
        if value != ignore_index and (value < 0 or (limit is not None and value >= limit))
    ]
    if wrong:
        classes = "classes count from 0" if limit is None else f"there are {limit} classes (0 to {limit - 1})"
        raise DataError(
            f"{name}: holds the label{'s' if len(wrong) > 1 else ''} {listed(wrong, 5)}, but {classes} and "
            f"{ignore_index} is ignored; renumber it, name all classes, or check the layout"
        )


def values_of(label: NDArray[np.integer]) -> list[int]:
    """Return the different labels of a map; counting is ten times faster than sorting."""
    if label.size and label.min() >= 0 and label.max() < 2**16:
        return np.flatnonzero(np.bincount(label.ravel())).tolist()
    return np.unique(label).tolist()


def checked_classes(id2label: Mapping[int, str] | None, ignore_index: int) -> dict[int, str] | None:
    """Return classes sorted by their numbers.

    Raises:
        ValueError: numbers are missing, or class 255 would be ignored. Any other class may be.
    """
    if id2label is None:
        return None
    classes = {int(number): str(name) for number, name in id2label.items()}
    if not are_numbered(classes):
        raise ValueError(f"id2label must number its classes from 0 without gaps, got {listed(sorted(classes), 5)}")
    if ignore_index in classes and ignore_index == IGNORE_INDEX:  # probably the default, not a choice
        raise ValueError(
            f"ignore_index {ignore_index} is also a class ({classes[ignore_index]}); give one outside 0 to "
            f"{len(classes) - 1}, such as -100"
        )
    return dict(sorted(classes.items()))


def are_numbered(classes: Mapping[int, str]) -> bool:
    """Return True if there are classes and their numbers are 0 to N - 1."""
    return bool(classes) and sorted(classes) == list(range(len(classes)))


def _first_of(item: Mapping[str, Any], keys: Iterable[str], name: str) -> Any:
    for key in keys:
        if key in item:
            return item[key]
    raise DataError(f"{name} has no {' or '.join(keys)}; it has {listed(item, 8)}")


def _image_of(image: Any, label_size: tuple[int, ...], name: str) -> Image.Image | NDArray[np.uint8]:
    """Return the image of an item as RGB, or as (H, W, C); the label map's size tells the layout of arrays."""
    if isinstance(image, Image.Image):
        return as_rgb(image, name)
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise DataError(
            f"{name}: the image is {array.dtype} of shape {array.shape}; give a PIL image, or uint8 (H, W, C), before "
            "it is scaled or normalised"
        )
    if array.ndim == 2:
        return as_rgb(Image.fromarray(array), name)
    if array.shape[:2] == label_size:
        return array
    # If the sizes differ, the smaller dimension counts as the channels, and `checked_sample` reports both sizes.
    if array.shape[1:] == label_size or array.shape[0] < array.shape[2]:
        return np.ascontiguousarray(np.moveaxis(array, 0, -1))
    return array


def _label_of(label: Any, name: str) -> NDArray[np.integer]:
    """Return the label map of an item as integers (H, W)."""
    if isinstance(label, Image.Image):
        return as_labels(label, name)
    array = np.asarray(label)
    if array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    if array.dtype == bool:
        array = array.astype(np.uint8)
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise DataError(f"{name}: the label map is {array.dtype} of shape {array.shape}; give (H, W) integers")
    # PyTorch supports few operations on unsigned types above 8 bits.
    return array.astype(np.int64) if array.dtype.kind == "u" and array.dtype != np.uint8 else array

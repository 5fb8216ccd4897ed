"""Which classes the label maps of a folder hold, and whether they can be meant: masks of 0 and 255 are a usual mistake.

A loss ignores label 255, so that masks of 0 and 255 train on the background alone. Such data is refused before anything
runs. Data in which 255 is really a border or an unlabelled region has other classes in its label maps, and passes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from fastuper.data.folders import FolderDataset
from fastuper.data.images import ImageError, read_labels
from fastuper.data.samples import DataError, check_values, values_of
from fastuper.io.messages import listed

ENOUGH = 64
"""Label maps to read before a class that is in none of them no longer matters, if two others are there."""


@dataclass
class LabelsSeen:
    """What label maps hold.

    Attributes:
        classes: the labels that are not ignored.
        ignored: whether some pixels are ignored.
        reduced_before: whether files whose labels are to be reduced have the ignored label already.
        maps: the number of label maps that were read.
    """

    classes: set[int] = field(default_factory=set)
    ignored: bool = False
    reduced_before: bool = False
    maps: int = 0


def see_labels(dataset: FolderDataset, indices: Iterable[int], seen: LabelsSeen) -> Iterable[LabelsSeen]:
    """Read label maps one by one into `seen`, and yield it after each.

    Raises:
        DataError, fastuper.data.images.ImageError: a label map cannot be used.
    """
    for index in indices:
        path = dataset.files[index][1]
        stored = read_labels(path)
        label = dataset.renumbered(stored, str(path))
        check_values(label, dataset.id2label, dataset.ignore_index, str(path))
        seen.reduced_before |= dataset.reduce_labels and bool((stored == dataset.ignore_index).any())
        values = set(values_of(label))
        seen.ignored |= dataset.ignore_index in values
        seen.classes |= values - {dataset.ignore_index}
        seen.maps += 1
        yield seen


def check_labels(
    dataset: FolderDataset,
    id2label: Mapping[int, str],
    *,
    training: bool,
    known: Collection[int] = (),
    notify: Callable[[str], None] = lambda message: None,
) -> LabelsSeen:
    """Check that label maps hold classes that a model can be trained or measured on.

    Label maps are read in a fixed random order, until all classes are found, or two classes in `ENOUGH` label maps. So
    only suspicious data is read completely.

    Args:
        dataset: the dataset.
        id2label: the classes.
        training: whether a model is trained on the dataset. Then a label map that cannot be read is an error, and so is
            data with one class: nothing can be learned from it. To measure on data of one class is possible, but not if
            there are two classes and other pixels are ignored, as in masks of 0 and 255.
        known: classes that the label maps of another split hold: it is no fault if they are in none of these.
        notify: called with a line about a class that is in no label map while pixels are ignored, and with one about
            labels that may have been reduced before.

    Returns:
        What the label maps hold that were read.

    Raises:
        DataError: the data is refused.
        fastuper.data.images.ImageError: a label map cannot be read, with `training`.
    """
    seen, expected = LabelsSeen(), id2label.keys() - {dataset.ignore_index}
    for index in np.random.default_rng(0).permutation(len(dataset)).tolist():
        try:
            for _ in see_labels(dataset, [index], seen):
                pass
        except (DataError, ImageError):
            if training:
                raise
        if seen.classes >= expected or (len(seen.classes) >= 2 and seen.maps >= ENOUGH):
            break
    if not seen.maps:
        return seen  # none can be read, and the evaluation reports each
    missing = sorted(expected - seen.classes - set(known))
    looks_like_masks = bool(missing) and len(expected) == 2 and seen.ignored
    if len(seen.classes) < 2 and (training or not seen.classes or looks_like_masks):
        raise DataError(one_class(dataset, seen, id2label))
    if seen.reduced_before:
        notify(
            f"{dataset.files[0][1].parent}: holds label {dataset.ignore_index}, and this layout ignores 0 and makes "
            "every other label one less; if the label maps were reduced before, and 0 is a class, use the layout "
            "folders"
        )
    if len(missing) == 1 and seen.ignored:
        first = "the" if seen.maps == len(dataset) else f"{seen.maps}"
        notify(
            f"class {missing[0]} ({id2label[missing[0]]}) is in none of {first} label maps, and pixels of label "
            f"{dataset.ignore_index} are ignored: if that is the class's value in the files, renumber it, or give "
            "another --ignore-index (ignore_index)"
        )
    return seen


def one_class(dataset: FolderDataset, seen: LabelsSeen, id2label: Mapping[int, str] | None = None) -> str:
    """Return the message about label maps that hold one class or none."""
    labels, maps = dataset.files[0][1].parent, "the label map" if seen.maps == 1 else f"the {seen.maps} label maps"
    ignored = f"{dataset.ignore_index}{' and 0' if dataset.reduce_labels else ''}"
    if not seen.classes:
        return (
            f"{labels}: all pixels of {maps} are ignored (label {ignored}); renumber the label "
            "maps from 0, or give another --ignore-index (ignore_index)"
        )
    only, names = min(seen.classes), id2label or {}
    named = f"{only} ({names[only]})" if only in names else f"{only}"
    if not seen.ignored:
        return f"{labels}: all labels of {maps} are {named}; add label maps with other classes"
    other = 0 if only else 1
    target = f"{other} ({names[other]})" if other in names else f"{other}"
    return (
        f"{labels}: all labels of {maps} are {named} or ignored ({ignored}); if "
        f"{dataset.ignore_index} is a class, as in masks of 0 and 255, renumber it to {target}; if it is not, add "
        "label maps with other classes"
    )


def check_numbers(seen: LabelsSeen, notify: Callable[[str], None]) -> None:
    """Check the labels of data without class names, whose classes are the numbers from 0 to the largest label.

    Raises:
        DataError: most of these numbers are in no label map.
    """
    highest = max(seen.classes)
    missing = sorted(set(range(highest + 1)) - seen.classes) if highest < 2**16 else None
    if missing is None or len(missing) > len(seen.classes):
        raise DataError(
            f"the label maps hold the labels {listed(sorted(seen.classes), 5)} only, so that most of the classes 0 to "
            f"{highest} would have no pixels; renumber the labels from 0 without gaps, or name all classes in "
            "classes.txt"
        )
    if missing:
        become = "become classes" if len(missing) > 1 else "becomes a class"
        notify(f"no label map holds {listed(missing, 5)}, which {become} too")

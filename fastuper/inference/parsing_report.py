"""The report of a parsed photo: scene, and objects with their parts, materials and textures, as nested JSON.

A share is a number of pixels, divided by the pixels of the photo for an object, of the object for a part, and of the
object or part for a material or texture. Classes 0 of objects, parts and materials mean "none" and are in no list.
Pixels of class 0, and of classes below a threshold, stay in the denominator: the shares of a list sum to at most 1.
(The official code drops materials below 10 % of an object from its picture; it writes no report.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastuper.data.overlay import checked_labels
from fastuper.data.parsing_labels import WITH_BACKGROUND
from fastuper.io.options import check_options, document_options, option

SMALLEST_INSTANCE = 0.001
"""The default of `min_share` with instances, a share of the photo: random specks are no instances."""

_STRIP = 1 << 20  # pixels that are counted at a time
_LISTS = {"part": "parts", "material": "materials", "texture": "textures"}


@document_options
@dataclass(frozen=True)
class ReportOptions:
    """What a report lists.

    Raises:
        ValueError: a share is not between 0 and 1.
    """

    min_share: float | None = option(
        None,
        "Smallest share of the photo that a listed object, or instance of an object, covers.",
        at_least=0,
        at_most=1,
        default_text=f"0, with --instances {SMALLEST_INSTANCE}",
        metavar="SHARE",
    )
    min_part_share: float = option(
        0.0, "Smallest share of its object that a listed part covers.", at_least=0, at_most=1, metavar="SHARE"
    )
    min_material_share: float = option(
        0.1,
        "Smallest share of its object or part that a listed material or texture covers.",
        at_least=0,
        at_most=1,
        metavar="SHARE",
    )
    instances: bool = option(
        False, "List each connected region of an object on its own; pixels that touch at a corner are connected."
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def smallest_object(self) -> float:
        """The smallest share of the photo that a listed object covers."""
        if self.min_share is not None:
            return self.min_share
        return SMALLEST_INSTANCE if self.instances else 0.0


def check_instances() -> None:
    """Check that instances can be found.

    Raises:
        ImportError: SciPy is missing; the message names the extra that installs it.
    """
    try:
        from scipy.sparse import csgraph  # noqa: F401
    except ImportError as error:
        raise ImportError(f"instances need SciPy ({error}): pip install 'fastuper[parse]'") from None


def parsing_report(
    scene: Sequence[tuple[int, float]] | None,
    maps: Mapping[str, NDArray[np.integer]],
    labels: Mapping[str, Sequence[str]],
    options: ReportOptions = ReportOptions(),
) -> dict[str, Any]:
    """Return the report of a photo, of JSON types.

    Args:
        scene: the scenes as (number, probability), best first; None if they were not asked for.
        maps: the label maps by task ("object", "part", "material", "texture"), each (H, W); at least one, unless
            `scene` is given. What was not asked for is left out.
        labels: the names of each task's classes.
        options: thresholds, and whether objects are divided into instances.

    Returns:
        A dictionary with a list for each task that was asked for, each sorted by descending share:

        - "scene": {"id", "name", "probability"}.
        - "objects": {"id", "name", "share", "pixels", "box", "parts", "materials", "textures"}. `share` is the
          object's share of the photo. `box` is [left, top, right, bottom] in pixels from the photo's upper left
          corner; `right` and `bottom` are the first column and row behind the object. An object's "parts" are {"id",
          "name", "share", "pixels", "materials", "textures"}; materials and textures are {"id", "name", "share",
          "pixels"}.
        - "parts", "materials", "textures": all that the photo shows, with shares of the photo and without a threshold.

    Raises:
        ValueError: the maps differ in size, or a label has no name.
        ImportError: instances are asked for, and SciPy is missing.
    """
    report: dict[str, Any] = {}
    if scene is not None:
        names = labels["scene"]
        report["scene"] = [{"id": index, "name": names[index], "probability": value} for index, value in scene]
    if not maps:
        return report
    maps = {task: checked_labels(labels_of, len(labels[task])) for task, labels_of in maps.items()}
    shape = next(iter(maps.values())).shape
    if any(labels_of.shape != shape for labels_of in maps.values()):
        raise ValueError(f"the label maps differ in size: {', '.join(str(each.shape) for each in maps.values())}")

    objects = maps.get("object", np.zeros(shape, dtype=np.uint8))
    inner = {task: maps[task] for task in _LISTS if task in maps}
    regions: NDArray[np.integer] = objects
    classes: Sequence[int] = range(int(objects.max()) + 1)
    if "object" in maps and options.instances:
        regions, classes = _instances(objects, options.smallest_object)
    table, boxes = _count(regions, {task: (layer, len(labels[task])) for task, layer in inner.items()})
    if "object" in maps:
        report["objects"] = _objects(table, boxes, classes, labels, options)
    return report | {_LISTS[task]: _classes(table, task, labels[task], 0.0) for task in inner}


class _Table(NamedTuple):
    """The combinations of region and classes that occur in a photo, sorted by region, and their pixels.

    Attributes:
        region: (K,) region numbers.
        classes: (K,) class numbers by task.
        pixels: (K,) numbers of pixels; their sum is the photo's.
        area: the pixels that shares are shares of: at first those of the photo.
    """

    region: NDArray[np.int64]
    classes: dict[str, NDArray[np.int64]]
    pixels: NDArray[np.int64]
    area: int

    def where(self, rows: Any) -> _Table:
        """Return a part of the table, whose area is that part's."""
        pixels = self.pixels[rows]
        classes = {task: classes[rows] for task, classes in self.classes.items()}
        return _Table(self.region[rows], classes, pixels, int(pixels.sum()))


def _count(
    regions: NDArray[np.integer], layers: Mapping[str, tuple[NDArray[np.integer], int]]
) -> tuple[_Table, NDArray[np.int64]]:
    """Count all combinations of region and classes; return also each region's box, (regions, 4).

    Args:
        regions: (H, W), region numbers from 0.
        layers: label map and number of classes by task.
    """
    height, width = regions.shape
    count = int(regions.max()) + 1
    combinations = int(np.prod([classes for _, classes in layers.values()], dtype=np.int64))
    left, top = np.full(count, width), np.full(count, height)
    right, bottom = np.zeros(count, np.int64), np.zeros(count, np.int64)
    keys, pixels = [], []
    rows = max(1, _STRIP // width)
    for start in range(0, height, rows):
        strip = slice(start, start + rows)
        key = regions[strip].astype(np.int64)
        for layer, classes in layers.values():
            key = key * classes + layer[strip]
        first = np.flatnonzero(_run_starts(key))  # maps are smooth: there are far fewer runs than pixels
        lengths = np.diff(first, append=key.size)
        run = key.ravel()[first]
        found, inverse = np.unique(run, return_inverse=True)
        keys.append(found)
        pixels.append(np.bincount(inverse.ravel(), weights=lengths))
        region = run // combinations
        row, column = np.divmod(first, width)
        np.minimum.at(left, region, column)
        np.maximum.at(right, region, column + lengths)
        np.minimum.at(top, region, row + start)
        np.maximum.at(bottom, region, row + start + 1)

    key, inverse = np.unique(np.concatenate(keys), return_inverse=True)
    total = np.bincount(inverse.ravel(), weights=np.concatenate(pixels)).astype(np.int64)
    digits = {}
    for task, (_, classes) in reversed([*layers.items()]):
        key, digits[task] = np.divmod(key, classes)
    return _Table(key, digits, total, regions.size), np.stack([left, top, right, bottom], axis=1)


def _instances(objects: NDArray[np.integer], smallest: float) -> tuple[NDArray[np.int32], list[int]]:
    """Return the connected regions of the objects, (H, W), and the object of each; region 0 is no object.

    The runs of equal pixels in the rows are the nodes of a graph. Runs of one object that touch are connected in it.

    Args:
        objects: (H, W) object numbers.
        smallest: the share of the photo below which a region is left out.
    """
    check_instances()
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    new = _run_starts(objects)
    run = (np.cumsum(new, dtype=np.int32) - 1).reshape(objects.shape)
    upper, lower = np.s_[:-1], np.s_[1:]
    # Two runs touch in a column in which one of them starts, or at the corner where both end or start.
    below = (objects[upper] == objects[lower]) & (new[upper] | new[lower])
    corner = new[upper, 1:] & new[lower, 1:]
    falling = (objects[upper, :-1] == objects[lower, 1:]) & corner
    rising = (objects[upper, 1:] == objects[lower, :-1]) & corner
    first = np.concatenate([run[upper][below], run[upper, :-1][falling], run[upper, 1:][rising]])
    second = np.concatenate([run[lower][below], run[lower, 1:][falling], run[lower, :-1][rising]])
    count = int(run[-1, -1]) + 1
    graph = coo_array((np.ones(len(first), dtype=bool), (first, second)), shape=(count, count))
    components, region = connected_components(graph, directed=False)

    starts = np.flatnonzero(new)
    pixels = np.bincount(region, weights=np.diff(starts, append=objects.size))
    classes = np.zeros(components, dtype=np.int64)
    classes[region] = objects.ravel()[starts]
    kept = (classes > 0) & (pixels / objects.size >= smallest)
    numbers = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
    return numbers[region][run], [0, *classes[kept].tolist()]


def _run_starts(values: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Return where a run of equal neighbours in a row starts, (H, W)."""
    new = np.ones(values.shape, dtype=bool)
    np.not_equal(values[:, 1:], values[:, :-1], out=new[:, 1:])
    return new


def _objects(
    table: _Table,
    boxes: NDArray[np.int64],
    classes: Sequence[int],
    labels: Mapping[str, Sequence[str]],
    options: ReportOptions,
) -> list[dict[str, Any]]:
    """Return the entries of the regions that are objects; `classes` has the object of each region."""
    entries = []
    numbers, starts = np.unique(table.region, return_index=True)
    for number, start, end in zip(numbers, starts, [*starts[1:], len(table.region)], strict=True):
        inside = table.where(slice(start, end))
        share = inside.area / table.area
        if number == 0 or share < options.smallest_object:
            continue
        entry = {
            "id": classes[number],
            "name": labels["object"][classes[number]],
            "share": share,
            "pixels": inside.area,
            "box": boxes[number].tolist(),
        }
        if "part" in inside.classes:
            entry["parts"] = _classes(inside, "part", labels["part"], options.min_part_share)
            for part in entry["parts"]:
                part |= _surfaces(inside.where(inside.classes["part"] == part["id"]), labels, options)
        entries.append(entry | _surfaces(inside, labels, options))
    return sorted(entries, key=lambda entry: (-entry["pixels"], entry["id"]))


def _surfaces(table: _Table, labels: Mapping[str, Sequence[str]], options: ReportOptions) -> dict[str, Any]:
    """Return the materials and textures of a region, as far as they were asked for."""
    return {
        _LISTS[task]: _classes(table, task, labels[task], options.min_material_share)
        for task in ("material", "texture")
        if task in table.classes
    }


def _classes(table: _Table, task: str, names: Sequence[str], least: float) -> list[dict[str, Any]]:
    """Return the classes of a task that cover at least a share of the table's area, largest first."""
    pixels = np.bincount(table.classes[task], weights=table.pixels).astype(np.int64)
    if task in WITH_BACKGROUND:
        pixels[0] = 0
    shares = pixels / table.area
    return [
        {"id": int(index), "name": names[index], "share": float(shares[index]), "pixels": int(pixels[index])}
        for index in np.argsort(-pixels, kind="stable")
        if pixels[index] > 0 and shares[index] >= least
    ]

"""The measures of Unified Perceptual Parsing, counted over images: those of the official evaluation, and textures."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastuper.data.classes import class_name
from fastuper.data.parsing_labels import TASKS, WITH_BACKGROUND
from fastuper.evaluation.confusion import ConfusionMatrix, as_tensor
from fastuper.evaluation.report import json_number
from fastuper.io.messages import format_size, listed, shown

if TYPE_CHECKING:
    from fastuper.models.outputs import Parsing
    from fastuper.models.parsing_configuration import UnifiedPerceptualParsingConfig

_NOT_LABELLED = {task: 0 if task in WITH_BACKGROUND else -1 for task in TASKS}
_PREDICTIONS = {"scene": "scene", "object": "objects", "part": "parts", "material": "materials", "texture": "textures"}
_NO_PART, _FOREIGN_PART = 0, -1  # in place of a channel


class ParsingMetrics:
    """Counts of images and pixels, from which the measures follow. Memory depends only on the tables of classes.

    Scenes, objects, parts and materials are measured as by the official code (`eval_multipro.py` of
    CSAILVision/unifiedparsing), with sums over all images:

    - scene: the share of labelled images whose most probable scene is right.
    - object, material: of each class but 0, the intersection over union, and of all pixels the share that is right.
      Pixels without a label (0) count nowhere.
    - part: of each part of an object, the intersection over union of (pixels of the part in true objects) and (pixels
      of the part in predicted objects), over the images in which a part of this object is labelled. Predictions on
      "other" and outside the true object count as errors. An object's accuracy is the share of the pixels labelled with
      one of its parts whose object and part are right. Means are over an object's parts, then over the objects that
      have labelled parts.

    The paper reports a top-1 for textures, and the official code does not measure them. The measure here is ours: the
    texture of an image is the most frequent texture of its map (the first of several), and its top-1 is the share of
    labelled images whose texture is right.

    Args:
        config: the configuration of the model, for the classes of each task and the parts of each object.
        device: the device of the counts, on which pixels are counted.

    Attributes:
        matrices: the `ConfusionMatrix` of scene and texture (of images), object and material (of pixels).
        part_counts: (3, channels of the part head) int64: pixels of each part that are right, labelled, predicted.

    The sums of several processes' counts (`torch.distributed.all_reduce`) are the counts of all their images.
    """

    def __init__(self, config: UnifiedPerceptualParsingConfig, *, device: torch.device | str = "cpu") -> None:
        self.labels = {task: list(names) for task, names in config.labels.items()}
        self.object_parts = dict(config.object_parts)
        self.matrices = {
            task: ConfusionMatrix(
                len(names), ignore_index=_NOT_LABELLED[task], id2label=dict(enumerate(names)), device=device
            )
            for task, names in self.labels.items()
            if task != "part"
        }
        self._slices = dict(config.part_slices)
        channels = max((channels.stop for channels in self._slices.values()), default=1)
        self.part_counts = torch.zeros((3, channels), dtype=torch.int64, device=device)
        # The channel of a part in an object, and the place of a channel's object among the objects that have parts.
        shape = tuple(len(self.labels.get(task, ())) for task in ("object", "part"))
        self._channel_of = torch.full(shape, _FOREIGN_PART, device=device)
        self._channel_of[:, :1] = _NO_PART
        self._object_of = torch.zeros(channels, dtype=torch.int64, device=device)
        for place, (number, span) in enumerate(self._slices.items()):
            parts = torch.tensor(self.object_parts[number], device=device)
            self._channel_of[number, parts] = torch.arange(span.start + 1, span.stop, device=device)
            self._object_of[span] = place

    def update(self, predictions: Parsing, labels: Mapping[str, Any]) -> None:
        """Count an image.

        Args:
            predictions: what `parse` returns for the image, at the size of the labels; arrays may be in its place.
            labels: what is labelled in the image. "object", "part", "material": (H, W) integers, tensors or arrays; 0
                is not labelled. Parts are numbers of parts, as in `predictions`, and count inside labelled objects, so
                that they need "object". "scene", "texture": the image's number; -1 is not labelled.

        Raises:
            ValueError: a task is unknown, a label or prediction is missing, no class, or of another size, or a part
                does not belong to its object. The message names the task, the value and the place. Then nothing of the
                image is counted.
        """
        for task in labels:
            if task not in self.labels:
                raise ValueError(f"labels has {shown(task)}; the model's tasks are {listed(self.labels, 5)}")
        if "part" in labels and "object" not in labels:
            raise ValueError("labels has 'part' without 'object': parts are counted in their objects; give both")
        true, predicted = {}, {}
        for task, values in labels.items():
            name, theirs = f"labels[{task!r}]", f"predictions.{_PREDICTIONS[task]}"
            found = getattr(predictions, _PREDICTIONS[task])
            if found is None:
                raise ValueError(f"{theirs} is None, but {name} is given: parse the image with the task {task!r}")
            if task in ("scene", "texture"):
                true[task] = self._number(name, values, task)
            else:
                true[task] = self._map(name, values, task)
            if task == "scene":
                predicted[task] = self._number(theirs, found[0][0], task, lowest=0)
                continue
            predicted[task] = self._map(theirs, found, task)
            if task == "texture":
                predicted[task] = predicted[task].flatten().bincount().argmax()
            elif predicted[task].shape != true[task].shape:
                raise ValueError(
                    f"{theirs} is {format_size(predicted[task].shape)}, {name} {format_size(true[task].shape)}: give "
                    "`parse` the size of the labels in target_sizes"
                )
        if "part" in labels:
            if true["object"].shape != true["part"].shape:
                raise ValueError(
                    f"labels['object'] is {format_size(true['object'].shape)}, labels['part'] "
                    f"{format_size(true['part'].shape)}: they must agree"
                )
            part_counts = self._count_parts(true, predicted)
        for task in labels:
            if task == "part":
                self.part_counts += part_counts
            else:
                self.matrices[task].update(predicted[task], true[task])

    def _count_parts(self, true: dict[str, torch.Tensor], predicted: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the pixels of each part that are right, labelled, and predicted, of objects with labelled parts."""
        in_objects = torch.where(true["object"] == _NOT_LABELLED["object"], 0, true["part"])
        labelled = self._channels("labels['part']", true["object"], in_objects)
        found = self._channels("predictions.parts", predicted["object"], predicted["part"])
        channels = len(self._object_of)
        counts = torch.stack(
            [values.bincount(minlength=channels) for values in (labelled[labelled == found], labelled, found)]
        )
        counts[:, _NO_PART] = 0
        measured = self._object_of[counts[1] > 0]
        return counts * torch.isin(self._object_of, measured)

    def _channels(self, name: str, objects: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
        """Return the channel of each pixel's part, (pixels,), `_NO_PART` for none or "other"."""
        channels = self._channel_of[objects, parts]
        if len(wrong := (channels == _FOREIGN_PART).nonzero()):
            row, column = wrong[0].tolist()
            part, number = int(parts[row, column]), int(objects[row, column])
            raise ValueError(
                f"{name} is {part} ({self._name('part', part)}) at row {row}, column {column}, where the object is "
                f"{number} ({self._name('object', number)}), which has no such part; object_parts lists its parts"
            )
        return channels.flatten()

    def _name(self, task: str, number: int) -> str:
        return class_name(dict(enumerate(self.labels[task])), number)

    def _map(self, name: str, values: Any, task: str) -> torch.Tensor:
        """Return a label map as int64 on the device of the counts.

        Raises:
            ValueError: it is no (H, W) map of integers, or has a value that is no class.
        """
        if not isinstance(values, torch.Tensor):
            values = np.asarray(values)
        if not (values.dtype.kind in "iu" if isinstance(values, np.ndarray) else _is_integer(values.dtype)):
            raise ValueError(f"{name} is of {values.dtype}; give integers")
        values = as_tensor(values)
        if values.ndim != 2 or not values.numel():
            raise ValueError(f"{name} is {format_size(values.shape) or 'a number'}; give the map (H, W) of one image")
        values = values.to(self.part_counts.device, torch.int64)
        classes = len(self.labels[task])
        if len(wrong := ((values < 0) | (values >= classes)).nonzero()):
            row, column = wrong[0].tolist()
            value = int(values[row, column])
            raise ValueError(
                f"{name} is {value} at row {row}, column {column}, but the classes of {task!r} are 0 to {classes - 1}"
            )
        return values

    def _number(self, name: str, value: Any, task: str, lowest: int = -1) -> torch.Tensor:
        """Return an image's number as an int64 tensor on the device of the counts.

        Raises:
            ValueError: it is no integer, or no class.
        """
        try:
            number = operator.index(value)
        except TypeError:
            raise ValueError(f"{name} is {shown(value)}; give the number of the image's class") from None
        classes = len(self.labels[task])
        if not lowest <= number < classes:
            raise ValueError(f"{name} is {number}, but the classes of {task!r} are 0 to {classes - 1}")
        return torch.tensor(number, device=self.part_counts.device)

    @property
    def part_iou(self) -> dict[int, NDArray[np.float64]]:
        """Of each object, the intersection over union of its parts, in the order of `object_parts`.

        NaN for a part that is neither labelled nor predicted in the images that count.
        """
        right, labelled, found = self.part_counts.cpu().numpy()
        with np.errstate(invalid="ignore"):
            iou = np.true_divide(right, labelled + found - right)
        return {number: iou[span.start + 1 : span.stop] for number, span in self._slices.items()}

    @property
    def part_accuracy(self) -> dict[int, float]:
        """Of each object, the share of its pixels with a labelled part that is right; NaN without such pixels."""
        right, labelled, _ = self.part_counts.cpu().numpy()
        result = {}
        for number, span in self._slices.items():
            pixels = int(labelled[span].sum())
            result[number] = int(right[span].sum()) / pixels if pixels else math.nan
        return result

    def measures(self) -> dict[str, float]:
        """Return the measures by name, from 0 to 1; NaN for a task without a labelled image or pixel.

        `object_mean_iou`, `part_mean_iou` and `material_mean_iou` are the official code's: plain means over all
        classes, in which a class that is neither labelled nor predicted is 0. The measures whose names end in
        `_occurring` leave out such classes. The others are `scene_top1`, `object_pixel_accuracy`, `part_accuracy`,
        `material_pixel_accuracy` and `texture_top1`.
        """
        result = {}
        for task in self.labels:
            if task in ("scene", "texture"):
                result[f"{task}_top1"] = self.matrices[task].pixel_accuracy
            elif task == "part":
                accuracy = {number: value for number, value in self.part_accuracy.items() if not math.isnan(value)}
                ious = [self.part_iou[number] for number in accuracy]
                result["part_mean_iou"] = _mean([float(np.nan_to_num(iou).mean()) for iou in ious])
                result["part_mean_iou_occurring"] = _mean([float(np.nanmean(iou)) for iou in ious])
                result["part_accuracy"] = _mean(list(accuracy.values()))
            else:
                matrix = self.matrices[task]
                iou = matrix.iou[1:].tolist() if matrix.pixels.any() else []
                result[f"{task}_mean_iou"] = _mean([0.0 if math.isnan(value) else value for value in iou])
                result[f"{task}_mean_iou_occurring"] = _mean([value for value in iou if not math.isnan(value)])
                result[f"{task}_pixel_accuracy"] = matrix.pixel_accuracy
        return result

    def to_dict(self) -> dict[str, Any]:
        """Return `measures()`, and for each task a list of its classes with their measures, as JSON types.

        NaN becomes None. Parts are listed by their objects, of the objects that have parts.
        """
        classes: dict[str, list[dict[str, Any]]] = {}
        for task, matrix in self.matrices.items():
            counted = "images" if task in ("scene", "texture") else "pixels"
            columns = zip(matrix.iou.tolist(), matrix.accuracy.tolist(), matrix.pixels.tolist(), strict=True)
            classes[task] = [
                {
                    "id": number,
                    "name": self._name(task, number),
                    **({"iou": json_number(iou)} if counted == "pixels" else {}),
                    "accuracy": json_number(accuracy),
                    counted: count,
                }
                for number, (iou, accuracy, count) in enumerate(columns)
                if counted == "images" or number != 0
            ]
        labelled, ious, accuracies = self.part_counts[1].tolist(), self.part_iou, self.part_accuracy
        if "part" in self.labels:
            classes["part"] = [
                {
                    "object": number,
                    "name": self._name("object", number),
                    "accuracy": json_number(accuracies[number]),
                    "parts": [
                        {"id": part, "name": self._name("part", part), "iou": json_number(iou), "pixels": pixels}
                        for part, iou, pixels in zip(
                            self.object_parts[number],
                            ious[number].tolist(),
                            labelled[span.start + 1 : span.stop],
                            strict=True,
                        )
                    ],
                }
                for number, span in self._slices.items()
            ]
        return {
            "measures": {name: json_number(value) for name, value in self.measures().items()},
            "classes": {task: classes[task] for task in self.labels},
        }


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan

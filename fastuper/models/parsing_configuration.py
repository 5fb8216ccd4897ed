"""`UnifiedPerceptualParsingConfig`: the tasks, their classes, each object's parts, and the network."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from fastuper.data.parsing_labels import TASKS, default_labels, default_object_parts, known_tasks
from fastuper.io.bounds import Bound, check_bounds, plain
from fastuper.io.messages import shown
from fastuper.models.backbones.registry import PRESETS
from fastuper.models.configuration import as_list
from fastuper.models.pyramid_configuration import PyramidConfig, as_dict
from fastuper.models.upernet_configuration import OPTIONS

POOLINGS = ("precise_roi", "adaptive")
"""The poolings of the pyramid pooling module; the official code has the first."""

LOSS_WEIGHTS = {"scene": 0.25, "object": 1.0, "part": 0.5, "material": 1.0, "texture": 1.0}
"""The weights of the tasks' losses: the official code's, which has no texture loss, and 1 for textures."""

WEIGHT = Bound(kind=float, at_least=0, at_most=1000)


class UnifiedPerceptualParsingConfig(PyramidConfig):
    """Unified Perceptual Parsing (https://arxiv.org/abs/1807.10221): a backbone, and a head a task on one pyramid.

    The defaults are those of the official code (CSAILVision/unifiedparsing): the network, the classes, the weights of
    the losses. Textures are not in the official code.

    Args:
        backbone_config: the backbone's configuration, ours or Transformers', or its dictionary; it returns four maps.
            The official ResNet-50 with a stem of three convolutions if None.
        hidden_size: channels of every level of the pyramid and of the heads' 3x3 convolutions.
        pool_channels: channels of each branch of the pyramid pooling module.
        pool_scales: sides of the grids of the pyramid pooling module.
        pooling: "precise_roi", the official Precise RoI Pooling (https://arxiv.org/abs/1807.11590) over the whole map,
            or "adaptive", the average that `UperNetForSemanticSegmentation` takes.
        resample_first: True if a pooled map is resampled to the size of its level before its convolution, BatchNorm
            and ReLU, as in the official code; False to resample it after them, as in
            `UperNetForSemanticSegmentation`.
        tasks: the tasks that the network has a head for, of "scene", "object", "part", "material" and "texture".
        labels: {task: names of its classes, in order}. A task that is left out has the official names. Class 0 of
            object, part and material means that a pixel has no label. Names of parts need names of objects.
        object_parts: {object: its parts}, by their numbers; keys may be strings, as in JSON. The order of an object's
            parts is that of its channels. If None, the official parts of the official objects.
        texture_channels: channels of the texture head's convolutions.
        loss_weights: {task: weight of its loss}; `LOSS_WEIGHTS` for a task that is left out.
        initializer_range: standard deviation of the initial weights of linear layers that a subclass adds. The
            initial values of convolutions do not depend on it.
        **extra: see `Config`. `id2label` and `num_labels` follow from `labels`.

    Raises:
        ValueError: arguments contradict each other, or a task, a pooling, an object or a part is unknown.
    """

    model_type = "unified_perceptual_parsing"

    def __init__(
        self,
        backbone_config: Any = None,
        hidden_size: int = 512,
        pool_channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        pooling: str = "precise_roi",
        resample_first: bool = True,
        tasks: Sequence[str] = TASKS,
        labels: Mapping[str, Sequence[str]] | None = None,
        object_parts: Mapping[Any, Sequence[int]] | None = None,
        texture_channels: int = 512,
        loss_weights: Mapping[str, float] | None = None,
        initializer_range: float = 0.02,
        **extra: Any,
    ):
        self.tasks = tasks
        given = _by_task("labels", labels)
        if object_parts is None:
            object_parts = {}
            if "part" in self.tasks:
                if custom := [task for task in ("object", "part") if given.get(task) not in (None, _official(task))]:
                    raise ValueError(
                        f"labels has its own names of {custom[0]}s: give object_parts, the parts of each object, or "
                        "leave 'part' out of tasks"
                    )
                object_parts = default_object_parts()
        if "part" in given and "object" not in given:
            raise ValueError("labels has names of parts, but none of objects, which parts belong to; give 'object' too")
        needed = {*self.tasks, *given, *(("object", "part") if object_parts or "part" in self.tasks else ())}
        self.labels = {**{task: _official(task) for task in needed}, **given}
        self.object_parts = object_parts
        if extra.get("num_labels") is None:
            extra["num_labels"] = self.num_labels
        super().__init__(**extra)
        self.hidden_size = hidden_size
        self.pool_channels = pool_channels
        self.pool_scales = as_list(pool_scales)
        self.pooling = pooling
        self.resample_first = resample_first
        self.texture_channels = texture_channels
        self.loss_weights = {**LOSS_WEIGHTS, **_by_task("loss_weights", loss_weights)}
        self.initializer_range = initializer_range
        self.check()
        self.backbone_config = PRESETS["resnet-50-deep-stem"]() if backbone_config is None else backbone_config

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], return_unused_kwargs: bool = False, **overrides: Any) -> Any:
        """Return a configuration with the values of a config.json; see `Config.from_dict`.

        `labels` among the overrides replaces the names of its tasks; other tasks keep theirs. With names of objects or
        parts, `object_parts` of `values` is left out: give it too.
        """
        given = overrides.get("labels")
        if isinstance(given, Mapping):
            overrides["labels"] = {**_by_task("labels", values.get("labels")), **given}
            if not given.keys().isdisjoint(("object", "part")):
                overrides.setdefault("object_parts", None)
        return super().from_dict(values, return_unused_kwargs, **overrides)

    def check(self) -> None:
        """Check all values; see `Config.check`."""
        _check_tables(self.tasks, self.labels, self.object_parts)
        super().check()
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling={shown(self.pooling)} is not known; known are {', '.join(POOLINGS)}")
        for name, default in OPTIONS.items():
            if getattr(self, name, default) != default:
                raise ValueError(f"{name} is an option of UperNetConfig, and no model with parsing heads has it")
        weights = _by_task("loss_weights", self.loss_weights)
        for task in {*self.tasks, *weights}:
            WEIGHT.check(f"loss_weights[{task!r}]", weights.get(task))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that the network has a head for, in the order of `TASKS`, in which they are kept."""
        return self._tasks

    @tasks.setter
    def tasks(self, tasks: Sequence[str]) -> None:
        self._tasks = known_tasks(tasks, TASKS)

    @property
    def labels(self) -> dict[str, list[str]]:
        """The names of the classes of each task."""
        return self._labels

    @labels.setter
    def labels(self, labels: Mapping[str, Sequence[str]]) -> None:
        given = _by_task("labels", labels)
        self._labels = {task: as_list(given[task]) for task in TASKS if task in given}

    @property
    def object_parts(self) -> dict[int, tuple[int, ...]]:
        """The parts of each object that has parts, by their numbers, objects in ascending order."""
        return self._object_parts

    @object_parts.setter
    def object_parts(self, object_parts: Mapping[Any, Sequence[int]]) -> None:
        self._object_parts = _as_object_parts(object_parts)

    @property
    def part_slices(self) -> dict[int, slice]:
        """The channels of each object in the logits of parts: one for "other", then one for each of its parts."""
        slices, start = {}, 0
        for number, parts in self.object_parts.items():
            slices[number] = slice(start, start + 1 + len(parts))
            start += 1 + len(parts)
        return slices

    def num_channels_of(self, task: str) -> int:
        """Return the channels of a task's logits: its classes, or for parts the channels of all objects.

        Raises:
            ValueError: the task is unknown, or has no names in `labels`.
        """
        known_tasks([task], tuple(self.labels))
        if task == "part":
            return sum(1 + len(parts) for parts in self.object_parts.values())
        return len(self.labels[task])

    @property
    def id2label(self) -> dict[int, str]:
        """The names of the objects by their numbers; of the first of `tasks` where there are no objects."""
        task = "object" if "object" in self.tasks else self.tasks[0]
        return dict(enumerate(self.labels[task]))

    @id2label.setter
    def id2label(self, names: Mapping[int, str]) -> None:
        if dict(names) != self.id2label:
            raise ValueError("the names of this model's classes are in labels, by task: give labels= and no id2label")

    @property
    def label2id(self) -> dict[str, int]:
        """The numbers of the names in `id2label`."""
        return {name: number for number, name in self.id2label.items()}

    @label2id.setter
    def label2id(self, numbers: Mapping[str, int]) -> None:
        if dict(numbers) != self.label2id:
            raise ValueError("the names of this model's classes are in labels, by task: give labels= and no label2id")

    @property
    def num_labels(self) -> int:
        """The number of names in `id2label`."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, number: int) -> None:
        if number != self.num_labels:
            raise ValueError("the numbers of this model's classes are those of labels: give labels= and no num_labels")

    def to_dict(self) -> dict[str, Any]:
        """Return all values, in types that JSON supports."""
        values = super().to_dict()
        for name in ("id2label", "label2id"):
            values.pop(name, None)
        values["tasks"] = list(self.tasks)
        values["labels"] = copy.deepcopy(self.labels)
        values["object_parts"] = {str(number): list(parts) for number, parts in self.object_parts.items()}
        return values


def parsing_config_from(config: Any) -> UnifiedPerceptualParsingConfig:
    """Return the given configuration itself, or a configuration with the values of a dictionary.

    Raises:
        TypeError: `config` is not a configuration of Unified Perceptual Parsing.
        ValueError: a value is out of its bounds.
    """
    if isinstance(config, UnifiedPerceptualParsingConfig):
        config.check()  # attributes may have been set since the configuration was made
        return config
    values = as_dict(config)
    own = UnifiedPerceptualParsingConfig.model_type
    if values is None or values.get("model_type", own) != own:
        raise TypeError(f"expected a UnifiedPerceptualParsingConfig or its dictionary, got {type(config).__name__}")
    return UnifiedPerceptualParsingConfig.from_dict(values)


def _official(task: str) -> list[str]:
    return default_labels()[task]


def _by_task(name: str, values: Any) -> dict[str, Any]:
    """Return a mapping from tasks to values, {} for None.

    Raises:
        ValueError: it is no mapping, or a key is no task.
    """
    if not isinstance(values, Mapping | None):
        raise ValueError(f"{name} must map tasks to values, got {shown(values)}")
    for task in values or ():
        if task not in TASKS:
            raise ValueError(f"{name} has {shown(task)}, which is no task; tasks are {', '.join(TASKS)}")
    return {task: plain(value) for task, value in (values or {}).items()}


def _as_object_parts(values: Any) -> dict[int, tuple[int, ...]]:
    """Return the parts of each object by its number, ascending.

    Raises:
        ValueError: `values` does not map numbers of objects to lists of numbers of parts, each once.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"object_parts must map objects to their parts, got {shown(values)}")
    parts: dict[int, tuple[int, ...]] = {}
    for key, numbers in values.items():
        key = plain(key)
        number = int(key) if isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 10 else key
        if not _is_number(number) or number in parts:
            raise ValueError(f"object_parts must map numbers of objects, each once, to their parts, got {shown(key)}")
        items = as_list(plain(numbers))
        if not isinstance(items, list) or not items or not all(map(_is_number, items)):
            raise ValueError(f"object_parts[{number}] must be a list of numbers of parts, got {shown(numbers)}")
        parts[number] = tuple(items)
    return dict(sorted(parts.items()))


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_tables(tasks: Sequence[str], labels: Mapping[str, Any], object_parts: Mapping[int, Sequence[int]]) -> None:
    """Check that each task has names, and that objects and parts are in their tables.

    Raises:
        ValueError: the message names the task, the object or the part.
    """
    for task, names in labels.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"labels[{task!r}] must be a list of names, got {shown(names)}")
        if len(names) < 2:
            raise ValueError(f"labels[{task!r}] must have at least two names, got {shown(names)}")
        check_bounds({"num_labels": len(names)})
    needed = [*tasks, *(("object", "part") if "part" in tasks or object_parts else ())]
    for task in needed:
        if task not in labels:
            other = ": parts belong to objects" if task not in tasks else ""
            raise ValueError(f"labels has no names of the task {task!r}{other}")
    if "part" in tasks and not object_parts:
        raise ValueError("object_parts is empty, so that the task 'part' has no classes; give parts, or leave it out")
    for number, parts in object_parts.items():
        last, last_part = len(labels["object"]) - 1, len(labels["part"]) - 1
        if not 1 <= number <= last:
            raise ValueError(f"object_parts has object {shown(number)}; the objects of labels are 1 to {last}")
        name = labels["object"][number]
        for part in parts:
            if not 1 <= part <= last_part:
                raise ValueError(
                    f"object_parts[{number}] ({shown(name)}) has part {shown(part)}; the parts of labels are 1 to "
                    f"{last_part}"
                )
        if twice := [part for part in parts if parts.count(part) > 1]:
            raise ValueError(f"object_parts[{number}] ({shown(name)}) has part {twice[0]} twice")

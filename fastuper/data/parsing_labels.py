"""The classes of Unified Perceptual Parsing: scenes, objects, parts, materials and textures of Broden+.

The names, their numbers and each object's parts are those of the official code (CSAILVision/unifiedparsing, MIT
license, `meta_file/joint_dataset`). Class 0 of object, part and material is "-", no class; scene and texture have no
such class.
"""

from __future__ import annotations

import json
from collections.abc import Sequence, Set
from functools import lru_cache
from importlib.resources import files
from typing import Any

from fastuper.io.bounds import plain
from fastuper.io.messages import shown

TASKS = ("scene", "object", "part", "material", "texture")
"""The tasks of Unified Perceptual Parsing, in the order of every table, configuration and output."""

WITH_BACKGROUND = ("object", "part", "material")
"""The tasks whose class 0 means that a pixel has no label."""


@lru_cache(maxsize=1)
def _tables() -> tuple[dict[str, list[str]], dict[int, tuple[int, ...]]]:
    content = json.loads(files(__package__).joinpath("parsing_labels.json").read_text(encoding="utf-8"))
    parts = {int(number): tuple(numbers) for number, numbers in content["object_parts"].items()}
    return {task: content["labels"][task] for task in TASKS}, parts


def default_labels() -> dict[str, list[str]]:
    """Return the names of each task's classes, in order: 365 scenes, 336 objects, 153 parts, 26 materials, 47 textures.

    The counts of objects, parts and materials include class 0, "-". Each call returns new lists.
    """
    return {task: list(names) for task, names in _tables()[0].items()}


def default_object_parts() -> dict[int, tuple[int, ...]]:
    """Return the parts of each of the 77 objects that have parts: object number to part numbers, both ascending.

    The order is that of the part head's channels: each object has one channel for "other", then one for each of its
    parts. 350 parts in all make 427 channels. Each call returns a new dictionary.
    """
    return dict(_tables()[1])


def known_tasks(tasks: Any, known: Sequence[str]) -> tuple[str, ...]:
    """Return tasks in the order of `known`.

    Args:
        tasks: their names.
        known: the tasks that there are.

    Raises:
        ValueError: `tasks` is no list of names, is empty, or has a name that is not known or is there twice.
    """
    tasks = plain(tasks)
    if isinstance(tasks, str) or not isinstance(tasks, Sequence | Set) or not tasks:
        raise ValueError(f"tasks must be a list of one or more of {', '.join(known)}, got {shown(tasks)}")
    names = list(tasks)
    for name in names:
        if name not in known:
            raise ValueError(f"task {shown(name)} is not known; known are {', '.join(known)}")
        if names.count(name) > 1:
            raise ValueError(f"task {shown(name)} is named twice")
    return tuple(task for task in known if task in names)

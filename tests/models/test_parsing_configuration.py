"""The configuration of Unified Perceptual Parsing: defaults, checks, config.json."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import numpy as np
import pytest

from fastuper import ConvNextConfig, UnifiedPerceptualParsingConfig, UperNetConfig
from fastuper.data.parsing_labels import TASKS, default_labels, default_object_parts
from fastuper.models.backbones.layers import STAGES

LABELS = {
    "scene": ["street", "room"],
    "object": ["-", "wall", "person", "car", "door"],
    "part": ["-", "head", "leg", "wheel", "knob"],
    "material": ["-", "wood", "skin", "metal"],
    "texture": ["dotted", "striped"],
}
PARTS = {3: (3, 4), 2: (1, 2)}


def config(**values: Any) -> UnifiedPerceptualParsingConfig:
    values = {"backbone_config": ConvNextConfig(), "labels": LABELS, "object_parts": PARTS, **values}
    return UnifiedPerceptualParsingConfig(**values)


def test_the_defaults_are_the_official_ones():
    official = UnifiedPerceptualParsingConfig(ConvNextConfig())
    assert official.tasks == TASKS
    assert official.labels == default_labels()
    assert official.object_parts == default_object_parts()
    assert [official.num_channels_of(task) for task in TASKS] == [365, 336, 427, 26, 47]
    assert (official.hidden_size, official.pool_channels, official.texture_channels) == (512, 512, 512)
    assert (official.pooling, official.resample_first, official.pool_scales) == ("precise_roi", True, [1, 2, 3, 6])
    assert official.loss_weights == {"scene": 0.25, "object": 1, "part": 0.5, "material": 1, "texture": 1}
    assert official.num_labels == 336
    assert (official.id2label[1], official.label2id["person"]) == ("wall", 6)
    # First channels that the official code's hierarchy has.
    starts = {number: part.start for number, part in official.part_slices.items()}
    assert (starts[2], starts[5], starts[6], starts[70], starts[321]) == (0, 2, 26, 240, 425)
    assert official.part_slices[321].stop == 427


def test_the_default_backbone_is_the_official_resnet_50():
    backbone = UnifiedPerceptualParsingConfig().backbone_config
    assert (backbone.model_type, backbone.depths, backbone.out_features) == ("resnet_deep_stem", [3, 4, 6, 3], STAGES)


def test_a_backbone_without_a_selection_of_stages_returns_all():
    assert config().backbone_config.out_features == STAGES


def test_channels_follow_the_order_of_objects():
    assert config().object_parts == {2: (1, 2), 3: (3, 4)}
    assert list(config().part_slices.items()) == [(2, slice(0, 3)), (3, slice(3, 6))]
    assert config().num_channels_of("part") == 6


def test_tasks_have_one_order():
    assert config(tasks=["texture", "scene"]).tasks == ("scene", "texture")
    assert config(tasks={"part", "object"}).tasks == ("object", "part")
    assert config(tasks=["texture", "material"]).id2label == {0: "-", 1: "wood", 2: "skin", 3: "metal"}


def test_tables_that_are_left_out_are_official():
    own = UnifiedPerceptualParsingConfig(ConvNextConfig(), labels={"scene": ["a", "b"]})
    assert own.labels == {**default_labels(), "scene": ["a", "b"]}
    assert own.object_parts == default_object_parts()
    small = UnifiedPerceptualParsingConfig(ConvNextConfig(), tasks=["object"], labels={"object": ["-", "sky"]})
    assert (small.labels, small.object_parts) == ({"object": ["-", "sky"]}, {})
    only = UnifiedPerceptualParsingConfig(ConvNextConfig(), tasks=["part"])
    assert list(only.labels) == ["object", "part"]
    assert only.num_channels_of("part") == 427


def test_defaults_are_copies():
    first = UnifiedPerceptualParsingConfig(ConvNextConfig())
    first.labels["scene"].append("moon")
    first.loss_weights["scene"] = 3
    second = UnifiedPerceptualParsingConfig(ConvNextConfig())
    assert (len(second.labels["scene"]), second.loss_weights["scene"]) == (365, 0.25)


def through_json(given: UnifiedPerceptualParsingConfig) -> Any:
    return UnifiedPerceptualParsingConfig.from_dict(json.loads(given.to_json_string(use_diff=False)))


COPIES = {
    "json": through_json,
    "diff": lambda given: UnifiedPerceptualParsingConfig(**json.loads(given.to_json_string())),
    "dict": lambda given: UnifiedPerceptualParsingConfig.from_dict(given.to_dict()),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda given: pickle.loads(pickle.dumps(given)),
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_are_equal(way):
    given = config(tasks=TASKS[1:], pooling="adaptive", loss_weights={"part": 2}, note="kept")
    other = COPIES[way](given)
    assert type(other) is UnifiedPerceptualParsingConfig
    assert other == given
    assert other.object_parts == {2: (1, 2), 3: (3, 4)}
    assert other.tasks == TASKS[1:]
    assert (other.labels, other.id2label, other.note) == (given.labels, given.id2label, "kept")


def test_a_folder(tmp_path):
    given = config()
    given.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["object_parts"] == {"2": [1, 2], "3": [3, 4]}
    loaded = UnifiedPerceptualParsingConfig.from_pretrained(tmp_path)
    assert loaded.to_diff_dict() == given.to_diff_dict()
    changed = UnifiedPerceptualParsingConfig.from_pretrained(tmp_path, tasks=["scene"], hidden_size=8)
    assert (changed.tasks, changed.hidden_size, changed.labels) == (("scene",), 8, LABELS)
    with pytest.raises(ValueError, match="describes a 'unified_perceptual_parsing' model; UperNetConfig reads"):
        UperNetConfig.from_pretrained(tmp_path)
    UperNetConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="describes a 'upernet' model; UnifiedPerceptualParsingConfig reads"):
        UnifiedPerceptualParsingConfig.from_pretrained(tmp_path)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "task": ({"tasks": ["scene", "depth"]}, "task 'depth' is not known; known are scene, object, part, material, tex"),
    "no-tasks": ({"tasks": []}, r"tasks must be a list of one or more of scene, .*, got \[\]"),
    "task-as-text": ({"tasks": "scene"}, "tasks must be a list of .*, got 'scene'"),
    "task-twice": ({"tasks": ["scene", "scene"]}, "task 'scene' is named twice"),
    "table": ({"labels": {**LABELS, "depth": ["near"]}}, "labels has 'depth', which is no task; tasks are scene, "),
    "table-no-mapping": ({"labels": ["a"]}, r"labels must map tasks to values, got \['a'\]"),
    "table-no-list": ({"labels": {**LABELS, "scene": "sky"}}, r"labels\['scene'\] must be a list of names, got 'sky'"),
    "table-no-names": ({"labels": {**LABELS, "scene": [1, 2]}}, r"labels\['scene'\] must be a list of names"),
    "one-name": ({"labels": {**LABELS, "texture": ["x"]}}, r"labels\['texture'\] must have at least two names"),
    "too-many-names": ({"labels": {**LABELS, "texture": ["x"] * 65_537}}, "num_labels must be .* got 65537"),
    "parts-without-objects": (
        {"labels": {"part": LABELS["part"]}},
        "labels has names of parts, but none of objects, which parts belong to; give 'object' too",
    ),
    "objects-without-parts": ({"object_parts": None}, "labels has its own names of objects: give object_parts"),
    "no-parts": ({"object_parts": {}}, "object_parts is empty, so that the task 'part' has no classes"),
    "parts-no-mapping": ({"object_parts": [(1, 2)]}, "object_parts must map objects to their parts"),
    "object-unknown": ({"object_parts": {5: [1]}}, "object_parts has object 5; the objects of labels are 1 to 4"),
    "object-0": ({"object_parts": {0: [1]}}, "object_parts has object 0; the objects of labels are 1 to 4"),
    "object-by-name": ({"object_parts": {"car": [1]}}, "numbers of objects, each once, to their parts, got 'car'"),
    "object-twice": ({"object_parts": {"2": [1], 2: [2]}}, "numbers of objects, each once, to their parts, got 2"),
    "part-unknown": (
        {"object_parts": {2: [1, 9]}},
        r"object_parts\[2\] \('person'\) has part 9; the parts of labels are 1 to 4",
    ),
    "part-0": ({"object_parts": {2: [0, 1]}}, r"object_parts\[2\] \('person'\) has part 0"),
    "part-twice": ({"object_parts": {2: [1, 2, 1]}}, r"object_parts\[2\] \('person'\) has part 1 twice"),
    "part-no-list": ({"object_parts": {2: 1}}, r"object_parts\[2\] must be a list of numbers of parts, got 1"),
    "part-empty": ({"object_parts": {2: []}}, r"object_parts\[2\] must be a list of numbers of parts, got \[\]"),
    "part-by-name": ({"object_parts": {2: ["head"]}}, r"object_parts\[2\] must be a list of numbers of parts"),
    "pooling": ({"pooling": "max"}, "pooling='max' is not known; known are precise_roi, adaptive"),
    "resample-first": ({"resample_first": 2}, "resample_first must be true or false, got 2"),
    "weight-task": ({"loss_weights": {"depth": 1}}, "loss_weights has 'depth', which is no task"),
    "weight-negative": ({"loss_weights": {"part": -1}}, r"loss_weights\['part'\] must be .* at least 0 .*, got -1"),
    "weight-nan": ({"loss_weights": {"part": float("nan")}}, r"loss_weights\['part'\] must be .*, got nan"),
    "id2label": ({"id2label": {0: "a"}}, "labels, by task: give labels= and no id2label"),
    "num-labels": ({"num_labels": 2}, "those of labels: give labels= and no num_labels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    values, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as caught:
        config(**values)
    assert "\n" not in str(caught.value)


def test_values_that_are_set_later_are_checked():
    changed = config()
    del changed.labels["object"]
    with pytest.raises(ValueError, match="labels has no names of the task 'object'"):
        changed.check()
    changed = config(tasks=["part"])
    del changed.labels["object"]
    with pytest.raises(ValueError, match="labels has no names of the task 'object': parts belong to objects"):
        changed.check()
    changed = config()
    changed.labels["object"].pop()
    changed.labels["object"].pop()
    with pytest.raises(ValueError, match="object_parts has object 3; the objects of labels are 1 to 2"):
        changed.check()
    changed.object_parts = {"2": [2]}
    assert changed.object_parts == {2: (2,)}
    changed.check()
    with pytest.raises(ValueError, match="task 'depth' is not known"):
        changed.tasks = ["depth"]
    assert changed.tasks == TASKS


def test_a_task_without_names_has_no_channels():
    with pytest.raises(ValueError, match="task 'scene' is not known; known are object"):
        UnifiedPerceptualParsingConfig(ConvNextConfig(), tasks=["object"]).num_channels_of("scene")


def test_values_of_numpy():
    own = config(
        tasks=np.array(["part", "object"]),
        labels={task: np.array(names) for task, names in LABELS.items()},
        object_parts={np.int64(number): np.array(parts) for number, parts in PARTS.items()},
        loss_weights={"part": np.float64(2)},
    )
    assert json.dumps(own.to_dict()) == json.dumps(
        config(tasks=["object", "part"], loss_weights={"part": 2.0}).to_dict()
    )
    assert config(tasks=LABELS.keys()).tasks == TASKS


def test_other_labels_for_a_saved_configuration():
    """Tasks that are not named keep their names; parts belong to objects, so that other objects need them anew."""
    saved = config().to_dict()
    scenes = UnifiedPerceptualParsingConfig.from_dict(saved, labels={"scene": ["field", "sea"]})
    assert scenes.labels == {**LABELS, "scene": ["field", "sea"]}
    assert scenes.object_parts == PARTS
    objects = UnifiedPerceptualParsingConfig.from_dict(saved, labels={"object": ["-", "cup"]}, tasks=["object"])
    assert (objects.labels["object"], objects.object_parts) == (["-", "cup"], {})
    with pytest.raises(ValueError, match="labels has its own names of objects: give object_parts"):
        UnifiedPerceptualParsingConfig.from_dict(saved, labels={"object": LABELS["object"]})
    with pytest.raises(ValueError, match=r"labels must map tasks to values, got \['cup'\]"):
        UnifiedPerceptualParsingConfig.from_dict(saved, labels=["cup"])

"""`ParsingMetrics` against the official evaluation stated again, and by hand."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import pytest
import torch

from fastuper.evaluation import ParsingMetrics
from fastuper.models.outputs import Parsing
from fastuper.models.parsing_configuration import UnifiedPerceptualParsingConfig
from tests.parity.parsing_reference import reference_metrics

CLASSES = {"scene": 4, "object": 7, "part": 6, "material": 5, "texture": 3}
OBJECT_PARTS = {1: (2, 3), 3: (1,), 4: (1, 2, 5)}  # objects 2, 5 and 6 have no parts, part 4 has no object


def small_config(**values: Any) -> UnifiedPerceptualParsingConfig:
    labels = {task: [f"{task} {index}" for index in range(count)] for task, count in CLASSES.items()}
    return UnifiedPerceptualParsingConfig(labels=labels, object_parts=OBJECT_PARTS, **values)


def maps(generator: np.random.Generator, size: tuple[int, int], objects: list[int]) -> dict[str, Any]:
    """Return random objects, parts that belong to them, materials and textures."""
    found = {"object": generator.choice(objects, size)}
    found["part"] = np.zeros(size, np.int64)
    for number, parts in OBJECT_PARTS.items():
        inside = found["object"] == number
        found["part"][inside] = generator.choice([0, *parts], size)[inside]
    found["material"] = generator.integers(CLASSES["material"], size=size)
    found["texture"] = generator.integers(CLASSES["texture"], size=size)
    return found


def as_parsing(found: dict[str, Any]) -> Parsing:
    return Parsing(
        scene=None if "scene" not in found else [(found["scene"], 0.6), (0, 0.4)],
        objects=found.get("object"),
        parts=found.get("part"),
        materials=found.get("material"),
        textures=found.get("texture"),
    )


def random_samples(seed: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return (predictions, truth) of images: some tasks unlabelled, some objects in no image or without parts."""
    generator = np.random.default_rng(seed)
    samples = []
    for index in range(6):
        size = tuple(generator.integers(1, 9, 2))
        objects = [[0, 1, 2, 3, 5], [0], [2, 5], [0, 1, 4], [1, 3, 4], list(range(6))][index]
        predicted, true = maps(generator, size, list(range(7))), maps(generator, size, objects)
        if generator.random() < 0.5:  # object 1 is labelled, its parts are not
            true["part"][true["object"] == 1] = 0
        predicted["scene"], true["scene"] = int(generator.integers(4)), int(generator.integers(-1, 4))
        left_out = ([], ["material"], ["scene"], ["part"], ["object", "part"], ["object", "part", "scene"])
        for task in ["texture", *left_out[generator.integers(6)]]:
            del true[task]
        samples.append((predicted, true))
    return samples


@pytest.mark.parametrize("seed", range(20))
def test_equal_to_the_official_evaluation(seed: int) -> None:
    samples = random_samples(seed)
    metrics = ParsingMetrics(small_config())
    for index, (predicted, true) in enumerate(samples):
        as_tensors = {task: torch.from_numpy(values) for task, values in predicted.items() if task != "scene"}
        given = {**predicted, **as_tensors} if index % 2 else predicted
        metrics.update(as_parsing(given), true)
    found, expected = metrics.measures(), reference_metrics(samples, CLASSES, OBJECT_PARTS)
    names = {
        "object mIoU": "object_mean_iou",
        "object accuracy": "object_pixel_accuracy",
        "part mIoU": "part_mean_iou",
        "part accuracy": "part_accuracy",
        "material mIoU": "material_mean_iou",
        "material accuracy": "material_pixel_accuracy",
        "scene top-1": "scene_top1",
    }
    assert set(names) == set(expected)
    for name, value in expected.items():
        assert found[names[name]] == pytest.approx(value, abs=1e-7, nan_ok=True), name


def test_by_hand() -> None:
    """Object 4 is predicted beyond its border, object 1 has no labelled part, object 3 is predicted where it is not."""
    metrics = ParsingMetrics(small_config())
    true = {
        "object": np.array([[4, 4, 4, 4, 1, 0]]),
        "part": np.array([[1, 1, 2, 0, 0, 0]]),
        "texture": 2,
    }
    predicted = {
        "object": np.array([[4, 3, 4, 4, 4, 4]]),
        "part": np.array([[1, 1, 2, 2, 1, 5]]),
        "texture": np.array([[2, 2, 1, 2, 1, 1]]),  # 1 and 2 are equally frequent: the first counts
    }
    metrics.update(as_parsing(predicted), true)
    # Part 1: right 1 of 2 labelled and 2 predicted (one of them on object 1). Part 2: right 1 of 1 labelled and 2
    # predicted. Part 5: predicted once.
    assert metrics.part_iou[4].tolist() == [1 / 3, 1 / 2, 0]
    assert np.isnan(metrics.part_iou[1]).all()
    assert np.isnan(metrics.part_iou[3]).all()
    assert metrics.part_accuracy[4] == 2 / 3
    found = metrics.measures()
    assert found["part_mean_iou"] == found["part_mean_iou_occurring"] == pytest.approx((1 / 3 + 1 / 2) / 3)
    # Objects: 1: 0 of 1. 3: 0, predicted once. 4: 3 of 5. Classes 2, 5 and 6 do not occur; the label 0 counts nowhere.
    assert found["object_mean_iou"] == pytest.approx(3 / 5 / 6)
    assert found["object_mean_iou_occurring"] == pytest.approx(3 / 5 / 3)
    assert found["object_pixel_accuracy"] == 3 / 5
    assert found["texture_top1"] == 0
    metrics.update(as_parsing(predicted), {"texture": 1})
    assert metrics.measures()["texture_top1"] == 1 / 2


def test_nothing_labelled_is_nan_and_null() -> None:
    metrics = ParsingMetrics(small_config())
    nothing = {"object": np.zeros((2, 3), int), "part": np.zeros((2, 3), int), "scene": -1, "texture": -1}
    predicted = maps(np.random.default_rng(0), (2, 3), [0, 1, 4])
    metrics.update(as_parsing({**predicted, "scene": 1}), nothing)
    assert all(math.isnan(value) for value in metrics.measures().values())
    assert set(json.loads(json.dumps(metrics.to_dict(), allow_nan=False))["measures"].values()) == {None}


def test_counts_of_several_processes_add_up() -> None:
    config, samples = small_config(), random_samples(0)
    whole, shares = ParsingMetrics(config), [ParsingMetrics(config), ParsingMetrics(config)]
    for index, (predicted, true) in enumerate(samples):
        whole.update(as_parsing(predicted), true)
        shares[index % 2].update(as_parsing(predicted), true)
    shares[0].part_counts += shares[1].part_counts
    for task, matrix in shares[0].matrices.items():
        matrix.matrix += shares[1].matrices[task].matrix
    assert whole.part_counts.sum() > 0
    assert json.dumps(shares[0].to_dict()) == json.dumps(whole.to_dict())


def test_dictionary_names_each_class() -> None:
    metrics = ParsingMetrics(small_config())
    for predicted, true in random_samples(1):
        metrics.update(as_parsing(predicted), true)
    classes = metrics.to_dict()["classes"]
    assert [row["name"] for row in classes["object"]] == [f"object {index}" for index in range(1, 7)]
    assert [row["name"] for row in classes["scene"]] == [f"scene {index}" for index in range(4)]
    assert set(classes["scene"][0]) == {"id", "name", "accuracy", "images"}
    assert set(classes["material"][0]) == {"id", "name", "iou", "accuracy", "pixels"}
    named = {row["name"]: [part["name"] for part in row["parts"]] for row in classes["part"]}
    assert named == {
        "object 1": ["part 2", "part 3"],
        "object 3": ["part 1"],
        "object 4": ["part 1", "part 2", "part 5"],
    }
    for row in classes["part"]:
        assert [part["iou"] for part in row["parts"]] == [
            None if math.isnan(iou) else iou for iou in metrics.part_iou[row["object"]]
        ]


def test_tasks_of_the_model_only() -> None:
    metrics = ParsingMetrics(UnifiedPerceptualParsingConfig(tasks=("scene", "material")))
    assert set(metrics.measures()) == {
        "scene_top1",
        "material_mean_iou",
        "material_mean_iou_occurring",
        "material_pixel_accuracy",
    }
    with pytest.raises(ValueError, match=r"labels has 'object'; the model's tasks are scene, material"):
        metrics.update(as_parsing({}), {"object": np.zeros((1, 1), int)})


def _map(*rows: list[int]) -> Any:
    return np.array(rows)


@pytest.mark.parametrize(
    ("predicted", "labels", "message"),
    [
        ({}, {"colour": 1}, "labels has 'colour'; the model's tasks are scene, object, part, material, texture"),
        ({}, {"part": _map([0])}, "labels has 'part' without 'object'"),
        ({}, {"material": _map([0])}, "predictions.materials is None, but labels['material'] is given"),
        ({"material": _map([0])}, {"material": _map([0, 5])}, "labels['material'] is 5 at row 0, column 1"),
        ({"object": _map([1], [-1])}, {"object": _map([0], [1])}, "predictions.objects is -1 at row 1, column 0"),
        ({"object": _map([1])}, {"object": _map([0, 1])}, "predictions.objects is 1 x 1, labels['object'] 1 x 2"),
        ({"object": _map([1])}, {"object": np.zeros((1, 1, 1), int)}, "labels['object'] is 1 x 1 x 1; give the map"),
        ({"object": _map([1])}, {"object": np.zeros((1, 1))}, "labels['object'] is of float64; give integers"),
        ({"object": _map([1])}, {"object": torch.zeros(1, 1)}, "labels['object'] is of torch.float32; give integers"),
        (
            {"object": _map([1, 1]), "part": _map([2, 0])},
            {"object": _map([1, 4]), "part": _map([2, 3])},
            "labels['part'] is 3 (part 3) at row 0, column 1, where the object is 4 (object 4), which has no such part",
        ),
        (
            {"object": _map([1, 2]), "part": _map([2, 1])},
            {"object": _map([1, 0]), "part": _map([2, 3])},
            "predictions.parts is 1 (part 1) at row 0, column 1, where the object is 2 (object 2), which has no such",
        ),
        (
            {"object": _map([1, 1]), "part": _map([2])},
            {"object": _map([1, 4]), "part": _map([2])},
            "labels['object'] is 1 x 2, labels['part'] 1 x 1: they must agree",
        ),
        ({"scene": 0}, {"scene": 4}, "labels['scene'] is 4, but the classes of 'scene' are 0 to 3"),
        ({"scene": -1}, {"scene": 1}, "predictions.scene is -1, but the classes of 'scene' are 0 to 3"),
        ({"scene": 0}, {"scene": "beach"}, "labels['scene'] is 'beach'; give the number of the image's class"),
        ({"texture": _map([3])}, {"texture": 1}, "predictions.textures is 3 at row 0, column 0"),
    ],
)
def test_bad_input_is_named_and_counts_nothing(predicted: dict[str, Any], labels: dict[str, Any], message: str) -> None:
    metrics = ParsingMetrics(small_config())
    good = {"scene": 1} if "scene" not in labels else {}
    with pytest.raises(ValueError, match=re.escape(message)):
        metrics.update(as_parsing({"scene": 1, **predicted}), {**good, **labels})
    assert not metrics.part_counts.any()
    assert not any(matrix.matrix.any() for matrix in metrics.matrices.values())

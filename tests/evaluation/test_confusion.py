"""The confusion matrix and its means, against numpy arithmetic after Hugging Face `evaluate`'s mean_iou; reports."""

from __future__ import annotations

import csv
import json
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastuper.data.classes import ade20k_names
from fastuper.evaluation import report
from fastuper.evaluation.confusion import ConfusionMatrix

RANDOM = np.random.default_rng(0)


def areas(prediction: np.ndarray, label: np.ndarray, num_labels: int, ignore_index: int) -> list[np.ndarray]:
    """`evaluate`'s intersect_and_union, by histograms: each class's pixels in both, in the prediction, in the label."""
    mask = np.not_equal(label, ignore_index)
    prediction, label = prediction[mask], label[mask]
    intersection = prediction[prediction == label]
    edges = np.arange(num_labels + 1) - 0.5
    return [np.histogram(values, bins=edges)[0].astype(np.float64) for values in (intersection, prediction, label)]


def truth(
    predictions: list[np.ndarray], labels: list[np.ndarray], num_labels: int, ignore_index: int
) -> dict[str, np.ndarray]:
    """`evaluate`'s mean_iou, with one union of intersection, prediction and label."""
    pairs = zip(predictions, labels, strict=True)
    intersection, predicted, true = (
        sum(part) for part in zip(*(areas(p, t, num_labels, ignore_index) for p, t in pairs), strict=True)
    )
    with np.errstate(invalid="ignore"):
        iou = intersection / (predicted + true - intersection)
        accuracy = intersection / true
    return {
        "iou": iou,
        "accuracy": accuracy,
        "mean_iou": np.nanmean(iou),
        "mean_accuracy": np.nanmean(accuracy),
        "pixel_accuracy": intersection.sum() / true.sum(),
        "pixels": true,
    }


def label_maps(classes: list[int], ignore_index: int, count: int = 5) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Label maps of different sizes, mostly predicted right, in which a third of the pixels is ignored."""
    predictions, labels = [], []
    for _ in range(count):
        shape = tuple(RANDOM.integers(10, 40, 2))
        label = RANDOM.choice(classes, shape)
        prediction = np.where(RANDOM.random(shape) < 0.6, label, RANDOM.choice(classes, shape))
        label[RANDOM.random(shape) < 0.33] = ignore_index
        predictions.append(prediction)
        labels.append(label)
    return predictions, labels


@pytest.mark.parametrize("ignore_index", [255, -100, 3])
@pytest.mark.parametrize("kind", [torch.from_numpy, np.asarray])
def test_means_are_those_of_evaluate(ignore_index: int, kind: object) -> None:
    classes = [index for index in range(9) if index not in (3, 7)]  # classes 3 and 7 do not occur
    predictions, labels = label_maps(classes, ignore_index)
    matrix = ConfusionMatrix(9, ignore_index=ignore_index)
    for prediction, label in zip(predictions, labels, strict=True):
        matrix.update(kind(prediction), kind(label))
    expected = truth(predictions, labels, 9, ignore_index)
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(matrix, name), value, rtol=1e-14, err_msg=name)
    assert np.isnan(matrix.iou[7])
    assert matrix.matrix.dtype == torch.int64


def test_what_is_predicted_where_labels_are_ignored_counts_nowhere() -> None:
    label = np.array([[0, 0, 1, 255], [255, 1, 1, 0]])
    results = []
    for wrong in (0, 1, 2):
        matrix = ConfusionMatrix(3)
        matrix.update(np.where(label == 255, wrong, label), label)
        results.append(matrix.to_dict())
        assert matrix.mean_iou == matrix.mean_accuracy == matrix.pixel_accuracy == 1
        assert matrix.pixels.tolist() == [3, 3, 0]
    assert results[0] == results[1] == results[2]
    # Values that are no class count neither: some models predict the ignored label.
    matrix.update(np.full_like(label, 255), np.full_like(label, 255))
    assert matrix.to_dict() == results[2]


@pytest.mark.parametrize("ignored", [256, 300, -100, 65535])
def test_an_ignore_index_beyond_8_bits(ignored: int) -> None:
    labels = np.arange(200, dtype=np.uint8)
    matrix = ConfusionMatrix(200, ignore_index=ignored)
    matrix.update(labels, labels)
    assert matrix.pixels.tolist() == [1] * 200


def test_absent_classes_are_left_out_of_the_means() -> None:
    matrix = ConfusionMatrix(4)
    matrix.update(np.array([0, 0, 2, 0]), np.array([0, 0, 0, 1]))
    np.testing.assert_allclose(matrix.iou, [2 / 4, 0, 0, np.nan])  # class 2 is predicted, so it counts
    np.testing.assert_allclose(matrix.accuracy, [2 / 3, 0, np.nan, np.nan])
    assert matrix.mean_iou == pytest.approx(0.5 / 3)
    assert matrix.mean_accuracy == pytest.approx(1 / 3)
    assert matrix.pixel_accuracy == 0.5


def test_nothing_counted_is_nan_and_no_warning() -> None:
    matrix = ConfusionMatrix(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matrix.update(np.zeros((3, 3), int), np.full((3, 3), 255))
        assert all(math.isnan(value) for value in (matrix.mean_iou, matrix.mean_accuracy, matrix.pixel_accuracy))
        assert matrix.to_dict()["mean_iou"] is None
        assert "2 of 2 classes occur neither" in matrix.table()


def test_shards_add_up_and_types_do_not_matter() -> None:
    predictions, labels = label_maps([0, 1, 2, 3, 4], 255, count=6)
    whole, first, second = (ConfusionMatrix(5) for _ in range(3))
    for index, (prediction, label) in enumerate(zip(predictions, labels, strict=True)):
        whole.update(prediction, label)
        shard = (first, second)[index % 2]
        shard.update(torch.from_numpy(prediction[::-1].astype(np.int32)), label.astype(np.uint16)[::-1])
    first.matrix += second.matrix
    assert torch.equal(first.matrix, whole.matrix)


def test_counts_beyond_32_bits() -> None:
    matrix = ConfusionMatrix(2)
    matrix.matrix += 2**40
    matrix.update(np.array([1]), np.array([0]))
    assert matrix.matrix[0, 1] == 2**40 + 1


@pytest.mark.parametrize(
    ("prediction", "label", "message"),
    [
        ([[0, 1]], [[0], [1]], r"predictions are \(1, 2\), labels \(2, 1\)"),
        ([0, 3], [0, 1], "predictions run from 0 to 3, but there are 3 classes and 255 is ignored"),
        ([0, -1], [0, 1], "predictions run from -1 to 0"),
        ([0, 1], [0, 254], "labels run from 0 to 254"),
    ],
)
def test_values_that_cannot_be(prediction: list, label: list, message: str) -> None:
    matrix = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=message):
        matrix.update(np.array(prediction), np.array(label))
    assert matrix.matrix.sum() == 0


def filled(names: dict[int, str], number: int | None = None) -> ConfusionMatrix:
    number = number or len(names)
    matrix = ConfusionMatrix(number, id2label=names)
    label = RANDOM.integers(0, number - 1, 40_000)
    matrix.update(np.where(RANDOM.random(40_000) < 0.7, label, RANDOM.integers(0, number - 1, 40_000)), label)
    return matrix


def test_table() -> None:
    matrix = ConfusionMatrix(5, id2label={0: "sky", 1: "道路", 2: "pole", 3: "cat"})
    matrix.update(np.array([0] * 997 + [1, 1, 2]), np.array([0] * 998 + [1, 1]))
    assert matrix.table().splitlines() == [
        "class         IoU  accuracy  pixels",
        "-----------------------------------",
        "sky         99.90     99.90  99.8 %",
        "道路        33.33     50.00   0.2 %",
        "pole         0.00         -   0.0 %",
        "-----------------------------------",
        "mean        44.41     74.95",
        "all pixels            99.80   1,000",
        "2 of 5 classes occur neither in the labels nor in the predictions",
    ]


def test_names_in_a_table_are_text_alone() -> None:
    matrix = ConfusionMatrix(2, id2label={0: "[red]sky[/red] :smile:", 1: "a\x1b[2Jb " + "long " * 60})
    matrix.update(np.array([0, 1]), np.array([0, 1]))
    lines = matrix.table().splitlines()
    assert lines[2].startswith("[red]sky[/red] :smile:   ")
    assert lines[3].startswith("a\\x1b[2Jb " + "long " * 60)


def test_files(tmp_path: Path) -> None:
    matrix = filled({0: "sky", 1: "façade, grey", 2: "道路", 3: "never"})
    matrix.save_json(tmp_path / "metrics.json")
    content = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert content == matrix.to_dict()
    assert content["mean_iou"] == matrix.mean_iou
    assert content["classes"][3] == {"id": 3, "name": "never", "iou": None, "accuracy": None, "pixels": 0}
    assert np.array(content["confusion"]).sum() == 40_000
    matrix.save_csv(tmp_path / "classes.csv")
    with open(tmp_path / "classes.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["sky", "façade, grey", "道路", "never"]
    assert [float(row["iou"]) for row in rows[:3]] == matrix.iou[:3].tolist()
    assert rows[3]["iou"] == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes.csv", "metrics.json"]


@pytest.mark.parametrize("names", [{0: "sky", 1: "$x$", 2: "道路"}, dict(enumerate(ade20k_names()[:30]))], ids=len)
def test_picture(tmp_path: Path, names: dict[int, str]) -> None:
    pytest.importorskip("matplotlib")
    matrix = filled(names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matrix.save_picture(tmp_path / "confusion.png")
    figure = report.figure(matrix)
    axes, image = figure.axes[0], figure.axes[0].images[0]
    counts = matrix.matrix.numpy()
    np.testing.assert_allclose(image.get_array()[:-1], counts[:-1] / counts[:-1].sum(1, keepdims=True))
    assert np.isnan(np.ma.filled(image.get_array()[-1], np.nan)).all()  # a class without pixels has a grey row
    shown = [text.get_text() for text in axes.get_yticklabels()]
    assert shown == [{"道路": "class 2", "$x$": r"\$x\$"}.get(name, name) for name in names.values()]
    with Image.open(tmp_path / "confusion.png") as picture:
        # Large enough for a line per name.
        assert picture.height > 15 * len(names)
        assert np.asarray(picture.convert("L")).std() > 10
    assert [path.name for path in tmp_path.iterdir()] == ["confusion.png"]


def test_picture_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'fastuper\[train\]'"):
        filled({0: "a", 1: "b", 2: "c"}).save_picture(tmp_path / "confusion.png")
    assert list(tmp_path.iterdir()) == []


def test_no_class_is_refused() -> None:
    with pytest.raises(ValueError, match="num_labels is 0; give at least 1"):
        ConfusionMatrix(0)


def test_table_is_text_in_a_notebook_too(monkeypatch):
    shell = type("ZMQInteractiveShell", (), {"config": {}})  # the class of Jupyter's, which rich looks for
    monkeypatch.setattr("builtins.get_ipython", shell, raising=False)
    matrix = ConfusionMatrix(2, id2label={0: "water", 1: "land"})
    matrix.update(np.array([[0, 1]]), np.array([[0, 1]]))
    assert "water" in matrix.table()

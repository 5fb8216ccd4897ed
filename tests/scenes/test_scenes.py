"""Generated scenes: reproducible, of any size, with exact labels, and not separable by colour alone."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastuper.data.classes import class_palette
from fastuper.data.samples import as_samples
from fastuper.evaluation.confusion import ConfusionMatrix
from fastuper.scenes.dataset import ID2LABEL, MODEL, PALETTE, SceneDataset, load_model, scene

LOG = Path(__file__).parents[2] / "examples" / "train_scenes.jsonl"

CLASSES = len(ID2LABEL)
SMALL = (96, 128)
# Of scenes 0 to 3: each class's share of the pixels, and the mean colour.
EXPECTED_SHARES = [
    [0.2527, 0.0614, 0.0126, 0.3917, 0.0234, 0.0012, 0.0433, 0.1281, 0.0388, 0.0468],
    [0.2324, 0.0341, 0.0311, 0.1943, 0.0561, 0.1147, 0.2316, 0.0481, 0.0370, 0.0207],
    [0.2149, 0.2745, 0.0288, 0.2669, 0.0858, 0.0029, 0.0396, 0.0090, 0.0370, 0.0404],
    [0.1954, 0.1122, 0.0307, 0.1650, 0.0490, 0.0017, 0.2314, 0.0732, 0.0848, 0.0567],
]
EXPECTED_COLOURS = [[109.0, 98.8, 113.5], [77.7, 80.0, 64.7], [70.5, 79.5, 92.7], [60.8, 69.4, 67.6]]


@pytest.fixture(scope="module")
def many() -> list[tuple[np.ndarray, np.ndarray]]:
    """Forty-eight small scenes: pictures (H, W, 3) and labels (H, W)."""
    return [(np.asarray(image), labels) for image, labels in (scene(seed, SMALL) for seed in range(48))]


def test_a_seed_gives_one_scene() -> None:
    (image, labels), (again, labels_again), (other, other_labels) = scene(3, SMALL), scene(3, SMALL), scene(4, SMALL)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(again))
    np.testing.assert_array_equal(labels, labels_again)
    assert (np.asarray(image) != np.asarray(other)).mean() > 0.5
    assert (labels != other_labels).mean() > 0.1


def test_scenes_are_those_that_were_drawn_before(many: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """The model was trained on these scenes: they must not change.

    NumPy's streams are the same everywhere; sines and JPEG decoders may differ in the last bit, and with them a pixel
    at an edge.
    """
    shares = np.array([np.bincount(labels.ravel(), minlength=CLASSES) / labels.size for _, labels in many[:4]])
    colours = np.array([image.mean((0, 1)) for image, _ in many[:4]])
    np.testing.assert_allclose(shares, EXPECTED_SHARES, atol=0.002)
    np.testing.assert_allclose(colours, EXPECTED_COLOURS, atol=1.0)


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (64, 64), (37, 91), (90, 20), (5, 300), (192, 256)])
def test_any_size(size: tuple[int, int]) -> None:
    for seed in range(3):
        image, labels = scene(seed, size)
        assert (image.mode, image.height, image.width) == ("RGB", *size)
        assert (labels.dtype, labels.shape) == (np.uint8, size)
        assert labels.max() < CLASSES


def test_another_size_shows_the_same_scene() -> None:
    for seed in range(4):
        _, labels = scene(seed, SMALL)
        # Twice as large: a pixel becomes four; one of these has the position at which the label was sampled.
        _, large = scene(seed, (192, 256))
        assert (large[1::2, 1::2] == labels).mean() > 0.97
        # Wider: the scene continues to the left and to the right.
        _, wide = scene(seed, (96, 192))
        assert (wide[:, 32:160] == labels).mean() > 0.99


def test_labels_and_colours_change_at_the_same_places(many: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Colours differ more across edges of the labels than elsewhere; with shifted labels they do not."""
    contrast = {}
    for shift in (0, 4):
        edges, inside = [], []
        for image, labels in many[:12]:
            step = np.abs(np.diff(image.astype(int), axis=1)).sum(-1)
            edge = np.roll(labels[:, 1:] != labels[:, :-1], shift, axis=1)
            edges.append(step[edge].mean())
            inside.append(step[~edge].mean())
        contrast[shift] = np.mean(edges) / np.mean(inside)
    assert contrast[0] > 2.5 * contrast[4] - 1.5
    assert contrast[0] > 2.5


def test_every_class_is_in_most_scenes(many: list[tuple[np.ndarray, np.ndarray]]) -> None:
    shares = np.array([np.bincount(labels.ravel(), minlength=CLASSES) / labels.size for _, labels in many[:40]])
    assert (shares.mean(0) > 0.01).all()
    assert ((shares > 0.001).mean(0) > 0.6).all()


def test_colour_and_place_do_not_determine_the_class(many: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Predict the most frequent class of each colour (16 levels per channel) in each of 8 x 8 places."""

    def bins(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows, columns = np.indices(image.shape[:2])
        place = rows * 8 // image.shape[0] * 8 + columns * 8 // image.shape[1]
        red, green, blue = np.moveaxis(image.astype(np.int64) // 16, -1, 0)
        return place.ravel(), (((place * 16 + red) * 16 + green) * 16 + blue).ravel()

    by_place = np.zeros((64, CLASSES))
    by_both = np.zeros((64 * 16**3, CLASSES))
    for image, labels in many[10:]:
        place, both = bins(image)
        np.add.at(by_place, (place, labels.ravel()), 1)
        np.add.at(by_both, (both, labels.ravel()), 1)
    matrix = ConfusionMatrix(CLASSES)
    for image, labels in many[:10]:
        place, both = bins(image)
        seen = by_both[both].any(1)
        guess = np.where(seen, by_both[both].argmax(1), by_place[place].argmax(1))
        matrix.update(guess, labels.ravel().astype(np.int64))
    assert 0.15 < matrix.mean_iou < 0.5


def test_what_is_no_scene() -> None:
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        scene(-1)
    for size in ((0, 8), (8, 0), (8,)):
        with pytest.raises(ValueError, match=r"size must be \(height, width\), each from 1"):
            scene(0, size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed must be 0 or more, got -3"):
        SceneDataset(range(-3, 5))


def test_dataset() -> None:
    dataset = SceneDataset([5, 7], SMALL)
    assert as_samples(dataset) is dataset
    assert len(dataset) == 2
    assert dataset.id2label == ID2LABEL
    sample = dataset[1]
    image, labels = scene(7, SMALL)
    np.testing.assert_array_equal(np.asarray(sample.image), np.asarray(image))
    np.testing.assert_array_equal(sample.label, labels)
    assert sample.name == "scene 7"
    assert len(list(dataset)) == 2


def test_colours_of_the_palette_differ() -> None:
    np.testing.assert_array_equal(class_palette(ID2LABEL), PALETTE)
    distances = np.linalg.norm(PALETTE[:, None].astype(float) - PALETTE[None], axis=-1)
    assert distances[~np.eye(CLASSES, dtype=bool)].min() > 60


def test_the_packages_model() -> None:
    """Evaluate it on six scenes outside its training data."""
    file = MODEL / "model.safetensors"
    assert file.stat().st_size <= 6_000_000
    assert {weight.dtype for weight in load_file(file).values()} <= {torch.bfloat16, torch.int64}
    model, processor = load_model()
    assert model.dtype == torch.float32
    assert not model.training
    assert model.config.id2label == ID2LABEL
    matrix = ConfusionMatrix(CLASSES)
    for sample in SceneDataset(range(6)):
        (labels,) = model.segment(**processor(images=sample.image, return_tensors="pt"))
        matrix.update(labels, sample.label.astype(np.int64))
    assert matrix.mean_iou > 0.8


def test_the_log_is_of_the_packages_model() -> None:
    *lines, summary = map(json.loads, LOG.read_text().splitlines())
    assert summary["sha256"] == hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest()
    assert summary["model"]["mIoU"] >= 0.85
    assert summary["colour and place alone"]["mIoU"] < 0.5
    assert {line["round"] for line in lines} == set(summary["trained on"])
    page = (LOG.parents[1] / "docs" / "scenes.md").read_text()
    for reached in (summary["model"], summary["colour and place alone"]):
        assert f"{reached['mIoU']:.3f}" in page
        for name, value in reached["IoU"].items():
            assert re.search(rf"\| {name} \|.* {value:.2f} \|", page), name


def test_a_model_that_was_not_trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fastuper.scenes.dataset.MODEL", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="`make train-scenes` trains the model"):
        load_model()

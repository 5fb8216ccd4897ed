"""`fastuper evaluate`: a small folder beside Transformers and numpy, and faults of data and options."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, Subset
from typer.testing import CliRunner, Result

from fastuper import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation, UperNetImageProcessor
from fastuper.cli import app
from fastuper.data.folders import open_dataset
from fastuper.data.samples import DataError, Sample
from fastuper.evaluation.loop import evaluate
from tests.end_to_end.common import NAMES


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """Return a dataset whose labels agree with about half of the model's, and where a third of the pixels is ignored.

    The model predicts one class for all ignored pixels, so that the figures would change if they counted.
    """
    random = np.random.default_rng(0)
    network = UperNetForSemanticSegmentation.from_pretrained(model).eval()
    processor = UperNetImageProcessor.from_pretrained(model)
    for number, size in enumerate([(90, 120), (64, 96), (50, 70), (110, 60)]):
        small = random.integers(0, 256, (size[0] // 12, size[1] // 12, 3), dtype=np.uint8)
        photo = Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC)
        label = network.segment(processor(photo, return_tensors="pt")["pixel_values"], [size])[0].numpy()
        commonest = np.bincount(label.ravel()).argmax()
        noise = random.random(size)
        # Class 5 is in no label map, but among the predictions.
        wrong = np.where(noise < 0.3, random.integers(0, 5, size), np.where(label == 5, 0, label))
        wrong[(label == commonest) & (random.random(size) < 0.7)] = 255
        for kind, image in (("images", photo), ("labels", Image.fromarray(wrong.astype(np.uint8)))):
            path = tmp_path / "data" / kind / "val" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    (tmp_path / "data" / "classes.txt").write_text("\n".join(NAMES.values()), encoding="utf-8")
    return tmp_path / "data"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments), "--device", "cpu"])


def metrics(pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, object]:
    """Return `mean_iou` of Hugging Face's `evaluate`, but without its count of predictions on ignored pixels."""
    kept = [(prediction[label != 255], label[label != 255]) for prediction, label in pairs]
    iou, accuracy = [], []
    for index in range(len(NAMES)):
        intersection = sum(int(((p == index) & (t == index)).sum()) for p, t in kept)
        union = sum(int(((p == index) | (t == index)).sum()) for p, t in kept)
        pixels = sum(int((t == index).sum()) for _, t in kept)
        iou.append(intersection / union if union else None)
        accuracy.append(intersection / pixels if pixels else None)
    return {
        "mean_iou": np.mean([value for value in iou if value is not None]),
        "mean_accuracy": np.mean([value for value in accuracy if value is not None]),
        "pixel_accuracy": sum(int((p == t).sum()) for p, t in kept) / sum(t.size for _, t in kept),
        "iou": iou,
        "accuracy": accuracy,
    }


@pytest.mark.slow
def test_agrees_with_transformers_and_numpy(model: Path, folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    processor_class = getattr(transformers, "SegformerImageProcessorPil", transformers.SegformerImageProcessor)
    theirs = transformers.UperNetForSemanticSegmentation.from_pretrained(model).eval()
    processor = processor_class.from_pretrained(model)
    pairs = []
    for path in sorted((folder / "images" / "val").iterdir()):
        label = np.asarray(Image.open(folder / "labels" / "val" / path.name))
        with torch.inference_mode():
            outputs = theirs(**processor(images=Image.open(path), return_tensors="pt"))
        prediction = processor.post_process_semantic_segmentation(outputs, target_sizes=[label.shape])[0]
        pairs.append((prediction.numpy(), label))
    expected = metrics(pairs)
    assert expected["accuracy"][5] is None
    assert 0.1 < expected["mean_iou"] < 0.9

    result = run("-m", model, "-d", folder, "-o", tmp_path / "results", "--batch-size", 3)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "results" / "metrics.json").read_text(encoding="utf-8"))
    # Rounding decides the few pixels where two classes tie.
    for name in ("mean_iou", "mean_accuracy", "pixel_accuracy"):
        assert found[name] == pytest.approx(expected[name], abs=2e-4)
    for index, row in enumerate(found["classes"]):
        assert row["name"] == NAMES[index]
        assert row["iou"] == pytest.approx(expected["iou"][index], abs=5e-4)
        assert row["accuracy"] == (expected["accuracy"][index] and pytest.approx(expected["accuracy"][index], abs=5e-4))
    assert found["pixels"] == sum(int((label != 255).sum()) for _, label in pairs)

    assert "4 photos of" in result.stdout
    means = [f"{100 * found[name]:.2f}" for name in ("mean_iou", "mean_accuracy")]
    assert ["mean", *means] in [line.split() for line in result.stdout.splitlines()]
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "classes.csv",
        "confusion.png",
        "metrics.json",
    ]
    with open(tmp_path / "results" / "classes.csv", newline="", encoding="utf-8") as file:
        assert [row["name"] for row in csv.DictReader(file)] == list(NAMES.values())


def test_windows_scales_and_flips_from_the_command_line(model: Path, folder: Path, tmp_path: Path) -> None:
    options = ("--short-side", 64, "--window", 48, "--stride", 32, "--scales", "0.75,1", "--flip", "--batch-size", 4)
    result = run("-m", model, "-d", folder, "--split", "val", "-o", tmp_path, *options)
    assert result.exit_code == 0, result.output
    network = UperNetForSemanticSegmentation.from_pretrained(model)
    dataset = open_dataset(folder, "val")
    matrix = evaluate(
        network.train(),
        dataset,
        UperNetImageProcessor.from_pretrained(model),
        short_side=64,
        window=48,
        stride=32,
        scales=(0.75, 1.0),
        flip=True,
        batch_size=8,
    )
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["confusion"] == matrix.matrix.tolist()
    whole = evaluate(network, dataset, UperNetImageProcessor.from_pretrained(model))
    assert not torch.equal(whole.matrix, matrix.matrix)


def test_shares_of_a_dataset_add_up_to_it(model: Path, folder: Path) -> None:
    network = UperNetForSemanticSegmentation.from_pretrained(model)
    processor = UperNetImageProcessor.from_pretrained(model)
    dataset = open_dataset(folder, "val")
    network.train()
    network.decode_head.fpn_bottleneck.batch_norm.eval()
    modes = [module.training for module in network.modules()]
    calls = []
    whole = evaluate(network, dataset, processor, batch_size=2, on_sample=lambda: calls.append(1))
    assert len(calls) == 4
    assert [module.training for module in network.modules()] == modes
    parts = [evaluate(network, Subset(dataset, range(rank, 4, 2)), processor, workers=rank) for rank in (0, 1)]
    assert torch.equal(parts[0].matrix + parts[1].matrix, whole.matrix)
    stream = evaluate(network, iter(dataset), processor, id2label=NAMES)
    assert torch.equal(stream.matrix, whole.matrix)
    assert evaluate(network, Subset(dataset, []), processor).to_dict()["mean_iou"] is None


class ForeignSamples(Dataset):
    """Samples that are not checked."""

    def __init__(self, *samples: Sample) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def test_unchecked_samples(model: Path) -> None:
    network = UperNetForSemanticSegmentation.from_pretrained(model)
    samples = ForeignSamples(Sample(Image.new("RGB", (40, 30)), np.full((30, 40), 6), "seventh class"))
    with pytest.raises(DataError, match="seventh class: holds the label 6, but there are 6 classes"):
        evaluate(network, samples, UperNetImageProcessor.from_pretrained(model))
    assert evaluate(network, samples, UperNetImageProcessor.from_pretrained(model), ignore_index=6).pixels.sum() == 0


def test_a_model_of_one_class(tmp_path: Path) -> None:
    config = UperNetConfig(
        backbone_config=ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8]),
        hidden_size=8,
        use_auxiliary_head=False,
        id2label={0: "road"},
    )
    network = UperNetForSemanticSegmentation(config)
    nn.init.constant_(network.decode_head.classifier.bias, 1.0)
    nn.init.zeros_(network.decode_head.classifier.weight)
    label = np.zeros((30, 40), np.uint8)
    label[:10] = 1
    samples = [Sample(Image.new("RGB", (40, 30)), label, "road")]
    matrix = evaluate(network, samples, UperNetImageProcessor(size=32), id2label={0: "other", 1: "road"}, flip=True)
    assert matrix.matrix.tolist() == [[0, 800], [0, 400]]
    assert matrix.id2label == {0: "background", 1: "road"}


# Faults of data and options


def one_line(result: Result, status: int, *parts: str) -> None:
    assert result.exit_code == status, result.output
    message = result.stderr.strip()
    assert len(message.splitlines()) == 1
    for part in parts:
        assert part in message
    assert message.startswith("fastuper: ")


def failed(result: Result, *parts: str) -> None:
    """Check the summary of a measurement without one photo."""
    assert result.exit_code == 1, result.output
    summary = result.stderr.strip().splitlines()
    assert summary[-2] == "1 could not be used and are not in the figures:"
    for part in parts:
        assert part in summary[-1]
    assert "mean" in result.stdout


def test_what_cannot_be_read_is_named_and_the_others_are_measured(model: Path, folder: Path, tmp_path: Path) -> None:
    out, third = tmp_path / "out", folder / "labels" / "val" / "2.png"
    label = np.array(Image.open(third))
    label[0, :2] = 9
    Image.fromarray(label).save(third)
    failed(run("-m", model, "-d", folder, "-o", out), str(third), "holds the label 9", "6 classes")
    found = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert len(found["failed"]) == 1
    others = Subset(open_dataset(folder, "val"), [0, 1, 3])
    network, processor = (
        UperNetForSemanticSegmentation.from_pretrained(model),
        UperNetImageProcessor.from_pretrained(model),
    )
    assert found["confusion"] == evaluate(network, others, processor).matrix.tolist()
    Image.fromarray(label).convert("RGB").save(third)
    failed(run("-m", model, "-d", folder), str(third), "3 channels")
    third.write_bytes(third.read_bytes()[:300])
    failed(run("-m", model, "-d", folder), str(third), "truncated")
    third.unlink()
    one_line(run("-m", model, "-d", folder), 2, "1 of 4 photos have no label map", "2.png")
    os.mkfifo(third)
    failed(run("-m", model, "-d", folder), str(third), "is a FIFO, not a file")


def test_without_a_photo_that_can_be_read_nothing_is_written(model: Path, folder: Path, tmp_path: Path) -> None:
    for path in (folder / "images" / "val").iterdir():
        path.write_bytes(b"no image")
    result = run("-m", model, "-d", folder, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "4 could not be used" in result.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_masks_of_0_and_255_are_refused(folder: Path, tmp_path: Path) -> None:
    two, names = tmp_path / "two", {0: "background", 1: "object"}
    backbone = ConvNextConfig(hidden_sizes=[4, 4, 4, 4], depths=[1, 1, 1, 1])
    config = UperNetConfig(backbone, hidden_size=4, auxiliary_channels=4, auxiliary_in_channels=4, id2label=names)
    UperNetForSemanticSegmentation(config).save_pretrained(two)
    UperNetImageProcessor(size=32).save_pretrained(two)
    for path in (folder / "labels" / "val").iterdir():
        label = np.where(np.asarray(Image.open(path)) > 0, 255, 0).astype(np.uint8)
        Image.fromarray(label).save(path)
    for classes in ("background\nobject", None):
        if classes is None:
            (folder / "classes.txt").unlink()
        else:
            (folder / "classes.txt").write_text(classes)
        result = run("-m", two, "-d", folder)
        one_line(result, 2, "are 0 (background) or ignored (255); if 255 is a class", "renumber it to 1 (object)")
    label[0, 0] = 1  # objects are rare
    Image.fromarray(label).save(path)
    assert run("-m", two, "-d", folder).exit_code == 0


def test_background_can_be_ignored_with_and_without_names(model: Path, folder: Path) -> None:
    for path in (folder / "labels" / "val").iterdir():
        label = np.asarray(Image.open(path))
        Image.fromarray(np.where(label == 255, 0, label).astype(np.uint8)).save(path)
    first = run("-m", model, "-d", folder, "--ignore-index", 0)
    (folder / "classes.txt").unlink()
    second = run("-m", model, "-d", folder, "--ignore-index", 0)
    assert (first.exit_code, first.stdout) == (0, second.stdout)


def test_classes_that_differ_from_the_model(model: Path, folder: Path) -> None:
    classes = folder / "classes.txt"
    classes.write_text("sky\nroad\n", encoding="utf-8")
    one_line(run("-m", model, "-d", folder), 2, "the dataset has 2 classes (sky, road), the model 6 classes (sky, faça")
    classes.write_text("\n".join(list(NAMES.values())[::-1]), encoding="utf-8")
    one_line(run("-m", model, "-d", folder), 2, "in another order (class 0 is water, the model's sky)")
    classes.write_text("a\nb\nc\nd\ne\nf\n", encoding="utf-8")
    assert run("-m", model, "-d", folder).exit_code == 0


def test_impossible_options(model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_line(run("-m", model, "-d", tmp_path / "none"), 2, "none: there is no such folder")
    one_line(run("-m", model, "-d", folder, "--split", "test"), 2, "has no split test; it has val")
    one_line(run("-m", model, "-d", folder, "--scales", "1,x"), 2, "--scales 1,x: give numbers")
    one_line(run("-m", model, "-d", folder, "--scales", "1,0"), 2, "--scales 1,0: give numbers")
    one_line(run("-m", model, "-d", folder, "--stride", 9), 2, "--stride 9: give a --window")
    one_line(run("-m", model, "-d", folder, "--window", 8, "--stride", 9), 2, "--stride 9")
    one_line(run("-m", tmp_path, "-d", folder), 2, "cannot load the model")
    for given in (("", folder, "out"), (model, "", "out"), (model, folder, "")):
        result = run(*(part for pair in zip(("-m", "-d", "-o"), given, strict=True) for part in pair))
        assert result.exit_code == 2
        assert "it is empty; is a variable unset?" in result.stderr
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    one_line(run("-m", model, "-d", folder, "-o", tmp_path / "out"), 2, "pip install 'fastuper[train]'")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing_half_written(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_text

    def full(self: Path, *arguments: object, **options: object) -> int:
        write(self, "half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    one_line(run("-m", model, "-d", folder, "-o", tmp_path / "out"), 1, "No space left on device")
    assert list((tmp_path / "out").iterdir()) == []


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys\n"
        "from fastuper.cli import app\n"
        "try: app(['evaluate', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(','.join({'torch', 'transformers', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--window" in done.stdout

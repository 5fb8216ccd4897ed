"""Train the demo model of the package, a small UPerNet, on generated scenes.

    python examples/train_scenes.py         about an hour on two cores; a run that was stopped resumes

The weights, rounded to bfloat16, are written to fastuper/scenes/model/. The losses, and the IoU on test scenes, are
written to examples/train_scenes.jsonl; no test scene is used in training or validation. The file also has the IoU of a
classifier that has only the colour and the place of a pixel: the difference is due to the pixel's surroundings.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastuper import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation, UperNetImageProcessor
from fastuper.data import Sample, SampleDataset, TrainingTransform
from fastuper.evaluation.confusion import ConfusionMatrix
from fastuper.scenes import ID2LABEL, MODEL, SceneDataset, load_model
from fastuper.training import Trainer, TrainingConfig
from fastuper_kernels.dispatch.files import atomic_path

ROOT = Path(__file__).resolve().parents[1]
LOG = Path(__file__).with_suffix(".jsonl")

# Seeds of the scenes; the ranges share none.
TEST, VALIDATION, TRAINING = range(300), range(1_000, 1_060), range(10_000, 15_000)


@dataclass(frozen=True)
class Round:
    """A part of the training: the number and the size (height, width) of its scenes, and its configuration."""

    name: str
    size: tuple[int, int]
    scenes: int
    config: TrainingConfig


COMMON = TrainingConfig(batch_size=8, weight_decay=0.05, layer_decay=1.0, clip=1.0, ema=0.99, workers=1)
# The model learns classes from small scenes, which cost a quarter of large scenes, and outlines from large scenes.
SMALL = replace(
    COMMON,
    steps=2800,
    learning_rate=4e-3,
    warmup_steps=150,
    power=1.55,
    log_every=50,
    validate_every=700,
    save_every=100,
)
LARGE = replace(
    COMMON, steps=500, learning_rate=1.5e-3, warmup_steps=50, log_every=25, validate_every=125, save_every=25
)
ROUNDS = (Round("small", (192, 256), 5000, SMALL), Round("large", (384, 512), 1500, LARGE))
SIZE = ROUNDS[-1].size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / ".cache/scenes", metavar="FOLDER", help="of the run")
    parser.add_argument("--restart", action="store_true", help="remove a run in the folder, and start again")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model, lines = build_model(), []
    for part in ROUNDS:
        folder = arguments.output / part.name
        train(model, part, folder, arguments.restart)
        model = UperNetForSemanticSegmentation.from_pretrained(folder / "best")
        lines += [{"round": part.name, **json.loads(line)} for line in (folder / "log.jsonl").read_text().splitlines()]

    ship(folder / "best")
    print("Measuring on test scenes ...", flush=True)
    reached = evaluate()
    print("Training a classifier of colour and place alone ...", flush=True)
    baseline = classify_pixels()
    seconds = sum(
        part.config.log_every * part.config.batch_size / line["images_per_second"]
        for part in ROUNDS
        for line in lines
        if line["round"] == part.name and "loss" in line
    )
    weights = MODEL / "model.safetensors"
    summary = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "numpy": np.__version__,
        "parameters": load_model()[0].num_parameters(),
        "bytes": weights.stat().st_size,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "scenes": {"height": SIZE[0], "width": SIZE[1], "test": len(TEST)},
        "trained on": {part.name: part.config.steps * part.config.batch_size for part in ROUNDS},
        "seconds of training": round(seconds),
        "model": reached,
        "colour and place alone": baseline,
    }
    with atomic_path(LOG) as temporary:
        temporary.write_text("".join(f"{json.dumps(line)}\n" for line in [*thinned(lines), summary]))
    print(json.dumps(summary, indent=1))


def train(model: UperNetForSemanticSegmentation, part: Round, folder: Path, restart: bool) -> None:
    processor = UperNetImageProcessor(size={"height": part.size[0], "width": part.size[1]})
    # Scenes vary enough in size and colours: the only augmentation is mirroring.
    transform = TrainingTransform(processor, scale=(1.0, 1.0), max_class_share=1.0, photometric=False)
    trainer = Trainer(
        model,
        part.config,
        CachedSamples(SceneDataset(TRAINING[: part.scenes], part.size)),
        SceneDataset(VALIDATION, part.size),
        processor,
        output=folder,
        transform=transform,
        restart=restart,
    )
    trainer.train()


class CachedSamples(SampleDataset):
    """The samples of a dataset, each made once: drawing a scene takes as long as a training step on it.

    The cache of the single process that prepares images grows to 1.5 GB.
    """

    def __init__(self, dataset: SceneDataset):
        self.dataset, self.samples = dataset, {}
        self.id2label, self.ignore_index = dataset.id2label, dataset.ignore_index

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        if index not in self.samples:
            self.samples[index] = self.dataset[index]
        return self.samples[index]


def build_model() -> UperNetForSemanticSegmentation:
    """Return a UPerNet-ConvNeXt of 1.7 million parameters, with random weights.

    Its layer scale (1) and its initial weights are larger than in the published models: a short training would end
    before small ones have grown.
    """
    backbone = ConvNextConfig(
        depths=[1, 1, 4, 2],
        hidden_sizes=[32, 64, 128, 192],
        layer_scale_init_value=1.0,
        initializer_range=0.1,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = UperNetConfig(backbone_config=backbone, hidden_size=48, use_auxiliary_head=False, id2label=ID2LABEL)
    return UperNetForSemanticSegmentation(config)


def ship(checkpoint: Path) -> None:
    """Write a checkpoint into the package, in bfloat16."""
    model = UperNetForSemanticSegmentation.from_pretrained(checkpoint, dtype="bfloat16")
    unfinished = MODEL.with_name(".model")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    UperNetImageProcessor.from_pretrained(checkpoint).save_pretrained(unfinished)
    shutil.rmtree(MODEL, ignore_errors=True)
    os.replace(unfinished, MODEL)


def evaluate() -> dict[str, Any]:
    """Return the mIoU and the IoU of each class of the shipped model on the test scenes."""
    model, processor = load_model()
    matrix = ConfusionMatrix(len(ID2LABEL), id2label=ID2LABEL)
    for sample in SceneDataset(TEST, SIZE):
        pixels = processor(images=[sample.image], return_tensors="pt")["pixel_values"]
        matrix.update(model.segment(pixels, [SIZE])[0], torch.from_numpy(sample.label))
    return figures(matrix)


def classify_pixels(scenes: int = 250, pixels: int = 4000) -> dict[str, Any]:
    """Return the figures of a network that has only a pixel's colour, row and column, after a million pixels."""
    torch.manual_seed(0)
    inputs, labels = pixels_of(TRAINING[:scenes], pixels)
    network = nn.Sequential(nn.Linear(5, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, len(ID2LABEL)))
    optimizer = torch.optim.AdamW(network.parameters())
    steps = 3000
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
    for _ in range(steps):
        drawn = torch.randint(len(inputs), (4096,))
        loss = nn.functional.cross_entropy(network(inputs[drawn]), labels[drawn])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    matrix = ConfusionMatrix(len(ID2LABEL), id2label=ID2LABEL)
    inputs, labels = pixels_of(TEST, pixels)
    with torch.inference_mode():
        matrix.update(network(inputs).argmax(1), labels)
    return figures(matrix)


def pixels_of(seeds: range, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pixels of scenes: red, green, blue, row and column from -1 to 1, (N, 5); and their classes, (N,)."""
    generator = np.random.default_rng(0)
    inputs, labels = [], []
    for sample in SceneDataset(seeds, SIZE):
        row, column = generator.integers(SIZE[0], size=count), generator.integers(SIZE[1], size=count)
        colour = np.asarray(sample.image)[row, column] / 255
        inputs.append(np.column_stack([colour, row / SIZE[0], column / SIZE[1]]) * 2 - 1)
        labels.append(sample.label[row, column])
    return torch.from_numpy(np.concatenate(inputs)).float(), torch.from_numpy(np.concatenate(labels)).long()


def figures(matrix: ConfusionMatrix) -> dict[str, Any]:
    """Return the mIoU and the IoU of each class, rounded to four digits."""
    iou = {name: round(float(value), 4) for name, value in zip(ID2LABEL.values(), matrix.iou, strict=True)}
    return {"mIoU": round(matrix.mean_iou, 4), "IoU": iou}


def thinned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of validations, and about fifty of the lines of losses."""
    losses = [line for line in lines if "loss" in line]
    kept = {(line["round"], line["step"]) for line in losses[:: max(1, len(losses) // 50)]}
    return [
        {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in line.items()}
        for line in lines
        if "mIoU" in line or (line["round"], line["step"]) in kept
    ]


if __name__ == "__main__":
    main()

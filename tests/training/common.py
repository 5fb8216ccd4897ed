"""A tiny network, images to train it on, and a function that trains it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from fastuper import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation, UperNetImageProcessor
from fastuper.data.samples import Sample
from fastuper.training.config import TrainingConfig
from fastuper.training.trainer import Trainer

CLASSES = {0: "sky", 1: "tree", 2: "road"}
SIZE = 32


def tiny_model(drop_path_rate: float = 0.0) -> UperNetForSemanticSegmentation:
    torch.manual_seed(0)
    backbone = ConvNextConfig(
        hidden_sizes=[4, 8, 8, 8],
        depths=[1, 1, 1, 1],
        drop_path_rate=drop_path_rate,
        layer_scale_init_value=1.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = UperNetConfig(
        backbone, hidden_size=8, pool_scales=(1, 2), auxiliary_channels=8, id2label=CLASSES, initializer_range=0.1
    )
    return UperNetForSemanticSegmentation(config)


def tiny_processor() -> UperNetImageProcessor:
    return UperNetImageProcessor(size=SIZE)


class Photos(Dataset[Any]):
    """Squares of three classes under noise; image i has 3 i ignored rows at the top."""

    id2label = CLASSES

    def __init__(self, count: int, seed: int = 0, size: int = SIZE):
        self.count, self.seed, self.size = count, seed, size
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        self.read.append(index)
        random = np.random.default_rng([self.seed, index])
        label = random.integers(0, 3, (4, 4)).repeat(self.size // 4, 0).repeat(self.size // 4, 1)
        noise = random.integers(0, 30, (self.size, self.size, 3))
        image = (label[..., None] * 80 + noise).astype(np.uint8)
        label[: 3 * index] = 255
        return Sample(image, label, f"photo{index}.png")


def write_data(root: Path) -> Path:
    """Write six photos of 64 x 64 pixels in two splits, and classes.txt with three names; return the folder."""
    photos = Photos(6, size=64)
    for index in range(len(photos)):
        split = "training" if index < 4 else "validation"
        image, label, _ = photos[index]
        for kind, array in (("images", np.asarray(image)), ("labels", label.astype(np.uint8))):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / kind / split / f"{index}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES.values()))
    return root


def flip_transform(sample: Sample, generator: np.random.Generator) -> dict[str, Any]:
    """Return the whole image, flipped half the time, in float64."""
    image, label = np.asarray(sample.image), np.asarray(sample.label)
    if generator.random() < 0.5:
        image, label = image[:, ::-1], label[:, ::-1]
    pixel_values = torch.tensor(image / 127.5 - 1).permute(2, 0, 1)
    return {"pixel_values": pixel_values, "labels": torch.tensor(label.astype(np.int64)), "name": sample.name}


def train(output: Path, *, model: Any = None, data: Any = None, double: bool = False, **options: Any) -> Trainer:
    """Train the tiny network for a few steps, in this process and thread; return the trainer."""
    values = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1, "workers": 0, "cpu": True}
    arguments = {name: options.pop(name) for name in ("transform", "restart", "validation") if name in options}
    model = tiny_model() if model is None else model
    if double:
        model = model.double()
        arguments.setdefault("transform", flip_transform)
    trainer = Trainer(
        model,
        TrainingConfig(**{**values, "pictures": 0, **options}),
        Photos(6) if data is None else data,
        arguments.pop("validation", None),
        tiny_processor(),
        output=output,
        **arguments,
    )
    trainer.train()
    return trainer


def read_log(output: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log, without the images per second, which no two runs share."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in read_log(output) if "loss" in line]

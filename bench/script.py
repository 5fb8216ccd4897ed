"""Fine-tunes Transformers' UPerNet as Transformers' example does, without and with `fastuper.accelerate(model)`.

`python -m bench.script` prints the losses and the seconds of three runs: Transformers' model, the same in the other
memory layout (how far rounding alone moves the losses), and the accelerated model. The steps are those of
examples/pytorch/semantic-segmentation/run_semantic_segmentation.py of huggingface/transformers: AutoConfig,
AutoModelForSemanticSegmentation and AutoImageProcessor from a checkpoint; images that are cropped, flipped and
normalised; Trainer with its default optimizer and schedule. Generated scenes take the place of a dataset of the Hub,
NumPy the place of albumentations. The checkpoint is the package's own trained model, or with `--backbone` a larger
network with initial weights.

Rounding alone changes the losses of a training: most from initial weights, which move fast, and the more the fewer
images are in a step. BatchNorm makes the means of two images, which the coarsest branch of the pyramid pooling
compares, 1 and -1.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

import fastuper
from bench.names import ACCELERATED, BEFORE
from bench.pairs import BACKBONES
from fastuper.scenes import ID2LABEL, MODEL, SceneDataset

RUNS = (*BEFORE, ACCELERATED)


@dataclass(frozen=True)
class Run:
    """What a training printed and took.

    Attributes:
        losses: the loss of each step.
        seconds: the time of `trainer.train()`.
        model: the class of the model that the Trainer trained.
    """

    losses: list[float]
    seconds: float
    model: type


def write_checkpoint(folder: Path, model: Any, size: int) -> None:
    """Write a UPerNet of Transformers, and an image processor for crops of a size."""
    model.save_pretrained(folder)
    transformers.SegformerImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)


class Scenes(Dataset):
    """Scenes with the transforms of the example: crop, flip, normalise. An item depends on its index alone."""

    def __init__(self, count: int, processor: Any):
        self.height, self.width = processor.size["height"], processor.size["width"]
        self.mean, self.std = np.array(processor.image_mean), np.array(processor.image_std)
        self.scenes = SceneDataset(range(count), (self.height, self.width * 4 // 3))

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample, rng = self.scenes[index], np.random.default_rng(index)
        image, labels = np.asarray(sample.image), np.asarray(sample.label)
        left = rng.integers(image.shape[1] - self.width + 1)
        image, labels = (x[: self.height, left : left + self.width] for x in (image, labels))
        if rng.random() < 0.5:
            image, labels = image[:, ::-1], labels[:, ::-1]
        pixels = ((image / 255 - self.mean) / self.std).transpose(2, 0, 1)
        return {
            "pixel_values": torch.from_numpy(np.ascontiguousarray(pixels)).to(torch.float),
            "labels": torch.from_numpy(labels.copy()).to(torch.long),
        }


def train(checkpoint: Path, output: Path, variant: str, steps: int, batch: int) -> Run:
    """Fine-tune the checkpoint for some steps, as it is or after one more line (one of RUNS)."""
    training_args = TrainingArguments(
        str(output),
        max_steps=steps,
        per_device_train_batch_size=batch,
        logging_steps=1,
        save_strategy="no",
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
    )
    transformers.set_seed(training_args.seed)
    id2label = dict(ID2LABEL)
    label2id = {name: str(number) for number, name in id2label.items()}
    config = AutoConfig.from_pretrained(checkpoint, label2id=label2id, id2label=id2label)
    model = AutoModelForSemanticSegmentation.from_pretrained(checkpoint, config=config)
    image_processor = AutoImageProcessor.from_pretrained(checkpoint, do_reduce_labels=False)
    if variant == ACCELERATED:
        fastuper.accelerate(model)
    if variant == BEFORE[1]:
        model.to(memory_format=torch.channels_last)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=Scenes(steps * batch, image_processor),
        processing_class=image_processor,
        data_collator=default_data_collator,
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Run(losses, seconds, type(trainer.model))


def compare(before: Run, after: Run) -> float:
    """Return the largest relative difference of the losses of two runs."""
    return max(abs(a - b) / abs(a) for a, b in zip(before.losses, after.losses, strict=True))


def trained() -> Any:
    """Return the package's model as an object of Transformers, in float32."""
    return transformers.UperNetForSemanticSegmentation.from_pretrained(MODEL, dtype=torch.float)


def initial(name: str) -> Any:
    """Return a UPerNet of Transformers with initial weights, without random depth, over a backbone of BACKBONES."""
    backbone = BACKBONES[name]()
    if hasattr(backbone, "drop_path_rate"):
        backbone.drop_path_rate = 0.0
    transformers.set_seed(0)
    config = transformers.UperNetConfig(backbone_config=backbone, num_labels=len(ID2LABEL))
    return transformers.UperNetForSemanticSegmentation(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=BACKBONES, help="start from initial weights of a UPerNet over it")
    parser.add_argument("--size", type=int, default=256, help="side of the crops")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = trained() if arguments.backbone is None else initial(arguments.backbone)
        write_checkpoint(folder / "checkpoint", model, arguments.size)
        runs = [
            train(folder / "checkpoint", folder / f"run-{number}", variant, arguments.steps, arguments.batch_size)
            for number, variant in enumerate(RUNS)
        ]
    print(", ".join(RUNS))
    for step, losses in enumerate(zip(*(run.losses for run in runs), strict=True), 1):
        print(f"step {step}: " + " ".join(f"{loss:.6f}" for loss in losses))
    print(
        f"Transformers {transformers.__version__}, {arguments.backbone or MODEL.name}, {arguments.steps} steps of "
        f"{arguments.batch_size} images of {arguments.size} x {arguments.size}"
    )
    for variant, run in zip(RUNS, runs, strict=True):
        print(
            f"{variant}: {run.seconds:.1f} s, {runs[0].seconds / run.seconds:.2f} times as fast as the first; "
            f"largest relative difference of a loss {compare(runs[0], run):.1e}"
        )


if __name__ == "__main__":
    main()

"""Batches: the images of each step, their checks, and their collation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from fastuper.data.augment import TrainingDataset
from fastuper.data.images import ImageError
from fastuper.data.samples import DataError
from fastuper.io.messages import reason


@dataclass
class Batch:
    """The images of one piece of a step.

    Attributes:
        pixel_values: (B, C, H, W), normalised.
        labels: (B, H, W), int64.
        names: the name of each image in messages.
        valid: the number of pixels that are not ignored, an int64 scalar.
    """

    pixel_values: torch.Tensor
    labels: torch.Tensor
    names: list[str]
    valid: torch.Tensor

    def pin_memory(self) -> Batch:
        """Return the batch with images and labels in pinned memory; `DataLoader` calls this."""
        return dataclasses.replace(self, pixel_values=self.pixel_values.pin_memory(), labels=self.labels.pin_memory())


@dataclass
class UnusableImage:
    """The place of an image that cannot be used; `message` is one line with the image, the fault and the remedy."""

    message: str


class StepSampler(Sampler[list[tuple[int, int]]]):
    """A batch sampler that yields the pieces of one step after another, for one process, as pairs (epoch, index).

    An epoch is a permutation of all images that follows from the seed and the epoch's number. Epochs follow one another
    without a gap: a step may end one epoch and begin the next. The process of rank r takes the images at r,
    r + world_size, ... of each step's `batch_size` images.

    Args:
        length: number of images.
        batch_size: images of a step; a multiple of `world_size * accumulate`.
        seed: seed of the permutations.
        steps: number of steps.
        start: first step.
        rank: number of this process.
        world_size: number of processes.
        accumulate: number of pieces of a process's images of a step.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        steps: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
    ):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.steps, self.start = steps, start
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.batch_size // self.world_size // self.accumulate
        epoch, order = -1, torch.empty(0)
        for step in range(self.start, self.steps):
            keys = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                if position // self.length != epoch:
                    epoch = position // self.length
                    generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", epoch))
                    order = torch.randperm(self.length, generator=generator)
                keys.append((epoch, int(order[position % self.length])))
            own = keys[self.rank :: self.world_size]
            for start in range(0, len(own), size):
                yield own[start : start + size]


def derived_seed(seed: int, purpose: str, *numbers: int) -> int:
    """Return a seed that a purpose and some numbers decide; unlike a sum, it differs for all of them."""
    key = [seed, *purpose.encode(), *numbers]
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


class CheckedItems(Dataset[Any]):
    """The items of a `TrainingDataset`, their labels checked; an `UnusableImage` where an item cannot be made.

    An exception in a worker would arrive as a traceback.
    """

    def __init__(self, data: TrainingDataset, num_labels: int, ignore_index: int):
        self.data, self.num_labels, self.ignore_index = data, num_labels, ignore_index

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any] | UnusableImage:
        try:
            item = self.data[key]
        except (DataError, ImageError) as error:  # its message names the file
            return UnusableImage(str(error))
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            files = getattr(self.data.samples, "files", None)
            name = f"image {key[1]} of the training data" if files is None else files[key[1]][0]
            return UnusableImage(f"{name}: {reason(error)}")
        labels = item["labels"]
        wrong = labels[(labels != self.ignore_index) & ((labels < 0) | (labels >= self.num_labels))]
        if len(wrong):  # a GPU would report a failed assertion only
            return UnusableImage(
                f"{item['name']}: label {int(wrong[0])} is neither one of the model's {self.num_labels} classes nor "
                f"the ignored label {self.ignore_index}"
            )
        return item


def collate(items: list[dict[str, Any] | UnusableImage], ignore_index: int) -> Batch | UnusableImage:
    """Stack items to a batch, or return the first of them that is unusable."""
    usable = []
    for item in items:
        if isinstance(item, UnusableImage):
            return item
        usable.append(item)
    labels = torch.stack([item["labels"] for item in usable])
    return Batch(
        pixel_values=torch.stack([item["pixel_values"] for item in usable]),
        labels=labels,
        names=[item["name"] for item in usable],
        valid=(labels != ignore_index).sum(),
    )

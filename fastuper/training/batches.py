"""Batches: which images each step takes, and their collation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from fastuper.data.augment import TrainingDataset
from fastuper.data.images import ImageError
from fastuper.data.samples import DataError
from fastuper.io.messages import reason

if TYPE_CHECKING:
    pass


@dataclass
class Batch:
    """Images of one piece of a step.

    Attributes:
        pixel_values: (B, C, H, W), normalised.
        labels: (B, H, W), int64.
        names: what to call each image in a message.
        valid: how many pixels are not ignored, an int64 scalar.
    """

    pixel_values: torch.Tensor
    labels: torch.Tensor
    names: list[str]
    valid: torch.Tensor

    def pin_memory(self) -> Batch:
        """Return it in memory that a GPU reads by itself; what `DataLoader` calls."""
        return dataclasses.replace(self, pixel_values=self.pixel_values.pin_memory(), labels=self.labels.pin_memory())


class GlobalBatches(Sampler[list[tuple[int, int]]]):
    """Which images a process takes, as (epoch, index): the pieces of one step after another.

    An epoch is a permutation that the seed and the epoch's number decide, and epochs follow one another without a
    gap: a step may end one and begin the next. Of the `batch_size` images of a step the process of rank r takes the
    ones at r, r + world_size, ...

    Args:
        length: images there are.
        batch_size: images of a step; a multiple of `world_size * accumulate`.
        seed: see above.
        steps: the number of steps.
        start: the first step.
        rank: of this process.
        world_size: processes there are.
        accumulate: pieces of each process's part.
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
                    generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
                    order = torch.randperm(self.length, generator=generator)
                keys.append((epoch, int(order[position % self.length])))
            mine = keys[self.rank :: self.world_size]
            for start in range(0, len(mine), size):
                yield mine[start : start + size]


def seed_of(seed: int, purpose: str, *numbers: int) -> int:
    """Return a seed that a purpose and some numbers decide; unlike their sum, no two of them have the same."""
    key = [seed, *purpose.encode(), *numbers]
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


class TrainingItems(Dataset[Any]):
    """What `TrainingDataset` has, looked at; or the error's message where an image cannot be used.

    What a worker raises would arrive as a traceback.
    """

    def __init__(self, data: TrainingDataset, num_labels: int, ignore_index: int):
        self.data, self.num_labels, self.ignore_index = data, num_labels, ignore_index

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any] | str:
        try:
            item = self.data[key]
        except (DataError, ImageError) as error:  # they name the file
            return str(error)
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            files = getattr(self.data.samples, "files", None)
            name = f"image {key[1]} of the training data" if files is None else files[key[1]][0]
            return f"{name}: {reason(error)}"
        labels = item["labels"]
        wrong = labels[(labels != self.ignore_index) & ((labels < 0) | (labels >= self.num_labels))]
        if len(wrong):  # a GPU would only say that an assertion failed
            return (
                f"{item['name']}: label {int(wrong[0])} is neither one of the model's {self.num_labels} classes nor "
                f"{self.ignore_index}, which is ignored"
            )
        return item


class Collate:
    """Makes a `Batch` of items, or returns the first error's message."""

    def __init__(self, ignore_index: int):
        self.ignore_index = ignore_index

    def __call__(self, items: list[Any]) -> Batch | str:
        """Stack the items."""
        for item in items:
            if isinstance(item, str):
                return item
        labels = torch.stack([item["labels"] for item in items])
        return Batch(
            pixel_values=torch.stack([item["pixel_values"] for item in items]),
            labels=labels,
            names=[item["name"] for item in items],
            valid=(labels != self.ignore_index).sum(),
        )

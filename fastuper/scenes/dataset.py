"""Street scenes that are drawn, not photographed: any number of them, of any size, with exact labels.

A scene is a street in perspective: a road that bends, pavements, lawns, walls, houses, trees, cars, people and signs,
at some hour and in some weather, seen through a camera that blurs and has noise. Colours say little about classes
(cars, roads and walls are grey, coats and cars as red as brick): what a thing is shows in its shape and surroundings.

`make train-scenes` trains a small UPerNet on such scenes: `load_model`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastuper.data.processor import UperNetImageProcessor
from fastuper.data.samples import IGNORE_INDEX, Sample, SampleDataset
from fastuper.models.upernet import UperNetForSemanticSegmentation
from fastuper.scenes.street import ID2LABEL, PALETTE, Street

__all__ = ["ID2LABEL", "MODEL", "PALETTE", "SceneDataset", "load_model", "scene"]

MODEL = Path(__file__).parent / "model"
"""The folder of the model that was trained on scenes; `examples/train_scenes.py` writes it."""


def scene(seed: int, size: tuple[int, int] = (384, 512)) -> tuple[Image.Image, NDArray[np.uint8]]:
    """Draw a scene.

    Args:
        seed: which one, from 0. Another size shows the same scene, with more or less of it to the left and right.
        size: (height, width), each from 1.

    Returns:
        The picture, RGB, and its label map, (height, width) uint8, whose numbers are those of `ID2LABEL`.

    Raises:
        ValueError: `seed` is negative, or `size` is not from 1.
    """
    check_scene(seed, size)
    return Street(np.random.Generator(np.random.PCG64(seed)), *size).picture()


def check_scene(seed: int, size: tuple[int, int]) -> None:
    """Raise ValueError where there is no such scene."""
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"a scene's size must be (height, width), each from 1, got {size}")
    if seed < 0:
        raise ValueError(f"a scene's seed must be 0 or more, got {seed}")


class SceneDataset(SampleDataset):
    """Scenes to train on or to evaluate with; each is drawn when it is asked for.

    Args:
        seeds: which scenes: `range(1000)`, say.
        size: (height, width) of all.

    Raises:
        ValueError: a seed is negative, or `size` is not from 1.
    """

    def __init__(self, seeds: Sequence[int], size: tuple[int, int] = (384, 512)) -> None:
        check_scene(min(seeds, default=0), size)
        self.seeds, self.size = seeds, size
        self.id2label: dict[int, str] | None = dict(ID2LABEL)
        self.ignore_index = IGNORE_INDEX  # no pixel has it

    def __len__(self) -> int:
        """Return the number of scenes."""
        return len(self.seeds)

    def __getitem__(self, index: int) -> Sample:
        """Draw a scene."""
        seed = self.seeds[index]
        return Sample(*scene(seed, self.size), name=f"scene {seed}")


def load_model() -> tuple[UperNetForSemanticSegmentation, UperNetImageProcessor]:
    """Return the model that `make train-scenes` has trained, in float32 and evaluation, and its image processor.

    It knows the classes of `ID2LABEL` as they look in scenes; of photographs it knows nothing.

    Raises:
        OSError: none has been trained; `make train-scenes` does it.
    """
    if not MODEL.is_dir():
        raise FileNotFoundError(f"{MODEL} is not there: `make train-scenes` trains the model and writes it")
    model = UperNetForSemanticSegmentation.from_pretrained(MODEL, dtype="float32").eval()
    return model, UperNetImageProcessor.from_pretrained(MODEL)

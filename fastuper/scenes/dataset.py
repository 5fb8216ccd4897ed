"""Generated street scenes with exact labels, of any number and size, and the small model trained on them.

A scene is a street in perspective: a bent road, pavements, lawns, walls, houses, trees, cars, people and signs. Hour,
weather, blur and noise of the camera vary. Colour says little about the class: cars, roads and walls are grey, coats
and cars as red as brick. A model must learn shapes and surroundings.

`make train-scenes` trains the model that `load_model` returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastuper.data.classes import SCENE_ID2LABEL, SCENE_PALETTE
from fastuper.data.processor import UperNetImageProcessor
from fastuper.data.samples import IGNORE_INDEX, Sample, SampleDataset
from fastuper.models.upernet import UperNetForSemanticSegmentation
from fastuper.scenes.street import Street

__all__ = ["ID2LABEL", "MODEL", "PALETTE", "SceneDataset", "load_model", "scene"]

ID2LABEL = SCENE_ID2LABEL
"""The classes of scenes by their numbers."""

PALETTE = SCENE_PALETTE
"""The classes' colours, (10, 3) uint8."""

MODEL = Path(__file__).parent / "model"
"""The folder of the model trained on scenes; `examples/train_scenes.py` writes it."""


def scene(seed: int, size: tuple[int, int] = (384, 512)) -> tuple[Image.Image, NDArray[np.uint8]]:
    """Draw a scene.

    Args:
        seed: the scene's number, from 0. Another size shows the same scene, wider or narrower.
        size: (height, width), each from 1.

    Returns:
        The picture, RGB, and its label map, (height, width) uint8, of the classes in `ID2LABEL`.

    Raises:
        ValueError: `seed` is negative, or `size` is below 1.
    """
    check_scene(seed, size)
    return Street(np.random.Generator(np.random.PCG64(seed)), *size).picture()


def check_scene(seed: int, size: tuple[int, int]) -> None:
    """Raise ValueError if the seed or the size is out of range."""
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"a scene's size must be (height, width), each from 1, got {size}")
    if seed < 0:
        raise ValueError(f"a scene's seed must be 0 or more, got {seed}")


class SceneDataset(SampleDataset):
    """A dataset of scenes, for training or evaluation; each item is drawn when it is read.

    Args:
        seeds: the scenes' numbers, such as `range(1000)`.
        size: (height, width) of all scenes.

    Raises:
        ValueError: a seed is negative, or `size` is below 1.
    """

    def __init__(self, seeds: Sequence[int], size: tuple[int, int] = (384, 512)) -> None:
        check_scene(min(seeds, default=0), size)
        self.seeds, self.size = seeds, size
        self.id2label: dict[int, str] | None = dict(ID2LABEL)
        self.ignore_index = IGNORE_INDEX  # no pixel is ignored

    def __len__(self) -> int:
        """Return the number of scenes."""
        return len(self.seeds)

    def __getitem__(self, index: int) -> Sample:
        """Draw a scene."""
        seed = self.seeds[index]
        return Sample(*scene(seed, self.size), name=f"scene {seed}")


def load_model() -> tuple[UperNetForSemanticSegmentation, UperNetImageProcessor]:
    """Return the model trained by `make train-scenes`, in float32 and evaluation mode, and its image processor.

    It was trained only on drawn scenes: its label maps of photos mean nothing.

    Raises:
        OSError: the model's files are missing; `make train-scenes` trains it and writes them.
    """
    if not MODEL.is_dir():
        raise FileNotFoundError(f"{MODEL} is not there: `make train-scenes` trains the model and writes it")
    model = UperNetForSemanticSegmentation.from_pretrained(MODEL, dtype="float32").eval()
    return model, UperNetImageProcessor.from_pretrained(MODEL)

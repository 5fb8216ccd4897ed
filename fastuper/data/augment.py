"""Augmentation: random training crops of samples, reproducible by seed, epoch and index."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from fastuper.data.samples import IGNORE_INDEX, Sample, SampleDataset

if TYPE_CHECKING:
    from fastuper.data.processor import UperNetImageProcessor


def scaled_size(height: int, width: int, short_side: int, factor: float = 1.0) -> tuple[int, int]:
    """Return (height, width) of an image resized in proportion, so that its shorter side is `short_side` x `factor`.

    The longer side is at most 4 x `short_side` x `factor`; then the shorter side is less (mmsegmentation's
    2048 x 512).
    """
    ratio = factor * min(short_side / min(height, width), 4 * short_side / max(height, width))
    return max(1, round(height * ratio)), max(1, round(width * ratio))


class TrainingTransform:
    """Turn a sample into a training crop, by the steps of mmsegmentation's recipes.

    1. Resize to `base_size` times a random factor.
    2. Crop. If a class covers more of the crop than `max_class_share`, crop again, at most ten times.
    3. Flip horizontally, with probability `flip`.
    4. Distort brightness, contrast, saturation and hue, each with probability 1/2.
    5. Rescale and normalize with the processor's numbers.
    6. Pad to the crop's size at the bottom and at the right: pixels with the mean (0 after normalization), labels with
       the ignore index.

    Args:
        processor: the source of `rescale_factor`, `image_mean`, `image_std` and the default `crop_size`.
        crop_size: (height, width) of the result, or one number for a square; None takes the processor's `size`.
        base_size: the length of the image's shorter side at factor 1 (see `scaled_size`); None takes the crop's
            shorter side.
        scale: the smallest and the largest factor.
        max_class_share: the largest share of a class in the crop's pixels that are not ignored; 1 accepts the first
            crop with a pixel that is not ignored.
        flip: the probability of a horizontal flip.
        photometric: distort colours; images without three channels are never distorted.
        ignore_index: the label of ignored pixels.

    Raises:
        ImportError: torchvision is not installed.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        processor: UperNetImageProcessor,
        crop_size: int | tuple[int, int] | None = None,
        *,
        base_size: int | None = None,
        scale: tuple[float, float] = (0.5, 2.0),
        max_class_share: float = 0.75,
        flip: float = 0.5,
        photometric: bool = True,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        _torchvision()
        if crop_size is None:
            # Crops must be of one size, also if the images keep their aspect ratios.
            edge = min(processor.size.values())
            crop_size = (processor.size.get("height", edge), processor.size.get("width", edge))
        self.crop_size = (crop_size, crop_size) if isinstance(crop_size, int) else (crop_size[0], crop_size[1])
        self.base_size = min(self.crop_size) if base_size is None else base_size
        if min(*self.crop_size, self.base_size) < 1:
            raise ValueError(f"crop_size {self.crop_size} and base_size {self.base_size} must be at least 1")
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale is {scale}; give the smallest and the largest factor, above 0")
        if not (0 < max_class_share <= 1 and 0 <= flip <= 1):
            raise ValueError(f"max_class_share {max_class_share} and flip {flip} must be shares of 1")
        self.scale = scale
        self.max_class_share = max_class_share
        self.flip = flip
        self.photometric = photometric
        self.ignore_index = ignore_index
        factor = processor.rescale_factor if processor.do_rescale else 1.0
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
        # (pixels * factor - mean) / std as one multiplication and one addition.
        self._multiplier = torch.tensor(factor / np.asarray(std), dtype=torch.float32).reshape(-1, 1, 1)
        self._addend = torch.tensor(-np.asarray(mean) / np.asarray(std), dtype=torch.float32).reshape(-1, 1, 1)

    def __call__(self, sample: Sample, generator: np.random.Generator) -> dict[str, Any]:
        """Augment a sample.

        Args:
            sample: the photo and its label map.
            generator: the source of all randomness: equal generators give equal results.

        Returns:
            `pixel_values`, float32 (C, height, width); `labels`, int64 (height, width); `name`, the sample's
            name.
        """
        functional = _torchvision()
        bilinear, nearest = functional.InterpolationMode.BILINEAR, functional.InterpolationMode.NEAREST_EXACT
        pixels = torch.from_numpy(np.array(sample.image)).permute(2, 0, 1)
        labels = torch.from_numpy(np.array(sample.label))[None]
        size = scaled_size(pixels.shape[1], pixels.shape[2], self.base_size, generator.uniform(*self.scale))
        labels = functional.resize(labels, size, nearest)
        top, left, height, width = self._crop(labels[0], generator)
        labels = functional.crop(labels, top, left, height, width)
        pixels = functional.resize(pixels, size, bilinear, antialias=True)
        pixels = functional.crop(pixels, top, left, height, width)
        if generator.random() < self.flip:
            pixels, labels = functional.horizontal_flip(pixels), functional.horizontal_flip(labels)
        if self.photometric and len(pixels) == 3:
            pixels = self._distort(pixels, generator)
        pixels = pixels * self._multiplier + self._addend
        padding = [0, 0, self.crop_size[1] - width, self.crop_size[0] - height]
        return {
            "pixel_values": functional.pad(pixels, padding, fill=0.0),
            "labels": functional.pad(labels.long(), padding, fill=self.ignore_index)[0],
            "name": sample.name,
        }

    def _crop(self, labels: torch.Tensor, generator: np.random.Generator) -> tuple[int, int, int, int]:
        """Return top, left, height and width of a crop of a label map (H, W)."""
        height, width = (min(have, want) for have, want in zip(labels.shape, self.crop_size, strict=True))
        for _ in range(10):
            top = int(generator.integers(labels.shape[0] - height + 1))
            left = int(generator.integers(labels.shape[1] - width + 1))
            inside = labels[top : top + height, left : left + width].long()
            counts = torch.bincount(inside[inside != self.ignore_index])
            if len(counts) and counts.max() <= self.max_class_share * counts.sum():
                break
        return top, left, height, width

    @staticmethod
    def _distort(pixels: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
        """Distort colours by the amounts of torchvision's `RandomPhotometricDistort`; channels are not exchanged."""
        functional = _torchvision()
        steps = [
            (functional.adjust_brightness, generator.uniform(0.875, 1.125)),
            (functional.adjust_saturation, generator.uniform(0.5, 1.5)),
            (functional.adjust_hue, generator.uniform(-0.05, 0.05)),
        ]
        # Contrast changes before or after saturation and hue, since the order changes the result.
        steps.insert(int(generator.choice([1, 3])), (functional.adjust_contrast, generator.uniform(0.5, 1.5)))
        for step, amount in steps:
            if generator.random() < 0.5:
                pixels = step(pixels, amount)
        return pixels


class TrainingDataset(Dataset[dict[str, Any]]):
    """Augmented samples that are reproducible: the key of an item is (epoch, index).

    The randomness of an item depends only on `seed`, epoch and index. Workers, ranks and restarts do not change it, so
    a resumed run continues with the same data.

    Args:
        samples: the dataset.
        transform: a function of a sample and a random generator that returns `pixel_values`, `labels` and `name`,
            such as a `TrainingTransform`.
        seed: the seed of all randomness.
    """

    def __init__(
        self, samples: SampleDataset, transform: Callable[[Sample, np.random.Generator], dict[str, Any]], seed: int = 0
    ) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        """Return the number of samples in an epoch."""
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Return the transformed sample of a pair (epoch, index)."""
        epoch, index = key
        return self.transform(self.samples[index], np.random.default_rng((self.seed, epoch, index)))


def _torchvision() -> Any:
    try:
        from torchvision.transforms.v2 import functional
    except ImportError as error:
        raise ImportError(f"augmentation needs torchvision ({error}): pip install 'fastuper[train]'") from None
    return functional

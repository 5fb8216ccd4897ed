"""Label maps of whole images: at one or several scales, with or without sliding windows and mirroring.

The views v of an image are its scales, each of them unmirrored and, with `flip`, mirrored. L_v are the logits of a
view, mirrored back if the view is mirrored. The label of a pixel is

    argmax_c  mean_v  softmax_c( L_v resampled to the label map's size )

and with a single view the argmax of its resampled logits. L_v are the model's logits at the view's size; with windows,
the mean of the logits of all windows that cover the pixel. Windows follow mmsegmentation's `slide_inference`, views its
test-time augmentation.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastuper.data.augment import scaled_size
from fastuper.data.images import image_size
from fastuper.inference.votes import View, Votes

if TYPE_CHECKING:
    from fastuper.data.processor import UperNetImageProcessor
    from fastuper.models.upernet import UperNetForSemanticSegmentation


class PredictionError(RuntimeError):
    """The model failed on images; the message names the images and the reason."""


class Prepared(NamedTuple):
    """An image that is ready for the model.

    Attributes:
        name: the image's name, in messages and beside its label map.
        scales: the pixels at each scale, float32 (C, height, width), normalised.
        target_size: (height, width) of the label map.
    """

    name: Hashable
    scales: list[torch.Tensor]
    target_size: tuple[int, int]


class Predictor:
    """Compute the label maps of images with a model and its processor.

    By default the processor resizes images to its own size. With `short_side` images keep their proportions. The
    shorter side gets this length, or less if the longer side would exceed four times the length (mmsegmentation's 2048
    x 512). With `window` and without `short_side` images keep their size.

    Args:
        model: the model, in evaluation mode.
        processor: the image processor, which resizes and normalizes.
        short_side: the length of the images' shorter side; None as above.
        window: (height, width) of windows that slide over the image, or one number for squares. Windows are never
            larger than the image. None for whole images.
        stride: (rows, columns) from a window to the next, or one number for both; None for two thirds of the window
            (341 of 512).
        scales: factors of the images' size.
        flip: add the mirrored image to the views.
        batch_size: the number of images, or of windows, in a batch. Only equal sizes share a batch.

    Raises:
        ValueError: an argument is out of range, or `stride` is given without `window`.
    """

    def __init__(
        self,
        model: UperNetForSemanticSegmentation,
        processor: UperNetImageProcessor,
        *,
        short_side: int | None = None,
        window: int | tuple[int, int] | None = None,
        stride: int | tuple[int, int] | None = None,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        batch_size: int = 1,
    ) -> None:
        self.model = model
        self.processor = processor
        self.short_side = short_side
        self.window = _pair("window", window)
        self.stride = _pair("stride", stride)
        self.scales = tuple(scales)
        self.flip = flip
        self.batch_size = batch_size
        if self.window is None and self.stride is not None:
            raise ValueError("stride is the distance of windows; give window too")
        if self.window is not None:
            self.stride = self.stride or (max(1, self.window[0] * 2 // 3), max(1, self.window[1] * 2 // 3))
            if self.stride[0] > self.window[0] or self.stride[1] > self.window[1]:
                raise ValueError(
                    f"stride {self.stride} leaves gaps between windows of {self.window}; give a smaller one"
                )
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"scales are {scales}; give factors above 0")
        if short_side is not None and short_side < 1:
            raise ValueError(f"short_side is {short_side}; give at least 1")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give at least 1")

    def __call__(
        self, images: Sequence[Any], target_sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[torch.Tensor]:
        """Return the label map of each image.

        Args:
            images: PIL images, or uint8 arrays (H, W, C).
            target_sizes: (height, width) of each label map; None for the images' sizes.

        Returns:
            Label maps (height, width), int64, on the model's device. With one class the labels are 1 (the class) and 0.

        Raises:
            PredictionError: the model failed, or its logits are not finite.
        """
        sizes = [image_size(image) for image in images] if target_sizes is None else target_sizes
        pairs = zip(images, sizes, strict=True)
        prepared = (self.prepare(image, index, size) for index, (image, size) in enumerate(pairs))
        return [labels for _, labels in self.predict(prepared)]

    def prepare(self, image: Any, name: Hashable, target_size: tuple[int, int]) -> Prepared:
        """Resize and normalize an image to each scale; threads or worker processes may do this ahead of `predict`."""
        height, width = image_size(image)
        if self.short_side is not None:
            height, width = scaled_size(height, width, self.short_side)
        elif self.window is None and self.processor.do_resize:
            height, width = self.processor.output_size(height, width)
        scales = []
        for scale in self.scales:
            size = (max(1, round(height * scale)), max(1, round(width * scale)))
            inputs = self.processor(
                images=[image],
                size=size,
                do_resize=size != image_size(image),
                input_data_format="channels_last",
                return_tensors="pt",
            )
            scales.append(inputs["pixel_values"][0])
        return Prepared(name, scales, target_size)

    @torch.no_grad()
    def predict(self, images: Iterable[Prepared]) -> Iterator[tuple[Hashable, torch.Tensor]]:
        """Yield the name and the label map of each image, in order; the images are read as they are needed.

        Memory holds the images of a batch and, with one view, the logits of as many rows as a window has. With several
        views it holds the sum of their probabilities too, at the label map's size.

        Raises:
            PredictionError: as in `__call__`.
        """
        if self.window is None and len(self.scales) == 1 and not self.flip:
            yield from self._whole(images)
            return
        waiting: deque[Votes] = deque()
        for jobs in _batches(self._jobs(images, waiting), self.batch_size):
            names = sorted({str(job.view.votes.name) for job in jobs})
            with _naming(names):
                logits = self.model(torch.stack([job.pixels() for job in jobs])).logits
                for job, window_logits in zip(jobs, logits, strict=True):
                    job.view.add(job.top, job.left, window_logits)
            del logits
            while waiting and waiting[0].is_done:
                votes = waiting.popleft()
                yield votes.name, votes.labels()

    def _whole(self, images: Iterable[Prepared]) -> Iterator[tuple[Hashable, torch.Tensor]]:
        """Yield the label maps of whole images by the model's `segment`, which never makes logits of full size."""
        for batch in _batches(images, self.batch_size):
            pixels = torch.stack([image.scales[0] for image in batch]).to(self.model.device, self.model.dtype)
            with _naming([str(image.name) for image in batch]):
                labels = self.model.segment(pixels, [image.target_size for image in batch])
            yield from zip((image.name for image in batch), labels, strict=True)

    def _jobs(self, images: Iterable[Prepared], waiting: deque[Votes]) -> Iterator[_Job]:
        """Yield the windows of all views of all images, and append each image's votes to `waiting`."""
        for image in images:
            votes = Votes(image.name, image.target_size, views=len(self.scales) * (2 if self.flip else 1))
            waiting.append(votes)
            for pixels in image.scales:
                for flipped in (False, True) if self.flip else (False,):
                    on_device = pixels.to(self.model.device, self.model.dtype)
                    view = View(votes, on_device.flip(-1) if flipped else on_device, flipped, self.window, self.stride)
                    for top in view.tops:
                        for left in view.lefts:
                            yield _Job(view, top, left)


class _Job(NamedTuple):
    """A window of a view."""

    view: View
    top: int
    left: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.view.window

    def pixels(self) -> torch.Tensor:
        height, width = self.view.window
        return self.view.pixels[:, self.top : self.top + height, self.left : self.left + width]


@contextmanager
def _naming(names: Sequence[str]) -> Iterator[None]:
    """Raise errors of the model as `PredictionError`, with the names of its images."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise PredictionError(f"{', '.join(names)}: {error}") from error


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield batches of at most `size` consecutive items of one shape."""
    for _, same in groupby(items, key=_shape):
        batch = []
        for item in same:
            batch.append(item)
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch


def _shape(item: _Job | Prepared) -> tuple[int, ...]:
    return item.shape if isinstance(item, _Job) else tuple(item.scales[0].shape)


def _pair(name: str, value: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if value is None:
        return None
    pair = (value, value) if isinstance(value, int) else (value[0], value[1])
    if min(pair) < 1:
        raise ValueError(f"{name} is {value}; give (height, width), both at least 1, or one number for a square")
    return pair

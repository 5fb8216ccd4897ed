"""Label maps of whole images, of windows that slide over them, of several scales, and mirrored.

With the views v of an image (each scale, as it is and mirrored), and L_v the logits of a view, the label of a pixel is

    argmax_c  mean_v  softmax_c( resampled to the label map's size( L_v ) )

where a mirrored view's logits have been mirrored back; of one view alone it is the argmax of the resampled logits. The
logits of a view are the model's, at the view's size; with windows, the mean at each pixel of those of all windows that
cover it. These are mmsegmentation's `slide_inference` and test-time augmentation.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional as F

from fastuper.data.augment import scaled_size
from fastuper_kernels.cpu.band import Band
from fastuper_kernels.ops.upsample_cross_entropy import as_two_classes

if TYPE_CHECKING:
    from fastuper import UperNetForSemanticSegmentation, UperNetImageProcessor

STRIP_ROWS = 32
"""Rows of logits, resampled to the label map's size, that are made at a time: so that they take little memory."""


class PredictionError(RuntimeError):
    """The model failed on images; the message names them and the reason."""


class Prepared(NamedTuple):
    """An image as the model takes it.

    Attributes:
        name: what to call it, in messages and beside its label map.
        scales: the pixels at each scale, float32 (C, height, width), normalised.
        target_size: (height, width) of its label map.
    """

    name: Hashable
    scales: list[torch.Tensor]
    target_size: tuple[int, int]


class Predictor:
    """Finds the label maps of images, with a model and its processor.

    The images are resized as the processor does it. With `short_side` they keep their proportions instead: the shorter
    side becomes so long, unless the longer one would have more than four times as much (mmsegmentation's 2048 x 512).
    With `window` and without `short_side` they keep their own size.

    Args:
        model: in evaluation mode.
        processor: what resizes and normalizes.
        short_side: the length of the images' shorter side.
        window: (height, width) of windows that slide over the image, or one number for squares; windows larger than
            the image are as large as that.
        stride: how far a window is from the next, likewise; two thirds of the window where None (341 of 512).
        scales: factors of the images' size.
        flip: whether the images are looked at mirrored as well.
        batch_size: how many images, or windows of images, go through the model together; only equal sizes do.

    Raises:
        ValueError: an argument has no meaning.
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
            raise ValueError("stride is how far windows are apart; give window too")
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
            target_sizes: (height, width) of each label map; the images' own sizes where None.

        Returns:
            Label maps (height, width), int64, on the model's device. For one class: 1 where it is, and 0.

        Raises:
            PredictionError: the model failed, or its logits are not finite.
        """
        sizes = [_size(image) for image in images] if target_sizes is None else target_sizes
        pairs = zip(images, sizes, strict=True)
        prepared = (self.prepare(image, index, size) for index, (image, size) in enumerate(pairs))
        return [labels for _, labels in self.predict(prepared)]

    def prepare(self, image: Any, name: Hashable, target_size: tuple[int, int]) -> Prepared:
        """Resize and normalize an image to each scale; what can be done beforehand, in threads or workers."""
        height, width = _size(image)
        if self.short_side is not None:
            height, width = scaled_size(height, width, self.short_side)
        elif self.window is None and self.processor.do_resize:
            height, width = self.processor.size["height"], self.processor.size["width"]
        scales = []
        for scale in self.scales:
            size = (max(1, round(height * scale)), max(1, round(width * scale)))
            inputs = self.processor(
                images=[image],
                size=size,
                do_resize=size != _size(image),
                input_data_format="channels_last",
                return_tensors="pt",
            )
            scales.append(inputs["pixel_values"][0])
        return Prepared(name, scales, target_size)

    @torch.no_grad()
    def predict(self, images: Iterable[Prepared]) -> Iterator[tuple[Hashable, torch.Tensor]]:
        """Yield the name and the label map of each image, in order; images are asked for as they are needed.

        Memory is that of the images of a batch: with one view, of the rows that a window covers; with several, the sum
        of their probabilities at the label map's size beside it.

        Raises:
            PredictionError: as `__call__`.
        """
        if self.window is None and len(self.scales) == 1 and not self.flip:
            yield from self._whole(images)
            return
        waiting: deque[_Votes] = deque()
        for jobs in _batches(self._jobs(images, waiting), self.batch_size):
            names = sorted({str(job.view.votes.name) for job in jobs})
            with _naming(names):
                logits = self.model(torch.stack([job.pixels() for job in jobs])).logits
                for job, one in zip(jobs, logits, strict=True):
                    job.view.add(job.top, job.left, one)
            del logits
            while waiting and waiting[0].is_done:
                votes = waiting.popleft()
                yield votes.name, votes.labels()

    def _whole(self, images: Iterable[Prepared]) -> Iterator[tuple[Hashable, torch.Tensor]]:
        """Yield the label maps of whole images: `segment`, which never has logits of full size, is enough."""
        for batch in _batches(images, self.batch_size):
            pixels = torch.stack([image.scales[0] for image in batch]).to(self.model.device, self.model.dtype)
            with _naming([str(image.name) for image in batch]):
                labels = self.model.segment(pixels, [image.target_size for image in batch])
            yield from zip((image.name for image in batch), labels, strict=True)

    def _jobs(self, images: Iterable[Prepared], waiting: deque[_Votes]) -> Iterator[_Job]:
        """Yield what has to go through the model, and put every image's votes into the queue."""
        for image in images:
            votes = _Votes(image.name, image.target_size, views=len(self.scales) * (2 if self.flip else 1))
            waiting.append(votes)
            for pixels in image.scales:
                for flipped in (False, True) if self.flip else (False,):
                    on_device = pixels.to(self.model.device, self.model.dtype)
                    view = _View(votes, on_device.flip(-1) if flipped else on_device, flipped, self.window, self.stride)
                    for top in view.tops:
                        for left in view.lefts:
                            yield _Job(view, top, left)


class _Job(NamedTuple):
    """A window of a view."""

    view: _View
    top: int
    left: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.view.window

    def pixels(self) -> torch.Tensor:
        height, width = self.view.window
        return self.view.pixels[:, self.top : self.top + height, self.left : self.left + width]


class _View:
    """One view of an image: its windows' logits become those of the view, which go to the votes row by row.

    Windows come from the top to the bottom. What the next row of windows does not reach is done with, so that as many
    rows are held as a window has.
    """

    def __init__(
        self,
        votes: _Votes,
        pixels: torch.Tensor,
        flipped: bool,
        window: tuple[int, int] | None,
        stride: tuple[int, int] | None,
    ) -> None:
        self.votes = votes
        self.pixels = pixels
        self.flipped = flipped
        height, width = pixels.shape[1:]
        self.size = (height, width)
        self.window = self.size if window is None else (min(window[0], height), min(window[1], width))
        self.tops = _starts(height, self.window[0], stride[0] if stride else height)
        self.lefts = _starts(width, self.window[1], stride[1] if stride else width)
        self.top = 0  # of the rows that are held
        self.held: torch.Tensor | None = None
        self.resampled = _Rows(height, votes)

    def add(self, top: int, left: int, logits: torch.Tensor) -> None:
        """Add a window's logits (classes, height, width)."""
        # A sum takes a tenth of the time; one that overflows costs the longer look alone.
        if not logits.sum(dtype=torch.float32).isfinite() and not logits.isfinite().all():
            raise ValueError("the logits are not finite, so that labels would mean nothing: the weights are not either")
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.window == self.size:
            self._pass_on(logits)
            return
        rows, columns = self.window
        if self.held is None:
            self.held = logits.new_zeros(len(logits), rows, self.size[1])
        elif top > self.top:
            done = top - self.top
            self._pass_on(self.held[:, :done])
            kept = self.held[:, done:].clone()
            self.held.zero_()[:, : rows - done] = kept
            self.top = top
        self.held[:, :, left : left + columns] += logits
        if top == self.tops[-1] and left == self.lefts[-1]:
            self._pass_on(self.held)
            self.held = None

    def _pass_on(self, rows: torch.Tensor) -> None:
        """Divide rows, of which the first is `self.top`, by how many windows cover each pixel; resample and count."""
        if self.window != self.size:
            vertical = _coverage(self.tops, self.window[0], self.size[0])[self.top : self.top + rows.shape[1]]
            horizontal = _coverage(self.lefts, self.window[1], self.size[1])
            rows /= (vertical[:, None] * horizontal).to(rows)  # in place: nothing else is done with them
        self.resampled.add(rows, self.flipped)


class _Rows:
    """Resamples a map to the label map's size (bilinear), as its rows arrive."""

    def __init__(self, height: int, votes: _Votes) -> None:
        self.votes = votes
        band = Band.bilinear(height, votes.size[0])
        # Row i is between the rows low[i] and high[i], so much nearer to the one or the other.
        self.low, self.high = band.first, (band.first + 1).clamp(max=height - 1)
        self.nearness = band.weights[:, 1]
        self.held: torch.Tensor | None = None
        self.first = 0  # of the rows that are held
        self.done = 0  # rows of the result

    def add(self, rows: torch.Tensor, flipped: bool) -> None:
        """Take the next rows (classes, rows, width) and hand on what follows from them."""
        held = rows if self.held is None else torch.cat([self.held, rows], dim=1)
        height, width = self.votes.size
        while self.done < height:
            part = slice(self.done, min(self.done + STRIP_ROWS, height))
            if int(self.high[part.stop - 1]) >= self.first + held.shape[1]:
                break
            above, below = (
                held.index_select(1, (index[part] - self.first).to(held.device)) for index in (self.low, self.high)
            )
            strip = torch.lerp(above, below, self.nearness[part, None].to(held))
            if strip.shape[2] != width:
                strip = F.interpolate(strip[None], size=(strip.shape[1], width), mode="bilinear")[0]
            self.votes.add(self.done, strip.flip(-1) if flipped else strip)
            self.done = part.stop
        if self.done == height:
            self.held = None
        else:  # a copy: a view would hold on to all the rows that came
            first = min(int(self.low[self.done]), self.first + held.shape[1])
            self.held, self.first = held[:, first - self.first :].clone(), first


class _Votes:
    """The label map of one image, from the logits of all its views as their rows arrive."""

    def __init__(self, name: Hashable, size: tuple[int, int], views: int) -> None:
        self.name = name
        self.size = size
        self.views = views
        self.missing = views * size[0]  # rows
        self.result: torch.Tensor | None = None  # of one view the labels, of several the sum of their probabilities

    @property
    def is_done(self) -> bool:
        return self.missing == 0

    def add(self, start: int, logits: torch.Tensor) -> None:
        """Count rows of a view's logits (classes, rows, width), of which the first is `start`."""
        logits = as_two_classes(logits[None])[0]
        rows = slice(start, start + logits.shape[1])
        if self.views == 1:
            if self.result is None:
                self.result = torch.empty(self.size, dtype=torch.int64, device=logits.device)
            self.result[rows] = logits.argmax(0)
        else:
            if self.result is None:
                self.result = logits.new_zeros(len(logits), *self.size)
            self.result[:, rows] += logits.softmax(0)
        self.missing -= logits.shape[1]

    def labels(self) -> torch.Tensor:
        assert self.result is not None
        return self.result if self.views == 1 else self.result.argmax(0)


@contextmanager
def _naming(names: Sequence[str]) -> Iterator[None]:
    """Give what the model fails with the names of its images."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise PredictionError(f"{', '.join(names)}: {error}") from error


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield neighbours of one shape, at most so many at a time."""
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


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Return where windows begin along one axis; the last is moved back to end with the image."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [min(index * stride, length - window) for index in range(count)]


def _coverage(starts: Sequence[int], window: int, length: int) -> torch.Tensor:
    """Return how many windows cover each position of an axis, (length,)."""
    positions = torch.arange(length)
    return sum(((start <= positions) & (positions < start + window)).long() for start in starts)  # type: ignore[return-value]


def _pair(name: str, value: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if value is None:
        return None
    pair = (value, value) if isinstance(value, int) else (value[0], value[1])
    if min(pair) < 1:
        raise ValueError(f"{name} is {value}; give (height, width), both at least 1, or one number for a square")
    return pair


def _size(image: Any) -> tuple[int, int]:
    """Return (height, width) of a PIL image or an array (H, W, C)."""
    return (image.height, image.width) if hasattr(image, "height") else tuple(image.shape[:2])

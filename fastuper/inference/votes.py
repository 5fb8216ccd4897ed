"""The sums of inference: windows become a view's logits, views become label maps, a few rows at a time.

`Votes` makes an image's label map from its views. `View` sums up the logits of a view's windows. `RowResampler`
resamples a view's logits to the label map's size. Rows are passed on once no further window reaches them: memory holds
the logits of as many rows as a window has.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch.nn import functional as F

from fastuper_kernels.cpu.band import Band
from fastuper_kernels.ops.upsample_argmax import label_dtype
from fastuper_kernels.ops.upsample_cross_entropy import as_two_classes

STRIP_ROWS = 32
"""The number of label map rows that are computed at a time; more rows need more memory."""


class Votes:
    """The label map of one image, from the logits of all its views.

    With one view, a pixel's label is the argmax of the logits; with several views, the argmax of the sum of their
    probabilities.

    Args:
        name: the image's name.
        size: (height, width) of the label map.
        views: the number of views.
    """

    def __init__(self, name: Hashable, size: tuple[int, int], views: int) -> None:
        self.name = name
        self.size = size
        self.views = views
        self.missing = views * size[0]  # rows of logits that have not been added
        self.result: torch.Tensor | None = None  # labels of one view, or the sum of several views' probabilities

    @property
    def is_done(self) -> bool:
        """True if all rows of all views have been added."""
        return self.missing == 0

    def add(self, start: int, logits: torch.Tensor) -> None:
        """Add rows `start`, `start + 1`, ... of a view's logits, (classes, rows, width)."""
        logits = as_two_classes(logits[None])[0]
        rows = slice(start, start + logits.shape[1])
        if self.views == 1:
            if self.result is None:
                self.result = torch.empty(self.size, dtype=label_dtype(len(logits)), device=logits.device)
            self.result[rows] = logits.argmax(0)
        else:
            if self.result is None:
                self.result = logits.new_zeros(len(logits), *self.size)
            self.result[:, rows] += logits.softmax(0)
        self.missing -= logits.shape[1]

    def labels(self) -> torch.Tensor:
        """Return the label map, (height, width), of `label_dtype`; all rows must have been added."""
        assert self.result is not None
        if self.views == 1:
            return self.result
        labels = torch.empty(self.size, dtype=label_dtype(len(self.result)), device=self.result.device)
        for start in range(0, len(labels), STRIP_ROWS):  # argmax returns int64
            strip = slice(start, start + STRIP_ROWS)
            labels[strip] = self.result[:, strip].argmax(0)
        return labels


class View:
    """A view of an image: the image at one scale, mirrored or not, and the sum of its windows' logits.

    Args:
        votes: the votes of the image.
        pixels: the view's pixels, (channels, height, width).
        flipped: the pixels are mirrored; the logits are mirrored back.
        window: (height, width) of the windows; None for one window of the view's size. Larger windows are as large as
            the view.
        stride: (rows, columns) between windows; None with one window.

    Attributes:
        tops, lefts: the first rows and the first columns of the windows. Windows are added from the top to the bottom.
        window: (height, width) of the windows.
    """

    def __init__(
        self,
        votes: Votes,
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
        self.tops = window_starts(height, self.window[0], stride[0] if stride else height)
        self.lefts = window_starts(width, self.window[1], stride[1] if stride else width)
        self.top = 0  # the first row in `held`
        self.held: torch.Tensor | None = None  # sums of logits, (classes, rows of a window, width)
        self.resampler = RowResampler(height, votes)

    def add(self, top: int, left: int, logits: torch.Tensor) -> None:
        """Add the logits (classes, height, width) of the window at (top, left).

        Raises:
            ValueError: the logits are not finite.
        """
        # The sum takes a tenth of the time of the full test, which runs only if the sum is not finite (or overflows).
        if not logits.sum(dtype=torch.float32).isfinite() and not logits.isfinite().all():
            raise ValueError("the logits are not finite, so labels would be meaningless; check the model's weights")
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
        """Divide rows from `self.top` on by the number of windows over each pixel, and resample them."""
        if self.window != self.size:
            vertical = _coverage(self.tops, self.window[0], self.size[0])[self.top : self.top + rows.shape[1]]
            horizontal = _coverage(self.lefts, self.window[1], self.size[1])
            rows /= (vertical[:, None] * horizontal).to(rows)  # in place: these sums are not needed again
        self.resampler.add(rows, self.flipped)


class RowResampler:
    """Resample a map to the label map's size (bilinear) while its rows arrive, and add the result to the votes.

    Args:
        height: the number of the map's rows.
        votes: the votes of the image.
    """

    def __init__(self, height: int, votes: Votes) -> None:
        self.votes = votes
        band = Band.bilinear(height, votes.size[0])
        # Row i of the result is (1 - weight[i]) x row low[i] + weight[i] x row high[i] of the map.
        self.low, self.high = band.first, (band.first + 1).clamp(max=height - 1)
        self.weight = band.weights[:, 1]
        self.held: torch.Tensor | None = None  # rows of the map that are still needed
        self.first = 0  # the first row in `held`
        self.done = 0  # the number of finished rows of the result

    def add(self, rows: torch.Tensor, flipped: bool) -> None:
        """Add the map's next rows (classes, rows, width), and pass on all rows of the result that they complete."""
        held = rows if self.held is None else torch.cat([self.held, rows], dim=1)
        height, width = self.votes.size
        while self.done < height:
            part = slice(self.done, min(self.done + STRIP_ROWS, height))
            if int(self.high[part.stop - 1]) >= self.first + held.shape[1]:
                break
            above, below = (
                held.index_select(1, (index[part] - self.first).to(held.device)) for index in (self.low, self.high)
            )
            strip = torch.lerp(above, below, self.weight[part, None].to(held))
            if strip.shape[2] != width:
                strip = F.interpolate(strip[None], size=(strip.shape[1], width), mode="bilinear")[0]
            self.votes.add(self.done, strip.flip(-1) if flipped else strip)
            self.done = part.stop
        if self.done == height:
            self.held = None
        else:  # a copy: a view would keep all the rows in memory
            first = min(int(self.low[self.done]), self.first + held.shape[1])
            self.held, self.first = held[:, first - self.first :].clone(), first


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return the first positions of windows along an axis; the last window ends with the axis."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [min(index * stride, length - window) for index in range(count)]


def _coverage(starts: Sequence[int], window: int, length: int) -> torch.Tensor:
    """Return the number of windows over each position of an axis, (length,)."""
    positions = torch.arange(length)
    return sum(((start <= positions) & (positions < start + window)).long() for start in starts)  # type: ignore[return-value]

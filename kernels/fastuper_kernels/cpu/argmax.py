"""`upsample_argmax` by PyTorch's operators, tile by tile: the resampled logits are never held whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import torch

from fastuper_kernels.cpu.band import Block, bilinear_chain, blocks_of
from fastuper_kernels.dispatch.modes import is_eager, is_ordinary, without_autocast

# Rows and columns of labels per tile, and bytes of resampled logits at a time: they stay in a core's own cache.
ROWS, COLUMNS = 64, 64
BLOCK_BYTES = 2 << 20


def argmax(
    logits: torch.Tensor,
    sizes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    first: int = 0,
    corners: tuple[bool, ...] = (),
) -> torch.Tensor:
    """Return `upsample_argmax` of checked, ordinary logits (B, classes, H, W), on any device, without gradients.

    `corners` is `align_corners` of each size, or empty if it is False for all; as in all functions of this file.
    """
    logits = finite(logits[:, first:])
    labels = logits.new_empty((len(logits), *sizes[-1]), dtype=dtype)
    with torch.no_grad(), without_autocast(logits):
        for image, result in zip(logits, labels, strict=True):
            _label(tiles(image, sizes, corners), len(image), result, first)
    return labels


def vote(maps: Sequence[torch.Tensor], size: tuple[int, int], dtype: torch.dtype, first: int = 0) -> torch.Tensor:
    """Return the best class from `first` on of the mean of several maps' probabilities, of ordinary logits.

    Each map of logits (B, classes, h, w) is resampled to `size`; its softmax over all classes has the probabilities.
    """
    maps = [finite(logits) for logits in maps]
    labels = maps[0].new_empty((len(maps[0]), *size), dtype=dtype)
    with torch.no_grad(), without_autocast(labels):
        for *images, result in zip(*maps, labels, strict=True):
            for tile in zip(*(tiles(image, [size]) for image in images), strict=True):
                for rows, parts in _strips(tile):
                    votes = reduce(torch.add, (part.softmax(-1) for part in parts))
                    result[rows, tile[0].columns] = votes[..., first:].argmax(-1) + first
    return labels


def argmax_in_slices(
    maps: Sequence[torch.Tensor],
    sizes: Sequence[tuple[int, int]],
    groups: torch.Tensor,
    slices: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    corners: tuple[bool, ...] = (),
) -> torch.Tensor:
    """Return `upsample_argmax` with groups, of checked, ordinary logits, on any device, without gradients.

    Several maps vote: the label has the largest mean of the probabilities, by the softmax over the pixel's slice.
    Logits are resampled only in tiles that read them.
    """
    maps = [finite(logits) for logits in maps]
    labels = maps[0].new_zeros((len(maps[0]), *sizes[-1]), dtype=dtype)
    with torch.no_grad(), without_autocast(labels):
        for *images, group, result in zip(*maps, groups, labels, strict=True):
            for tile in zip(*(tiles(image, sizes, corners) for image in images), strict=True):
                place = tile[0].rows, tile[0].columns
                _label_in_slices(tile, numbers_of(group[place], len(slices)), slices, result[place])
    return labels


def slice_table(slices: Sequence[tuple[int, int]], groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the channels of each group's slice, (*groups, longest slice), padded, and a mask of what is no padding.

    An empty slice counts as channel 0, so that a result exists. Groups without a slice have empty ones.
    """
    slices = [*slices, (0, 0)]
    start = torch.tensor([first if first < last else 0 for first, last in slices], device=groups.device)
    length = torch.tensor([max(last - first, 1) for first, last in slices], device=groups.device)
    place = torch.arange(max(last - first for first, last in slices) or 1, device=groups.device)
    table, valid = start[:, None] + place.minimum(length[:, None] - 1), place < length[:, None]
    numbers = numbers_of(groups, len(slices) - 1)
    return table[numbers], valid[numbers]


def numbers_of(groups: torch.Tensor, count: int) -> torch.Tensor:
    """Return groups in int64; groups that are not in [0, count) become `count`."""
    groups = groups.long()
    return groups.masked_fill((groups < 0) | (groups >= count), count)


def finite(logits: torch.Tensor) -> torch.Tensor:
    """Return the logits with large numbers in place of infinities and NaN: zero times infinity would be NaN.

    Float16 becomes float32: the replacements must be larger than every float16.
    """
    if logits.dtype == torch.float16:
        logits = logits.float()
    if is_eager() and is_ordinary(logits) and logits.device.type == "cpu":
        # The sum finds infinities and NaN in very little time. If finite logits overflow the sum, they are only copied.
        total = logits.sum(dtype=torch.promote_types(logits.dtype, torch.float32))
        if total.isfinite():
            return logits
    # Half of the largest number: the weights may add up to a little more than 1, and must not make infinities again.
    limit = torch.finfo(logits.dtype).max / 2
    # This is `nan_to_num`, which OpenVINO cannot convert.
    return logits.masked_fill(~logits.isfinite(), limit).masked_fill(logits == -torch.inf, -limit)


class Tile(NamedTuple):
    """Some rows and columns of labels, and what they read of a map of logits (H, W, classes)."""

    row_block: Block
    column_block: Block
    source: torch.Tensor

    @property
    def rows(self) -> slice:
        """The tile's rows."""
        return slice(self.row_block.start, self.row_block.stop)

    @property
    def columns(self) -> slice:
        """The tile's columns."""
        return slice(self.column_block.start, self.column_block.stop)

    def of(self, classes: torch.Tensor) -> Tile:
        """Return the tile with some of the classes."""
        return self._replace(source=self.source.index_select(2, classes))

    def strips(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield a few rows at a time and their resampled logits, (rows, columns, classes)."""
        lines, _, classes = self.source.shape
        # The resampling runs first along the columns of the few input rows, then along the rows.
        wide = torch.bmm(self.column_block.matrix.expand(lines, -1, -1), self.source).flatten(1)
        step = max(1, BLOCK_BYTES // (wide.shape[1] * wide.element_size()))
        start, stop, matrix = self.row_block.start, self.row_block.stop, self.row_block.matrix
        for first in range(start, stop, step):
            last = min(first + step, stop)
            yield slice(first, last), (matrix[first - start : last - start] @ wide).view(last - first, -1, classes)


def tiles(image: torch.Tensor, sizes: Sequence[tuple[int, int]], corners: tuple[bool, ...] = ()) -> Iterator[Tile]:
    """Yield the tiles of the label map of one image (classes, H, W)."""
    _, h, w = image.shape
    dtype = torch.promote_types(image.dtype, torch.float32)
    heights, widths = (h, *(size[0] for size in sizes)), (w, *(size[1] for size in sizes))
    rows = blocks_of(bilinear_chain, (heights, corners), dtype, image.device, size=ROWS)
    columns = blocks_of(bilinear_chain, (widths, corners), dtype, image.device, size=COLUMNS)
    for block in rows:
        # The classes are last: PyTorch's argmax over neighbours is several times faster than over distant values.
        lines = image[:, block.first : block.last].permute(1, 2, 0).to(dtype).contiguous()
        for part in columns:
            yield Tile(block, part, lines[:, part.first : part.last])


def _strips(same: Sequence[Tile]) -> Iterator[tuple[slice, list[torch.Tensor]]]:
    """Yield a few rows at a time and their resampled logits in the same tile of each map."""
    for strips in zip(*(tile.strips() for tile in same), strict=True):
        yield strips[0][0], [strip for _, strip in strips]


def _label(tiles_of_image: Iterator[Tile], classes: int, labels: torch.Tensor, first: int) -> None:
    """Write the labels (height, width) of one image from its tiles, whose classes count from `first`."""
    all_classes = torch.arange(classes, device=labels.device)
    for tile in tiles_of_image:
        # On a GPU the host would have to wait for the number of rivals.
        rivals = _rivals(tile.source) if labels.device.type == "cpu" else all_classes
        for rows, full in (tile.of(rivals) if len(rivals) < classes else tile).strips():
            labels[rows, tile.columns] = (rivals + first)[full.argmax(dim=-1)]


def _label_in_slices(
    same: Sequence[Tile], groups: torch.Tensor, slices: Sequence[tuple[int, int]], labels: torch.Tensor
) -> None:
    """Write the labels of the same tile of each map, from the groups (rows, columns) of its pixels, by `numbers_of`."""
    wanted = [last > first for first, last in slices]
    if groups.device.type == "cpu":  # On a GPU the host would have to wait for the groups.
        counts = torch.bincount(groups.flatten(), minlength=len(slices)).tolist()
        wanted = [has and count > 0 for has, count in zip(wanted, counts, strict=False)]
    if not any(wanted):
        return
    # The wanted classes in one row, and the place of each group's slice in it.
    classes: list[int] = []
    places = []
    for want, (first, last) in zip(wanted, slices, strict=True):
        places.append((len(classes), len(classes) + (last - first if want else 0)))
        classes += range(first, last) if want else ()
    chosen = torch.tensor(classes, device=groups.device)
    table, valid = slice_table(places, groups)
    start = same[0].rows.start
    for rows, parts in _strips([tile.of(chosen) for tile in same]):
        inside = slice(rows.start - start, rows.stop - start)
        own = [part.gather(-1, table[inside]).masked_fill(~valid[inside], -torch.inf) for part in parts]
        votes = own[0] if len(own) == 1 else reduce(torch.add, (part.softmax(-1) for part in own))
        labels[inside] = votes.argmax(-1)


def _rivals(source: torch.Tensor) -> torch.Tensor:
    """Return, in order, the classes that may be the best somewhere between the pixels of `source` (H, W, classes).

    A resampled logit is a mean of these pixels. So a class whose greatest logit is below the least logit of another
    class is never the best. Classes within rounding of that bound stay among the rivals.
    """
    pixels = source.flatten(0, 1)
    most, least = pixels.amax(0), pixels.amin(0)
    rounding = 32 * torch.finfo(source.dtype).eps * torch.maximum(most.max().abs(), least.min().abs())
    return (most >= least.max() - rounding).nonzero().squeeze(1)

"""`upsample_argmax` by PyTorch's operators, block by block: the resampled logits are never held whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastuper_kernels.cpu.band import bilinear_chain, blocks_of
from fastuper_kernels.dispatch.modes import is_eager, is_ordinary, without_autocast

# Rows and columns of labels per block, and bytes of resampled logits at a time: they stay in a core's own cache.
ROWS, COLUMNS = 64, 64
BLOCK_BYTES = 2 << 20


def argmax(logits: torch.Tensor, sizes: Sequence[tuple[int, int]], dtype: torch.dtype) -> torch.Tensor:
    """Return `upsample_argmax` of checked, ordinary logits (B, classes, H, W), on any device, without gradients."""
    logits = finite(logits)
    labels = logits.new_empty((len(logits), *sizes[-1]), dtype=dtype)
    with torch.no_grad(), without_autocast(logits):
        for image, result in zip(logits, labels, strict=True):
            _label(image, sizes, result)
    return labels


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


def _label(image: torch.Tensor, sizes: Sequence[tuple[int, int]], labels: torch.Tensor) -> None:
    """Write the labels (height, width) of one image (classes, H, W)."""
    classes, h, w = image.shape
    # The classes are last: PyTorch's argmax over neighbouring values is several times faster than over distant values.
    x = image.permute(1, 2, 0).contiguous()
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()
    rows = blocks_of(bilinear_chain, ((h, *(size[0] for size in sizes)),), x.dtype, x.device, size=ROWS)
    columns = blocks_of(bilinear_chain, ((w, *(size[1] for size in sizes)),), x.dtype, x.device, size=COLUMNS)
    all_classes = torch.arange(classes, device=x.device)
    for block in rows:
        lines = x[block.first : block.last]
        for part in columns:
            # The resampling runs first along the columns of the few input rows, then along the rows.
            source = lines[:, part.first : part.last]
            # On a GPU the host would have to wait for the number of rivals.
            rivals = _rivals(source) if x.device.type == "cpu" else all_classes
            if len(rivals) < classes:
                source = source.index_select(2, rivals)
            wide = torch.bmm(part.matrix.expand(len(lines), -1, -1), source).flatten(1)
            step = max(1, BLOCK_BYTES // (wide.shape[1] * wide.element_size()))
            for start in range(block.start, block.stop, step):
                stop = min(start + step, block.stop)
                full = block.matrix[start - block.start : stop - block.start] @ wide
                best = full.view(stop - start, -1, len(rivals)).argmax(dim=-1)
                labels[start:stop, part.start : part.stop] = rivals[best]


def _rivals(source: torch.Tensor) -> torch.Tensor:
    """Return, in order, the classes that may be the best somewhere between the pixels of `source` (H, W, classes).

    A resampled logit is a mean of these pixels. So a class whose greatest logit is below the least logit of another
    class is never the best. Classes within rounding of that bound stay among the rivals.
    """
    pixels = source.flatten(0, 1)
    most, least = pixels.amax(0), pixels.amin(0)
    rounding = 32 * torch.finfo(source.dtype).eps * torch.maximum(most.max().abs(), least.min().abs())
    return (most >= least.max() - rounding).nonzero().squeeze(1)

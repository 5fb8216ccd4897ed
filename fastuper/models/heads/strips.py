"""UPerNet's head on large images on a CPU: the steps at the finest level run in strips of rows that fit its cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fastuper.models.heads.conv_module import is_fusible
from fastuper.models.norms import fold
from fastuper.models.untouched import is_supported_conv
from fastuper_kernels import conv_bn_relu
from fastuper_kernels.cpu.packs import fingerprint_once
from fastuper_kernels.cpu.upsampled_conv import UpsampledConv3x3
from fastuper_kernels.dispatch.modes import autocast, is_eager_inference

if TYPE_CHECKING:
    from fastuper.models.heads.upernet import UperNetHead

# Bytes of a strip of a map of hidden_size channels at the finest level. A strip fits a CPU's cache, and is so small
# that malloc reuses its memory for the next strip; with 16 MB the memory went back to the system each time, and each
# page of the next strip cost a page fault. Images with a larger map run in strips.
STRIP_BYTES = 8 << 20

# The kernels of the finest level's lateral convolution, its 3x3 convolution and the fusion. `tail` counts rows for
# these kernels: each 3x3 convolution reads one row above its strip and one below.
KERNELS = ((1, 1), (3, 3), (3, 3))


def apply_to(head: UperNetHead, feature_maps: Sequence[torch.Tensor]) -> bool:
    """Return True if a head should run in strips: large maps, eager inference on a CPU, untouched modules."""
    if len(feature_maps) < 2:
        return False
    x = feature_maps[0]
    return (
        is_eager_inference(x)
        and x.device.type == "cpu"
        and len(x) > 0
        and not head.align_corners
        and x.shape[2] * x.shape[3] * head.channels * x.element_size() > STRIP_BYTES
        and all(
            is_fusible(module, kernel) and module.is_foldable()
            for module, kernel in zip(_modules(head), KERNELS, strict=True)
        )
        and is_supported_conv(head.classifier)
        and head.classifier.kernel_size == (1, 1)
    )


def run(head: UperNetHead, feature_maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the head's logits (B, num_labels, H, W); the coarser levels are computed whole, as in its `forward`."""
    finest, *coarser, _ = feature_maps
    levels, merged = head.top_down(coarser, head.psp_forward(feature_maps))
    return tail(head, finest, merged, levels)


def tail(head: UperNetHead, x: torch.Tensor, above: torch.Tensor, levels: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute the finest level, fuse all levels and classify, one image and one strip at a time.

    No map of hidden_size channels at the finest level is ever whole. A strip stays in cache until the classifier has
    read it, and the next strip reuses its memory. No row is computed twice. Each step computes one row more below the
    strip than the step that reads it, and keeps its last two rows for the next strip.

    Args:
        head: `apply_to` returned True for this head.
        x: the finest feature map, (B, C, H, W).
        above: (B, hidden_size, h, w), the next level of the top-down path before its 3x3 convolution.
        levels: all levels but the finest, as the fusion takes them.

    Returns:
        (B, num_labels, H, W) in channels_last.
    """
    x, above, *levels = autocast(x, above, *levels)
    size = (len(x), head.classifier.weight.shape[0], *x.shape[2:])
    logits = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    with fingerprint_once():
        for image in zip(*(maps.split(1) for maps in (logits, x, above, *levels)), strict=True):
            _tail_of_image(head, *image)
    return logits


def _tail_of_image(
    head: UperNetHead, logits: torch.Tensor, x: torch.Tensor, above: torch.Tensor, *levels: torch.Tensor
) -> None:
    """Write the logits (1, num_labels, H, W) of one image."""
    lateral, fpn, fusion = _modules(head)
    (height, width), dim = x.shape[2:], head.channels
    channels = [fpn.conv.weight.shape[0], *(level.shape[1] for level in levels)]
    weight, *weights = fusion.conv.weight.split(channels, dim=1)
    scale, shift = fold(fusion.batch_norm)
    coarser = UpsampledConv3x3(levels, weights, (height, width))
    merged = _Rows(height, lambda strip: lateral.fused(x[:, :, strip[0] : strip[1]], upsampled=above, strip=strip))
    finest = _Rows(height, lambda strip: fpn.fused(merged.held, strip=strip))

    step = max(STRIP_BYTES // (width * dim * x.element_size()) // 16 * 16, 16)
    for start in range(0, height, step):
        stop = min(start + step, height)
        merged.extend_to(stop + 2)
        finest.extend_to(stop + 1)
        addend = coarser.rows(start, stop)
        fused = conv_bn_relu(finest.held, weight, scale, shift, addend=addend, strip=(start, stop, height))
        logits[:, :, start:stop] = head.classify(fused)


class _Rows:
    """The rows of a map that the next step reads: the last two rows of the strip before, and this strip's rows.

    Args:
        height: of the map.
        compute: returns the rows (1, C, stop - start, W) of a strip (start, stop, height).
    """

    held: torch.Tensor

    def __init__(self, height: int, compute: Callable[[tuple[int, int, int]], torch.Tensor]):
        self.height, self.compute, self.end = height, compute, 0

    def extend_to(self, stop: int) -> None:
        """Compute the rows up to `stop` (or the last one), and drop all older rows but two."""
        start, self.end = self.end, min(stop, self.height)
        rows = [self.held[:, :, -2:]] if start > 0 else []
        if start < self.end:
            rows.append(self.compute((start, self.end, self.height)))
        self.held = torch.cat(rows, dim=2)


def _modules(head: UperNetHead) -> Any:
    """Return the finest level's lateral convolution, its 3x3 convolution, and the fusion."""
    return head.lateral_convs[0], head.fpn_convs[0], head.fpn_bottleneck

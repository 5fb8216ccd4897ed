"""The heads: UPerNet's (https://arxiv.org/abs/1807.10221) and the auxiliary one; parameters are named as on the Hub.

No level is upsampled to be convolved: channels are mixed at a level's own resolution, and what comes out is resampled
(docs/idea.md). Where a module has been replaced or hooked, that module is called, on the input it always had.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastuper.models.gradient_checkpointing import Checkpointed
from fastuper.models.heads.conv_module import ConvModule, convolve_levels, is_fusible
from fastuper.models.untouched import fold, is_exactly, is_supported_conv
from fastuper_kernels import conv_bn_relu, pool_conv_bn_relu, pyramid_pool, upsample_add
from fastuper_kernels.cpu.packs import fingerprint_once
from fastuper_kernels.dispatch.modes import autocast, is_eager_inference
from fastuper_kernels.ops.pyramid_pool import grids
from fastuper_kernels.ops.upsampled_conv3x3 import UpsampledConv3x3

if TYPE_CHECKING:
    from fastuper.models.upernet_configuration import UperNetConfig

# Bytes of a strip of rows of hidden_size channels, at stride 4: in a CPU's cache, and so little that malloc gives the
# same memory to the next strip (with 16 MB it went back to the system in between, and each page cost a fault). Images
# whose map is larger run in strips.
STRIP_BYTES = 8 << 20


class UperNetHead(Checkpointed):
    """A feature pyramid with pyramid pooling on top, all of its levels fused at the finest one's size.

    Args:
        config: `hidden_size`, `pool_scales` and `num_labels`.
        in_channels: channels of the backbone's feature maps, finest first.
    """

    def __init__(self, config: UperNetConfig, in_channels: Sequence[int]):
        super().__init__()
        self.in_channels = list(in_channels)
        self.channels = dim = config.hidden_size
        *lower, top = self.in_channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvModule(top, dim, 1)) for scale in config.pool_scales
        )
        self.bottleneck = ConvModule(top + len(config.pool_scales) * dim, dim, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(channels, dim, 1) for channels in lower)
        self.fpn_convs = nn.ModuleList(ConvModule(dim, dim, 3) for _ in lower)
        self.fpn_bottleneck = ConvModule(len(self.in_channels) * dim, dim, 3)
        self.classifier = nn.Conv2d(dim, config.num_labels, kernel_size=1)

    def forward(self, feature_maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return logits (B, num_labels, H, W) at the first map's size.

        Args:
            feature_maps: (B, C_l, H_l, W_l) for each level, finest first; at strides 4, 8, 16, 32 of the image.

        Raises:
            ValueError: the maps are not as many as `in_channels`, or of other channels.
        """
        if [x.shape[1] if x.ndim == 4 else None for x in feature_maps] != self.in_channels:
            raise ValueError(
                f"the head takes maps (B, C, H, W) of in_channels={self.in_channels} channels, finest first, "
                f"got {[tuple(x.shape) for x in feature_maps]}"
            )
        *lower, top = feature_maps
        above = self.pyramid_pooling(top)
        levels = [above]
        for x, lateral, fpn in reversed(list(zip(lower[1:], self.lateral_convs[1:], self.fpn_convs[1:], strict=True))):
            above = self.add_lateral(lateral, x, above)
            levels.insert(0, fpn(above))
        if not lower:
            return self.classify(convolve_levels(self.fpn_bottleneck, levels))
        if self.runs_in_strips(lower[0]):
            return self.in_strips(lower[0], above, levels)
        finest = self.fpn_convs[0](self.add_lateral(self.lateral_convs[0], lower[0], above))
        return self.classify(convolve_levels(self.fpn_bottleneck, [finest, *levels]))

    def pyramid_pooling(self, x: torch.Tensor) -> torch.Tensor:
        """Return the top level (B, hidden_size, H, W): x (B, C, H, W) beside its averages over grids of each scale."""
        return convolve_levels(self.bottleneck, [x, *self.pooled(x)])

    def pooled(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the branches of the pyramid pooling, each (B, hidden_size, s, s)."""
        branches: Any = list(self.psp_modules)
        if not branches or not all(_is_pooling_branch(branch) for branch in branches):
            return [branch(x) for branch in branches]
        scales, modules = [branch[0].output_size for branch in branches], [branch[1] for branch in branches]
        widths = {module.conv.out_channels for module in modules}
        if not all(module.is_folding() for module in modules) or len(widths) > 1:
            means = grids(pyramid_pool(x, scales), scales)
            return [module(grid) for module, grid in zip(modules, means, strict=True)]
        norms = [fold(module.batch_norm) for module in modules]
        weights = [module.conv.weight for module in modules]
        cells = pool_conv_bn_relu(x, scales, weights, [scale for scale, _ in norms], [shift for _, shift in norms])
        return grids(cells, scales)

    def add_lateral(self, module: Any, x: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
        """Return a level (B, hidden_size, H, W) of the top-down path: its lateral conv, plus the level above it."""
        if is_fusible(module):
            return module.fused(x, upsampled=above)
        return upsample_add(above, module(x))

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        """Return the classes' logits (B, num_labels, H, W) of the fused levels (B, hidden_size, H, W)."""
        conv = self.classifier
        if is_supported_conv(conv):
            return conv_bn_relu(x, conv.weight, shift=conv.bias, relu=False)
        return conv(x)

    def runs_in_strips(self, x: torch.Tensor) -> bool:
        """Return whether the last steps for a map (B, C, H, W) are to run in strips of its rows."""
        modules: Any = (self.lateral_convs[0], self.fpn_convs[0], self.fpn_bottleneck)
        # A strip's rows are counted for these kernels.
        kernels = ((1, 1), (3, 3), (3, 3))
        return (
            is_eager_inference(x)
            and x.device.type == "cpu"
            and len(x) > 0
            and x.shape[2] * x.shape[3] * self.channels * x.element_size() > STRIP_BYTES
            and all(
                is_fusible(module, kernel) and module.is_folding()
                for module, kernel in zip(modules, kernels, strict=True)
            )
            and is_supported_conv(self.classifier)
            and self.classifier.kernel_size == (1, 1)
        )

    def in_strips(self, x: torch.Tensor, above: torch.Tensor, levels: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the logits (B, num_labels, H, W), one image and a few rows at a time.

        Maps of hidden_size channels at stride 4 are never whole: a strip of them stays in cache until the classifier
        has read it, and its memory is the next strip's. Nothing is computed twice: each step goes one row further down
        than the one that reads it, and keeps the last two rows, which the next strip reads again.

        Args:
            x: the finest feature map, (B, C, H, W).
            above: the level above it, before its FPN convolution.
            levels: all levels but the finest, as the fusion takes them.
        """
        x, above, *levels = autocast(x, above, *levels)
        size = (len(x), self.classifier.weight.shape[0], *x.shape[2:])
        logits = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        with fingerprint_once():
            for image in zip(*(maps.split(1) for maps in (logits, x, above, *levels)), strict=True):
                self._image_in_strips(*image)
        return logits

    def _image_in_strips(
        self, logits: torch.Tensor, x: torch.Tensor, above: torch.Tensor, *levels: torch.Tensor
    ) -> None:
        modules: Any = (self.lateral_convs[0], self.fpn_convs[0], self.fpn_bottleneck)
        lateral, fpn, fusion = modules
        (height, width), dim = x.shape[2:], self.channels
        step = max(STRIP_BYTES // (width * dim * x.element_size()) // 16 * 16, 16)
        channels = [fpn.conv.weight.shape[0], *(level.shape[1] for level in levels)]
        weight, *weights = fusion.conv.weight.split(channels, dim=1)
        coarser = UpsampledConv3x3(levels, weights, (height, width))
        scale, shift = fold(fusion.batch_norm)
        fine = inner = None
        fine_end = inner_end = 0
        for start in range(0, height, step):
            stop = min(start + step, height)
            first, fine_end = fine_end, min(stop + 2, height)
            if first < fine_end:
                rows = lateral.fused(x[:, :, first:fine_end], upsampled=above, strip=(first, fine_end, height))
            fine = _below(fine, rows if first < fine_end else None)
            first, inner_end = inner_end, min(stop + 1, height)
            inner = _below(inner, fpn.fused(fine, strip=(first, inner_end, height)) if first < inner_end else None)
            addend = coarser.rows(start, stop)
            fused = conv_bn_relu(inner, weight, scale, shift, addend=addend, strip=(start, stop, height))
            logits[:, :, start:stop] = self.classify(fused)


def _below(kept: torch.Tensor | None, rows: torch.Tensor | None) -> torch.Tensor:
    """Return the last two of the rows (B, C, h, W) that were kept, and the new ones."""
    parts = [] if kept is None else [kept[:, :, -2:]]
    return torch.cat(parts if rows is None else [*parts, rows], dim=2)


def _is_pooling_branch(branch: Any) -> bool:
    return (
        is_exactly(branch, nn.Sequential)
        and len(branch) == 2
        and is_exactly(branch[0], nn.AdaptiveAvgPool2d)
        and isinstance(branch[0].output_size, int)
        and is_fusible(branch[1], (1, 1))
    )

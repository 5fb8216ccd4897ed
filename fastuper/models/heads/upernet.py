"""The heads: UPerNet's (https://arxiv.org/abs/1807.10221) and the auxiliary one; parameters are named as on the Hub.

No level is upsampled to be convolved: channels are mixed at a level's own resolution, and what comes out is resampled
(docs/idea.md). Where a module has been replaced or hooked, that module is called, on the input it always had.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fastuper.models.configuration import UperNetConfig
from fastuper.models.gradient_checkpointing import Checkpointed
from fastuper.models.untouched import batch_norm, fold, is_exactly, is_fixed_norm, is_same_conv
from fastuper_kernels import conv_bn_relu, pool_conv_bn_relu, pyramid_pool, upsample_add, upsampled_conv3x3
from fastuper_kernels.cpu.packs import looked_at_once
from fastuper_kernels.dispatch.modes import autocast, is_eager_inference
from fastuper_kernels.ops.pyramid_pool import grids
from fastuper_kernels.ops.upsampled_conv3x3 import UpsampledConv3x3

# Bytes of a strip of rows of hidden_size channels, at stride 4: in a CPU's cache, and so little that malloc gives the
# same memory to the next strip (with 16 MB it went back to the system in between, and each page cost a fault). Images
# whose map is larger run in strips.
STRIP_BYTES = 8 << 20


class ConvModule(nn.Module):
    """Convolution without bias and with "same" padding, BatchNorm, ReLU."""

    def __init__(self, dim_in: int, dim: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim, kernel_size, padding=kernel_size // 2, bias=False)
        self.batch_norm = nn.BatchNorm2d(dim)
        self.activation = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C_in, H, W) to (B, C, H, W)."""
        return self.fused(x) if self.is_fusible() else self.activation(batch_norm(self.batch_norm, self.conv(x)))

    def is_fusible(self) -> bool:
        """Return whether `fused` is the same function: a matter of the convolution, as it calls the other two."""
        return is_same_conv(self.conv) and self.conv.bias is None

    def fused(
        self,
        x: torch.Tensor,
        coarser: Sequence[torch.Tensor] = (),
        *,
        upsampled: torch.Tensor | None = None,
        rows: tuple[int, int, int] | None = None,
    ) -> torch.Tensor:
        """Return the module's result for [x, *coarser resampled to x's size], plus `upsampled`, resampled.

        Nothing is resampled before it is convolved, and nothing is concatenated.

        Args:
            x: (B, C, H, W), for the convolution's first C input channels.
            coarser: maps (B, C_l, H_l, W_l) for its other ones.
            upsampled: (B, C_out, h, w), added at the end.
            rows: see `conv_bn_relu`; in evaluation alone.
        """
        weight, *weights = self.conv.weight.split([x.shape[1], *(level.shape[1] for level in coarser)], dim=1)
        addend = None
        if coarser:
            height, window = (x.shape[2], None) if rows is None else (rows[2], rows[:2])
            addend = upsampled_conv3x3(coarser, weights, (height, x.shape[3]), rows=window)
        if self.is_folding():
            scale, shift = fold(self.batch_norm)
            return conv_bn_relu(x, weight, scale, shift, addend=addend, upsampled=upsampled, rows=rows)
        y = self.activation(batch_norm(self.batch_norm, conv_bn_relu(x, weight, addend=addend, relu=False)))
        return y if upsampled is None else upsample_add(upsampled, y)

    def is_folding(self) -> bool:
        """Return whether the norm is a fixed scale and shift here and the activation ReLU, so that none is called.

        The norm is one in evaluation with gradients off, where it is a BatchNorm that nobody has touched.
        """
        return is_fixed_norm(self.batch_norm) and is_exactly(self.activation, nn.ReLU)


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
        if is_same_conv(conv):
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
            and is_same_conv(self.classifier)
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
        with looked_at_once():
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
                rows = lateral.fused(x[:, :, first:fine_end], upsampled=above, rows=(first, fine_end, height))
            fine = _below(fine, rows if first < fine_end else None)
            first, inner_end = inner_end, min(stop + 1, height)
            inner = _below(inner, fpn.fused(fine, rows=(first, inner_end, height)) if first < inner_end else None)
            addend = coarser.rows(start, stop)
            fused = conv_bn_relu(inner, weight, scale, shift, addend=addend, rows=(start, stop, height))
            logits[:, :, start:stop] = self.classify(fused)


def _below(kept: torch.Tensor | None, rows: torch.Tensor | None) -> torch.Tensor:
    """Return the last two of the rows (B, C, h, W) that were kept, and the new ones."""
    parts = [] if kept is None else [kept[:, :, -2:]]
    return torch.cat(parts if rows is None else [*parts, rows], dim=2)


def is_fusible(module: Any, kernel_size: tuple[int, int] | None = None) -> bool:
    """Return whether a module is a `ConvModule` that may be `fused`, and its kernel of the size that is given."""
    fusible = is_exactly(module, ConvModule) and module.is_fusible()
    return fusible and kernel_size in (None, module.conv.kernel_size)


def _is_pooling_branch(branch: Any) -> bool:
    return (
        is_exactly(branch, nn.Sequential)
        and len(branch) == 2
        and is_exactly(branch[0], nn.AdaptiveAvgPool2d)
        and isinstance(branch[0].output_size, int)
        and is_fusible(branch[1], (1, 1))
    )


def convolve_levels(module: Any, levels: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a module's result for its levels, resampled to the size of the first and concatenated."""
    if is_fusible(module, (3, 3)):
        return module.fused(levels[0], levels[1:])
    return module(concatenate_at_first_size(levels))


def concatenate_at_first_size(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Resample maps (bilinear) to the size of the first, and concatenate their channels."""
    first, *others = maps
    size = first.shape[2:]
    resampled = [F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in others]
    return torch.cat([first, *resampled], dim=1)


class FCNHead(Checkpointed):
    """The auxiliary head (https://arxiv.org/abs/1411.4038): a few 3x3 convolutions on one of the feature maps.

    Args:
        config: the `auxiliary_*` options and `num_labels`.
        in_channels: channels of the backbone's feature maps, finest first.
        in_index: which of the maps it reads.

    Raises:
        ValueError: there is no such map, or the options do not fit its channels.
    """

    def __init__(self, config: UperNetConfig, in_channels: Sequence[int], in_index: int = 2):
        super().__init__()
        if in_index >= len(in_channels):
            raise ValueError(
                f"the auxiliary head reads feature map {in_index + 1}, the backbone gives {len(in_channels)}: name "
                "more stages in out_features, or set use_auxiliary_head=False"
            )
        given, dim = config.auxiliary_in_channels, config.auxiliary_channels
        dim_in = in_channels[in_index] if given is None else given
        if dim_in != in_channels[in_index]:
            raise ValueError(
                f"auxiliary_in_channels={given}, but the map that it reads has {in_channels[in_index]} channels"
            )
        if config.auxiliary_num_convs == 0 and dim_in != dim:
            raise ValueError(
                f"without convolutions (auxiliary_num_convs=0) the {dim_in} channels of the feature map must be "
                f"auxiliary_channels, which is {dim}"
            )
        self.in_index = in_index
        self.convs: nn.Module = nn.Sequential(
            *(ConvModule(dim if i else dim_in, dim, 3) for i in range(config.auxiliary_num_convs))
        )
        self.conv_cat = ConvModule(dim_in + dim, dim, 3) if config.auxiliary_concat_input else None
        self.classifier = nn.Conv2d(dim, config.num_labels, kernel_size=1)

    def forward(self, feature_maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return logits (B, num_labels, H, W) at the size of the map that it reads."""
        x = feature_maps[self.in_index]
        out = self.convs(x)
        if self.conv_cat is not None:
            out = self.conv_cat(torch.cat([x, out], dim=1))
        return self.classifier(out)

"""UPerNet of segmentation_models_pytorch, accelerated: its decoder, and the classifier that follows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from segmentation_models_pytorch.base import heads, modules
from segmentation_models_pytorch.decoders.upernet import decoder as theirs
from segmentation_models_pytorch.decoders.upernet import model
from torch import nn

from fastuper.models.heads import strips
from fastuper.models.heads.conv_module import FusedConv, classify, convolve_levels
from fastuper.models.heads.pooling import PooledCells
from fastuper.models.heads.pyramid import add_lateral
from fastuper.models.heads.upernet import UperNetSteps
from fastuper.models.untouched import KNOWN, is_untouched
from fastuper.patch.accelerated import MODELS, Accelerated, KnownModel, why_not_fusible, why_touched_inside

KNOWN.add(theirs.LayerNorm2d)


class Conv2dReLU(Accelerated, FusedConv, modules.Conv2dReLU, replaces=modules.Conv2dReLU):
    """A convolution, a norm and ReLU: a BatchNorm and ReLU are fused, another norm is called."""

    @property
    def conv(self) -> Any:
        """The convolution."""
        return self[0]

    @property
    def batch_norm(self) -> Any:
        """The norm, of any class."""
        return self[1]

    @property
    def activation(self) -> Any:
        """The ReLU; Identity after an InPlaceABN."""
        return self[2]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (B, C_in, H, W) to (B, C, H, W)."""
        return FusedConv.forward(self, input)

    def why_not(self) -> str:
        """See `Accelerated.why_not`."""
        return why_not_fusible(self)


class PSPModule(Accelerated, PooledCells, theirs.PSPModule, replaces=theirs.PSPModule):
    """The pyramid pooling, and the convolution that fuses its cells with the map."""

    def branches(self) -> list[nn.Module]:
        """Return the branches."""
        return list(self.blocks)

    def forward(self, feature: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Map (B, C, H, W) to (B, decoder_channels, H, W)."""
        return convolve_levels(self.out_conv, [feature, *self.cells(feature)])


class FPNLateralBlock(Accelerated, theirs.FPNLateralBlock, replaces=theirs.FPNLateralBlock):
    """A lateral convolution, and the addition of the level above."""

    def forward(self, state_feature: torch.Tensor, lateral_feature: torch.Tensor) -> torch.Tensor:
        """Return the level (B, decoder_channels, H, W) of a map (B, C, H, W) and of the level above it."""
        return add_lateral(self.conv_norm_relu, lateral_feature, state_feature)


class UPerNetDecoder(Accelerated, UperNetSteps, theirs.UPerNetDecoder, replaces=theirs.UPerNetDecoder):
    """The decoder: UPerNet's head without the classifier. Its lists of blocks begin with the coarsest level."""

    @property
    def psp_modules(self) -> Any:
        """The pyramid pooling."""
        return self.psp

    @property
    def lateral_convs(self) -> list[nn.Module]:
        """The lateral convolutions, finest first; the whole block where it is touched."""
        blocks = reversed(self.fpn_lateral_blocks)
        own = FPNLateralBlock
        return [block.conv_norm_relu if isinstance(block, own) and is_untouched(block) else block for block in blocks]

    @property
    def fpn_convs(self) -> list[nn.Module]:
        """The convolutions of the levels, finest first."""
        return list(reversed(self.fpn_conv_blocks))

    @property
    def fpn_bottleneck(self) -> Any:
        """The convolution that fuses the levels."""
        return self.fusion_block

    is_container = True

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the fused levels (B, decoder_channels, H / 4, W / 4) of maps at strides 1, 2, 4, ..."""
        return self.segment(features[2:], {}, lambda fused: fused)

    def classified(self, features: Sequence[torch.Tensor], classifier: Any) -> torch.Tensor:
        """Return a classifier's logits (B, classes, H / 4, W / 4) of the fused levels."""
        outputs = {"logits": strips.Output("fused", (), classifier)}
        return self.segment(features[2:], outputs, partial(classify, classifier))

    def psp_forward(self, feature_maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """See `PyramidSteps.psp_forward`."""
        fused: torch.Tensor = self.psp(feature_maps[-1])
        return fused

    def top_down(self, maps: Sequence[torch.Tensor], pooled: torch.Tensor) -> list[torch.Tensor]:
        """See `PyramidSteps.top_down`."""
        merged = [pooled]
        for x, block in zip(reversed(maps), self.fpn_lateral_blocks, strict=False):
            merged.insert(0, block(merged[0], x))
        return merged


class SegmentationHead(Accelerated, heads.SegmentationHead, replaces=heads.SegmentationHead):
    """The classifier, the resampling to the image's size (bilinear, align_corners=True), and an activation."""

    def why_not(self) -> str:
        """See `Accelerated.why_not`."""
        return why_touched_inside(self, called=["2"])  # the activation

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (B, decoder_channels, H, W) to masks (B, classes, 4 H, 4 W)."""
        return self.resampled(classify(self[0], input))

    def resampled(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the masks of logits (B, classes, H, W)."""
        masks = logits.contiguous()  # classified in channels_last; so resampled, the masks would be too
        for module in list(self)[1:]:
            masks = module(masks)
        return masks


class UPerNet(Accelerated, model.UPerNet, replaces=model.UPerNet):
    """The model; on large images the decoder classifies strips of the finest level."""

    is_container = True

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Segment images (B, C, H, W), as `segmentation_models_pytorch.UPerNet.forward` does.

        Returns:
            Masks (B, classes, H, W); with a classification head, a tuple of the masks and its logits.
        """
        if not (torch.jit.is_tracing() or torch.compiler.is_compiling()):
            self.check_input_shape(x)
        features = self.encoder(x)
        decoder, head = self.decoder, self.segmentation_head
        if isinstance(decoder, UPerNetDecoder) and isinstance(head, SegmentationHead) and is_untouched(decoder, head):
            masks = head.resampled(decoder.classified(features, head[0]))
        else:
            masks = head(decoder(features))
        return masks if self.classification_head is None else (masks, self.classification_head(features[-1]))


MODELS.append(
    KnownModel("segmentation_models_pytorch's UPerNet", model.UPerNet, "decoder", theirs.UPerNetDecoder),
)

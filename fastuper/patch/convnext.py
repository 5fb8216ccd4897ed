"""Transformers' ConvNeXt, accelerated: its blocks, and the stem, whose maps are channels_last."""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.convnext import modeling_convnext as theirs

from fastuper.models.backbones import rewrites
from fastuper.models.backbones.layers import channels_last
from fastuper.patch.accelerated import Accelerated, why_another_class, why_touched_inside
from fastuper.patch.transformers_layers import know_drops, know_norms

know_drops(theirs.ConvNextDropPath)
know_norms(theirs.ConvNextLayerNorm)


class ConvNextLayer(Accelerated, theirs.ConvNextLayer, replaces=theirs.ConvNextLayer):
    """A block."""

    rewrite = rewrites.CONVNEXT_LAYER

    def why_not(self) -> str:
        """See `Accelerated.why_not`."""
        return why_touched_inside(self) or why_another_class(self, nn.Linear, "pwconv1", "pwconv2")

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to the same shape."""
        if rewrites.apply_to(self, features):
            return rewrites.run(self, features)
        return super().forward(features)


class ConvNextEmbeddings(Accelerated, theirs.ConvNextEmbeddings, replaces=theirs.ConvNextEmbeddings):
    """The stem. The layout of its result is the layout of all maps of the backbone."""

    is_container = True

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed an image (B, C, H, W)."""
        return super().forward(channels_last(pixel_values))

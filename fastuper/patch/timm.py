"""timm's ConvNeXt block, accelerated in any model that `accelerate` knows."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import activations, mlp, norm
from timm.layers.drop import DropPath
from timm.models import convnext as theirs
from torch import nn

from fastuper.models.backbones import rewrites
from fastuper.models.untouched import KNOWN, is_exactly
from fastuper.patch.accelerated import Accelerated, why_touched_inside

rewrites.LAYER_NORMS.add(norm.LayerNorm)
rewrites.DROPS.add(DropPath)
rewrites.FUSED_ACTIVATIONS.update({activations.GELU: "gelu", activations.GELUTanh: "gelu_tanh"})
KNOWN.update({norm.LayerNorm, DropPath, mlp.Mlp, *rewrites.FUSED_ACTIVATIONS})


class ConvNeXtBlock(Accelerated, theirs.ConvNeXtBlock, replaces=theirs.ConvNeXtBlock):
    """One block: depthwise convolution, norm, two pointwise layers, LayerScale, residual."""

    rewrite = rewrites.CONVNEXT_LAYER

    @property
    def dwconv(self) -> Any:
        """The depthwise convolution."""
        return self.conv_dw

    @property
    def layernorm(self) -> Any:
        """The norm."""
        return self.norm

    @property
    def pwconv1(self) -> Any:
        """The first pointwise layer."""
        return self.mlp.fc1

    @property
    def act(self) -> Any:
        """The activation between the pointwise layers."""
        return self.mlp.act

    @property
    def pwconv2(self) -> Any:
        """The second pointwise layer."""
        return self.mlp.fc2

    @property
    def layer_scale_parameter(self) -> Any:
        """LayerScale, (C,); None without."""
        return self.gamma

    def why_not(self) -> str:
        """See `Accelerated.why_not`."""
        return why_touched_inside(self) or self._why_other()

    def _why_other(self) -> str:
        """Return what the block computes besides a textbook block, in words; "" if nothing."""
        if self.use_conv_mlp or not is_exactly(self.mlp, mlp.Mlp):
            return f"no way for {'a convolutional MLP' if self.use_conv_mlp else type(self.mlp).__name__}"
        if not (is_exactly(self.shortcut, nn.Identity) and is_exactly(self.mlp.norm, nn.Identity)):
            return "no way for its shortcut, or for a norm in its MLP"
        if any(
            (drop.training and drop.p > 0) or not is_exactly(drop, nn.Dropout)
            for drop in (self.mlp.drop1, self.mlp.drop2)
        ):
            return "its MLP has dropout"
        return "timm's fast norm is on" if getattr(self.norm, "_fast_norm", False) else ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to (B, C', H', W'); the same shape unless the shortcut is a module."""
        if not self._why_other() and rewrites.apply_to(self, x):
            return rewrites.run(self, x)
        result: torch.Tensor = theirs.ConvNeXtBlock.forward(self, x)
        return result

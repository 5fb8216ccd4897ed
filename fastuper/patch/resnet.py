"""Transformers' ResNet, accelerated: its convolutions with their norms, and the layout of its maps."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers.models.resnet import modeling_resnet as theirs

from fastuper.models.backbones import rewrites
from fastuper.models.backbones.layers import channels_last
from fastuper.models.untouched import is_supported_conv
from fastuper.patch.accelerated import Accelerated, why_touched_inside
from fastuper.patch.transformers_layers import know

know(theirs.ResNetEmbeddings)

IS_OF_5 = "hidden_states" in inspect.signature(theirs.ResNetConvLayer.forward).parameters
"""Whether the arguments have the names of Transformers 5."""


def _why_not(layer: Any) -> str:
    if why := why_touched_inside(layer):
        return why
    if is_supported_conv(layer.convolution):
        return ""
    (rows, columns), stride = layer.convolution.kernel_size, layer.convolution.stride[0]
    return f"convolution: fastuper has no faster way for {rows}x{columns} at stride {stride}"


class ResNetConvLayer(Accelerated, theirs.ResNetConvLayer, replaces=theirs.ResNetConvLayer):
    """A convolution, BatchNorm and activation, in one step."""

    rewrite = rewrites.RESNET_CONV_LAYER

    def why_not(self) -> str:
        """See `Accelerated.why_not`."""
        return _why_not(self)

    if IS_OF_5:

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            """Map (B, C_in, H, W) to (B, C, ceil(H / stride), ceil(W / stride))."""
            if rewrites.apply_to(self, hidden_states):
                return rewrites.run(self, hidden_states)
            return super().forward(hidden_states)

    else:

        def forward(self, input: torch.Tensor) -> torch.Tensor:  # type: ignore[misc]
            """Map (B, C_in, H, W) to (B, C, ceil(H / stride), ceil(W / stride))."""
            if rewrites.apply_to(self, input):
                return rewrites.run(self, input)
            return super().forward(input)


class ResNetShortCut(Accelerated, theirs.ResNetShortCut, replaces=theirs.ResNetShortCut):
    """A convolution and BatchNorm, in one step."""

    rewrite = rewrites.RESNET_CONV_LAYER
    activation = nn.Identity()

    def why_not(self) -> str:
        """See `Accelerated.why_not`."""
        return _why_not(self)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (B, C_in, H, W) to (B, C, ceil(H / stride), ceil(W / stride))."""
        if rewrites.apply_to(self, input):
            return rewrites.run(self, input)
        return super().forward(input)


class ResNetBackbone(Accelerated, theirs.ResNetBackbone, replaces=theirs.ResNetBackbone):
    """The backbone. Its maps are channels_last, unless hidden states are asked for: callers may reshape those."""

    is_container = True

    def forward(self, pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the feature maps of an image (B, C, H, W); the arguments are those of the class that it replaces."""
        asked = args[0] if args else kwargs.get("output_hidden_states")
        asked = self.config.output_hidden_states if asked is None else asked
        return super().forward(pixel_values if asked else channels_last(pixel_values), *args, **kwargs)

    # Transformers 5 reads which of its arguments were given, so they are handed on as they are.
    forward.__signature__ = inspect.signature(theirs.ResNetBackbone.forward)  # type: ignore[attr-defined]

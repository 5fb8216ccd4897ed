"""mmsegmentation's UPerHead, accelerated, and the convolutions of mmcv in its model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmcv.cnn.bricks import conv_module
from mmengine.model import utils
from mmengine.utils.dl_utils.parrots_wrapper import SyncBatchNorm
from mmseg.models.decode_heads import psp_head, uper_head
from mmseg.models.segmentors.encoder_decoder import EncoderDecoder
from torch import nn

from fastuper.models.heads import strips
from fastuper.models.heads.conv_module import FusedConv, classify
from fastuper.models.heads.pooling import PooledCells
from fastuper.models.heads.upernet import UperNetSteps
from fastuper.models.norms import FIXED_IN_EVALUATION
from fastuper.models.untouched import KNOWN, is_exactly
from fastuper.patch.accelerated import MODELS, Accelerated, KnownModel, why_not_fusible

ORDER = ("conv", "norm", "act")
"""The order of the steps that is fused."""

# `mmengine.model.revert_sync_batchnorm` puts the second class in place of the first.
NORMS = (SyncBatchNorm, utils._BatchNormXd)
KNOWN.update(NORMS)
FIXED_IN_EVALUATION.update(NORMS)


class ConvModule(Accelerated, FusedConv, conv_module.ConvModule, replaces=conv_module.ConvModule):
    """A convolution, a norm and an activation; as in mmcv where one is missing, or the order or padding is another."""

    @property
    def batch_norm(self) -> Any:
        """The norm, of any class."""
        return self.norm

    @property
    def activation(self) -> Any:
        """The activation, of any class."""
        return self.activate

    def is_fusible(self) -> bool:
        """See `FusedConv.is_fusible`."""
        return not self._why_other() and super().is_fusible()

    def why_not(self) -> str:
        """See `Accelerated.why_not`."""
        return self._why_other() or why_not_fusible(self)

    def _why_other(self) -> str:
        """Return what mmcv does here besides a convolution, a norm and an activation, in words; "" if nothing."""
        if self.order != ORDER:
            return f"its order is {', '.join(self.order)}"
        if not (self.with_norm and self.with_activation):
            return f"it has no {'activation' if self.with_norm else 'norm'}"
        if self.with_explicit_padding:
            return f"it pads by {type(self.padding_layer).__name__}"
        return "mmcv fuses its norm (efficient_conv_bn_eval)" if self.efficient_conv_bn_eval_forward else ""

    def forward(self, x: torch.Tensor, activate: bool = True, norm: bool = True) -> torch.Tensor:
        """Map (B, C_in, H, W) to (B, C, H, W).

        Args:
            x: the map.
            activate: False to leave out the activation.
            norm: False to leave out the norm.
        """
        if activate and norm and self.is_fusible():
            return self.fused(x)
        result: torch.Tensor = conv_module.ConvModule.forward(self, x, activate, norm)
        return result


class PPM(Accelerated, PooledCells, psp_head.PPM, replaces=psp_head.PPM):
    """The pyramid pooling."""

    def branches(self) -> list[nn.Module]:
        """Return the branches."""
        return list(self)


class UPerHead(Accelerated, UperNetSteps, uper_head.UPerHead, replaces=uper_head.UPerHead):
    """UPerNet's head, over the maps at `in_index`."""

    feature_norms = None

    @property
    def classifier(self) -> Any:
        """The classifier."""
        return self.conv_seg

    is_container = True

    def forward(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return logits (B, out_channels, H, W) at the finest map's size; `inputs` are the backbone's maps."""
        # In channels_last, the resampling to the image's size would take longer.
        return UperNetSteps.forward(self, self._transform_inputs(inputs)).contiguous()

    def outputs(self) -> dict[str, strips.Output]:
        """See `UperNetSteps.outputs`."""
        dropout = self.dropout
        drops = dropout is not None and (dropout.training or not is_exactly(dropout, nn.Dropout2d))
        return {} if drops else super().outputs()

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        """See `UperNetSteps.classify`."""
        return classify(self.conv_seg, x if self.dropout is None else self.dropout(x))


MODELS.append(
    KnownModel("mmsegmentation's EncoderDecoder", EncoderDecoder, "decode_head", uper_head.UPerHead),
)

"""The auxiliary head: FCN (https://arxiv.org/abs/1411.4038)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastuper.models.gradient_checkpointing import Checkpointed
from fastuper.models.heads.conv_module import ConvModule

if TYPE_CHECKING:
    from fastuper.models.upernet_configuration import UperNetConfig


class FCNHead(Checkpointed):
    """A few 3x3 convolutions and a classifier on one of the feature maps (https://arxiv.org/abs/1411.4038).

    Args:
        config: the `auxiliary_*` options and `num_labels`.
        in_channels: channels of the backbone's feature maps, finest first.
        in_index: index of the map that the head reads.

    Raises:
        ValueError: there is no such map, or the options do not fit its channels.
    """

    classifier: Any  # a convolution, or a user's module

    def __init__(self, config: UperNetConfig, in_channels: Sequence[int], in_index: int = 2):
        super().__init__()
        if in_index >= len(in_channels):
            raise ValueError(
                f"the auxiliary head reads feature map {in_index + 1}, but the backbone returns {len(in_channels)}: "
                "name more stages in out_features, or set use_auxiliary_head=False"
            )
        given, dim = config.auxiliary_in_channels, config.auxiliary_channels
        dim_in = in_channels[in_index] if given is None else given
        if dim_in != in_channels[in_index]:
            raise ValueError(
                f"auxiliary_in_channels={given}, but feature map {in_index + 1} has {in_channels[in_index]} channels; "
                "set auxiliary_in_channels=None to take these"
            )
        if config.auxiliary_num_convs == 0 and dim_in != dim:
            raise ValueError(
                f"without convolutions (auxiliary_num_convs=0), auxiliary_channels must be the {dim_in} channels of "
                f"the feature map, got {dim}"
            )
        self.config = config
        self.in_index = in_index
        self.in_channels, self.channels = dim_in, dim
        self.num_convs, self.concat_input = config.auxiliary_num_convs, config.auxiliary_concat_input
        self.convs: nn.Module = nn.Sequential(
            *(ConvModule(dim if i else dim_in, dim, 3) for i in range(config.auxiliary_num_convs))
        )
        self.conv_cat = ConvModule(dim_in + dim, dim, 3) if config.auxiliary_concat_input else None
        self.classifier = nn.Conv2d(dim, config.num_labels, kernel_size=1)

    def forward(self, feature_maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return logits (B, num_labels, H, W) at the size of map `in_index`; `feature_maps` are (B, C_l, H_l, W_l)."""
        x = feature_maps[self.in_index]
        out = self.convs(x)
        if self.conv_cat is not None:
            out = self.conv_cat(torch.cat([x, out], dim=1))
        return self.classifier(out)

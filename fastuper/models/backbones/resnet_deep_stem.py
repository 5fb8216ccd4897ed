"""ResNet with a stem of three 3x3 convolutions: the encoder of Unified Perceptual Parsing, and mmsegmentation's V1c.

It is ResNet-C of https://arxiv.org/abs/1812.01187. Modules and parameters are named as a ResNet's; the stem's are
`embedder.embedder.0`, `.1` and `.2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from torch import nn

from fastuper.models.backbones.layers import STAGES
from fastuper.models.backbones.registry import register
from fastuper.models.backbones.resnet import (
    DEPTHS,
    NAMES,
    ResNetBackbone,
    ResNetConfig,
    ResNetConvLayer,
    ResNetEmbeddings,
)
from fastuper.models.configuration import as_list


class DeepStemResNetConfig(ResNetConfig):
    """ResNet with a deep stem; the defaults are the ResNet-50 of https://github.com/CSAILVision/unifiedparsing.

    mmsegmentation's ResNet-V1c has the same form, with `stem_widths=(32, 32, 64)`. Transformers has no such backbone.

    Args:
        stem_widths: channels of the stem's three convolutions; the first of them has stride 2.
        **values: see `ResNetConfig`. `embedding_size` is the last of `stem_widths`, and can be left out.

    Raises:
        ValueError: values contradict each other or are not valid; the message names them.
    """

    model_type = "resnet_deep_stem"

    def __init__(self, stem_widths: Sequence[int] = (64, 64, 128), **values: Any):
        self.stem_widths = as_list(stem_widths)
        # Widths that are no list, or an empty one, are refused by `check`.
        last = self.stem_widths[-1] if isinstance(self.stem_widths, list) and self.stem_widths else 0
        super().__init__(**{"embedding_size": last, **values})

    def check(self) -> None:
        """Check all values; see `Config.check`."""
        super().check()
        if len(self.stem_widths) != 3:
            raise ValueError(f"stem_widths={self.stem_widths} must be the channels of three convolutions")
        if self.embedding_size != self.stem_widths[-1]:
            raise ValueError(
                f"embedding_size={self.embedding_size} must be the last of stem_widths={self.stem_widths}; leave it out"
            )


class DeepStemEmbeddings(ResNetEmbeddings):
    """The stem: three 3x3 convolutions, the first of stride 2, then 3x3 max pooling of stride 2."""

    def stem(self, config: ResNetConfig) -> nn.Module:
        """Return the convolutions before the pooling."""
        assert isinstance(config, DeepStemResNetConfig)
        first, second, third = config.stem_widths
        return nn.Sequential(
            ResNetConvLayer(config.num_channels, first, 3, 2, config.hidden_act),
            ResNetConvLayer(first, second, 3, 1, config.hidden_act),
            ResNetConvLayer(second, third, 3, 1, config.hidden_act),
        )


class DeepStemResNetBackbone(ResNetBackbone):
    """ResNet with a deep stem; it returns the maps of the stages in `config.out_features`."""

    embeddings: ClassVar[type[ResNetEmbeddings]] = DeepStemEmbeddings


PRESETS = {
    name: partial(DeepStemResNetConfig, depths=depths, out_features=STAGES)
    for name, depths in (("resnet-50-deep-stem", [3, 4, 6, 3]), ("resnet-101-deep-stem", [3, 4, 23, 3]))
}

register("resnet_deep_stem", DeepStemResNetConfig, DeepStemResNetBackbone, presets=PRESETS, depths=DEPTHS, names=NAMES)

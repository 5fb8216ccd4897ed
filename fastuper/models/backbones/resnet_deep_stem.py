"""ResNets that Transformers lacks: with a deep stem, with averaged shortcuts, with other strides and dilations.

A deep stem has three 3x3 convolutions: the encoder of Unified Perceptual Parsing, mmsegmentation's V1c and V1d. It is
ResNet-C of https://arxiv.org/abs/1812.01187; with averaged shortcuts it is ResNet-D. Modules and parameters are named
as a ResNet's; a deep stem's are `embedder.embedder.0`, `.1` and `.2`.
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
    StagePlan,
)
from fastuper.models.configuration import as_list


class DeepStemResNetConfig(ResNetConfig):
    """ResNet with a deep stem; the defaults are the ResNet-50 of https://github.com/CSAILVision/unifiedparsing.

    mmsegmentation's ResNet-V1c has the same form, with `stem_widths=(32, 32, 64)`; V1d also has `avg_down=True`. Its
    dilated ResNets have `stem_widths=(64,)`, `strides` and `dilations`. Transformers has no such backbones.

    Args:
        stem_widths: channels of the stem's three 3x3 convolutions, the first of stride 2; one number for the 7x7
            convolution of a ResNet.
        avg_down: True if a shortcut averages squares of stride x stride pixels, and then convolves with stride 1.
        strides: the stride of each stage; None for a ResNet's, 1 and then 2.
        dilations: the dilation of the 3x3 convolutions of each stage; None for 1.
        contract_dilation: True to halve the dilation of the first block of a stage, if it is more than 1.
        multi_grid: the dilation of each block of the last stage, in place of the stage's; None for none.
        **values: see `ResNetConfig`. `embedding_size` is the last of `stem_widths`, and can be left out.

    Raises:
        ValueError: values contradict each other or are not valid; the message names them.
    """

    model_type = "resnet_deep_stem"

    def __init__(
        self,
        stem_widths: Sequence[int] = (64, 64, 128),
        avg_down: bool = False,
        strides: Sequence[int] | None = None,
        dilations: Sequence[int] | None = None,
        contract_dilation: bool = False,
        multi_grid: Sequence[int] | None = None,
        **values: Any,
    ):
        self.stem_widths = as_list(stem_widths)
        self.avg_down = avg_down
        self.strides = as_list(strides)
        self.dilations = as_list(dilations)
        self.contract_dilation = contract_dilation
        self.multi_grid = as_list(multi_grid)
        # Widths that are no list, or an empty one, are refused by `check`.
        last = self.stem_widths[-1] if isinstance(self.stem_widths, list) and self.stem_widths else 0
        super().__init__(**{"embedding_size": last, **values})

    def check(self) -> None:
        """Check all values; see `Config.check`."""
        super().check()
        if len(self.stem_widths) not in (1, 3):
            raise ValueError(f"stem_widths={self.stem_widths} must be the channels of three convolutions, or of one")
        if self.embedding_size != self.stem_widths[-1]:
            raise ValueError(
                f"embedding_size={self.embedding_size} must be the last of stem_widths={self.stem_widths}; leave it out"
            )
        for name, expected in (
            ("strides", len(self.depths)),
            ("dilations", len(self.depths)),
            ("multi_grid", self.depths[-1]),
        ):
            given = getattr(self, name)
            if given is not None and len(given) != expected:
                what = "blocks in the last stage" if name == "multi_grid" else "stages"
                raise ValueError(f"{name}={given} must be {expected} numbers, as many as {what}")
        if self.strides is not None and self.downsample_in_first_stage:
            raise ValueError("give either strides or downsample_in_first_stage, not both")

    def plans(self) -> list[StagePlan]:
        """Return the plan of each stage."""
        strides = [plan.stride for plan in super().plans()] if self.strides is None else self.strides
        dilations = [1] * len(self.depths) if self.dilations is None else self.dilations
        plans = []
        for stride, dilation, depth in zip(strides, dilations, self.depths, strict=True):
            first = dilation // 2 if self.contract_dilation and dilation > 1 else dilation
            plans.append(StagePlan(stride, (first, *[dilation] * (depth - 1)), self.avg_down))
        if self.multi_grid is not None:
            plans[-1] = StagePlan(strides[-1], tuple(self.multi_grid), self.avg_down)
        return plans


class DeepStemEmbeddings(ResNetEmbeddings):
    """The stem: three 3x3 convolutions, the first of stride 2, or one of 7x7; then 3x3 max pooling of stride 2."""

    def stem(self, config: ResNetConfig) -> nn.Module:
        """Return the convolutions before the pooling."""
        assert isinstance(config, DeepStemResNetConfig)
        if len(config.stem_widths) == 1:
            return super().stem(config)
        first, second, third = config.stem_widths
        return nn.Sequential(
            ResNetConvLayer(config.num_channels, first, 3, 2, config.hidden_act),
            ResNetConvLayer(first, second, 3, 1, config.hidden_act),
            ResNetConvLayer(second, third, 3, 1, config.hidden_act),
        )


class DeepStemResNetBackbone(ResNetBackbone):
    """A ResNet of a `DeepStemResNetConfig`; it returns the maps of the stages in `config.out_features`."""

    embeddings: ClassVar[type[ResNetEmbeddings]] = DeepStemEmbeddings


PRESETS = {
    name: partial(DeepStemResNetConfig, depths=depths, out_features=STAGES)
    for name, depths in (("resnet-50-deep-stem", [3, 4, 6, 3]), ("resnet-101-deep-stem", [3, 4, 23, 3]))
}

register("resnet_deep_stem", DeepStemResNetConfig, DeepStemResNetBackbone, presets=PRESETS, depths=DEPTHS, names=NAMES)

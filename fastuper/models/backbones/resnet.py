"""ResNet (https://arxiv.org/abs/1512.03385): configuration, network, presets, layer depths, checkpoint names.

Modules and parameters are named as in the Hub's checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from fastuper.io.messages import shown
from fastuper.models.backbones import rewrites
from fastuper.models.backbones.layers import STAGES, Backbone, Encoder, activation, channels_last, check_channels
from fastuper.models.backbones.registry import register, stage_depths
from fastuper.models.configuration import BackboneConfig, as_list
from fastuper.models.gradient_checkpointing import Checkpointed
from fastuper.models.norms import batch_norm
from fastuper.models.outputs import BackboneOutput
from fastuper.weights.transformers import Names


@dataclass(frozen=True)
class StagePlan:
    """What a stage's blocks do besides their widths.

    Attributes:
        stride: of the first block.
        dilations: of each block's 3x3 convolution; of a basic block's first convolution.
        averages: True if the first block's shortcut averages squares of stride x stride pixels before its convolution.
    """

    stride: int
    dilations: tuple[int, ...]
    averages: bool = False


class ResNetConfig(BackboneConfig):
    """ResNet (https://arxiv.org/abs/1512.03385); the defaults are ResNet-50.

    Args:
        num_channels: channels of an image.
        embedding_size: channels of the stem.
        hidden_sizes: channels of each stage.
        depths: the number of blocks of each stage.
        layer_type: "basic" (ResNet-18, -34) or "bottleneck" (ResNet-50 and deeper).
        hidden_act: the activation after the stem and each block; inside the blocks it is ReLU, as in Transformers.
        downsample_in_first_stage: True if the first stage halves the map too.
        downsample_in_bottleneck: True if a bottleneck's first 1x1 convolution has the stride, False for its 3x3.
        out_features: see `BackboneConfig`.
        out_indices: see `BackboneConfig`.
        **extra: see `Config`.

    Raises:
        ValueError: values contradict each other or are not valid; the message names them.
    """

    model_type = "resnet"
    layer_types: ClassVar[list[str]] = ["basic", "bottleneck"]

    def __init__(
        self,
        num_channels: int = 3,
        embedding_size: int = 64,
        hidden_sizes: Sequence[int] = (256, 512, 1024, 2048),
        depths: Sequence[int] = (3, 4, 6, 3),
        layer_type: str = "bottleneck",
        hidden_act: str = "relu",
        downsample_in_first_stage: bool = False,
        downsample_in_bottleneck: bool = False,
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **extra: Any,
    ):
        self.num_channels = num_channels
        self.embedding_size = embedding_size
        self.hidden_sizes = as_list(hidden_sizes)
        self.depths = as_list(depths)
        self.layer_type = layer_type
        self.hidden_act = hidden_act
        self.downsample_in_first_stage = downsample_in_first_stage
        self.downsample_in_bottleneck = downsample_in_bottleneck
        super().__init__(self.depths, out_features, out_indices, **extra)

    def check(self) -> None:
        """Check all values; see `Config.check`."""
        super().check()
        if self.layer_type not in self.layer_types:
            raise ValueError(f"layer_type={shown(self.layer_type)} must be one of {', '.join(self.layer_types)}")
        if len(self.hidden_sizes) != len(self.depths):
            raise ValueError(
                f"hidden_sizes={self.hidden_sizes} and depths={self.depths} must agree on the number of stages"
            )
        if self.layer_type == "bottleneck" and min(self.hidden_sizes) < 4:
            raise ValueError(f"hidden_sizes={self.hidden_sizes} must be at least 4 where layer_type is 'bottleneck'")

    def plans(self) -> list[StagePlan]:
        """Return the plan of each stage."""
        return [
            StagePlan(2 if i > 0 or self.downsample_in_first_stage else 1, (1,) * depth)
            for i, depth in enumerate(self.depths)
        ]


class ResNetConvLayer(nn.Module):
    """Convolution with "same" padding, BatchNorm, activation."""

    rewrite = rewrites.RESNET_CONV_LAYER

    def __init__(
        self, dim_in: int, dim: int, kernel_size: int = 3, stride: int = 1, act: str = "linear", dilation: int = 1
    ):
        super().__init__()
        padding = kernel_size // 2 * dilation
        self.convolution = nn.Conv2d(dim_in, dim, kernel_size, stride, padding, dilation, bias=False)
        self.normalization = nn.BatchNorm2d(dim)
        self.activation = activation(act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C_in, H, W) to (B, C, ceil(H / stride), ceil(W / stride))."""
        if rewrites.apply_to(self, x):
            return rewrites.run(self, x)
        return self.activation(batch_norm(self.normalization, self.convolution(x)))


class ResNetAveragedShortcut(ResNetConvLayer):
    """A shortcut that averages squares of stride x stride pixels, then convolves: ResNet-D."""

    def __init__(self, dim_in: int, dim: int, stride: int):
        super().__init__(dim_in, dim, 1)
        self.pooler = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C_in, H, W) to (B, C, ceil(H / stride), ceil(W / stride))."""
        return super().forward(self.pooler(x))


class ResNetEmbeddings(nn.Module):
    """The stem: 7x7 convolution of stride 2, then 3x3 max pooling of stride 2."""

    def __init__(self, config: ResNetConfig):
        super().__init__()
        self.embedder = self.stem(config)
        self.pooler = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.num_channels = config.num_channels

    def stem(self, config: ResNetConfig) -> nn.Module:
        """Return the convolution before the pooling."""
        return ResNetConvLayer(config.num_channels, config.embedding_size, 7, 2, config.hidden_act)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed an image (B, C, H, W) of any size.

        Raises:
            ValueError: the image does not have the channels that the convolution takes.
        """
        first = self.embedder[0] if isinstance(self.embedder, nn.Sequential) else self.embedder
        check_channels(pixel_values, getattr(first, "convolution", first))
        return self.pooler(self.embedder(channels_last(pixel_values)))


class ResNetLayer(Checkpointed):
    """One block: the convolutions of its type, a shortcut, and the activation of their sum."""

    def __init__(
        self, config: ResNetConfig, dim_in: int, dim: int, stride: int, dilation: int = 1, averages: bool = False
    ):
        super().__init__()
        self.shortcut: nn.Module = nn.Identity()
        if dim_in != dim or stride != 1:
            self.shortcut = (
                ResNetAveragedShortcut(dim_in, dim, stride) if averages else ResNetConvLayer(dim_in, dim, 1, stride)
            )
        # As in Transformers, hidden_act follows the stem and the sums; between convolutions the activation is ReLU.
        if config.layer_type == "basic":
            self.layer = nn.Sequential(
                ResNetConvLayer(dim_in, dim, 3, stride, "relu", dilation), ResNetConvLayer(dim, dim, 3)
            )
        else:
            strides = (stride, 1) if config.downsample_in_bottleneck else (1, stride)
            self.layer = nn.Sequential(
                ResNetConvLayer(dim_in, dim // 4, 1, strides[0], "relu"),
                ResNetConvLayer(dim // 4, dim // 4, 3, strides[1], "relu", dilation),
                ResNetConvLayer(dim // 4, dim, 1),
            )
        self.activation = activation(config.hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C_in, H, W) to (B, C, ceil(H / stride), ceil(W / stride))."""
        return self.activation(self.layer(x) + self.shortcut(x))


class ResNetStage(nn.Module):
    """The blocks; the first block changes the size and the channels."""

    def __init__(self, config: ResNetConfig, dim_in: int, dim: int, plan: StagePlan):
        super().__init__()
        first, *others = plan.dilations
        self.layers = nn.Sequential(
            ResNetLayer(config, dim_in, dim, plan.stride, first, plan.averages),
            *(ResNetLayer(config, dim, dim, 1, dilation) for dilation in others),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C_in, H, W) to (B, C, ceil(H / stride), ceil(W / stride))."""
        return self.layers(x)


class ResNetEncoder(Encoder):
    """The stages."""

    def __init__(self, config: ResNetConfig):
        super().__init__()
        sizes = [config.embedding_size, *config.hidden_sizes]
        self.stages = nn.ModuleList(
            ResNetStage(config, sizes[i], sizes[i + 1], plan) for i, plan in enumerate(config.plans())
        )

    def steps(
        self, x: torch.Tensor, output_attentions: bool = False, output_hidden_states: bool = False
    ) -> Iterator[tuple[torch.Tensor, None]]:
        """Yield the map (B, C, H, W) of the stem, which is x, and of each stage; a ResNet has no attentions.

        With `output_hidden_states`, maps are contiguous, as in Transformers: callers may reshape them. The next stage
        reads these maps, so that they get gradients.
        """
        x = x.contiguous() if output_hidden_states else x
        yield x, None
        for stage in self.stages:
            x = stage(channels_last(x)).contiguous() if output_hidden_states else stage(x)
            yield x, None


class ResNetBackbone(Backbone):
    """ResNet; it returns the maps of the stages in `config.out_features`."""

    config: ResNetConfig
    embeddings: ClassVar[type[ResNetEmbeddings]] = ResNetEmbeddings

    def __init__(self, config: ResNetConfig):
        super().__init__(config, [config.embedding_size, *config.hidden_sizes])
        self.embedder = self.embeddings(config)
        self.encoder = ResNetEncoder(config)

    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool = False, output_attentions: bool = False
    ) -> BackboneOutput:
        """Return the feature maps of an image (B, C, H, W). A ResNet has no attentions.

        Raises:
            ValueError: the image does not have the channels that the stem takes.
        """
        feature_maps, hidden_states = [], []
        steps = self.encode(self.encoder, self.embedder(pixel_values), output_hidden_states=output_hidden_states)
        for name, (x, _) in zip(self.stage_names, steps, strict=True):
            if name in self.out_features:
                feature_maps.append(channels_last(x) if output_hidden_states else x)
            if output_hidden_states:  # otherwise a map is freed when the next stage has read it
                hidden_states.append(x)
        return BackboneOutput(tuple(feature_maps), tuple(hidden_states) if output_hidden_states else None)

    def initialize_tensor(self, module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        """Fill one parameter or buffer with its initial value."""
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(tensor, mode="fan_out", nonlinearity="relu")
        else:
            super().initialize_tensor(module, name, tensor)


PRESETS = {
    name: partial(ResNetConfig, hidden_sizes=sizes, depths=depths, layer_type=layer_type, out_features=STAGES)
    for name, sizes, depths, layer_type in (
        ("resnet-18", [64, 128, 256, 512], [2, 2, 2, 2], "basic"),
        ("resnet-34", [64, 128, 256, 512], [3, 4, 6, 3], "basic"),
        ("resnet-50", [256, 512, 1024, 2048], [3, 4, 6, 3], "bottleneck"),
        ("resnet-101", [256, 512, 1024, 2048], [3, 4, 23, 3], "bottleneck"),
    )
}
DEPTHS = stage_depths(r"encoder\.stages\.(\d+)\.layers\.")
NAMES = Names(parts=("embedder", "encoder"))

register("resnet", ResNetConfig, ResNetBackbone, presets=PRESETS, depths=DEPTHS, names=NAMES)

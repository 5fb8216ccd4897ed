"""ResNet (https://arxiv.org/abs/1512.03385) as a backbone; parameters are named as in the Hub's checkpoints."""

from __future__ import annotations

import torch
from torch import nn

from fastuper.models.backbones.layers import Backbone, activation, channels_last, on_cpu_without_gradients
from fastuper.models.configuration import ResNetConfig
from fastuper.models.gradient_checkpointing import Checkpointed
from fastuper.models.outputs import BackboneOutput
from fastuper.models.untouched import batch_norm, fold, is_exactly, is_fixed_norm, is_supported_conv
from fastuper_kernels import conv_bn_relu


class ResNetConvLayer(nn.Module):
    """Convolution with "same" padding, BatchNorm, activation."""

    def __init__(self, dim_in: int, dim: int, kernel_size: int = 3, stride: int = 1, act: str = "linear"):
        super().__init__()
        self.convolution = nn.Conv2d(dim_in, dim, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.normalization = nn.BatchNorm2d(dim)
        self.activation = activation(act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C_in, H, W) to (B, C, ceil(H / stride), ceil(W / stride))."""
        if self._is_plain(x):
            relu = isinstance(self.activation, nn.ReLU)
            return conv_bn_relu(x, self.convolution.weight, *fold(self.normalization), relu=relu)
        return self.activation(batch_norm(self.normalization, self.convolution(x)))

    def _is_plain(self, x: torch.Tensor) -> bool:
        """Return whether `conv_bn_relu` is the same function, so that the norm and ReLU take no time of their own."""
        act = self.activation
        return (
            is_supported_conv(self.convolution)
            and self.convolution.bias is None
            and is_fixed_norm(self.normalization)
            and (is_exactly(act, nn.ReLU) or is_exactly(act, nn.Identity))
            and on_cpu_without_gradients(x, self.convolution)
        )


class ResNetEmbeddings(nn.Module):
    """The stem: 7x7 convolution of stride 2, then 3x3 max pooling of stride 2."""

    def __init__(self, config: ResNetConfig):
        super().__init__()
        self.embedder = ResNetConvLayer(config.num_channels, config.embedding_size, 7, 2, config.hidden_act)
        self.pooler = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed an image (B, C, H, W) of any size."""
        return self.pooler(self.embedder(channels_last(pixel_values)))


class ResNetLayer(Checkpointed):
    """One block: the convolutions of its type, a shortcut, and the activation of their sum."""

    def __init__(self, config: ResNetConfig, dim_in: int, dim: int, stride: int):
        super().__init__()
        changes_shape = dim_in != dim or stride != 1
        self.shortcut = ResNetConvLayer(dim_in, dim, 1, stride) if changes_shape else nn.Identity()
        # As the reference has it, hidden_act is the stem's and the sums' activation: between convolutions it is ReLU.
        if config.layer_type == "basic":
            self.layer = nn.Sequential(ResNetConvLayer(dim_in, dim, 3, stride, "relu"), ResNetConvLayer(dim, dim, 3))
        else:
            strides = (stride, 1) if config.downsample_in_bottleneck else (1, stride)
            self.layer = nn.Sequential(
                ResNetConvLayer(dim_in, dim // 4, 1, strides[0], "relu"),
                ResNetConvLayer(dim // 4, dim // 4, 3, strides[1], "relu"),
                ResNetConvLayer(dim // 4, dim, 1),
            )
        self.activation = activation(config.hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C_in, H, W) to (B, C, ceil(H / stride), ceil(W / stride))."""
        return self.activation(self.layer(x) + self.shortcut(x))


class ResNetStage(nn.Module):
    """Blocks, the first of which changes the size and the channels."""

    def __init__(self, config: ResNetConfig, dim_in: int, dim: int, stride: int, depth: int):
        super().__init__()
        self.layers = nn.Sequential(
            ResNetLayer(config, dim_in, dim, stride), *(ResNetLayer(config, dim, dim, 1) for _ in range(depth - 1))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C_in, H, W) to (B, C, ceil(H / stride), ceil(W / stride))."""
        return self.layers(x)


class ResNetEncoder(nn.Module):
    """The stages."""

    def __init__(self, config: ResNetConfig):
        super().__init__()
        sizes = [config.embedding_size, *config.hidden_sizes]
        self.stages = nn.ModuleList(
            ResNetStage(config, sizes[i], sizes[i + 1], 2 if i > 0 or config.downsample_in_first_stage else 1, depth)
            for i, depth in enumerate(config.depths)
        )


class ResNetBackbone(Backbone):
    """ResNet, returning the maps of the stages in `config.out_features`."""

    config: ResNetConfig

    def __init__(self, config: ResNetConfig):
        super().__init__(config, [config.embedding_size, *config.hidden_sizes])
        self.embedder = ResNetEmbeddings(config)
        self.encoder = ResNetEncoder(config)

    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool = False, output_attentions: bool = False
    ) -> BackboneOutput:
        """Return the feature maps of an image (B, C, H, W); a ResNet has no attentions.

        Raises:
            ValueError: the image has another number of channels than the configuration.
        """
        self.check_channels(pixel_values)
        x, feature_maps, hidden_states = pixel_values, [], []
        for name, step in zip(self.stage_names, [self.embedder, *self.encoder.stages], strict=True):
            x = step(x)
            if name in self.out_features:
                feature_maps.append(x)
            if output_hidden_states:  # they leave, and callers reshape them as they do the reference's
                hidden_states.append(x.contiguous())
        return BackboneOutput(tuple(feature_maps), tuple(hidden_states) if output_hidden_states else None)

    def initialize_tensor(self, module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        """Fill one parameter or buffer with its initial value."""
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(tensor, mode="fan_out", nonlinearity="relu")
        else:
            super().initialize_tensor(module, name, tensor)

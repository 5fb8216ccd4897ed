"""ConvNeXt (https://arxiv.org/abs/2201.03545): configuration, network, presets, layer depths, checkpoint names.

Modules and parameters are named as in the Hub's checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from fastuper.models.backbones import rewrites
from fastuper.models.backbones.layers import (
    STAGES,
    Backbone,
    Encoder,
    LayerNorm2d,
    activation,
    channels_last,
    check_channels,
    drop_path,
    pad_to,
    pair,
)
from fastuper.models.backbones.registry import register, stage_depths
from fastuper.models.configuration import BackboneConfig, as_list
from fastuper.models.gradient_checkpointing import Checkpointed
from fastuper.models.outputs import BackboneOutput
from fastuper.weights.transformers import Names


class ConvNextConfig(BackboneConfig):
    """ConvNeXt (https://arxiv.org/abs/2201.03545); the defaults are ConvNeXt-Tiny.

    Args:
        num_channels: channels of an image.
        patch_size: the stem's stride and kernel size.
        num_stages: the number of stages.
        hidden_sizes: channels of each stage; [96, 192, 384, 768] if None.
        depths: the number of blocks of each stage; [3, 3, 9, 3] if None.
        hidden_act: the activation between a block's two pointwise layers.
        initializer_range: standard deviation of the initial weights.
        layer_norm_eps: has no effect, and stays in config.json; all norms use 1e-6, as in Transformers.
        layer_scale_init_value: initial value of LayerScale; 0 for blocks without LayerScale.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 at the first block.
        image_size: has no effect, and stays in config.json; the network takes images of any size.
        out_features: see `BackboneConfig`.
        out_indices: see `BackboneConfig`.
        **extra: see `Config`.

    Raises:
        ValueError: values contradict each other or are not valid; the message names them.
    """

    model_type = "convnext"
    attribute_map = {"num_hidden_layers": "num_stages"}  # noqa: RUF012

    def __init__(
        self,
        num_channels: int = 3,
        patch_size: int = 4,
        num_stages: int = 4,
        hidden_sizes: Sequence[int] | None = None,
        depths: Sequence[int] | None = None,
        hidden_act: str = "gelu",
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-12,
        layer_scale_init_value: float = 1e-6,
        drop_path_rate: float = 0.0,
        image_size: int = 224,
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **extra: Any,
    ):
        num_stages = extra.pop("num_hidden_layers", num_stages)
        self.num_channels = num_channels
        self.patch_size = patch_size
        self.num_stages = num_stages
        self.hidden_sizes = [96, 192, 384, 768] if hidden_sizes is None else as_list(hidden_sizes)
        self.depths = [3, 3, 9, 3] if depths is None else as_list(depths)
        self.hidden_act = hidden_act
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.layer_scale_init_value = layer_scale_init_value
        self.drop_path_rate = drop_path_rate
        self.image_size = image_size
        super().__init__(self.depths, out_features, out_indices, **extra)

    def check(self) -> None:
        """Check all values; see `Config.check`."""
        super().check()
        if not len(self.hidden_sizes) == len(self.depths) == self.num_stages:
            raise ValueError(
                f"num_stages={self.num_stages}, hidden_sizes={self.hidden_sizes} and depths={self.depths} "
                "must agree on the number of stages"
            )


class ConvNextEmbeddings(nn.Module):
    """The stem: non-overlapping patches, and a norm."""

    def __init__(self, config: ConvNextConfig):
        super().__init__()
        dim, size = config.hidden_sizes[0], config.patch_size
        self.patch_embeddings = nn.Conv2d(config.num_channels, dim, kernel_size=size, stride=size)
        self.layernorm = LayerNorm2d(dim, eps=1e-6)
        self.num_channels = config.num_channels

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed an image (B, C, H, W) of any size.

        Raises:
            ValueError: the image does not have the channels that the convolution takes.
        """
        stem = self.patch_embeddings
        check_channels(pixel_values, stem)
        image = channels_last(pixel_values)
        if isinstance(stem, nn.Conv2d):
            # An image smaller than a patch is padded; Transformers fails on it.
            image = pad_to(image, *pair(stem.kernel_size))
        return self.layernorm(stem(image))


class ConvNextLayer(Checkpointed):
    """One block: 7x7 depthwise convolution, norm, two pointwise layers, LayerScale, residual."""

    rewrite = rewrites.CONVNEXT_LAYER

    def __init__(self, config: ConvNextConfig, dim: int, drop_prob: float):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.layernorm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = activation(config.hidden_act)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        scale = float(config.layer_scale_init_value)
        self.layer_scale_parameter = nn.Parameter(torch.full((dim,), scale)) if scale > 0 else None
        self.drop_path = drop_path(drop_prob)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to the same shape."""
        if rewrites.apply_to(self, x):
            return rewrites.run(self, x)
        out = self.dwconv(x).permute(0, 2, 3, 1)
        out = self.layernorm(out)
        out = self.pwconv2(self.act(self.pwconv1(out)))
        if self.layer_scale_parameter is not None:
            out = self.layer_scale_parameter * out
        return x + self.drop_path(out.permute(0, 3, 1, 2))


class ConvNextStage(nn.Module):
    """A norm and a 2x2 convolution of stride 2 (except in the first stage), then the blocks."""

    def __init__(
        self,
        config: ConvNextConfig,
        dim_in: int,
        dim: int,
        stride: int,
        drop_probs: list[float],
        block: type[nn.Module],
    ):
        super().__init__()
        self.downsampling_layer = nn.ModuleList()
        if dim_in != dim or stride > 1:
            self.downsampling_layer.append(LayerNorm2d(dim_in, eps=1e-6))
            self.downsampling_layer.append(nn.Conv2d(dim_in, dim, kernel_size=2, stride=stride))
        self.layers = nn.ModuleList(block(config, dim, p) for p in drop_probs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C_in, H, W) to (B, C, H // 2, W // 2), at least 1 x 1; the first stage keeps the size."""
        for layer in self.downsampling_layer:
            if isinstance(layer, nn.Conv2d):
                # A map of one row or column is smaller than the kernel; Transformers fails on it.
                x = pad_to(x, *layer.kernel_size)
            x = layer(x)
        for layer in self.layers:
            x = layer(x)
        return x


class ConvNextEncoder(Encoder):
    """The stages, whose blocks are of the class `block`."""

    def __init__(self, config: ConvNextConfig, block: type[nn.Module]):
        super().__init__()
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").split(config.depths)
        sizes = [config.hidden_sizes[0], *config.hidden_sizes]
        self.stages = nn.ModuleList(
            ConvNextStage(config, sizes[i], sizes[i + 1], 2 if i > 0 else 1, rates[i].tolist(), block)
            for i in range(config.num_stages)
        )

    def steps(
        self, x: torch.Tensor, output_attentions: bool = False, output_hidden_states: bool = False
    ) -> Iterator[tuple[torch.Tensor, None]]:
        """Yield the map (B, C, H, W) of the stem, which is x, and of each stage; a ConvNeXt has no attentions."""
        yield x, None
        for stage in self.stages:
            x = stage(x)
            yield x, None


class ConvNextBackbone(Backbone):
    """ConvNeXt; it returns the normed maps of the stages in `config.out_features`."""

    config: ConvNextConfig
    block: ClassVar[type[nn.Module]] = ConvNextLayer

    def __init__(self, config: ConvNextConfig):
        super().__init__(config, [config.hidden_sizes[0], *config.hidden_sizes])
        self.embeddings = ConvNextEmbeddings(config)
        self.encoder = ConvNextEncoder(config, self.block)
        self.hidden_states_norms = nn.ModuleDict(
            {name: LayerNorm2d(dim, eps=1e-6) for name, dim in zip(self.out_features, self.channels, strict=True)}
        )

    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool = False, output_attentions: bool = False
    ) -> BackboneOutput:
        """Return the feature maps of an image (B, C, H, W). A ConvNeXt has no attentions.

        Raises:
            ValueError: the image does not have the channels that the stem takes.
        """
        feature_maps, hidden_states = [], []
        steps = self.encode(self.encoder, self.embeddings(pixel_values))
        for name, (x, _) in zip(self.stage_names, steps, strict=True):
            if name in self.out_features:
                feature_maps.append(self.hidden_states_norms[name](x))
            if output_hidden_states:  # otherwise a map is freed when the next stage has read it
                hidden_states.append(x)
        return BackboneOutput(tuple(feature_maps), tuple(hidden_states) if output_hidden_states else None)

    def initialize_tensor(self, module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        """Fill one parameter with its initial value."""
        if name == "layer_scale_parameter":
            nn.init.constant_(tensor, self.config.layer_scale_init_value)
        else:
            super().initialize_tensor(module, name, tensor)


# The presets have the stochastic depth of the authors' UPerNets.
PRESETS = {
    name: partial(ConvNextConfig, hidden_sizes=sizes, depths=depths, drop_path_rate=rate, out_features=STAGES)
    for name, sizes, depths, rate in (
        ("convnext-tiny", [96, 192, 384, 768], [3, 3, 9, 3], 0.4),
        ("convnext-small", [96, 192, 384, 768], [3, 3, 27, 3], 0.3),
        ("convnext-base", [128, 256, 512, 1024], [3, 3, 27, 3], 0.4),
        ("convnext-large", [192, 384, 768, 1536], [3, 3, 27, 3], 0.4),
    )
}
DEPTHS = stage_depths(r"encoder\.stages\.(\d+)\.layers\.")
NAMES = Names(
    parts=("embeddings", "encoder", "hidden_states_norms"),
    unused=("embeddings.mask_token",),  # of masked image modelling
)

register("convnext", ConvNextConfig, ConvNextBackbone, presets=PRESETS, depths=DEPTHS, names=NAMES)

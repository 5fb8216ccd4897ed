"""ConvNeXt (https://arxiv.org/abs/2201.03545) as a backbone; parameters are named as in the Hub's checkpoints."""

from __future__ import annotations

import torch
from torch import nn

from fastuper.models.backbones.layers import (
    Backbone,
    LayerNorm2d,
    activation,
    channels_last,
    does_nothing,
    drop_path,
    is_plain_mlp,
    on_cpu_without_gradients,
    pad_to,
    residual_mlp,
)
from fastuper.models.configuration import ConvNextConfig
from fastuper.models.gradient_checkpointing import Checkpointed, recomputed
from fastuper.models.outputs import BackboneOutput
from fastuper.models.untouched import is_exactly


class ConvNextEmbeddings(nn.Module):
    """The stem: non-overlapping patches, and a norm."""

    def __init__(self, config: ConvNextConfig):
        super().__init__()
        dim, size = config.hidden_sizes[0], config.patch_size
        self.patch_embeddings = nn.Conv2d(config.num_channels, dim, kernel_size=size, stride=size)
        self.layernorm = LayerNorm2d(dim, eps=1e-6)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed an image (B, C, H, W) of any size."""
        image = pad_to(channels_last(pixel_values), *self.patch_embeddings.kernel_size)
        return self.layernorm(self.patch_embeddings(image))


class ConvNextLayer(Checkpointed):
    """One block: 7x7 depthwise convolution, norm, two pointwise layers, LayerScale, residual."""

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
        out = self.dwconv(x).permute(0, 2, 3, 1)
        if self._is_plain(x):
            # Nobody but this block has seen what its convolution returned: the sum takes its place.
            mlp = self.layernorm, self.pwconv1, self.act, self.pwconv2
            return residual_mlp(x.permute(0, 2, 3, 1), out, *mlp, self.layer_scale_parameter, out).permute(0, 3, 1, 2)
        if is_plain_mlp(self.layernorm, self.pwconv1, self.act, self.pwconv2):
            hidden = recomputed(lambda x: self.pwconv1(self.layernorm(x)), out)
            out = recomputed(lambda x: self.pwconv2(self.act(x)), hidden)
        else:
            out = self.pwconv2(self.act(self.pwconv1(self.layernorm(out))))
        if self.layer_scale_parameter is not None:
            out = self.layer_scale_parameter * out
        return x + self.drop_path(out.permute(0, 3, 1, 2))

    def _is_plain(self, x: torch.Tensor) -> bool:
        mlp = self.layernorm, self.pwconv1, self.act, self.pwconv2
        plain = is_exactly(self.dwconv, nn.Conv2d) and is_plain_mlp(*mlp) and does_nothing(self.drop_path)
        return plain and on_cpu_without_gradients(x, self, self.dwconv, *mlp)


class ConvNextStage(nn.Module):
    """A norm and a 2x2 convolution of stride 2 (not in the first stage), then the blocks."""

    def __init__(self, config: ConvNextConfig, dim_in: int, dim: int, stride: int, drop_probs: list[float]):
        super().__init__()
        self.downsampling_layer = nn.ModuleList()
        if dim_in != dim or stride > 1:
            self.downsampling_layer.append(LayerNorm2d(dim_in, eps=1e-6))
            self.downsampling_layer.append(nn.Conv2d(dim_in, dim, kernel_size=2, stride=stride))
        self.layers = nn.ModuleList(ConvNextLayer(config, dim, p) for p in drop_probs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C_in, H, W) to (B, C, H // 2, W // 2), at least 1 x 1; the first stage keeps the size."""
        for layer in self.downsampling_layer:
            if isinstance(layer, nn.Conv2d):
                # A map of one row or column is smaller than the kernel: the reference fails there.
                x = pad_to(x, *layer.kernel_size)
            x = layer(x)
        for layer in self.layers:
            x = layer(x)
        return x


class ConvNextEncoder(nn.Module):
    """The stages."""

    def __init__(self, config: ConvNextConfig):
        super().__init__()
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").split(config.depths)
        sizes = [config.hidden_sizes[0], *config.hidden_sizes]
        self.stages = nn.ModuleList(
            ConvNextStage(config, sizes[i], sizes[i + 1], 2 if i > 0 else 1, rates[i].tolist())
            for i in range(config.num_stages)
        )


class ConvNextBackbone(Backbone):
    """ConvNeXt, returning the normed maps of the stages in `config.out_features`."""

    config: ConvNextConfig

    def __init__(self, config: ConvNextConfig):
        super().__init__(config, [config.hidden_sizes[0], *config.hidden_sizes])
        self.embeddings = ConvNextEmbeddings(config)
        self.encoder = ConvNextEncoder(config)
        self.hidden_states_norms = nn.ModuleDict(
            {name: LayerNorm2d(dim, eps=1e-6) for name, dim in zip(self.out_features, self.channels, strict=True)}
        )

    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool = False, output_attentions: bool = False
    ) -> BackboneOutput:
        """Return the feature maps of an image (B, C, H, W); a ConvNeXt has no attentions.

        Raises:
            ValueError: the image has another number of channels than the configuration.
        """
        self.check_channels(pixel_values)
        x, feature_maps, hidden_states = pixel_values, [], []
        for name, step in zip(self.stage_names, [self.embeddings, *self.encoder.stages], strict=True):
            x = step(x)
            if name in self.out_features:
                feature_maps.append(self.hidden_states_norms[name](x))
            if output_hidden_states:  # else nothing keeps a map once the next stage has read it
                hidden_states.append(x)
        return BackboneOutput(tuple(feature_maps), tuple(hidden_states) if output_hidden_states else None)

    def initialize_tensor(self, module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        """Fill one parameter with its initial value."""
        if name == "layer_scale_parameter":
            nn.init.constant_(tensor, self.config.layer_scale_init_value)
        else:
            super().initialize_tensor(module, name, tensor)

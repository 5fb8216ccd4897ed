"""ConvNeXt V2 (https://arxiv.org/abs/2301.00808): configuration, network, presets, layer depths, checkpoint names.

The network is ConvNeXt's. In each block, global response normalisation replaces LayerScale.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from fastuper.models.backbones import rewrites
from fastuper.models.backbones.convnext import DEPTHS, NAMES, ConvNextBackbone, ConvNextConfig
from fastuper.models.backbones.layers import STAGES, activation, drop_path
from fastuper.models.backbones.registry import register
from fastuper.models.gradient_checkpointing import Checkpointed


class ConvNextV2Config(ConvNextConfig):
    """ConvNeXt V2 (https://arxiv.org/abs/2301.00808); the defaults are ConvNeXt V2-Tiny.

    Args:
        num_channels: see `ConvNextConfig` for this and all other arguments.
        patch_size: see there.
        num_stages: see there.
        hidden_sizes: see there.
        depths: see there.
        hidden_act: see there.
        initializer_range: see there.
        layer_norm_eps: see there.
        drop_path_rate: see there.
        image_size: see there.
        out_features: see `BackboneConfig`.
        out_indices: see `BackboneConfig`.
        **extra: see `Config`.

    Raises:
        ValueError: values contradict each other or are not valid; the message names them.
    """

    model_type = "convnextv2"

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
        drop_path_rate: float = 0.0,
        image_size: int = 224,
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **extra: Any,
    ):
        super().__init__(
            num_channels,
            patch_size,
            num_stages,
            hidden_sizes,
            depths,
            hidden_act,
            initializer_range,
            layer_norm_eps,
            layer_scale_init_value=0.0,
            drop_path_rate=drop_path_rate,
            image_size=image_size,
            out_features=out_features,
            out_indices=out_indices,
            **extra,
        )
        del self.layer_scale_init_value  # ConvNeXt's alone; config.json does not have it


class ConvNextV2GRN(nn.Module):
    """Global response normalisation (section 4 of the paper): channels compete by their norms over the whole map."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.bias = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise maps (B, H, W, C)."""
        norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        return self.weight * (x * self.relative(norms)) + self.bias + x

    def relative(self, norms: torch.Tensor) -> torch.Tensor:
        """Divide the norms of the channels (..., C) by their mean."""
        return norms / (norms.mean(dim=-1, keepdim=True) + 1e-6)


class ConvNextV2Layer(Checkpointed):
    """One block: 7x7 depthwise convolution, norm, pointwise layer, GRN, pointwise layer, residual."""

    rewrite = rewrites.CONVNEXTV2_LAYER
    parts: ClassVar = {"grn": ConvNextV2GRN}

    def __init__(self, config: ConvNextV2Config, dim: int, drop_prob: float):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.layernorm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = activation(config.hidden_act)
        self.grn = ConvNextV2GRN(4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.drop_path = drop_path(drop_prob)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to the same shape."""
        if rewrites.apply_to(self, x):
            return rewrites.run(self, x)
        out = self.dwconv(x).permute(0, 2, 3, 1)
        out = self.layernorm(out)
        out = self.pwconv2(self.grn(self.act(self.pwconv1(out))))
        return x + self.drop_path(out.permute(0, 3, 1, 2))


class ConvNextV2Backbone(ConvNextBackbone):
    """ConvNeXt V2; it returns the normed maps of the stages in `config.out_features`."""

    block = ConvNextV2Layer

    def initialize_tensor(self, module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        """Fill one parameter with its initial value."""
        if isinstance(module, ConvNextV2GRN):
            nn.init.zeros_(tensor)
        else:
            super().initialize_tensor(module, name, tensor)


# The authors trained UPerNets with the sizes from tiny, by ConvNeXt's code: these presets have its stochastic depth. No
# UPerNet of the smaller sizes is published: they have that of the authors' smallest classifier.
PRESETS = {
    name: partial(ConvNextV2Config, hidden_sizes=sizes, depths=depths, drop_path_rate=rate, out_features=STAGES)
    for name, sizes, depths, rate in (
        ("convnextv2-atto", [40, 80, 160, 320], [2, 2, 6, 2], 0.1),
        ("convnextv2-femto", [48, 96, 192, 384], [2, 2, 6, 2], 0.1),
        ("convnextv2-pico", [64, 128, 256, 512], [2, 2, 6, 2], 0.1),
        ("convnextv2-nano", [80, 160, 320, 640], [2, 2, 8, 2], 0.1),
        ("convnextv2-tiny", [96, 192, 384, 768], [3, 3, 9, 3], 0.4),
        ("convnextv2-base", [128, 256, 512, 1024], [3, 3, 27, 3], 0.4),
        ("convnextv2-large", [192, 384, 768, 1536], [3, 3, 27, 3], 0.4),
        ("convnextv2-huge", [352, 704, 1408, 2816], [3, 3, 27, 3], 0.4),
    )
}

register("convnextv2", ConvNextV2Config, ConvNextV2Backbone, presets=PRESETS, depths=DEPTHS, names=NAMES)

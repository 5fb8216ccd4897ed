"""Swin V2 (https://arxiv.org/abs/2111.09883): configuration, network, presets, layer depths, checkpoint names.

The network is Swin's, except for the norms, which follow attention and MLP, and for the attention: its scores are
cosines, and a small network computes the bias of each relative position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from fastuper.models.backbones import rewrites
from fastuper.models.backbones.layers import STAGES, drop_path, pair
from fastuper.models.backbones.registry import register
from fastuper.models.backbones.swin import (
    DEPTHS,
    SwinAttention,
    SwinBackbone,
    SwinConfig,
    SwinDense,
    SwinIntermediate,
    SwinPatchMerging,
    SwinStage,
    WindowAttention,
    WindowBlock,
    gathered_bias,
)
from fastuper.models.backbones.windows import Sides, relative_position_index, squares
from fastuper.models.configuration import as_list
from fastuper.weights.transformers import Names


class Swinv2Config(SwinConfig):
    """Swin Transformer V2 (https://arxiv.org/abs/2111.09883); the defaults are Transformers'.

    Args:
        image_size: the image size, an int or (height, width), that the windows are made for: see `windows`. Images of
            any size are taken.
        patch_size: see `SwinConfig` for this and all arguments without a text.
        num_channels: see there.
        embed_dim: see there.
        depths: see there.
        num_heads: see there.
        window_size: side of the attention windows, before it shrinks to a smaller map.
        pretrained_window_sizes: side of the windows of each stage in pretraining, by which the coordinates of relative
            positions are divided; 0 for the window of this network.
        mlp_ratio: see there.
        qkv_bias: True if the query and value layers have a bias; the key layer has none.
        hidden_dropout_prob: dropout after the patch embedding and the second layer of each MLP.
        attention_probs_dropout_prob: dropout of the attention weights, and after the attention's output layer.
        drop_path_rate: see there.
        hidden_act: see there.
        use_absolute_embeddings: see there.
        initializer_range: see there.
        layer_norm_eps: see there.
        encoder_stride: see there.
        out_features: see `BackboneConfig`.
        out_indices: see `BackboneConfig`.
        **extra: see `Config`.

    Raises:
        ValueError: values contradict each other or are not valid; the message names them.
    """

    model_type = "swinv2"

    def __init__(
        self,
        image_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 4,
        num_channels: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        pretrained_window_sizes: Sequence[int] | None = (0, 0, 0, 0),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        hidden_dropout_prob: float = 0.0,
        attention_probs_dropout_prob: float = 0.0,
        drop_path_rate: float = 0.1,
        hidden_act: str = "gelu",
        use_absolute_embeddings: bool = False,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-5,
        encoder_stride: int = 32,
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **extra: Any,
    ):
        # None means zeros, as in Transformers 4.
        self.pretrained_window_sizes = as_list(
            (0, 0, 0, 0) if pretrained_window_sizes is None else pretrained_window_sizes
        )
        super().__init__(
            image_size,
            patch_size,
            num_channels,
            embed_dim,
            depths,
            num_heads,
            window_size,
            mlp_ratio,
            qkv_bias,
            hidden_dropout_prob,
            attention_probs_dropout_prob,
            drop_path_rate,
            hidden_act,
            use_absolute_embeddings,
            initializer_range,
            layer_norm_eps,
            encoder_stride,
            out_features,
            out_indices,
            **extra,
        )

    def check(self) -> None:
        """Check all values; see `Config.check`."""
        super().check()
        sizes = self.pretrained_window_sizes
        if len(sizes) < len(self.depths):
            raise ValueError(
                f"pretrained_window_sizes={sizes} must have a window for each of {len(self.depths)} stages"
            )
        if 1 in sizes:
            raise ValueError(
                f"pretrained_window_sizes={sizes} has a window of one position, which has no relative positions; "
                "give 0 for the window of this network"
            )
        if min(self.grid(len(self.depths) - 1)) < 1:
            raise ValueError(
                f"image_size={self.image_size} and patch_size={self.patch_size} leave no position for the windows of "
                f"stage {len(self.depths)}; give the image size that the network is made for"
            )

    def grid(self, stage: int) -> Sides:
        """Return the size of a stage's map, counted from 0, at the configured image size; halves are rounded down."""
        sides = pair(self.image_size), pair(self.patch_size)
        height, width = (image // patch for image, patch in zip(*sides, strict=True))
        return height // 2**stage, width // 2**stage

    def windows(self, stage: int) -> tuple[Sides, Sides]:
        """Return the window of a stage, counted from 0, and the shift of every second block.

        A map that is no larger than the window, at the configured image size, is one window: the window shrinks to the
        map and is not shifted. The map's height decides for both sides. The windows stay as they are for images of any
        size.
        """
        height, _ = self.grid(stage)
        window = min(height, self.window_size)
        shift = self.window_size // 2 if height > window else 0
        return (window, window), (shift, shift)

    @property
    def norms_outputs(self) -> bool:
        """Whether the returned maps are normed."""
        return False


def log_spaced_coordinates(window: Sides, pretrained: int, device: torch.device | None = None) -> torch.Tensor:
    """Return the coordinates of all relative positions in a window (h, w), (1, 2 h - 1, 2 w - 1, 2), float32.

    The paper's equation 4, in the units of its code: sign(x) * log2(1 + 8 |x|) / 3, where x is 1 at the side of the
    window of pretraining, or of this window if `pretrained` is 0.
    """
    height, width = window
    rows = torch.arange(-(height - 1), height, device=device, dtype=torch.float32)
    columns = torch.arange(-(width - 1), width, device=device, dtype=torch.float32)
    y, x = (values / max(1, (pretrained or side) - 1) for values, side in ((rows, height), (columns, width)))
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)[None] * 8
    return grid.sign() * torch.log2(grid.abs() + 1.0) / math.log2(8)


class Swinv2SelfAttention(WindowAttention):
    """Multi-head attention within windows: cosines of queries and keys, and a continuous bias of relative positions."""

    # Transformers adds the mask twice. Cosines times the largest scale are up to 200 apart, so the weight matters.
    mask_weight = 2.0

    def __init__(self, config: Swinv2Config, dim: int, heads: int, window: Sides, pretrained: int):
        super().__init__(dim, heads, window, scale=1.0)
        self.pretrained_window_size = (pretrained, pretrained)
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(heads, 1, 1)))
        self.continuous_position_bias_mlp = nn.Sequential(
            nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, heads, bias=False)
        )
        self.relative_coords_table: torch.Tensor
        self.relative_position_index: torch.Tensor
        table = log_spaced_coordinates(window, pretrained).to(self.logit_scale.dtype)
        self.register_buffer("relative_coords_table", table, persistent=False)
        self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)
        self.query = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def bias(self) -> torch.Tensor:
        """Return the bias of relative positions, (heads, L, L), each between 0 and 16."""
        table = self.continuous_position_bias_mlp(self.relative_coords_table).view(-1, self.num_attention_heads)
        return gathered_bias(16 * torch.sigmoid(table), self.relative_position_index)

    def compared(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the directions of queries and keys (..., heads, L, C / heads), the queries times the heads' scale."""
        scale = self.logit_scale.clamp(max=math.log(100.0)).exp()
        # A padded position's key is 0. In float16 the bound of `normalize` must not be rounded to 0.
        bound = max(1e-12, torch.finfo(key.dtype).smallest_normal if key.dtype == torch.float16 else 0.0)
        return F.normalize(query, dim=-1, eps=bound) * scale, F.normalize(key, dim=-1, eps=bound)


class Swinv2Attention(SwinAttention):
    """Attention within windows, and the linear layer that mixes its heads."""

    parts: ClassVar = {"self": Swinv2SelfAttention, "output": SwinDense}


class Swinv2Layer(WindowBlock):
    """One block: attention within windows, shifted in every other block, then an MLP; a norm ends each branch."""

    rewrite = rewrites.SWINV2_LAYER
    parts: ClassVar = {"attention": Swinv2Attention, "intermediate": SwinIntermediate, "output": SwinDense}

    def __init__(self, config: Swinv2Config, stage: int, is_shifted: bool, drop_prob: float):
        super().__init__(config, stage, is_shifted)
        dim, window = config.channels(stage), pair(self.window_size)
        pretrained = config.pretrained_window_sizes[stage]
        self.attention = Swinv2Attention(
            Swinv2SelfAttention(config, dim, config.num_heads[stage], window, pretrained),
            SwinDense(dim, dim, config.attention_probs_dropout_prob),
        )
        self.layernorm_before = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.drop_path = drop_path(drop_prob)
        self.intermediate = SwinIntermediate(config, dim)
        self.output = SwinDense(int(config.mlp_ratio * dim), dim, config.hidden_dropout_prob)
        self.layernorm_after = nn.LayerNorm(dim, eps=config.layer_norm_eps)

    def forward(self, x: torch.Tensor, output_attentions: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map (B, H, W, C) to the same shape; also return the attention weights, or None."""
        if rewrites.apply_to(self, x, output_attentions):
            return rewrites.run(self, x, output_attentions)
        attended, weights = self.attend(x, output_attentions)
        x = x + self.drop_path(self.layernorm_before(attended))
        x = x + self.drop_path(self.layernorm_after(self.output(self.intermediate(x))))
        return x, weights


class Swinv2PatchMerging(SwinPatchMerging):
    """Concatenate the four positions of each 2x2 square, halve the channels, and norm."""

    rewrite = rewrites.SWINV2_PATCH_MERGING

    def __init__(self, dim: int):
        super().__init__(dim)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), 2 C)."""
        if rewrites.apply_to(self, x):
            return rewrites.run(self, x)
        return self.norm(self.reduction(squares(x)))


class Swinv2Stage(SwinStage):
    """The blocks, then (except in the last stage) patch merging."""

    block = Swinv2Layer
    merging = Swinv2PatchMerging


class Swinv2Backbone(SwinBackbone):
    """Swin V2; it returns the maps of the stages in `config.out_features`, each before its patch merging."""

    config: Swinv2Config
    stage = Swinv2Stage

    def initialize_tensor(self, module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        """Fill one parameter or buffer with its initial value."""
        if name == "relative_coords_table":
            attention: Any = module
            pretrained = attention.pretrained_window_size[0]
            tensor.copy_(log_spaced_coordinates(attention.window_size, pretrained, tensor.device))
        elif name == "logit_scale":
            nn.init.constant_(tensor, math.log(10))
        else:
            super().initialize_tensor(module, name, tensor)


SIZES = {
    "tiny": (96, [2, 2, 6, 2], [3, 6, 12, 24]),
    "small": (96, [2, 2, 18, 2], [3, 6, 12, 24]),
    "base": (128, [2, 2, 18, 2], [4, 8, 16, 32]),
    "large": (192, [2, 2, 18, 2], [6, 12, 24, 48]),
}


def _preset(size: str, image: int, window: int, pretrained: Sequence[int] = (0, 0, 0, 0)) -> Swinv2Config:
    embed_dim, depths, num_heads = SIZES[size]
    return Swinv2Config(
        image_size=image,
        embed_dim=embed_dim,
        depths=depths,
        num_heads=num_heads,
        window_size=window,
        pretrained_window_sizes=pretrained,
        drop_path_rate=0.3,
        out_features=STAGES,
    )


# The published classifiers, by size and window, at the image size that they are for. Classifiers of larger images than
# in pretraining have the windows of both, "12to16". The presets have the stochastic depth of Swin's UPerNets.
PRESETS = {
    **{f"swinv2-{size}-window8": partial(_preset, size, 256, 8) for size in ("tiny", "small", "base")},
    **{f"swinv2-{size}-window16": partial(_preset, size, 256, 16) for size in ("tiny", "small", "base")},
    **{f"swinv2-{size}-window12": partial(_preset, size, 192, 12) for size in ("base", "large")},
    **{f"swinv2-{size}-window12to16": partial(_preset, size, 256, 16, (12, 12, 12, 6)) for size in ("base", "large")},
    **{f"swinv2-{size}-window12to24": partial(_preset, size, 384, 24, (12, 12, 12, 6)) for size in ("base", "large")},
}

NAMES = Names(
    parts=("embeddings", "encoder"),
    prefix="swinv2.",
    unused=("layernorm.", "embeddings.mask_token"),  # the final norm, and the token of masked image modelling
    computed=("relative_position_index", "relative_coords_table"),  # they follow from the windows
)

register("swinv2", Swinv2Config, Swinv2Backbone, presets=PRESETS, depths=DEPTHS, names=NAMES)

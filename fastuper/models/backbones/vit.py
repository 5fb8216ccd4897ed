"""Vision transformers with a pyramid neck: ViT, DeiT, BEiT and MAE, as UPerNet reads them.

ViT is https://arxiv.org/abs/2010.11929, DeiT https://arxiv.org/abs/2012.12877, BEiT https://arxiv.org/abs/2106.08254,
MAE https://arxiv.org/abs/2111.06377; the networks and the necks are mmsegmentation's. Inside, an image is a sequence
(B, L, C) of patches, after a class token if there is one; the stages of the configuration are the blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from fastuper.io.bounds import check_bounds
from fastuper.io.messages import shown
from fastuper.models.backbones.layers import (
    Backbone,
    Encoder,
    activation,
    channels_last,
    check_channels,
    drop_path,
    pad_to_multiple,
    pair,
)
from fastuper.models.backbones.registry import register
from fastuper.models.configuration import BackboneConfig, as_list
from fastuper.models.gradient_checkpointing import Checkpointed
from fastuper.models.necks.vit_pyramid import TRANSPOSED_SCALES, build_neck
from fastuper.models.outputs import BackboneOutput
from fastuper.models.untouched import is_exactly
from fastuper.weights.transformers import Names
from fastuper_kernels.dispatch.modes import is_eager, is_jit_tracing

NECKS = ("resized", "transposed", "none")
INTERPOLATIONS = ("bicubic", "bilinear")


class ViTPyramidConfig(BackboneConfig):
    """A vision transformer with a pyramid neck; the defaults are ViT-Base with mmsegmentation's MultiLevelNeck.

    Transformers has no such backbone.

    Args:
        image_size: image size of the position embeddings and of the relative position bias, an int or (height, width).
        patch_size: side of a patch.
        num_channels: channels of an image.
        hidden_size: channels of the blocks.
        num_hidden_layers: the number of blocks; they are named "stage1", "stage2", ..., and the patches "stem".
        num_attention_heads: attention heads of each block.
        intermediate_size: width of an MLP's hidden layers.
        mlp_depth: the number of linear layers of an MLP.
        hidden_act: the activation of the MLPs.
        layer_norm_eps: epsilon of the norms.
        pad_patches: True to pad an image to whole patches, below and on the right; False to cut off what is over.
        patch_bias: True if the convolution of the patches has a bias.
        patch_norm: True for a norm after the convolution of the patches.
        use_class_token: True for a class token.
        use_absolute_embeddings: True to add a learned position embedding to each token.
        interpolation: resampling of the position embeddings for images with another number of patches, "bicubic" or
            "bilinear".
        pre_norm: True for a norm before the first block.
        final_norm: True for a norm after the last block.
        qkv_bias: True if the query and value layers have a bias.
        key_bias: True if the key layers have a bias.
        proj_bias: True if the layers after the attention have a bias.
        use_relative_position_bias: True to add a learned bias to the attention for each relative position.
        layer_scale_init_value: the initial factor of each branch's channels; 0 for no factors.
        hidden_dropout_prob: dropout after the embeddings, the attention, and the layers of each MLP.
        attention_probs_dropout_prob: dropout of the attention weights.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 at the first block.
        neck: "resized" (`ResizedPyramid`), "transposed" (`TransposedPyramid`) or "none".
        neck_scales: the factor of each level's height and width, in any order.
        neck_channels: channels of each level of a resized pyramid; `hidden_size` if None.
        neck_norm: True for BatchNorm after each convolution of a resized pyramid.
        neck_act: the activation after each convolution of a resized pyramid; "linear" for none.
        out_levels: numbers of the levels to return, in any order; all if None. A level is a map of the neck, or of a
            block if there is no neck.
        initializer_range: standard deviation of the initial weights.
        out_features: names of the blocks that the neck reads; four blocks at equal distances if both this and
            `out_indices` are None.
        out_indices: their numbers, 0 for the patches; negative numbers count from the end.
        **extra: see `Config`.

    Raises:
        ValueError: values contradict each other or are not valid; the message names them.
    """

    model_type = "vit_pyramid"

    def __init__(
        self,
        image_size: int | Sequence[int] = 512,
        patch_size: int = 16,
        num_channels: int = 3,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        mlp_depth: int = 2,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-6,
        pad_patches: bool = True,
        patch_bias: bool = True,
        patch_norm: bool = False,
        use_class_token: bool = True,
        use_absolute_embeddings: bool = True,
        interpolation: str = "bicubic",
        pre_norm: bool = False,
        final_norm: bool = False,
        qkv_bias: bool = True,
        key_bias: bool = True,
        proj_bias: bool = True,
        use_relative_position_bias: bool = False,
        layer_scale_init_value: float = 0.0,
        hidden_dropout_prob: float = 0.0,
        attention_probs_dropout_prob: float = 0.0,
        drop_path_rate: float = 0.0,
        neck: str = "resized",
        neck_scales: Sequence[float] = (4, 2, 1, 0.5),
        neck_channels: int | None = None,
        neck_norm: bool = False,
        neck_act: str = "linear",
        out_levels: Sequence[int] | None = None,
        initializer_range: float = 0.02,
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **extra: Any,
    ):
        self.image_size = as_list(image_size)
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.mlp_depth = mlp_depth
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.pad_patches = pad_patches
        self.patch_bias = patch_bias
        self.patch_norm = patch_norm
        self.use_class_token = use_class_token
        self.use_absolute_embeddings = use_absolute_embeddings
        self.interpolation = interpolation
        self.pre_norm = pre_norm
        self.final_norm = final_norm
        self.qkv_bias = qkv_bias
        self.key_bias = key_bias
        self.proj_bias = proj_bias
        self.use_relative_position_bias = use_relative_position_bias
        self.layer_scale_init_value = layer_scale_init_value
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.drop_path_rate = drop_path_rate
        self.neck = neck
        self.neck_scales = as_list(neck_scales)
        self.neck_channels = neck_channels
        self.neck_norm = neck_norm
        self.neck_act = neck_act
        self.out_levels = as_list(out_levels)
        self.initializer_range = initializer_range
        check_bounds({"num_hidden_layers": num_hidden_layers})
        if out_features is None and out_indices is None:
            out_indices = sorted({-(-num_hidden_layers * quarter // 4) for quarter in (1, 2, 3, 4)})
        super().__init__([1] * num_hidden_layers, out_features, out_indices, **extra)
        self.check()

    def check(self) -> None:
        """Check all values; see `Config.check`."""
        super().check()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if min(pair(self.image_size)) < self.patch_size:
            raise ValueError(f"image_size={self.image_size} must be at least patch_size={self.patch_size}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation={shown(self.interpolation)} must be one of {', '.join(INTERPOLATIONS)}")
        if self.use_relative_position_bias and not self.use_class_token:
            raise ValueError("use_relative_position_bias=True needs use_class_token=True")
        if self.neck not in NECKS:
            raise ValueError(f"neck={shown(self.neck)} must be one of {', '.join(NECKS)}")
        if hasattr(self, "_out_features"):  # they are set after the first check
            self._check_levels()

    def _check_levels(self) -> None:
        maps = len(self.out_features)
        levels = maps if self.neck == "none" else len(self.neck_scales)
        if self.out_levels is not None and max(self.out_levels) >= levels:
            raise ValueError(f"out_levels={self.out_levels} must be numbers of the {levels} levels, from 0")
        if self.neck == "none":
            return
        if self.neck == "transposed" and (self.neck_scales not in TRANSPOSED_SCALES or maps != levels):
            raise ValueError(
                f"neck='transposed' has neck_scales={' or '.join(map(str, TRANSPOSED_SCALES))}, and reads a map "
                f"for each level; got neck_scales={self.neck_scales}, out_features={self.out_features}"
            )
        if maps not in (1, levels):
            raise ValueError(
                f"neck='resized' reads one map, or one for each of neck_scales={self.neck_scales}; "
                f"got out_features={self.out_features}"
            )

    @property
    def depths(self) -> list[int]:
        """The number of blocks of each stage: 1, for each of `num_hidden_layers`."""
        return [1] * self.num_hidden_layers

    @depths.setter
    def depths(self, depths: Sequence[int]) -> None:
        if depths != self.depths:
            raise ValueError(
                f"depths={shown(depths)} follow from num_hidden_layers={self.num_hidden_layers}; leave them out"
            )

    def read_all_stages(self) -> None:
        """Do nothing: the neck makes the levels, of any number of blocks."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image of `image_size`."""
        height, width = pair(self.image_size)
        return height // self.patch_size, width // self.patch_size


class Tokens(NamedTuple):
    """An image inside the encoder.

    Attributes:
        values: (B, L, C), the class token first if there is one, then the patches row by row.
        height: rows of patches.
        width: columns of patches.
    """

    values: torch.Tensor
    height: int
    width: int

    def as_map(self) -> torch.Tensor:
        """Return the patches as a map (B, C, height, width)."""
        patches = self.values[:, self.values.shape[1] - self.height * self.width :]
        if is_eager() or is_jit_tracing():  # which makes constants of the sizes of `unflatten`
            return patches.transpose(1, 2).reshape(patches.shape[0], -1, self.height, self.width)
        # The same map: torch.export compares no sizes for this view. Its layout may differ for one image.
        return patches.unflatten(1, (self.height, self.width)).permute(0, 3, 1, 2)


class ViTPatchEmbeddings(nn.Module):
    """A convolution whose stride is its kernel, and an optional norm."""

    def __init__(self, config: ViTPyramidConfig):
        super().__init__()
        side = self.patch_size = config.patch_size
        self.pads = config.pad_patches
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, side, side, bias=config.patch_bias)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.patch_norm else nn.Identity()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map an image (B, C, H, W) to (B, h, w, hidden_size).

        Raises:
            ValueError: the image does not have the channels that the convolution takes; or it is not padded, and it is
                smaller than a patch.
        """
        check_channels(pixel_values, self.projection)
        x, side = channels_last(pixel_values), self.patch_size
        if self.pads:
            x = pad_to_multiple(x.permute(0, 2, 3, 1), side, side).permute(0, 3, 1, 2)
        elif x.shape[2] < side or x.shape[3] < side:
            raise ValueError(
                f"pixel_values of shape {tuple(x.shape)} are smaller than a patch of {side} x {side} pixels, and this "
                "backbone cuts off incomplete patches; give a larger image"
            )
        return self.norm(self.projection(x).permute(0, 2, 3, 1))


class ViTEmbeddings(nn.Module):
    """The stem: patches, the class token, position embeddings, and an optional norm."""

    def __init__(self, config: ViTPyramidConfig):
        super().__init__()
        dim, (height, width) = config.hidden_size, config.grid
        self.grid, self.interpolation, self.extra = (height, width), config.interpolation, int(config.use_class_token)
        self.patch_embeddings = ViTPatchEmbeddings(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.use_class_token else None
        self.position_embeddings = (
            nn.Parameter(torch.zeros(1, self.extra + height * width, dim)) if config.use_absolute_embeddings else None
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps) if config.pre_norm else nn.Identity()

    def forward(self, pixel_values: torch.Tensor) -> Tokens:
        """Embed an image (B, C, H, W)."""
        patches = self.patch_embeddings(pixel_values)
        batch, height, width, _ = patches.shape
        x = patches.flatten(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(batch, -1, -1), x], dim=1)
        if self.position_embeddings is not None:
            x = x + self.positions(height, width)
        return Tokens(self.norm(self.dropout(x)), height, width)

    def positions(self, height: int, width: int) -> torch.Tensor:
        """Return the position embeddings (1, L, C) of a grid of patches.

        As in mmsegmentation, the table is resampled only if the number of patches differs: a grid of another form with
        as many patches reads the table row by row.
        """
        table = self.position_embeddings
        assert table is not None
        count = self.grid[0] * self.grid[1]
        if is_eager() and height * width == count:
            return table
        extra, own = table[:, : self.extra], table[:, self.extra :]
        maps = own.reshape(1, *self.grid, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(maps, (height, width), mode=self.interpolation, align_corners=False)
        patches = resized.permute(0, 2, 3, 1).flatten(1, 2)
        if not is_eager():  # a traced network computes both: it compares no sizes
            place = torch.arange(height * width, device=table.device)
            patches = torch.where(place[-1:, None] == count - 1, own[:, place.clamp(max=count - 1)], patches)
        return torch.cat([extra, patches], dim=1)


class RelativePositions(NamedTuple):
    """Where a grid of patches reads the tables of relative position bias, the same in all blocks.

    A table has (2 h - 1) * (2 w - 1) entries for pairs of patches of the configured grid (h, w), row by row.

    Attributes:
        entries: (N, N), the entry for each pair of the N patches, in a table resampled for their grid; in the table
            itself if `size` is None.
        size: rows and columns of the resampled table; None if the table is not resampled.
        own: (N, N), the entry in the table itself, if a traced network computes both; else None.
        is_own: (1, 1), whether the number of patches is the configured one, in a traced network; else None.
    """

    entries: torch.Tensor
    size: tuple[int, int] | None = None
    own: torch.Tensor | None = None
    is_own: torch.Tensor | None = None


def relative_positions(grid: tuple[int, int], height: int, width: int, device: torch.device) -> RelativePositions:
    """Return where a grid of (height, width) patches reads tables that were made for `grid`.

    As for the position embeddings, only a grid with another number of patches has resampled tables.
    """
    count, place = grid[0] * grid[1], torch.arange(height * width, device=device)
    if is_eager() and height * width == count:
        return RelativePositions(pair_index(place, *grid))
    entries, size = pair_index(place, height, width), (2 * height - 1, 2 * width - 1)
    if is_eager():
        return RelativePositions(entries, size)
    return RelativePositions(
        entries, size, pair_index(place.clamp(max=count - 1), *grid), place[-1:, None] == count - 1
    )


def pair_index(place: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the entry (N, N) of each pair of patches in a table of a grid; `place` are their places, row by row."""
    rows, columns = place // width, place % width
    down = rows[:, None] - rows + height - 1
    return down * (2 * width - 1) + columns[:, None] - columns + width - 1


class ViTAttention(nn.Module):
    """Multi-head attention, with an optional learned bias for each relative position."""

    def __init__(self, config: ViTPyramidConfig):
        super().__init__()
        dim, (height, width) = config.hidden_size, config.grid
        self.grid, self.num_attention_heads = (height, width), config.num_attention_heads
        self.query = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.key = nn.Linear(dim, dim, bias=config.key_bias)
        self.value = nn.Linear(dim, dim, bias=config.qkv_bias)
        # The last three entries are for the class token: to a patch, from a patch, to itself.
        self.relative_position_bias_table = (
            nn.Parameter(torch.zeros((2 * height - 1) * (2 * width - 1) + 3, config.num_attention_heads))
            if config.use_relative_position_bias
            else None
        )
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.output = nn.Linear(dim, dim, bias=config.proj_bias)

    def bias(self, relative: RelativePositions) -> torch.Tensor:
        """Return the bias (heads, L, L) for the class token and the patches."""
        assert self.relative_position_bias_table is not None
        table, special = self.relative_position_bias_table.split([len(self.relative_position_bias_table) - 3, 3])
        pairs = table
        if relative.size is not None:
            maps = table.view(1, 2 * self.grid[0] - 1, 2 * self.grid[1] - 1, -1).permute(0, 3, 1, 2)
            resized = F.interpolate(maps, relative.size, mode="bilinear", align_corners=False)
            pairs = resized.permute(0, 2, 3, 1).flatten(0, 2)
        bias = pairs[relative.entries].permute(2, 0, 1)
        if relative.own is not None and relative.is_own is not None:
            bias = torch.where(relative.is_own, table[relative.own].permute(2, 0, 1), bias)
        heads, count, _ = bias.shape
        to_patch, from_patch, to_itself = (entry[:, None, None] for entry in special)
        left = torch.cat([to_itself, from_patch.expand(heads, count, 1)], dim=1)
        return torch.cat([left, torch.cat([to_patch.expand(heads, 1, count), bias], dim=1)], dim=2)

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Reshape (B, L, C) to (B, heads, L, C / heads)."""
        return x.view(x.shape[0], x.shape[1], self.num_attention_heads, -1).transpose(1, 2)

    def forward(
        self, x: torch.Tensor, relative: RelativePositions | None, output_attentions: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend among tokens (B, L, C); also return the attention weights (B, heads, L, L), or None."""
        query, key, value = (self.split_heads(layer(x)) for layer in (self.query, self.key, self.value))
        bias = None if relative is None else self.bias(relative)[None]
        if output_attentions or not is_exactly(self.dropout, nn.Dropout):
            scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
            weights = self.dropout((scores if bias is None else scores + bias).softmax(-1))
            out = (weights @ value).transpose(1, 2).flatten(2)
            return self.output(out), weights if output_attentions else None
        dropout = self.dropout.p if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        return self.output(out.transpose(1, 2).flatten(2)), None


class ViTMLP(nn.Module):
    """Linear layers with an activation between them."""

    def __init__(self, config: ViTPyramidConfig):
        super().__init__()
        widths = [config.hidden_size, *[config.intermediate_size] * (config.mlp_depth - 1), config.hidden_size]
        self.layers = nn.ModuleList(nn.Linear(widths[i], widths[i + 1]) for i in range(config.mlp_depth))
        self.activation = activation(config.hidden_act)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, L, C) to the same shape."""
        *hidden, last = self.layers
        for layer in hidden:
            x = self.dropout(self.activation(layer(x)))
        return self.dropout(last(x))


class ViTLayer(Checkpointed):
    """One block: attention, then an MLP, each with a norm before it and a residual."""

    def __init__(self, config: ViTPyramidConfig, drop_prob: float):
        super().__init__()
        dim = config.hidden_size
        self.layernorm_before = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.attention = ViTAttention(config)
        self.attention_dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layernorm_after = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.mlp = ViTMLP(config)
        self.drop_path = drop_path(drop_prob)
        scaled = config.layer_scale_init_value != 0
        self.layer_scale_attention = nn.Parameter(torch.ones(dim)) if scaled else None
        self.layer_scale_mlp = nn.Parameter(torch.ones(dim)) if scaled else None

    def forward(
        self, x: torch.Tensor, relative: RelativePositions | None, output_attentions: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map tokens (B, L, C) to the same shape; also return the attention weights, or None."""
        attended, weights = self.attention(self.layernorm_before(x), relative, output_attentions)
        x = x + self.drop_path(_scaled(self.attention_dropout(attended), self.layer_scale_attention))
        x = x + self.drop_path(_scaled(self.mlp(self.layernorm_after(x)), self.layer_scale_mlp))
        return x, weights


def _scaled(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return x if scale is None else x * scale


class ViTEncoder(Encoder):
    """The blocks, and an optional norm after the last one."""

    def __init__(self, config: ViTPyramidConfig):
        super().__init__()
        self.grid, self.is_relative = config.grid, config.use_relative_position_bias
        rates = torch.linspace(0, config.drop_path_rate, config.num_hidden_layers, device="cpu").tolist()
        self.layers = nn.ModuleList(ViTLayer(config, rate) for rate in rates)
        self.layernorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.final_norm else nn.Identity()
        )

    def steps(
        self, x: Any, output_attentions: bool = False, output_hidden_states: bool = False
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Yield the map (B, C, H, W) of the stem and of each block, with the block's attention weights.

        Args:
            x: the stem's `Tokens`.
            output_attentions: True to compute the weights; they are None otherwise, and for the stem.
            output_hidden_states: has no effect.
        """
        yield x.as_map(), None
        values, height, width = x
        relative = relative_positions(self.grid, height, width, values.device) if self.is_relative else None
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            values, weights = layer(values, relative, output_attentions)
            if i == last:
                values = self.layernorm(values)
            yield Tokens(values, height, width).as_map(), weights


class ViTPyramidBackbone(Backbone):
    """A vision transformer and its neck; it returns the neck's levels of the blocks in `config.out_features`."""

    config: ViTPyramidConfig

    def __init__(self, config: ViTPyramidConfig):
        super().__init__(config, [config.hidden_size] * (config.num_hidden_layers + 1))
        self.embeddings = ViTEmbeddings(config)
        self.encoder = ViTEncoder(config)
        self.neck = None
        if config.neck != "none":
            channels = config.hidden_size if config.neck_channels is None else config.neck_channels
            self.neck = build_neck(
                config.neck,
                self.channels,
                config.neck_scales,
                channels,
                norm=config.neck_norm,
                hidden_act=config.neck_act,
            )
            self.channels = self.neck.channels
        if config.out_levels is not None:
            self.channels = [self.channels[level] for level in config.out_levels]

    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool = False, output_attentions: bool = False
    ) -> BackboneOutput:
        """Return the feature maps of an image (B, C, H, W).

        Raises:
            ValueError: the image does not have the channels that the stem takes, or no whole patch.
        """
        maps, hidden_states, attentions = [], [], []
        steps: Any = self.encode(self.encoder, self.embeddings(pixel_values), output_attentions)
        for name, (x, weights) in zip(self.stage_names, steps, strict=True):
            if output_hidden_states:
                hidden_states.append(x)
            if name in self.out_features:
                maps.append(x)
            if weights is not None:
                attentions.append(weights)
        levels = tuple(maps) if self.neck is None else self.neck(maps)
        chosen = self.config.out_levels
        return BackboneOutput(
            levels if chosen is None else tuple(levels[level] for level in chosen),
            tuple(hidden_states) if output_hidden_states else None,
            tuple(attentions) if output_attentions else None,
        )

    def initialize_tensor(self, module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        """Fill one parameter or buffer with its initial value."""
        if name.startswith("layer_scale"):
            nn.init.constant_(tensor, self.config.layer_scale_init_value)
        elif name in ("cls_token", "position_embeddings"):
            nn.init.normal_(tensor, std=self.config.initializer_range)
        elif name == "relative_position_bias_table":
            nn.init.zeros_(tensor)
        else:
            super().initialize_tensor(module, name, tensor)


# The sizes, epsilons and blocks of mmsegmentation's configurations for ADE20K, with their stochastic depth.
VIT = partial(ViTPyramidConfig, drop_path_rate=0.1, out_indices=[3, 6, 9, 12])
BEIT = partial(
    ViTPyramidConfig,
    image_size=640,
    pad_patches=False,
    use_absolute_embeddings=False,
    use_relative_position_bias=True,
    key_bias=False,
    layer_scale_init_value=0.1,
    drop_path_rate=0.1,
    neck="transposed",
)
SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
PRESETS = {
    "vit-base-16": partial(VIT, final_norm=True),
    "deit-small-16": partial(VIT, **SMALL),
    "deit-base-16": VIT,
    "beit-base-16": partial(BEIT, out_indices=[4, 6, 8, 12]),
    "beit-large-16": partial(
        BEIT, out_indices=[8, 12, 16, 24], layer_scale_init_value=1e-6, drop_path_rate=0.2, **LARGE
    ),
    "mae-base-16": partial(
        BEIT, image_size=512, out_indices=[4, 6, 8, 12], use_absolute_embeddings=True, layer_scale_init_value=1.0
    ),
}


def depths(name: str, config: ViTPyramidConfig) -> int:
    """Return the layer depth of a parameter: 0 in the neck, 1 in the last block, one more in each block before it.

    It is BEiT's rule (https://arxiv.org/abs/2106.08254); the final norm has the depth 0 too, the patches' the largest.
    """
    if match := re.match(r"encoder\.layers\.(\d+)\.", name):
        return config.num_hidden_layers - int(match[1])
    return config.num_hidden_layers + 1 if name.startswith("embeddings.") else 0


def recipe(config: ViTPyramidConfig) -> str:
    """Return the name of the published recipe: that of BEiT or MAE, which have relative positions, or that of ViT."""
    if not config.use_relative_position_bias:
        return "swin"
    if config.use_absolute_embeddings:
        return "mae"
    return "beit" if config.num_hidden_layers <= 12 else "beit-large"


register(
    "vit_pyramid",
    ViTPyramidConfig,
    ViTPyramidBackbone,
    presets=PRESETS,
    depths=depths,
    recipe=recipe,
    names=Names(parts=("embeddings", "encoder", "neck"), unused=("embeddings.mask_token",)),
)

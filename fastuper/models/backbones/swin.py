"""Swin Transformer (https://arxiv.org/abs/2103.14030): configuration, network, presets, layer depths, checkpoint names.

Modules and parameters are named as in the Hub's checkpoints. Inside, maps are (B, H, W, C), the layout of attention and
linear layers; the maps that the backbone returns are (B, C, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from fastuper.io.bounds import WIDEST
from fastuper.models.backbones import rewrites
from fastuper.models.backbones.layers import (
    STAGES,
    Backbone,
    Encoder,
    activation,
    channels_last,
    check_channels,
    drop_path,
    pad_to_multiple,
    pair,
)
from fastuper.models.backbones.registry import register, stage_depths
from fastuper.models.backbones.windows import (
    Sides,
    attend_in_windows,
    copied,
    relative_position_index,
    squares,
)
from fastuper.models.configuration import BackboneConfig, as_list
from fastuper.models.gradient_checkpointing import Checkpointed
from fastuper.models.outputs import BackboneOutput
from fastuper.models.untouched import is_exactly
from fastuper.weights.transformers import Names
from fastuper_kernels.dispatch.modes import is_eager


class SwinConfig(BackboneConfig):
    """Swin Transformer (https://arxiv.org/abs/2103.14030); the defaults are Swin-Tiny.

    Args:
        image_size: image size of the absolute position embeddings, an int or (height, width).
        patch_size: the stem's stride and kernel size, an int or (height, width).
        num_channels: channels of an image.
        embed_dim: channels of the first stage; they double from stage to stage.
        depths: the number of blocks of each stage.
        num_heads: the number of attention heads of each stage.
        window_size: side of the attention windows.
        mlp_ratio: width of an MLP's hidden layer, as a multiple of the channels.
        qkv_bias: True if the query, key and value layers have a bias.
        hidden_dropout_prob: dropout after the patch embedding, the attention and the second layer of each MLP.
        attention_probs_dropout_prob: dropout of the attention weights.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 at the first block.
        hidden_act: the activation of the MLPs.
        use_absolute_embeddings: True to add a learned position embedding to the patches.
        initializer_range: standard deviation of the initial weights.
        layer_norm_eps: epsilon of the norms inside the blocks; all others use 1e-5, as in Transformers.
        encoder_stride: has no effect, and stays in config.json.
        out_features: see `BackboneConfig`.
        out_indices: see `BackboneConfig`.
        **extra: see `Config`.

    Raises:
        ValueError: values contradict each other or are not valid; the message names them.
    """

    model_type = "swin"
    attribute_map = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}  # noqa: RUF012

    def __init__(
        self,
        image_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 4,
        num_channels: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
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
        num_heads = extra.pop("num_attention_heads", num_heads)
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.embed_dim = embed_dim
        self.depths = as_list(depths)
        self.num_heads = as_list(num_heads)
        self.window_size = window_size
        self.mlp_ratio = mlp_ratio
        self.qkv_bias = qkv_bias
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.drop_path_rate = drop_path_rate
        self.hidden_act = hidden_act
        self.use_absolute_embeddings = use_absolute_embeddings
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.encoder_stride = encoder_stride
        for derived in ("num_layers", "num_hidden_layers", "hidden_size"):
            extra.pop(derived, None)
        super().__init__(self.depths, out_features, out_indices, **extra)

    def check(self) -> None:
        """Check all values; see `Config.check`."""
        super().check()
        if len(self.depths) != len(self.num_heads):
            raise ValueError(f"depths={self.depths} and num_heads={self.num_heads} must agree on the number of stages")
        if self.hidden_size > 4 * WIDEST:
            raise ValueError(
                f"embed_dim={self.embed_dim} doubles from stage to stage, to {self.hidden_size} channels in the last; "
                f"they must be at most {4 * WIDEST}"
            )
        if int(self.embed_dim * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} gives the MLPs no channels, with embed_dim={self.embed_dim}")
        for stage, heads in enumerate(self.num_heads):
            if self.channels(stage) % heads:
                raise ValueError(
                    f"the {self.channels(stage)} channels of stage {stage + 1} (embed_dim={self.embed_dim}) "
                    f"are not a multiple of its {heads} attention heads"
                )
        sides = zip(pair(self.image_size), pair(self.patch_size), strict=True)
        if self.use_absolute_embeddings and any(image < patch for image, patch in sides):
            raise ValueError(f"image_size={self.image_size} must be at least patch_size={self.patch_size}")

    def channels(self, stage: int) -> int:
        """Return the channels of a stage, counted from 0."""
        return self.embed_dim * 2**stage

    def windows(self, stage: int) -> tuple[Sides, Sides]:
        """Return the window of a stage, counted from 0, and the shift of every second block."""
        return (self.window_size, self.window_size), (self.window_size // 2, self.window_size // 2)

    @property
    def pads_before_shift(self) -> bool:
        """Whether maps are padded to whole windows before they are shifted, or after."""
        return True

    @property
    def norms_outputs(self) -> bool:
        """Whether the returned maps are normed."""
        return True

    @property
    def num_layers(self) -> int:
        """The number of stages."""
        return len(self.depths)

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage."""
        return self.embed_dim * 2 ** (len(self.depths) - 1)


class SwinEmbeddings(nn.Module):
    """The stem: non-overlapping patches, a norm, and (optionally) learned position embeddings."""

    def __init__(self, config: SwinConfig):
        super().__init__()
        self.patch_embeddings = SwinPatchEmbeddings(config)
        self.patch_grid = self.patch_embeddings.grid_size
        self.position_embeddings = (
            nn.Parameter(torch.zeros(1, self.patch_embeddings.num_patches, config.embed_dim))
            if config.use_absolute_embeddings
            else None
        )
        self.norm = nn.LayerNorm(config.embed_dim)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.patch_size, self.config = config.patch_size, config

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed an image (B, C, H, W) of any size, padded to whole patches, as (B, h, w, embed_dim)."""
        x = self.norm(self.patch_embeddings(pixel_values))
        if self.position_embeddings is not None:
            x = x + self.positions(x.shape[1], x.shape[2])
        return self.dropout(x)

    def positions(self, height: int, width: int) -> torch.Tensor:
        """Return the position embeddings (1, height, width, C), by bicubic interpolation from the configured grid."""
        assert self.position_embeddings is not None
        table = self.position_embeddings.view(1, *self.patch_grid, -1)
        # A traced network always resamples, which changes nothing at the configured size: it compares no sizes.
        if is_eager() and (height, width) == self.patch_grid:
            return table
        # Transformers fails for images of any other size than the configured one.
        table = F.interpolate(table.permute(0, 3, 1, 2), (height, width), mode="bicubic", align_corners=False)
        return table.permute(0, 2, 3, 1)


class SwinPatchEmbeddings(nn.Module):
    """A convolution whose stride is its kernel."""

    def __init__(self, config: SwinConfig):
        super().__init__()
        size, (height, width) = pair(config.patch_size), pair(config.image_size)
        self.image_size, self.patch_size, self.num_channels = (height, width), size, config.num_channels
        self.grid_size = (height // size[0], width // size[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.projection = nn.Conv2d(config.num_channels, config.embed_dim, kernel_size=size, stride=size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map an image (B, C, H, W) to (B, ceil(H / patch), ceil(W / patch), embed_dim).

        Raises:
            ValueError: the image does not have the channels that the convolution takes.
        """
        check_channels(pixel_values, self.projection)
        image = pad_to_multiple(channels_last(pixel_values).permute(0, 2, 3, 1), *self.patch_size)
        return channels_last(self.projection(image.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class SwinPatchMerging(nn.Module):
    """Concatenate the four positions of each 2x2 square, norm, and halve the channels."""

    rewrite = rewrites.SWIN_PATCH_MERGING

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), 2 C)."""
        if rewrites.apply_to(self, x):
            return rewrites.run(self, x)
        return self.reduction(self.norm(squares(x)))


class WindowAttention(nn.Module):
    """Base of the multi-head attentions within windows.

    A subclass has the linear layers `query`, `key` and `value`, the dropout `dropout`, and `bias()`, which returns the
    bias of each relative position, (heads, L, L).

    Args:
        dim: channels.
        heads: the number of heads.
        window: the window.
        scale: the factor of the products of queries and keys.
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    dropout: nn.Dropout
    bias: Callable[[], torch.Tensor]
    mask_weight: ClassVar = 1.0

    def __init__(self, dim: int, heads: int, window: Sides, scale: float):
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = heads, dim // heads, dim
        self.window_size, self.scale = window, scale

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Reshape (B * windows, L, C) to (B * windows, heads, L, C / heads)."""
        return x.view(x.shape[0], x.shape[1], self.num_attention_heads, -1).transpose(1, 2)

    def compared(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the queries and keys, (B * windows, heads, L, C / heads), whose products times `scale` are scores."""
        return query, key

    def forward(
        self, windows: torch.Tensor, mask: torch.Tensor | None, output_attentions: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend within windows.

        Args:
            windows: (B * windows, L, C).
            mask: (B * windows, L, L), of shifted windows, added to the scores; None for none.
            output_attentions: True to return the attention weights too.

        Returns:
            The result, (B * windows, L, C), and the weights, (B * windows, heads, L, L), or None.
        """
        query, key, value = (self.split_heads(layer(windows)) for layer in (self.query, self.key, self.value))
        query, key = self.compared(query, key)
        bias = self.bias()[None] if mask is None else self.bias()[None] + self.mask_weight * mask[:, None]
        if output_attentions or not is_exactly(self.dropout, nn.Dropout):
            scores = query @ key.transpose(-1, -2) * self.scale + bias
            weights = self.dropout(scores.softmax(-1))
            out = copied((weights @ value).transpose(1, 2)).view(windows.shape)
            return out, weights if output_attentions else None
        dropout = self.dropout.p if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=self.scale)
        return copied(out.transpose(1, 2)).view(windows.shape), None


class SwinSelfAttention(WindowAttention):
    """Multi-head attention within windows, with a learned bias for each relative position."""

    def __init__(self, config: SwinConfig, dim: int, heads: int, window: Sides):
        super().__init__(dim, heads, window, scale=(dim // heads) ** -0.5)
        positions = (2 * window[0] - 1) * (2 * window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(positions, heads))
        self.relative_position_index: torch.Tensor
        self.register_buffer("relative_position_index", relative_position_index(window))
        self.query = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.key = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.value = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def bias(self) -> torch.Tensor:
        """Return the relative position bias, (heads, L, L)."""
        return gathered_bias(self.relative_position_bias_table, self.relative_position_index)


def gathered_bias(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the bias (heads, L, L) of pairs of positions: the rows of a table (rows, heads) by an index (L, L)."""
    return table[index.flatten()].view(*index.shape, -1).permute(2, 0, 1).contiguous()


class SwinDense(nn.Module):
    """A linear layer, `dense` in checkpoints, and dropout."""

    def __init__(self, dim_in: int, dim: int, dropout: float):
        super().__init__()
        self.dense = nn.Linear(dim_in, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., C_in) to (..., C)."""
        return self.dropout(self.dense(x))


class SwinIntermediate(nn.Module):
    """The first layer of an MLP and its activation."""

    def __init__(self, config: SwinConfig, dim: int):
        super().__init__()
        self.dense = nn.Linear(dim, int(config.mlp_ratio * dim))
        self.intermediate_act_fn = activation(config.hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., C) to (..., mlp_ratio * C)."""
        return self.intermediate_act_fn(self.dense(x))


class SwinAttention(nn.Module):
    """Attention within windows, and the linear layer that mixes its heads."""

    parts: ClassVar = {"self": SwinSelfAttention, "output": SwinDense}

    def __init__(self, attention: WindowAttention, output: SwinDense):
        super().__init__()
        self.self: WindowAttention = attention
        self.output: SwinDense = output

    def forward(
        self, windows: torch.Tensor, mask: torch.Tensor | None, output_attentions: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend within windows (B * windows, L, C); see `WindowAttention.forward`."""
        out, weights = self.self(windows, mask, output_attentions)
        return self.output(out), weights


class WindowBlock(Checkpointed):
    """Base of the blocks: attention within windows, shifted in every other block.

    Args:
        config: the configuration.
        stage: the block's stage, counted from 0.
        is_shifted: True to shift the windows.
    """

    attention: SwinAttention
    intermediate: SwinIntermediate
    output: SwinDense
    layernorm_after: nn.LayerNorm

    def __init__(self, config: SwinConfig, stage: int, is_shifted: bool):
        super().__init__()
        window, shift = config.windows(stage)
        # Numbers where both sides are equal, as in Transformers.
        self.window_size, self.shift_size = _number(window), _number(shift) if is_shifted else 0
        self.pads_before_shift = config.pads_before_shift

    def attend(self, x: torch.Tensor, output_attentions: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Pad a map (B, H, W, C) to whole windows, shift it, attend, and undo the shift and the padding."""

        def call(windows: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
            return self.attention(windows, mask, output_attentions)

        return attend_in_windows(call, x, pair(self.window_size), pair(self.shift_size), self.pads_before_shift)

    def attention_parts(self) -> rewrites.AttentionParts | None:
        """Return the modules of the attention; None if a module that holds them is touched."""
        if not rewrites.are_own(self, "attention") or not rewrites.are_own(self.attention, "self", "output"):
            return None
        heads, output = self.attention.self, self.attention.output
        return rewrites.AttentionParts(heads, output.dense, (heads.dropout, output.dropout))

    def mlp_parts(self) -> rewrites.MlpParts | None:
        """Return the modules of the MLP; None if a module that holds them is touched."""
        if not rewrites.are_own(self, "intermediate", "output"):
            return None
        first, act, output = self.intermediate.dense, self.intermediate.intermediate_act_fn, self.output
        return rewrites.MlpParts((self.layernorm_after, first, act, output.dense), output.dropout)


def _number(sides: Sides) -> int | Sides:
    return sides[0] if sides[0] == sides[1] else sides


class SwinLayer(WindowBlock):
    """One block: attention within windows, shifted in every other block, then an MLP, each with a residual."""

    rewrite = rewrites.SWIN_LAYER
    parts: ClassVar = {"attention": SwinAttention, "intermediate": SwinIntermediate, "output": SwinDense}

    def __init__(self, config: SwinConfig, stage: int, is_shifted: bool, drop_prob: float):
        super().__init__(config, stage, is_shifted)
        dim, heads, window = config.channels(stage), config.num_heads[stage], pair(self.window_size)
        self.layernorm_before = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.attention = SwinAttention(
            SwinSelfAttention(config, dim, heads, window), SwinDense(dim, dim, config.hidden_dropout_prob)
        )
        self.drop_path = drop_path(drop_prob)
        self.layernorm_after = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.intermediate = SwinIntermediate(config, dim)
        self.output = SwinDense(int(config.mlp_ratio * dim), dim, config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor, output_attentions: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map (B, H, W, C) to the same shape; also return the attention weights, or None."""
        if rewrites.apply_to(self, x, output_attentions):
            return rewrites.run(self, x, output_attentions)
        attended, weights = self.attend(self.layernorm_before(x), output_attentions)
        x = x + self.drop_path(attended)
        # As in Transformers, stochastic depth drops the attention, and never the MLP.
        x = x + self.output(self.intermediate(self.layernorm_after(x)))
        return x, weights


class SwinStage(nn.Module):
    """The blocks, then (except in the last stage) patch merging."""

    block: ClassVar[type[nn.Module]] = SwinLayer
    merging: ClassVar[type[nn.Module]] = SwinPatchMerging

    def __init__(self, config: SwinConfig, stage: int, drop_probs: list[float]):
        super().__init__()
        self.config, self.dim = config, config.channels(stage)
        self.blocks = nn.ModuleList(self.block(config, stage, i % 2 == 1, p) for i, p in enumerate(drop_probs))
        self.downsample = self.merging(self.dim) if stage + 1 < config.num_layers else None

    def forward(
        self, x: torch.Tensor, output_attentions: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Run the stage on a map (B, H, W, C).

        Returns:
            The stage's map; the input of the next stage, merged to (B, ceil(H / 2), ceil(W / 2), 2 C), or the same map
            in the last stage; and the last block's attention weights, or None.
        """
        weights = None
        for block in self.blocks:
            x, weights = block(x, output_attentions)
        return x, x if self.downsample is None else self.downsample(x), weights


class SwinEncoder(Encoder):
    """The stages, of the class `stage`."""

    def __init__(self, config: SwinConfig, stage: type[SwinStage]):
        super().__init__()
        self.config, self.num_layers = config, config.num_layers
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").split(config.depths)
        self.layers = nn.ModuleList(stage(config, i, probs.tolist()) for i, probs in enumerate(rates))

    def steps(
        self, x: torch.Tensor, output_attentions: bool = False, output_hidden_states: bool = False
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Yield the map (B, C, H, W) of the stem and of each stage, with the attention weights of its last block.

        Args:
            x: the stem's map, (B, H, W, C).
            output_attentions: True to compute the weights; they are None otherwise, and for the stem.
            output_hidden_states: has no effect.
        """
        yield x.permute(0, 3, 1, 2), None
        for stage in self.layers:
            out, x, weights = stage(x, output_attentions)
            yield out.permute(0, 3, 1, 2), weights


class SwinBackbone(Backbone):
    """Swin; it returns the maps of the stages in `config.out_features`, each before its patch merging, and normed."""

    config: SwinConfig
    stage: ClassVar[type[SwinStage]] = SwinStage

    def __init__(self, config: SwinConfig):
        stages = [config.channels(stage) for stage in range(config.num_layers)]
        super().__init__(config, [config.embed_dim, *stages])
        self.embeddings = SwinEmbeddings(config)
        self.encoder = SwinEncoder(config, self.stage)
        if config.norms_outputs:
            dims = zip(self.out_features, self.channels, strict=True)
            self.hidden_states_norms = nn.ModuleDict({name: nn.LayerNorm(dim) for name, dim in dims})

    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool = False, output_attentions: bool = False
    ) -> BackboneOutput:
        """Return the feature maps of an image (B, C, H, W).

        Raises:
            ValueError: the image does not have the channels that the stem takes.
        """
        feature_maps, hidden_states, attentions = [], [], []
        steps = self.encode(self.encoder, self.embeddings(pixel_values), output_attentions)
        for name, (x, weights) in zip(self.stage_names, steps, strict=True):
            if output_hidden_states:  # otherwise a map is freed when the next stage has read it
                x = x.contiguous()  # the norm reads it, so that it gets gradients, as in Transformers
                hidden_states.append(x)
            if name in self.out_features:
                if self.config.norms_outputs:
                    x = self.hidden_states_norms[name](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
                elif output_hidden_states:
                    x = channels_last(x)
                feature_maps.append(x)
            if weights is not None:
                attentions.append(weights)
        return BackboneOutput(
            tuple(feature_maps),
            tuple(hidden_states) if output_hidden_states else None,
            tuple(attentions) if output_attentions else None,
        )

    def initialize_tensor(self, module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        """Fill one parameter or buffer with its initial value."""
        if name == "relative_position_index":
            window: Any = module.window_size
            tensor.copy_(relative_position_index(window, tensor.device))
        elif name in ("relative_position_bias_table", "position_embeddings"):
            nn.init.zeros_(tensor)
        else:
            super().initialize_tensor(module, name, tensor)


# The presets have the stochastic depth of the authors' UPerNets.
PRESETS = {
    name: partial(
        SwinConfig,
        embed_dim=embed_dim,
        depths=depths,
        num_heads=num_heads,
        window_size=window_size,
        drop_path_rate=0.3,
        out_features=STAGES,
    )
    for name, embed_dim, depths, num_heads, window_size in (
        ("swin-tiny", 96, [2, 2, 6, 2], [3, 6, 12, 24], 7),
        ("swin-small", 96, [2, 2, 18, 2], [3, 6, 12, 24], 7),
        ("swin-base", 128, [2, 2, 18, 2], [4, 8, 16, 32], 12),
        ("swin-large", 192, [2, 2, 18, 2], [6, 12, 24, 48], 12),
    )
}
DEPTHS = stage_depths(r"encoder\.layers\.(\d+)\.blocks\.")

BLOCK = r"(encoder\.layers\.\d+\.blocks\.\d+\.)"
NAMES = Names(
    parts=("embeddings", "encoder", "hidden_states_norms"),
    prefix="swin.",
    renamed=(
        (BLOCK + r"attention\.q_proj\.", r"\1attention.self.query."),
        (BLOCK + r"attention\.k_proj\.", r"\1attention.self.key."),
        (BLOCK + r"attention\.v_proj\.", r"\1attention.self.value."),
        (BLOCK + r"attention\.o_proj\.", r"\1attention.output.dense."),
        (BLOCK + r"attention\.relative_position_bias\.", r"\1attention.self."),
        (BLOCK + r"mlp\.fc1\.", r"\1intermediate.dense."),
        (BLOCK + r"mlp\.fc2\.", r"\1output.dense."),
    ),
    unused=("layernorm.", "embeddings.mask_token"),  # the final norm, and the token of masked image modelling
    computed=("relative_position_index",),  # follows from the window's size; Transformers 5 does not store it
)

register("swin", SwinConfig, SwinBackbone, presets=PRESETS, depths=DEPTHS, names=NAMES)

"""Swin Transformer (https://arxiv.org/abs/2103.14030) as a backbone; parameters are named as in the Hub's checkpoints.

Maps are (B, H, W, C) here, as attention and its linear layers want them; those that leave are (B, C, H, W).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn
from torch.nn import functional as F

from fastuper.models.backbones.layers import (
    HIDDEN_BYTES,
    Backbone,
    activation,
    channels_last,
    does_nothing,
    drop_path,
    is_plain_mlp,
    on_cpu_without_gradients,
    pad_to_multiple,
    pair,
    residual_mlp,
)
from fastuper.models.configuration import SwinConfig
from fastuper.models.gradient_checkpointing import Checkpointed, recomputed
from fastuper.models.outputs import BackboneOutput
from fastuper.models.untouched import is_exactly, is_untouched
from fastuper_kernels import linear
from fastuper_kernels.dispatch.modes import is_eager


def window_partition(x: torch.Tensor, window: int) -> torch.Tensor:
    """Cut maps (B, H, W, C), H and W multiples of the window, into (B * windows, window * window, C)."""
    batch, height, width, channels = x.shape
    rows, columns = height // window, width // window
    x = x.view(batch, rows, window, columns, window, channels)
    return x.transpose(2, 3).reshape(batch * rows * columns, window * window, channels)


def window_reverse(windows: torch.Tensor, window: int, batch: int, rows: int, columns: int) -> torch.Tensor:
    """Put (B * rows * columns, window * window, C) back together into (B, rows * window, columns * window, C)."""
    channels = windows.shape[-1]
    x = windows.view(batch, rows, columns, window, window, channels)
    return x.transpose(2, 3).reshape(batch, rows * window, columns * window, channels)


def crop(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the first rows and columns of maps (B, H, W, C)."""
    if is_eager():
        return x[:, :height, :width]
    # Whether a slice is contiguous depends on sizes: a traced network would hold for those of its example alone.
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    return x.index_select(1, rows).index_select(2, columns)


def shifted_window_mask(
    rows: int, columns: int, window: int, shift: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return what is added to the scores of shifted windows: -100 between positions that were not neighbours.

    After a cyclic shift of a map of (rows, columns) windows the last ones hold pieces of up to four regions; positions
    attend within their own. -> (rows * columns, window * window, window * window)
    """

    def regions(n: int) -> torch.Tensor:
        index = torch.arange(n * window, device=device)
        return (index >= (n - 1) * window).long() + (index >= n * window - shift).long()

    region = regions(rows)[:, None] * 3 + regions(columns)[None, :]
    region = window_partition(region[None, :, :, None], window).squeeze(-1)
    differs = region[:, None, :] != region[:, :, None]
    return torch.zeros(differs.shape, dtype=dtype, device=device).masked_fill_(differs, -100.0)


def relative_position_index(window: int, device: torch.device | None = None) -> torch.Tensor:
    """Return which row of the bias table belongs to each pair of positions in a window: (L, L), L = window * window."""
    y, x = torch.meshgrid(torch.arange(window, device=device), torch.arange(window, device=device), indexing="ij")
    y, x = y.flatten(), x.flatten()
    return (y[:, None] - y + window - 1) * (2 * window - 1) + (x[:, None] - x + window - 1)


@dataclass(frozen=True)
class WindowPlan:
    """How the positions of maps (B, H, W, C) go into windows, shifted or not, and back: one copy each way.

    The cyclic shift separates positions only in the last row and the last column of windows. The plan's windows are
    sorted by that, inner ones first, so that each group has one mask and nothing is repeated for each window.

    Attributes:
        gather: (windows * L,), for each place in a window the row of the map, as (B * H * W, C), that it takes.
        padding: the places that are beyond the map; `gather` is 0 there.
        scatter: (B * H * W,), for each position the row of the windows, as (windows * L, C), that holds it.
        groups: how many windows are inner ones, in the last column alone, in the last row alone, in both.
        mask: (4, 1, L, L), what is added to the scores of each group.
    """

    gather: torch.Tensor
    padding: torch.Tensor
    scatter: torch.Tensor
    groups: tuple[int, ...]
    mask: torch.Tensor


def make_window_plan(batch: int, height: int, width: int, window: int, shift: int, dtype: torch.dtype) -> WindowPlan:
    """Return the plan for maps of a size, on the CPU."""
    with torch.inference_mode(False), torch.device("cpu"):
        index = pad_to_multiple(
            torch.arange(1, batch * height * width + 1).view(batch, height, width, 1), window, window
        )
        windows = window_partition(index.roll((-shift, -shift), dims=(1, 2)), window).squeeze(-1)
        rows, columns = index.shape[1] // window, index.shape[2] // window
        groups = [windows.shape[0], 0, 0, 0]
        if shift:
            group = 2 * (torch.arange(rows) == rows - 1)[:, None] + (torch.arange(columns) == columns - 1)
            group = group.flatten().repeat(batch)
            windows = windows[group.argsort(stable=True)]
            groups = group.bincount(minlength=4).tolist()
        gather = windows.flatten() - 1  # -1 beyond the map
        (inside,), (padding,) = torch.where(gather >= 0), torch.where(gather < 0)
        scatter = torch.empty(batch * height * width, dtype=torch.int32)
        scatter[gather[inside]] = inside.int()
        # Two windows by two have one of each group, in this order.
        mask = shifted_window_mask(2, 2, window, shift, dtype, index.device)[:, None]
        return WindowPlan(gather.clamp(min=0).int(), padding, scatter, tuple(groups), mask)


_cached_window_plan = lru_cache(maxsize=32)(make_window_plan)
CACHED_POSITIONS = 2**17  # beyond, a plan would be megabytes, and takes no time beside the maps that it is for


def window_plan(batch: int, height: int, width: int, window: int, shift: int, dtype: torch.dtype) -> WindowPlan:
    """Return the plan for maps of a size, from a bounded cache: sizes alone decide it, it is never out of date."""
    make = _cached_window_plan if batch * height * width <= CACHED_POSITIONS else make_window_plan
    return make(batch, height, width, window, shift, dtype)


class SwinEmbeddings(nn.Module):
    """The stem: non-overlapping patches, a norm, and (optionally) learned position embeddings."""

    def __init__(self, config: SwinConfig):
        super().__init__()
        self.patch_embeddings = SwinPatchEmbeddings(config)
        (height, width), (patch_height, patch_width) = pair(config.image_size), pair(config.patch_size)
        self.grid = (height // patch_height, width // patch_width)
        self.position_embeddings = (
            nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], config.embed_dim))
            if config.use_absolute_embeddings
            else None
        )
        self.norm = nn.LayerNorm(config.embed_dim)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed an image (B, C, H, W) of any size, padded to whole patches, as (B, h, w, embed_dim)."""
        x = self.norm(self.patch_embeddings(pixel_values))
        if self.position_embeddings is not None:
            x = x + self.positions(x.shape[1], x.shape[2])
        return self.dropout(x)

    def positions(self, height: int, width: int) -> torch.Tensor:
        """Return the position embeddings for a grid, resampled (bicubic) where it is not the configured one."""
        assert self.position_embeddings is not None
        table = self.position_embeddings.view(1, *self.grid, -1)
        # Resampled to its own size a table stays as it is: a traced network asks no question about sizes.
        if is_eager() and (height, width) == self.grid:
            return table
        # The reference fails for any image that is not of the configured size.
        table = F.interpolate(table.permute(0, 3, 1, 2), (height, width), mode="bicubic", align_corners=False)
        return table.permute(0, 2, 3, 1)


class SwinPatchEmbeddings(nn.Module):
    """A convolution whose stride is its kernel."""

    def __init__(self, config: SwinConfig):
        super().__init__()
        size = pair(config.patch_size)
        self.projection = nn.Conv2d(config.num_channels, config.embed_dim, kernel_size=size, stride=size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map an image (B, C, H, W) to (B, ceil(H / patch), ceil(W / patch), embed_dim)."""
        image = pad_to_multiple(channels_last(pixel_values).permute(0, 2, 3, 1), *pair(self.projection.kernel_size))
        return channels_last(self.projection(image.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class SwinPatchMerging(nn.Module):
    """Concatenate the four positions of each 2x2 square, norm, and halve the channels."""

    def __init__(self, dim: int):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), 2 C)."""
        x = pad_to_multiple(x, 2, 2)
        batch, height, width, channels = x.shape
        squares = x.view(batch, height // 2, 2, width // 2, 2, channels)
        # The four are in the order of columns, and of rows within a column.
        x = squares.permute(0, 1, 3, 4, 2, 5).reshape(batch, height // 2, width // 2, 4 * channels)
        if is_exactly(self.reduction, nn.Linear) and on_cpu_without_gradients(x, self.reduction):
            return linear(self.norm(x), self.reduction.weight, self.reduction.bias)
        return self.reduction(self.norm(x))


class SwinSelfAttention(nn.Module):
    """Multi-head attention within windows, with a learned bias for each relative position."""

    def __init__(self, config: SwinConfig, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.window = config.window_size
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * self.window - 1) ** 2, heads))
        self.relative_position_index: torch.Tensor
        self.register_buffer("relative_position_index", relative_position_index(self.window))
        self.query = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.key = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.value = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def bias(self) -> torch.Tensor:
        """Return the relative position bias, (heads, L, L)."""
        length = self.window**2
        table = self.relative_position_bias_table[self.relative_position_index.flatten()]
        return table.view(length, length, self.heads).permute(2, 0, 1).contiguous()

    def forward(
        self, windows: torch.Tensor, mask: torch.Tensor | None, output_attentions: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend within windows (B * windows, L, C), with the mask (B * windows, L, L) of shifted ones.

        Returns the result (B * windows, L, C), and the weights (B * windows, heads, L, L) where they are asked for.
        """
        count, length, channels = windows.shape
        query, key, value = (
            layer(windows).view(count, length, self.heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        bias = self.bias()[None]
        if mask is not None:
            bias = bias + mask[:, None]
        if output_attentions:
            scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + bias
            weights = self.dropout(scores.softmax(-1))
            out = weights @ value
        else:
            weights = None
            dropout = self.dropout.p if self.training else 0.0
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        return out.transpose(1, 2).reshape(count, length, channels), weights

    def attend_in_groups(self, windows: torch.Tensor, plan: WindowPlan) -> torch.Tensor:
        """Attend as `forward` does in evaluation, within a plan's windows (windows, L, C), each group with its mask.

        Some windows at a time: their queries, keys and values are in the cache.
        """
        _, length, channels = windows.shape
        step = max(1, HIDDEN_BYTES // (length * channels * windows.element_size()))
        bias, out = self.bias() + plan.mask, None
        start = 0
        for mask, size in zip(bias.split(1), plan.groups, strict=True):
            for first in range(start, start + size, step):
                last = min(first + step, start + size)
                query, key, value = (
                    linear(windows[first:last], layer.weight, layer.bias)
                    .view(last - first, length, self.heads, -1)
                    .transpose(1, 2)
                    for layer in (self.query, self.key, self.value)
                )
                if out is None:
                    out = windows.new_empty(windows.shape, dtype=query.dtype)
                attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.to(query.dtype))
                out[first:last] = attended.transpose(1, 2).reshape(last - first, length, channels)
            start += size
        return windows if out is None else out


class SwinDense(nn.Module):
    """A linear layer and dropout, under the name that checkpoints give it."""

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
    """Attention within windows, and the layer that mixes its heads."""

    def __init__(self, config: SwinConfig, dim: int, heads: int):
        super().__init__()
        self.self = SwinSelfAttention(config, dim, heads)
        self.output = SwinDense(dim, dim, config.hidden_dropout_prob)

    def forward(
        self, windows: torch.Tensor, mask: torch.Tensor | None, output_attentions: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend within windows (B * windows, L, C); see `SwinSelfAttention.forward`."""
        out, weights = self.self(windows, mask, output_attentions)
        return self.output(out), weights


class SwinLayer(Checkpointed):
    """One block: attention within windows, shifted in every other block, then an MLP, each with a residual."""

    def __init__(self, config: SwinConfig, dim: int, heads: int, shift: int, drop_prob: float):
        super().__init__()
        self.window = config.window_size
        self.shift = shift
        self.layernorm_before = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.attention = SwinAttention(config, dim, heads)
        self.drop_path = drop_path(drop_prob)
        self.layernorm_after = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.intermediate = SwinIntermediate(config, dim)
        self.output = SwinDense(int(config.mlp_ratio * dim), dim, config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor, output_attentions: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map (B, H, W, C) to the same shape, with the attention weights where they are asked for."""
        if not output_attentions and self._is_plain(x):
            weights = None
            x = self.attend_in_plan(x)
            if not x.requires_grad:  # the first norm, which is called, may bring a gradient
                mlp = self.layernorm_after, self.intermediate.dense, self.intermediate.intermediate_act_fn
                return residual_mlp(x, x, *mlp, self.output.dense), None
        else:
            attended, weights = self.attend(self.layernorm_before(x), output_attentions)
            x = x + self.drop_path(attended)
        # As the reference has it, stochastic depth drops the attention and never the MLP.
        return x + self.mlp(x), weights

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the MLP adds to a map (B, H, W, C)."""
        first, act = self.intermediate.dense, self.intermediate.intermediate_act_fn
        plain = is_plain_mlp(self.layernorm_after, first, act, self.output.dense)
        if not plain or not is_untouched(self.intermediate, self.output):
            return self.output(self.intermediate(self.layernorm_after(x)))
        hidden = recomputed(lambda x: first(self.layernorm_after(x)), x)
        return recomputed(lambda x: self.output(act(x)), hidden)

    def attend(self, x: torch.Tensor, output_attentions: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Pad to whole windows, shift, attend, and undo the shift and the padding."""
        batch, height, width, _ = x.shape
        rows, columns = (height + self.window - 1) // self.window, (width + self.window - 1) // self.window
        x = pad_to_multiple(x, self.window, self.window)
        mask = None
        if self.shift:
            x = x.roll((-self.shift, -self.shift), dims=(1, 2))
            mask = shifted_window_mask(rows, columns, self.window, self.shift, x.dtype, x.device).repeat(batch, 1, 1)
        windows, weights = self.attention(window_partition(x, self.window), mask, output_attentions)
        x = window_reverse(windows, self.window, batch, rows, columns)
        if self.shift:
            x = x.roll((self.shift, self.shift), dims=(1, 2))
        return crop(x, height, width), weights

    def attend_in_plan(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x + attend(layernorm_before(x))` for x (B, H, W, C), with one copy into windows and one back."""
        batch, height, width, channels = x.shape
        plan = window_plan(batch, height, width, self.window, self.shift, x.dtype)
        rows = self.layernorm_before(x).reshape(-1, channels)
        windows = F.embedding(plan.gather, rows)  # index_select, in parallel
        del rows
        if plan.padding.numel():
            windows.index_fill_(0, plan.padding, 0.0)
        attention = self.attention.self
        attended = attention.attend_in_groups(windows.view(-1, self.window**2, channels), plan)
        rows = F.embedding(plan.scatter, attended.view(-1, channels)).view(x.shape)
        dense = self.attention.output.dense
        return linear(rows, dense.weight, dense.bias, residual=x)

    def _is_plain(self, x: torch.Tensor) -> bool:
        """Return whether everything that the quick way goes past is as it was built."""
        attention, output = self.attention.self, self.attention.output
        linears = attention.query, attention.key, attention.value, output.dense
        act = self.intermediate.intermediate_act_fn
        mlp = self.layernorm_after, self.intermediate.dense, act, self.output.dense
        return (
            all(is_exactly(layer, nn.Linear) for layer in linears)
            and is_plain_mlp(*mlp)
            and is_untouched(self.attention, attention, output, self.intermediate, self.output)
            and all(map(does_nothing, (self.drop_path, attention.dropout, output.dropout, self.output.dropout)))
            and on_cpu_without_gradients(x, attention, *linears, *mlp)
        )


class SwinStage(nn.Module):
    """Blocks, then (but in the last stage) patch merging."""

    def __init__(self, config: SwinConfig, dim: int, heads: int, drop_probs: list[float], merges: bool):
        super().__init__()
        shift = config.window_size // 2
        self.blocks = nn.ModuleList(
            SwinLayer(config, dim, heads, shift if i % 2 else 0, p) for i, p in enumerate(drop_probs)
        )
        self.downsample = SwinPatchMerging(dim) if merges else None

    def forward(
        self, x: torch.Tensor, output_attentions: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Map (B, H, W, C) to the same shape.

        Returns:
            The stage's map, the merged one (B, ceil(H / 2), ceil(W / 2), 2 C) that goes on (the same map in the last
            stage), and the last block's attention weights where they are asked for.
        """
        weights = None
        for block in self.blocks:
            x, weights = block(x, output_attentions)
        return x, x if self.downsample is None else self.downsample(x), weights


class SwinEncoder(nn.Module):
    """The stages."""

    def __init__(self, config: SwinConfig):
        super().__init__()
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").split(config.depths)
        last = len(config.depths) - 1
        self.layers = nn.ModuleList(
            SwinStage(config, config.embed_dim * 2**i, heads, rates[i].tolist(), merges=i < last)
            for i, heads in enumerate(config.num_heads)
        )


class SwinBackbone(Backbone):
    """Swin, returning the normed maps of the stages in `config.out_features`, each before its patch merging."""

    config: SwinConfig

    def __init__(self, config: SwinConfig):
        stages = [config.embed_dim * 2**i for i in range(len(config.depths))]
        super().__init__(config, [config.embed_dim, *stages])
        self.embeddings = SwinEmbeddings(config)
        self.encoder = SwinEncoder(config)
        self.hidden_states_norms = nn.ModuleDict(
            {name: nn.LayerNorm(dim) for name, dim in zip(self.out_features, self.channels, strict=True)}
        )

    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool = False, output_attentions: bool = False
    ) -> BackboneOutput:
        """Return the feature maps of an image (B, C, H, W).

        Raises:
            ValueError: the image has another number of channels than the configuration.
        """
        self.check_channels(pixel_values)
        feature_maps, hidden_states, attentions = [], [], []

        def add(name: str, out: torch.Tensor) -> None:
            if name in self.out_features:
                feature_maps.append(self.hidden_states_norms[name](out).permute(0, 3, 1, 2))
            if output_hidden_states:  # else nothing keeps a map once the next stage has read it
                hidden_states.append(out.permute(0, 3, 1, 2).contiguous())

        stem, *names = self.stage_names
        x = self.embeddings(pixel_values)
        add(stem, x)
        for name, stage in zip(names, self.encoder.layers, strict=True):
            out, x, weights = stage(x, output_attentions)
            add(name, out)
            attentions.append(weights)
        return BackboneOutput(
            tuple(feature_maps),
            tuple(hidden_states) if output_hidden_states else None,
            tuple(attentions) if output_attentions else None,
        )

    def initialize_tensor(self, module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        """Fill one parameter or buffer with its initial value."""
        if name == "relative_position_index":
            tensor.copy_(relative_position_index(self.config.window_size, tensor.device))
        elif name in ("relative_position_bias_table", "position_embeddings"):
            nn.init.zeros_(tensor)
        else:
            super().initialize_tensor(module, name, tensor)

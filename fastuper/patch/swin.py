"""Transformers' Swin, accelerated: its blocks, its patch merging, and the stem, whose maps are channels_last.

Transformers 4 and 5 name and nest the modules of a block differently.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.swin import modeling_swin as theirs

from fastuper.models.backbones import rewrites
from fastuper.models.backbones.layers import channels_last, pair
from fastuper.models.backbones.swin import WindowAttention, gathered_bias
from fastuper.models.backbones.windows import attend_in_windows
from fastuper.models.untouched import is_exactly
from fastuper.patch.accelerated import Accelerated, why_another_class, why_touched_inside
from fastuper.patch.transformers_layers import know, know_drops

know_drops(theirs.SwinDropPath)


class SwinPatchEmbeddings(Accelerated, theirs.SwinPatchEmbeddings, replaces=theirs.SwinPatchEmbeddings):
    """The stem's convolution. From a channels_last image its result needs no copy to (B, L, C)."""

    is_container = True

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Embed an image (B, C, H, W) as (B, h * w, embed_dim); also return (h, w)."""
        return super().forward(channels_last(pixel_values))


class SwinPatchMerging(Accelerated, theirs.SwinPatchMerging, replaces=theirs.SwinPatchMerging):
    """The patch merging."""

    rewrite = rewrites.SWIN_PATCH_MERGING

    def why_not(self) -> str:
        """See `Accelerated.why_not`."""
        return why_touched_inside(self, called=("norm",)) or why_another_class(self, nn.Linear, "reduction")

    def forward(self, input_feature: torch.Tensor, input_dimensions: tuple[int, int]) -> torch.Tensor:
        """Map (B, H * W, C) to (B, ceil(H / 2) * ceil(W / 2), 2 C); `input_dimensions` is (H, W)."""
        if rewrites.apply_to(self, input_feature):
            batch, _, channels = input_feature.shape
            return rewrites.run(self, input_feature.view(batch, *input_dimensions, channels)).flatten(1, 2)
        return super().forward(input_feature, input_dimensions)


class SwinSteps(nn.Module):
    """What the blocks of both versions of Transformers share."""

    rewrite = rewrites.SWIN_LAYER
    pads_before_shift = True
    attention: Any
    window_size: Any
    shift_size: Any

    def why_touched(self, *linears: str) -> str:
        """Return what excludes the faster way in evaluation, in words; `linears` are the names of linear layers."""
        # The block calls its first norm.
        return why_touched_inside(self, called=("layernorm_before",)) or why_another_class(self, nn.Linear, *linears)

    def run(self, x: torch.Tensor, size: tuple[int, int], output_attentions: bool) -> tuple[Any, ...] | None:
        """Return the block's result for (B, H * W, C) and the attention weights, or None if no faster way applies."""
        maps = x.view(x.shape[0], *size, x.shape[2])
        if not rewrites.apply_to(self, maps, output_attentions):
            return None
        out, weights = rewrites.run(self, maps, output_attentions)
        return out.view(x.shape), weights


if hasattr(theirs, "SwinSelfAttention"):  # Transformers 4
    know(theirs.SwinAttention, theirs.SwinSelfOutput, theirs.SwinIntermediate, theirs.SwinOutput)
    LINEARS = (
        *(f"attention.{name}" for name in ("self.query", "self.key", "self.value", "output.dense")),
        "intermediate.dense",
        "output.dense",
    )

    class SwinSelfAttention(Accelerated, theirs.SwinSelfAttention, WindowAttention, replaces=theirs.SwinSelfAttention):
        """The heads, with the methods that the block's faster way calls."""

        is_shown = False

        @property
        def scale(self) -> float:  # type: ignore[override]
            """The factor of the scores."""
            return self.attention_head_size**-0.5

        def bias(self) -> torch.Tensor:
            """Return the relative position bias, (heads, L, L)."""
            return gathered_bias(self.relative_position_bias_table, self.relative_position_index)

    class SwinLayer(Accelerated, SwinSteps, theirs.SwinLayer, replaces=theirs.SwinLayer):
        """A block."""

        def why_not(self) -> str:
            """See `Accelerated.why_not`."""
            return self.why_touched(*LINEARS)

        def forward(
            self,
            hidden_states: torch.Tensor,
            input_dimensions: tuple[int, int],
            head_mask: torch.Tensor | None = None,
            output_attentions: bool | None = False,
            always_partition: bool | None = False,
        ) -> tuple[torch.Tensor, ...]:
            """Map (B, H * W, C) to the same shape; `input_dimensions` is (H, W). See Transformers."""
            if head_mask is None and always_partition:
                result = self.run(hidden_states, input_dimensions, bool(output_attentions))
                if result is not None:
                    return result if output_attentions else result[:1]
            return super().forward(hidden_states, input_dimensions, head_mask, output_attentions, always_partition)

        def attention_parts(self) -> rewrites.AttentionParts | None:
            """See `rewrites.SwinBlock`."""
            attention = self.attention
            if not is_exactly(attention, theirs.SwinAttention):
                return None
            heads, output = attention.self, attention.output
            if not is_exactly(heads, SwinSelfAttention) or not is_exactly(output, theirs.SwinSelfOutput):
                return None
            return rewrites.AttentionParts(heads, output.dense, (heads.dropout, output.dropout))

        def mlp_parts(self) -> rewrites.MlpParts | None:
            """See `rewrites.SwinBlock`."""
            first, output = self.intermediate, self.output
            if not is_exactly(first, theirs.SwinIntermediate) or not is_exactly(output, theirs.SwinOutput):
                return None
            layers = self.layernorm_after, first.dense, first.intermediate_act_fn, output.dense
            return rewrites.MlpParts(layers, output.dropout)

        def attend(self, x: torch.Tensor, output_attentions: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
            """See `rewrites.SwinBlock`."""

            def call(windows: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
                out, *weights = self.attention(windows, mask, None, output_attentions=output_attentions)
                return out, weights[0] if weights else None

            return attend_in_windows(call, x, pair(self.window_size), pair(self.shift_size), self.pads_before_shift)

else:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    know(theirs.SwinMLP, theirs.SwinRelativePositionBias)
    LINEARS = (*(f"attention.{name}_proj" for name in "qkvo"), "mlp.fc1", "mlp.fc2")

    def is_usual(implementation: str) -> bool:
        """Return True if an attention implementation, by its name, is PyTorch's."""
        return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, None) is sdpa_attention_forward

    class SwinAttention(Accelerated, theirs.SwinAttention, WindowAttention, replaces=theirs.SwinAttention):
        """The attention, with the methods that the block's faster way calls."""

        is_shown = False

        query = property(lambda self: self.q_proj)
        key = property(lambda self: self.k_proj)
        value = property(lambda self: self.v_proj)
        scale = property(lambda self: self.scaling)

        def bias(self) -> torch.Tensor:
            """Return the relative position bias, (heads, L, L)."""
            return self.relative_position_bias()[0]

    class SwinLayer(Accelerated, SwinSteps, theirs.SwinLayer, replaces=theirs.SwinLayer):  # type: ignore[no-redef]
        """A block."""

        def why_not(self) -> str:
            """See `Accelerated.why_not`."""
            if why := self.why_touched(*LINEARS):
                return why
            name = self.attention.config._attn_implementation
            return "" if is_usual(name) else f"attention: its implementation is {name!r}"

        def forward(
            self,
            hidden_states: torch.Tensor,
            input_dimensions: tuple[int, int],
            always_partition: bool = False,
            **kwargs: Any,
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            """Map (B, H * W, C) to the same shape; `input_dimensions` is (H, W). See Transformers."""
            # An option may be for an attention implementation of the user.
            if always_partition and not any(kwargs.values()):
                result = self.run(hidden_states, input_dimensions, False)
                if result is not None:
                    return result
            return super().forward(hidden_states, input_dimensions, always_partition, **kwargs)

        def attention_parts(self) -> rewrites.AttentionParts | None:
            """See `rewrites.SwinBlock`."""
            attention = self.attention
            if not is_exactly(attention, SwinAttention) or not is_usual(attention.config._attn_implementation):
                return None
            if attention.training and attention.attention_dropout:
                return None
            return rewrites.AttentionParts(attention, attention.o_proj, (self.dropout,))

        def mlp_parts(self) -> rewrites.MlpParts | None:
            """See `rewrites.SwinBlock`."""
            mlp = self.mlp
            if not is_exactly(mlp, theirs.SwinMLP):
                return None
            return rewrites.MlpParts((self.layernorm_after, mlp.fc1, mlp.activation_fn, mlp.fc2), self.dropout)

        def attend(self, x: torch.Tensor, output_attentions: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
            """See `rewrites.SwinBlock`."""

            def call(windows: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
                out, weights = self.attention(windows, mask)
                return self.dropout(out), weights

            return attend_in_windows(call, x, pair(self.window_size), pair(self.shift_size), self.pads_before_shift)

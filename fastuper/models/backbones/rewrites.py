"""Faster ways to compute the blocks of our backbones. Each has the same result as the block's textbook forward.

A block that has a faster way names it in the class attribute `rewrite`, and its forward begins with one check:

    if rewrites.apply_to(self, x):
        return rewrites.run(self, x)

In inference on a CPU, attention and MLPs run part by part, so that queries and hidden layers stay in the cache. The
operation `linear` fuses an activation or a residual, `conv_bn_relu` a BatchNorm and a ReLU.

In training, on any device, the backward pass computes norms and activations again: their results need no memory.

No rewrite applies if a part of the block is hooked, replaced or quantised (`fastuper/models/untouched.py`), or while a
tracer runs. The textbook forward then calls each module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from fastuper.models.backbones.layers import DropPath, pair
from fastuper.models.backbones.windows import Sides, shifted, shifted_window_mask, squares, window_partition
from fastuper.models.gradient_checkpointing import recomputed
from fastuper.models.norms import fold, is_fixed_norm
from fastuper.models.untouched import is_exactly, is_supported_conv, is_untouched
from fastuper_kernels import conv_bn_relu, linear
from fastuper_kernels.dispatch.modes import is_eager, is_eager_inference
from fastuper_kernels.dispatch.torch_private import parameters_of

if TYPE_CHECKING:
    from fastuper.models.backbones.convnext import ConvNextLayer
    from fastuper.models.backbones.convnextv2 import ConvNextV2GRN, ConvNextV2Layer
    from fastuper.models.backbones.resnet import ResNetConvLayer
    from fastuper.models.backbones.swin import SwinPatchMerging, WindowAttention
    from fastuper.models.backbones.swinv2 import Swinv2Layer, Swinv2PatchMerging

HIDDEN_BYTES = 2**22
"""Bytes of an MLP's hidden layer, or of attention's queries, that are in memory at once, for maps of any size. They fit
into a cache, and malloc returns the same memory for each part."""

KEPT_BYTES = 2**28
"""Bytes of the hidden layer of one image that are kept while ConvNeXt V2's GRN needs the norms of its channels. A
larger hidden layer is computed twice."""

CACHED_POSITIONS = 2**17
"""Positions of the largest map whose window plan is cached. A larger plan takes megabytes. It is made
in little time compared with the attention that uses it."""


# Dispatch -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rewrite:
    """The faster ways of a class of blocks. All functions take the block first, then the arguments of its forward.

    Args:
        can_infer: returns True if `infer` computes the block's forward.
        infer: the way on a CPU without gradients.
        can_train: returns True if `train` computes the forward of a block, its one argument.
        train: the way that saves memory where gradients are enabled; None, like `can_train`, if the class has no such
            way.
    """

    can_infer: Callable[..., bool]
    infer: Callable[..., Any]
    can_train: Callable[[Any], bool] | None = None
    train: Callable[..., Any] | None = None


def apply_to(block: Any, x: torch.Tensor, *args: Any) -> bool:
    """Return True if `run`, with the same arguments, computes the forward of a block.

    Args:
        block: a module whose class has the attribute `rewrite`.
        x: the first argument of its forward.
        *args: the other arguments.
    """
    if not is_eager():
        return False
    rewrite: Rewrite = block.rewrite
    if rewrite.can_infer(block, x, *args):
        return True
    return rewrite.can_train is not None and torch.is_grad_enabled() and rewrite.can_train(block)


def run(block: Any, x: torch.Tensor, *args: Any) -> Any:
    """Return the result of a block's forward, computed faster; `apply_to` has returned True for these arguments."""
    rewrite: Rewrite = block.rewrite
    # Without `train`, or without gradients, `apply_to` returned True because of `can_infer`, which need not run again.
    if rewrite.train is None or not torch.is_grad_enabled() or rewrite.can_infer(block, x, *args):
        return rewrite.infer(block, x, *args)
    return rewrite.train(block, x, *args)


def on_cpu_without_gradients(x: torch.Tensor, *modules: nn.Module) -> bool:
    """Return True if x is on the CPU, nothing traces, and neither x nor a parameter of the modules needs a gradient."""
    if x.device.type != "cpu":
        return False
    return is_eager_inference(x, *(p for module in modules for p in parameters_of(module).values()))


DROPS: set[type[nn.Module]] = {DropPath, nn.Dropout}
"""Classes of modules that return their input in evaluation. `fastuper.patch` adds those of other libraries."""


def does_nothing(module: nn.Module) -> bool:
    """Return True if an untouched module returns its input: Identity, and in evaluation DropPath and Dropout."""
    if is_exactly(module, nn.Identity):
        return True
    return type(module) in DROPS and is_untouched(module) and not module.training


def are_own(module: Any, *names: str) -> bool:
    """Return True if these children of a module are untouched, and of the classes in its table `parts`."""
    return all(is_exactly(getattr(module, name), module.parts[name]) for name in names)


# MLPs -----------------------------------------------------------------------------------------------------------------


def is_untouched_mlp(norm: nn.Module, first: nn.Module, act: nn.Module, second: nn.Module) -> bool:
    """Return True if `residual_mlp` and `recomputed_mlp` have the result of these modules called one after another."""
    layers = is_exactly(first, nn.Linear) and is_exactly(second, nn.Linear) and is_layer_norm(norm)
    return layers and is_untouched(act)


LAYER_NORMS: set[type[nn.Module]] = {nn.LayerNorm}
"""Classes of LayerNorms. `fastuper.patch` adds those of other libraries."""


def is_layer_norm(norm: nn.Module) -> bool:
    """Return True if an untouched module is a LayerNorm over the last dimension."""
    is_norm = type(norm) in LAYER_NORMS and is_untouched(norm)
    return is_norm and getattr(norm, "data_format", "channels_last") == "channels_last"


FUSED_ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu"}
"""`linear`'s names of activations. `fastuper.patch` adds those of other libraries."""


def fused_activation(module: nn.Module) -> str | None:
    """Return `linear`'s name of an activation, or None if it fuses no such activation."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return FUSED_ACTIVATIONS.get(type(module))


def _normed(x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def residual_mlp(
    residual: torch.Tensor,
    x: torch.Tensor,
    norm: nn.LayerNorm,
    first: nn.Linear,
    act: nn.Module,
    second: nn.Linear,
    scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `residual + scale * second(act(first(norm(x))))`, some positions at a time: the hidden layer is cached.

    Args:
        residual: (..., C).
        x: (..., C); it may be the residual itself.
        norm: LayerNorm over C.
        first: linear layer, C to the hidden width.
        act: activation.
        second: linear layer, hidden width to C.
        scale: (C,), LayerScale; None for 1.
        out: (..., C), contiguous: memory for the result, used if its dtype is the result's. It may be x itself.

    Returns:
        (..., C), in the dtype to which the sum promotes.
    """
    channels = x.shape[-1]
    positions, residuals = x.reshape(-1, channels), residual.reshape(-1, channels)
    name = fused_activation(act)
    # A map without positions is one block without positions, which PyTorch's operators accept.
    blocks = max(1, -(-len(positions) * first.out_features * x.element_size() // HIDDEN_BYTES))
    block = max(1, -(-len(positions) // blocks))
    results: torch.Tensor | None = None
    for start in range(0, max(1, len(positions)), block):
        part, other = positions[start : start + block], residuals[start : start + block]
        hidden = _normed(part, norm)
        hidden = linear(hidden, first.weight, first.bias, activation=name)
        hidden = hidden if name else act(hidden)
        if scale is None and blocks == 1:
            return linear(hidden, second.weight, second.bias, residual=other).view(residual.shape)
        branch = linear(hidden, second.weight, second.bias)
        if results is None:
            dtype = torch.promote_types(other.dtype, branch.dtype)
            dtype = dtype if scale is None else torch.promote_types(dtype, scale.dtype)
            if out is None or out.dtype != dtype or not out.is_contiguous():
                out = torch.empty(residual.shape, dtype=dtype, device=x.device)
            results = out.view(-1, channels)
        if scale is None:
            torch.add(other, branch, out=results[start : start + block])
        else:
            torch.addcmul(other, scale, branch, out=results[start : start + block])
    assert out is not None
    return out


def recomputed_mlp(
    x: torch.Tensor, norm: nn.Module, first: nn.Module, act: nn.Module, second: nn.Module
) -> torch.Tensor:
    """Return `second(act(first(norm(x))))`, (..., C); the backward pass computes the norm and the activation again."""
    hidden = recomputed(lambda x: first(norm(x)), x)
    return recomputed(lambda x: second(activated(act, x)), hidden)


def activated(act: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return `act(x)`; x keeps its values, which the backward pass reads again, also if `act` works in place."""
    result: torch.Tensor = act(x.clone() if getattr(act, "inplace", False) else x)
    return result


# ConvNeXt -------------------------------------------------------------------------------------------------------------


def _convnext_mlp(block: ConvNextLayer) -> tuple[nn.LayerNorm, nn.Linear, nn.Module, nn.Linear]:
    return block.layernorm, block.pwconv1, block.act, block.pwconv2


def _can_infer_convnext(block: ConvNextLayer, x: torch.Tensor) -> bool:
    mlp = _convnext_mlp(block)
    untouched = is_exactly(block.dwconv, nn.Conv2d) and is_untouched_mlp(*mlp) and does_nothing(block.drop_path)
    return untouched and on_cpu_without_gradients(x, block, block.dwconv, *mlp)


def _infer_convnext(block: ConvNextLayer, x: torch.Tensor) -> torch.Tensor:
    out = block.dwconv(x).permute(0, 2, 3, 1)
    # Nothing else reads the convolution's result: the sum overwrites it.
    scale = block.layer_scale_parameter
    return residual_mlp(x.permute(0, 2, 3, 1), out, *_convnext_mlp(block), scale, out).permute(0, 3, 1, 2)


def _can_train_convnext(block: ConvNextLayer) -> bool:
    return is_untouched_mlp(*_convnext_mlp(block))


def _train_convnext(block: ConvNextLayer, x: torch.Tensor) -> torch.Tensor:
    out = block.dwconv(x).permute(0, 2, 3, 1)
    out = recomputed_mlp(out, *_convnext_mlp(block))
    scale = block.layer_scale_parameter
    out = out if scale is None else scale * out
    return x + block.drop_path(out.permute(0, 3, 1, 2))


CONVNEXT_LAYER = Rewrite(_can_infer_convnext, _infer_convnext, _can_train_convnext, _train_convnext)


# ConvNeXt V2 ----------------------------------------------------------------------------------------------------------


def _can_infer_convnextv2(block: ConvNextV2Layer, x: torch.Tensor) -> bool:
    mlp = block.layernorm, block.pwconv1, block.act, block.pwconv2
    untouched = is_exactly(block.dwconv, nn.Conv2d) and is_untouched_mlp(*mlp) and are_own(block, "grn")
    return untouched and does_nothing(block.drop_path) and on_cpu_without_gradients(x, block.dwconv, block.grn, *mlp)


def _infer_convnextv2(block: ConvNextV2Layer, x: torch.Tensor) -> torch.Tensor:
    out = block.dwconv(x).permute(0, 2, 3, 1)
    mlp = block.layernorm, block.pwconv1, block.act, block.grn, block.pwconv2
    return residual_grn_mlp(x.permute(0, 2, 3, 1), out, *mlp).permute(0, 3, 1, 2)


def residual_grn_mlp(
    residual: torch.Tensor,
    x: torch.Tensor,
    norm: nn.LayerNorm,
    first: nn.Linear,
    act: nn.Module,
    grn: ConvNextV2GRN,
    second: nn.Linear,
) -> torch.Tensor:
    """Return `residual + second(grn(act(first(norm(x)))))` for maps (B, H, W, C), one image at a time.

    When the norms of an image's hidden channels are known, GRN multiplies each channel by one number and adds another.
    The second layer does both: its weight is multiplied, and its bias changed.
    """
    name = fused_activation(act)

    def hidden_layer(part: torch.Tensor) -> torch.Tensor:
        hidden = _normed(part, norm)
        hidden = linear(hidden, first.weight, first.bias, activation=name)
        return hidden if name else act(hidden)

    bias = linear(grn.bias.flatten(), second.weight, second.bias)
    position_bytes = first.out_features * x.element_size()
    step = max(1, HIDDEN_BYTES // position_bytes)
    out = torch.empty(residual.shape, dtype=torch.promote_types(residual.dtype, x.dtype), device=x.device)
    for image, other, result in zip(*(maps.flatten(1, 2) for maps in (x, residual, out)), strict=True):
        kept = hidden_layer(image) if len(image) * position_bytes <= KEPT_BYTES else None
        parts = image.split(step) if kept is None else kept.split(step)
        squares = torch.stack([sums_of_squares(hidden_layer(p) if kept is None else p) for p in parts]).sum(0)
        scale = 1 + grn.weight.flatten() * grn.relative(squares.sqrt())
        weight = (second.weight * scale).to(second.weight.dtype)
        if kept is not None:
            result[:] = linear(kept, weight, bias, residual=other)
            continue
        for part, to, place in zip(parts, other.split(step), result.split(step), strict=True):
            place[:] = linear(hidden_layer(part), weight, bias, residual=to)
    return out


def sums_of_squares(x: torch.Tensor) -> torch.Tensor:
    """Return the sums of the squares of the channels of x (N, C), (C,), at least in float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return (x * x).sum(0)


def _can_train_convnextv2(block: ConvNextV2Layer) -> bool:
    return is_untouched_mlp(block.layernorm, block.pwconv1, block.act, block.pwconv2) and are_own(block, "grn")


def _train_convnextv2(block: ConvNextV2Layer, x: torch.Tensor) -> torch.Tensor:
    out = block.dwconv(x).permute(0, 2, 3, 1)
    out = recomputed(lambda x: block.pwconv1(block.layernorm(x)), out)
    out = recomputed(lambda x: block.pwconv2(block.grn(activated(block.act, x))), out)
    return x + block.drop_path(out.permute(0, 3, 1, 2))


CONVNEXTV2_LAYER = Rewrite(_can_infer_convnextv2, _infer_convnextv2, _can_train_convnextv2, _train_convnextv2)


# Swin: blocks ---------------------------------------------------------------------------------------------------------


class SwinBlock(Protocol):
    """What the faster ways read of a Swin block. Libraries name and nest its modules differently.

    Attributes:
        window_size: sides of the windows.
        shift_size: rows and columns of the shift.
        pads_before_shift: see `shifted`.
        layernorm_before: the norm before the attention.
        drop_path: stochastic depth of the attention.
    """

    window_size: Any
    shift_size: Any
    pads_before_shift: bool
    layernorm_before: Any
    drop_path: Any

    def attention_parts(self) -> AttentionParts | None:
        """Return the modules of the attention; None if a module that holds them is touched."""

    def mlp_parts(self) -> MlpParts | None:
        """Return the modules of the MLP; None if a module that holds them is touched."""

    def attend(self, x: torch.Tensor, output_attentions: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the attention's result for a map (B, H, W, C), and its weights or None."""


@dataclass(frozen=True)
class AttentionParts:
    """The modules of attention within windows.

    Attributes:
        heads: the heads, a `WindowAttention` or a module with the same methods.
        dense: the layer that mixes the heads.
        drops: the modules that drop weights or results.
    """

    heads: Any
    dense: Any
    drops: tuple[nn.Module, ...]

    def linears(self) -> tuple[Any, ...]:
        """Return the linear layers."""
        return self.heads.query, self.heads.key, self.heads.value, self.dense


@dataclass(frozen=True)
class MlpParts:
    """The modules of an MLP, in the order of their calls.

    Attributes:
        layers: the norm, the first linear layer, the activation and the second linear layer.
        dropout: the dropout of the result.
    """

    layers: tuple[Any, Any, Any, Any]
    dropout: nn.Module


def _can_infer_swin(block: SwinBlock, x: torch.Tensor, output_attentions: bool) -> bool:
    # `layernorm_before` is not in the list: `_infer_swin` calls the module.
    attention, mlp = block.attention_parts(), block.mlp_parts()
    if output_attentions or attention is None or mlp is None:
        return False
    return (
        all(is_exactly(layer, nn.Linear) for layer in attention.linears())
        and is_untouched_mlp(*mlp.layers)
        and all(map(does_nothing, (block.drop_path, *attention.drops, mlp.dropout)))
        and on_cpu_without_gradients(x, *attention.heads.modules(), attention.dense, *mlp.layers)
    )


def _infer_swin(block: SwinBlock, x: torch.Tensor, output_attentions: bool) -> tuple[torch.Tensor, None]:
    attention, mlp = block.attention_parts(), block.mlp_parts()
    assert attention is not None
    assert mlp is not None
    plan, attended = _attended_windows(block, attention.heads, block.layernorm_before(x))
    positions = F.embedding(plan.scatter, attended).view(x.shape)
    x = linear(positions, attention.dense.weight, attention.dense.bias, residual=x)
    if x.requires_grad:  # from `layernorm_before`, which may be the user's own
        return x + recomputed_mlp(x, *mlp.layers), None
    return residual_mlp(x, x, *mlp.layers), None


def _can_train_swin(block: SwinBlock) -> bool:
    mlp = block.mlp_parts()
    return mlp is not None and is_untouched_mlp(*mlp.layers)


def _train_swin(block: SwinBlock, x: torch.Tensor, output_attentions: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    mlp = block.mlp_parts()
    assert mlp is not None
    attended, weights = block.attend(block.layernorm_before(x), output_attentions)
    x = x + block.drop_path(attended)
    return x + mlp.dropout(recomputed_mlp(x, *mlp.layers)), weights


SWIN_LAYER = Rewrite(_can_infer_swin, _infer_swin, _can_train_swin, _train_swin)


# Swin: attention in a plan of windows ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class WindowPlan:
    """The places of a map's positions (B, H, W, C) in its windows, shifted or not: one copy in, one copy back.

    The cyclic shift separates positions only in the last row and the last column of windows. A plan sorts the windows
    into four groups. Each group has one mask, which is not repeated for each window.

    Attributes:
        gather: (windows * L,), int32: the position of the map, as (B * H * W, C), for each position of the windows.
        padding: positions of the windows that lie beyond the map; `gather` is 0 there.
        scatter: (B * H * W,), int32: the position of the windows, as (windows * L, C), for each position of the map.
        groups: the number of windows in neither, in only the last column, in only the last row, and in both.
        mask: (4, 1, L, L), added to the scores of each group.
    """

    gather: torch.Tensor
    padding: torch.Tensor
    scatter: torch.Tensor
    groups: tuple[int, ...]
    mask: torch.Tensor


def make_window_plan(
    batch: int, height: int, width: int, window: Sides, shift: Sides, pads_before_shift: bool, dtype: torch.dtype
) -> WindowPlan:
    """Return the plan for maps (batch, height, width, C), on the CPU, with masks of a dtype."""
    with torch.inference_mode(False), torch.device("cpu"):
        index = torch.arange(1, batch * height * width + 1).view(batch, height, width, 1)
        index = shifted(index, window, shift, pads_before_shift)
        windows = window_partition(index, window).squeeze(-1)
        rows, columns = index.shape[1] // window[0], index.shape[2] // window[1]
        groups = [windows.shape[0], 0, 0, 0]
        if any(shift):
            group = 2 * (torch.arange(rows) == rows - 1)[:, None] + (torch.arange(columns) == columns - 1)
            group = group.flatten().repeat(batch)
            windows = windows[group.argsort(stable=True)]
            groups = group.bincount(minlength=4).tolist()
        gather = windows.flatten() - 1  # -1 beyond the map
        (inside,), (padding,) = torch.where(gather >= 0), torch.where(gather < 0)
        scatter = torch.empty(batch * height * width, dtype=torch.int32)
        scatter[gather[inside]] = inside.int()
        # A map of 2 x 2 windows has one window of each group, in the order of the groups.
        mask = shifted_window_mask(2, 2, window, shift, dtype, index.device)[:, None]
        return WindowPlan(gather.clamp(min=0).int(), padding, scatter, tuple(groups), mask)


_cached_window_plan = lru_cache(maxsize=32)(make_window_plan)


def window_plan(
    batch: int, height: int, width: int, window: Sides, shift: Sides, pads_before_shift: bool, dtype: torch.dtype
) -> WindowPlan:
    """Return `make_window_plan`'s result, from a bounded cache for small maps; its arguments alone determine it."""
    make = _cached_window_plan if batch * height * width <= CACHED_POSITIONS else make_window_plan
    return make(batch, height, width, window, shift, pads_before_shift, dtype)


def _attended_windows(
    block: SwinBlock | Swinv2Layer, heads: WindowAttention, x: torch.Tensor
) -> tuple[WindowPlan, torch.Tensor]:
    """Return the plan for a map (B, H, W, C), and the heads' results in its windows, (windows * L, C)."""
    batch, height, width, channels = x.shape
    window, shift = pair(block.window_size), pair(block.shift_size)
    plan = window_plan(batch, height, width, window, shift, block.pads_before_shift, x.dtype)
    windows = F.embedding(plan.gather, x.reshape(-1, channels))  # a parallel index_select
    del x
    if plan.padding.numel():
        windows.index_fill_(0, plan.padding, 0.0)
    windows = windows.view(-1, window[0] * window[1], channels)
    return plan, attend_in_groups(heads, windows, plan).view(-1, channels)


def attend_in_groups(attention: WindowAttention, windows: torch.Tensor, plan: WindowPlan) -> torch.Tensor:
    """Return the result of `attention` in evaluation for a plan's windows (windows, L, C), each group with its mask.

    The loop runs some windows at a time: their queries, keys and values stay in the cache.
    """
    _, length, channels = windows.shape
    step = max(1, HIDDEN_BYTES // (length * channels * windows.element_size()))
    bias, out = attention.bias() + attention.mask_weight * plan.mask, None
    start = 0
    for mask, size in zip(bias.split(1), plan.groups, strict=True):
        for first in range(start, start + size, step):
            last = min(first + step, start + size)
            query, key, value = (
                attention.split_heads(linear(windows[first:last], layer.weight, layer.bias))
                for layer in (attention.query, attention.key, attention.value)
            )
            if out is None:
                out = windows.new_empty(windows.shape, dtype=query.dtype)
            query, key = attention.compared(query, key)
            attended = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask.to(query.dtype), scale=attention.scale
            )
            out[first:last] = attended.transpose(1, 2).reshape(last - first, length, channels)
        start += size
    return windows if out is None else out


# Swin: patch merging --------------------------------------------------------------------------------------------------


def _can_infer_merging(merging: SwinPatchMerging, x: torch.Tensor) -> bool:
    return is_exactly(merging.reduction, nn.Linear) and on_cpu_without_gradients(x, merging.reduction)


def _infer_merging(merging: SwinPatchMerging, x: torch.Tensor) -> torch.Tensor:
    reduction = merging.reduction
    return linear(merging.norm(squares(x)), reduction.weight, reduction.bias)


SWIN_PATCH_MERGING = Rewrite(_can_infer_merging, _infer_merging)


# Swin V2 --------------------------------------------------------------------------------------------------------------


def _can_infer_swinv2(block: Swinv2Layer, x: torch.Tensor, output_attentions: bool) -> bool:
    norm = block.layernorm_before
    is_known = is_exactly(norm, nn.LayerNorm) and on_cpu_without_gradients(x, norm)
    return is_known and _can_infer_swin(block, x, output_attentions)


def _infer_swinv2(block: Swinv2Layer, x: torch.Tensor, output_attentions: bool) -> tuple[torch.Tensor, None]:
    plan, attended = _attended_windows(block, block.attention.self, x)
    return _after_attention(block, x, plan.scatter, attended), None


def _after_attention(
    block: Swinv2Layer, x: torch.Tensor, scatter: torch.Tensor, attended: torch.Tensor
) -> torch.Tensor:
    """Return the block's result for x (B, H, W, C) from the heads' results in the windows, in parts of the map."""
    first, act, second = block.intermediate.dense, block.intermediate.intermediate_act_fn, block.output.dense
    dense, name = block.attention.output.dense, fused_activation(act)
    positions = x.reshape(-1, x.shape[-1])
    step = max(1, HIDDEN_BYTES // (first.out_features * x.element_size()))
    out: torch.Tensor | None = None
    for start in range(0, max(1, len(positions)), step):
        stop = start + step
        branch = F.embedding(scatter[start:stop], attended)
        part = positions[start:stop] + _normed(linear(branch, dense.weight, dense.bias), block.layernorm_before)
        hidden = linear(part, first.weight, first.bias, activation=name)
        branch = linear(hidden if name else act(hidden), second.weight, second.bias)
        part = part + _normed(branch, block.layernorm_after)
        out = part.new_empty(positions.shape) if out is None else out
        out[start:stop] = part
    assert out is not None
    return out.view(x.shape)


def _can_train_swinv2(block: Swinv2Layer) -> bool:
    if not are_own(block, "intermediate", "output"):
        return False
    first, act, second = block.intermediate.dense, block.intermediate.intermediate_act_fn, block.output.dense
    return is_exactly(first, nn.Linear) and is_exactly(second, nn.Linear) and is_untouched(act, block.output.dropout)


def _train_swinv2(
    block: Swinv2Layer, x: torch.Tensor, output_attentions: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    attended, weights = block.attend(x, output_attentions)
    x = x + block.drop_path(block.layernorm_before(attended))
    act, hidden = block.intermediate.intermediate_act_fn, block.intermediate.dense(x)
    branch = recomputed(lambda x: block.output(activated(act, x)), hidden)
    return x + block.drop_path(block.layernorm_after(branch)), weights


SWINV2_LAYER = Rewrite(_can_infer_swinv2, _infer_swinv2, _can_train_swinv2, _train_swinv2)


def _infer_mergingv2(merging: Swinv2PatchMerging, x: torch.Tensor) -> torch.Tensor:
    reduction = merging.reduction
    return merging.norm(linear(squares(x), reduction.weight, reduction.bias))


SWINV2_PATCH_MERGING = Rewrite(_can_infer_merging, _infer_mergingv2)


# ResNet ---------------------------------------------------------------------------------------------------------------


def _can_infer_resnet(layer: ResNetConvLayer, x: torch.Tensor) -> bool:
    act = layer.activation
    return (
        is_supported_conv(layer.convolution)
        and layer.convolution.bias is None
        and is_fixed_norm(layer.normalization)
        and (is_exactly(act, nn.ReLU) or is_exactly(act, nn.Identity))
        and on_cpu_without_gradients(x, layer.convolution)
    )


def _infer_resnet(layer: ResNetConvLayer, x: torch.Tensor) -> torch.Tensor:
    relu = isinstance(layer.activation, nn.ReLU)
    return conv_bn_relu(x, layer.convolution.weight, *fold(layer.normalization), relu=relu)


RESNET_CONV_LAYER = Rewrite(_can_infer_resnet, _infer_resnet)

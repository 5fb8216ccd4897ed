"""`pool_conv_bn_relu` on a GPU: the means of all scales in one read of the map, then all branches in one GEMM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastuper_kernels.gpu.layout import taps_of
from fastuper_kernels.gpu.pyramid_pool import pyramid_pool, pyramid_pool_backward
from fastuper_kernels.gpu.upsampled_conv3x3 import products_of


@torch.library.custom_op("fastuper::pool_conv_bn_relu", mutates_args=())
def pool_conv_bn_relu(
    x: torch.Tensor,
    scales: Sequence[int],
    weights: Sequence[torch.Tensor],
    scale: Sequence[torch.Tensor],
    shift: Sequence[torch.Tensor],
    pooling: str,
    relu: bool,
) -> torch.Tensor:
    """The operator of `fastuper_kernels.ops.pool_conv_bn_relu`."""
    cells = _by_scale(pyramid_pool(x, scales, pooling), scales)
    taps = [taps_of(weight) for weight in weights]
    multipliers, offsets = (torch.stack(list(vectors)).float() for vectors in (scale, shift))
    return products_of(cells, taps, multipliers, offsets, relu=relu).squeeze(2)


@pool_conv_bn_relu.register_fake
def _(
    x: torch.Tensor,
    scales: Sequence[int],
    weights: Sequence[torch.Tensor],
    scale: Sequence[torch.Tensor],
    shift: Sequence[torch.Tensor],
    pooling: str,
    relu: bool,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], sum(s * s for s in scales), weights[0].shape[0])


def _by_scale(cells: torch.Tensor, scales: Sequence[int]) -> list[torch.Tensor]:
    """Return cells (B, sum of s * s, C) as (B, s * s, C) for each scale s."""
    return list(cells.split([scale * scale for scale in scales], dim=1))


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, ctx.scales, weights, scale, shift, ctx.pooling, ctx.relu = inputs
    ctx.save_for_backward(x, output if ctx.relu else None, *weights, *scale, *shift)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    x, y, *rest = ctx.saved_tensors
    n, scales = len(ctx.scales), ctx.scales
    weights, scale, shift = rest[:n], rest[n : 2 * n], rest[2 * n :]
    cells = _by_scale(pyramid_pool(x, scales, ctx.pooling), scales)
    grads: list[list[Any]] = [[], [], [], []]
    parts = _by_scale(grad * (y > 0) if ctx.relu else grad, scales)
    for cell, part, weight, a, b in zip(cells, parts, weights, scale, shift, strict=True):
        matrix, part = weight.flatten(1), part.flatten(0, 1)
        positions = cell.flatten(0, 1)
        grads[2].append(((positions @ matrix.T).float() * part).sum(0).to(a.dtype))
        grads[3].append(part.sum(0, dtype=torch.float32).to(b.dtype))
        part = (part * a).to(x.dtype)
        grads[0].append((part @ matrix).view_as(cell))
        grads[1].append((part.T @ positions).view_as(weight))
    to_map = pyramid_pool_backward(torch.cat(grads[0], dim=1), scales, ctx.pooling, *x.shape[2:])
    return to_map, None, *grads[1:], None, None


pool_conv_bn_relu.register_autograd(_backward, setup_context=_save)

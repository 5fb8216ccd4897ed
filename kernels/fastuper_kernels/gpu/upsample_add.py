"""`upsample_add` on a GPU: what finishes a convolution adds a resampled map to any other one too."""

from __future__ import annotations

from typing import Any

import torch

from fastuper_kernels.gpu.conv_bn_relu import Epilogue, finish
from fastuper_kernels.gpu.layout import from_nhwc, nhwc
from fastuper_kernels.gpu.resample import upsample_transposed


@torch.library.custom_op("fastuper::upsample_add", mutates_args=())
def upsample_add(x: torch.Tensor, lateral: torch.Tensor) -> torch.Tensor:
    """Return `lateral + bilinear(x to lateral's size)` in channels_last memory."""
    fine = nhwc(lateral)
    out = torch.empty_like(fine)
    return from_nhwc(finish(fine[None], out, Epilogue(None, None, None, x, False)))


@upsample_add.register_fake
def _(x: torch.Tensor, lateral: torch.Tensor) -> torch.Tensor:
    batch, channels, height, width = lateral.shape
    return from_nhwc(lateral.new_empty(batch, height, width, channels))


def _keep_size(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.size = inputs[0].shape[2:]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    return upsample_transposed(grad, *ctx.size) if ctx.needs_input_grad[0] else None, grad


def _backward_of_transposed(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    zeros = grad.new_zeros(*grad.shape[:2], *ctx.size)
    return upsample_add(grad, zeros), None, None


upsample_add.register_autograd(_backward, setup_context=_keep_size)
upsample_transposed.register_autograd(_backward_of_transposed, setup_context=_keep_size)

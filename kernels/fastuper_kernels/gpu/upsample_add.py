"""`upsample_add` on a GPU, by the kernel of a convolution's epilogue (`finish_kernel` in conv_bn_relu.py)."""

from __future__ import annotations

from typing import Any

import torch

from fastuper_kernels.gpu.conv_bn_relu import Epilogue, finish
from fastuper_kernels.gpu.layout import from_nhwc, nhwc
from fastuper_kernels.gpu.resample import upsample_add_backward


@torch.library.custom_op("fastuper::upsample_add", mutates_args=())
def upsample_add(x: torch.Tensor, lateral: torch.Tensor) -> torch.Tensor:
    """The operator of `fastuper_kernels.ops.upsample_add`; the result is in channels_last memory."""
    fine = nhwc(lateral)
    out = torch.empty_like(fine)
    return from_nhwc(finish(fine[None], out, Epilogue(None, None, None, x, False)))


@upsample_add.register_fake
def _(x: torch.Tensor, lateral: torch.Tensor) -> torch.Tensor:
    batch, channels, height, width = lateral.shape
    return from_nhwc(lateral.new_empty(batch, height, width, channels))


def _save_size(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.size = inputs[0].shape[2:]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    return upsample_add_backward(grad, *ctx.size) if ctx.needs_input_grad[0] else None, grad


def _double_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    zeros = grad.new_zeros(*grad.shape[:2], *ctx.size)
    return upsample_add(grad, zeros), None, None


upsample_add.register_autograd(_backward, setup_context=_save_size)
upsample_add_backward.register_autograd(_double_backward, setup_context=_save_size)

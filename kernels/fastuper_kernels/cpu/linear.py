"""The ways to compute a linear layer on a CPU, with the activation or the residual that follows it.

The same product takes different times through MKL (`F.linear`), through oneDNN's convolution (a 1x1 `F.conv2d`) and
through oneDNN's own linear layer. The last also applies the activation or adds the residual while the result is in
registers. The choice `linear` (`fastuper_kernels.dispatch.choices`) takes the fastest of them. Every way reads the live
weights: nothing is packed, so nothing can go stale.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch.nn import functional as F

from fastuper_kernels.dispatch.choices import LINEAR
from fastuper_kernels.dispatch.torch_private import has_mkldnn_linear, mkldnn_linear, mkldnn_linear_add

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
# Each activation as oneDNN's operator takes it: (activation, algorithm).
_ONEDNN = {None: ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}

# oneDNN compiles a primitive of about 0.4 MB for each shape of operands, and keeps 1024 of them. MKL compiles nothing.
# So the first shapes of a process, those of a few sizes of images, go to oneDNN, and all later shapes to `F.linear`.
MAX_SHAPES = 256
_shapes: set[tuple[object, ...]] = set()


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `activation(x @ weight.T + bias) + residual` on a CPU, by the fastest way, without gradients.

    The caller has checked that nothing traces and that no gradient is recorded, and has applied autocast. If the
    chosen way cannot take the operands, PyTorch's operators run.

    Args:
        x: (..., C_in).
        weight: (C_out, C_in).
        bias: (C_out,).
        activation: a key of `ACTIVATIONS`, or None.
        residual: (..., C_out), or a shape that broadcasts to it.
    """
    way = _way(x, weight, bias)
    if way in ("onednn", "conv") and not _has_primitive(x, weight, bias, activation, residual):
        way = "torch"
    if way == "onednn":
        return _by_onednn(x, weight, bias, activation, residual)
    if way == "conv":
        return finish(_by_conv(x, weight, bias), activation, residual)
    if way == "float32":
        return _by_float32(x, weight, bias, activation, residual)
    return by_torch(x, weight, bias, activation, residual)


def by_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """Return the result of PyTorch's own operators, one after the other."""
    return finish(F.linear(x, weight, bias), activation, residual)


def finish(out: torch.Tensor, activation: str | None, residual: torch.Tensor | None) -> torch.Tensor:
    """Return `activation(out) + residual`."""
    if activation is not None:
        out = ACTIVATIONS[activation](out)
    return out if residual is None else residual + out


def _way(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str:
    """Return the option to take for these operands: "torch" if the chosen option cannot take them."""
    dtype = x.dtype
    if weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        return "torch"  # raises PyTorch's own error
    if x.ndim < 1 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        return "torch"  # raises PyTorch's own error
    if x.numel() == 0 or (bias is not None and bias.shape != weight.shape[:1]):
        return "torch"  # F.linear raises an error, or broadcasts the bias
    if dtype == torch.float16 and not _onednn_has(dtype):
        # F.linear then takes about ten times as long, too long to be measured on a slow processor.
        candidates = partial(_candidates, dtype, ("torch", "float32"))
        way = LINEAR("float16 without instructions for it", candidates, default="float32")
        return way if way == "float32" else "torch"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or not _onednn_has(dtype):
        return "torch"
    if not weight.is_contiguous():
        return "torch"
    way = LINEAR(str(dtype).removeprefix("torch."), partial(_candidates, dtype, ("torch", "conv", "onednn")))
    return "torch" if way == "float32" else way


def _has_primitive(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
) -> bool:
    """Return True if oneDNN may compile a primitive for operands of these shapes, or has done so."""
    # In narrower dtypes `F.linear` has a primitive too. In deterministic mode earlier calls must not matter.
    if x.dtype != torch.float32 or torch.are_deterministic_algorithms_enabled():
        return True
    key = (x.numel() // x.shape[-1], weight.shape, bias is None, activation, residual is None)
    if key not in _shapes:
        if len(_shapes) >= MAX_SHAPES:
            return False
        _shapes.add(key)
    return True


def _onednn_has(dtype: torch.dtype) -> bool:
    """Return True if oneDNN is on, and computes in this dtype on this processor."""
    return bool(torch.backends.mkldnn.enabled) and _onednn_supports(dtype)


@cache
def _onednn_supports(dtype: torch.dtype) -> bool:
    if not has_mkldnn_linear():
        return False
    # On a processor without instructions for the dtype, the first call fails: oneDNN has no such primitive.
    one = torch.ones(1, 1, dtype=dtype, device="cpu")
    try:
        mkldnn_linear(one, one, None, "none", "")
        mkldnn_linear_add(one, one, one, None)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _candidates(dtype: torch.dtype, ways: tuple[str, ...]) -> dict[str, Callable[[], object]]:
    """Return the ways as functions of no arguments, on a part of ConvNeXt-T's second stage: (1024, 192) -> 768."""
    positions, dim = 1024, 192
    x = torch.linspace(-1, 1, positions * dim, device="cpu").view(positions, dim).to(dtype)
    weight = torch.linspace(-0.1, 0.1, 4 * dim * dim, device="cpu").view(4 * dim, dim).to(dtype)
    bias = torch.linspace(-1, 1, 4 * dim, device="cpu").to(dtype)
    functions: dict[str, Callable[[], object]] = {
        "torch": lambda: by_torch(x, weight, bias, "gelu", None),
        "conv": lambda: finish(_by_conv(x, weight, bias), "gelu", None),
        "onednn": lambda: _by_onednn(x, weight, bias, "gelu", None),
        "float32": lambda: _by_float32(x, weight, bias, "gelu", None),
    }
    return {way: functions[way] for way in ways}


def _by_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return the product as a 1x1 convolution of a channels_last map (1, C_in, positions, 1)."""
    # The input is made contiguous first: the result takes its strides.
    positions = x.reshape(1, -1, 1, x.shape[-1]).contiguous().permute(0, 3, 1, 2)
    out = F.conv2d(positions, weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def _by_onednn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """Return the result of oneDNN's linear layer, which fuses the activation, or a residual of the same dtype."""
    positions = x.reshape(-1, x.shape[-1]).contiguous()
    bias = None if bias is None else bias.contiguous()  # oneDNN's operator ignores its strides
    shape = (*x.shape[:-1], len(weight))
    fuses = activation is None and residual is not None and residual.dtype == x.dtype and residual.shape == shape
    if fuses:
        assert residual is not None
        other = residual.reshape(len(positions), -1).contiguous()
        return mkldnn_linear_add(positions, other, weight, bias).view(shape)
    out = mkldnn_linear(positions, weight, bias, *_ONEDNN[activation]).view(shape)
    return finish(out, None, residual)


def _by_float32(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """Return the product of float16 operands, computed in float32: far faster without float16 instructions."""
    with torch.autocast("cpu", enabled=False):
        out = by_torch(x.float(), weight.float(), None if bias is None else bias.float(), activation, None).to(x.dtype)
    return finish(out, None, residual)

"""A linear layer with what follows it: an activation, or the addition of a residual.

On the CPU the same product takes different times through MKL (`F.linear`), through oneDNN's convolution (a 1x1
`F.conv2d`) and through oneDNN's own linear layer, which also applies the activation or adds the residual while the
result is in registers. Which is the fastest is measured once (`fastuper_kernels.dispatch.choices`). All of them read
the live weights: nothing is packed, and nothing can go stale.

A way that cannot take the operands gives way to "plain", also where `FASTUPER_CHOICES` forces it: `LIMITS` says which.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch.nn import functional as F

from fastuper_kernels.dispatch.choices import Choice
from fastuper_kernels.dispatch.modes import is_eager_inference

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
# As oneDNN's operator takes them: (attr, algorithm).
_ONEDNN = {None: ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}

LINEAR = Choice(
    "linear",
    options=("plain", "conv", "onednn", "float32"),
    default="onednn",
    why="one call of oneDNN with the activation in it was the fastest on AVX-512",
)

# Where an option, forced or not, is not what is taken; `python -m fastuper_kernels` prints it.
LIMITS = (
    "linear: float32 is for float16 operands on a processor without instructions for them, conv and onednn are for",
    "  float32, and for bfloat16 and float16 where oneDNN computes in them, with contiguous weights; all else is plain",
)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `activation(x @ weight.T + bias) + residual`.

    Args:
        x: (..., C_in).
        weight: (C_out, C_in).
        bias: (C_out,).
        activation: "gelu", "gelu_tanh" or "relu"; None for none.
        residual: (..., C_out); added as `+` adds, to the type that both promote to.

    Returns:
        (..., C_out), of the type that `F.linear` returns (autocast's, where it is on). On the CPU, where no gradient
        is recorded and nothing is traced, by the fastest of the ways; elsewhere by PyTorch's own operators.

    Raises:
        ValueError: the activation is not known.
        RuntimeError: shapes or dtypes do not fit; `F.linear`'s own.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not known; known are {', '.join(ACTIVATIONS)}")
    if x.device.type != "cpu" or not is_eager_inference(x, weight, bias, residual) or x.numel() == 0:
        return _plain(x, weight, bias, activation, residual)
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    way = _way(x, weight, bias)
    if way == "onednn":
        return _onednn(x, weight, bias, activation, residual)
    if way == "conv":
        return _finish(_conv(x, weight, bias), activation, residual)
    if way == "float32":
        return _in_float32(x, weight, bias, activation, residual)
    return _plain(x, weight, bias, activation, residual)


def _way(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str:
    """Return the option to take for these operands: "plain" where the chosen one cannot take them."""
    dtype = x.dtype
    if weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        return "plain"  # PyTorch's own error
    if x.ndim < 1 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        return "plain"  # likewise
    if bias is not None and bias.shape != weight.shape[:1]:
        return "plain"  # an error, or a bias that PyTorch broadcasts
    if dtype == torch.float16 and not _onednn_has(dtype):
        way = LINEAR("float16 without instructions for it", partial(_candidates, dtype, ("plain", "float32")))
        return way if way == "float32" else "plain"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or not _onednn_has(dtype):
        return "plain"
    if not weight.is_contiguous():
        return "plain"
    way = LINEAR(str(dtype).removeprefix("torch."), partial(_candidates, dtype, ("plain", "conv", "onednn")))
    return "plain" if way == "float32" else way


def _onednn_has(dtype: torch.dtype) -> bool:
    """Return whether oneDNN is on, and computes in this type on this processor."""
    return bool(torch.backends.mkldnn.enabled) and _onednn_supports(dtype)


@cache
def _onednn_supports(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    # The first of a type on a processor without its instructions fails as oneDNN is asked for the primitive.
    one = torch.ones(1, 1, dtype=dtype, device="cpu")
    try:
        torch.ops.mkldnn._linear_pointwise(one, one, None, "none", [], "")
        torch.ops.mkldnn._linear_pointwise.binary(one, one, one, None, "add")
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _candidates(dtype: torch.dtype, ways: tuple[str, ...]) -> dict[str, Callable[[], object]]:
    """Return the ways as functions of no arguments, on the shape of a ConvNeXt-T's second stage, a slice of it."""
    rows, dim = 1024, 192
    x = torch.linspace(-1, 1, rows * dim, device="cpu").view(rows, dim).to(dtype)
    weight = torch.linspace(-0.1, 0.1, 4 * dim * dim, device="cpu").view(4 * dim, dim).to(dtype)
    bias = torch.linspace(-1, 1, 4 * dim, device="cpu").to(dtype)
    functions: dict[str, Callable[[], object]] = {
        "plain": lambda: _plain(x, weight, bias, "gelu", None),
        "conv": lambda: _finish(_conv(x, weight, bias), "gelu", None),
        "onednn": lambda: _onednn(x, weight, bias, "gelu", None),
        "float32": lambda: _in_float32(x, weight, bias, "gelu", None),
    }
    return {way: functions[way] for way in ways}


def _plain(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    return _finish(F.linear(x, weight, bias), activation, residual)


def _finish(out: torch.Tensor, activation: str | None, residual: torch.Tensor | None) -> torch.Tensor:
    if activation is not None:
        out = ACTIVATIONS[activation](out)
    return out if residual is None else residual + out


def _conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return the product as a 1x1 convolution of a channels_last map whose only column holds the rows."""
    # Strided otherwise, the result would be strided in the same way.
    rows = x.reshape(1, -1, 1, x.shape[-1]).contiguous().permute(0, 3, 1, 2)
    out = F.conv2d(rows, weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def _onednn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    bias = None if bias is None else bias.contiguous()  # oneDNN's operator does not look at its strides
    shape = (*x.shape[:-1], len(weight))
    fuses = activation is None and residual is not None and residual.dtype == x.dtype and residual.shape == shape
    if fuses:
        assert residual is not None
        other = residual.reshape(len(rows), -1).contiguous()
        return torch.ops.mkldnn._linear_pointwise.binary(rows, other, weight, bias, "add").view(shape)
    attr, algorithm = _ONEDNN[activation]
    out = torch.ops.mkldnn._linear_pointwise.default(rows, weight, bias, attr, [], algorithm).view(shape)
    return _finish(out, None, residual)


def _in_float32(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """Return the product of float16 operands by way of float32: without instructions for float16 far faster."""
    with torch.autocast("cpu", enabled=False):
        out = _plain(x.float(), weight.float(), None if bias is None else bias.float(), activation, None).to(x.dtype)
    return _finish(out, None, residual)

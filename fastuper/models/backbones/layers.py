"""What the backbones have in common."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fastuper.models.configuration import BackboneConfig
from fastuper.models.untouched import is_exactly, is_untouched
from fastuper_kernels import linear
from fastuper_kernels.dispatch.modes import is_eager, is_eager_inference


class Elementwise(nn.Module):
    """A function of each value, as a module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the function to x, of any shape."""
        return self.function(x)


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _squared_relu(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


def _clipped_gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x).clamp(-10, 10)


def _laplace(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * 2**0.5)))


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_10": partial(Elementwise, _clipped_gelu),
    "gelu_accurate": partial(nn.GELU, approximate="tanh"),
    "gelu_fast": partial(nn.GELU, approximate="tanh"),
    "gelu_new": partial(nn.GELU, approximate="tanh"),
    "gelu_python": nn.GELU,
    "gelu_python_tanh": partial(nn.GELU, approximate="tanh"),
    "gelu_pytorch_tanh": partial(nn.GELU, approximate="tanh"),
    "hardswish": nn.Hardswish,
    "laplace": partial(Elementwise, _laplace),
    "leaky_relu": nn.LeakyReLU,
    "linear": nn.Identity,
    "mish": nn.Mish,
    "quick_gelu": partial(Elementwise, _quick_gelu),
    "relu": nn.ReLU,
    "relu2": partial(Elementwise, _squared_relu),
    "relu6": nn.ReLU6,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
}


def activation(name: str) -> nn.Module:
    """Return the activation that Transformers has under this name.

    Raises:
        ValueError: the name is not known; the message lists those that are.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act={name!r} is not known; known are {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]()


class DropPath(nn.Module):
    """Stochastic depth (https://arxiv.org/abs/1603.09382): in training, zero a residual branch for some samples.

    Args:
        drop_prob: the share of samples whose branch is dropped; the others are divided by `1 - drop_prob`.
    """

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop whole samples of x (B, ...)."""
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = 1 - self.drop_prob
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        # The draw is the reference's, so that a seeded run of either drops the same samples.
        return x.div(keep) * torch.floor(torch.rand(shape, dtype=x.dtype, device=x.device) + keep)

    def extra_repr(self) -> str:
        """Show the probability."""
        return f"p={self.drop_prob}"


def drop_path(drop_prob: float) -> nn.Module:
    """Return stochastic depth, or nothing where its probability is 0."""
    return DropPath(drop_prob) if drop_prob > 0.0 else nn.Identity()


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, C, H, W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise each position of x (B, C, H, W)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """Return a map (B, C, H, W) with its channels last in memory where that is faster: on a CPU and with CUDA."""
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return x  # vmap knows of no memory formats
    return x.contiguous(memory_format=torch.channels_last) if x.device.type in ("cpu", "cuda") else x


def pad_to(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pad a map (B, C, H, W) with zeros, below and to the right, where it is smaller than (height, width)."""
    # Two questions about sizes: a traced network asks them once, and then holds for all maps that are large enough.
    if x.shape[2] >= height and x.shape[3] >= width:
        return x
    return F.pad(x, (0, max(width - x.shape[3], 0), 0, max(height - x.shape[2], 0)))


def pad_to_multiple(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pad a map (B, H, W, C) with zeros, below and to the right, to multiples of (height, width)."""
    # Quotients and no remainders: in a traced network sizes are formulas, and those of remainders grow out of hand.
    rows, columns = (x.shape[1] + height - 1) // height, (x.shape[2] + width - 1) // width
    bottom, right = rows * height - x.shape[1], columns * width - x.shape[2]
    # A traced network is for every size, and asks nothing.
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if not is_eager() or bottom or right else x


def does_nothing(module: nn.Module) -> bool:
    """Return whether a module is one of those that return their input: Identity, and in evaluation the random ones."""
    if is_exactly(module, nn.Identity):
        return True
    return (is_exactly(module, DropPath) or is_exactly(module, nn.Dropout)) and not module.training


def on_cpu_without_gradients(x: torch.Tensor, *modules: nn.Module) -> bool:
    """Return whether x is on the CPU, nothing traces, and no gradient flows through x or a parameter of the modules."""
    if x.device.type != "cpu":
        return False
    return is_eager_inference(x, *(p for module in modules for p in module._parameters.values()))


def fused_activation(module: nn.Module) -> str | None:
    """Return what `linear` calls an activation; None where it is a module of its own."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return "relu" if type(module) is nn.ReLU else None


HIDDEN_BYTES = 2**22
"""What of an MLP's hidden rows, or of attention's queries, is in memory at once, however large the map: in a cache, and
so little that malloc gives the same memory to the next block."""


def is_plain_mlp(norm: nn.Module, first: nn.Module, act: nn.Module, second: nn.Module) -> bool:
    """Return whether `residual_mlp` computes what these modules do, one after the other."""
    layers = is_exactly(first, nn.Linear) and is_exactly(second, nn.Linear) and is_exactly(norm, nn.LayerNorm)
    return layers and is_untouched(act)


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
    """Return `residual + scale * second(act(first(norm(x))))`, some rows at a time: hidden rows are in the cache.

    Args:
        residual: (..., C).
        x: (..., C); it may be the residual.
        norm, first, act, second: the MLP's modules, `is_plain_mlp`.
        scale: (C,), LayerScale's; None for 1.
        out: (..., C), contiguous, to write to, where its type is the result's; it may be x.

    Returns:
        (..., C), of the type that the sum promotes to.
    """
    channels = x.shape[-1]
    rows, others = x.reshape(-1, channels), residual.reshape(-1, channels)
    name = fused_activation(act)
    # A map without rows is one block of none, which PyTorch's operators take.
    blocks = max(1, -(-len(rows) * first.out_features * x.element_size() // HIDDEN_BYTES))
    block = max(1, -(-len(rows) // blocks))
    results: torch.Tensor | None = None
    for start in range(0, max(1, len(rows)), block):
        part, other = rows[start : start + block], others[start : start + block]
        hidden = F.layer_norm(part, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
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


def pair(value: Any) -> tuple[int, int]:
    """Return (height, width) of a setting that is one number or two."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


class Backbone(nn.Module):
    """Base of our backbones: which maps they return, and of how many channels.

    Args:
        config: its configuration; `out_features` says which stages are returned.
        num_features: channels of the stem and of each stage.

    Attributes:
        channels: channels of each map that `forward` returns.
    """

    def __init__(self, config: BackboneConfig, num_features: list[int]):
        super().__init__()
        self.config = config
        self.stage_names = config.stage_names
        self.out_features = list(config.out_features)
        self.num_features = num_features
        self.channels = [num_features[self.stage_names.index(name)] for name in self.out_features]

    def check_channels(self, pixel_values: torch.Tensor) -> None:
        """Raise ValueError where an image (B, C, H, W) has not the channels that the backbone was built for."""
        expected: int = self.config.num_channels  # type: ignore[attr-defined]
        if pixel_values.shape[1] != expected:
            raise ValueError(
                f"pixel_values of shape {tuple(pixel_values.shape)} have {pixel_values.shape[1]} channels, "
                f"the backbone's num_channels is {expected}"
            )

    def initialize_tensor(self, module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        """Fill one parameter or buffer with its initial value, in place; subclasses add those that are theirs."""
        initialize_tensor(module, name, tensor, std=getattr(self.config, "initializer_range", 0.02))


def initialize_tensor(module: nn.Module, name: str, tensor: torch.Tensor, *, std: float) -> None:
    """Fill `module.name` with the initial value that Transformers gives it: normal weights, zero biases, unit norms.

    Raises:
        NotImplementedError: the module has its own kind of parameter.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.normal_(tensor, std=std) if name == "weight" else nn.init.zeros_(tensor)
    elif isinstance(module, nn.LayerNorm | nn.modules.batchnorm._BatchNorm):
        nn.init.ones_(tensor) if name in ("weight", "running_var") else nn.init.zeros_(tensor)
    else:
        raise NotImplementedError(f"no initial value is known for {name} of {type(module).__name__}")

"""Layers that several backbones share, and `Backbone`, the base of our networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fastuper.models.configuration import BackboneConfig
from fastuper.models.outputs import EncoderOutput
from fastuper.models.untouched import is_untouched
from fastuper_kernels.dispatch.modes import is_eager, is_known
from fastuper_kernels.dispatch.torch_private import BatchNorm, in_transform

STAGES = ["stage1", "stage2", "stage3", "stage4"]
"""The stages that UPerNet reads, of a backbone with four."""


class Elementwise(nn.Module):
    """An elementwise function as a module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the function to x of any shape."""
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
    """Return a new module for one of Transformers' names of activations.

    Raises:
        ValueError: the name is unknown; the message lists the known names.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act={name!r} is not known; known are {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]()


class DropPath(nn.Module):
    """Stochastic depth (https://arxiv.org/abs/1603.09382): in training, set a residual branch to zero for some samples.

    Args:
        drop_prob: the probability that a sample's branch is dropped. The other branches are divided by `1 - drop_prob`.
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
        # The mask is drawn as in Transformers: with the same seed, both libraries drop the same samples.
        return x.div(keep) * torch.floor(torch.rand(shape, dtype=x.dtype, device=x.device) + keep)

    def extra_repr(self) -> str:
        """Show the probability."""
        return f"p={self.drop_prob}"


def drop_path(drop_prob: float) -> nn.Module:
    """Return a module for stochastic depth, Identity if its probability is 0."""
    return DropPath(drop_prob) if drop_prob > 0.0 else nn.Identity()


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, C, H, W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise each position of x (B, C, H, W)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """Return a map (B, C, H, W) in channels_last on a CPU and with CUDA, where it is faster; unchanged elsewhere."""
    if not torch.compiler.is_compiling() and in_transform():
        return x  # vmap does not support memory formats
    return x.contiguous(memory_format=torch.channels_last) if x.device.type in ("cpu", "cuda") else x


def is_free(*sides: Any) -> bool:
    """Return True if a side is free in a graph: a symbol of torch.export, or a tensor of torch.jit.trace."""
    return any(isinstance(side, torch.SymInt | torch.Tensor) for side in sides)


def lacking(side: Any, least: int) -> Any:
    """Return how much a side, which may be free, is below a number; 0 if it is not."""
    if isinstance(side, torch.Tensor):
        return (least - side).clamp(min=0)
    if isinstance(side, torch.SymInt):
        # In this form the padded side is the maximum itself, whose least value PyTorch knows.
        return 0 if is_known(side >= least) else torch.sym_max(side, least) - side
    return max(least - side, 0)


def pad_to(x: torch.Tensor, height: int, width: int, value: float = 0.0) -> torch.Tensor:
    """Pad a map (B, C, H, W) with a value, below and on the right, to at least (height, width)."""
    rows, columns = x.shape[2:]
    # Where the range of a traced network's sizes allows maps without a row, it has no lower bound that means anything.
    # The network is then for maps that fit, like the example's: the sizes of all others would be long expressions.
    unbounded = isinstance(rows, torch.SymInt) and not is_known(rows >= 1)
    if (unbounded or not is_free(rows, columns)) and rows >= height and columns >= width:
        return x
    bottom, right = lacking(rows, height), lacking(columns, width)
    if not is_free(bottom, right) and bottom == right == 0:
        return x
    return F.pad(x, (0, right, 0, bottom), value=value)


def pad_to_multiple(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pad a map (B, H, W, C) with zeros, below and on the right, to multiples of (height, width)."""
    # Quotients are used, not remainders: a traced network has symbolic sizes, whose remainders become long expressions.
    rows, columns = (x.shape[1] + height - 1) // height, (x.shape[2] + width - 1) // width
    bottom, right = rows * height - x.shape[1], columns * width - x.shape[2]
    # A traced network always pads, perhaps by 0: a comparison would restrict it to sizes like the example's.
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if not is_eager() or bottom or right else x


def pair(value: Any) -> tuple[int, int]:
    """Return (height, width) of a setting that is one number for both, or a pair."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def check_channels(pixel_values: torch.Tensor, stem: nn.Module) -> None:
    """Raise ValueError if an image (B, C, H, W) does not have the channels that the stem's convolution takes.

    Args:
        pixel_values: the image.
        stem: the convolution. A module without `in_channels` that a user put in its place decides for itself.
    """
    expected = getattr(stem, "in_channels", None)
    if expected and pixel_values.shape[1] != expected:  # 0 in a lazy convolution, which takes any number
        raise ValueError(
            f"pixel_values of shape {tuple(pixel_values.shape)} have {pixel_values.shape[1]} channels, "
            f"the backbone's first convolution takes {expected}"
        )


class Encoder(nn.Module):
    """Base of the encoders of our backbones: the stages, one after another.

    A subclass has `steps(x, output_attentions, output_hidden_states)`, which yields the map (B, C, H, W) and the
    attention weights (None without attention) of the stem, whose result is x, and of each stage.
    """

    steps: Callable[..., Iterator[tuple[torch.Tensor, torch.Tensor | None]]]

    def forward(
        self, x: torch.Tensor, output_attentions: bool = False, output_hidden_states: bool = False
    ) -> EncoderOutput:
        """Run all stages on the stem's result.

        Args:
            x: the stem's result.
            output_attentions: True to return the attention weights too.
            output_hidden_states: True to return the maps of the stem and of every stage too.
        """
        maps, attentions = zip(*self.steps(x, output_attentions, output_hidden_states), strict=True)
        weights = tuple(w for w in attentions if w is not None)
        return EncoderOutput(maps[-1], maps if output_hidden_states else None, weights or None)


class Backbone(nn.Module):
    """Base of our backbones' networks.

    A subclass has `forward(pixel_values, output_hidden_states=False, output_attentions=False)`, which returns a
    `BackboneOutput` with a map for each stage in `out_features`.

    Args:
        config: the configuration; its `out_features` are the stages to return.
        stage_channels: channels of the stem and of each stage.

    Attributes:
        config: the configuration.
        stage_names: "stem", "stage1", ...
        num_features: channels of the stem and of each stage.
        out_features: names of the returned stages.
        out_indices: their indices in `stage_names`.
        channels: channels of each returned map.
    """

    def __init__(self, config: BackboneConfig, stage_channels: list[int]):
        super().__init__()
        self.config = config
        self.stage_names = config.stage_names
        self.num_features = stage_channels
        self.out_features = list(config.out_features)
        self.out_indices = list(config.out_indices)
        self.channels = [stage_channels[index] for index in self.out_indices]

    @property
    def feature_channels(self) -> dict[str, int]:
        """Channels of the stem and of each stage, by name."""
        return dict(zip(self.stage_names, self.num_features, strict=True))

    def encode(
        self,
        encoder: nn.Module,
        x: torch.Tensor,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> Iterable[tuple[torch.Tensor, torch.Tensor | None]]:
        """Return the map and the attention weights of the stem and of each stage; see `Encoder`.

        An untouched encoder is not called: a map is then freed when the next stage has read it.

        Args:
            encoder: the backbone's encoder, or a module that a user put in its place.
            x: the stem's result.
            output_attentions: True to compute the attention weights.
            output_hidden_states: True if the maps are returned to the caller too.
        """
        if isinstance(encoder, Encoder) and is_untouched(encoder):
            return encoder.steps(x, output_attentions, output_hidden_states)
        output = encoder(x, output_attentions=output_attentions, output_hidden_states=True)
        attentions = output.attentions or [None] * (len(output.hidden_states) - 1)
        return zip(output.hidden_states, [None, *attentions], strict=True)

    def forward_with_filtered_kwargs(self, *args: Any, **kwargs: Any) -> Any:
        """Call the backbone; the name under which Transformers' UPerNet calls its own."""
        return self(*args, **kwargs)

    def initialize_tensor(self, module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        """Fill a parameter or buffer with its initial value, in place; a subclass adds its own kinds of tensors."""
        initialize_tensor(module, name, tensor, std=getattr(self.config, "initializer_range", 0.02))


WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Embedding)


def initialize_tensor(module: nn.Module, name: str, tensor: torch.Tensor, *, std: float) -> None:
    """Fill a tensor with the initial value that Transformers gives it: normal weights, zero biases, unit norms.

    Args:
        module: a linear layer, convolution, embedding, LayerNorm, GroupNorm or BatchNorm.
        name: the tensor's attribute of the module, such as "weight".
        tensor: the tensor, changed in place.
        std: standard deviation of the weights of linear layers and convolutions.

    Raises:
        NotImplementedError: a module of any other class.
    """
    if isinstance(module, WEIGHTED):
        nn.init.normal_(tensor, std=std) if name == "weight" else nn.init.zeros_(tensor)
    elif isinstance(module, nn.LayerNorm | nn.GroupNorm | BatchNorm):
        nn.init.ones_(tensor) if name in ("weight", "running_var") else nn.init.zeros_(tensor)
    else:
        raise NotImplementedError(
            f"no initial value is defined for {name} of {type(module).__name__}; "
            "override Backbone.initialize_tensor, or the model's _init_weights"
        )

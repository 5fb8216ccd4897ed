"""Pairs of models, Transformers' and fastuper's, with the same configuration and weights; and their input images."""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import nn

import fastuper

# The device of models and images. `bench.gpu` sets the variable for the tests that it runs.
DEVICE = os.environ.get("FASTUPER_TEST_DEVICE", "cpu")
VERSION_5 = int(transformers.__version__.split(".")[0]) >= 5
STAGES = ["stage1", "stage2", "stage3", "stage4"]


# The sizes are lists, not tuples: given a tuple of hidden_sizes, Transformers 5 fails to build its ConvNeXt.
def _convnext(width: int, blocks: int) -> Any:
    return transformers.ConvNextConfig(
        hidden_sizes=[width * 2**i for i in range(4)], depths=[3, 3, blocks, 3], out_features=STAGES
    )


def _swin(width: int, blocks: int, heads: int) -> Any:
    return transformers.SwinConfig(
        embed_dim=width,
        depths=[2, 2, blocks, 2],
        num_heads=[heads * 2**i for i in range(4)],
        drop_path_rate=0.0,
        out_features=STAGES,
    )


# Transformers' configurations of the published backbones.
BACKBONES: dict[str, Callable[[], Any]] = {
    "convnext-t": lambda: _convnext(96, 9),
    "convnext-b": lambda: _convnext(128, 27),
    "convnext-l": lambda: _convnext(192, 27),
    "swin-t": lambda: _swin(96, 6, 3),
    "swin-b": lambda: _swin(128, 18, 4),
    "swin-l": lambda: _swin(192, 18, 6),
    "resnet-50": lambda: transformers.ResNetConfig(out_features=STAGES),
}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def uninitialized() -> Iterator[None]:
    """Build models without drawing their initial weights, which the caller overwrites."""
    if VERSION_5:
        from transformers.initialization import no_init_weights
    else:
        from transformers.modeling_utils import no_init_weights
    with no_init_weights():
        yield


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter and statistic: none is 0 or 1, and activations keep their magnitude through depth.

    Weights have variance 1 / fan_in. They are uniform, which is quick to draw for 400 million weights. Residual
    branches are damped: by LayerScale in a ConvNeXt, by the norms in a ResNet.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.uniform_(low, high, generator=generator)

    for path, module in model.named_modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if not tensor.is_floating_point() or name in module._non_persistent_buffers_set:
                continue  # relative_position_index and num_batches_tracked; buffers that are computed, not saved
            if isinstance(module, nn.Conv2d | nn.Linear) and name == "weight":
                bound = math.sqrt(3 / tensor[0].numel())
                draw(tensor, -bound, bound)
            elif name == "running_var":
                draw(tensor, 0.5, 1.5)
            elif isinstance(module, nn.BatchNorm2d) and name == "weight":
                low, high = (0.3, 0.8) if ".layers." in path else (1.0, 2.5)
                draw(tensor, low, high)
            elif name == "weight":  # LayerNorm
                draw(tensor, 0.5, 1.5)
            elif name == "layer_scale_parameter":
                draw(tensor, 0.1, 0.5)
            elif name == "relative_position_bias_table":
                draw(tensor, -1.5, 1.5)
            else:  # biases, running_mean, position_embeddings
                draw(tensor, -0.3, 0.3)


def hub_names(state: dict[str, Any]) -> dict[str, Any]:
    """Rename the entries of Transformers 5's `state_dict()` to the names in the Hub's checkpoints.

    Its Swin has a final norm that no output uses and that checkpoints lack: the norm is left out.
    """
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("backbone.swin."):
            if name.startswith("backbone.swin.layernorm."):
                continue
            name = name.replace("backbone.swin.", "backbone.", 1)
            for new, old in (
                ("attention.q_proj", "attention.self.query"),
                ("attention.k_proj", "attention.self.key"),
                ("attention.v_proj", "attention.self.value"),
                ("attention.relative_position_bias.relative", "attention.self.relative"),
                ("attention.o_proj", "attention.output.dense"),
                ("mlp.fc1", "intermediate.dense"),
                ("mlp.fc2", "output.dense"),
            ):
                name = name.replace(new, old)
        renamed[name] = tensor
    return renamed


def pair(
    given: Any, *, dtype: torch.dtype = torch.float64, seed: int = 0, train: bool = False, share: bool = False
) -> tuple[Any, Any]:
    """Return Transformers' model and fastuper's with the same random weights.

    Args:
        given: Transformers' `UperNetConfig`. Each model gets a copy.
        dtype: of the weights.
        seed: of the weights.
        train: whether the models are in training mode.
        share: whether both models hold the same tensors; large models then fit into memory.
    """
    with uninitialized(), default_dtype(dtype):
        theirs = transformers.UperNetForSemanticSegmentation(copy.deepcopy(given))
        ours = fastuper.UperNetForSemanticSegmentation(given)
    randomize(theirs, seed)
    for name, buffer in theirs.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()
    load(ours, theirs, assign=share)
    return theirs.train(train).to(DEVICE), ours.train(train).to(DEVICE)


def load(ours: nn.Module, theirs: nn.Module, assign: bool = False) -> None:
    """Load the weights of Transformers' model into fastuper's."""
    ours.load_state_dict(theirs.state_dict(), assign=assign)


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return normal noise (B, C, H, W), of the magnitude of normalised photos."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def named_gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    """Return the gradient of each parameter, by the parameter's name in the Hub's checkpoints."""
    return hub_names({name: parameter.grad for name, parameter in model.named_parameters()})


def _exact_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = (query @ key.transpose(2, 3) * scaling + mask).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def give_attentions(theirs: Any, exact: bool = False) -> None:
    """Make a Swin of Transformers 5 return its attentions.

    Its eager attention computes the softmax in float32 even in a float64 model. With `exact` the softmax has the
    model's dtype, so that a float64 model is a float64 reference.
    """
    if VERSION_5:
        if exact:
            transformers.AttentionInterface.register("exact", _exact_attention)
        for module in theirs.modules():
            if hasattr(module, "config") and hasattr(module.config, "_attn_implementation"):
                module.config._attn_implementation = "exact" if exact else "eager"

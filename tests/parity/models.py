"""Transformers' model and ours with the same weights, and how far two results are apart."""

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

# Where models and images are: `make gpu-check` runs some of these tests on a GPU.
DEVICE = os.environ.get("FASTUPER_TEST_DEVICE", "cpu")
VERSION_5 = int(transformers.__version__.split(".")[0]) >= 5

STAGES = ["stage1", "stage2", "stage3", "stage4"]

# Small enough for float64 on a CPU, and nothing about them is square, even or the default by accident. Lists and not
# tuples: with a tuple of hidden_sizes Transformers 5 fails to build its ConvNeXt.
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "convnext": ("ConvNextConfig", {"hidden_sizes": [16, 24, 40, 56], "depths": [2, 1, 3, 2]}),
    "swin": (
        "SwinConfig",
        {"embed_dim": 16, "depths": [2, 1, 3, 2], "num_heads": [2, 4, 4, 8], "window_size": 4, "drop_path_rate": 0.0},
    ),
    "resnet-basic": (
        "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [16, 24, 40, 56], "depths": [2, 1, 3, 2], "layer_type": "basic"},
    ),
    "resnet-bottleneck": (
        "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [32, 48, 80, 112], "depths": [2, 1, 3, 2], "layer_type": "bottleneck"},
    ),
}
FAMILIES = list(BACKBONES)

HEAD: dict[str, Any] = {"hidden_size": 24, "auxiliary_channels": 20, "num_labels": 7}


def backbone_config(family: str, library: Any = transformers, **overrides: Any) -> Any:
    """Return a small backbone's configuration, Transformers' or (with `library=fastuper`) ours."""
    name, values = BACKBONES[family]
    if "out_indices" not in overrides:
        overrides = {"out_features": STAGES, **overrides}
    return getattr(library, name)(**{**copy.deepcopy(values), **overrides})


def config(family: str, backbone: dict[str, Any] | None = None, library: Any = transformers, **head: Any) -> Any:
    """Return a small UPerNet's configuration; `backbone` overrides its backbone's values, `head` its own."""
    return library.UperNetConfig(
        backbone_config=backbone_config(family, library, **(backbone or {})), **{**HEAD, **head}
    )


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
    """Build models without spending time on weights that are overwritten at once."""
    if VERSION_5:
        from transformers.initialization import no_init_weights
    else:
        from transformers.modeling_utils import no_init_weights
    with no_init_weights():
        yield


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter and statistic, so that none of them is 0 or 1 and the signal keeps its size through depth.

    Weights have variance 1 / fan_in (uniform, which is quick to draw for 400 million of them). Residual branches are
    damped: by LayerScale in a ConvNeXt, by the norms in a ResNet.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.uniform_(low, high, generator=generator)

    for path, module in model.named_modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if not tensor.is_floating_point() or name in module._non_persistent_buffers_set:
                continue  # relative_position_index, num_batches_tracked; what is computed and not saved
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
    """Rename what `state_dict()` of Transformers 5 holds to the names of the Hub's checkpoints.

    Its Swin also has a last norm that nothing uses, and that checkpoints do not have: it is left out.
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
    """Return Transformers' model and ours for one of Transformers' configurations, with the same random weights.

    Args:
        given: the configuration; both models have copies.
        dtype: of the weights.
        seed: of the weights.
        train: whether they are in training mode.
        share: whether ours uses the very tensors of Transformers', to fit big models into memory.
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
    """Give our model the weights of Transformers'."""
    ours.load_state_dict(theirs.state_dict(), assign=assign)


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return (B, C, H, W) of a normalised photo's magnitude."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def segmentation_labels(
    batch: int, height: int, width: int, classes: int = 7, ignore: int = 255, seed: int = 0
) -> torch.Tensor:
    """Return (B, H, W) labels, about one in five of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (batch, height, width), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = ignore
    return labels.to(DEVICE)


def error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Return ||result - truth|| / ||truth||, in float64."""
    assert result.shape == truth.shape, f"{tuple(result.shape)} is not {tuple(truth.shape)}"
    result, truth = result.detach().double(), truth.detach().double()
    scale = truth.norm().item()
    assert math.isfinite(scale)
    assert scale > 0
    return (result - truth).norm().item() / scale


def root_mean_square(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))


def named_gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    """Return the gradient of each parameter, under the Hub's names."""
    return hub_names({name: parameter.grad for name, parameter in model.named_parameters()})


def as_maps(hidden_states: Any, like: Any) -> list[torch.Tensor]:
    """Return Transformers' hidden states as maps (B, C, H, W): the Swin of 4.x gives (B, L, C)."""
    return [
        x.transpose(1, 2).reshape(shape.shape) if x.ndim == 3 else x
        for x, shape in zip(hidden_states, like, strict=True)
    ]


def _exact_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = (query @ key.transpose(2, 3) * scaling + mask).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def give_attentions(theirs: Any, exact: bool = False) -> None:
    """Make a Swin of Transformers 5 return its attentions.

    Its eager attention computes the softmax in float32 whatever the model's dtype, so that a float64 model is no
    truth for the weights: `exact` leaves that cast out.
    """
    if VERSION_5:
        if exact:
            transformers.AttentionInterface.register("exact", _exact_attention)
        for module in theirs.modules():
            if hasattr(module, "config") and hasattr(module.config, "_attn_implementation"):
                module.config._attn_implementation = "exact" if exact else "eager"


Measure = Callable[[Any, torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]

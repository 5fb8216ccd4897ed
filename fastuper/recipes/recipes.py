"""How the published UPerNets were trained: backbones by name, learning rates, and which weights decay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastuper.models.configuration import BackboneConfig, ConvNextConfig, ResNetConfig, SwinConfig

STAGES = ["stage1", "stage2", "stage3", "stage4"]

BACKBONES: dict[str, Callable[[], BackboneConfig]] = {
    "convnext-tiny": lambda: _convnext([96, 192, 384, 768], [3, 3, 9, 3], 0.4),
    "convnext-small": lambda: _convnext([96, 192, 384, 768], [3, 3, 27, 3], 0.3),
    "convnext-base": lambda: _convnext([128, 256, 512, 1024], [3, 3, 27, 3], 0.4),
    "convnext-large": lambda: _convnext([192, 384, 768, 1536], [3, 3, 27, 3], 0.4),
    "swin-tiny": lambda: _swin(96, [2, 2, 6, 2], [3, 6, 12, 24], 7),
    "swin-small": lambda: _swin(96, [2, 2, 18, 2], [3, 6, 12, 24], 7),
    "swin-base": lambda: _swin(128, [2, 2, 18, 2], [4, 8, 16, 32], 12),
    "swin-large": lambda: _swin(192, [2, 2, 18, 2], [6, 12, 24, 48], 12),
    "resnet-18": lambda: _resnet([64, 128, 256, 512], [2, 2, 2, 2], "basic"),
    "resnet-34": lambda: _resnet([64, 128, 256, 512], [3, 4, 6, 3], "basic"),
    "resnet-50": lambda: _resnet([256, 512, 1024, 2048], [3, 4, 6, 3], "bottleneck"),
    "resnet-101": lambda: _resnet([256, 512, 1024, 2048], [3, 4, 23, 3], "bottleneck"),
}
"""The backbones that have a name, with the stochastic depth of their published UPerNets; weights are random."""


def _convnext(hidden_sizes: list[int], depths: list[int], drop_path_rate: float) -> ConvNextConfig:
    return ConvNextConfig(hidden_sizes=hidden_sizes, depths=depths, drop_path_rate=drop_path_rate, out_features=STAGES)


def _swin(embed_dim: int, depths: list[int], num_heads: list[int], window_size: int) -> SwinConfig:
    return SwinConfig(
        embed_dim=embed_dim,
        depths=depths,
        num_heads=num_heads,
        window_size=window_size,
        drop_path_rate=0.3,
        out_features=STAGES,
    )


def _resnet(hidden_sizes: list[int], depths: list[int], layer_type: str) -> ResNetConfig:
    return ResNetConfig(hidden_sizes=hidden_sizes, depths=depths, layer_type=layer_type, out_features=STAGES)


@dataclass(frozen=True)
class Recipe:
    """What AdamW is told: its betas are (0.9, 0.999) in all recipes.

    Args:
        learning_rate: of the heads, and of the whole network where `layer_decay` is 1.
        weight_decay: of all weights but the ones that `decays` names.
        layer_decay: the backbone's learning rates fall by this factor a stage; see `learning_rate_scale`.
    """

    learning_rate: float
    weight_decay: float
    layer_decay: float = 1.0


RECIPES = {
    # https://arxiv.org/abs/2201.03545, of ConvNeXt-T; and https://arxiv.org/abs/2103.14030.
    "convnext": Recipe(learning_rate=1e-4, weight_decay=0.05, layer_decay=0.9),
    "swin": Recipe(learning_rate=6e-5, weight_decay=0.01),
}


def recipe_for(name: str, backbone_type: str) -> Recipe:
    """Return a recipe by its name; "auto" takes ConvNeXt's for a ConvNeXt, and Swin's for any other backbone.

    Args:
        name: "auto" or one of `RECIPES`.
        backbone_type: the `model_type` of the backbone's configuration.

    Raises:
        ValueError: there is no such recipe.
    """
    if name == "auto":
        name = "convnext" if backbone_type == "convnext" else "swin"
    if name not in RECIPES:
        raise ValueError(f"recipe={name!r} is not known; known are auto, {', '.join(RECIPES)}")
    return RECIPES[name]


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Return the groups that AdamW takes: parameters of the same learning rate that all decay, or all do not.

    Args:
        model: a UPerNet; parameters that need no gradient are left out.
        recipe: its learning rate, weight decay and layer decay.

    Returns:
        Dictionaries with "params" (pairs of a name and a parameter), "lr" and "weight_decay", in the order in which the
        model has their first parameters.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        lr = recipe.learning_rate * learning_rate_scale(name, recipe.layer_decay)
        weight_decay = recipe.weight_decay if decays(name, parameter) else 0.0
        group = groups.setdefault((lr, weight_decay), {"params": [], "lr": lr, "weight_decay": weight_decay})
        group["params"].append((name, parameter))
    return list(groups.values())


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies: not to norms, biases, LayerScale or position embeddings and their tables."""
    tables = ("relative_position_bias_table", "position_embeddings", "absolute_pos_embed")
    return parameter.ndim > 1 and not name.endswith(tables)


def learning_rate_scale(name: str, layer_decay: float) -> float:
    """Return what a parameter's learning rate is multiplied with, by the rule of ConvNeXt's authors.

    The heads, and the norms of the maps that the backbone returns, have 1. The last of four stages has
    `layer_decay ** 3`, each stage before it one power more; the stem, and the downsampling before a stage, have
    `layer_decay ** 7`.

    Args:
        name: the parameter's, in a UPerNet of ours.
        layer_decay: the factor; 1 gives 1 everywhere.
    """
    part = name.split(".")
    if layer_decay == 1 or part[0] != "backbone" or part[1] == "hidden_states_norms":
        return 1.0
    if part[1:3] in (["encoder", "stages"], ["encoder", "layers"]) and part[4] not in DOWNSAMPLING:
        return layer_decay ** (6 - int(part[3]))
    return layer_decay**7


DOWNSAMPLING = ("downsampling_layer", "downsample")
"""What the layers between two stages are called: ConvNeXt's, Swin's."""


def learning_rate_factor(step: int, *, steps: int, warmup_steps: int, power: float) -> float:
    """Return what the learning rates of a step (from 0) are multiplied with.

    A polynomial from 1 at step 0 to 0 at `steps`, times a line from 1e-6 at step 0 to 1 at `warmup_steps`.
    """
    warmup = 1 - (1 - step / warmup_steps) * (1 - 1e-6) if step < warmup_steps else 1.0
    return warmup * (1 - step / steps) ** power

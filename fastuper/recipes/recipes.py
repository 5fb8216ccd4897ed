"""The training recipes of the published UPerNets: learning rates, weight decay, layer decay; backbones by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastuper.models.backbones.foreign.timm import TIMM
from fastuper.models.backbones.registry import FAMILIES, PRESETS, Preset, layer_depths
from fastuper.models.configuration import ForeignBackboneConfig

BACKBONES: dict[str, Preset] = PRESETS
"""Functions that return a backbone's configuration, by name: the presets of all registered families. They have the
stochastic depth of the published UPerNets; weights are random."""


@dataclass(frozen=True)
class Recipe:
    """Settings of AdamW; its betas are (0.9, 0.999) in all recipes.

    Args:
        learning_rate: of the heads, and of all parameters if `layer_decay` is 1.
        weight_decay: of the parameters for which `decays` returns True.
        layer_decay: the factor by which the backbone's learning rates fall towards the image, from stage to stage, or
            from block to block of a vision transformer; see `learning_rate_scale`.
    """

    learning_rate: float
    weight_decay: float
    layer_decay: float = 1.0


RECIPES = {
    # For ConvNeXt-T: https://arxiv.org/abs/2201.03545.
    "convnext": Recipe(learning_rate=1e-4, weight_decay=0.05, layer_decay=0.9),
    # https://arxiv.org/abs/2103.14030.
    "swin": Recipe(learning_rate=6e-5, weight_decay=0.01),
    # The authors trained with ConvNeXt's code, and published no other values.
    "convnextv2": Recipe(learning_rate=1e-4, weight_decay=0.05, layer_decay=0.9),
    # The authors', for BEiT-B, BEiT-L, and BEiT-B without fine-tuning as a classifier:
    # https://github.com/microsoft/unilm/tree/master/beit/semantic_segmentation/configs/beit/upernet.
    "beit": Recipe(learning_rate=3e-5, weight_decay=0.05, layer_decay=0.9),
    "beit-large": Recipe(learning_rate=2e-5, weight_decay=0.05, layer_decay=0.95),
    "beit-pretrained": Recipe(learning_rate=7e-4, weight_decay=0.05, layer_decay=0.65),
    # The authors (https://arxiv.org/abs/2111.06377) publish no values: mmsegmentation's, for ViT-B.
    "mae": Recipe(learning_rate=1e-4, weight_decay=0.05, layer_decay=0.65),
}
"""The recipes by name."""

UNDECAYED = (
    "relative_position_bias_table",
    "position_embeddings",
    "absolute_pos_embed",
    "pos_embed",
    "pos_embed_win",
    "pos_embed_window",
    "rel_pos_h",
    "rel_pos_w",
    "_token",  # of the class, of registers, of distillation, of masks
    "_tokens",
    "logit_scale",
)
"""Ends of the names of parameters without weight decay, besides those of one dimension."""

UNDECAYED_MODULES = ("grn", "continuous_position_bias_mlp", "cpb_mlp")
"""Names of modules whose parameters have no weight decay."""


def recipe_for(name: str, backbone_config: Any) -> Recipe:
    """Return a recipe by name.

    Args:
        name: a key of `RECIPES`, or "auto" for the published recipe of the backbone. A backbone without a published
            recipe, or without the layer depths that it needs, has Swin's.
        backbone_config: the backbone's configuration; None if it is not known.

    Raises:
        ValueError: there is no such recipe.
    """
    if name == "auto":
        name = _published(backbone_config)
    if name not in RECIPES:
        raise ValueError(f"recipe={name!r} is not known; known are auto, {', '.join(RECIPES)}")
    return RECIPES[name]


def _published(backbone_config: Any) -> str:
    """Return the name of a backbone's published recipe, or "swin"."""
    if backbone_config is None:
        return "swin"
    if isinstance(backbone_config, ForeignBackboneConfig):
        return _published_foreign(backbone_config)
    family = FAMILIES[backbone_config.model_type]
    name = family.model_type if family.recipe is None else family.recipe(backbone_config)
    return name if name in RECIPES else "swin"


def _published_foreign(config: ForeignBackboneConfig) -> str:
    """Return the recipe of a BEiT or MAE of another library, by timm's name or Transformers' model type; or "swin"."""
    if config.model_type == "beit":
        return "beit" if config.values.get("num_hidden_layers", 12) <= 12 else "beit-large"
    name = str(config.values.get("backbone"))
    if config.model_type == TIMM and (match := re.match(r"beit_(base|large)_|vit_\w+\.mae$", name)):
        return {"base": "beit", "large": "beit-large", None: "mae"}[match[1]]
    return "swin"


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Return AdamW's groups: each group's parameters have one learning rate and one weight decay.

    Args:
        model: a UPerNet; without layer decay any module. Parameters that require no gradient are left out.
        recipe: the learning rate, weight decay and layer decay.

    Returns:
        Dictionaries with "params" (pairs of a name and a parameter), "lr" and "weight_decay", in the order of each
        group's first parameter in the model.

    Raises:
        ValueError: the recipe has a layer decay, and the backbone's family no layer depths.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        lr = recipe.learning_rate
        if recipe.layer_decay != 1:
            config: Any = model.config
            lr *= learning_rate_scale(name, recipe.layer_decay, config.backbone_config)
        weight_decay = recipe.weight_decay if decays(name, parameter) else 0.0
        group = groups.setdefault((lr, weight_decay), {"params": [], "lr": lr, "weight_decay": weight_decay})
        group["params"].append((name, parameter))
    return list(groups.values())


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Return True if a parameter has weight decay.

    Norms (ConvNeXt V2's GRN too), biases, LayerScale, tokens, position embeddings and tables have none, nor have
    Swin V2's factors of cosines and its networks that compute the biases of positions.
    """
    if any(part in UNDECAYED_MODULES for part in name.split(".")):
        return False
    return parameter.ndim > 1 and not name.endswith(UNDECAYED)


def learning_rate_scale(name: str, layer_decay: float, backbone_config: Any) -> float:
    """Return the factor of a parameter's learning rate: `layer_decay` to the power of its depth, and 1 in the heads.

    Args:
        name: the parameter's name in a UPerNet.
        layer_decay: the factor for one step of depth.
        backbone_config: the backbone's configuration. Its family defines the depths; the rule of ConvNeXt's authors is
            `fastuper.models.backbones.stage_depths`.

    Raises:
        ValueError: the backbone's family has no layer depths.
    """
    depth = layer_depths(backbone_config.model_type)
    inside = name.removeprefix("backbone.")
    return 1.0 if inside == name else layer_decay ** depth(inside, backbone_config)


def learning_rate_factor(step: int, *, steps: int, warmup_steps: int, power: float) -> float:
    """Return the factor of all learning rates in a step: linear warmup times polynomial decay.

    Args:
        step: from 0.
        steps: the number of steps, at which the polynomial is 0; it is 1 at step 0.
        warmup_steps: the step at which the line reaches 1; it is 1e-6 at step 0.
        power: the polynomial's exponent.
    """
    warmup = 1 - (1 - step / warmup_steps) * (1 - 1e-6) if step < warmup_steps else 1.0
    return warmup * (1 - step / steps) ** power

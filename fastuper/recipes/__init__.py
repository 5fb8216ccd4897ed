"""Training recipes of the published UPerNets, backbones by name, parameter groups and learning rate schedule."""

from fastuper_kernels.dispatch.lazy import lazy_names

TYPE_CHECKING = False  # as in `typing`, whose import would take longer than all else in this file
if TYPE_CHECKING:
    from fastuper.recipes.recipes import (
        BACKBONES,
        RECIPES,
        Recipe,
        decays,
        learning_rate_factor,
        learning_rate_scale,
        parameter_groups,
        recipe_for,
    )

__all__ = [
    "BACKBONES",
    "RECIPES",
    "Recipe",
    "decays",
    "learning_rate_factor",
    "learning_rate_scale",
    "parameter_groups",
    "recipe_for",
]

if not TYPE_CHECKING:  # a type checker takes every name for one of a module that has __getattr__
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "BACKBONES": "fastuper.recipes.recipes",
            "RECIPES": "fastuper.recipes.recipes",
            "Recipe": "fastuper.recipes.recipes",
            "decays": "fastuper.recipes.recipes",
            "learning_rate_factor": "fastuper.recipes.recipes",
            "learning_rate_scale": "fastuper.recipes.recipes",
            "parameter_groups": "fastuper.recipes.recipes",
            "recipe_for": "fastuper.recipes.recipes",
        },
    )

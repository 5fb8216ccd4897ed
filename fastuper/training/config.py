"""How to train: TrainingConfig, and the plan a recipe completes it to."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastuper.models.configuration import check_counts
from fastuper.recipes.recipes import Recipe, recipe_for

if TYPE_CHECKING:
    pass


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message is one line that names the reason and the remedy."""


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. What is None follows from the recipe or from the number of steps.

    Args:
        steps: how many times the weights are changed.
        batch_size: images of a step, all processes and pieces together.
        accumulate: how many pieces each process takes its part of a step's images in, one after another: the memory
            of one piece, the gradients of all.
        recipe: "convnext", "swin", or "auto": by the backbone. See `fastuper.recipes.recipes`.
        learning_rate: of the heads; the recipe's where None.
        weight_decay: the recipe's where None.
        layer_decay: what the backbone's learning rates fall by, stage by stage; the recipe's where None.
        warmup_steps: steps in which the learning rate rises; 1,500, but at most a tenth of all, where None.
        power: of the polynomial by which the learning rate falls to 0.
        clip: the largest norm of the gradient; a larger one is scaled down to it. None lets all pass.
        bf16: whether to compute in bfloat16 where autocast says so; weights and optimizer stay in float32.
        ema: how much of the averaged weights stays at each step (0.999, say); the average is what is validated and
            saved. None keeps no average.
        freeze_norm: whether BatchNorm normalises with its running statistics and leaves them as they are.
        seed: what the order of the images, the augmentation and stochastic depth are drawn from.
        workers: processes that prepare images, for each process that trains; 0 has the latter do it.
        log_every: steps between two lines of the log; on a GPU, also those between two looks at the loss.
        validate_every: steps between two validations; a tenth of all where None.
        save_every: steps between two checkpoints; `validate_every` where None. Each validation is saved as well.
        pictures: predicted pictures in each validation's TensorBoard entry.
        cpu: whether to leave the GPU alone.

    Raises:
        ValueError: a value that cannot be; the message names it.
    """

    steps: int = 160_000
    batch_size: int = 16
    accumulate: int = 1
    recipe: str = "auto"
    learning_rate: float | None = None
    weight_decay: float | None = None
    layer_decay: float | None = None
    warmup_steps: int | None = None
    power: float = 1.0
    clip: float | None = None
    bf16: bool = False
    ema: float | None = None
    freeze_norm: bool = False
    seed: int = 0
    workers: int = 2
    log_every: int = 10
    validate_every: int | None = None
    save_every: int | None = None
    pictures: int = 4
    cpu: bool = False

    def __post_init__(self) -> None:
        at_least_one = ("steps", "batch_size", "accumulate", "log_every", "validate_every", "save_every")
        for least, names in ((1, at_least_one), (0, ("warmup_steps", "seed", "workers", "pictures"))):
            check_counts(least, **{name: getattr(self, name) for name in names if getattr(self, name) is not None})
        for name in ("learning_rate", "power", "clip"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be more than 0, got {value!r}")
        if self.weight_decay is not None and not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay!r}")
        for name in ("layer_decay", "ema"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} must be more than 0 and at most 1, got {value!r}")
        if self.warmup_steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be fewer than the {self.steps} steps")
        recipe_for(self.recipe, "")

    def plan(self, backbone_type: str) -> Plan:
        """Return what the recipe and the number of steps decide, where the configuration does not."""
        recipe = recipe_for(self.recipe, backbone_type)
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(Recipe)}
        validate_every = self.validate_every or max(self.steps // 10, 1)
        return Plan(
            recipe=dataclasses.replace(recipe, **{name: value for name, value in own.items() if value is not None}),
            warmup_steps=min(1500, self.steps // 10) if self.warmup_steps is None else self.warmup_steps,
            validate_every=validate_every,
            save_every=self.save_every or validate_every,
        )


@dataclass(frozen=True)
class Plan:
    """What a `TrainingConfig` leaves open, decided."""

    recipe: Recipe
    warmup_steps: int
    validate_every: int
    save_every: int


# May differ when a run goes on: they change no loss, or (`accumulate`) by rounding and what BatchNorm sees at once.
# The recipe's numbers are compared, its name is not.
FREE = ("recipe", "accumulate", "workers", "log_every", "validate_every", "save_every", "pictures", "cpu")

"""The options of training: `TrainingConfig`, and the `Plan`, whose open values come from a recipe."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastuper.io.options import check_options, document_options, option

if TYPE_CHECKING:
    from fastuper.recipes.recipes import Recipe

# The command line imports this file: torch, and the recipes that need it, are imported inside functions.


class TrainingError(RuntimeError):
    """Training cannot start or cannot continue; the message is one line with the reason and the remedy."""


@document_options
@dataclass(frozen=True)
class TrainingConfig:
    """How to train: the options of `fastuper train` that the trainer needs.

    An option that is None follows from the recipe or from the number of steps; see `plan`. A value out of its bounds
    raises ValueError, and the message names the option.
    """

    steps: int = option(160_000, "Number of optimizer steps.", at_least=1, metavar="N")
    batch_size: int = option(16, "Images per step, over all processes and accumulated pieces.", at_least=1, metavar="N")
    accumulate: int = option(
        1,
        "Pieces that each process splits its images of a step into: memory for one piece, gradients of all.",
        at_least=1,
        metavar="N",
    )
    recipe: str = option(
        "auto",
        "Published learning rate and decays to use: convnext, swin, convnextv2, beit, beit-large, beit-pretrained, "
        "mae, or auto, by the backbone.",
        metavar="NAME",
    )
    learning_rate: float | None = option(
        None,
        "Peak learning rate of the heads.",
        more_than=0,
        default_text="the recipe's",
        metavar="RATE",
        flag="--lr",
    )
    weight_decay: float | None = option(
        None, "Weight decay of AdamW.", at_least=0, default_text="the recipe's", metavar="RATE"
    )
    layer_decay: float | None = option(
        None,
        "Factor by which the learning rate falls from each stage of the backbone, or block of a ViT, to its input.",
        more_than=0,
        at_most=1,
        default_text="the recipe's",
        metavar="FACTOR",
    )
    warmup_steps: int | None = option(
        None,
        "Steps in which the learning rate rises to its peak.",
        at_least=0,
        default_text="1500, or a tenth of all steps if that is fewer",
        metavar="N",
        flag="--warmup",
    )
    power: float = option(
        1.0, "Power of the polynomial by which the learning rate falls to 0.", more_than=0, python_only=True
    )
    clip: float | None = option(
        None,
        "Largest norm of the gradient; a larger gradient is scaled down to it.",
        more_than=0,
        default_text="no limit",
        metavar="NORM",
    )
    bf16: bool = option(False, "Compute in bfloat16 under autocast; weights and optimizer stay in float32.")
    ema: float | None = option(
        None,
        "Decay of a moving average of the weights (0.999, for example), which is then validated and saved.",
        more_than=0,
        at_most=1,
        default_text="no average",
        metavar="DECAY",
    )
    freeze_norm: bool = option(
        False, "Normalise with BatchNorm's running statistics, and leave the statistics unchanged."
    )
    seed: int = option(0, "Seed of all random choices.", at_least=0, metavar="N")
    workers: int = option(
        2,
        "Processes that prepare images, for each training process; 0 prepares them in the training process.",
        at_least=0,
        metavar="N",
    )
    log_every: int = option(
        10,
        "Steps between two lines of log.jsonl; on a GPU, also between two checks that the loss is finite.",
        at_least=1,
        metavar="N",
    )
    validate_every: int | None = option(
        None, "Steps between two validations.", at_least=1, default_text="a tenth of all steps", metavar="N"
    )
    save_every: int | None = option(
        None,
        "Steps between two checkpoints; each validation saves a checkpoint too.",
        at_least=1,
        default_text="the steps between two validations",
        metavar="N",
    )
    pictures: int = option(4, "Predicted pictures in TensorBoard for each validation.", at_least=0, python_only=True)
    cpu: bool = option(False, "Train on the CPU, even where there is a GPU.")

    def __post_init__(self) -> None:
        from fastuper.recipes.recipes import recipe_for

        check_options(self)
        recipe_for(self.recipe, None)  # refuses a name that RECIPES has not
        if self.warmup_steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be fewer than the {self.steps} steps")

    def plan(self, backbone_config: Any) -> Plan:
        """Return the recipe and the intervals that training uses.

        Args:
            backbone_config: the backbone's configuration, which decides the recipe "auto".
        """
        from fastuper.recipes.recipes import Recipe, recipe_for

        recipe = recipe_for(self.recipe, backbone_config)
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
    """The values that a `TrainingConfig` leaves open, decided for one backbone.

    Attributes:
        recipe: the learning rate and the decays, the configuration's own where it has any.
        warmup_steps: steps in which the learning rate rises.
        validate_every: steps between two validations.
        save_every: steps between two checkpoints.
    """

    recipe: Recipe
    warmup_steps: int
    validate_every: int
    save_every: int


MAY_CHANGE_ON_RESUME = (
    "recipe",  # its numbers are compared instead
    "accumulate",  # changes losses by rounding, and by the images that BatchNorm normalises together
    "workers",
    "log_every",
    "validate_every",
    "save_every",
    "pictures",
    "cpu",
)
"""Options that may differ when a run resumes."""

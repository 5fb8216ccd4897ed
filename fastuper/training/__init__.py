"""The training loop."""

from typing import TYPE_CHECKING

from fastuper.io.lazy import lazy_names

if TYPE_CHECKING:
    from fastuper.training.runs import RunFolder
    from fastuper.training.trainer import Trainer, TrainingConfig, TrainingError

__all__ = [
    "RunFolder",
    "Trainer",
    "TrainingConfig",
    "TrainingError",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "RunFolder": "fastuper.training.runs",
        "Trainer": "fastuper.training.trainer",
        "TrainingConfig": "fastuper.training.trainer",
        "TrainingError": "fastuper.training.trainer",
    },
)

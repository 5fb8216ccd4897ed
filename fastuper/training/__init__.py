"""The training loop."""

from typing import TYPE_CHECKING

from fastuper.io.lazy import lazy_names

if TYPE_CHECKING:
    from fastuper.training.config import TrainingConfig, TrainingError
    from fastuper.training.runs import RunFolder
    from fastuper.training.trainer import Trainer

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
        "TrainingConfig": "fastuper.training.config",
        "TrainingError": "fastuper.training.config",
    },
)

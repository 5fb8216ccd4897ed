"""Training: the public names of this package, each imported when it is first used."""

from fastuper_kernels.dispatch.lazy import lazy_names

TYPE_CHECKING = False  # not from `typing`, whose import would take most of this file's time
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

if not TYPE_CHECKING:  # a type checker takes every name for one of a module that has __getattr__
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "RunFolder": "fastuper.training.runs",
            "Trainer": "fastuper.training.trainer",
            "TrainingConfig": "fastuper.training.config",
            "TrainingError": "fastuper.training.config",
        },
    )

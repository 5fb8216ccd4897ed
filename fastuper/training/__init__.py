"""The training loop."""

from fastuper_kernels.dispatch.lazy import lazy_names

TYPE_CHECKING = False  # what `typing` has under this name; importing `typing` would take longer than all else here
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

"""A model on a dataset: the confusion matrix and the measures that follow from it."""

from fastuper_kernels.dispatch.lazy import lazy_names

TYPE_CHECKING = False  # what `typing` has under this name; importing `typing` would take longer than all else here
if TYPE_CHECKING:
    from fastuper.evaluation.confusion import ConfusionMatrix
    from fastuper.evaluation.loop import check_classes, class_names, evaluate

__all__ = [
    "ConfusionMatrix",
    "check_classes",
    "class_names",
    "evaluate",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ConfusionMatrix": "fastuper.evaluation.confusion",
        "check_classes": "fastuper.evaluation.loop",
        "class_names": "fastuper.evaluation.loop",
        "evaluate": "fastuper.evaluation.loop",
    },
)

"""Evaluation of a model on a dataset: the confusion matrix, its measures and reports; the measures of parsing."""

from fastuper_kernels.dispatch.lazy import lazy_names

TYPE_CHECKING = False  # type checkers take the name for `typing.TYPE_CHECKING`, whose import costs time
if TYPE_CHECKING:
    from fastuper.evaluation.confusion import ConfusionMatrix
    from fastuper.evaluation.loop import check_classes, class_names, evaluate
    from fastuper.evaluation.parsing import ParsingMetrics

__all__ = [
    "ConfusionMatrix",
    "ParsingMetrics",
    "check_classes",
    "class_names",
    "evaluate",
]

if not TYPE_CHECKING:  # a type checker takes every name for one of a module that has __getattr__
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "ConfusionMatrix": "fastuper.evaluation.confusion",
            "ParsingMetrics": "fastuper.evaluation.parsing",
            "check_classes": "fastuper.evaluation.loop",
            "class_names": "fastuper.evaluation.loop",
            "evaluate": "fastuper.evaluation.loop",
        },
    )

"""The predictor: label maps of whole images, with sliding windows, several scales and mirroring."""

from fastuper_kernels.dispatch.lazy import lazy_names

TYPE_CHECKING = False  # type checkers take the name for `typing.TYPE_CHECKING`, whose import costs time
if TYPE_CHECKING:
    from fastuper.inference.predictor import PredictionError, Predictor, Prepared

__all__ = [
    "PredictionError",
    "Predictor",
    "Prepared",
]

if not TYPE_CHECKING:  # a type checker takes every name for one of a module that has __getattr__
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "PredictionError": "fastuper.inference.predictor",
            "Predictor": "fastuper.inference.predictor",
            "Prepared": "fastuper.inference.predictor",
        },
    )

"""Label maps of whole images: in windows, at several scales, mirrored."""

from fastuper_kernels.dispatch.lazy import lazy_names

TYPE_CHECKING = False  # what `typing` has under this name; importing `typing` would take longer than all else here
if TYPE_CHECKING:
    from fastuper.inference.predictor import PredictionError, Predictor, Prepared

__all__ = [
    "PredictionError",
    "Predictor",
    "Prepared",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "PredictionError": "fastuper.inference.predictor",
        "Predictor": "fastuper.inference.predictor",
        "Prepared": "fastuper.inference.predictor",
    },
)

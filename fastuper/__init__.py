"""UPerNet for semantic segmentation: the same network as Hugging Face Transformers', with less work."""

from fastuper_kernels.dispatch.lazy import lazy_names

TYPE_CHECKING = False  # what `typing` has under this name; importing `typing` would take longer than all else here
if TYPE_CHECKING:
    from fastuper.data.processor import BatchFeature, UperNetImageProcessor
    from fastuper.models.configuration import ConvNextConfig, ResNetConfig, SwinConfig, UperNetConfig
    from fastuper.models.upernet import UperNetForSemanticSegmentation

__version__ = "0.1.0"

__all__ = [
    "BatchFeature",
    "ConvNextConfig",
    "ResNetConfig",
    "SwinConfig",
    "UperNetConfig",
    "UperNetForSemanticSegmentation",
    "UperNetImageProcessor",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "BatchFeature": "fastuper.data.processor",
        "ConvNextConfig": "fastuper.models.configuration",
        "ResNetConfig": "fastuper.models.configuration",
        "SwinConfig": "fastuper.models.configuration",
        "UperNetConfig": "fastuper.models.configuration",
        "UperNetForSemanticSegmentation": "fastuper.models.upernet",
        "UperNetImageProcessor": "fastuper.data.processor",
    },
)

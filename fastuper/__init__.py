"""UPerNet for semantic segmentation: the same network as Hugging Face Transformers', with less work."""

from fastuper_kernels.dispatch.lazy import lazy_names

TYPE_CHECKING = False  # what `typing` has under this name; importing `typing` would take longer than all else here
if TYPE_CHECKING:
    from fastuper.data.processor import BatchFeature, UperNetImageProcessor
    from fastuper.models.backbones.convnext import ConvNextConfig
    from fastuper.models.backbones.resnet import ResNetConfig
    from fastuper.models.backbones.swin import SwinConfig
    from fastuper.models.upernet import UperNetForSemanticSegmentation
    from fastuper.models.upernet_configuration import UperNetConfig

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
        "ConvNextConfig": "fastuper.models.backbones.convnext",
        "ResNetConfig": "fastuper.models.backbones.resnet",
        "SwinConfig": "fastuper.models.backbones.swin",
        "UperNetConfig": "fastuper.models.upernet_configuration",
        "UperNetForSemanticSegmentation": "fastuper.models.upernet",
        "UperNetImageProcessor": "fastuper.data.processor",
    },
)

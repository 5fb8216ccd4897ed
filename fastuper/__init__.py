"""UPerNet for semantic segmentation: the same network as Hugging Face Transformers', with less work."""

from fastuper.configuration import ConvNextConfig, ResNetConfig, SwinConfig, UperNetConfig
from fastuper.image_processor import BatchFeature, UperNetImageProcessor
from fastuper.modeling import UperNetForSemanticSegmentation

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

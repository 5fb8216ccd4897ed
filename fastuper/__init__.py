"""UPerNet: the public names of the package, each imported when it is first used.

The networks for semantic segmentation are those of Hugging Face Transformers' `UperNetForSemanticSegmentation`,
computed faster. Those for Unified Perceptual Parsing are the official code's (CSAILVision/unifiedparsing).
"""

from fastuper.io.version import __version__ as __version__
from fastuper_kernels.dispatch.lazy import lazy_names

TYPE_CHECKING = False  # not from `typing`, whose import would take most of this file's time
if TYPE_CHECKING:
    from fastuper.data.processor import BatchFeature, UperNetImageProcessor
    from fastuper.models.backbones.convnext import ConvNextConfig
    from fastuper.models.backbones.convnextv2 import ConvNextV2Config
    from fastuper.models.backbones.resnet import ResNetConfig
    from fastuper.models.backbones.resnet_deep_stem import DeepStemResNetConfig
    from fastuper.models.backbones.swin import SwinConfig
    from fastuper.models.backbones.swin_timm import TimmSwinConfig
    from fastuper.models.backbones.swinv2 import Swinv2Config
    from fastuper.models.backbones.vit import ViTPyramidConfig
    from fastuper.models.parsing import UperNetForUnifiedPerceptualParsing
    from fastuper.models.parsing_configuration import UnifiedPerceptualParsingConfig
    from fastuper.models.upernet import UperNetForSemanticSegmentation
    from fastuper.models.upernet_configuration import UperNetConfig
    from fastuper.patch.acceleration import accelerate, explain, restore

__all__ = [
    "BatchFeature",
    "ConvNextConfig",
    "ConvNextV2Config",
    "DeepStemResNetConfig",
    "ResNetConfig",
    "SwinConfig",
    "Swinv2Config",
    "TimmSwinConfig",
    "UnifiedPerceptualParsingConfig",
    "UperNetConfig",
    "UperNetForSemanticSegmentation",
    "UperNetForUnifiedPerceptualParsing",
    "UperNetImageProcessor",
    "ViTPyramidConfig",
    "accelerate",
    "explain",
    "restore",
]

if not TYPE_CHECKING:  # a type checker takes every name for one of a module that has __getattr__
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "BatchFeature": "fastuper.data.processor",
            "ConvNextConfig": "fastuper.models.backbones.convnext",
            "ConvNextV2Config": "fastuper.models.backbones.convnextv2",
            "DeepStemResNetConfig": "fastuper.models.backbones.resnet_deep_stem",
            "ResNetConfig": "fastuper.models.backbones.resnet",
            "SwinConfig": "fastuper.models.backbones.swin",
            "Swinv2Config": "fastuper.models.backbones.swinv2",
            "TimmSwinConfig": "fastuper.models.backbones.swin_timm",
            "UnifiedPerceptualParsingConfig": "fastuper.models.parsing_configuration",
            "UperNetConfig": "fastuper.models.upernet_configuration",
            "UperNetForSemanticSegmentation": "fastuper.models.upernet",
            "UperNetForUnifiedPerceptualParsing": "fastuper.models.parsing",
            "UperNetImageProcessor": "fastuper.data.processor",
            "ViTPyramidConfig": "fastuper.models.backbones.vit",
            "accelerate": "fastuper.patch.acceleration",
            "explain": "fastuper.patch.acceleration",
            "restore": "fastuper.patch.acceleration",
        },
    )

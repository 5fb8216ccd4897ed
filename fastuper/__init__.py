"""UPerNet for semantic segmentation: the same network as Hugging Face Transformers', with less work."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# Each name is imported when it is first used: torch takes seconds, for which `fastuper --help` need not wait.
_MODULES = {
    "BatchFeature": "image_processor",
    "ConvNextConfig": "configuration",
    "ResNetConfig": "configuration",
    "SwinConfig": "configuration",
    "UperNetConfig": "configuration",
    "UperNetForSemanticSegmentation": "modeling",
    "UperNetImageProcessor": "image_processor",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

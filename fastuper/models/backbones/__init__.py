"""The backbones, a file a family, and the registry that the rest of the library reads them from.

To add a family, write its file with a call of `register` at its end, and import it here.
"""

from fastuper.models.backbones.convnext import ConvNextBackbone
from fastuper.models.backbones.layers import Backbone
from fastuper.models.backbones.registry import Family, build_backbone, register, stage_depths, unregister
from fastuper.models.backbones.resnet import ResNetBackbone
from fastuper.models.backbones.swin import SwinBackbone

__all__ = [
    "Backbone",
    "ConvNextBackbone",
    "Family",
    "ResNetBackbone",
    "SwinBackbone",
    "build_backbone",
    "register",
    "stage_depths",
    "unregister",
]

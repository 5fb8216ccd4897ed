"""The backbones, a file a family, and the registry that the rest of the library reads them from.

To add a family, write its file with a call of `register` at its end, and import the file here: one line.
"""

from fastuper.models.backbones import convnext as convnext
from fastuper.models.backbones import convnextv2 as convnextv2
from fastuper.models.backbones import resnet as resnet
from fastuper.models.backbones import resnet_deep_stem as resnet_deep_stem
from fastuper.models.backbones import swin as swin
from fastuper.models.backbones import swin_timm as swin_timm
from fastuper.models.backbones import swinv2 as swinv2
from fastuper.models.backbones import vit as vit
from fastuper.models.backbones.layers import Backbone
from fastuper.models.backbones.registry import Family, build_backbone, register, stage_depths, unregister

__all__ = ["Backbone", "Family", "build_backbone", "register", "stage_depths", "unregister"]

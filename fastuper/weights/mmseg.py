"""mmsegmentation's checkpoints of UPerNet, 0.x and 1.x: UPerHead, FCNHead as auxiliary head, and the settings."""

from __future__ import annotations

from fastuper.weights.mmseg_backbones import CONVNEXT, RESNET, SWIN, BackboneDialect

BACKBONES: tuple[BackboneDialect, ...] = (SWIN, CONVNEXT, RESNET)
"""The backbones that can be converted; another file's backbones are added here."""

"""Counts UPerNet's floating-point operations from shapes, without running a model."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from bench.pairs import uninitialized


def rewritten_head(config: Any, channels: Sequence[int], cells: Sequence[int]) -> int:
    """Return the operations of the rewritten head, which mixes channels before it upsamples maps.

    Args:
        config: Transformers' `UperNetConfig`.
        channels: the feature maps' channels, finest first.
        cells: pixels of each feature map.
    """
    dim, classes = config.hidden_size, config.num_labels
    pooled = sum(scale * scale for scale in config.pool_scales)
    macs = sum(n * c * dim for n, c in zip(cells[:-1], channels, strict=False))  # laterals
    macs += pooled * channels[-1] * dim + pooled * 9 * dim * dim + cells[-1] * 9 * channels[-1] * dim  # pyramid pooling
    macs += sum(n * 9 * dim * dim for n in cells[:-1])  # FPN convolutions
    macs += sum(n * 9 * dim * dim for n in cells)  # fusion, each level at its own size
    macs += cells[0] * dim * classes
    return 2 * macs


def operations(config: Any, size: int) -> dict[str, int]:
    """Return the operations of one image: "backbone", "head" (rewritten), "logits" (both) and "as_written".

    "as_written" counts Transformers' backbone and head. A convolution counts as a direct one. Winograd's algorithm
    takes fewer operations, so measured times may beat a limit computed from these counts.
    """
    with uninitialized(), torch.device("meta"):
        model = transformers.UperNetForSemanticSegmentation(copy.deepcopy(config)).eval()
        pixels = torch.empty(1, 3, size, size)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            features = model.backbone(pixels).feature_maps
        backbone = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            model.decode_head(features)
        as_written = counter.get_total_flops()
    head = rewritten_head(config, [x.shape[1] for x in features], [math.prod(x.shape[2:]) for x in features])
    return {"backbone": backbone, "head": head, "logits": backbone + head, "as_written": backbone + as_written}

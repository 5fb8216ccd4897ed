"""Which maps of another library's backbone UPerNet reads, and the neck of a vision transformer.

Maps that fall are read as they are. A vision transformer returns four maps of one size, its patches; a pyramid neck
(`fastuper.models.necks.vit_pyramid`) makes four levels of them.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import replace
from typing import Any

from torch import nn

from fastuper.io.messages import shown
from fastuper.models.backbones.foreign.measuring import MAPS, Maps, has_attention
from fastuper.models.necks.vit_pyramid import TRANSPOSED_SCALES, ResizedPyramid, TransposedPyramid, build_neck

NECKS = ("transposed", "resized", "none")
"""Values of `neck`: a `TransposedPyramid`, a `ResizedPyramid` of the maps' channels, or the maps as they are."""

KEYS = frozenset({"neck", "output_fmt"})
"""The values of a configuration that are ours, not the library's."""


def chosen_blocks(count: int, is_beit: bool = False) -> list[int]:
    """Return the numbers (from 0) of the four blocks whose maps the neck reads by default.

    They lie at equal distances, and the last block is among them: 2, 5, 8, 11 of 12, as in mmsegmentation's ViT and
    DeiT. BEiT's authors read 3, 5, 7, 11 of 12 and 7, 11, 15, 23 of 24 (https://arxiv.org/abs/2106.08254).

    Raises:
        ValueError: there are fewer than four blocks.
    """
    if count < MAPS:
        raise ValueError(f"the neck reads four blocks of a vision transformer, and this one has {count}")
    if is_beit and count % 6 == 0:
        return [count // 3 - 1, count // 2 - 1, 2 * count // 3 - 1, count - 1]
    return [-(-count * quarter // 4) - 1 for quarter in (1, 2, 3, 4)]


def complete(maps: Maps, module: nn.Module, values: MutableMapping[str, Any], is_default: bool) -> Maps:
    """Return maps with their neck, and write the neck to the values of a configuration.

    Args:
        maps: the measured maps.
        module: the backbone.
        values: the configuration's; `neck` is one of `NECKS`, or missing for "transposed" where a neck is needed.
        is_default: True if the configuration named no maps.

    Raises:
        ValueError: four falling maps cannot be had, or `neck` does not fit the maps.
    """
    neck, name = values.get("neck"), maps.sizes.name
    if neck not in (None, *NECKS):
        raise ValueError(f"neck={shown(neck)} must be one of {', '.join(NECKS)}")
    if maps.rises:
        raise ValueError(
            f"{name} must return its maps finest first; they have strides {list(maps.scales)}: give other out_indices"
        )
    if not maps.is_flat:
        if neck not in (None, "none"):
            raise ValueError(
                f"{name} returns maps of the strides {list(maps.scales)}, which need no neck; leave out neck={neck!r}"
            )
        values.pop("neck", None)
        if is_default and not (maps.falls and len(maps.scales) == MAPS):
            raise ValueError(
                f"{name} has no four falling maps, which UPerNet reads: their strides are {list(maps.scales)}; give "
                "other out_indices or another backbone"
            )
        return maps
    if neck == "none":
        return maps
    if not has_attention(module):
        raise ValueError(
            f"{name} returns {len(maps.scales)} maps of one stride, {maps.scales[0]}, and is no vision transformer, "
            "whose maps a neck could scale; give another backbone"
        )
    if len(maps.scales) != MAPS:
        raise ValueError(
            f"the neck reads four maps of a vision transformer, and out_indices names {len(maps.scales)}; name four "
            "blocks, or leave out_indices out"
        )
    values["neck"] = neck = neck or "transposed"
    patch = maps.scales[0]
    rows, columns = (math.lcm(side, patch) for side in maps.sizes.multiple)
    if maps.sizes.largest is not None:
        rows, columns = maps.sizes.multiple
    return replace(maps, neck=neck, sizes=replace(maps.sizes, multiple=(rows, columns)))


def neck_of(backbone: nn.Module) -> TransposedPyramid | ResizedPyramid | None:
    """Return the neck of a backbone as this package builds it; None for a backbone without.

    Its levels have a quarter, a half, one and two patches: 4 to 32 pixels for patches of 16, 3.5 to 28 for patches of
    14.
    """
    maps = measured_maps(backbone)
    if maps is None or maps.neck == "none":
        return None
    return build_neck(maps.neck, maps.channels, TRANSPOSED_SCALES[0], maps.channels[-1])


def measured_maps(backbone: nn.Module) -> Maps | None:
    """Return what was measured of a backbone of timm or Transformers; None for all others."""
    maps = getattr(backbone, "measured_maps", None)
    return maps if isinstance(maps, Maps) else None

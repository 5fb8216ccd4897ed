"""Small modules of Transformers that the faster ways know: activations, norms, dropped paths. They stay as they are."""

from __future__ import annotations

from torch import nn
from transformers.activations import ACT2CLS

from fastuper.models.backbones.layers import ACTIVATIONS
from fastuper.models.backbones.rewrites import DROPS, FUSED_ACTIVATIONS, LAYER_NORMS
from fastuper.models.untouched import KNOWN


def know(*kinds: type[nn.Module]) -> None:
    """Enter classes whose `forward` does no more than a faster way that stands in for it."""
    KNOWN.update(kinds)


def know_drops(*kinds: type[nn.Module]) -> None:
    """Enter classes of modules that return their input in evaluation."""
    know(*kinds)
    DROPS.update(kinds)


def know_norms(*kinds: type[nn.Module]) -> None:
    """Enter classes of LayerNorms; `data_format`, where they have it, says which dimension holds the channels."""
    know(*kinds)
    LAYER_NORMS.update(kinds)


for _name in ACTIVATIONS.keys() & ACT2CLS.keys():
    _entry = ACT2CLS[_name]
    _kind = _entry[0] if isinstance(_entry, tuple) else _entry
    know(_kind)
    if _kind is not nn.GELU and ACTIVATIONS[_name] is nn.GELU:
        FUSED_ACTIVATIONS[_kind] = "gelu"
    elif getattr(ACTIVATIONS[_name], "keywords", {}) == {"approximate": "tanh"}:
        FUSED_ACTIVATIONS[_kind] = "gelu_tanh"

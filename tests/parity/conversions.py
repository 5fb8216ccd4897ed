"""Networks of conversions, and checkpoints as sources, for the tests of dialects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastuper.models.backbones.registry import build_backbone, checkpoint_names
from fastuper.models.pyramid_configuration import backbone_config_from
from fastuper.weights.conversion import Choices, Conversion, Source
from fastuper.weights.convert import check_filled, convert_source


def converted(
    tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any] | None = None, name: str = "x.pth", **options: Any
) -> Conversion:
    """Return the conversion of a state dict."""
    return convert_source(Source(name, tensors, settings or {}), Choices(options))


def network(conversion: Conversion) -> Any:
    """Return the backbone of a conversion in evaluation mode; each of its tensors is filled."""
    model = build_backbone(backbone_config_from(conversion.config))
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = checkpoint_names(conversion.config["model_type"])
    check_filled("x.pth", conversion, own, [name for name in own if names.is_computed(name)])
    model.load_state_dict(dict(conversion.tensors), strict=False, assign=True)
    return model.to(next(iter(conversion.tensors.values())).dtype).eval()


def stages_of(model: nn.Module, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Return the maps of all stages of our backbone, without the norms of its outputs."""
    with torch.no_grad():
        return list(model(pixels, output_hidden_states=True).hidden_states)[1:]

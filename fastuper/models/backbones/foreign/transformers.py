"""Backbones of Transformers' `AutoBackbone`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from fastuper.io.messages import listed, reason
from fastuper.models.backbones.foreign.depths import MOST_STAGES
from fastuper.models.backbones.foreign.measuring import MAPS, Maps, measure
from fastuper.models.backbones.foreign.pyramids import KEYS, chosen_blocks, complete
from fastuper.models.configuration import ForeignBackboneConfig
from fastuper.weights.errors import CheckpointError
from fastuper.weights.transformers import OUTPUT_NORMS, Names

# Transformers' windowed backbones, such as MaskFormer's Swin, name their computed buffer as Swin does.
NAMES = Names(computed=("relative_position_index",))

PYRAMID_UNIT = 32
"""The largest stride of a pyramid; patches of at least `SMALLEST_PATCH` pixels are a vision transformer's."""

SMALLEST_PATCH = 8


def transformers_backbone(config: ForeignBackboneConfig) -> nn.Module:
    """Return a backbone of Transformers' `AutoBackbone`, unwrapped: a wrapper would change its parameters' names.

    Args:
        config: `model_type`, and the values of Transformers' configuration of that type. If they name no stages, or
            only the last, four stages are chosen and written to them: the last four; of a vision transformer four
            blocks (`chosen_blocks`); else the last stage of each size.

    Returns:
        The backbone. Its attribute `measured_maps` (a `Maps`) says what its maps are, as one forward has shown it.

    Raises:
        ImportError: Transformers is not installed.
        ValueError: Transformers cannot build the backbone, the message gives its reason; or it has not four maps.
    """
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise ImportError(
            f"a {config.model_type!r} backbone needs Transformers: pip install 'fastuper[transformers]'"
        ) from None
    values = config.values
    if not (config.reads_all_stages or values.get("neck") != "none"):
        return _finished(_built(config, None), config, is_default=False)
    names = _stages_of(config)
    if not _is_last_stage(values, names):
        return _finished(_built(config, None), config, is_default=False)
    state = torch.get_rng_state()
    chosen = names[-MAPS:]
    backbone: Any = _built(config, chosen)
    maps = _measured(backbone, config)
    blocks = [name for name in names if name != "stem"]
    if maps.is_flat or len(blocks) > MOST_STAGES:  # a BEiT with its own neck has blocks, and maps that fall
        chosen = [blocks[i] for i in chosen_blocks(len(blocks), config.model_type == "beit")]
    elif not maps.falls:
        chosen = _falling(names, _measured(_built(config, names), config))
    if chosen != names[-MAPS:]:
        parts = {part for name in backbone.state_dict() for part in name.split(".")}
        if parts.isdisjoint(names):  # all stages share their tensors
            for owner in (backbone, backbone.config):
                owner.out_features = list(chosen)
        else:
            torch.set_rng_state(state)
            backbone = _built(config, chosen)
    values.pop("out_indices", None)
    values["out_features"] = list(chosen)
    return _finished(backbone, config, is_default=True)


def _finished(backbone: nn.Module, config: ForeignBackboneConfig, is_default: bool) -> nn.Module:
    """Return a backbone with its attribute `measured_maps`."""
    module: Any = backbone
    module.measured_maps = complete(_measured(backbone, config), backbone, config.values, is_default)
    return backbone


def _built(config: ForeignBackboneConfig, stages: Sequence[str] | None) -> nn.Module:
    """Return the backbone of a configuration, on the CPU, with other stages unless they are None."""
    from transformers import AutoBackbone

    with torch.device("cpu"):
        try:
            return AutoBackbone.from_config(_library_config(config, stages))
        except ImportError as error:  # a library that this backbone needs; Transformers' message has several lines
            raise ImportError(f"Transformers cannot build a {config.model_type!r} backbone: {reason(error)}") from error
        except (RuntimeError, MemoryError):  # no memory
            raise
        except Exception as error:  # each model type checks its values in its own way, or not at all
            raise _refused(config, error) from error


def _library_config(config: ForeignBackboneConfig, stages: Sequence[str] | None = None, **other: Any) -> Any:
    from transformers import AutoConfig

    values = {name: value for name, value in config.values.items() if name not in KEYS} | other
    if stages is not None:
        values.pop("out_indices", None)
        values["out_features"] = list(stages)
    library: Any = AutoConfig.for_model(config.model_type, **values)
    for name, value in vars(library).items():
        if isinstance(value, tuple):  # to some defaults of 5.x, tuples, the backbones add lists
            setattr(library, name, list(value))
    return library


def _refused(config: ForeignBackboneConfig, error: Exception) -> ValueError:
    return ValueError(
        f"Transformers cannot build a {config.model_type!r} backbone of its configuration: {reason(error)}"
    )


def _stages_of(config: ForeignBackboneConfig) -> list[str]:
    """Return the names of a backbone's stages, the stem's first if it has a name."""
    other: dict[str, Any] = (
        {"add_fpn": False} if config.values.get("add_fpn") else {}
    )  # BEiT's configuration wants stages for its own
    try:
        return list(_library_config(config, **other).stage_names)
    except Exception as error:  # as in `_built`
        raise _refused(config, error) from error


def _is_last_stage(values: Any, names: Sequence[str]) -> bool:
    """Return True if values name no stages, or only the last."""
    features, indices = values.get("out_features"), values.get("out_indices")
    return (features is None or list(features) == list(names[-1:])) and (
        indices is None or list(indices) in ([-1], [len(names) - 1])
    )


def _falling(names: Sequence[str], maps: Maps) -> list[str]:
    """Return the last stage of each size, of the last four sizes."""
    last = dict(zip(maps.scales, names, strict=True))  # a later stage takes the place of an earlier one
    return [last[scale] for scale in sorted(last)][-MAPS:]


def _measured(backbone: nn.Module, config: ForeignBackboneConfig) -> Maps:
    library: Any = backbone.config
    patch = getattr(library, "patch_size", None)
    patch = max(patch) if isinstance(patch, list | tuple) else patch
    native = getattr(library, "image_size", None)
    native = (native, native) if isinstance(native, int) else native
    return measure(
        lambda pixel_values: backbone(pixel_values).feature_maps,
        backbone,
        name=f"Transformers' {config.model_type}",
        channels=getattr(library, "num_channels", 3),
        unit=patch if isinstance(patch, int) and patch >= SMALLEST_PATCH else PYRAMID_UNIT,
        native=tuple(native) if isinstance(native, list | tuple) and len(native) == 2 else None,
        remedy="resize it, or give the backbone's configuration another image_size",
    )


ADDED = (OUTPUT_NORMS, "fpn", "layernorm.", "norm.")
"""Parts of Transformers' backbones that a classifier may lack, each as a whole."""


def pretrained_transformers_backbone(backbone: nn.Module, source: str) -> nn.Module:
    """Return a backbone of Transformers with the weights of a checkpoint, usually a classifier's.

    Args:
        backbone: a backbone of the same configuration, as `transformers_backbone` returns it.
        source: a folder or the id of a Hub repository.

    Raises:
        CheckpointError: the checkpoint has only a part of the backbone's tensors.
    """
    network: Any = type(backbone)  # AutoBackbone of Transformers 5.24 loads no folder
    loaded, info = network.from_pretrained(source, config=backbone.config, output_loading_info=True)
    own = [name for name in loaded.state_dict() if not NAMES.is_computed(name)]
    missing = {name for name in info["missing_keys"] if not NAMES.is_computed(name)}
    for part in ADDED:
        whole = {name for name in own if name.startswith(part)}
        if whole <= missing:
            missing -= whole
    if missing:
        raise CheckpointError(
            f"{source} lacks {len(missing)} of the {len(own)} tensors of a {type(backbone).__name__}, such as "
            f"{listed(sorted(missing), 2)}; it belongs to another model, or to another version of Transformers"
        )
    # Transformers 5 would save the names of the source, a classifier's perhaps, which no backbone of this class reads.
    vars(loaded).pop("_weight_conversions", None)
    loaded.measured_maps = backbone.measured_maps
    return loaded


def transformers_model_types() -> frozenset[str]:
    """Return the model types of Transformers' `AutoBackbone`; none if Transformers is not installed."""
    if find_spec("transformers") is None:
        return frozenset()
    from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

    return frozenset(MODEL_FOR_BACKBONE_MAPPING_NAMES)

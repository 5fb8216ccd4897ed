"""Runs the library that wrote a checkpoint beside the converted model, on one image, and compares their outputs."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fastuper.io.messages import listed, shown
from fastuper.models.converted import Converted
from fastuper.weights.conversion import Source
from fastuper.weights.errors import CheckpointError
from fastuper.weights.mmseg_backbones import BATCH_NORMS, short_types
from fastuper.weights.smp import has_config, wrapper_of

LARGEST = 1e-4
"""The largest difference of outputs, relative to the largest output, with which a conversion counts as right."""

SIZES = ((96, 128), (128, 128), (224, 224))
"""Sizes of the image, (height, width): the first that the other library's model takes is used."""

Run = Callable[[torch.Tensor], list[torch.Tensor]]


class NotVerifiable(Exception):
    """The other library's model cannot be built; the message says why."""


@dataclass(frozen=True)
class Foreign:
    """A library whose models can run beside ours.

    Attributes:
        name: the library's name.
        module: the module to import.
        build: builds the library's model of a source with its weights; returns its function from pixels (1, C, H, W) to
            logits, or to the maps of a backbone.
    """

    name: str
    module: str
    build: Callable[[Source, Converted], Run]


def verify_converted(
    source: Source, converted: Converted, draw: Callable[[tuple[int, int]], np.ndarray], required: bool
) -> str:
    """Compare a converted model with the model of the library that wrote the checkpoint.

    Args:
        source: the checkpoint.
        converted: the model that was made of it.
        draw: returns an image (height, width, 3), uint8, of a size.
        required: True if it is an error that the library is missing.

    Returns:
        A sentence: the largest difference, or why there was no comparison.

    Raises:
        CheckpointError: the outputs differ by more than `LARGEST`.
        ImportError: the library is missing, and `required`.
        ValueError: the model of the library cannot be built, and `required`.
    """
    try:
        foreign = LIBRARIES.get(converted.conversion.library)
        if foreign is None:
            raise NotVerifiable("no package has the network that wrote the checkpoint")
        if importlib.util.find_spec(foreign.module) is None:
            if required:
                raise ImportError(f"--verify needs {foreign.name}: no module {foreign.module}; install it")
            raise NotVerifiable(f"{foreign.name} is not installed")
        run = foreign.build(source, converted)
    except NotVerifiable as error:
        if required:
            raise ValueError(f"--verify is not possible: {error}") from None
        return f"not verified: {error}"
    ours = _maps if converted.conversion.kind == "backbone" else _logits
    pixels, expected = _run_at_a_size(run, converted, draw)
    found = ours(converted, pixels, len(expected))
    difference = float(torch.tensor(list(map(_difference, found, expected))).max())  # `max` of Python passes over NaN
    size = " x ".join(map(str, pixels.shape[2:]))
    if not difference <= LARGEST:
        raise CheckpointError(
            f"{source.place}: the converted model differs from {foreign.name}'s by {difference:.1e}, relative to the "
            f"largest output, on a drawn image of {size}; at most {LARGEST:.0e} is allowed (--no-verify writes it)"
        )
    return f"verified: {foreign.name}'s model differs by {difference:.1e}, relative, on a drawn image of {size}"


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def _run_at_a_size(
    run: Run, converted: Converted, draw: Callable[[tuple[int, int]], np.ndarray]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return pixels of the first size that the other library's model takes, and its outputs."""
    config: Any = converted.model.config
    backbone: Any = getattr(config, "backbone_config", config)
    built = getattr(backbone, "image_size", None)
    sizes = [*SIZES, *([(built, built)] if isinstance(built, int) else [tuple(built)] if built else [])]
    window = getattr(backbone, "window_size", None)
    if converted.conversion.kind == "backbone" and isinstance(window, int):
        sizes.insert(0, (side := window * backbone.patch_size * 2 ** (len(backbone.depths) - 1), side))
    faults = []
    for height, width in sizes:
        image = torch.from_numpy(np.array(draw((height, width)))).float().permute(2, 0, 1)
        channels = [i % 3 for i in range(getattr(backbone, "num_channels", 3))]
        pixels = ((image[channels] / 255 - 0.45) / 0.225)[None]
        try:
            return pixels, run(pixels)
        except (AssertionError, RuntimeError, ValueError, IndexError) as error:
            faults.append(f"{height} x {width}: {error}")
    raise CheckpointError(f"{converted.place}: the library's own model takes no image of {listed(faults, 1)}")


@torch.no_grad()
def _logits(converted: Converted, pixels: torch.Tensor, _: int) -> list[torch.Tensor]:
    model = copy.deepcopy(converted.model).float()
    return [model(pixels).logits]


@torch.no_grad()
def _maps(converted: Converted, pixels: torch.Tensor, count: int) -> list[torch.Tensor]:
    # Maps before the norms of the returned maps, which a classifier lacks.
    states = copy.deepcopy(converted.model).float()(pixels, output_hidden_states=True).hidden_states
    return list(states[-count:])


# Libraries ------------------------------------------------------------------------------------------------------------


def _load(model: nn.Module, tensors: Mapping[str, torch.Tensor], name: str) -> Any:
    """Load a source's tensors into the library's model; all that it needs must be there."""
    missing, _ = model.load_state_dict(dict(tensors), strict=False)
    computed = ("num_batches_tracked", "relative_position_index", "attn_mask")
    if missing := [key for key in missing if not key.endswith(computed)]:
        raise NotVerifiable(
            f"{name}'s model of this configuration has {len(missing)} more tensors ({listed(missing, 2)})"
        )
    return model.float().eval()


@contextmanager
def _stand_in_for_mmcv_ops() -> Iterator[None]:
    """Let mmseg be imported beside mmcv-lite, whose compiled operations are missing; UPerNet calls none of them."""
    name = "mmcv._ext"
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        yield
        return

    class Operations(types.ModuleType):
        def __getattr__(self, operation: str) -> Any:
            if operation.startswith("__"):
                raise AttributeError(operation)
            return lambda *_, **__: None

    sys.modules[name] = Operations(name)
    try:
        yield
    finally:
        del sys.modules[name]


def _of_mmseg(source: Source, converted: Converted) -> Run:
    settings = source.settings.get("model")
    if not isinstance(settings, dict):
        raise NotVerifiable("the checkpoint has no configuration text from which mmsegmentation builds a model")
    try:
        with _stand_in_for_mmcv_ops():
            importlib.import_module("mmseg.models")
            models = importlib.import_module("mmseg.registry").MODELS
            if "mmpretrain." in repr(settings) or "mmcls." in repr(settings):
                importlib.import_module("mmpretrain.models")
    except (ImportError, AssertionError, RuntimeError, AttributeError) as error:
        raise NotVerifiable(f"mmsegmentation does not import: {error}") from None
    values = _for_today(short_types({key: settings[key] for key in NETWORK if key in settings}))
    _check_kinds(values)
    try:
        model = models.build(values)
    except Exception as error:  # its class depends on the configuration
        raise NotVerifiable(f"mmsegmentation does not build the model ({type(error).__name__}: {error})") from None
    model = _load(model, source.tensors, "mmsegmentation")

    def run(pixels: torch.Tensor) -> list[torch.Tensor]:
        size = tuple(pixels.shape[2:])
        return [model.encode_decode(pixels, [{"img_shape": size, "ori_shape": size, "pad_shape": size}])]

    return run


NETWORK = ("type", "backbone", "neck", "decode_head", "test_cfg")
"""The settings of a segmentor that its logits depend on."""

NOT_RUN = ("init_cfg", "pretrained", "loss_decode", "sampler", "_delete_")
"""Settings inside them that logits do not depend on. Some name files to read (also pickles, as weights)."""


def _for_today(value: Any) -> Any:
    """Return settings as mmsegmentation 1.x reads them: without `NOT_RUN`, and without norms over processes."""
    if isinstance(value, list | tuple):
        return type(value)(_for_today(part) for part in value)
    if not isinstance(value, dict):
        return value
    made = {key: _for_today(part) for key, part in value.items() if key not in NOT_RUN}
    kind = made.get("type")
    if isinstance(kind, str):
        kind = kind.replace("mmcls.", "mmpretrain.")
        made["type"] = "BN" if kind in BATCH_NORMS else kind
    return made


KINDS = (
    *("EncoderDecoder", "UPerHead", "FCNHead", "Feature2Pyramid", "MultiLevelNeck"),
    *("SwinTransformer", "ConvNeXt", "ResNet", "ResNetV1c", "ResNetV1d", "BEiT", "MAE", "VisionTransformer"),
    *("BN", "BN2d", "LN", "LN2d", "GELU", "ReLU", "Conv2d", "DropPath", "Dropout"),
)
"""The modules that may be built. Others of mmsegmentation read files that their arguments name, or fetch weights."""


def _check_kinds(value: Any) -> None:
    """Refuse a name of any other class: mmengine imports what is not registered, and calls it.

    Raises:
        NotVerifiable: a `type` is none of `KINDS`.
    """
    if isinstance(value, list | tuple):
        for part in value:
            _check_kinds(part)
    elif isinstance(value, dict):
        kind = value.get("type", "EncoderDecoder")
        if not isinstance(kind, str) or re.sub(r"^(mmseg|mmpretrain|mmengine)\.", "", kind) not in KINDS:
            raise NotVerifiable(f"its configuration names {shown(kind)}, which is no module of the UPerNets here")
        for part in value.values():
            _check_kinds(part)


FILES = ("checkpoint_path", "cache_dir", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "encoder_weights")
"""Arguments of timm and smp that name weights to read or to fetch."""


def _arguments(values: Any) -> dict[str, Any]:
    """Return a network's arguments in a config.json, without those that name files."""
    return {k: v for k, v in values.items() if k not in FILES} if isinstance(values, Mapping) else {}


def _check_architecture(name: str) -> None:
    """Refuse a name that timm would look up in a folder or on the Hub ("hf_hub:...").

    Raises:
        NotVerifiable: timm itself has no such model.
    """
    if not importlib.import_module("timm").is_model(name):
        raise NotVerifiable(f"timm has no model {shown(name)}")


def _of_smp(source: Source, converted: Converted) -> Run:
    values = {key: value for key, value in _arguments(source.settings).items() if not key.startswith("_")}
    if not isinstance(encoder := values.get("encoder_name"), str):
        raise NotVerifiable("the checkpoint has no config.json from which segmentation_models_pytorch builds a model")
    if encoder.startswith(("tu-", "timm-")):
        _check_architecture(encoder.partition("-")[2])
    if not has_config(source.settings):  # hyperparameters of the user's own: tensors tell the rest
        config: Any = converted.model.config
        backbone = config.backbone_config
        sizes = {"img_size": backbone.image_size} if backbone.model_type == "swin_timm" else {}
        values = {
            "encoder_name": encoder,
            "classes": config.num_labels,
            "decoder_channels": config.hidden_size,
            **sizes,
        }
        values["in_channels"] = backbone.num_channels
    smp = importlib.import_module("segmentation_models_pytorch")
    try:
        model = smp.UPerNet(**{**values, "encoder_weights": None, "activation": None})  # the outputs are logits
    except Exception as error:  # its class depends on the values
        raise NotVerifiable(f"segmentation_models_pytorch does not build the model ({error})") from None
    prefix = wrapper_of(source.tensors) or ""
    tensors = {name.removeprefix(prefix): tensor for name, tensor in source.tensors.items()}
    model = _load(model, tensors, "segmentation_models_pytorch")

    def run(pixels: torch.Tensor) -> list[torch.Tensor]:
        output = model(pixels)
        return [output[0] if isinstance(output, tuple) else output]  # the second part is the classification head's

    return run


def _of_timm(source: Source, converted: Converted) -> Run:
    architecture = source.settings.get("architecture")
    if not isinstance(architecture, str):
        raise NotVerifiable("the checkpoint has no config.json that names timm's architecture")
    _check_architecture(architecture)
    timm = importlib.import_module("timm")
    config: Any = converted.model.config
    arguments = {"in_chans": getattr(config, "num_channels", 3), **_arguments(source.settings.get("model_args"))}
    if config.model_type == "swin":
        # Ours shifts windows in every second block and pads maps first: both are equal where windows fill all maps.
        side = config.window_size * config.patch_size * 2 ** (len(config.depths) - 1)
        arguments |= {"always_partition": True, "img_size": side}
    elif config.model_type == "swin_timm":
        arguments["img_size"] = config.image_size
    try:
        model = timm.create_model(architecture, pretrained=False, **{**arguments, "num_classes": 0})
    except Exception as error:  # its class depends on the values
        raise NotVerifiable(f"timm does not build {shown(architecture)} ({error})") from None
    model = _load(model, source.tensors, "timm")
    stages: Sequence[Any] = config.depths
    return lambda pixels: model.forward_intermediates(pixels, intermediates_only=True)[-len(stages) :]


LIBRARIES: Mapping[str, Foreign] = {
    "mmseg": Foreign("mmsegmentation", "mmseg", _of_mmseg),
    "smp": Foreign("segmentation_models_pytorch", "segmentation_models_pytorch", _of_smp),
    "timm": Foreign("timm", "timm", _of_timm),
}
"""The libraries by `Conversion.library`."""

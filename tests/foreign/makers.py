"""Tiny networks of the real libraries with random tensors, and the checkpoints that these libraries write of them.

Every parameter and every statistic of a norm is random, so that a tensor in the wrong place shows.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmpretrain.models  # noqa: F401
import mmseg.models  # noqa: F401
import numpy as np
import segmentation_models_pytorch as smp
import timm
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_state_dict
from mmengine.structures import PixelData
from mmseg.datasets import BaseSegDataset
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from timm.models import save_for_hf
from torch import nn

Maps = Callable[[torch.Tensor], "list[torch.Tensor]"]
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
COLOURS = [[i, 255 - i, i * i % 256] for i in range(256)]


@dataclass(frozen=True)
class Made:
    """A checkpoint, and the network of the library that made it.

    Attributes:
        path: the file or folder.
        network: the real network, float32, in evaluation mode, with the weights that its library reads from the file.
        maps: returns what is compared: logits of the image's size, or the feature maps of a backbone. Its argument has
            shape (N, C, H, W) and the network's dtype.
    """

    path: Path
    network: nn.Module
    maps: Maps


def randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and every statistic of a norm random values, of sizes that keep activations near 1."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))

    with torch.no_grad():
        for name, tensor in network.named_parameters():
            if tensor.ndim > 1 and not name.endswith(("table", "pos_embed", "token", "gamma")):
                fan_in = tensor[0].numel()
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * (3 / fan_in) ** 0.5)
            elif name.endswith(("weight", "gamma", "gamma_1", "gamma_2")):
                uniform(tensor, 0.5, 1.5)
            else:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
        for name, tensor in network.named_buffers():
            if name.endswith("running_mean"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
            elif name.endswith("running_var"):
                uniform(tensor, 0.5, 2)
            elif name.endswith("num_batches_tracked"):
                tensor.fill_(int(torch.randint(1, 9999, (), generator=generator)))
    return network.eval()


# ------------------------------------------------------------------------------------------------------- mmsegmentation


def settings_of(
    backbone: Mapping[str, Any],
    channels: Sequence[int],
    *,
    neck: Mapping[str, Any] | None = None,
    classes: int = 5,
    auxiliary: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    head: Mapping[str, Any] | None = None,
    norm: str = "SyncBN",
    align_corners: bool = False,
    preprocessor: Mapping[str, Any] | None = None,
    **model: Any,
) -> dict[str, Any]:
    """Return the settings of an `EncoderDecoder` with a UPerHead, as a configuration file of mmsegmentation has them.

    Args:
        backbone: the settings of the backbone.
        channels: the channels of the maps that the head reads.
        neck: the settings of the neck.
        classes: the number of classes.
        auxiliary: changes of the FCNHead's settings, one for each FCNHead; {} for the usual head; None for no head.
        head: changes of the UPerHead's settings.
        norm: the type of the heads' norms.
        align_corners: of both heads.
        preprocessor: changes of the `data_preprocessor`.
        **model: more settings of the model.
    """
    norm_cfg = {"type": norm, "requires_grad": True}
    common = {
        "num_classes": classes,
        "norm_cfg": norm_cfg,
        "align_corners": align_corners,
        "loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
        "dropout_ratio": 0.1,
    }
    upper = {
        "type": "UPerHead",
        "in_channels": list(channels),
        "in_index": [0, 1, 2, 3],
        "pool_scales": (1, 2, 3, 6),
        "channels": 8,
    }
    small = {"type": "FCNHead", "in_index": 2, "channels": 6, "num_convs": 1, "concat_input": False}
    heads: list[dict[str, Any]] = []
    for changes in [auxiliary] if isinstance(auxiliary, Mapping) else auxiliary or []:
        level = changes.get("in_index", 2)
        heads.append({**small, **common, "in_channels": channels[level], **changes})
    settings: dict[str, Any] = {
        "type": "EncoderDecoder",
        "data_preprocessor": {
            "type": "SegDataPreProcessor",
            "mean": MEAN,
            "std": STD,
            "bgr_to_rgb": True,
            "pad_val": 0,
            "seg_pad_val": 255,
            "size": (64, 64),
            **(preprocessor or {}),
        },
        "pretrained": None,
        "backbone": dict(backbone),
        "decode_head": {**upper, **common, **(head or {})},
        "train_cfg": {},
        "test_cfg": {"mode": "whole"},
        **model,
    }
    if neck is not None:
        settings["neck"] = dict(neck)
    if heads:
        settings["auxiliary_head"] = heads[0] if isinstance(auxiliary, Mapping) else heads
    return settings


def build_mmseg(settings: Mapping[str, Any], seed: int = 0) -> nn.Module:
    """Build an mmsegmentation network from the settings of its model."""
    init_default_scope("mmseg")
    return randomise(MODELS.build(copy.deepcopy(dict(settings))), seed)


def logits_of_mmseg(network: Any) -> Maps:
    """Return a function from an image to mmsegmentation's logits of the image's size."""
    return lambda image: [network.encode_decode(image, [{"img_shape": image.shape[2:], "pad_shape": image.shape[2:]}])]


def text_of(settings: Mapping[str, Any], **more: Any) -> str:
    """Return the text of a configuration file of mmsegmentation 1.x with these settings of the model."""
    crop = settings["data_preprocessor"].get("size", (64, 64))
    test_pipeline = [
        {"type": "LoadImageFromFile"},
        {"type": "Resize", "scale": (256, 64), "keep_ratio": True},
        {"type": "LoadAnnotations", "reduce_zero_label": True},
        {"type": "PackSegInputs"},
    ]
    values = {"crop_size": crop, "data_preprocessor": settings["data_preprocessor"], "model": settings}
    return Config(copy.deepcopy({**values, "test_pipeline": test_pipeline, **more})).pretty_text


@DATASETS.register_module(force=True)
class Noise(BaseSegDataset):
    """Two random images and label maps, in place of a dataset's files."""

    def load_data_list(self) -> list[dict[str, Any]]:
        return [{"seed": seed} for seed in range(2)]

    def prepare_data(self, idx: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(idx)
        sample = SegDataSample(metainfo={"img_shape": (64, 64), "pad_shape": (64, 64), "ori_shape": (64, 64)})
        labels = torch.randint(len(self.metainfo["classes"]), (1, 64, 64), generator=generator)
        sample.gt_sem_seg = PixelData(data=labels)
        image = torch.randint(256, (self.metainfo["channels"], 64, 64), dtype=torch.uint8, generator=generator)
        return {"inputs": image, "data_samples": sample}


def train_mmseg(settings: Mapping[str, Any], folder: Path, *, ema: bool = False, classes: int = 5) -> Made:
    """Train a network for two steps with mmengine's Runner, and return the checkpoint that its hook saves."""
    network = build_mmseg(settings)
    metainfo = {
        "classes": [f"thing {i}" for i in range(classes)],
        "palette": COLOURS[:classes],
        "channels": len(settings["data_preprocessor"]["mean"]),
    }
    configuration = Config(
        {
            "model": copy.deepcopy(dict(settings)),
            "default_scope": "mmseg",
            "work_dir": str(folder / "runner"),
            "experiment_name": f"{folder.name}-{ema}",
            "train_dataloader": {
                "batch_size": 2,
                "num_workers": 0,
                "sampler": {"type": "InfiniteSampler"},
                "dataset": {"type": "Noise", "metainfo": metainfo, "lazy_init": False},
            },
            "train_cfg": {"type": "IterBasedTrainLoop", "max_iters": 2, "val_interval": 9},
            "optim_wrapper": {"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 0.01}},
            "param_scheduler": [{"type": "PolyLR", "power": 1.0, "by_epoch": False, "begin": 0, "end": 2}],
            "default_hooks": {
                "checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": 2},
            },
            "custom_hooks": [{"type": "EMAHook"}] if ema else [],
            "test_pipeline": [{"type": "Resize", "scale": (256, 64), "keep_ratio": True}],
            "log_level": "ERROR",
        }
    )
    runner = Runner.from_cfg(configuration)
    runner.model.load_state_dict(network.state_dict())
    runner.train()
    path = folder / "runner" / "iter_2.pth"
    load_state_dict(network, torch.load(path, weights_only=False)["state_dict"], strict=True)
    return Made(path, network.eval(), logits_of_mmseg(network))


def save_mmseg(
    settings: Mapping[str, Any],
    folder: Path,
    *,
    style: str = "1.x",
    classes: int = 5,
    authors: tuple[nn.Module, Mapping[str, Any]] | None = None,
) -> Made:
    """Save a network as mmsegmentation does.

    Args:
        settings: of the model.
        folder: where to write.
        style: "1.x", "0.x", "published" (tensors and meta, no optimizer, as in the model zoo), "bare" (a state dict
            alone), "wrapped" (`module.` before each name), "half" (float16), "ema" (`state_dict` and `ema_state_dict`),
            "safetensors".
        classes: the number of classes.
        authors: a backbone of the authors' repositories in place of mmsegmentation's, and its settings.
    """
    network = build_mmseg(settings)
    if authors is not None:
        network.backbone = randomise(authors[0])
        settings = {**settings, "backbone": authors[1]}
    names, palette = tuple(f"thing {i}" for i in range(classes)), COLOURS[:classes]
    state = network.state_dict()
    if style == "half":
        state = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
        load_state_dict(network, state, strict=True)
    if style == "wrapped":
        state = {f"module.{name}": value for name, value in state.items()}
    path = folder / "checkpoint.pth"
    optimizer = torch.optim.AdamW(network.parameters())
    meta: dict[str, Any] = {
        "seed": np.int64(7),
        "epoch": 0,
        "iter": 160000,
        "experiment_name": "upernet",
        "time": "20230201_101010",
        "mmengine_version": "0.10.7",
        "cfg": text_of(settings),
        "dataset_meta": {"classes": names, "palette": palette, "reduce_zero_label": True, "label_map": None},
    }
    if style == "0.x":
        older = {name: value for name, value in settings.items() if name != "data_preprocessor"}
        norm = {"mean": MEAN, "std": STD, "to_rgb": settings["data_preprocessor"]["bgr_to_rgb"]}
        loading = [{"type": "LoadImageFromFile"}, {"type": "MultiScaleFlipAug", "img_scale": (256, 64), "flip": False}]
        values = {"model": older, "img_norm_cfg": norm, "crop_size": (64, 64), "test_pipeline": loading}
        meta = {
            "env_info": "sys.platform: linux\nPython: 3.7.10",
            "mmseg_version": "0.30.0+7c2ad2d",
            "config": Config(copy.deepcopy(values)).pretty_text.replace("mmpretrain.", "mmcls."),
            "CLASSES": names,
            "PALETTE": palette,
            "seed": 0,
            "epoch": 127,
            "iter": 160000,
            "mmcv_version": "1.7.0",
            "time": "Mon Feb 21 21:53:46 2022",
            "hook_msgs": {"last_ckpt": "work_dirs/iter_144000.pth"},
        }
    if style == "safetensors":
        from safetensors.torch import save_file

        path = folder / "checkpoint.safetensors"
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    elif style == "bare":
        torch.save(state, path)
    elif style == "published":
        torch.save({"meta": meta, "state_dict": state}, path)
    else:
        torch.save({"meta": meta, "state_dict": state, "optimizer": optimizer.state_dict()}, path)
    return Made(path, network, logits_of_mmseg(network))


# ------------------------------------------------------------------------------------------ segmentation_models_pytorch


def save_smp(folder: Path, encoder: str, *, style: str = "folder", **arguments: Any) -> Made:
    """Save an smp.UPerNet: "folder" by `save_pretrained`, "state_dict" by `torch.save`."""
    arguments = {"encoder_weights": None, "decoder_channels": 8, "classes": 5, **arguments}
    network = randomise(smp.UPerNet(encoder, **arguments))
    path = folder / "smp"
    if style == "folder":
        network.save_pretrained(path)
    else:
        path = folder / "smp.pth"
        torch.save(network.state_dict(), path)
    return Made(path, network, lambda image: [network(image)])


# ----------------------------------------------------------------------------------------------------------------- timm


def save_timm(folder: Path, architecture: str, *, style: str = "classifier", **arguments: Any) -> Made:
    """Save a backbone of timm.

    Args:
        folder: where to write.
        architecture: timm's name.
        style: "classifier" or "features_only" for a state dict's names, "folder" for a folder of the Hub.
        **arguments: of `timm.create_model`.
    """
    network = randomise(timm.create_model(architecture, **{"num_classes": 5, **arguments}))
    path = folder / f"{style}.pth"
    if style == "folder":
        path = folder / "timm"
        save_for_hf(network, path, model_args=arguments, safe_serialization=True)
    elif style == "features_only":
        # timm wraps the same modules and gives them other names.
        names = timm.create_model(architecture, features_only=True, **arguments).state_dict()
        state = network.state_dict()
        torch.save({name: state[in_classifier(name, state)] for name in names}, path)
    else:
        torch.save(network.state_dict(), path)
    return Made(path, network, lambda image: network.forward_intermediates(image, intermediates_only=True)[-4:])


def in_classifier(name: str, state: Mapping[str, torch.Tensor]) -> str:
    """Return the name that a tensor of a features_only network has in the classifier: stages.0.x for stages_0.x."""
    first, _, rest = name.partition(".")
    for candidate in (name, f"{first.replace('_', '.')}.{rest}"):
        if candidate in state:
            return candidate
    raise KeyError(name)


# ---------------------------------------------------------------------------------------------------------- the authors


def save_authors(folder: Path, network: nn.Module, maps: Maps) -> Made:
    """Save a classifier as the authors' scripts do: the weights under "model"."""
    randomise(network)
    path = folder / "classifier.pth"
    torch.save({"model": network.state_dict()}, path)
    return Made(path, network, maps)


def save_old_swin(folder: Path, **arguments: Any) -> Made:
    """Save a Swin of timm 0.6.13, which has the names and the order of channels of Swin's own repository."""
    later = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "timm"}
    for name in later:
        del sys.modules[name]
    sys.path.insert(0, str(Path(sys.prefix) / "timm-0.6.13"))
    try:
        network = importlib.import_module("timm.models.swin_transformer").SwinTransformer(**arguments)
    finally:
        del sys.path[0]
        for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
            del sys.modules[name]
        sys.modules.update(later)

    def maps(image: torch.Tensor) -> list[torch.Tensor]:
        found, x = [], network.patch_embed(image)
        for layer in network.layers:
            x = layer.blocks(x)
            height, width = layer.input_resolution
            found.append(x.transpose(1, 2).unflatten(2, (height, width)))
            x = x if layer.downsample is None else layer.downsample(x)
        return found

    return save_authors(folder, network, maps)

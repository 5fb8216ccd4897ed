"""`fastuper convert` on checkpoints that the real libraries made: the logits are the library's, every tensor has a row.

Each line of a table is a checkpoint. The largest relative differences are printed at the end of the run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner, Result

from fastuper import UperNetConfig, UperNetForSemanticSegmentation, UperNetImageProcessor
from fastuper.cli import app
from tests.foreign.makers import (
    Made,
    save_authors,
    save_mmseg,
    save_old_swin,
    save_smp,
    save_timm,
    settings_of,
    train_mmseg,
)
from tests.parity import foreign_authors

LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}
ODD = ((64, 64), (45, 71), (97, 33))
"""Sizes, (height, width), of images; libraries that take multiples of 32 alone have other sizes."""


Maker = Callable[[Path], Made]
"""Writes a checkpoint into a folder."""


@dataclass(frozen=True)
class Case:
    """A checkpoint and what to expect of its conversion.

    Attributes:
        make: writes the checkpoint into a folder.
        sizes: (height, width) of the images to compare.
        transformers: whether Transformers loads the result too.
        options: options of the conversion, by their names in `fastuper.weights.conversion.OPTIONS`.
        weights_key: of the command.
        channels: of the images.
    """

    make: Maker
    sizes: Sequence[tuple[int, int]] = ODD
    transformers: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    weights_key: str | None = None
    channels: int = 3


def mmseg(backbone: Mapping[str, Any], channels: Sequence[int], style: str = "1.x", **more: Any) -> Maker:
    settings = settings_of(backbone, channels, **more)
    return lambda folder: save_mmseg(settings, folder, style=style, classes=more.get("classes", 5))


def trained(backbone: Mapping[str, Any], channels: Sequence[int], ema: bool = False, **more: Any) -> Maker:
    settings = settings_of(backbone, channels, **more)
    return lambda folder: train_mmseg(settings, folder, ema=ema)


def authors_swin(folder: Path) -> Made:
    """The UPerNet of Swin's authors: mmsegmentation's heads over their backbone."""
    own = foreign_authors.SwinBackbone(dim=8, depths=(1, 2, 1, 1), heads=(1, 2, 2, 4), window=3)
    values = {"type": "SwinTransformer", "embed_dim": 8, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 2, 4]}
    values |= {"window_size": 3, "mlp_ratio": 4.0, "qkv_bias": True, "qk_scale": None, "ape": False}
    settings = settings_of(SWIN, SWIN_CHANNELS, auxiliary={})
    return save_mmseg(settings, folder, style="0.x", authors=(own, values))


def authors_convnext(folder: Path) -> Made:
    """The UPerNet of ConvNeXt's authors: mmsegmentation's heads over their backbone."""
    own = foreign_authors.ConvNext(None, depths=(1, 1, 2, 1), dims=CONVNEXT_CHANNELS)
    values = {"type": "ConvNeXt", "in_chans": 3, "depths": [1, 1, 2, 1], "dims": list(CONVNEXT_CHANNELS)}
    settings = settings_of(CONVNEXT, CONVNEXT_CHANNELS, auxiliary={})
    return save_mmseg(settings, folder, style="0.x", authors=(own, values))


def convnext_classifier(folder: Path) -> Made:
    network = foreign_authors.ConvNext(5)
    return save_authors(folder, network, network.features)


def old_swin(folder: Path) -> Made:
    return save_old_swin(
        folder, img_size=128, embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), window_size=2, num_classes=5
    )


def smp(encoder: str, style: str = "folder", **arguments: Any) -> Maker:
    return lambda folder: save_smp(folder, encoder, style=style, **arguments)


def timm(architecture: str, style: str = "classifier", **arguments: Any) -> Maker:
    return lambda folder: save_timm(folder, architecture, style=style, **arguments)


SWIN = {
    "type": "SwinTransformer",
    "embed_dims": 8,
    "depths": [1, 2, 1, 1],
    "num_heads": [1, 2, 2, 4],
    "window_size": 3,
    "qkv_bias": True,
    "patch_norm": True,
}
SWIN_CHANNELS = (8, 16, 32, 64)
CONVNEXT = {
    "type": "mmpretrain.ConvNeXt",
    "arch": {"depths": [1, 1, 2, 1], "channels": [8, 12, 16, 20]},
    "out_indices": [0, 1, 2, 3],
    "layer_scale_init_value": 1.0,
    "gap_before_final_norm": False,
}
CONVNEXT_CHANNELS = (8, 12, 16, 20)
RESNET = {
    "type": "ResNet",
    "depth": 50,
    "stem_channels": 8,
    "base_channels": 4,
    "num_stages": 4,
    "out_indices": (0, 1, 2, 3),
    "norm_cfg": {"type": "SyncBN", "requires_grad": True},
    "style": "pytorch",
    "contract_dilation": True,
}
RESNET_CHANNELS = (16, 32, 64, 128)
BEIT = {
    "type": "BEiT",
    "img_size": (64, 64),
    "patch_size": 16,
    "embed_dims": 16,
    "num_layers": 4,
    "num_heads": 4,
    "mlp_ratio": 2,
    "out_indices": (0, 1, 2, 3),
    "qv_bias": True,
    "init_values": 1.0,
}
FEATURE2PYRAMID = {"type": "Feature2Pyramid", "embed_dim": 16, "rescales": [4, 2, 1, 0.5]}
VIT = {
    "type": "VisionTransformer",
    "img_size": (64, 64),
    "patch_size": 16,
    "embed_dims": 16,
    "num_layers": 4,
    "num_heads": 4,
    "mlp_ratio": 2,
    "out_indices": (0, 1, 2, 3),
    "qkv_bias": True,
    "final_norm": True,
    "with_cls_token": True,
    "norm_cfg": {"type": "LN", "eps": 1e-6},
    "interpolate_mode": "bicubic",
}
MULTILEVEL = {"type": "MultiLevelNeck", "in_channels": [16, 16, 16, 16], "out_channels": 12, "scales": [4, 2, 1, 0.5]}
TIMM_SWIN = {"embed_dim": 8, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 2, 4]}
# Whole windows, and more than one in each map: then timm shifts windows as the authors' UPerNets do.
MANY_WINDOWS = {**TIMM_SWIN, "window_size": 2, "img_size": 128}
TIMM_CONVNEXT = {"depths": [1, 1, 2, 1], "dims": [8, 12, 16, 20]}

UPERNETS = {
    "mmseg Swin, Runner": Case(trained(SWIN, SWIN_CHANNELS, auxiliary={})),
    "mmseg Swin, Runner with EMAHook": Case(trained(SWIN, SWIN_CHANNELS, auxiliary={}, ema=True)),
    "mmseg Swin, 1.x": Case(mmseg(SWIN, SWIN_CHANNELS, auxiliary={})),
    "mmseg Swin, 0.x": Case(mmseg(SWIN, SWIN_CHANNELS, "0.x", auxiliary={})),
    "mmseg Swin, published": Case(mmseg(SWIN, SWIN_CHANNELS, "published", auxiliary={})),
    "mmseg Swin, module.": Case(mmseg(SWIN, SWIN_CHANNELS, "wrapped", auxiliary={})),
    "mmseg Swin, float16": Case(mmseg(SWIN, SWIN_CHANNELS, "half", auxiliary={})),
    "mmseg Swin, state dict": Case(mmseg(SWIN, SWIN_CHANNELS, "bare", auxiliary={})),
    "mmseg Swin, safetensors": Case(mmseg(SWIN, SWIN_CHANNELS, "safetensors", auxiliary={})),
    "mmseg Swin, no auxiliary head": Case(mmseg(SWIN, SWIN_CHANNELS)),
    "mmseg Swin, window 7, 2 classes": Case(mmseg({**SWIN, "window_size": 7}, SWIN_CHANNELS, auxiliary={}, classes=2)),
    "mmseg Swin, 4 channels, no biases": Case(
        mmseg(
            {**SWIN, "in_channels": 4, "qkv_bias": False},
            SWIN_CHANNELS,
            auxiliary={"num_convs": 2},
            preprocessor={"mean": [1.0, 2.0, 3.0, 4.0], "std": [5.0, 6.0, 7.0, 8.0], "bgr_to_rgb": False},
        ),
        channels=4,
    ),
    "mmseg Swin, align_corners": Case(mmseg(SWIN, SWIN_CHANNELS, auxiliary={}, align_corners=True), transformers=False),
    "mmseg Swin, pool_scales 1 2, 1 class": Case(mmseg(SWIN, SWIN_CHANNELS, head={"pool_scales": (1, 2)}, classes=1)),
    "mmseg ConvNeXt, Runner": Case(trained(CONVNEXT, CONVNEXT_CHANNELS, auxiliary={})),
    "mmseg ConvNeXt, 0.x": Case(mmseg(CONVNEXT, CONVNEXT_CHANNELS, "0.x", auxiliary={})),
    "mmseg ConvNeXt, no layer scale": Case(
        mmseg({**CONVNEXT, "layer_scale_init_value": 0.0}, CONVNEXT_CHANNELS, auxiliary={}), transformers=True
    ),
    "mmseg ResNet-18": Case(mmseg({**RESNET, "depth": 18, "stem_channels": 4}, (4, 8, 16, 32), auxiliary={})),
    "mmseg ResNet-50": Case(mmseg({**RESNET, "stem_channels": 4}, RESNET_CHANNELS, auxiliary={})),
    "mmseg ResNet-50, caffe": Case(
        mmseg({**RESNET, "stem_channels": 4, "style": "caffe"}, RESNET_CHANNELS, auxiliary={}), transformers=True
    ),
    "mmseg ResNetV1c-50, Runner": Case(
        trained({**RESNET, "type": "ResNetV1c"}, RESNET_CHANNELS, auxiliary={}), transformers=False
    ),
    "mmseg ResNetV1c-50, dilated": Case(
        mmseg(
            {**RESNET, "type": "ResNetV1c", "strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4)},
            RESNET_CHANNELS,
            auxiliary={},
        ),
        transformers=False,
    ),
    "mmseg ResNetV1d-50": Case(
        mmseg({**RESNET, "type": "ResNetV1d"}, RESNET_CHANNELS, auxiliary={}), transformers=False
    ),
    "mmseg BEiT + Feature2Pyramid, Runner": Case(
        trained(BEIT, (16, 16, 16, 16), neck=FEATURE2PYRAMID, auxiliary={}),
        sizes=((64, 64), (79, 70)),
        transformers=False,
    ),
    "mmseg ViT + MultiLevelNeck, Runner": Case(
        trained(VIT, (12, 12, 12, 12), neck=MULTILEVEL, auxiliary={"in_index": 3}),
        sizes=((64, 64), (45, 71), (97, 33), (32, 128)),
        transformers=False,
    ),
    "mmseg DeiT + MultiLevelNeck": Case(
        mmseg({**VIT, "final_norm": False}, (12, 12, 12, 12), neck=MULTILEVEL, auxiliary={"in_index": 3}),
        sizes=((64, 64), (45, 71), (97, 33), (32, 128)),
        transformers=False,
    ),
    "Swin authors' UPerNet": Case(authors_swin),
    "mmseg ConvNeXt V2": Case(
        mmseg({**CONVNEXT, "use_grn": True, "layer_scale_init_value": 0.0}, CONVNEXT_CHANNELS, auxiliary={}),
        transformers=True,
    ),
    "ConvNeXt authors' UPerNet": Case(authors_convnext),
    "smp ResNet-18, folder": Case(smp("resnet18"), sizes=((64, 64), (96, 32)), transformers=False),
    "smp ResNet-50, state dict": Case(smp("resnet50", "state_dict"), sizes=((64, 96),), transformers=False),
    "smp ConvNeXt V2, folder": Case(
        smp("tu-convnextv2_atto", **TIMM_CONVNEXT), sizes=((64, 64), (96, 32)), transformers=False
    ),
    "smp ConvNeXt, folder": Case(
        smp("tu-convnext_atto", **TIMM_CONVNEXT), sizes=((64, 64), (96, 32)), transformers=False
    ),
    "smp Swin, folder": Case(
        smp("tu-swin_tiny_patch4_window7_224", **TIMM_SWIN, img_size=64), sizes=((64, 64),), transformers=False
    ),
}

BACKBONES = {
    "Swin authors' classifier": Case(
        old_swin,
        sizes=((128, 128),),
    ),
    "ConvNeXt authors' classifier": Case(convnext_classifier),
    "timm ResNet-18": Case(timm("resnet18")),
    "timm ResNet-50-D": Case(timm("resnet50d"), transformers=False),
    "timm ConvNeXt": Case(timm("convnext_atto", **TIMM_CONVNEXT)),
    "timm ConvNeXt V2": Case(timm("convnextv2_atto", **TIMM_CONVNEXT)),
    "timm ConvNeXt, features_only": Case(timm("convnext_atto", "features_only", **TIMM_CONVNEXT)),
    "timm ConvNeXt, Hub folder": Case(timm("convnext_atto", "folder", **TIMM_CONVNEXT)),
    "timm ConvNeXt, 21841 classes": Case(timm("convnext_atto", **TIMM_CONVNEXT, num_classes=21841)),
    "timm Swin": Case(timm("swin_tiny_patch4_window7_224", **MANY_WINDOWS), sizes=((128, 128),)),
    "timm Swin, features_only": Case(
        timm("swin_tiny_patch4_window7_224", "features_only", **MANY_WINDOWS), sizes=((128, 128),)
    ),
    "timm Swin, Hub folder": Case(timm("swin_tiny_patch4_window7_224", "folder", **MANY_WINDOWS), sizes=((128, 128),)),
}


def convert(path: Path, output: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["convert", str(path), str(output), *arguments])


def arguments_of(case: Case) -> list[str]:
    """Return the case's options as the command takes them: --num-heads 1,2,2,4."""
    found = [] if case.weights_key is None else ["--weights-key", case.weights_key]
    for name, value in case.options.items():
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        found += [f"--{name.replace('_', '-')}", text]
    return found


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest distance of a wanted value from its channel's mean."""
    assert found.shape == wanted.shape
    spread = (wanted - wanted.mean((0, 2, 3), keepdim=True)).abs().max()
    return ((found - wanted).abs().max() / spread).item()


def images(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, case.channels, *size, generator=generator).to(dtype) for size in case.sizes]


def largest(
    case: Case, made: Made, maps: Callable[[torch.Tensor], Sequence[torch.Tensor]], dtype: torch.dtype
) -> float:
    """Return the largest relative difference over all sizes; `maps` are those of the converted network."""
    worst = 0.0
    with torch.no_grad():
        for image in images(case, dtype):
            pairs = list(zip(maps(image), made.maps(image), strict=True))
            worst = max(worst, *(difference(found, wanted) for found, wanted in pairs))
    return worst


def check_rows(made: Made, report: Path) -> int:
    """Assert that the report has a row for each tensor of the checkpoint; return the number of its tensors."""
    rows = json.loads(report.read_text(encoding="utf-8"))["tensors"]
    names = tensors_in(made.path)
    told = [row["source"] for row in rows]
    assert sorted(told) == sorted(name.removeprefix("module.") for name in names)
    assert all(row["targets"] or row["note"] for row in rows)
    return len(names)


def tensors_in(path: Path) -> list[str]:
    """Return the names of the tensors of a checkpoint's state dict."""
    if path.is_dir():
        (path,) = path.glob("*.safetensors")
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return list(file.keys())
    content = torch.load(path, map_location="cpu", weights_only=False)
    return list(content.get("state_dict", content.get("model", content)))


@pytest.mark.parametrize("name", UPERNETS)
def test_upernet(name: str, tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    case = UPERNETS[name]
    made = case.make(tmp_path)
    output, report = tmp_path / "converted", tmp_path / "report.json"
    result = convert(made.path, output, "--report", str(report), *arguments_of(case))
    assert result.exit_code == 0, result.output
    tensors = check_rows(made, report)

    model = UperNetForSemanticSegmentation.from_pretrained(output, dtype=torch.float32)
    again = UperNetForSemanticSegmentation.from_pretrained(
        made.path, dtype=torch.float32, source_options=dict(case.options)
    )
    assert values_of(again) == values_of(model)
    state = model.state_dict()
    assert state.keys() == again.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in again.state_dict().items())
    processors = [UperNetImageProcessor.from_pretrained(place).to_dict() for place in (output, made.path)]
    assert processors[0] == processors[1]

    worst = {}
    theirs = in_transformers(output, case.transformers)
    for dtype, limit in LIMITS.items():
        made.network.to(dtype)
        worst[dtype] = largest(case, made, lambda image: [model.to(image.dtype)(image).logits], dtype)
        if theirs is not None:
            worst[dtype] = max(
                worst[dtype], largest(case, made, lambda image: [theirs.to(image.dtype)(image).logits], dtype)
            )
        assert worst[dtype] < limit
    record(record_property, name, case, tensors, worst, result.output)


def values_of(model: UperNetForSemanticSegmentation) -> dict[str, Any]:
    """Return a model's configuration, without what saving and loading write into it."""
    return {**model.config.to_dict(), "_name_or_path": "", "architectures": None, "dtype": None}


def in_transformers(folder: Path, expected: bool) -> nn.Module | None:
    """Return the model as Transformers loads it with no tensor missing; or None, if it refuses as expected."""
    if not expected:
        with pytest.raises((ValueError, KeyError, OSError)):
            transformers.AutoModelForSemanticSegmentation.from_pretrained(folder)
        return None
    model, info = transformers.UperNetForSemanticSegmentation.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def record(
    record_property: Callable[[str, Any], None],
    name: str,
    case: Case,
    tensors: int,
    worst: Mapping[torch.dtype, float],
    output: str = "",
) -> None:
    """Record a line of the table that the run prints at its end; `output` is the command's."""
    sizes = " ".join(f"{height}x{width}" for height, width in case.sizes)
    figures = [f"{worst[dtype]:.1e}" if dtype in worst else "-" for dtype in LIMITS]
    places = "fastuper, Transformers" if case.transformers else "fastuper"
    verified = "-" if not output else "yes" if "\nverified: " in output else "no"
    record_property("difference", (name, str(tensors), sizes, *figures, places, verified))


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone(name: str, tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    case = BACKBONES[name]
    made = case.make(tmp_path)
    output, report = tmp_path / "converted", tmp_path / "report.json"
    result = convert(made.path, output, "--report", str(report), *arguments_of(case))
    assert result.exit_code == 0, result.output
    tensors = check_rows(made, report)

    config = UperNetConfig(backbone=str(output), use_pretrained_backbone=True, hidden_size=8, auxiliary_channels=8)
    backbones = [UperNetForSemanticSegmentation(config).eval().backbone]
    if case.transformers:
        # AutoBackbone of Transformers 5.24 asks the Hub, even for a folder.
        values = json.loads((output / "config.json").read_text(encoding="utf-8"))
        (name_there,) = values["architectures"]
        backbones.append(getattr(transformers, name_there).from_pretrained(output).eval())
    worst = {}
    for dtype, limit in LIMITS.items():
        made.network.to(dtype)
        norms = with_norms(made, output)
        worst[dtype] = max(
            largest(case, norms, lambda image, own=own: own.to(image.dtype)(image).feature_maps, dtype)
            for own in backbones
        )
        assert worst[dtype] < limit
    record(record_property, name, case, tensors, worst, result.output)


def with_norms(made: Made, folder: Path) -> Made:
    """Return the maps after the norms that our ConvNeXt and Swin have behind each stage, with their initial values."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "resnet" in values["model_type"]:
        return made
    eps = 1e-6 if values["model_type"].startswith("convnext") else 1e-5

    def maps(image: torch.Tensor) -> list[torch.Tensor]:
        return [
            F.layer_norm(found.permute(0, 2, 3, 1), found.shape[1:2], eps=eps).permute(0, 3, 1, 2)
            for found in made.maps(image)
        ]

    return Made(made.path, made.network, maps)

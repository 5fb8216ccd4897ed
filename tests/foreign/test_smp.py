"""smp's own UPerNets over all encoders that can be converted, and those that are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from typer.testing import CliRunner

from fastuper import UperNetForSemanticSegmentation
from fastuper.cli import app
from fastuper.weights.errors import CheckpointError
from tests.foreign.makers import randomise, save_smp
from tests.foreign.test_conversions import LIMITS, Case, largest, record, tensors_in

SQUARES = ((64, 64), (96, 160))
SWIN = "tu-swin_tiny_patch4_window7_224"
SMALL_SWIN: dict[str, Any] = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4)}
SMALL_CONVNEXT: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24)}

# The encoder, its arguments, the sizes of images. timm's Swin takes images of the size it was built for.
MODELS: dict[str, tuple[str, dict[str, Any], tuple[tuple[int, int], ...]]] = {
    "ResNet-18": ("resnet18", {}, SQUARES),
    "ResNet-34, 4 channels, 1 class": ("resnet34", {"in_channels": 4, "classes": 1}, SQUARES),
    "ResNet-50, 1 channel": ("resnet50", {"in_channels": 1}, SQUARES),
    "ResNet-50, classification head": ("resnet50", {"aux_params": {"classes": 3}}, ((64, 64),)),
    "timm's ResNet-18, 2 classes": ("tu-resnet18", {"classes": 2}, SQUARES),
    "timm's ResNet-26-D, 4 channels": ("tu-resnet26d", {"in_channels": 4}, SQUARES),
    "timm's ResNet-50-D": ("tu-resnet50d", {"layers": (1, 1, 1, 1)}, SQUARES),
    "timm's ConvNeXt, conv_mlp": ("tu-convnext_atto", {}, SQUARES),
    "timm's ConvNeXt, 4 channels": ("tu-convnext_tiny", {"in_channels": 4, **SMALL_CONVNEXT}, SQUARES),
    "timm's Swin at 64": (SWIN, {"img_size": 64, **SMALL_SWIN}, ((64, 64),)),
    "timm's Swin at 224, 1 channel": (SWIN, {"in_channels": 1, **SMALL_SWIN}, ((224, 224),)),
    "timm's Swin at 96 x 128": (SWIN, {"img_size": (96, 128), **SMALL_SWIN}, ((96, 128),)),
    "timm's Swin of any size": (SWIN, {"img_size": 96, "strict_img_size": False, **SMALL_SWIN}, SQUARES),
    "timm's Swin, windows of 3": (SWIN, {"img_size": 96, "window_size": 3, **SMALL_SWIN}, ((96, 96),)),
    "timm's Swin, always shifted": (SWIN, {"img_size": 64, "always_partition": True, **SMALL_SWIN}, ((64, 64),)),
    "timm's Swin S3": ("tu-swin_s3_tiny_224", SMALL_SWIN, ((224, 224),)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("style", ["folder", "state_dict"])
def test_logits(name: str, style: str, tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    encoder, arguments, sizes = MODELS[name]
    made = save_smp(tmp_path, encoder, style=style, **arguments)
    options: dict[str, Any] = {}
    if style == "state_dict" and isinstance(arguments.get("img_size"), tuple):
        options["image_size"] = list(arguments["img_size"])
    if style == "state_dict" and "always_partition" in arguments:
        options["image_size"] = [512, 512]  # all maps are then larger than the windows, which always shift
    ours = UperNetForSemanticSegmentation.from_pretrained(made.path, dtype=torch.float64, source_options=options).eval()
    case = Case(lambda _: made, sizes=sizes, transformers=False, channels=arguments.get("in_channels", 3))

    def theirs(image: torch.Tensor) -> list[torch.Tensor]:
        output = made.network(image)
        return [output[0] if isinstance(output, tuple) else output]

    made = type(made)(made.path, made.network, theirs)
    worst = {}
    for dtype, limit in LIMITS.items():
        made.network.to(dtype)
        worst[dtype] = largest(case, made, lambda image: [ours.to(image.dtype)(image).logits], dtype)
        assert worst[dtype] < limit
    record(record_property, f"smp {name}, {style}", case, len(tensors_in(made.path)), worst)


def test_verify_compares_logits_before_the_activation(tmp_path: Path) -> None:
    made = save_smp(tmp_path, "resnet18", activation="sigmoid", aux_params={"classes": 2})
    result = CliRunner().invoke(app, ["convert", str(made.path), str(tmp_path / "out"), "--verify"])
    assert result.exit_code == 0, result.output
    assert "verified" in result.output
    assert "before the activation" in " ".join(result.output.split())


REFUSED = {
    "depth": ("resnet18", {"encoder_depth": 4}, "encoder_depth=4"),
    "no norm": ("resnet18", {"decoder_use_norm": False}, r"decoder_use_norm=False|\.bias"),
    "layer norm": ("resnet18", {"decoder_use_norm": "layernorm"}, "decoder_use_norm='layernorm'|BatchNorm"),
    "instance norm": (
        "resnet18",
        {"decoder_use_norm": {"type": "instancenorm", "affine": True}},
        "decoder_use_norm=.*instancenorm|would have no BatchNorm",
    ),
    "ResNeXt": ("resnext50_32x4d", {}, "groups|ResNeXt's"),
    "SENet": ("se_resnet50", {}, "se_resnet50|encoder"),
    "EfficientNet": ("efficientnet-b0", {}, "efficientnet-b0|an encoder with"),
    "MiT": ("mit_b0", {}, "mit_b0|an encoder with"),
    "Swin V2": ("tu-swinv2_tiny_window8_256", {"img_size": 64}, "Swin V2"),
    "SE-ResNet of timm": ("tu-seresnet18", {}, "SE, ECA"),
    "Wide ResNet": ("tu-wide_resnet50_2", {}, "[Ww]ide"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("style", ["folder", "state_dict"])
def test_refused_by_name(name: str, style: str, tmp_path: Path) -> None:
    encoder, arguments, message = REFUSED[name]
    made = save_smp(tmp_path, encoder, style=style, **arguments)
    if name == "depth" and style == "state_dict":
        message = "over 3 levels"
    with pytest.raises(CheckpointError, match=message):
        UperNetForSemanticSegmentation.from_pretrained(made.path)


@pytest.mark.parametrize("kind", ["Unet", "FPN", "DeepLabV3Plus", "Segformer", "PSPNet"])
def test_other_networks_are_refused(kind: str, tmp_path: Path) -> None:
    network = randomise(getattr(smp, kind)("resnet18", encoder_weights=None))
    network.save_pretrained(tmp_path / "folder")
    torch.save(network.state_dict(), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=kind.removesuffix("V3Plus")):
        UperNetForSemanticSegmentation.from_pretrained(tmp_path / "folder")
    with pytest.raises(CheckpointError, match=r"x\.pth"):
        UperNetForSemanticSegmentation.from_pretrained(tmp_path / "x.pth")

"""smp's UPerNets become ours with the same logits; what ours cannot be is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import fastuper
from bench.numerics import error
from bench.pairs import images, randomize
from fastuper.weights.errors import CheckpointError
from tests.parity.conversions import converted
from tests.parity.foreign_smp import UPerNet

CONVNEXT: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 20)}
BLOCKS: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (8, 12, 16, 20)}
SWIN: dict[str, Any] = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4)}


def features(name: str, **arguments: Any) -> Any:
    last = (1, 2, 3, 4) if "resnet" in name else (0, 1, 2, 3)
    return timm.create_model(name, features_only=True, out_indices=last, **arguments)


def over_swin(**arguments: Any) -> Callable[..., UPerNet]:
    name = "swin_tiny_patch4_window7_224"
    return lambda **more: UPerNet(features(name, **SWIN, **arguments), channels_last=True, **more)


# The encoder's name in smp, the network, and the sizes of images: those that timm's Swin was built for.
NETWORKS: Mapping[str, tuple[str, Callable[..., UPerNet], tuple[tuple[int, int], ...]]] = {
    "resnet18": ("resnet18", lambda: UPerNet(features("resnet18", **BLOCKS), own=True), ((64, 96), (32, 32))),
    "resnet50": (
        "resnet50",
        lambda: UPerNet(features("resnet50", **BLOCKS, in_chans=1), own=True, classes=1),
        ((64, 96),),
    ),
    "tu-resnet18": ("tu-resnet18", lambda: UPerNet(features("resnet18", **BLOCKS, in_chans=4)), ((64, 96),)),
    "tu-resnet26d": ("tu-resnet26d", lambda: UPerNet(features("resnet26d", **BLOCKS)), ((64, 96),)),
    "tu-convnext": ("tu-convnext_tiny", lambda: UPerNet(features("convnext_tiny", **CONVNEXT)), ((64, 96),)),
    "tu-convnext, conv_mlp": (
        "tu-convnext_atto",
        lambda: UPerNet(features("convnext_atto", **CONVNEXT, in_chans=4), classes=1),
        ((64, 96),),
    ),
    "tu-swin": ("tu-swin_tiny_patch4_window7_224", over_swin(img_size=64), ((64, 64),)),
    "tu-swin, one window last": ("tu-swin_tiny_patch4_window7_224", over_swin(img_size=96, window_size=3), ((96, 96),)),
    "tu-swin, wide": ("tu-swin_tiny_patch4_window7_224", over_swin(img_size=(64, 96), window_size=3), ((64, 96),)),
}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "tu-swin": {"img_size": 64},
    "tu-swin, one window last": {"img_size": 96, "window_size": 3},
    "tu-swin, wide": {"img_size": [64, 96], "window_size": 3},
}
DEFAULTS: dict[str, Any] = {
    "_model_class": "UPerNet",
    "activation": None,
    "aux_params": None,
    "decoder_use_norm": "batchnorm",
    "encoder_depth": 5,
    "encoder_weights": None,
    "upsampling": 4,
}


def network(name: str) -> UPerNet:
    model = NETWORKS[name][1]()
    randomize(model)
    return model.double().eval()


def settings_of(name: str, model: UPerNet, **changed: Any) -> dict[str, Any]:
    head = model.segmentation_head[0]
    stem = next(module for module in model.encoder.modules() if isinstance(module, torch.nn.Conv2d))
    sizes = {"classes": head.out_channels, "decoder_channels": head.in_channels, "in_channels": stem.in_channels}
    return {**DEFAULTS, **sizes, "encoder_name": NETWORKS[name][0], **SETTINGS.get(name, {}), **changed}


@pytest.mark.parametrize("name", NETWORKS)
def test_logits(name, tmp_path):
    """A folder of `save_pretrained` and a bare state dict; the folder is loaded as a user loads it."""
    theirs = network(name)
    state = {key: tensor.contiguous() for key, tensor in theirs.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(settings_of(name, theirs)))
    ours = fastuper.UperNetForSemanticSegmentation.from_pretrained(tmp_path).eval()
    assert ours.dtype == torch.float64
    assert ours.config.to_dict()["model_type"] == "fastuper_upernet"
    for size in NETWORKS[name][2]:
        pixels = images(1, ours.config.backbone_config.num_channels, *size, dtype=torch.float64)
        with torch.no_grad():
            assert error(ours(pixels).logits, theirs(pixels)) < 1e-10
    # Without config.json, what names and shapes do not decide: the image size of Swin's windows.
    options = {"image_size": list(NETWORKS[name][2][0])} if "wide" in name else {}
    bare = converted(state, **options)
    assert bare.only_fastuper.startswith("Transformers' UPerNet resamples logits")
    values = fastuper.UperNetConfig.from_dict(dict(bare.config)).to_dict()
    own = ours.config.to_dict()
    for key in ("dtype", "_name_or_path", "architectures"):
        values.pop(key, None), own.pop(key, None)
    assert values == own
    for key, tensor in ours.state_dict().items():
        assert key.endswith("relative_position_index") or torch.equal(bare.tensors[key], tensor)


def test_a_checkpoint_of_lightning():
    """smp's example keeps the model as an attribute, and the colours' mean and std as buffers."""
    model = network("resnet18")
    colours = {"mean": torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1), "std": torch.full((1, 3, 1, 1), 0.5)}
    tensors = {**colours, **{f"model.{key}": tensor for key, tensor in model.state_dict().items()}}
    found = converted(tensors)
    assert found.preprocessing["image_mean"] == pytest.approx([0.1, 0.2, 0.3])
    assert found.preprocessing["image_std"] == [0.5] * 3
    assert found.preprocessing["do_resize"] is False
    plain = converted(model.state_dict())
    assert plain.preprocessing["image_mean"] == [0.485, 0.456, 0.406]
    assert found.tensors.keys() == plain.tensors.keys()
    with pytest.raises(CheckpointError, match=r"beside smp's UPerNet, such as loss\.weight"):
        converted({**tensors, "loss.weight": torch.zeros(2)})
    # Another attribute, and hyperparameters of the user's own, which are no arguments of smp's.
    state = {f"net.{key}": tensor for key, tensor in model.state_dict().items()}
    found = converted(state, {"encoder_name": "resnet18", "classes": ["road", "roof"], "activation": None})
    assert found.tensors.keys() == plain.tensors.keys()
    assert "no config.json of smp" in " ".join(found.notes)


def test_hyperparameters_do_not_tell_the_image_size():
    """smp's config.json without img_size says that Swin was built for its name's size; Lightning's need not have it."""
    model = network("tu-swin, one window last")  # windows of 3, built for 96: all tables have one size
    settings = {"encoder_name": "tu-swin_tiny_patch4_window3_192"}
    for options in ({}, {"image_size": [96, 96]}):
        assert converted(model.state_dict(), settings, **options).config["backbone_config"]["image_size"] == 96


def test_what_is_left_out_is_said():
    model = network("resnet18")
    head = {"classification_head.3.weight": torch.zeros(3, 20), "classification_head.3.bias": torch.zeros(3)}
    settings = settings_of("resnet18", model, activation="sigmoid", aux_params={"classes": 3})
    found = converted({**model.state_dict(), **head}, settings)
    notes = " ".join(found.notes)
    assert "before the activation 'sigmoid'" in notes
    assert "the classification head is left out" in notes
    assert {row.source for row in found.rows if not row.targets} >= head.keys()
    notes = " ".join(converted(network("resnet50").state_dict()).notes)
    assert "mean and std of 1 channels are not known" in notes
    assert "there is no config.json" in notes


def without(names: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if name.startswith(names)]:
            del state[name]

    return change


def biased(state: dict[str, torch.Tensor]) -> None:
    """Give the fusion a bias and no norm, as `decoder_use_norm=False` does."""
    without("decoder.fusion_block.1.")(state)
    state["decoder.fusion_block.0.bias"] = torch.zeros(8)


def without_statistics(state: dict[str, torch.Tensor]) -> None:
    for name in [name for name in state if name.startswith("decoder.fusion_block.1.") and "weight" not in name]:
        del state[name]


SETTINGS_REFUSED = {
    "depth": ({"encoder_depth": 4}, "encoder_depth=4; .* has 4 levels"),
    "layernorm": ({"decoder_use_norm": "layernorm"}, "decoder_use_norm='layernorm'; .* has BatchNorm"),
    "no norm": ({"decoder_use_norm": False}, "decoder_use_norm=False"),
    "in place": ({"decoder_use_norm": "inplace"}, "decoder_use_norm='inplace'"),
    "epsilon": ({"decoder_use_norm": {"type": "batchnorm", "eps": 1e-3}}, "BatchNorm has eps=0.001"),
    "no statistics": ({"decoder_use_norm": {"type": "batchnorm", "track_running_stats": False}}, "has BatchNorm"),
    "upsampling": ({"upsampling": 8}, "upsampling=8; .* the image's size"),
    "resnext": ({"encoder_name": "resnext50_32x4d"}, "'resnext50_32x4d'; .* groups"),
    "dilated": ({"output_stride": 16}, "output_stride=16"),
    "anti-aliasing": ({"encoder_name": "tu-resnetaa50"}, "anti-aliasing"),
    "classes": ({"classes": 7}, "classes=7, and its tensors have 5"),
    "channels": ({"in_channels": 4}, "in_channels=4, and its tensors have 3"),
    "another model": ({"_model_class": "FPN"}, "FPN. of segmentation_models_pytorch"),
}
TENSORS_REFUSED = {
    "three levels": (without("decoder.feature_norms.3"), "over 3 levels"),
    "no norm": (biased, r"decoder\.fusion_block\.0\.bias"),
    "instance norm": (without_statistics, "fpn_bottleneck would have no BatchNorm"),
    "no classifier's bias": (without("segmentation_head.0.bias"), "lacks 1 of the model's"),
    "a lateral convolution": (without("decoder.fpn_lateral_blocks.1.conv_norm_relu.0"), "lacks 1 of the model's"),
    "squeeze and excitation": (
        lambda state: state.update({"encoder.layer1.0.se.fc1.weight": torch.zeros(1)}),
        r"encoder\.layer1\.0\.se\.fc1\.weight is of an attention over channels",
    ),
    "another encoder": (
        lambda state: (without("encoder.")(state), state.update({"encoder.conv_stem.weight": torch.zeros(1)})),
        r"is over an encoder with encoder\.conv_stem\.weight; ResNets, and timm's",
    ),
    "an older smp": (
        lambda state: state.update({"decoder.fpn_stages.0.skip_conv.0.weight": torch.zeros(1)}),
        "is of an older smp, whose UPerNet is another network",
    ),
}


@pytest.fixture(scope="module")
def resnet() -> UPerNet:
    return network("resnet18")


@pytest.mark.parametrize("case", SETTINGS_REFUSED)
def test_settings_are_refused_by_name(resnet, case):
    changed, message = SETTINGS_REFUSED[case]
    with pytest.raises(CheckpointError, match=message):
        converted(resnet.state_dict(), settings_of("resnet18", resnet, **changed))


@pytest.mark.parametrize("case", TENSORS_REFUSED)
def test_tensors_are_refused_by_name(resnet, case, tmp_path: Path):
    change, message = TENSORS_REFUSED[case]
    state = dict(resnet.state_dict())
    change(state)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        fastuper.UperNetForSemanticSegmentation.from_pretrained(tmp_path / "x.pth")


def test_patches_of_another_size_are_refused():
    """smp's logits are then larger than the image."""
    model = UPerNet(features("swin_tiny_patch4_window7_224", **SWIN, img_size=32, patch_size=2), channels_last=True)
    with pytest.raises(CheckpointError, match=r"patches of 2 pixels; .* patches of 4 only"):
        converted(model.state_dict())


def test_windows_of_another_image_size_are_refused():
    model = network("tu-swin")
    with pytest.raises(CheckpointError, match=r"stage 2 has 169 relative positions, .* give image_size"):
        converted(model.state_dict(), image_size=[32, 32])
    with pytest.raises(ValueError, match=r"image_size=.* contradicts the checkpoint"):
        converted(model.state_dict(), settings_of("tu-swin", model), image_size=[96, 96])

"""Options and errors of backbones of timm and Transformers: necks, levels, sizes, names; other people's checkpoints."""

from __future__ import annotations

import copy
import json
import pickle
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

from fastuper import UnifiedPerceptualParsingConfig, UperNetConfig
from fastuper import UperNetForSemanticSegmentation as Segmentation
from fastuper import UperNetForUnifiedPerceptualParsing as Parsing
from fastuper.models.backbones.foreign.depths import count_layers
from fastuper.models.backbones.foreign.measuring import Sizes, measure
from fastuper.models.backbones.foreign.pyramids import chosen_blocks
from fastuper.models.necks.vit_pyramid import ResizedPyramid
from fastuper.recipes import Recipe, parameter_groups
from tests.models.heads import error
from tests.models.test_foreign_backbones import HEAD, VIT, skip_unless_known
from tests.models.test_parsing_configuration import LABELS, PARTS

timm = pytest.importorskip("timm")
VIT_OF_TIMM = {"embed_dim": 16, "depth": 4, "num_heads": 2}


def config(name: str, **kwargs: Any) -> UperNetConfig:
    return UperNetConfig(backbone=name, use_timm_backbone=True, backbone_kwargs=kwargs, **HEAD)


def over(name: str, **kwargs: Any) -> Any:
    return Segmentation(config(name, **kwargs)).eval()


def small_vit(**kwargs: Any) -> Any:
    return over("vit_tiny_patch16_224", **VIT_OF_TIMM, **kwargs)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("resnet81", {}, r"timm .* has no model 'resnet81'; like resnet18, .*\?$"),
        ("test_resnet", {"img_size": 64}, r"cannot build test_resnet .* \(the arguments are img_size\): .*unexpected"),
        ("efficientvim_m1", {}, r"efficientvim_m1 has no levels \[-4, -3, -2, -1\]; give other out_indices"),
        ("test_resnet", {"neck": "transposed"}, "which need no neck; leave out neck='transposed'"),
        ("vit_tiny_patch16_224", {**VIT_OF_TIMM, "neck": "fpn"}, "neck='fpn' must be one of transposed, resized, none"),
        ("vit_tiny_patch16_224", {**VIT_OF_TIMM, "out_indices": [1, 3]}, "reads four maps .* out_indices names 2"),
        ("vit_tiny_patch16_224", {**VIT_OF_TIMM, "depth": 3}, r"has no levels|reads four blocks"),
        ("convmixer_768_32", {}, "4 maps of one stride, 7, and is no vision transformer"),
        ("sequencer2d_s", {}, r"has no four falling maps, which UPerNet reads: their strides are \[7, 1"),
    ],
)
def test_what_cannot_be_a_pyramid_is_refused_when_it_is_built(name, kwargs, message):
    with pytest.raises(ValueError, match=message) as caught:
        over(name, **kwargs)
    assert "\n" not in str(caught.value)


def test_images_larger_than_a_fixed_size_are_refused():
    model = over("beit_base_patch16_224", **VIT_OF_TIMM, img_size=32)
    assert model(torch.zeros(1, 3, 20, 30)).logits.shape == (1, 5, 20, 30)
    with pytest.raises(ValueError, match=r"images of at most 32 x 32 pixels, got 33 x 20: resize it, or build .*img_"):
        model(torch.zeros(1, 3, 33, 20))


@pytest.mark.parametrize("model_type", ["vitpose_backbone", "uvdoc_backbone"])
def test_backbones_of_transformers_without_a_pyramid_are_refused(model_type):
    skip_unless_known(model_type)
    values = {**VIT, "image_size": [64, 64]} if model_type == "vitpose_backbone" else {}
    with pytest.raises(ValueError, match=r"returns no feature maps|is no vision transformer"):
        Segmentation(UperNetConfig({"model_type": model_type, **values}, **HEAD))


def test_a_library_that_transformers_misses_is_named_in_one_line():
    skip_unless_known("dinat")
    if find_spec("natten"):
        pytest.skip("natten is installed")
    with pytest.raises(
        ImportError, match="cannot build a 'dinat' backbone: DinatBackbone requires the natten"
    ) as caught:
        Segmentation(UperNetConfig({"model_type": "dinat"}, **HEAD))
    assert "\n" not in str(caught.value)


def test_a_beit_with_its_own_neck_reads_four_blocks():
    skip_unless_known("beit")
    # Transformers 4.56 reads `batch_norm_eps`, and has no default.
    beit = {"model_type": "beit", **VIT, "num_hidden_layers": 12, "add_fpn": True, "batch_norm_eps": 1e-5}
    model = Segmentation(UperNetConfig(beit, **HEAD))
    assert model.config.backbone_config.values["out_features"] == ["stage4", "stage6", "stage8", "stage12"]
    assert (model.neck, model.backbone.measured_maps.scales) == (None, (4, 8, 16, 32))


def test_a_vision_transformer_is_built_once(monkeypatch):
    transformers = pytest.importorskip("transformers")
    build, built = transformers.AutoBackbone.from_config, []
    monkeypatch.setattr(
        transformers.AutoBackbone, "from_config", lambda config: built.append(build(config)) or built[-1]
    )
    model = Segmentation(UperNetConfig({"model_type": "dinov2", **VIT}, **HEAD))
    assert built == [model.backbone]
    assert model.backbone.config.out_features == model.backbone.out_features == ["stage2", "stage3", "stage5", "stage6"]


def test_a_neck_may_be_another_or_none():
    resized = small_vit(neck="resized")
    assert isinstance(resized.neck, ResizedPyramid)
    assert resized(torch.zeros(1, 3, 40, 33)).logits.shape == (1, 5, 40, 33)
    bare = small_vit(neck="none")
    assert bare.neck is None
    assert [x.shape[2:] for x in bare._features(torch.zeros(1, 3, 32, 48), False, False)[0]] == [(2, 3)] * 4
    assert bare.config.to_dict()["model_type"] == "fastuper_upernet"  # for the arguments of timm's function
    assert over("test_vit", neck="none").config.to_dict()["model_type"] == "upernet"


def test_a_checkpoint_of_transformers_has_no_neck(tmp_path):
    transformers = pytest.importorskip("transformers")
    backbone = transformers.Dinov2Config(**VIT, out_features=["stage2", "stage3", "stage5", "stage6"])
    theirs = transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(backbone_config=backbone, **HEAD)
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours, info = Segmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert ours.neck is None
    assert not any(info.values())
    pixels = torch.randn(1, 3, 61, 75)  # 61 is no multiple of the patch: Transformers cuts off what is over
    with torch.no_grad():
        assert error(ours(pixels).logits, theirs(pixels).logits) < 1e-5
    assert Segmentation(UperNetConfig(backbone, **HEAD)).neck is not None
    ours.save_pretrained(tmp_path / "again")
    assert Segmentation.from_pretrained(tmp_path / "again").neck is None
    assert transformers.UperNetForSemanticSegmentation.from_pretrained(tmp_path / "again").backbone is not None


def test_transformers_refuses_a_neck(tmp_path):
    transformers = pytest.importorskip("transformers")
    small_vit().save_pretrained(tmp_path)
    with pytest.raises((KeyError, ValueError)):
        transformers.UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    with pytest.raises((KeyError, ValueError)):
        transformers.AutoModelForSemanticSegmentation.from_pretrained(tmp_path)


def test_a_model_is_copied_pickled_and_built_again():
    model = small_vit()
    pixels = torch.randn(1, 3, 40, 33)
    with torch.no_grad():
        expected = model(pixels).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(pixels).logits, expected)
        again = Segmentation(UperNetConfig.from_dict(model.config.to_dict())).eval()
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(pixels).logits, expected)
    hidden = model(pixels, output_hidden_states=True).hidden_states
    assert [tuple(x.shape) for x in hidden] == [(1, 16, 3, 3)] * 4


def test_measuring_changes_nothing():
    torch.manual_seed(3)
    model = timm.create_model("test_vit", features_only=True, out_indices=(-4, -3, -2, -1), dynamic_img_size=True)
    expected, after = model.state_dict(), torch.rand(3)
    torch.manual_seed(3)
    ours = over("test_vit").backbone
    for name, tensor in ours._backbone.state_dict().items():
        assert torch.equal(tensor, expected[name])
    torch.manual_seed(3)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    state, random = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    maps = measure(lambda x: [network(x)], network, name="x", channels=3, unit=4, native=None, remedy="")
    assert (maps.channels, maps.scales, maps.channels_last) == ((4,), (2,), False)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert network[1].training
    assert after.shape == (3,)


class Windows(nn.Module):
    """A network that takes multiples of 24 pixels, from 48, and returns (B, H, W, C)."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        if x.shape[2] % 24 or x.shape[3] % 24 or min(x.shape[2:]) < 48:
            raise RuntimeError("no")
        return [x[:, :, ::2, ::2].permute(0, 2, 3, 1)]


def test_the_sizes_that_a_network_takes_are_found():
    maps = measure(Windows(), nn.Module(), name="w", channels=3, unit=8, native=(48, 48), remedy="-")
    assert (maps.sizes.multiple, maps.sizes.least, maps.channels_last) == ((48, 48), (48, 48), True)
    maps = measure(Windows(), nn.Module(), name="w", channels=3, unit=24, native=None, remedy="-")
    assert (maps.sizes.multiple, maps.sizes.least) == ((24, 24), (48, 48))
    with pytest.raises(ValueError, match="w runs on no image of 10 x 15, 20 x 30 pixels: no"):
        measure(Windows(), nn.Module(), name="w", channels=3, unit=5, native=None, remedy="-")


def test_a_size_that_fits_by_chance_does_not_stand_for_others():
    """Positions of 6 patches are added to an image of 2 x 3 patches, and by broadcasting to an image of one patch."""
    positions = torch.zeros(1, 6, 4)

    def run(x: torch.Tensor) -> list[torch.Tensor]:
        x = x[:, :, ::8, ::8]
        return [(x.flatten(2).transpose(1, 2)[..., :1] + positions).mT.reshape(1, 4, *x.shape[2:])]

    maps = measure(run, nn.Module(), name="w", channels=3, unit=8, native=(16, 24), remedy="-")
    assert maps.sizes == Sizes("w", (1, 1), (16, 24), (16, 24), "-")


def test_padding():
    sizes = Sizes("x", (16, 8), (32, 8), (64, 64), "cut it")
    assert [sizes.padded(*size) for size in ((1, 1), (33, 9), (64, 64))] == [(32, 8), (48, 16), (64, 64)]
    pixels = torch.ones(1, 1, 33, 8)
    padded = sizes.pad(pixels)
    assert padded.shape == (1, 1, 48, 8)
    assert padded.sum() == pixels.sum() == padded[:, :, :33].sum()
    assert sizes.pad(padded) is padded
    with pytest.raises(ValueError, match="x takes images of at most 64 x 64 pixels, got 65 x 3: cut it"):
        sizes.pad(torch.ones(1, 1, 65, 3))


def test_parsing_pads_and_crops():
    torch.manual_seed(0)
    backbone = {"model_type": "timm_backbone", "backbone": "vit_tiny_patch16_224", **VIT_OF_TIMM}
    values = {"hidden_size": 8, "pool_channels": 4, "texture_channels": 4, "labels": LABELS, "object_parts": PARTS}
    model = Parsing(UnifiedPerceptualParsingConfig(backbone_config=backbone, **values)).eval()
    pixels = torch.randn(1, 3, 40, 33)
    whole = torch.nn.functional.pad(pixels, (0, 15, 0, 8))
    with torch.no_grad():
        found, expected = model(pixels), model(whole)
    full = nn.functional.interpolate(expected.object, (48, 48), mode="bilinear", align_corners=False)[:, :, :40, :33]
    assert error(found.object, full) < 1e-6
    assert torch.equal(found.scene, expected.scene)
    assert torch.equal(model.parse(pixels)[0].objects, full.argmax(1)[0])
    assert expected.object.shape == (1, full.shape[1], 12, 12)


def test_four_blocks_are_chosen():
    assert chosen_blocks(12) == [2, 5, 8, 11]
    assert chosen_blocks(12, is_beit=True) == [3, 5, 7, 11]
    assert chosen_blocks(24, is_beit=True) == [7, 11, 15, 23]
    assert chosen_blocks(40) == [9, 19, 29, 39]
    with pytest.raises(ValueError, match="reads four blocks of a vision transformer, and this one has 3"):
        chosen_blocks(3)


def test_layers_are_counted_from_names():
    names = ["pos_embed", *(f"blocks.{i}.mlp.{j}.weight" for i in range(5) for j in range(2)), "norm.weight"]
    layers = count_layers(names, True)
    assert [layers.depth(name) for name in ("pos_embed", "blocks.0.x", "blocks.4.x.lora_A", "norm.weight")] == [
        6, 5, 1, 0,
    ]  # fmt: skip
    names = ["conv1.weight", *(f"layer{i}.{j}.conv1.weight" for i in range(1, 5) for j in range(3))]
    layers = count_layers(names, False)
    assert [layers.depth(name) for name in (names[0], "layer1.0.conv1.weight", "layer4.2.bn.weight")] == [7, 6, 3]
    assert count_layers(["a.weight", "b.weight"], True) is None


def test_layers_that_cannot_be_counted_are_an_error():
    model = small_vit()
    model.config.backbone_config.layers = None
    with pytest.raises(ValueError, match=r"layer_decay needs a backbone whose layers can be counted; .*timm_backbone"):
        parameter_groups(model, Recipe(1e-2, 0.01, layer_decay=0.9))


def test_the_training_arguments_of_timm_change_no_network(tmp_path):
    over("test_resnet", drop_path_rate=0.1).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "upernet"
    rates = {part.drop_prob for part in Segmentation.from_pretrained(tmp_path).modules() if hasattr(part, "drop_prob")}
    assert max(rates) == pytest.approx(0.1)

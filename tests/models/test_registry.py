"""The registry of backbones: a toy family in training, checkpoints and the command; refused registrations."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fastuper import SwinConfig, UperNetConfig, UperNetForSemanticSegmentation
from fastuper.cli import app
from fastuper.models.backbones import Backbone, build_backbone, register, stage_depths, unregister
from fastuper.models.backbones.registry import FAMILIES, PRESETS, layer_depths
from fastuper.models.configuration import BackboneConfig
from fastuper.models.outputs import BackboneOutput
from fastuper.recipes import BACKBONES, Recipe, parameter_groups
from fastuper.weights.transformers import Names
from tests.training.common import train, write_data


class ToyConfig(BackboneConfig):
    model_type = "toy"

    def __init__(self, width=8, num_channels=3, depths=(1, 1, 1, 1), **extra):
        self.width, self.num_channels = width, num_channels
        super().__init__(depths, **extra)


class ToyBackbone(Backbone):
    def __init__(self, config):
        super().__init__(config, [config.width] * 5)
        channels = [config.num_channels, *[config.width] * 4]
        self.stages = nn.ModuleList(nn.Conv2d(channels[i], config.width, 3, 2, 1) for i in range(4))

    def forward(self, pixel_values, output_hidden_states=False, output_attentions=False):
        maps = [pixel_values]
        for stage in self.stages:
            maps.append(stage(maps[-1]).relu())
        chosen = tuple(x for name, x in zip(self.stage_names, maps, strict=True) if name in self.out_features)
        return BackboneOutput(chosen, tuple(maps) if output_hidden_states else None)


@pytest.fixture
def toy():
    depths = stage_depths(r"stages\.(\d+)\.")
    names = Names(parts=("stages",), prefix="toy.", renamed=((r"stages\.(\d)\.kernel", r"stages.\1.weight"),))
    yield register("toy", ToyConfig, ToyBackbone, presets={"toy-tiny": ToyConfig}, depths=depths, names=names)
    unregister("toy")


def model(**head):
    torch.manual_seed(0)
    return UperNetForSemanticSegmentation(
        UperNetConfig({"model_type": "toy"}, hidden_size=8, auxiliary_channels=8, num_labels=3, **head)
    )


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


def test_a_registered_family_trains_saves_and_loads(toy, tmp_path):
    given = model()
    trainer = train(tmp_path / "run", model=given, steps=3, batch_size=2, layer_decay=0.5)
    rates = {name: group["initial_lr"] for group in trainer.optimizer.param_groups for name in group["param_names"]}
    for stage, depth in enumerate((6, 5, 4, 3)):
        assert rates[f"backbone.stages.{stage}.weight"] == 1e-2 * 0.5**depth
    assert rates["decode_head.classifier.weight"] == 1e-2

    again = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "run" / "last")
    assert isinstance(again.backbone, ToyBackbone)
    assert isinstance(again.config.backbone_config, ToyConfig)
    assert_same(again.state_dict(), given.state_dict())
    pixels = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(again(pixels).logits, given.eval()(pixels).logits)


def test_the_familys_own_names_are_loaded(toy):
    given, other = model(), model()
    for tensor in given.state_dict().values():
        tensor.add_(1)
    theirs = {
        re.sub(r"backbone\.(stages\.\d)\.weight", r"backbone.toy.\1.kernel", name): tensor
        for name, tensor in given.state_dict().items()
    }
    assert "backbone.toy.stages.0.kernel" in theirs
    other.load_state_dict(theirs)
    assert_same(other.state_dict(), given.state_dict())


def test_a_pretrained_backbone(toy, tmp_path):
    given = model()
    given.save_pretrained(tmp_path)
    given.config.backbone_config.save_pretrained(tmp_path)
    config = UperNetConfig(backbone=str(tmp_path), use_pretrained_backbone=True, hidden_size=8, auxiliary_channels=8)
    assert_same(UperNetForSemanticSegmentation(config).backbone.state_dict(), given.backbone.state_dict())


def test_the_command_trains_a_preset(toy, tmp_path):
    assert BACKBONES["toy-tiny"] is ToyConfig
    data, output = write_data(tmp_path / "data"), tmp_path / "run"
    options = "--steps 1 --batch-size 2 --crop 32 --cpu --workers 0 --hidden-size 8 --backbone toy-tiny"
    result = CliRunner().invoke(app, ["train", "--data", str(data), "--output", str(output), *options.split()])
    assert result.exit_code == 0, result.output
    assert "toy-tiny starts with random weights" in result.output
    assert isinstance(UperNetForSemanticSegmentation.from_pretrained(output / "last").backbone, ToyBackbone)


def test_a_family_may_have_no_layer_depths():
    register("toy", ToyConfig, ToyBackbone)
    try:
        groups = parameter_groups(model(), Recipe(1e-2, 0.01))
        assert {group["lr"] for group in groups} == {1e-2}
        known = ", ".join(sorted(name for name, family in FAMILIES.items() if family.depths is not None))
        with pytest.raises(ValueError, match=rf"layer_decay needs .* layer depths \({known}\); 'toy' has"):
            parameter_groups(model(), Recipe(1e-2, 0.01, layer_decay=0.9))
    finally:
        unregister("toy")


def test_nothing_of_a_family_stays_in_the_registry(toy):
    families, presets = dict(FAMILIES), dict(PRESETS)
    config = ToyConfig()
    unregister("toy")
    assert families.keys() - FAMILIES.keys() == {"toy"}
    assert presets.keys() - PRESETS.keys() == {"toy-tiny"}
    with pytest.raises(ValueError, match=f"'toy' is not known; known are {', '.join(FAMILIES)}, timm_backbone"):
        UperNetConfig({"model_type": "toy"})
    with pytest.raises(ValueError, match=f"no backbone 'toy' is registered; there are {', '.join(sorted(FAMILIES))}"):
        build_backbone(config)
    with pytest.raises(ValueError, match="no backbone 'toy' is registered"):
        unregister("toy")
    register("toy", ToyConfig, ToyBackbone)  # for the fixture to remove


class OtherConfig(ToyConfig):
    model_type = "other"


REFUSED = {
    "type-twice": (
        ValueError,
        lambda: register("swin", SwinConfig, ToyBackbone),
        "a backbone 'swin' is already registered: SwinBackbone",
    ),
    "preset-twice": (
        ValueError,
        lambda: register("toy", ToyConfig, ToyBackbone, presets={"swin-tiny": ToyConfig}),
        "backbone 'toy': the preset 'swin-tiny' is already registered, for 'swin'",
    ),
    "no-configuration": (
        TypeError,
        lambda: register("toy", dict, ToyBackbone),
        "backbone 'toy': <class 'dict'> is not a subclass of BackboneConfig",
    ),
    "configuration-object": (
        TypeError,
        lambda: register("toy", ToyConfig(), ToyBackbone),
        "is not a subclass of BackboneConfig",
    ),
    "no-network": (
        TypeError,
        lambda: register("toy", ToyConfig, nn.Conv2d),
        "backbone 'toy': <class 'torch.nn.modules.conv.Conv2d'> is not a subclass of Backbone",
    ),
    "other-type": (
        ValueError,
        lambda: register("toy", OtherConfig, ToyBackbone),
        "backbone 'toy': OtherConfig.model_type is 'other'; both must be the same name",
    ),
    "no-type": (ValueError, lambda: register("", BackboneConfig, ToyBackbone), "both must be the same name"),
    "preset-object": (
        TypeError,
        lambda: register("toy", ToyConfig, ToyBackbone, presets={"toy-tiny": ToyConfig()}),
        "preset 'toy-tiny' must be a function that returns a configuration, got ToyConfig",
    ),
    "depths-list": (
        TypeError,
        lambda: register("toy", ToyConfig, ToyBackbone, depths=[3, 4]),
        r"backbone 'toy': depths must be a function of a name and a configuration, got \[3, 4\]",
    ),
    "names-dictionary": (
        TypeError,
        lambda: register("toy", ToyConfig, ToyBackbone, names={"a": "b"}),
        "backbone 'toy': names must be a Names, got {'a': 'b'}",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    error, call, message = REFUSED[case]
    families, presets = dict(FAMILIES), dict(PRESETS)
    with pytest.raises(error, match=message):
        call()
    assert families == FAMILIES
    assert presets == PRESETS


def test_timms_type_is_reserved():
    class TimmConfig(ToyConfig):
        model_type = "timm_backbone"

    with pytest.raises(ValueError, match="model_type 'timm_backbone' is reserved for the models of timm"):
        register("timm_backbone", TimmConfig, ToyBackbone)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_each_preset_is_its_familys(name):
    family = next(family for family in FAMILIES.values() if name in family.presets)
    config, other = PRESETS[name](), PRESETS[name]()
    assert type(config) is family.config
    assert config == other
    config.depths[0] = 99
    config.out_features = ["stem"]
    assert PRESETS[name]() == other  # no call shares a list with another


@pytest.mark.parametrize("family", ["convnext", "convnextv2", "resnet", "resnet_deep_stem", "swin", "swinv2"])
def test_layer_depths_are_the_published_ones(family):
    with torch.device("meta"):
        backbone = build_backbone(next(iter(FAMILIES[family].presets.values()))())
    depths, found = layer_depths(family), set()
    for name, _ in backbone.named_parameters():
        part = name.split(".")
        if part[0] == "hidden_states_norms":
            expected = 0
        elif part[1] in ("stages", "layers") and part[3] not in ("downsampling_layer", "downsample"):
            expected = 6 - int(part[2])
        else:
            expected = 7
        assert depths(name, backbone.config) == expected, name
        found.add(expected)
    assert found == {3, 4, 5, 6, 7} | ({0} if family in ("convnext", "convnextv2", "swin") else set())


def test_layer_depths_of_a_vision_transformer():
    with torch.device("meta"):
        backbone = build_backbone(PRESETS["deit-small-16"]())
    depths = layer_depths("vit_pyramid")
    found = {name: depths(name, backbone.config) for name, _ in backbone.named_parameters()}
    assert found["embeddings.cls_token"] == found["embeddings.patch_embeddings.projection.weight"] == 13
    assert found["encoder.layers.0.mlp.layers.0.weight"] == 12
    assert found["encoder.layers.11.attention.query.bias"] == 1
    assert {depth for name, depth in found.items() if name.startswith("neck.")} == {0}

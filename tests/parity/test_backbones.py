"""UPerNets over backbones of other libraries: timm's models, and Transformers' AutoBackbone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers.activations import ACT2FN

import fastuper
from bench.numerics import error
from bench.pairs import STAGES, images, randomize
from fastuper.models.backbones.layers import ACTIVATIONS, activation
from fastuper.models.backbones.registry import FAMILIES
from tests.parity.models import HEAD, segmentation_labels

BOUND = 1e-10

AUTO: dict[str, Any] = {
    "pvt_v2": lambda: transformers.PvtV2Config(
        hidden_sizes=[16, 24, 40, 56], depths=[1, 1, 2, 1], num_attention_heads=[1, 2, 5, 8], out_features=STAGES
    ),
    "dinov2": lambda: transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=56, out_indices=[1, 2, 3, 4]
    ),
}


def compare(theirs: Any, ours: Any, size: tuple[int, int] = (64, 64)) -> None:
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict())
    theirs, ours = theirs.double(), ours.double()
    for training in (False, True):
        theirs.train(training)
        ours.train(training)
        pixels, labels = images(2, 3, *size), segmentation_labels(2, *size)
        torch.manual_seed(0)  # some backbones have stochastic depth by default
        expected = theirs(pixels, labels=labels)
        torch.manual_seed(0)
        output = ours(pixels, labels=labels)
        assert error(output.logits, expected.logits) < BOUND
        assert error(output.loss, expected.loss) < BOUND


@pytest.mark.parametrize("kind", AUTO)
def test_backbones_of_transformers(kind):
    given = transformers.UperNetConfig(backbone_config=AUTO[kind](), **HEAD)
    theirs = transformers.UperNetForSemanticSegmentation(copy.deepcopy(given))
    ours = fastuper.UperNetForSemanticSegmentation(given)
    assert ours.config.backbone_config.model_type == kind
    compare(theirs, ours)
    theirs.eval()
    ours.eval()
    with torch.no_grad():
        pixels = images(1, 3, 64, 64)
        expected = theirs(pixels, output_hidden_states=True).hidden_states
        given_states = ours(pixels, output_hidden_states=True).hidden_states
    for state, expected_state in zip(given_states, expected, strict=True):
        assert error(state, expected_state) < BOUND


def timm_backbone(**values: Any) -> Any:
    return transformers.TimmBackboneConfig(backbone="resnet18", use_pretrained_backbone=False, **values)


def test_a_timm_backbone():
    pytest.importorskip("timm")
    given = transformers.UperNetConfig(backbone_config=timm_backbone(out_indices=[1, 2, 3, 4]), **HEAD)
    theirs = transformers.UperNetForSemanticSegmentation(copy.deepcopy(given))
    named = fastuper.UperNetConfig(
        use_timm_backbone=True, backbone="resnet18", backbone_kwargs={"out_indices": [1, 2, 3, 4]}, **HEAD
    )
    for ours in (fastuper.UperNetForSemanticSegmentation(given), fastuper.UperNetForSemanticSegmentation(named)):
        assert ours.num_parameters() == theirs.num_parameters()
        compare(theirs, ours, (65, 70))
        theirs.float()


def test_a_timm_backbone_that_names_no_levels_gives_its_last_four():
    pytest.importorskip("timm")
    given = transformers.UperNetConfig(backbone_config=timm_backbone(), **HEAD)
    with pytest.raises(IndexError):
        transformers.UperNetForSemanticSegmentation(copy.deepcopy(given))
    for config in (given, fastuper.UperNetConfig(use_timm_backbone=True, backbone="resnet18", **HEAD)):
        ours = fastuper.UperNetForSemanticSegmentation(config)
        assert ours.backbone.channels == [64, 128, 256, 512]


def test_a_timm_backbone_gives_no_attentions():
    pytest.importorskip("timm")
    ours = fastuper.UperNetForSemanticSegmentation(
        fastuper.UperNetConfig(use_timm_backbone=True, backbone="resnet18", **HEAD)
    )
    pixels = images(2, 3, 64, 64, dtype=torch.float32)
    with pytest.raises(ValueError, match="a timm backbone gives no attentions"):
        ours(pixels, output_attentions=True)
    assert len(ours(pixels, output_hidden_states=True).hidden_states) == 4


def test_an_unknown_type_names_the_known_ones():
    with pytest.raises(ValueError, match=f"'vgg' is not known; known are {', '.join(FAMILIES)}, timm_backbone"):
        fastuper.UperNetConfig(backbone_config={"model_type": "vgg"})


def test_a_folder_names_the_backbone(tmp_path):
    transformers.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]).save_pretrained(tmp_path)
    ours = fastuper.UperNetForSemanticSegmentation(fastuper.UperNetConfig(backbone=str(tmp_path), **HEAD))
    assert ours.backbone.channels == [8, 8, 16, 16]
    assert ours.config.backbone is None
    assert ours.config.backbone_config.out_features == STAGES


def test_the_levels_asked_for_take_the_place_of_those_that_the_folder_names(tmp_path):
    """A saved configuration has its levels twice, as `out_features` and `out_indices`; one override replaces both."""
    transformers.ConvNextConfig(
        hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage4"]
    ).save_pretrained(tmp_path)
    for levels in ({"out_indices": [2, 3, 4]}, {"out_features": ["stage2", "stage3", "stage4"]}):
        ours = fastuper.UperNetForSemanticSegmentation(
            fastuper.UperNetConfig(backbone=str(tmp_path), backbone_kwargs=levels, **HEAD)
        )
        assert ours.backbone.channels == [8, 16, 16]


@pytest.mark.parametrize("name", sorted(ACTIVATIONS.keys() & ACT2FN.keys()))
def test_activations(name):
    x = torch.linspace(-12, 12, 1001, dtype=torch.float64)
    assert error(activation(name)(x), ACT2FN[name](x)) < 1e-10


def test_activations_that_we_lack_are_documented():
    lacking = set(ACT2FN.keys()) - ACTIVATIONS.keys()
    assert lacking <= {"prelu", "sqrtsoftplus", "xielu"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backbone": "resnet0"}, "has no model 'resnet0'"),
        ({}, "has no model None"),
        ({"backbone": "resnet18", "out_indices": [9]}, r"resnet18 has no levels \[9\]"),
    ],
    ids=["no-such-model", "no-name", "no-such-level"],
)
def test_what_timm_does_not_have(values, message):
    pytest.importorskip("timm")
    given = fastuper.UperNetConfig(backbone_config={"model_type": "timm_backbone", **values})
    with pytest.raises(ValueError, match=message):
        fastuper.UperNetForSemanticSegmentation(given)


def test_a_pretrained_timm_backbone_is_fetched_once(monkeypatch, tmp_path):
    timm = pytest.importorskip("timm")
    create_model, asked = timm.create_model, []

    def offline(name, *, pretrained, **options):
        asked.append(pretrained)
        return create_model(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    given = fastuper.UperNetConfig(
        backbone="resnet18", use_timm_backbone=True, use_pretrained_backbone=True, hidden_size=16, auxiliary_channels=8
    )
    model = fastuper.UperNetForSemanticSegmentation(given)
    model.save_pretrained(tmp_path)
    again = fastuper.UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    fastuper.UperNetForSemanticSegmentation(again.config)
    assert asked == [True, False, False]
    theirs, info = transformers.UperNetForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    pixels = images(1, 3, 64, 64, dtype=torch.float32)
    with torch.no_grad():
        assert error(again(pixels).logits, theirs.eval()(pixels).logits) < 1e-5
    assert model.backbone.channels == [64, 128, 256, 512]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name

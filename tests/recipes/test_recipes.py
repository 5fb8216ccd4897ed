"""The published recipes: learning rate and weight decay of each parameter, the schedule, the networks' sizes."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, LambdaLR, LinearLR, PolynomialLR

from fastuper import ConvNextConfig, SwinConfig, UperNetConfig, UperNetForSemanticSegmentation
from fastuper.models.configuration import ForeignBackboneConfig
from fastuper.recipes.recipes import (
    BACKBONES,
    RECIPES,
    Recipe,
    decays,
    learning_rate_factor,
    parameter_groups,
    recipe_for,
)


def build(backbone_config, **options) -> UperNetForSemanticSegmentation:
    with torch.device("meta"):
        return UperNetForSemanticSegmentation(UperNetConfig(backbone_config, **options))


def mmsegmentation_name(name: str) -> str:
    """Return mmsegmentation's name of a parameter of UPerNet-ConvNeXt, as in Transformers' conversion script."""
    for ours, theirs in (
        (r"backbone\.embeddings\.patch_embeddings", "backbone.downsample_layers.0.0"),
        (r"backbone\.embeddings\.layernorm", "backbone.downsample_layers.0.1"),
        (r"backbone\.encoder\.stages\.(\d)\.downsampling_layer", r"backbone.downsample_layers.\1"),
        (r"backbone\.encoder\.stages\.(\d)\.layers\.(\d+)", r"backbone.stages.\1.\2"),
        (r"backbone\.hidden_states_norms\.stage(\d)", r"backbone.norm\1"),
    ):
        name = re.sub(ours, theirs, name)
    return name


def mmsegmentation_scale(name: str) -> float:
    """Return mmsegmentation's stage-wise decay, 0.9 with num_layers=6, where the heads have stage 7."""
    if name.startswith("backbone.downsample_layers"):
        stage = 0
    elif name.startswith("backbone.stages"):
        stage = int(name.split(".")[2]) + 1
    else:
        stage = 7
    return 0.9 ** (7 - stage)


def test_convnext_groups_are_the_published_ones():
    model = build(BACKBONES["convnext-tiny"]())
    found = {}
    for group in parameter_groups(model, RECIPES["convnext"]):
        for name, parameter in group["params"]:
            assert name not in found
            found[name] = (group["lr"], group["weight_decay"], parameter)
    assert found.keys() == dict(model.named_parameters()).keys()
    names = {mmsegmentation_name(name) for name in found}
    # The stem and three downsampling layers, the four stages, and the norms of their four maps.
    assert {f"backbone.downsample_layers.{i}.0.weight" for i in range(4)} <= names
    assert {f"backbone.stages.{i}.0.dwconv.weight" for i in range(4)} <= names
    assert {f"backbone.norm{i}.weight" for i in range(1, 5)} <= names
    for name, (lr, weight_decay, parameter) in found.items():
        assert lr == pytest.approx(1e-4 * mmsegmentation_scale(mmsegmentation_name(name)), rel=1e-12), name
        assert weight_decay == (0.0 if len(parameter.shape) == 1 else 0.05), name


def test_swin_groups_spare_norms_biases_and_positions():
    model = build(SwinConfig(use_absolute_embeddings=True, image_size=32, embed_dim=12, num_heads=(1, 2, 3, 4)))
    groups = parameter_groups(model, RECIPES["swin"])
    assert {group["lr"] for group in groups} == {6e-5}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.01}
    for group in groups:
        for name, _ in group["params"]:
            module = model.get_submodule(name.rpartition(".")[0])
            spared = (
                name.endswith((".bias", "relative_position_bias_table", "position_embeddings"))
                or isinstance(module, torch.nn.LayerNorm | torch.nn.BatchNorm2d)
            )  # fmt: skip
            assert (group["weight_decay"] == 0) is spared, name
    spared = [name for group in groups if not group["weight_decay"] for name, _ in group["params"]]
    assert "backbone.embeddings.position_embeddings" in spared
    assert sum("relative_position_bias_table" in name for name in spared) == 12


def test_frozen_parameters_are_in_no_group():
    model = build(ConvNextConfig(hidden_sizes=[4] * 4, depths=[1] * 4))
    model.backbone.requires_grad_(False)
    names = [name for group in parameter_groups(model, RECIPES["convnext"]) for name, _ in group["params"]]
    assert names
    assert not any(name.startswith("backbone.") for name in names)


def test_the_schedule_is_a_line_times_a_polynomial():
    def rates(make):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
        scheduler = make(optimizer)
        found = []
        for _ in range(50):
            found.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        return found

    ours = rates(lambda o: LambdaLR(o, lambda step: learning_rate_factor(step, steps=50, warmup_steps=15, power=0.9)))
    torchs = rates(
        lambda o: ChainedScheduler(
            [LinearLR(o, start_factor=1e-6, total_iters=15), PolynomialLR(o, total_iters=50, power=0.9)]
        )
    )
    assert ours == pytest.approx(torchs, rel=1e-9)
    assert max(ours) == ours[15]
    assert learning_rate_factor(0, steps=3, warmup_steps=0, power=1) == 1


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        *[("convnext-tiny", 60), ("convnext-small", 82), ("convnext-base", 122), ("convnext-large", 235)],
        *[("swin-tiny", 60), ("swin-small", 81), ("swin-base", 121), ("swin-large", 234)],
    ],
)
def test_named_backbones_have_the_published_sizes(name, millions):
    assert build(BACKBONES[name](), num_labels=150).num_parameters() / 1e6 == pytest.approx(millions, abs=0.6)


@pytest.mark.parametrize(("name", "millions"), [("resnet-18", 11.2), ("resnet-34", 21.3), ("resnet-101", 42.5)])
def test_named_resnets_have_the_published_sizes(name, millions):
    backbone = build(BACKBONES[name]()).backbone
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


# timm's `no_weight_decay` has the same names, and Transformers' backbones the same parts.
NAMED = (
    "backbone._backbone.model.cls_token",
    "backbone._backbone.model.dist_token",
    "backbone._backbone.model.reg_token",
    "backbone._backbone.model.pos_embed_win",
    "backbone._backbone.blocks.0.attn.rel_pos_h",
    "backbone.embeddings.mask_token",
    "backbone.embeddings.register_tokens",
    "backbone.encoder.layer.0.attention.rel_pos_w",
)


@pytest.mark.parametrize("name", ["convnextv2-atto", "swinv2-tiny-window8"])
def test_parameters_without_weight_decay(name):
    """By the authors' rules: one dimension, GRN, and Swin V2's scales and position biases."""
    model = build(BACKBONES[name]())
    groups = parameter_groups(model, Recipe(learning_rate=1e-3, weight_decay=0.05))
    undecayed = {name for group in groups if not group["weight_decay"] for name, _ in group["params"]}
    expected = {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim < 2 or re.search(r"\.grn\.|\.logit_scale$|\.continuous_position_bias_mlp\.", name)
    }
    assert undecayed == expected
    assert any(dict(model.named_parameters())[name].ndim > 1 for name in undecayed)


@pytest.mark.parametrize("name", NAMED)
def test_tokens_and_positions_of_other_libraries_have_no_weight_decay(name):
    weight = nn.Parameter(torch.zeros(1, 4, 8))
    assert not decays(name, weight)
    assert decays(f"{name}.projection.weight", weight)


def test_recipes_by_name():
    convnext = ConvNextConfig()
    assert recipe_for("auto", convnext) == RECIPES["convnext"]
    assert recipe_for("swin", convnext) == RECIPES["swin"]
    for config in (SwinConfig(), BACKBONES["resnet-18"](), None):
        assert recipe_for("auto", config) == RECIPES["swin"]
    with pytest.raises(
        ValueError, match=r"'sgd' is not known; known are auto, convnext, swin, convnextv2, beit, .*, mae"
    ):
        recipe_for("sgd", None)


def foreign(model_type: str, **values) -> ForeignBackboneConfig:
    return ForeignBackboneConfig(model_type, **values)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (foreign("beit"), "beit"),
        (foreign("beit", num_hidden_layers=24), "beit-large"),
        (foreign("dinov2"), "swin"),
        (foreign("timm_backbone", backbone="beit_base_patch16_224.in22k_ft_in22k"), "beit"),
        (foreign("timm_backbone", backbone="beit_large_patch16_224"), "beit-large"),
        (foreign("timm_backbone", backbone="vit_base_patch16_224.mae"), "mae"),
        (foreign("timm_backbone", backbone="vit_base_patch16_224"), "swin"),
        (foreign("timm_backbone", backbone="beitv2_base_patch16_224"), "swin"),
    ],
)
def test_recipes_of_other_libraries_backbones(config, name):
    assert recipe_for("auto", config) == RECIPES[name]


# Of mmsegmentation 1.2.2, configs/: the optimizer's rate and weight decay, layer_decay_rate, the backbone's
# drop_path_rate and out_indices. The first three have no layer decay.
VISION_TRANSFORMERS = {
    "vit-base-16": ("vit/vit_vit-b16-ln_mln_upernet_8xb2-160k_ade20k-512x512", 6e-5, 0.01, 1, 0.1, [2, 5, 8, 11]),
    "deit-small-16": ("vit/vit_deit-s16_mln_upernet_8xb2-160k_ade20k-512x512", 6e-5, 0.01, 1, 0.1, [2, 5, 8, 11]),
    "deit-base-16": ("vit/vit_deit-b16_mln_upernet_8xb2-160k_ade20k-512x512", 6e-5, 0.01, 1, 0.1, [2, 5, 8, 11]),
    "beit-base-16": ("beit/beit-base_upernet_8xb2-160k_ade20k-640x640", 3e-5, 0.05, 0.9, 0.1, [3, 5, 7, 11]),
    "beit-large-16": ("beit/beit-large_upernet_8xb1-amp-160k_ade20k-640x640", 2e-5, 0.05, 0.95, 0.2, [7, 11, 15, 23]),
    "mae-base-16": ("mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512", 1e-4, 0.05, 0.65, 0.1, [3, 5, 7, 11]),
}


@pytest.mark.parametrize("name", VISION_TRANSFORMERS)
def test_vision_transformers_have_the_published_recipes(name):
    _, rate, weight_decay, layer_decay, drop_path, blocks = VISION_TRANSFORMERS[name]
    config = BACKBONES[name]()
    assert recipe_for("auto", config) == Recipe(rate, weight_decay, layer_decay)
    assert (config.drop_path_rate, [place - 1 for place in config.out_indices]) == (drop_path, blocks)


def mmsegmentation_vit_scale(name: str, layers: int, decay: float) -> float:
    """Return mmsegmentation's `layer_wise_vit`: layer 0 is before the blocks, `layers` + 1 is after them."""
    if name.startswith("backbone.embeddings."):
        layer = 0
    elif name.startswith("backbone.encoder.layers."):
        layer = int(name.split(".")[3]) + 1
    else:
        layer = layers + 1
    return decay ** (layers + 1 - layer)


@pytest.mark.parametrize("name", ["beit-large-16", "mae-base-16"])
def test_groups_of_a_vision_transformer_are_the_published_ones(name):
    config = BACKBONES[name]()
    layers, recipe = config.num_hidden_layers, recipe_for("auto", config)
    groups = parameter_groups(build(config), recipe)
    scales = set()
    for group in groups:
        for parameter_name, parameter in group["params"]:
            scale = mmsegmentation_vit_scale(parameter_name, layers, recipe.layer_decay)
            assert group["lr"] == pytest.approx(recipe.learning_rate * scale, rel=1e-12), parameter_name
            spared = parameter.ndim == 1 or parameter_name.endswith(("_bias_table", "cls_token", "position_embeddings"))
            assert group["weight_decay"] == (0.0 if spared else 0.05), parameter_name
            scales.add(scale)
    assert len(scales) == layers + 2

"""Parameters, buffers and modules have Transformers' order: the state of an optimizer belongs to them by position."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fastuper
from bench.numerics import error
from bench.pairs import VERSION_5, images, pair
from fastuper.models.backbones.registry import checkpoint_names
from fastuper.weights.transformers import hub_name
from tests.parity.models import config, segmentation_labels
from tests.parity.test_training import Samples, with_trainer

SMALL: dict[str, Any] = {"depths": [1, 1, 2, 1]}
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "convnext": ("convnext", {}, {}),
    "convnext-no-layer-scale": ("convnext", {"layer_scale_init_value": 0.0}, {}),
    "convnext-no-auxiliary-head": ("convnext", {}, {"use_auxiliary_head": False}),
    "convnext-concatenation": ("convnext", {}, {"auxiliary_concat_input": True, "auxiliary_num_convs": 2}),
    "convnext-two-levels": ("convnext", {"out_features": ["stage2", "stage4"]}, {"use_auxiliary_head": False}),
    "convnext-pooling": ("convnext", {}, {"pool_scales": [1, 4]}),
    "convnextv2": ("convnextv2", {}, {}),
    "swinv2": ("swinv2", {}, {}),
    "swin": ("swin", {}, {}),
    "swin-absolute-embeddings": ("swin", {"use_absolute_embeddings": True}, {}),
    "swin-no-query-bias": ("swin", {"qkv_bias": False}, {"use_auxiliary_head": False}),
    "swin-drop-path": ("swin", {"drop_path_rate": 0.3}, {}),
    "resnet-basic": ("resnet-basic", {}, {}),
    "resnet-bottleneck": ("resnet-bottleneck", {"downsample_in_first_stage": True}, {}),
    "resnet-no-auxiliary-head": ("resnet-bottleneck", {}, {"use_auxiliary_head": False}),
}
# In Transformers 5 the names differ, and the order inside a block.
RENAMED = [name for name in VARIANTS if VERSION_5 and name.startswith("swin") and name != "swinv2"]


def small(variant: str) -> Any:
    family, backbone, head = VARIANTS[variant]
    return config(family, {**SMALL, **backbone}, **head)


def built(given: Any) -> list[Any]:
    return [library.UperNetForSemanticSegmentation(given) for library in (transformers, fastuper)]


def as_ours(names: list[str], ours: Any) -> list[str]:
    """Return Transformers' names as ours, without tensors that ours does not have."""
    table = checkpoint_names(ours.backbone.config.model_type)
    return [name for name in (hub_name(name, table) for name in names) if name is not None]


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_and_buffers(variant):
    theirs, ours = built(small(variant))
    for kind in ("named_parameters", "named_buffers"):
        expected, names = ([name for name, _ in getattr(model, kind)()] for model in (theirs, ours))
        if variant in RENAMED:
            assert sorted(as_ours(expected, ours)) == sorted(names)
        else:
            assert expected == names
    shapes = [[p.shape for p in model.decode_head.parameters()] for model in (theirs, ours)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in RENAMED])
def test_modules(variant):
    theirs, ours = built(small(variant))
    expected, names = ([name for name, _ in model.named_modules()] for model in (theirs, ours))
    # Transformers' ResNet has no module for the activation that a shortcut does not have.
    assert expected == [name for name in names if not name.endswith("shortcut.activation")]


def test_a_backbone_of_transformers():
    backbone = transformers.PvtV2Config(
        hidden_sizes=[8, 12, 16, 20],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    head = {"hidden_size": 8, "auxiliary_channels": 8, "auxiliary_in_channels": 16}
    theirs, ours = built(transformers.UperNetConfig(backbone_config=backbone, **head))
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]


def test_a_timm_backbone():
    pytest.importorskip("timm")
    backbone = transformers.TimmBackboneConfig(
        backbone="resnet10t", out_indices=[1, 2, 3, 4], use_pretrained_backbone=False
    )
    head = {"hidden_size": 8, "auxiliary_channels": 8, "auxiliary_in_channels": 256}
    theirs, ours = built(transformers.UperNetConfig(backbone_config=backbone, **head))
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]


@pytest.mark.parametrize("variant", ["convnext", "convnextv2", "swin", "swinv2", "resnet-basic"])
def test_weight_decay_of_trainer(tmp_path, variant):
    """Trainer's two groups hold the same parameters: it finds norms by their classes and names."""
    groups = []
    for model in built(small(variant)):
        arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, weight_decay=0.1)
        names = {parameter: name for name, parameter in model.named_parameters()}
        optimizer = transformers.Trainer(model, arguments).create_optimizer()
        groups.append([[names[p] for p in group["params"]] for group in optimizer.param_groups])
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    theirs, ours = groups
    model = built(small(variant))[1]
    for expected, group in zip(theirs, ours, strict=True):
        if variant == "swin" and VERSION_5:
            assert sorted(as_ours(expected, model)) == sorted(group)
        else:
            assert expected == group


OPTIMIZERS: dict[str, Any] = {
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, 1e-3, fused=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-3),
    "sgd-momentum": lambda parameters: torch.optim.SGD(parameters, 1e-2, momentum=0.9),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    optimizer.zero_grad()
    loss = model(images(2, 3, 32, 32, seed=seed), labels=segmentation_labels(2, 32, 32, seed=seed)).loss
    loss.backward()
    optimizer.step()
    return loss.item()


FAST_STEPS = [("convnext", "adamw-fused"), ("resnet-basic", "sgd-momentum"), ("swin", "adamw")]


@pytest.mark.parametrize(
    ("variant", "make"),
    [
        pytest.param(variant, make, marks=[pytest.mark.exhaustive] * ((variant, make) not in FAST_STEPS))
        for variant in ["convnext", "convnextv2", "resnet-basic", "swinv2", *([] if VERSION_5 else ["swin"])]
        for make in OPTIMIZERS
    ],
)
def test_the_state_of_transformers_optimizer(variant, make):
    """The step after loading it is Transformers' step, in float64."""
    theirs, ours = pair(small(variant), train=True)
    optimizers = [OPTIMIZERS[make](model.parameters()) for model in (theirs, ours)]
    step(theirs, optimizers[0], seed=1)
    ours.load_state_dict(theirs.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    before = copy.deepcopy(ours.decode_head.classifier.weight.data)
    losses = [step(model, optimizer, seed=2) for model, optimizer in zip((theirs, ours), optimizers, strict=True)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    for (name, p), (_, expected) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if ".key.bias" not in name:  # its gradient is rounding alone, which AdamW divides by its own size
            assert error(p, expected) < 1e-8, name
    assert error(ours.decode_head.classifier.weight, before) > 1e-5


@pytest.mark.skipif(not VERSION_5, reason="the Swin of Transformers 4 has our parameters")
@pytest.mark.parametrize("trainers", [False, True], ids=["all-parameters", "groups-of-trainer"])
def test_a_swin_state_of_transformers_5_is_refused(trainers):
    """It has two parameters more, of a norm that nothing reads: PyTorch refuses it in one line."""
    theirs, ours = pair(small("swin"), dtype=torch.float32, train=True)

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        kinds = [[p for p in model.parameters() if (p.ndim > 1) == wide] for wide in (True, False)]
        return torch.optim.AdamW([{"params": kind} for kind in kinds] if trainers else model.parameters())

    counts = [len(list(model.parameters())) for model in (theirs, ours)]
    assert counts[0] == counts[1] + 2
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group") as raised:
        optimizer(ours).load_state_dict(optimizer(theirs).state_dict())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "optim", ["adamw_torch_fused", pytest.param("adamw_torch", marks=pytest.mark.exhaustive), "sgd"]
)
def test_trainer_resumes_a_run_of_transformers(tmp_path, optim):
    """The losses after `resume_from_checkpoint` are those that Transformers itself has there."""
    theirs, ours = pair(small("convnext"), dtype=torch.float32, train=True)
    values = {"optim": optim, "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "weight_decay": 0.1}
    if optim == "sgd":
        values["optimizers"] = lambda model: (torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9), None)
    expected = with_trainer(theirs, tmp_path, Samples(8), **values)
    with torch.no_grad():  # all weights come from the checkpoint
        for parameter in ours.parameters():
            parameter.fill_(0.5)
    resumed = with_trainer(ours, tmp_path, Samples(8), resume=str(tmp_path / "checkpoint-2"), **values)
    losses, wanted = ({e["step"]: e["loss"] for e in t.state.log_history if "loss" in e} for t in (resumed, expected))
    assert losses.keys() == wanted.keys() == {1, 2, 3, 4}
    assert [losses[i] for i in (3, 4)] == pytest.approx([wanted[i] for i in (3, 4)], rel=1e-5)
    for p, other in zip(ours.decode_head.parameters(), theirs.decode_head.parameters(), strict=True):
        assert error(p, other) < 1e-3  # in float32, AdamW moves weights with small gradients by other steps
    # Without the optimizer's averages this is 5e-4.
    assert error(ours.decode_head.classifier.weight, theirs.decode_head.classifier.weight) < 1e-5

"""Transformers' UPerNets over ConvNeXt, ResNet and Swin: accelerated in place, they compute what they computed before.

Comparisons in float64 are with the same model before `accelerate`.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from torch.nn.utils import parametrize

import fastuper
from bench.numerics import error, root_mean_square
from bench.pairs import VERSION_5, default_dtype, images, randomize, uninitialized
from fastuper.models.backbones import rewrites
from fastuper.models.heads.conv_module import FusedConv
from fastuper.patch import acceleration
from fastuper.patch.accelerated import REPLACEMENTS, Accelerated
from tests.parity.models import config, segmentation_labels

FAMILIES = ["convnext", "swin", "resnet-basic", "resnet-bottleneck"]
SIZES = [(96, 64), (33, 75), (32, 32)]

ATTENTION = "attention." if VERSION_5 else "attention.self."
SWIN = "backbone.swin.encoder.layers" if VERSION_5 else "backbone.encoder.layers"
STAGES = "backbone.encoder.stages"
# A module of each kind that a block's faster way does not call.
INSIDE = {
    "convnext": [f"{STAGES}.2.layers.1.{name}" for name in ("dwconv", "layernorm", "pwconv1", "act", "pwconv2")],
    "swin": [
        f"{SWIN}.0.blocks.1.attention",
        f"{SWIN}.0.blocks.1.{ATTENTION}{'q_proj' if VERSION_5 else 'query'}",
        f"{SWIN}.0.blocks.1.{'attention.o_proj' if VERSION_5 else 'attention.output.dense'}",
        f"{SWIN}.2.blocks.0.{'mlp' if VERSION_5 else 'intermediate'}",
        f"{SWIN}.2.blocks.0.{'mlp.activation_fn' if VERSION_5 else 'intermediate.intermediate_act_fn'}",
        f"{SWIN}.2.blocks.0.{'mlp.fc2' if VERSION_5 else 'output.dense'}",
        f"{SWIN}.2.blocks.0.layernorm_after",
        f"{SWIN}.0.downsample.reduction",
    ],
    "resnet-bottleneck": [
        f"{STAGES}.0.layers.0.layer.1.convolution",
        f"{STAGES}.0.layers.0.layer.1.normalization",
        f"{STAGES}.0.layers.0.layer.1.activation",
        f"{STAGES}.0.layers.0.shortcut.convolution",
    ],
}
LINEAR = {
    "convnext": f"{STAGES}.2.layers.1.pwconv2",
    "swin": f"{SWIN}.0.blocks.1.{ATTENTION}{'v_proj' if VERSION_5 else 'value'}",
    "resnet-bottleneck": f"{STAGES}.0.layers.0.layer.1.convolution",
}


def made(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **backbone: Any) -> Any:
    """Return Transformers' model in evaluation, with random weights."""
    with uninitialized(), default_dtype(dtype):
        model = transformers.UperNetForSemanticSegmentation(config(family, backbone))
    randomize(model, seed)
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()
    return model.eval()


def accelerated(model: Any) -> Any:
    return fastuper.accelerate(copy.deepcopy(model))


@pytest.fixture
def taken(monkeypatch):
    """The names of the classes whose faster way ran."""
    names, run = [], rewrites.run
    monkeypatch.setattr(rewrites, "run", lambda block, *args: names.append(type(block).__name__) or run(block, *args))
    return names


def outputs(model: Any, pixels: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        output = model(pixels, output_hidden_states=True, **options)
    return [output.logits, *output.hidden_states]


def same(results: Any, expected: Any, tolerance: float = 1e-13) -> None:
    assert len(results) == len(expected)
    for ours, theirs in zip(results, expected, strict=True):
        assert error(ours, theirs) < tolerance


def place(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


# Results --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_in_evaluation(family, taken):
    theirs = made(family)
    ours = accelerated(theirs)
    for size in SIZES:
        pixels = images(2, 3, *size)
        expected = outputs(theirs, pixels)
        same(outputs(ours, pixels), expected)
        assert [x.is_contiguous() for x in outputs(ours, pixels)][:1] == [True]
        same(outputs(ours, pixels.contiguous(memory_format=torch.channels_last)), expected)
        with torch.inference_mode():
            same([ours(pixels).logits], expected[:1])
        labels = segmentation_labels(2, *size)
        with torch.no_grad():
            same([ours(pixels, labels=labels).loss], [theirs(pixels, labels=labels).loss])
    kinds = {"convnext": {"ConvNextLayer"}, "swin": {"SwinLayer", "SwinPatchMerging"}}
    assert set(taken) == kinds.get(
        family, {"ResNetConvLayer", "ResNetShortCut"} - ({"ResNetShortCut"} if "basic" in family else set())
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_training(family, taken):
    """Loss, gradients and statistics; with the same seed the same paths are dropped."""
    options = {} if family.startswith("resnet") else {"drop_path_rate": 0.5}
    if family == "swin":
        options |= {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    theirs = made(family, **options).train()
    ours = accelerated(theirs)
    pixels, labels = images(4, 3, 64, 96), segmentation_labels(4, 64, 96)
    losses = []
    for model in (theirs, ours):
        torch.manual_seed(5)
        losses.append(model(pixels, labels=labels).loss)
        losses[-1].backward()
    same(losses[1:], losses[:1])
    assert bool(taken) is not family.startswith("resnet")
    for (name, parameter), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if expected.grad is None:
            assert parameter.grad is None, name
        else:
            assert (parameter.grad - expected.grad).norm() <= 1e-9 * (1e-3 + expected.grad.norm()), name
    for ours_buffer, buffer in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.allclose(ours_buffer.double(), buffer.double(), rtol=1e-10)


def check_accuracy(family: str, dtype: torch.dtype, autocast: bool, seeds: range) -> None:
    errors: dict[str, list[float]] = {"ours": [], "theirs": [], "channels_last": []}
    for seed in seeds:
        theirs = made(family, torch.float32 if autocast else dtype, seed)
        ours, exact = accelerated(theirs), copy.deepcopy(theirs).double()
        pixels = images(2, 3, 64, 96, seed=seed, dtype=torch.float32 if autocast else dtype)
        with torch.no_grad():
            truth = exact(pixels.double()).logits
            with torch.autocast("cpu", dtype, enabled=autocast):
                errors["ours"].append(error(ours(pixels).logits, truth))
                errors["theirs"].append(error(theirs(pixels).logits, truth))
                pixels = pixels.contiguous(memory_format=torch.channels_last)
                errors["channels_last"].append(
                    error(theirs.to(memory_format=torch.channels_last)(pixels).logits, truth)
                )
    ours_error, *others = map(root_mean_square, errors.values())
    assert ours_error <= max(1.25 * max(others), 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accuracy(family, dtype):
    check_accuracy(family, dtype, autocast=False, seeds=range(2))


@pytest.mark.parametrize("family", FAMILIES)
def test_accuracy_under_autocast(family):
    check_accuracy(family, torch.bfloat16, autocast=True, seeds=range(2))


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accuracy_over_seeds(family, dtype, autocast):
    if dtype == torch.float32 and autocast:
        pytest.skip("autocast to float32 changes nothing")
    check_accuracy(family, dtype, autocast, seeds=range(5))


@pytest.mark.parametrize(
    "act", ["gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_pytorch_tanh", "quick_gelu", "relu"]
)
@pytest.mark.parametrize("family", ["convnext", "swin"])
def test_activations(family, act, taken):
    theirs = made(family, hidden_act=act)
    same(outputs(accelerated(theirs), images(1, 3, 32, 32)), outputs(theirs, images(1, 3, 32, 32)), 1e-9)
    assert taken


def test_a_block_without_layer_scale(taken):
    theirs = made("convnext", layer_scale_init_value=0.0)
    same(outputs(accelerated(theirs), images(1, 3, 32, 32)), outputs(theirs, images(1, 3, 32, 32)))
    assert "ConvNextLayer" in taken


# Options that the faster ways leave to Transformers -------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_attentions(training):
    theirs = made("swin", drop_path_rate=0.0)
    if VERSION_5:
        theirs.set_attn_implementation("eager")
    ours = accelerated(theirs)
    pixels = images(1, 3, 40, 64)
    results = []
    for model in (theirs.train(training), ours.train(training)):
        with torch.set_grad_enabled(training), torch.no_grad() if not training else torch.enable_grad():
            results.append(model(torch.cat([pixels, pixels + 1]), output_attentions=True))
    assert len(results[0].attentions) == 4
    same([*results[1].attentions, results[1].logits], [*results[0].attentions, results[0].logits], 1e-6)
    # Transformers 5 hooks the stages now. The next call has the same result as well.
    same(outputs(ours.eval(), pixels), outputs(theirs.eval(), pixels), 1e-6)


@pytest.mark.skipif(not VERSION_5, reason="Transformers 4 has one implementation of Swin's attention")
def test_another_attention_implementation_is_called(taken):
    calls = []

    def attention(module, query, key, value, mask, scaling, **options):
        calls.append(options)
        weights = (2 * query @ key.transpose(2, 3) * scaling + mask).softmax(-1)
        return (weights @ value).transpose(1, 2), weights

    transformers.AttentionInterface.register("sharper", attention)
    theirs = made("swin")
    before = outputs(theirs, images(1, 3, 32, 32))
    theirs.set_attn_implementation("sharper")
    ours = accelerated(theirs)
    expected = outputs(theirs, images(1, 3, 32, 32))
    count = len(calls)
    same(outputs(ours, images(1, 3, 32, 32)), expected)
    assert len(calls) == 2 * count == 16
    assert error(before[0], expected[0]) > 1e-3
    assert "SwinLayer" not in taken
    assert ours.get_submodule(f"{SWIN}.0.blocks.1").why_not() == "attention: its implementation is 'sharper'"


def test_a_block_that_clamps_its_window(taken):
    """Without `always_partition` a block clamps its window to the map, and keeps the clamped window."""
    theirs = made("swin")
    ours = accelerated(theirs)
    x = images(2, 1, 3, 16)[:, 0].repeat(1, 3, 1)
    results = []
    for model in (theirs, ours):
        block = model.get_submodule(f"{SWIN}.0.blocks.1")
        try:
            with torch.no_grad():
                results.append(block(x, (3, 3), always_partition=False)[0])
        except RuntimeError as exception:  # the bias is for the unclamped window
            results.append(str(exception))
        assert (block.window_size, block.shift_size) == (3, 0)
    assert not taken
    assert type(results[0]) is type(results[1])
    assert results[0] == results[1] if isinstance(results[0], str) else torch.equal(*results)


@pytest.mark.skipif(VERSION_5, reason="Transformers 5 has no head masks")
def test_a_head_mask(taken):
    theirs = made("swin")
    ours = accelerated(theirs)
    x, mask = images(2, 1, 48, 16)[:, 0], torch.tensor([1.0, 0.0], dtype=torch.float64)[:, None, None]
    results = []
    for model in (theirs, ours):
        with torch.no_grad():
            results.append(model.get_submodule(f"{SWIN}.0.blocks.1")(x, (6, 8), mask, False, True))
    assert not taken
    same(results[1], results[0], 1e-15)


def test_gradient_checkpointing():
    theirs = made("swin", drop_path_rate=0.3).train()
    theirs.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    assert theirs.backbone.is_gradient_checkpointing
    ours = accelerated(theirs)
    pixels, labels = images(2, 3, 64, 64), segmentation_labels(2, 64, 64)
    for model in (theirs, ours):
        torch.manual_seed(1)
        model(pixels, labels=labels).loss.backward()
    for (name, parameter), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if expected.grad is not None:
            assert (parameter.grad - expected.grad).norm() <= 1e-8 * (1e-3 + expected.grad.norm()), name


# Touched modules ------------------------------------------------------------------------------------------------------


def doubled(result: Any) -> Any:
    return (2 * result[0], *result[1:]) if isinstance(result, tuple) else 2 * result


class Doubled(nn.Module):
    """A module of a user around another."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return doubled(self.inner(*args, **kwargs))


def hooked(model: nn.Module, name: str) -> None:
    model.get_submodule(name).register_forward_hook(lambda module, args, result: doubled(result))


def replaced(model: nn.Module, name: str) -> None:
    place(model, name, Doubled(model.get_submodule(name)))


def given_forward(model: nn.Module, name: str) -> None:
    module = model.get_submodule(name)
    forward = module.forward
    module.forward = lambda *args, **kwargs: doubled(forward(*args, **kwargs))


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in INSIDE for name in INSIDE[family]])
def test_touched_modules_are_called(family, name, capsys):
    original = made(family)
    plain = outputs(original, images(1, 3, 64, 32))[0]
    for touch in (hooked, replaced, given_forward):
        theirs = copy.deepcopy(original)
        ours = accelerated(original)
        touch(theirs, name)
        touch(ours, name)
        expected = outputs(theirs, images(1, 3, 64, 32))
        assert error(plain, expected[0]) > 1e-7
        same(outputs(ours, images(1, 3, 64, 32)), expected)
        block = ours
        path: list[str] = []
        for part in name.split("."):
            block = block.get_submodule(part)
            path.append(part)
            if isinstance(block, Accelerated) and block.is_shown:
                inside = name[len(".".join(path)) + 1 :]
        parts = [part for part in ours.modules() if isinstance(part, Accelerated) and part.is_shown and part.why_not()]
        assert any(inside in part.why_not() for part in parts)


@pytest.mark.parametrize("family", INSIDE)
def test_hooks_in_training(family):
    """Each hook runs as often as without `accelerate`, and what it returns is used."""
    original = made(family, **({} if family.startswith("resnet") else {"drop_path_rate": 0.5}))
    pixels, labels = images(4, 3, 64, 32), segmentation_labels(4, 64, 32)
    for name in INSIDE[family]:
        results: list[tuple[int, float]] = []
        for model in (copy.deepcopy(original), accelerated(original)):
            calls: list[int] = []

            def hook(module: nn.Module, args: Any, result: Any, calls: list[int] = calls) -> Any:
                calls.append(1)
                return doubled(result)

            model.train().get_submodule(name).register_forward_hook(hook)
            torch.manual_seed(2)
            loss = model(pixels, labels=labels).loss
            loss.backward()
            results.append((len(calls), loss.item()))
        assert results[0][0] == 1
        assert results[1] == pytest.approx(results[0], rel=1e-9), name


@pytest.mark.parametrize("family", LINEAR)
def test_parametrizations(family):
    class Half(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 0.5 * weight

    theirs = made(family)
    plain = outputs(theirs, images(1, 3, 32, 32))[0]
    ours = accelerated(theirs)
    for model in (theirs, ours):
        parametrize.register_parametrization(model.get_submodule(LINEAR[family]), "weight", Half())
    expected = outputs(theirs, images(1, 3, 32, 32))
    assert error(plain, expected[0]) > 1e-6
    same(outputs(ours, images(1, 3, 32, 32)), expected)


@pytest.mark.parametrize("family", ["convnext", "swin"])
def test_quantised_layers_are_called(family):
    theirs = made(family, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch.ao.quantization.quantize_dynamic(theirs, {nn.Linear}, torch.qint8)
    ours = accelerated(theirs)
    same(
        outputs(ours, images(1, 3, 64, 64, dtype=torch.float32)),
        outputs(theirs, images(1, 3, 64, 64, dtype=torch.float32)),
        2e-2,
    )
    with torch.no_grad():
        assert all(part.why_not() for part in ours.modules() if type(part).__name__ in ("ConvNextLayer", "SwinLayer"))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_changed_after_a_forward(family):
    theirs = made(family)
    ours = accelerated(theirs)
    pixels = images(1, 3, 64, 64)
    outputs(ours, pixels)
    for model in (theirs, ours):
        for parameter in model.parameters():
            parameter.data.mul_(1.01)
    same(outputs(ours, pixels), outputs(theirs, pixels))
    for model in (theirs, ours):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        model(pixels, labels=segmentation_labels(1, 64, 64)).loss.backward()
        optimizer.step()
    same(outputs(ours, pixels), outputs(theirs, pixels), 1e-6)  # AdamW divides by gradients near 0


def test_peft(tmp_path):
    """LoRA on layers of the blocks, and a head that is trained and saved whole, around an accelerated model."""
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(target_modules=["pwconv1"], modules_to_save=["decode_head"], r=2, init_lora_weights=False)
    theirs = made("convnext", torch.float32)
    ours = accelerated(theirs)
    adapted = []
    for model in (theirs, ours):
        torch.manual_seed(0)
        adapted.append(peft.get_peft_model(model, options).eval())
    pixels = images(1, 3, 64, 64, dtype=torch.float32)
    same(outputs(adapted[1], pixels), outputs(adapted[0], pixels), 1e-5)
    fastuper.restore(adapted[1])
    # The wrapper holds a copy of the head besides the original.
    fastuper.accelerate(adapted[1])
    assert sum(type(part).__name__ == "UperNetHead" and isinstance(part, Accelerated) for part in ours.modules()) == 2
    same(outputs(adapted[1], pixels), outputs(adapted[0], pixels), 1e-5)


# The object -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_object_stays(family, tmp_path):
    model = made(family)
    expected = outputs(model, images(1, 3, 64, 64))
    parameters, names, children = list(model.parameters()), list(model.state_dict()), list(model.modules())
    classes = [type(part) for part in model.modules()]
    assert fastuper.accelerate(model) is model
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert list(model.state_dict()) == names
    assert list(model.modules()) == children
    assert [type(part).__name__ for part in model.modules()] == [kind.__name__ for kind in classes]
    assert not any(type(part) in REPLACEMENTS for part in model.modules())
    model.save_pretrained(tmp_path)
    loaded = transformers.UperNetForSemanticSegmentation.from_pretrained(tmp_path).eval()
    same(outputs(loaded.double(), images(1, 3, 64, 64)), expected, 1e-6)
    assert fastuper.restore(model) is model
    assert [type(part) for part in model.modules()] == classes
    same(outputs(model, images(1, 3, 64, 64)), expected, 1e-30)


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_and_pickles(family):
    theirs = made(family)
    model = accelerated(theirs)
    for part in model.modules():  # Transformers 5 registers hooks that cannot be pickled
        part._forward_hooks.clear()
        if getattr(part, "_output_capturing_hooks_installed", False):
            part._output_capturing_hooks_installed = False
    dumped = pickle.dumps(model)
    expected = outputs(theirs, images(1, 3, 64, 64))
    same(outputs(model, images(1, 3, 64, 64)), expected)
    for other in (copy.deepcopy(model), pickle.loads(dumped)):
        assert [type(part) for part in other.modules()] == [type(part) for part in model.modules()]
        same(outputs(other, images(1, 3, 64, 64)), expected)
        fastuper.restore(other)
        assert not any(isinstance(part, Accelerated) for part in other.modules())


def compiled(model: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="eager")


class Logits(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixels).logits


def exported(model: Any) -> Any:
    return torch.export.export(Logits(model), (images(1, 3, 64, 64),), strict=False).module()


def check_logits(family: str, transform: Callable[[Any], Any]) -> None:
    theirs = made(family, depths=[1, 1, 1, 1])
    model = transform(accelerated(theirs))
    with torch.no_grad():
        results = [model(images(1, 3, 64, 64)), theirs(images(1, 3, 64, 64))]
    same([results[0] if isinstance(results[0], torch.Tensor) else results[0].logits], [results[1].logits], 1e-12)


@pytest.mark.parametrize(
    "family", ["convnext", *(pytest.param(family, marks=pytest.mark.exhaustive) for family in FAMILIES[1:])]
)
def test_exported(family):
    check_logits(family, exported)


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled(family):
    check_logits(family, compiled)


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["convnext", "swin"])
def test_jit_trace(family):
    theirs = made(family)
    model = accelerated(theirs)
    pixels = images(1, 3, 64, 64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Logits(model), pixels, check_trace=False)
        same([traced(pixels)], [theirs(pixels).logits])


def test_what_is_not_taken():
    with pytest.raises(ValueError, match="ConvNextBackbone is no model that accelerate knows"):
        fastuper.accelerate(made("convnext").backbone)
    model = made("convnext")
    fastuper.accelerate(model)
    with pytest.raises(ValueError, match="is accelerated already"):
        fastuper.accelerate(model)
    block = model.get_submodule(f"{STAGES}.2.layers.1")
    block.__class__ = block.replaces
    with pytest.raises(ValueError, match="is accelerated in part"):
        fastuper.accelerate(model)
    fastuper.restore(model)
    fastuper.accelerate(model)


def test_a_users_block_runs_as_it_is(taken):
    layer = transformers.models.convnext.modeling_convnext.ConvNextLayer

    class Twice(layer):  # type: ignore[misc, valid-type]
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(features)

    theirs = made("convnext")
    theirs.get_submodule(f"{STAGES}.2.layers.1").__class__ = Twice
    ours = accelerated(theirs)
    assert type(ours.get_submodule(f"{STAGES}.2.layers.1")) is Twice
    same(outputs(ours, images(1, 3, 64, 64)), outputs(theirs, images(1, 3, 64, 64)))
    assert taken.count("ConvNextLayer") == 7


def test_a_users_model(taken):
    """A subclass of the model keeps its own forward; the parts inside are accelerated."""

    class Mine(transformers.UperNetForSemanticSegmentation):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = 3 * output.logits
            return output

    theirs = made("convnext")
    theirs.__class__ = Mine
    ours = accelerated(theirs)
    assert type(ours) is Mine
    same(outputs(ours, images(1, 3, 64, 64)), outputs(theirs, images(1, 3, 64, 64)))
    assert taken


def test_other_packages_of_similar_name():
    """ConvNeXt V2 is another package than ConvNeXt; its blocks stay, and the head is accelerated."""
    backbone = transformers.ConvNextV2Config(
        hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    model = transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(backbone_config=backbone, hidden_size=8, auxiliary_channels=8)
    )
    model = model.double().eval()
    randomize(model)
    ours = accelerated(model)
    assert isinstance(ours.decode_head, Accelerated)
    same(outputs(ours, images(1, 3, 64, 64)), outputs(model, images(1, 3, 64, 64)))


def test_labels_of_another_size_are_refused():
    model = accelerated(made("convnext"))
    with pytest.raises(ValueError, match=r"labels must be \(B, H, W\) of the images, \(2, 64, 64\), got \(2, 32, 64\)"):
        model(images(2, 3, 64, 64), labels=segmentation_labels(2, 32, 64))


def test_a_global_hook_sees_the_auxiliary_head():
    model, called = accelerated(made("convnext")), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    try:
        outputs(model, images(1, 3, 64, 64))
    finally:
        handle.remove()
    assert model.auxiliary_head in called


def test_restore_refuses_a_class_that_changed():
    """A parametrization of an accelerated block's own parameter makes a subclass, which holds the parameter."""
    model = accelerated(made("convnext"))
    name = f"{STAGES}.2.layers.1"
    parametrize.register_parametrization(model.get_submodule(name), "layer_scale_parameter", nn.Identity())
    expected = outputs(model, images(1, 3, 64, 64))
    with pytest.raises(ValueError, match=f"the class of {name} has changed to ParametrizedConvNextLayer since"):
        fastuper.restore(model)
    same(outputs(model, images(1, 3, 64, 64)), expected, 1e-30)
    parametrize.remove_parametrizations(model.get_submodule(name), "layer_scale_parameter")
    fastuper.restore(model)
    same(outputs(model, images(1, 3, 64, 64)), expected)


@pytest.mark.parametrize("wrapped", ["prepared", "offloaded"])
def test_restore_after_accelerate_library(wrapped):
    """Hugging Face's Accelerate keeps the forward of the accelerated class on the instance, or calls it."""
    accelerate = pytest.importorskip("accelerate")
    theirs = made("convnext", torch.float32)
    accelerate.state.AcceleratorState._reset_state(True)  # an earlier test may have trained in another precision
    model, pixels, labels = accelerated(theirs), images(1, 3, 64, 64), segmentation_labels(1, 64, 64)
    if wrapped == "prepared":
        accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    else:
        accelerate.cpu_offload(model, execution_device="cpu")
    accelerate.state.AcceleratorState._reset_state(True)
    fastuper.restore(model)
    with torch.no_grad():
        results = [net(pixels.float(), labels=labels).loss for net in (model, theirs)]
    same(results[:1], results[1:], 1e-2 if wrapped == "prepared" else 1e-6)


# What holds the model -------------------------------------------------------------------------------------------------


def test_an_optimizer_goes_on():
    pixels, labels = images(2, 3, 64, 64), segmentation_labels(2, 64, 64)
    losses: list[list[float]] = []
    for accelerates in (False, True):
        model = made("convnext").train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses.append([])
        for step in range(4):
            if accelerates and step == 2:
                fastuper.accelerate(model)
            loss = model(pixels, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-10)
    assert losses[0][3] < losses[0][0]


def test_distributed_data_parallel():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    pixels, labels = images(2, 3, 64, 64), segmentation_labels(2, 64, 64)
    try:
        gradients = []
        for accelerates in (False, True):
            model = made("swin").train()
            parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
            if accelerates:
                assert fastuper.accelerate(parallel) is parallel
            torch.manual_seed(0)
            parallel(pixels, labels=labels).loss.backward()
            gradients.append([p.grad for p in model.parameters()])
    finally:
        torch.distributed.destroy_process_group()
    for expected, ours in zip(*gradients, strict=True):
        if expected is not None:
            assert (ours - expected).norm() <= 1e-9 * (1e-3 + expected.norm())


def test_inside_a_sequential():
    theirs = made("resnet-basic")
    model = nn.Sequential(nn.BatchNorm2d(3).double(), copy.deepcopy(theirs)).eval()
    before = model(images(1, 3, 64, 64)).logits
    assert fastuper.accelerate(model) is model
    assert isinstance(model[1], Accelerated)
    with torch.no_grad():
        same([model(images(1, 3, 64, 64)).logits], [before])


def test_a_pipeline_goes_on():
    model = made("convnext", torch.float32)
    processor = transformers.SegformerImageProcessor(size={"height": 64, "width": 64})
    pipeline = transformers.pipeline("image-segmentation", model=model, image_processor=processor, device="cpu")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 56, 3), dtype=np.uint8))
    before = {segment["label"]: np.asarray(segment["mask"]) for segment in pipeline(picture)}
    assert len(before) > 1
    fastuper.accelerate(model)
    after = {segment["label"]: np.asarray(segment["mask"]) for segment in pipeline(picture)}
    assert before.keys() == after.keys()
    # Two nearly equal logits may change places.
    assert np.mean([before[label] != after[label] for label in before]) < 1e-3


def test_signatures():
    """Each accelerated forward takes what the library's takes, by the same names: the Trainer reads the signature."""
    for family in FAMILIES:
        accelerated(made(family))
    for kind, ours in REPLACEMENTS.items():
        expected, given = (inspect.signature(owner.forward).parameters.values() for owner in (kind, ours))
        assert [(p.name, p.kind, p.default) for p in given] == [(p.name, p.kind, p.default) for p in expected], kind


class Samples(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pixels = images(1, 3, 32, 32, seed=index, dtype=torch.float32)[0]
        return {"pixel_values": pixels, "labels": segmentation_labels(1, 32, 32, seed=index)[0]}


@pytest.mark.parametrize("family", ["convnext", pytest.param("swin", marks=pytest.mark.exhaustive)])
def test_a_trainer_goes_on(family, tmp_path):
    """Accelerated before or after the Trainer is made; two batches make one step."""
    losses = []
    for accelerates in ("never", "before", "after"):
        model = made(family, torch.float32, drop_path_rate=0.2)
        if accelerates == "before":
            fastuper.accelerate(model)
        arguments = transformers.TrainingArguments(
            str(tmp_path / accelerates),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=3,
            logging_steps=1,
            learning_rate=1e-3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            seed=3,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=Samples())
        if accelerates == "after":
            fastuper.accelerate(model)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[2] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_explain(family, capsys):
    model = made(family)
    fastuper.explain(model)
    before = capsys.readouterr().out
    assert "fastuper.accelerate(model)" in before
    fastuper.explain(fastuper.accelerate(model))
    after = capsys.readouterr().out
    for line in after.splitlines():
        if "called as it is" in line:
            assert "fastuper has no faster way" in line or "convolution" in line
    assert "accelerated" in after
    assert all(part.is_fusible() for part in model.modules() if isinstance(part, FusedConv))
    for hidden in ("SwinSelfAttention", "SwinAttention", "GELU", "DropPath"):
        assert hidden not in after


def test_explain_names_what_was_touched(capsys, monkeypatch):
    """A hook on a head does not slow it down; a module is named by its numbers; a replaced module has a row."""

    class Mine(transformers.UperNetForSemanticSegmentation):
        pass

    model = made("convnext")
    model.__class__ = Mine
    fastuper.accelerate(model)
    model.decode_head.register_forward_hook(lambda *_: None)
    model.get_submodule(f"{STAGES}.2.layers.1").dwconv.register_forward_hook(lambda *_: None)
    model.decode_head.psp_modules.blocks[1].layers[0].register_forward_hook(lambda *_: None)
    model.decode_head.fpn_convs[1] = nn.Conv2d(8, 8, 1)
    monkeypatch.setattr(acceleration, "WIDTH", 200)
    fastuper.explain(model)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["the model", "Mine", "as it is", "its class is a subclass of UperNetForSemanticSegmentation"] in rows
    assert ["decode_head", "UperNetHead", "accelerated", "its hook is called too"] in rows
    assert [f"{STAGES}.2.layers.1", "ConvNextLayer", "called as it is", "dwconv: a hook is registered on it"] in rows
    pooling = ["UperNetPyramidPoolingBlock", "called as it is", "module 0: a hook is registered on it"]
    assert ["decode_head.psp_modules.1", *pooling] in rows
    assert ["decode_head.fpn_convs.1", "Conv2d", "called as it is", "it was put in another's place"] in rows

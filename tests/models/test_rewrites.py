"""The backbones' rewrites: the results of the modules, and calls of every touched module."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

from bench.numerics import error
from bench.pairs import images, randomize
from fastuper.models.backbones import resnet, rewrites
from tests.parity.models import BACKBONES, FAMILIES, backbone_config

FAST = ["convnext", "convnextv2", "swin", "swinv2"]
# A linear layer of each kind that a rewrite does not call.
LINEAR = {
    "convnext": ["encoder.stages.1.layers.0.pwconv1", "encoder.stages.2.layers.1.pwconv2"],
    "convnextv2": ["encoder.stages.1.layers.0.pwconv1", "encoder.stages.2.layers.1.pwconv2"],
    "swinv2": [
        "encoder.layers.0.blocks.1.attention.self.query",
        "encoder.layers.0.blocks.0.attention.self.value",
        "encoder.layers.0.blocks.0.attention.self.continuous_position_bias_mlp.0",
        "encoder.layers.2.blocks.1.attention.output.dense",
        "encoder.layers.1.blocks.0.intermediate.dense",
        "encoder.layers.0.blocks.1.output.dense",
    ],
    "swin": [
        "encoder.layers.0.blocks.1.attention.self.query",
        "encoder.layers.0.blocks.0.attention.self.value",
        "encoder.layers.2.blocks.1.attention.output.dense",
        "encoder.layers.1.blocks.0.intermediate.dense",
        "encoder.layers.0.blocks.1.output.dense",
        "encoder.layers.0.downsample.reduction",
    ],
}
OTHERS = {
    "convnext": [
        "encoder.stages.0.layers.1.dwconv",
        "encoder.stages.0.layers.1.layernorm",
        "encoder.stages.0.layers.1.act",
        "encoder.stages.0.layers.1.drop_path",
    ],
    "convnextv2": [
        "encoder.stages.0.layers.1.dwconv",
        "encoder.stages.0.layers.1.layernorm",
        "encoder.stages.0.layers.1.act",
        "encoder.stages.0.layers.1.grn",
        "encoder.stages.0.layers.1.drop_path",
    ],
    "swinv2": [
        "encoder.layers.0.blocks.1.attention",
        "encoder.layers.0.blocks.1.attention.self",
        "encoder.layers.0.blocks.1.attention.self.key",
        "encoder.layers.0.blocks.1.attention.self.continuous_position_bias_mlp",
        "encoder.layers.0.blocks.1.attention.output",
        "encoder.layers.0.blocks.1.attention.output.dropout",
        "encoder.layers.0.blocks.1.layernorm_before",
        "encoder.layers.0.blocks.1.layernorm_after",
        "encoder.layers.0.blocks.1.intermediate",
        "encoder.layers.0.blocks.1.intermediate.intermediate_act_fn",
        "encoder.layers.0.blocks.1.output",
        "encoder.layers.0.blocks.1.output.dropout",
        "encoder.layers.0.blocks.1.drop_path",
        "encoder.layers.0.downsample.reduction",
    ],
    "swin": [
        "encoder.layers.0.blocks.1.attention",
        "encoder.layers.0.blocks.1.attention.self",
        "encoder.layers.0.blocks.1.attention.output",
        "encoder.layers.0.blocks.1.attention.output.dropout",
        "encoder.layers.0.blocks.1.layernorm_before",
        "encoder.layers.0.blocks.1.layernorm_after",
        "encoder.layers.0.blocks.1.intermediate",
        "encoder.layers.0.blocks.1.intermediate.intermediate_act_fn",
        "encoder.layers.0.blocks.1.output",
        "encoder.layers.0.blocks.1.output.dropout",
        "encoder.layers.0.blocks.1.drop_path",
    ],
}
PATHS = [(family, path) for family in FAST for path in LINEAR[family]]
ALL_PATHS = PATHS + [(family, path) for family in FAST for path in OTHERS[family]]


def build(family: str, dtype: torch.dtype = torch.float64, **values: Any) -> nn.Module:
    import fastuper
    from fastuper.models.backbones import build_backbone

    model = build_backbone(backbone_config(family, fastuper, **values))
    randomize(model)
    return model.to(dtype).eval()


@torch.no_grad()
def maps(model: nn.Module, pixels: torch.Tensor) -> list[torch.Tensor]:
    output = model(pixels, output_hidden_states=True)
    return [*output.feature_maps, *output.hidden_states]


def slow_maps(model: nn.Module, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Return the result of the modules themselves, called one after another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewrites, "on_cpu_without_gradients", lambda *_: False)
        return maps(model, pixels)


@pytest.fixture
def mlps(monkeypatch):
    """Count the blocks that are rewritten for inference."""
    calls = []
    for name in ("residual_mlp", "residual_grn_mlp", "_after_attention"):
        rewritten = getattr(rewrites, name)
        monkeypatch.setattr(rewrites, name, lambda *a, rewritten=rewritten: calls.append(1) or rewritten(*a))
    return calls


def check(model: nn.Module, pixels: torch.Tensor | None = None, bound: float = 1e-14) -> None:
    pixels = images(2, 3, 70, 99) if pixels is None else pixels
    for result, expected in zip(maps(model, pixels), slow_maps(model, pixels), strict=True):
        assert result.dtype == expected.dtype
        assert error(result, expected) <= bound


@pytest.mark.parametrize("size", [(1, 1), (1, 77), (31, 33), (64, 96), (130, 67)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_function(family, batch, size, mlps):
    check(build(family), images(batch, 3, *size))
    assert len(mlps) == (8 if family in FAST else 0)


@pytest.mark.parametrize("family", [family for family in FAMILIES if "swin" not in family])  # PyTorch's attention fails
@pytest.mark.parametrize("scale", [0.0, 0.1])
def test_an_empty_batch(family, scale, mlps):
    """The rewrites accept all inputs that the modules accept."""
    model = build(family, **({"layer_scale_init_value": scale} if family == "convnext" else {}))
    pixels = images(2, 3, 70, 99)[:0]
    with torch.enable_grad():
        expected = model(pixels).feature_maps
    result = maps(model, pixels)[: len(expected)]
    assert [x.shape for x in result] == [x.shape for x in expected]
    assert [x.dtype for x in result] == [x.dtype for x in expected]
    assert mlps or family not in FAST


@pytest.mark.parametrize("kind", ["strided", "expanded"])
@pytest.mark.parametrize(("family", "path"), PATHS)
def test_biases_of_any_strides(family, path, kind, mlps):
    model = build(family, torch.float32)
    layer = model.get_submodule(path)
    values = torch.linspace(-1, 1, 2 * layer.out_features)
    values = values[::2] if kind == "strided" else values[:1].expand(layer.out_features)
    layer.bias = nn.Parameter(values)
    assert layer.bias.stride() == values.stride() != (1,)
    check(model, images(2, 3, 70, 99).float(), 1e-5)
    assert mlps


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu", "silu", "quick_gelu"])
@pytest.mark.parametrize("family", FAST)
def test_any_activation(family, act, mlps):
    check(build(family, hidden_act=act))
    assert mlps


@pytest.mark.parametrize("family", FAST)
def test_activations_in_place(family, mlps):
    """In training, the backward pass computes the activation again, from its input."""
    model, gradients = build(family), []
    for inplace in (False, True):
        for name in [name for name, _ in model.named_modules()]:
            if name.endswith((".act", "act_fn")):
                model.set_submodule(name, nn.ELU(inplace=inplace))
        check(model)
        model.zero_grad()
        sum(x.square().mean() for x in model(images(1, 3, 64, 64)).feature_maps).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert mlps
    assert error(*gradients) < 1e-12


@pytest.mark.parametrize(
    "values", [{"qkv_bias": False}, {"use_absolute_embeddings": True}, {"window_size": 7}], ids=str
)
def test_variants_of_swin(values, mlps):
    check(build("swin", **values))
    assert mlps


def test_without_layer_scale(mlps):
    check(build("convnext", layer_scale_init_value=0.0))
    assert mlps


@pytest.mark.parametrize("positions", [1, 7, 100])
@pytest.mark.parametrize("family", FAST)
def test_the_size_of_the_parts_changes_nothing(family, positions, monkeypatch):
    monkeypatch.setattr(rewrites, "HIDDEN_BYTES", positions * 64 * 8)
    check(build(family))


@pytest.mark.parametrize("positions", [7, 10**6])
def test_a_large_hidden_layer_is_computed_twice(positions, monkeypatch):
    block, x, calls, norm = build("convnextv2").encoder.stages[0].layers[0], images(2, 16, 9, 13), [], F.layer_norm
    monkeypatch.setattr(rewrites, "HIDDEN_BYTES", positions * 64 * 8)
    monkeypatch.setattr(rewrites, "KEPT_BYTES", 100 * 64 * 8)
    monkeypatch.setattr(F, "layer_norm", lambda x, *a: calls.append(len(x)) or norm(x, *a))
    with torch.no_grad():
        result = block(x)
    assert sum(calls) == 2 * 2 * 9 * 13
    assert error(result, block(x)) < 1e-14


@pytest.mark.parametrize("positions", [7, 10**6])
@pytest.mark.parametrize("way", ["parameter", "hook"])
def test_a_gradient_from_the_norm_that_is_called(way, positions, monkeypatch):
    """A Swin block's first norm may be the user's own: its gradient flows through the rewritten attention."""
    monkeypatch.setattr(rewrites, "HIDDEN_BYTES", positions * 64 * 8)
    model, pixels = build("swin").requires_grad_(False), images(1, 3, 64, 64)
    norm = model.encoder.layers[0].blocks[1].layernorm_before
    leaf = norm.weight.requires_grad_() if way == "parameter" else torch.ones_like(norm.weight).requires_grad_()
    if way == "hook":
        norm.register_forward_hook(lambda module, args, output: output * leaf)
    gradients = []
    for rewritten in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not rewritten:
                patch.setattr(rewrites, "on_cpu_without_gradients", lambda *_: False)
            loss = sum(x.square().mean() for x in model(pixels).feature_maps[:2])
            gradients += torch.autograd.grad(loss, leaf)
    assert gradients[1].norm() > 0
    assert error(*gradients) < 1e-12


@pytest.mark.parametrize("family", FAST)
def test_modules_are_called_where_gradients_flow(family, mlps):
    model, pixels = build(family), images(1, 3, 64, 64)
    model(pixels)
    assert not mlps
    model.requires_grad_(False)
    model(pixels.requires_grad_())
    assert not mlps
    model(pixels.detach())
    assert mlps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_types(family, dtype, autocast):
    """The dtypes are those of the modules' results; tests/parity/test_accuracy.py measures the accuracy."""
    if autocast and dtype == torch.float16:
        pytest.skip("PyTorch's norms take no bfloat16 with weights of float16")
    model, pixels = build(family, dtype), images(1, 3, 64, 96, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        check(model, pixels, bound=1e-5 if dtype == torch.float32 and not autocast else 0.05)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_channels_last_inside(family, memory_format):
    model, pixels = build(family), images(2, 3, 64, 96).contiguous(memory_format=memory_format)
    with torch.no_grad():
        output = model(pixels, output_hidden_states=True)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in output.feature_maps)
    if not family.startswith("convnext"):  # its hidden states are channels_last in Transformers too
        assert all(x.is_contiguous() for x in output.hidden_states)


@pytest.mark.parametrize("hook", ["forward", "forward_pre", "full_backward"])
@pytest.mark.parametrize(("family", "path"), ALL_PATHS)
def test_hooks_are_called(family, path, hook):
    model, seen = build(family), []
    module = model.get_submodule(path)
    getattr(module, f"register_{hook}_hook")(lambda *_: seen.append(1))
    check(model)
    calls = 4 if family == "swinv2" and path.endswith("drop_path") else 2  # a Swin V2 block drops both branches
    assert len(seen) == (0 if hook == "full_backward" else calls)


@pytest.mark.parametrize("family", FAST)
def test_hooks_on_all_modules_are_called(family):
    model, seen = build(family), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        maps(model, images(1, 3, 64, 64))
    finally:
        handle.remove()
    assert {model.get_submodule(path) for path in LINEAR[family] + OTHERS[family]} <= set(seen)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


class Cubed(nn.Linear):
    """Swin V2's norms and cosines would undo a factor."""

    def forward(self, x):
        return super().forward(x) ** 3


def parametrized(model, path):
    parametrize.register_parametrization(model.get_submodule(path), "weight", Doubled())


def pruned(model, path):
    prune.l1_unstructured(model.get_submodule(path), "weight", amount=0.5)


def replaced(model, path):
    parent, _, name = path.rpartition(".")
    old = model.get_submodule(path)
    new = Cubed(old.in_features, old.out_features, bias=old.bias is not None, dtype=old.weight.dtype)
    new.load_state_dict(old.state_dict())
    setattr(model.get_submodule(parent), name, new)


def wrapped(model, path):
    """Replace a module's forward on the instance, as offloading does."""
    module = model.get_submodule(path)
    forward = module.forward
    module.forward = lambda x: forward(x).flip(-1)


def adapted(model, path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=[path], init_lora_weights=False)
    peft.inject_adapter_in_model(lora, model)
    model.double().eval()


@pytest.mark.parametrize("touch", [parametrized, pruned, replaced, wrapped, adapted])
@pytest.mark.parametrize(("family", "path"), PATHS)
def test_touched_modules_are_called(family, path, touch):
    model = build(family)
    before = maps(model, images(2, 3, 70, 99))
    touch(model, path)
    check(model)
    assert error(maps(model, images(2, 3, 70, 99))[-1], before[-1]) > 1e-6


@pytest.mark.parametrize("family", FAST)
def test_training_mode_drops_paths(family, mlps):
    model = build(family, drop_path_rate=0.5, **({"hidden_dropout_prob": 0.1} if "swin" in family else {})).train()
    torch.manual_seed(0)
    maps(model, images(1, 3, 64, 64))
    assert len(mlps) == (1 if family.startswith("convnext") else 0)  # the first block's rate is 0


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_changed_are_used(family):
    model, pixels = build(family, torch.float32), images(1, 3, 64, 64, dtype=torch.float32)
    before = maps(model, pixels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    check(model, pixels, bound=1e-5)
    for parameter in model.parameters():
        parameter.data.mul_(0.5)
    check(model, pixels, bound=1e-5)
    assert error(maps(model, pixels)[-1], before[-1]) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_kept_in_the_model(family):
    model, pixels = build(family), images(1, 3, 64, 64)
    state, size = list(model.state_dict()), len(pickle.dumps(model))
    expected = maps(model, pixels)
    assert list(model.state_dict()) == state
    assert len(pickle.dumps(model)) == size
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for result, other in zip(maps(again, pixels), expected, strict=True):
            assert torch.equal(result, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_inference_mode_then_training(family):
    rewrites._cached_window_plan.cache_clear()
    model, pixels = build(family), images(2, 3, 64, 64)
    with torch.inference_mode():
        inferred = model(pixels).feature_maps
    output = model.train()(pixels)
    output.feature_maps[-1].sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.eval()
    for result, expected in zip(maps(model, pixels), inferred, strict=False):
        assert family.startswith("resnet") or torch.equal(result, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_threads(family):
    rewrites._cached_window_plan.cache_clear()
    model, results, errors = build(family), {}, []
    sizes = [(64, 64 + 8 * i) for i in range(4)]

    def work(i: int) -> None:
        try:
            results[i] = maps(model, images(1, 3, *sizes[i % 4]))
        except Exception as problem:
            errors.append(problem)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for i, given in results.items():
        for result, expected in zip(given, maps(model, images(1, 3, *sizes[i % 4])), strict=True):
            assert torch.equal(result, expected)


def test_plans_are_bounded_and_no_inference_tensors():
    rewrites._cached_window_plan.cache_clear()
    with torch.inference_mode(), torch.device("meta"):
        plan = rewrites.window_plan(1, 30, 20, (7, 7), (3, 3), True, torch.float32)
    assert not any(t.is_inference() or t.is_meta for t in (plan.gather, plan.padding, plan.scatter, plan.mask))
    for width in range(1, 60):
        rewrites.window_plan(1, 5, width, (4, 4), (2, 2), True, torch.float32)
    assert rewrites._cached_window_plan.cache_info().currsize <= 32
    before = rewrites._cached_window_plan.cache_info()
    rewrites.window_plan(1, 1024, 1024, (7, 7), (3, 3), True, torch.float32)  # too large for the cache
    assert rewrites._cached_window_plan.cache_info() == before


def test_functorch_and_tracing_take_the_modules(mlps):
    for family in FAST:
        rewrites._cached_window_plan.cache_clear()
        model, pixels = build(family), images(2, 3, 64, 64)
        with torch.no_grad():
            mapped = torch.func.vmap(lambda x, model=model: model(x[None]).feature_maps[-1][0])(pixels)
        assert not mlps
        assert rewrites._cached_window_plan.cache_info().currsize == 0
        assert error(mapped, maps(model, pixels)[3]) < 1e-14
        mlps.clear()


def test_flops_are_counted(mlps):
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for family in FAST:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            build(family)(images(1, 3, 64, 64))
        counts.append(counter.get_total_flops())
    assert not mlps
    assert min(counts) > 1e6


# ResNet's convolutions with their norms ------------------------------------------------------------------------------

RESNET_PARTS = ["convolution", "normalization", "activation"]


def resnet_layer(model: nn.Module) -> Any:
    return model.encoder.stages[0].layers[0].layer[0]


@pytest.mark.parametrize("family", ["resnet-basic", "resnet-bottleneck"])
def test_resnets_convolutions_take_their_norms_along(family, monkeypatch):
    model, calls, rewritten = build(family), [], rewrites.conv_bn_relu
    monkeypatch.setattr(rewrites, "conv_bn_relu", lambda *a, **k: calls.append(1) or rewritten(*a, **k))
    maps(model, images(1, 3, 64, 64))
    convolutions = [m for m in model.modules() if isinstance(m, resnet.ResNetConvLayer)]
    strided = [m for m in convolutions if m.convolution.stride != (1, 1)]
    assert len(calls) == len(convolutions) - len(strided) > 2
    model(images(1, 3, 64, 64))
    assert len(calls) == len(convolutions) - len(strided), "gradients flow"


@pytest.mark.parametrize("part", RESNET_PARTS)
@pytest.mark.parametrize("touch", ["hook", "pre-hook", "forward", "replaced"])
def test_touched_parts_of_a_resnet_are_called(part, touch):
    model = build("resnet-bottleneck")
    layer = resnet_layer(model)
    module = getattr(layer, part)
    before = maps(model, images(2, 3, 70, 99))
    if touch == "hook":
        module.register_forward_hook(lambda module, args, output: output + 1)
    elif touch == "pre-hook":
        module.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    elif touch == "forward":
        wrapped(model, "encoder.stages.0.layers.0.layer.0." + part)
    else:
        setattr(layer, part, nn.Sequential(module, Doubled()))
    check(model)
    assert error(maps(model, images(2, 3, 70, 99))[-1], before[-1]) > 1e-6


@pytest.mark.parametrize("kind", ["parametrized", "other activation", "bias", "training", "no statistics"])
def test_other_resnets(kind):
    model = build("resnet-bottleneck", **({"hidden_act": "gelu"} if kind == "other activation" else {}))
    layer = resnet_layer(model)
    if kind == "parametrized":
        parametrized(model, "encoder.stages.0.layers.0.layer.0.convolution")
    elif kind == "bias":
        layer.convolution.bias = nn.Parameter(torch.randn(layer.convolution.out_channels, dtype=torch.float64))
    elif kind == "training":
        layer.normalization.train()
        layer.normalization.momentum = 0.0
    elif kind == "no statistics":
        layer.normalization.running_mean = layer.normalization.running_var = None
    check(model)


def test_a_resnets_statistics_that_changed_are_used():
    model = build("resnet-bottleneck")
    before = maps(model, images(2, 3, 70, 99))
    resnet_layer(model).normalization.running_mean.add_(0.3)
    assert error(maps(model, images(2, 3, 70, 99))[-1], before[-1]) > 1e-6
    resnet_layer(model).convolution.weight.data.mul_(2)
    check(model)


def test_the_families_that_are_tested_here():
    assert set(FAST) <= set(BACKBONES)

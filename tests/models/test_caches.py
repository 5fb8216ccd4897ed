"""Caches: not part of a model's state, safe for threads, freed with the model, and unused by transformations."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import fastuper.models.heads.strips
from fastuper_kernels.cpu import band, packs
from tests.models.heads import Listed, as_written, error, feature_maps, head, randomize
from tests.models.test_upernet import model as small_model

WIDE = 64
SIZES = [(18, 20), (9, 10), (5, 5), (3, 3)]


@pytest.fixture(autouse=True)
def forgotten():
    forget()


def forget():
    packs.clear()
    for cache in (band.bilinear_chain, band.bilinear_taps, band.blocks_of, band._extents):
        cache.cache_clear()


def wide_maps(**values):
    return feature_maps(**{"sizes": SIZES, **values})


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return len(buffer.getvalue())


# Copies --------------------------------------------------------------------------------------------------------------


def test_a_call_does_not_change_the_model():
    model = small_model("resnet", hidden_size=WIDE)
    sizes, attributes = (len(pickle.dumps(model)), saved(model)), {k: set(vars(m)) for k, m in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    pixels = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        expected = model(pixels).logits
    model.segment(pixels)
    assert packs.packed_bytes() > 0
    assert (len(pickle.dumps(model)), saved(model)) == sizes
    assert {k: set(vars(m)) for k, m in model.named_modules()} == attributes
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(other(pixels).logits, expected)


def test_a_copy_has_packs_of_its_own():
    model, maps = head(WIDE), wide_maps()
    with torch.no_grad():
        before = model(maps)
        other = copy.deepcopy(model)
        randomize(other, 7)
        assert error(other(maps), as_written(other, maps)) < 2e-6
        assert torch.equal(model(maps), before)
        assert error(other(maps), before) > 1e-3


# Memory --------------------------------------------------------------------------------------------------------------


def test_packs_are_freed_with_the_model():
    maps = wide_maps()
    models = [head(WIDE, seed) for seed in range(3)]
    with torch.no_grad():
        for model in models:
            model(maps)
        one = packs.packed_bytes() / 3
        assert one > 0
        del model
        for left in (2, 1, 0):
            models.pop()
            gc.collect()
            assert packs.packed_bytes() == one * left


def test_packs_of_converted_weights_are_replaced():
    model, maps = head(WIDE), wide_maps()
    with torch.no_grad():
        model(maps)
        before = packs.packed_bytes()
        for _ in range(3):
            model.double().float()
            model(maps)
            assert packs.packed_bytes() == before


def test_packs_of_changed_weights_are_replaced():
    model, maps = head(WIDE), wide_maps()
    with torch.no_grad():
        model(maps)
        before = packs.packed_bytes()
        for _ in range(3):
            model.fpn_bottleneck.conv.weight.mul_(1.1)
            model(maps)
    assert packs.packed_bytes() == before


def test_number_of_packs_is_bounded(monkeypatch):
    monkeypatch.setattr(packs, "MAX_PACKS", 3)
    maps = wide_maps()
    models = [head(WIDE, seed) for seed in range(3)]
    with torch.no_grad():
        expected = [as_written(model, maps) for model in models]
        for _ in range(2):
            for model, logits in zip(models, expected, strict=True):
                assert error(model(maps), logits) < 2e-6
                assert len(packs._entries) <= 3


def test_number_of_bands_is_bounded():
    model = head()
    with torch.no_grad():
        for height in range(1, 60):
            model(feature_maps(1, [(2 * height, 9), (height, 5), (height, 3), (height, 2)]))
    for cache in (band.bilinear_chain, band.bilinear_taps, band.blocks_of, band._extents):
        assert cache.cache_info().currsize <= band.MAX_KEPT


def test_training_makes_no_packs():
    model = head(WIDE).train()
    model(wide_maps()).sum().backward()
    assert packs.packed_bytes() == 0


# Threads -------------------------------------------------------------------------------------------------------------


def test_eight_threads_on_one_model():
    model = head(WIDE)
    inputs = [
        wide_maps(seed=seed, sizes=SIZES if seed % 2 else [(16, 16), (8, 8), (4, 4), (2, 2)]) for seed in range(8)
    ]

    def run(maps):
        with torch.no_grad():
            return [model(maps) for _ in range(4)]

    with torch.no_grad():
        expected = [as_written(model, maps) for maps in inputs]
    with ThreadPoolExecutor(8) as threads:
        for results, logits in zip(threads.map(run, inputs), expected, strict=True):
            assert all(error(result, logits) < 2e-6 for result in results)


def test_eight_threads_that_make_and_free_models():
    maps = wide_maps()

    def run(seed):
        results = []
        for i in range(3):
            model = head(WIDE, seed + 8 * i)
            with torch.no_grad():
                results.append(model(maps))
        return results

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(run, range(8)))
    for seed, results in enumerate(found):
        for i, result in enumerate(results):
            model = head(WIDE, seed + 8 * i)
            with torch.no_grad():
                assert error(result, as_written(model, maps)) < 2e-6
    del model
    gc.collect()
    assert packs.packed_bytes() == 0


# Modes ---------------------------------------------------------------------------------------------------------------


def test_bands_made_in_inference_mode_are_used_in_training():
    model, maps = head(WIDE), wide_maps()
    with torch.inference_mode():
        model(maps)
        model.train()
        model(maps)  # without gradients: the next call uses the same bands
    other = copy.deepcopy(model)
    model(maps).square().mean().backward()
    as_written(other, maps).square().mean().backward()
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert error(ours.grad, theirs.grad) < 2e-4, name


def test_packs_made_in_inference_mode_are_used_outside_of_it():
    model, maps = head(WIDE), wide_maps()
    with torch.inference_mode():
        expected = model(maps)
    with torch.no_grad():
        result = model(maps)
    assert torch.equal(result, expected)
    assert not result.is_inference()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    maps[0].requires_grad_()
    model(maps).sum().backward()
    assert maps[0].grad.isfinite().all()


def test_the_first_call_under_other_defaults():
    """No cached tensor depends on PyTorch's default device or dtype."""
    model, maps = head(WIDE), wide_maps()
    with torch.no_grad():
        expected = as_written(model, maps)
        with torch.device("meta"):
            assert error(model(maps), expected) < 2e-6
        assert packs.packed_bytes() > 0  # a default device does not change the path
        forget()
        torch.set_default_dtype(torch.float64)
        try:
            result = model(maps)
        finally:
            torch.set_default_dtype(torch.float32)
        assert result.dtype == torch.float32
        assert error(result, expected) < 2e-6
        assert error(model(maps), expected) < 2e-6


def test_the_meta_device():
    model = head(WIDE).to("meta")
    with torch.no_grad():
        assert model([x.to("meta") for x in wide_maps()]).shape == (2, 5, 18, 20)
    assert packs.packed_bytes() == 0


def test_modes_that_count_operations():
    """A dispatch mode gets PyTorch's own operators. This mode hooks every module, and each module is called."""
    model, maps = head(WIDE), wide_maps(batch=1)
    with torch.no_grad():
        with FlopCounterMode(display=False) as ours:
            result = model(maps)
        with FlopCounterMode(display=False) as written:
            expected = as_written(model, maps)
    assert packs.packed_bytes() == 0
    assert error(result, expected) < 2e-6
    assert ours.get_total_flops() == written.get_total_flops() > 0
    assert "UperNetHead.fpn_bottleneck.conv" in ours.get_flop_counts()


def test_modes_that_intercept_functions():
    class Recording(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.conv2d:
                seen.append(args[1].shape)
            return function(*args, **(kwargs or {}))

    seen, model = [], head(WIDE)
    with torch.no_grad(), Recording():
        model(wide_maps())
    assert len(seen) > 12
    assert packs.packed_bytes() == 0


# Transformations -----------------------------------------------------------------------------------------------------


def functional(model, maps, parameters):
    return torch.func.functional_call(model, parameters, (maps,))


def test_functional_call():
    model, maps = head(WIDE), wide_maps()
    with torch.no_grad():
        model(maps)
        for seed in (1, 2):
            other = head(WIDE, seed)
            result = functional(model, maps, {**dict(other.named_parameters()), **dict(other.named_buffers())})
            assert error(result, as_written(other, maps)) < 2e-6


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_vmap_over_images(context):
    model, maps = head(WIDE), wide_maps(batch=3)
    with context():
        model(maps)
        result = torch.func.vmap(lambda *one: model([x[None] for x in one])[0])(*maps)
        assert error(result, as_written(model, maps)) < 2e-6


def test_vmap_over_models():
    """An ensemble: the weights have a batch dimension, the input has none."""
    models, maps = [head(WIDE, seed) for seed in range(3)], wide_maps()
    parameters, buffers = torch.func.stack_module_state(models)
    with torch.no_grad():
        result = torch.func.vmap(lambda p, b: functional(models[0], maps, {**p, **b}))(parameters, buffers)
        for one, model in zip(result, models, strict=True):
            assert error(one, as_written(model, maps)) < 2e-6


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_func_grad(training):
    model, maps = head(WIDE).train(training), wide_maps()
    other = copy.deepcopy(model)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    loss = lambda p: functional(model, maps, {**p, **{k: v.clone() for k, v in buffers.items()}}).square().mean()  # noqa: E731
    gradients = torch.func.grad(loss)(parameters)
    as_written(other, maps).square().mean().backward()
    for name, parameter in other.named_parameters():
        assert error(gradients[name], parameter.grad) < 2e-4, name


def test_gradients_of_each_sample():
    model, maps = head(), feature_maps(3)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, *one):
        return functional(model, [x[None] for x in one], parameters).square().mean()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0, 0))(parameters, *maps)
    for i in range(3):
        model.zero_grad()
        as_written(model, [x[i : i + 1] for x in maps]).square().mean().backward()
        for name, parameter in model.named_parameters():
            assert error(gradients[name][i], parameter.grad) < 2e-4, name


@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode(requires_grad):
    """Tangents flow also if nothing requires a gradient; the hand-written path would drop them."""
    model, maps = head(WIDE).requires_grad_(requires_grad), wide_maps()
    tangents = wide_maps(seed=1)
    with torch.no_grad() if not requires_grad else torch.enable_grad(), forward_ad.dual_level():
        dual = [forward_ad.make_dual(x, t) for x, t in zip(maps, tangents, strict=True)]
        result = forward_ad.unpack_dual(model(dual)).tangent
        expected = forward_ad.unpack_dual(as_written(model, dual)).tangent
        assert error(result, expected) < 1e-5
    _, same = torch.func.jvp(lambda *x: model(x), tuple(maps), tuple(tangents))
    assert error(same, expected) < 1e-5


def test_several_gradients_at_once():
    model, maps = head(), [x.requires_grad_() for x in feature_maps()]
    logits, expected = model(maps), as_written(model, maps)
    directions = torch.randn(3, *logits.shape)
    ours = torch.autograd.grad(logits, maps, directions, is_grads_batched=True)
    theirs = torch.autograd.grad(expected, maps, directions, is_grads_batched=True)
    assert all(error(x, y) < 1e-4 for x, y in zip(ours, theirs, strict=True))
    logits = model(maps)
    ours = torch.func.vmap(lambda direction: torch.autograd.grad(logits, maps, direction))(directions)
    assert all(error(x, y) < 1e-4 for x, y in zip(ours, theirs, strict=True))


def test_second_derivatives():
    model = head().double()
    maps = [x.double().requires_grad_() for x in feature_maps()]

    def curvature(logits):
        gradients = torch.autograd.grad(logits.square().sum(), maps, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in gradients), maps)

    for ours, theirs in zip(curvature(model(maps)), curvature(as_written(model, maps)), strict=True):
        assert error(ours, theirs) < 1e-10


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    model, other = head(WIDE).train(), head(WIDE).train()
    maps, same = ([x.requires_grad_() for x in wide_maps()] for _ in range(2))
    call = lambda *x: model(x)  # noqa: E731
    torch.utils.checkpoint.checkpoint(call, *maps, use_reentrant=reentrant).square().mean().backward()
    as_written(other, same).square().mean().backward()
    for ours, theirs in zip([*maps, *model.parameters()], [*same, *other.parameters()], strict=True):
        assert error(ours.grad, theirs.grad) < 2e-4


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace():
    """The trace is right at the traced size, and tracing caches nothing."""
    model, maps = head(WIDE), wide_maps()
    with torch.no_grad():
        traced = torch.jit.trace(Listed(model), tuple(maps), check_trace=False)
        assert packs.packed_bytes() == 0
        others = wide_maps(seed=3)
        assert error(traced(*others), as_written(model, others)) < 2e-6


def test_fx_tracing():
    from torch.fx.experimental.proxy_tensor import make_fx

    model, maps = head(), feature_maps()
    with torch.no_grad():
        graph = make_fx(lambda *x: model(x))(*maps)
        others = feature_maps(seed=3)
        assert error(graph(*others), as_written(model, others)) < 2e-6


def test_strips_add_no_packs(monkeypatch):
    model, maps = head(WIDE), feature_maps(sizes=[(32, 20), (16, 10), (8, 5), (4, 3)])
    with torch.no_grad():
        model(maps)
        before = packs.packed_bytes()
        monkeypatch.setattr(fastuper.models.heads.strips, "STRIP_BYTES", 1)
        model(maps)
    assert packs.packed_bytes() == before

"""Memory and layouts: no path of the head makes a map at stride 4 with more than hidden_size channels."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastuper import ResNetConfig, UperNetConfig, UperNetForSemanticSegmentation
from fastuper.models.heads import strips
from fastuper.models.heads.conv_module import ConvModule
from fastuper_kernels import linear
from fastuper_kernels.cpu import upsampled_conv
from tests.models.heads import Listed, as_written, error, feature_maps, head, randomize
from tests.models.test_upernet import BACKBONES
from tests.models.test_upernet import model as small_model

HIDDEN = 64
SIZES = [(40, 48), (20, 24), (10, 12), (5, 6)]


@pytest.fixture(autouse=True, scope="module")
def measured():
    """Measure the choice of a linear layer first, so that its tensors do not count as maps of a head."""
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            linear(torch.ones(2, 8, dtype=dtype), torch.ones(4, 8, dtype=dtype))


class Shapes(TorchDispatchMode):
    """Record the shape of every tensor that an operator returns, forward and backward."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.shapes.update(tuple(x.shape) for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        return result


def assert_narrow(shapes, batch):
    """Check that no map at stride 4 has more than hidden_size channels, in either layout.

    No tensor of another shape is much larger either. The largest tensors are maps resampled along one axis: three taps
    of hidden_size channels at (H / 2, W).
    """
    assert shapes
    for shape in shapes:
        if len(shape) >= 3:
            # No map here has hidden_size columns: a last dimension of hidden_size is that of the channels.
            first = [] if shape[-1] == HIDDEN else [shape[-3:]]
            for channels, height, width in (*first, (shape[-1], *shape[-3:-1])):
                assert channels <= HIDDEN or height < SIZES[0][0] or width < SIZES[0][1], shape
        assert math.prod(shape) <= 1.6 * batch * HIDDEN * SIZES[0][0] * SIZES[0][1], shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_training(dtype):
    """The results of all operators are narrow, forward and backward."""
    model, maps = head(HIDDEN).to(dtype).train(), feature_maps(sizes=SIZES, dtype=dtype)
    with Shapes() as seen:
        model(maps).square().mean().backward()
    assert_narrow(seen.shapes, 2)


class Frozen(nn.Module):
    """A frozen BatchNorm, like those of detectron2 and torchvision."""

    def __init__(self, count):
        super().__init__()
        for name, value in {"scale": 1.5, "shift": 0.1}.items():
            self.register_buffer(name, torch.full((1, count, 1, 1), value))

    def forward(self, x):
        return x * self.scale + self.shift


class Subclass(nn.BatchNorm2d):
    pass


NORMS = {
    "sync": nn.SyncBatchNorm,
    "subclass": Subclass,
    "group": lambda count: nn.GroupNorm(4, count),
    "frozen": Frozen,
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", NORMS)
def test_other_norms(kind, training):
    """Another norm or activation is called, and does not change the path of the convolution before it.

    The activation is smooth: with a ReLU, a rounding error at 0 would change whole gradients.
    """
    model, maps = head(HIDDEN), feature_maps(sizes=SIZES)
    for module in list(model.modules()):
        if isinstance(module, ConvModule):
            module.batch_norm, module.activation = randomize(NORMS[kind](HIDDEN)), nn.SiLU()
    single = copy.deepcopy(model.train(training))
    other = copy.deepcopy(model).double()
    with torch.set_grad_enabled(training), Shapes() as seen:
        result = model(maps)
        if training:
            result.square().mean().backward()
    assert_narrow(seen.shapes, 2)
    truth = as_written(other, [x.double() for x in maps])
    assert error(result, truth) < 1e-5
    if training:
        truth.square().mean().backward()
        as_written(single, maps).square().mean().backward()
        triples = zip(model.named_parameters(), single.parameters(), other.parameters(), strict=True)
        for (name, ours), written, theirs in triples:
            assert error(ours.grad, theirs.grad) < max(2 * error(written.grad, theirs.grad), 1e-5), name
        for (name, ours), theirs in zip(model.named_buffers(), other.buffers(), strict=True):
            assert torch.allclose(ours.double(), theirs.double(), rtol=1e-4, atol=1e-6), name


def test_training_under_the_profiler():
    """A mode changes the path; the profiler records the operators of the usual path."""
    model, maps = head(HIDDEN).train(), feature_maps(sizes=SIZES)
    assert_narrow(profiled(lambda: model(maps).square().mean().backward()), 2)


def profiled(function):
    """Return the shapes of all operators' operands in a call."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        function()
    shapes = set()
    for event in profiler.events():
        shapes.update(tuple(shape) for shape in event.input_shapes if shape and all(type(n) is int for n in shape))
    return shapes


class Written(Listed):
    def forward(self, *maps):
        return as_written(self.head, maps)


def shapes_of(graph):
    """Return the shapes of all values in an exported program."""
    values = [value for node in graph.graph.nodes for value in tree_leaves(node.meta.get("val"))]
    return {tuple(value.shape) for value in values if isinstance(value, torch.Tensor)}


def test_the_check_fails_for_the_network_as_written():
    model, maps = head(HIDDEN), feature_maps(sizes=SIZES)
    with torch.no_grad():
        shapes = profiled(lambda: as_written(model, maps))
        with Shapes() as seen:
            as_written(model, maps)
        graph = torch.export.export(Written(model), tuple(maps))
    for each in (shapes, seen.shapes, shapes_of(graph)):
        assert (2, 4 * HIDDEN, *SIZES[0]) in each
        with pytest.raises(AssertionError):
            assert_narrow(each, 2)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.exhaustive)],
    ids=lambda d: str(d)[6:],
)
@pytest.mark.parametrize("in_strips", [False, True], ids=["whole", "strips"])
def test_inference(dtype, in_strips, monkeypatch):
    if in_strips:
        monkeypatch.setattr(strips, "STRIP_BYTES", 1)
    model, maps = head(HIDDEN).to(dtype), feature_maps(sizes=SIZES, dtype=dtype)
    with torch.no_grad():
        assert_narrow(profiled(lambda: model(maps)), 2)
        with Shapes() as seen:
            model(maps)
    assert_narrow(seen.shapes, 2)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_traced_graph(training):
    model = Listed(head(HIDDEN)).train(training)
    with torch.set_grad_enabled(training):
        graph = torch.export.export(model, tuple(feature_maps(sizes=SIZES)))
    assert_narrow(shapes_of(graph), 2)
    assert_narrow(shapes_of(graph.run_decompositions()), 2)


# Memory --------------------------------------------------------------------------------------------------------------


def peak(function):
    """Return the most bytes that were allocated at a time in a call, beyond those at its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    now = most = 0
    # Allocations (positive) and releases (negative).
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_memory_is_linear_in_the_pixels(training):
    model = head(HIDDEN).train(training)

    def run(factor):
        maps = feature_maps(2, [(factor * h, factor * w) for h, w in SIZES])
        with torch.set_grad_enabled(training):
            model(maps)  # bands and packs
            return peak(lambda: model(maps).sum().backward() if training else model(maps))

    small, large = run(2), run(4)
    assert 1.5 * small < large <= 4.4 * small


def test_memory_of_strips_does_not_grow_with_the_map(monkeypatch):
    """Apart from the coarser levels and the logits, memory holds strips of 64 channels instead of maps."""
    model = head(HIDDEN)
    monkeypatch.setattr(upsampled_conv, "CHUNK_POSITIONS", SIZES[-1][0] * SIZES[-1][1])

    def run(factor):
        maps = feature_maps(1, [(factor * h, w) for h, w in SIZES])
        with torch.no_grad():
            merged = model.top_down(maps[1:-1], model.psp_forward(maps))
            arguments = (model, maps[0], merged[0], model.smooth(merged), model.outputs())
            strips.tail(*arguments)
            logits = 4 * 5 * factor * SIZES[0][0] * SIZES[0][1]
            return peak(lambda: strips.tail(*arguments)) - logits

    monkeypatch.setattr(strips, "STRIP_BYTES", 4 * HIDDEN * SIZES[0][1] * 16)
    small, large = run(4), run(16)
    assert large < 1.1 * small
    monkeypatch.setattr(strips, "STRIP_BYTES", 1 << 40)


# Strips --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:]
)
@pytest.mark.parametrize(
    "sizes",
    [
        [(17, 22), (9, 11), (5, 6), (3, 3)],
        [(33, 5), (17, 3), (9, 2), (5, 1)],
        [(1, 1), (1, 1), (1, 1), (1, 1)],
        [(49, 20), (24, 10), (13, 5), (6, 2)],
        [(16, 16), (40, 3), (4, 30), (7, 7)],
    ],
    ids=["odd", "slim", "one", "three-strips", "any"],
)
@pytest.mark.parametrize("hidden_size", [12, 64])
def test_strips_give_the_same_logits(dtype, sizes, hidden_size, monkeypatch):
    model, maps = head(hidden_size), feature_maps(sizes=sizes)
    with torch.no_grad():
        truth = as_written(copy.deepcopy(model).double(), [x.double() for x in maps])
        model, maps = model.to(dtype), [x.to(dtype) for x in maps]
        # The reference in both layouts: the error of its float32 convolutions in one is twice that in the other.
        wide = {"memory_format": torch.channels_last}
        others = as_written(copy.deepcopy(model).to(**wide), [x.to(**wide) for x in maps])
        written = max(error(other, truth) for other in (as_written(model, maps), others))
        whole = model(maps)
        monkeypatch.setattr(strips, "STRIP_BYTES", 0)
        assert strips.apply_to(model, maps, model.outputs())
        result = model(maps)
    assert result.dtype == whole.dtype == dtype
    eps = torch.finfo(dtype).eps
    # float64 differs from the truth only by its rounding.
    limit = 1e-13 if dtype == torch.float64 else max(1.25 * written, 4 * eps)
    assert error(whole, truth) <= limit
    assert error(result, truth) <= limit
    assert error(result, whole) <= 4 * limit


@pytest.mark.parametrize("rows", [16, 32, 48])
def test_strips_of_any_height(rows, monkeypatch):
    model, maps = head(HIDDEN), feature_maps(1, [(77, 10), (39, 5), (20, 3), (10, 2)])
    with torch.no_grad():
        expected = model(maps)
        monkeypatch.setattr(strips, "STRIP_BYTES", 4 * HIDDEN * 10 * rows)
        assert strips.apply_to(model, maps, model.outputs())
        assert error(model(maps), expected) < 1e-6


# Results ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("in_strips", [False, True], ids=["whole", "strips"])
def test_logits_are_contiguous(family, in_strips, monkeypatch):
    if in_strips:
        monkeypatch.setattr(strips, "STRIP_BYTES", 0)
    model, pixels = randomize(small_model(family, hidden_size=16)), torch.randn(2, 3, 70, 90)
    odd = torch.randn(2, 3, 90, 140).transpose(2, 3)[:, :, ::2]
    layouts = {
        "contiguous": pixels,
        "channels_last": pixels.contiguous(memory_format=torch.channels_last),
        "expanded": pixels[:1].expand(2, -1, -1, -1),
        "strided": odd.contiguous(),
    }
    same = {"strided": odd}
    for name, x in layouts.items():
        for given in (x, same.get(name, x)):
            with torch.no_grad():
                logits = model(given).logits
                assert logits.is_contiguous()
                assert logits.dtype == torch.float32
                assert logits.view(-1).shape == (2 * 5 * x.shape[2] * x.shape[3],)
                assert error(logits, model(x.contiguous()).logits) < 1e-5
        logits = model.train()(x).logits
        assert logits.is_contiguous()
        model.eval()
    one = small_model(family)(torch.randn(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)).logits
    assert one.stride() == (5 * 64 * 64, 64 * 64, 64, 1)


def test_logits_of_a_model_in_channels_last():
    model = randomize(small_model("resnet", hidden_size=64))
    pixels = torch.randn(2, 3, 70, 90)
    with torch.no_grad():
        expected = model(pixels).logits
        result = model.to(memory_format=torch.channels_last)(pixels.to(memory_format=torch.channels_last)).logits
    assert result.is_contiguous()
    assert error(result, expected) < 1e-5


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("in_strips", "training"),
    [(False, False), (True, False), (False, True)],  # training never runs in strips
    ids=["whole-eval", "strips-eval", "whole-train"],
)
def test_autocast(cast, training, in_strips, monkeypatch):
    """The head's logits have autocast's dtype, as with PyTorch's modules; weights keep their dtype."""
    if in_strips:
        monkeypatch.setattr(strips, "STRIP_BYTES", 0)
    model, maps = head(HIDDEN).train(training), feature_maps(sizes=SIZES)
    other = copy.deepcopy(model)
    with torch.set_grad_enabled(training):
        with torch.autocast("cpu", dtype=cast):
            result, written = model(maps), as_written(other, maps)
        truth = as_written(copy.deepcopy(other).double(), [x.double() for x in maps])
    assert result.dtype == written.dtype
    assert error(result, truth) <= max(1.25 * error(written, truth), 4 * torch.finfo(cast).eps)
    if training:
        result.float().square().mean().backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_autocast_changes_nothing_for_later_calls():
    model, maps = head(HIDDEN), feature_maps(sizes=SIZES)
    with torch.no_grad():
        before = model(maps)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype=dtype):
                model(maps)
        assert torch.equal(model(maps), before)


def test_autocast_of_a_float64_model():
    """Autocast does not change float64."""
    model, maps = head(12).double(), feature_maps(dtype=torch.float64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=True):
        assert model(maps).dtype == torch.float64


def test_threads():
    """The caller's number of threads is used and not changed."""
    model, maps = head(HIDDEN), feature_maps(sizes=SIZES)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            with torch.no_grad():
                results.append(model(maps))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    assert error(*results) < 1e-6


def test_inputs_and_weights_are_not_changed():
    model, maps = head(HIDDEN), feature_maps(sizes=SIZES)
    maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    before = [x.clone() for x in maps]
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model(maps)
    assert all(torch.equal(x, y) for x, y in zip(maps, before, strict=True))
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


def test_results_are_new_tensors():
    """A result shares no memory with a cache or with another result."""
    model = UperNetForSemanticSegmentation(
        UperNetConfig(backbone_config=ResNetConfig(embedding_size=16, hidden_sizes=[16, 16, 32, 32], depths=[1] * 4))
    )
    model.eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        first = model(pixels).logits
        kept = first.clone()
        model(torch.randn(1, 3, 64, 64))
        assert torch.equal(first, kept)
        first.zero_()
        assert torch.equal(model(pixels).logits, kept)

"""The PyTorch path, traced: by `torch.compile` and `torch.export`, in evaluation and training, at any size.

Every graph is run at three sizes off the one that it was traced at, none of which is a multiple of the strides.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from fastuper_kernels.cpu import packs
from tests.models.heads import CHANNELS, Listed, error, feature_maps, head, randomize
from tests.models.pooling import pooling_asks
from tests.models.test_upernet import BACKBONES
from tests.models.test_upernet import model as small_model

# (batch, sizes): the first is traced. PyTorch makes graphs of their own for batches of one and for maps of one pixel,
# and for sizes that are equal in the second entry, from which it makes the graph for all sizes. Inductor does so for
# sums of more than 4096 pixels.
HEAD_SIZES = [
    (2, [(20, 28), (10, 14), (5, 7), (3, 4)]),
    (3, [(34, 38), (17, 19), (9, 10), (5, 6)]),
    (4, [(9, 33), (5, 17), (3, 9), (2, 5)]),
    (5, [(21, 7), (11, 4), (6, 2), (3, 2)]),
]
IMAGE_SIZES = [(2, 96, 128), (3, 97, 101), (2, 70, 203), (4, 131, 66)]
# At least two windows in the last stage of a Swin: PyTorch would take a single window for a constant.
SWIN_SIZES = [(2, 160, 192), (3, 177, 231), (2, 161, 200), (4, 229, 165)]
# One graph for the first size, then one for all sizes. A size marked as dynamic needs only the second.
COMPILATIONS = 2
FAMILIES = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.exhaustive] * (name != "convnext")) for name in BACKBONES]
)
MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
# In training the loss, the head and the backbone are traced apart.
MODES_OF_THE_MODEL = pytest.mark.parametrize(
    "training", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["eval", "train"]
)


@pytest.fixture(autouse=True)
def forgotten():
    torch._dynamo.reset()
    packs.clear()
    # The C++ compiler would optimise for minutes, and the code runs for a moment.
    with torch._inductor.config.patch({"aot_inductor.debug_compile": True}):
        yield
    torch._dynamo.reset()


def head_inputs(batch, sizes):
    return tuple(feature_maps(batch, sizes))


def coarse_inputs(batch, sizes):
    """Return the maps of a head over two levels, which is traced in a third of the time."""
    return tuple(feature_maps(batch, sizes[2:], CHANNELS[2:]))


def images_for(family):
    return [image_inputs(*size) for size in (SWIN_SIZES if family.startswith("swin") else IMAGE_SIZES)]


def exported_images_for(family):
    """Return images that share one graph; if PyTorch needs it, their pooled sides are all odd or all even."""
    if family.startswith("resnet") and pooling_asks():
        return [image_inputs(*size) for size in [(2, 96, 128), (3, 99, 103), (2, 72, 204), (4, 131, 67)]]
    return images_for(family)


def parities(family):
    """Return the number of extra graphs for a ResNet, if PyTorch's max pooling needs one for odd and for even sides."""
    return 3 if family.startswith("resnet") and pooling_asks() else 0


def image_inputs(batch, height, width):
    return (torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height)),)


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values).logits


class Labels(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model.segment(pixel_values)


def whole(family, training=False, **values):
    """Return a small model without random depth, so that two of them agree in training."""
    model = randomize(small_model(family, hidden_size=16, **values))
    for module in model.modules():
        if type(module).__name__ == "DropPath":
            module.drop_prob = 0.0
    return model.train(training)


def check_compiled(model, inputs, backend, training, dynamic=None, limit=COMPILATIONS):
    """Compare a compiled module with the eager one at each input, gradients and statistics included."""
    counter = CompileCounterWithBackend(backend)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
    for arguments in inputs:
        with torch.set_grad_enabled(training):
            result, expected = compiled(*arguments), eager(*arguments)
        # Statistics of a few pixels magnify rounding: ResNet's eager float32 result differs by 1e-5 from that in
        # float64, and its gradients by 4e-4.
        assert error(result, expected) < (5e-5 if training else 1e-5)
        if training:
            result.square().mean().backward()
            expected.square().mean().backward()
    if training:
        for (name, ours), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
            if theirs.grad is not None:
                assert (ours.grad - theirs.grad).norm() < 5e-3 * theirs.grad.norm() + 1e-6, name
        for (name, ours), theirs in zip(model.named_buffers(), eager.buffers(), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5), name
    assert counter.frame_count <= limit


def any_sizes(model, arguments):
    """Return `dynamic_shapes` for all batches and sizes; the maps of a head are one argument, `*maps`."""
    shapes = tuple({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO} for _ in arguments)
    return (shapes,) if isinstance(model, Listed) else shapes


def check_exported(model, inputs, training, strict=False):
    """Compare an exported module with the eager one at each input, and return the program."""
    program = torch.export.export(model, inputs[0], dynamic_shapes=any_sizes(model, inputs[0]), strict=strict)
    exported = program.module()
    for arguments in inputs:
        assert error(exported(*arguments), copy.deepcopy(model)(*arguments)) < 1e-5
    return program


# The head alone ------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive  # test_the_model_in_one_graph and test_the_loss_in_one_graph trace the head too
@MODES
def test_the_head_in_one_graph(training):
    model = Listed(head()).train(training)
    check_compiled(model, [head_inputs(*sizes) for sizes in HEAD_SIZES], "eager", training)


@pytest.mark.exhaustive
def test_batches_and_maps_of_one():
    """Each needs one graph of its own."""
    model = Listed(head())
    sizes = [*HEAD_SIZES, (1, HEAD_SIZES[0][1]), (1, HEAD_SIZES[1][1]), (2, [(8, 8), (4, 4), (2, 2), (1, 1)])]
    check_compiled(model, [head_inputs(*size) for size in sizes], "eager", False, limit=COMPILATIONS + 3)


@MODES
def test_the_graph_of_the_head_is_small(training):
    """Compile time grows with the number of nodes."""
    counter = CompileCounterWithBackend("eager")
    with torch.set_grad_enabled(training):
        torch.compile(Listed(head()).train(training), backend=counter, fullgraph=True)(*head_inputs(*HEAD_SIZES[0]))
    assert len(counter.graphs[0].graph.nodes) < 1000


@pytest.mark.parametrize(
    "training",
    # In evaluation test_the_model_exported and test_the_head_exported_without_gradients export the same head.
    [pytest.param(False, marks=pytest.mark.exhaustive), True],
    ids=["eval", "train"],
)
def test_the_head_exported(training):
    model = Listed(head()).train(training)
    program = check_exported(model, [head_inputs(*sizes) for sizes in HEAD_SIZES], training)
    assert packs.packed_bytes() == 0
    resampled = [node for node in program.graph.nodes if "upsample_bilinear2d" in str(node.target)]
    assert len(resampled) >= 6 * 7  # six for each resampled level of a convolution


def test_the_head_exported_without_gradients():
    """BatchNorm is folded in the graph."""
    model = Listed(head())
    with torch.no_grad():
        program = check_exported(model, [head_inputs(*sizes) for sizes in HEAD_SIZES], False)
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert not [node for node in calls if "batch_norm" in str(node.target)]


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_the_head_exported_in_other_dtypes(dtype):
    model = Listed(head(channels=CHANNELS[2:]).to(dtype))
    inputs = [tuple(x.to(dtype) for x in coarse_inputs(*sizes)) for sizes in HEAD_SIZES[:2]]
    with torch.no_grad():
        exported = torch.export.export(model, inputs[0], dynamic_shapes=any_sizes(model, inputs[0])).module()
        for arguments in inputs:
            result, expected = exported(*arguments), model(*arguments)
            assert result.dtype == expected.dtype == dtype
            assert error(result, expected) < 4 * torch.finfo(dtype).eps


def test_a_touched_head_exported():
    """The graph contains the work of a hook."""
    model = head(channels=CHANNELS[2:])
    model.fpn_convs[0].conv.register_forward_hook(lambda module, args, output: output * 1.5)
    check_exported(Listed(model), [coarse_inputs(*sizes) for sizes in HEAD_SIZES[:2]], False)


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)  # Inductor needs two minutes or more for each graph of the backward pass
@MODES
def test_the_head_compiled(training):
    model = Listed(head()).train(training)
    # Inductor takes the sizes in a convolution's backward pass for constants.
    limit = len(HEAD_SIZES) if training else COMPILATIONS
    check_compiled(model, [head_inputs(*sizes) for sizes in HEAD_SIZES], "inductor", training, limit=limit)


@pytest.mark.exhaustive
@MODES
def test_the_head_exported_strictly(training):
    model = Listed(head()).train(training)
    check_exported(model, [head_inputs(*sizes) for sizes in HEAD_SIZES], training, strict=True)


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_the_head_compiled_under_autocast():
    model, inputs = Listed(head()), [head_inputs(*sizes) for sizes in HEAD_SIZES[:2]]
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for arguments in inputs:
            result, expected = compiled(*arguments), model(*arguments)
            assert result.dtype == expected.dtype == torch.bfloat16
            assert error(result, expected) < 0.03


# The whole model -----------------------------------------------------------------------------------------------------


@MODES_OF_THE_MODEL
@FAMILIES
def test_the_model_in_one_graph(family, training):
    model = Logits(whole(family, training))
    # Automatic sizes: each of batch, height and width may differ from one call to the next.
    check_compiled(model, images_for(family), "eager", training, limit=COMPILATIONS + 1 + parities(family))


@pytest.mark.exhaustive  # test_segment_exported and test_the_loss_exported export the model too
@MODES_OF_THE_MODEL
@FAMILIES
def test_the_model_exported(family, training):
    model = Logits(whole(family, training))
    check_exported(model, exported_images_for(family), training)


@pytest.mark.exhaustive
def test_the_loss_in_one_graph():
    model = whole("resnet", True)
    other, counter = copy.deepcopy(model), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for batch, height, width in IMAGE_SIZES[:2]:
        (pixels,) = image_inputs(batch, height, width)
        labels = torch.randint(5, (batch, height, width))
        ours, theirs = compiled(pixels, labels=labels).loss, other(pixels, labels=labels).loss
        assert error(ours, theirs) < 1e-5
        ours.backward()
        theirs.backward()
    assert counter.frame_count <= COMPILATIONS + 1 + parities("resnet")
    for parameter, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert (parameter.grad - expected.grad).norm() < 1e-3 * expected.grad.norm() + 1e-6


class LossAndLogits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, labels):
        output = self.model(pixel_values, labels=labels)
        return output.loss, output.logits


def test_the_loss_exported():
    """The graph contains the logits, because they cannot be computed later."""
    model, (pixels,) = LossAndLogits(whole("convnext", True)), image_inputs(2, 64, 96)
    labels = torch.randint(5, (2, 64, 96))
    loss, logits = torch.export.export(copy.deepcopy(model), (pixels, labels)).module()(pixels, labels)
    expected_loss, expected = copy.deepcopy(model)(pixels, labels)
    assert error(loss, expected_loss) < 1e-5
    assert error(logits, expected) < 1e-5


def test_the_loss_exported_without_logits():
    model, (pixels,) = whole("convnext", True), image_inputs(2, 64, 96)
    labels = torch.randint(5, (2, 64, 96))

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixel_values, labels):
            return self.model(pixel_values, labels=labels, output_logits=False).loss

    program = torch.export.export(Loss(), (pixels, labels))
    assert error(program.module()(pixels, labels), model(pixels, labels=labels).loss) < 1e-5
    made = [node.meta["val"] for node in program.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert len(made) > 100
    assert all(tensor.shape != (2, 5, 64, 96) for tensor in made)


def decided(logits: torch.Tensor) -> torch.Tensor:
    """Return the pixels (B, H, W) whose best class leads by more than float32 rounds: nearly all of them."""
    best = logits.topk(2, dim=1).values
    leads = best[:, 0] - best[:, 1] > 1e-5 * best.abs().max()
    assert leads.float().mean() > 0.99
    return leads


@pytest.mark.exhaustive
def test_segment_in_one_graph():
    """Compiled labels are equal where float32 decides.

    Each number of images needs a graph, because the result is a list of that length.
    """
    model, counter = whole("resnet"), CompileCounterWithBackend("eager")
    compiled = torch.compile(model.segment, backend=counter, fullgraph=True)
    for batch, height, width in [(2, 96, 128), (2, 97, 101), (2, 131, 66), (2, 70, 203)]:
        (pixels,) = image_inputs(batch, height, width)
        clear = decided(model(pixels).logits)
        for ours, theirs, pixel in zip(compiled(pixels), model.segment(pixels), clear, strict=True):
            assert ours.dtype == torch.int64
            assert torch.equal(ours[pixel], theirs[pixel])
    assert counter.frame_count <= COMPILATIONS + 1 + parities("resnet")
    targets = [(50, 60), (97, 40)]
    compiled = torch.compile(model.segment, backend="eager", fullgraph=True)
    for ours, theirs in zip(compiled(pixels, targets), model.segment(pixels, targets), strict=True):
        assert torch.equal(ours, theirs)


def test_segment_exported():
    model = Labels(whole("resnet"))
    inputs = [(pixels[:2],) for (pixels,) in exported_images_for("resnet")]
    program = torch.export.export(model, inputs[0], dynamic_shapes=({2: Dim.AUTO, 3: Dim.AUTO},))
    for (pixels,) in inputs:
        clear = decided(model.model(pixels).logits)
        for ours, theirs, pixel in zip(program.module()(pixels), model(pixels), clear, strict=True):
            assert torch.equal(ours[pixel], theirs[pixel])


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("family", "training"),
    # Inductor's C++ compiler takes a quarter of an hour for a backward pass: one with windows, and one with BatchNorm.
    [*((family, False) for family in BACKBONES), ("swin", True), ("resnet", True)],
)
def test_the_model_compiled(family, training):
    model, inputs = Logits(whole(family, training)), images_for(family)
    if training:
        # One size, like crops: PyTorch 2.14's Inductor fails on several, for Transformers' model too. Four images: over
        # two, the norm of the pyramid's single cell magnifies rounding beyond the tolerance.
        check_compiled(model, inputs[-1:] * 2, "inductor", training, dynamic=False, limit=1)
    else:
        check_compiled(model, inputs, "inductor", training, limit=COMPILATIONS + 1 + parities(family))


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.skipif(pooling_asks(), reason="this PyTorch's max pooling compiles for odd sizes or for even ones")
def test_the_model_compiled_for_any_size_at_once():
    model = Logits(whole("resnet"))
    inputs = [image_inputs(*size) for size in IMAGE_SIZES]
    # PyTorch may compile the first graph twice, the second time with the norms' epsilons as constants.
    with torch._dynamo.config.patch(error_on_recompile=True):
        check_compiled(model, inputs, "inductor", False, dynamic=True, limit=2)


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_segment_compiled():
    model = whole("resnet")
    compiled = torch.compile(model.segment, fullgraph=True, dynamic=True)
    for size in [(2, 96, 128), (2, 97, 101)]:
        (pixels,) = image_inputs(*size)
        with torch.no_grad():
            best = model(pixels).logits.double().topk(2, dim=1).values
        decided = best[:, 0] - best[:, 1] > 1e-5  # sums in another order can decide a tie differently
        for ours, theirs, certain in zip(compiled(pixels), model.segment(pixels), decided, strict=True):
            assert torch.equal(ours[certain], theirs[certain])
        assert decided.float().mean() > 0.99


@pytest.mark.exhaustive
def test_onnx_of_any_batch(tmp_path):
    """tests/models/test_exporters.py exports every family, for single images."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, path = Logits(whole("convnext")), tmp_path / "model.onnx"
    shapes = ({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},)
    with torch.no_grad():
        torch.onnx.export(model, images_for("convnext")[0], path, dynamo=True, dynamic_shapes=shapes)
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for (pixels,) in [*images_for("convnext"), image_inputs(1, 64, 64)]:
            (logits,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
            assert error(torch.from_numpy(logits), model(pixels)) < 1e-5

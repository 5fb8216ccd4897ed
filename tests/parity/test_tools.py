"""Tools for Transformers' models (pipelines, accelerate, hooks, optimizers, compilers) take ours in their place."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import fastuper
from bench.numerics import error
from bench.pairs import VERSION_5, images, pair
from tests.parity.models import FAMILIES, config, segmentation_labels


def photo(name: str) -> Any:
    pil = pytest.importorskip("PIL.Image")
    return pil.fromarray(getattr(pytest.importorskip("skimage.data"), name)())


@pytest.mark.parametrize("given", ["one", "list"])
@pytest.mark.parametrize("family", ["convnext", "swin"])
def test_the_pipeline_returns_the_same_segments(family, given):
    models = pair(config(family, id2label={i: f"thing {i}" for i in range(7)}), dtype=torch.float32)
    processor = transformers.SegformerImageProcessor(size={"height": 96, "width": 128})
    pictures = photo("chelsea") if given == "one" else [photo("chelsea"), photo("astronaut")]
    results = []
    for model in models:
        pipeline = transformers.pipeline("image-segmentation", model=model, image_processor=processor, device="cpu")
        result = pipeline(pictures)
        results.append([result] if given == "one" else result)
    for expected, segments in zip(*results, strict=True):
        assert len(expected) > 1
        assert [s["label"] for s in segments] == [s["label"] for s in expected]
        assert all(s["label"].startswith("thing ") for s in segments)
        for segment, reference in zip(segments, expected, strict=True):
            assert segment["score"] == reference["score"]
            different = np.asarray(segment["mask"]) != np.asarray(reference["mask"])
            assert different.mean() < 1e-4  # ties of two classes in float32


def test_outputs_are_also_transformers_outputs():
    ours = pair(config("convnext"), dtype=torch.float32)[1]
    with torch.no_grad():
        output = ours(images(1, 3, 33, 40, dtype=torch.float32))
    assert isinstance(output, fastuper.models.outputs.SemanticSegmenterOutput)
    assert isinstance(output, transformers.utils.ModelOutput)
    copies = [copy.deepcopy(output), pickle.loads(pickle.dumps(output)), type(output)(dict(output))]
    values, spec = torch.utils._pytree.tree_flatten(output)
    copies.append(torch.utils._pytree.tree_unflatten(values, spec))
    for other in copies:
        assert list(other) == ["logits"]
        assert torch.equal(other.logits, output.logits)
    assert '"fastuper.SemanticSegmenterOutput.transformers"' in torch.utils._pytree.treespec_dumps(spec)


def test_our_processor_in_the_pipeline():
    theirs, ours = pair(config("convnext"), dtype=torch.float32)
    size = {"height": 96, "width": 128}
    masks = []
    for model, processor in (
        (theirs, transformers.SegformerImageProcessor(size=size)),
        (ours, fastuper.UperNetImageProcessor(size=size)),
    ):
        pipeline = transformers.pipeline("image-segmentation", model=model, image_processor=processor, device="cpu")
        masks.append({segment["label"]: np.asarray(segment["mask"]) for segment in pipeline(photo("chelsea"))})
    assert masks[0].keys() == masks[1].keys()
    # In Transformers 5 their processor resizes with torchvision, a little differently.
    differ = sum((masks[0][label] != masks[1][label]).mean() for label in masks[0])
    assert differ < (0.02 if VERSION_5 else 1e-9)


def test_accelerate_prepares_the_model():
    accelerate = pytest.importorskip("accelerate")
    ours = pair(config("convnext"), dtype=torch.float32, train=True)[1]
    accelerator = accelerate.Accelerator(cpu=True)
    pixels, labels = images(4, 3, 64, 64, dtype=torch.float32), segmentation_labels(4, 64, 64)
    loader = torch.utils.data.DataLoader(
        [{"pixel_values": p, "labels": y} for p, y in zip(pixels, labels, strict=True)], batch_size=2
    )
    model, optimizer, loader = accelerator.prepare(ours, torch.optim.SGD(ours.parameters(), lr=0.1), loader)
    before = ours.decode_head.classifier.weight.clone()
    for batch in loader:
        output = model(**batch)
        accelerator.backward(output.loss)
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(ours.decode_head.classifier.weight, before)
    assert accelerator.unwrap_model(model) is ours


def test_accelerate_under_mixed_precision_returns_float32():
    """accelerate wraps `forward`, casts the output's tensors and rebuilds the output."""
    convert = pytest.importorskip("accelerate.utils").convert_to_fp32
    ours = pair(config("convnext"), dtype=torch.bfloat16)[1]
    output = convert(ours(images(1, 3, 64, 64, dtype=torch.bfloat16), labels=segmentation_labels(1, 64, 64)))
    assert type(output).__name__ == "SemanticSegmenterOutput"
    assert output.logits.dtype == output.loss.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_properties_of_the_model(family):
    theirs, ours = pair(config(family), dtype=torch.bfloat16)
    unused = 2 * 128 if family == "swin" and VERSION_5 else 0  # an unused last norm
    assert ours.num_parameters() == theirs.num_parameters() - unused
    theirs.backbone.requires_grad_(False)
    ours.backbone.requires_grad_(False)
    assert ours.num_parameters(only_trainable=True) == theirs.num_parameters(only_trainable=True) > 0
    assert ours.device == theirs.device == torch.device("cpu")
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert ours.main_input_name == theirs.main_input_name == "pixel_values"
    assert ours.can_generate() is theirs.can_generate() is False
    assert ours.config.model_type == theirs.config.model_type
    assert ours.config.num_labels == theirs.config.num_labels
    assert ours.training is theirs.training is False


def test_hooks_on_inner_modules_are_called():
    ours = pair(config("swin"))[1]
    called = set()
    for name, module in ours.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    ours(images(1, 3, 64, 64), labels=segmentation_labels(1, 64, 64), output_attentions=True)
    lists = (nn.ModuleList, nn.ModuleDict)  # `psp_modules` is a subclass, and is called
    assert {name for name, module in ours.named_modules() if type(module) not in lists} - called == set()


def test_a_hook_may_change_what_a_module_returns():
    ours = pair(config("convnext"))[1]
    pixels = images(1, 3, 64, 64)
    for path in ("decode_head.classifier", "decode_head.fpn_bottleneck.conv", "decode_head.psp_modules.2"):
        with torch.no_grad():
            before = ours(pixels).logits
            handle = ours.get_submodule(path).register_forward_hook(lambda module, args, output: 0 * output)
            during = ours(pixels).logits
            during_labels = ours.segment(pixels)[0]
            handle.remove()
            after = ours(pixels).logits
        assert not torch.equal(during, before)
        assert torch.equal(during.argmax(1)[0], during_labels)
        assert torch.equal(after, before)


REPLACEABLE = [
    "decode_head.classifier",
    "decode_head.fpn_convs.1",
    "decode_head.lateral_convs.0",
    "decode_head.bottleneck",
]


@pytest.mark.parametrize("path", REPLACEABLE)
def test_a_replaced_module_is_used(path):
    theirs, ours = pair(config("convnext"))
    pixels = images(1, 3, 64, 64)
    parent, _, name = path.rpartition(".")
    with torch.no_grad():
        before = ours(pixels).logits
        for model in (theirs, ours):
            old = model.get_submodule(path)
            setattr(model.get_submodule(parent), name, nn.Sequential(old, nn.Tanh()))
        assert error(ours(pixels).logits, theirs(pixels).logits) < 1e-10
        assert error(ours(pixels).logits, before) > 1e-3


def test_a_classifier_for_other_classes():
    theirs, ours = pair(config("resnet-basic"))
    layer = nn.Conv2d(24, 3, 1).double()
    theirs.decode_head.classifier = ours.decode_head.classifier = layer
    with torch.no_grad():
        pixels = images(1, 3, 64, 64)
        assert error(ours(pixels).logits, theirs(pixels).logits) < 1e-10
        assert ours(pixels).logits.shape == (1, 3, 64, 64)
        assert ours.segment(pixels)[0].max() < 3


CHANGES = {
    "in-place": lambda p: p.mul_(1.5),
    "data": lambda p: p.data.mul_(1.5),
    "set-data": lambda p: setattr(p, "data", p.data * 1.5),
    "copy": lambda p: p.copy_(p * 1.5),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_changed_weights_are_used(family, change):
    theirs, ours = pair(config(family))
    pixels = images(1, 3, 64, 64)
    with torch.no_grad():
        before = ours(pixels).logits
        ours.segment(pixels)
        for model in (theirs, ours):
            for tensor in [*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("running_var"))]:
                CHANGES[change](tensor)
        expected = theirs(pixels).logits
        assert error(ours(pixels).logits, expected) < 1e-10
        assert error(before, expected) > 1e-2
        assert torch.equal(ours.segment(pixels)[0], expected.argmax(1)[0])


def test_weights_changed_by_a_fused_optimizer_are_used():
    theirs, ours = pair(config("convnext"), dtype=torch.float32)
    pixels, labels = images(1, 3, 64, 64, dtype=torch.float32), segmentation_labels(1, 64, 64)
    before = ours(pixels).logits
    for model in (theirs, ours):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        model(pixels, labels=labels).loss.backward()
        optimizer.step()
    with torch.no_grad():
        expected = theirs(pixels).logits
        assert error(ours(pixels).logits, expected) < 1e-3  # Adam's first step is the gradient's sign, even of rounding
        assert error(before, expected) > 1e-2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_after_inference(mode):
    ours = pair(config("swin"))[1]
    pixels, labels = images(2, 3, 64, 64), segmentation_labels(2, 64, 64)
    with mode():
        ours(pixels)
        ours.segment(pixels)
    ours.train()(pixels, labels=labels).loss.backward()
    assert all(p.grad is not None for p in ours.parameters())


def test_a_state_dict_holds_only_parameters_and_statistics():
    theirs, ours = pair(config("resnet-basic"))
    with torch.no_grad():
        ours(images(1, 3, 64, 64))
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_parts_of_the_model_may_be_frozen_in_eval_mode():
    theirs, ours = pair(config("resnet-basic"), train=True)
    for model in (theirs, ours):
        model.backbone.eval()
    pixels = images(3, 3, 64, 64)
    with torch.no_grad():
        assert error(ours(pixels).logits, theirs(pixels).logits) < 1e-10


@pytest.mark.exhaustive  # tests/models/test_tracing.py compiles a model and its loss, with sizes that vary
@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_as_one_graph(family):
    ours = pair(config(family))[1]
    pixels, labels = images(2, 3, 49, 70), segmentation_labels(2, 49, 70)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected, output = ours(pixels, labels=labels), compiled(pixels, labels=labels)
    assert error(output.logits, expected.logits) < 1e-12
    assert error(output.loss, expected.loss) < 1e-12
    assert output.keys() == expected.keys()

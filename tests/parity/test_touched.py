"""Modules that a user hooked or replaced are called where Transformers calls them; the modules there decide."""

from __future__ import annotations

import copy
import re
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fastuper
from bench.numerics import error
from bench.pairs import VERSION_5, images, pair
from tests.parity.models import VARIATIONS, config, segmentation_labels, with_exhaustive_variations

FAMILIES = ["convnext", "swin", "resnet-basic"]
exhaustive = pytest.mark.exhaustive
MODES = [False, pytest.param(True, marks=exhaustive)]


def models(family: str, dtype: torch.dtype = torch.float64, **head: Any) -> tuple[Any, Any]:
    """Return Transformers' model and ours, in training mode."""
    backbone: dict[str, Any] = {"depths": [1, 2, 1, 1]}
    if family == "resnet-basic":  # drop_path_rate is 0 in the others by default
        backbone["downsample_in_first_stage"] = True
    return pair(config(family, backbone, auxiliary_concat_input=True, **head), dtype=dtype, train=True)


def run(model: Any, training: bool) -> torch.Tensor:
    """Run a training step, or an inference without labels; return the loss or the logits."""
    dtype = next(model.parameters()).dtype
    pixels = images(2, 3, 32, 32, dtype=dtype)
    model.train(training)
    if training:
        loss = model(pixels, labels=segmentation_labels(2, 32, 32)).loss
        loss.backward()
        return loss.detach()
    with torch.no_grad():
        return model(pixels).logits


def calls(model: Any, names: list[str], training: bool) -> Counter[str]:
    """Count the forward calls of modules, and their backward calls, during one run with hooks on all of them."""
    counts: Counter[str] = Counter()
    handles = []
    for name in names:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: counts.update([f"{name} before"])))
        handles.append(module.register_forward_hook(lambda *_, name=name: counts.update([name])))
    run(model, training)
    for handle in handles:
        handle.remove()
    return counts


def kinds(model: Any) -> list[str]:
    """Return a module of each kind: of modules whose names differ in a number, the last. The heads are ConvNeXt's."""
    containers = (nn.ModuleList, nn.ModuleDict)
    found = {re.sub(r"\d+", "0", name): name for name, m in model.named_modules() if type(m) not in containers}
    heads = model.config.backbone_config.model_type == "convnext"
    return [name for name in found.values() if name and (heads or name.startswith("backbone"))]


@pytest.mark.parametrize("training", MODES, ids=["inference", "training"])
@pytest.mark.parametrize("family", with_exhaustive_variations([*FAMILIES, *VARIATIONS]))
def test_hooks_on_each_module(family, training):
    """Each kind of module is hooked alone: the faster ways must give way for each of them."""
    theirs, ours = models(family, torch.float32)
    there = {name for name, _ in theirs.named_modules()}
    names = kinds(ours)
    expected = calls(theirs, [name for name in names if name in there], training)
    for name in names:
        counts = calls(ours, [name], training)
        if name not in there:  # Swin's modules have other names in Transformers 5
            assert VERSION_5 or "shortcut.activation" in name
        elif not re.fullmatch(r"backbone\.encoder\.stages\.\d+\.layers", name):  # ResNet's: called here, not there
            assert counts == Counter({key: n for key, n in expected.items() if key.split()[0] == name}), name
            continue
        assert counts == {name: 1, f"{name} before": 1}, name


@exhaustive
@pytest.mark.parametrize("family", FAMILIES)
def test_backward_hooks_on_each_module(family):
    """Of a module that returns a map or a tuple, PyTorch calls them once."""
    ours = models(family, torch.float32)[1]
    for name in kinds(ours):
        module, counts = ours.get_submodule(name), Counter()
        returned: list[Any] = []
        handles = [
            module.register_forward_hook(lambda module, args, output: returned.append(output)),  # noqa: B023
            module.register_full_backward_hook(lambda *_: counts.update(["after"])),  # noqa: B023
            module.register_full_backward_pre_hook(lambda *_: counts.update(["before"])),  # noqa: B023
        ]
        run(ours, training=True)
        for handle in handles:
            handle.remove()
        if isinstance(returned[0], torch.Tensor | tuple):
            assert counts == {"before": 1, "after": 1}, name


class Another(nn.Module):
    """A user's module in place of one of the model: it calls the module, and has none of its attributes."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("training", MODES, ids=["inference", "training"])
@pytest.mark.parametrize(
    "family",
    [*with_exhaustive_variations(["convnext", "swin", *VARIATIONS]), pytest.param("resnet-basic", marks=exhaustive)],
)
def test_each_module_replaced_by_one_of_another_class(family, training):
    ours = models(family)[1]
    statistics = copy.deepcopy(ours.state_dict())
    expected = run(ours, training)
    for name in kinds(ours):
        if name.startswith("auxiliary_head") and not training:
            continue
        parent, _, child = name.rpartition(".")
        owner, old = ours.get_submodule(parent), ours.get_submodule(name)
        ours.load_state_dict(statistics)
        owner._modules[child] = new = Another(old)
        result = run(ours, training)
        owner._modules[child] = old
        assert new.calls == (2 if family == "swinv2" and child == "drop_path" else 1), name
        assert error(result, expected) < 1e-10, name


def test_hooks_see_and_change_the_encoders_maps():
    for family in FAMILIES:
        theirs, ours = models(family)
        if family == "swin" and VERSION_5:
            continue
        seen = []
        for model in (theirs, ours):
            model.backbone.encoder.register_forward_hook(lambda module, args, output: seen.append(output))  # noqa: B023
            run(model, training=False)
        if family != "swin":  # whose maps are (B, L, C) in Transformers 4
            assert error(seen[1].last_hidden_state, seen[0].last_hidden_state) < 1e-10
            for x, y in zip(seen[1].hidden_states, seen[0].hidden_states, strict=True):
                assert error(x, y) < 1e-10

        def squared(module: Any, args: Any, output: Any) -> Any:
            output.hidden_states = tuple(x.square() for x in output.hidden_states)
            return output

        before = run(ours, training=False)
        ours.backbone.encoder.register_forward_hook(squared)
        assert error(run(ours, training=False), before) > 1e-3


# Attributes of Transformers' modules that ours do not have, with the reason.
LEFT_OUT = {
    "data_format",  # of ConvNeXt's norms: a map's norm and a block's are two classes here
    "gradient_checkpointing",  # of an encoder: a block has it here
    "pointing",  # never read there
    "input_resolution",  # of Swin: never read there
    "chunk_size_feed_forward",  # of Swin 4.x: never read there
    "pruned_heads",  # of Swin 4.x: `prune_heads` is left out
    "is_causal",  # of Swin 5.x
}


@pytest.mark.parametrize("family", [*FAMILIES, *VARIATIONS])
def test_public_attributes_of_the_modules(family):
    theirs, ours = models(family)
    own = dict(ours.named_modules())
    compared = 0
    for path, module in theirs.named_modules():
        if isinstance(module, transformers.PreTrainedModel) or path not in own:
            continue
        for name, value in vars(module).items():
            if name.startswith("_") or name in LEFT_OUT or isinstance(value, nn.Module):
                continue
            if (
                type(module).__module__.startswith("torch")
                or "activation" in path
                or path.endswith((".act", ".intermediate_act_fn"))
            ):
                continue
            if value is None:  # an optional module or parameter
                continue
            assert hasattr(own[path], name), (path, name)
            mine = getattr(own[path], name)
            if isinstance(value, int | float):
                assert mine == value, (path, name)
                compared += 1
    assert compared > 20
    for name in ("channels", "num_features", "stage_names", "out_features", "out_indices", "feature_channels"):
        if hasattr(theirs.backbone, name):
            assert _listed(getattr(ours.backbone, name)) == _listed(getattr(theirs.backbone, name)), name
    for model in (theirs, ours):
        model.eval()
    maps = theirs.backbone(images(1, 3, 32, 32)).feature_maps
    assert error(ours.decode_head.psp_forward(maps), theirs.decode_head.psp_forward(maps)) < 1e-10


def _listed(value: Any) -> Any:
    return list(value.items()) if isinstance(value, dict) else list(value)


# Replaced heads and stems --------------------------------------------------------------------------------------------


def compare(theirs: Any, ours: Any, channels: int = 3, labels: torch.Tensor | None = None, size: int = 32) -> Any:
    """Compare logits, segments, and with labels the loss and its gradients; return our logits."""
    pixels = images(2, channels, size, size)
    for model in (theirs, ours):
        model.eval()
    with torch.no_grad():
        logits, expected = ours(pixels).logits, theirs(pixels).logits
        assert error(logits, expected) < 1e-10
        maps = ours.segment(pixels)
    if expected.shape[1] > 1:
        assert all(torch.equal(a, b) for a, b in zip(maps, expected.argmax(1), strict=True))
    if labels is not None:
        for model in (theirs, ours):
            model.train()
            model(pixels, labels=labels).loss.backward()
        mine, other = ours.decode_head.parameters(), theirs.decode_head.parameters()
        for p, q in zip(mine, other, strict=True):
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or error(p.grad, q.grad) < 1e-8
    return logits


def both_classifiers(theirs: Any, ours: Any, make: Any) -> None:
    """Replace the classifiers of both models by copies of the same new modules."""
    for head in ("decode_head", "auxiliary_head"):
        torch.manual_seed(1)
        new = make(getattr(theirs, head).classifier.in_channels).double()
        for model in (theirs, ours):
            getattr(model, head).classifier = copy.deepcopy(new)


CLASSIFIERS = {
    "wider": lambda dim: nn.Conv2d(dim, 11, 1),
    "narrower": lambda dim: nn.Conv2d(dim, 3, 1),
    "3x3": lambda dim: nn.Conv2d(dim, 9, 3, padding=1),
    "5x5": lambda dim: nn.Conv2d(dim, 9, 5, padding=2),
    "strided": lambda dim: nn.Conv2d(dim, 9, 2, stride=2, bias=False),
    "layers": lambda dim: nn.Sequential(nn.Conv2d(dim, 16, 1), nn.ReLU(), nn.Conv2d(16, 9, 1)),
    "identity": lambda dim: nn.Identity(),
    "transposed": lambda dim: nn.ConvTranspose2d(dim, 9, 2, stride=2),
}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[exhaustive] * (kind in ("narrower", "3x3", "5x5", "transposed")))
        for kind in CLASSIFIERS
    ],
)
def test_replaced_classifiers(kind):
    """Labels of all their classes are accepted, whatever `config.num_labels` is."""
    theirs, ours = models("convnext")
    both_classifiers(theirs, ours, CLASSIFIERS[kind])
    classes = {"wider": 11, "narrower": 3, "identity": 20}.get(kind, 9)
    labels = torch.arange(2 * 32 * 32).view(2, 32, 32) % classes
    assert labels.max() == classes - 1
    logits = compare(theirs, ours, labels=labels)
    processor = transformers.SegformerImageProcessor()
    output = ours(images(2, 3, 32, 32))
    maps = fastuper.UperNetImageProcessor().post_process_semantic_segmentation(output, target_sizes=[(40, 50)] * 2)
    expected = processor.post_process_semantic_segmentation(output, target_sizes=[(40, 50)] * 2)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    assert logits.shape[1] == {"identity": 24}.get(kind, classes)


def test_labels_beyond_the_classes_of_a_replaced_classifier():
    ours = models("convnext")[1]
    ours.decode_head.classifier = nn.Conv2d(24, 11, 1).double()
    statistics = copy.deepcopy(dict(ours.named_buffers()))
    pixels, labels = images(2, 3, 32, 32), torch.full((2, 32, 32), 9)
    with pytest.raises(ValueError, match=r"found 9\. auxiliary_head\.classifier has only 7 classes: replace it too"):
        ours(pixels, labels=labels)
    ours.auxiliary_head.classifier = nn.Conv2d(20, 11, 1).double()
    with pytest.raises(ValueError, match=r"labels must be from 0 to 10, or ignore_index=255; found 11$"):
        ours(pixels, labels=labels + 2)
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in ours.named_buffers())
    assert ours(pixels, labels=labels).loss > 0
    ours.decode_head.classifier = nn.Sequential(ours.decode_head.classifier)  # only its logits show the classes
    ours.auxiliary_head = None
    with pytest.raises(ValueError, match="labels must be from 0 to 10"):
        ours(pixels, labels=labels + 2)


def stem_of(model: Any, family: str) -> tuple[nn.Module, str]:
    """Return the module that holds the first convolution, and its name."""
    backbone = model.backbone
    if family == "convnext":
        return backbone.embeddings, "patch_embeddings"
    if family == "swin":
        return getattr(backbone, "swin", backbone).embeddings.patch_embeddings, "projection"
    return backbone.embedder.embedder, "convolution"


STEMS = {
    "four-channels": (4, lambda old: nn.Conv2d(4, 16, old.kernel_size, old.stride, old.padding)),
    "stride-2": (3, lambda old: nn.Conv2d(3, 16, 2, 2)),
    "overlapping": (3, lambda old: nn.Conv2d(3, 16, 7, 4, 3)),
    "layers": (6, lambda old: nn.Sequential(nn.Conv2d(6, 8, 2, 2), nn.GELU(), nn.Conv2d(8, 16, 2, 2))),
}
FAST_STEMS = [("convnext", "layers"), ("swin", "stride-2"), ("resnet-basic", "overlapping")]


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        pytest.param(family, kind, marks=[exhaustive] * (kind != "four-channels" and (family, kind) not in FAST_STEMS))
        for family in FAMILIES
        for kind in STEMS
    ],
)
def test_replaced_stems(family, kind):
    """The stem that is there decides the number of channels, not the configuration."""
    theirs, ours = models(family)
    channels, make = STEMS[kind]
    torch.manual_seed(1)
    old = getattr(*stem_of(theirs, family))
    new = make(old).double()
    for model in (theirs, ours):
        owner, name = stem_of(model, family)
        setattr(owner, name, copy.deepcopy(new))
        if family == "resnet-basic":
            owner = model.backbone.embedder
        owner.num_channels = channels
    for size in (32, 38):
        compare(theirs, ours, channels, segmentation_labels(2, size, size), size)
    if kind == "four-channels":
        with pytest.raises(ValueError, match="have 3 channels, the backbone's first convolution takes 4"):
            ours(images(1, 3, 32, 32))


class Whole(nn.Module):
    """A decode head of a user's own, which reads one map."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, 9, 1)

    def forward(self, feature_maps: Any) -> torch.Tensor:
        return self.conv(feature_maps[1])


def test_a_replaced_decode_head():
    theirs, ours = models("convnext", use_auxiliary_head=False)
    head = Whole(24).double()
    theirs.decode_head, ours.decode_head = head, copy.deepcopy(head)
    compare(theirs, ours, labels=torch.arange(2 * 32 * 32).view(2, 32, 32) % 9)
    with pytest.raises(ValueError, match="labels must be from 0 to 8, or ignore_index=255; found 9"):
        ours(images(2, 3, 32, 32), labels=torch.full((2, 32, 32), 9))


def test_a_replaced_backbone_with_other_channels():
    """The modules that read the maps were replaced too: nothing else compares their channels."""
    theirs, ours = models("convnext", use_auxiliary_head=False)
    other = pair(config("convnext", {"hidden_sizes": [8, 24, 32, 48], "depths": [1, 1, 1, 1]}))
    for model, source in zip((theirs, ours), other, strict=True):
        model.backbone = source.backbone
    with pytest.raises(ValueError, match=r"in_channels=\[16, 24, 40, 56\] channels, finest first, got \[\(2, 8, "):
        ours(images(2, 3, 32, 32))
    for model, source in zip((theirs, ours), other, strict=True):
        for name in ("psp_modules", "bottleneck", "lateral_convs"):
            setattr(model.decode_head, name, getattr(source.decode_head, name))
    compare(theirs, ours, labels=segmentation_labels(2, 32, 32))


def test_lora_on_the_classifiers():
    peft = pytest.importorskip("peft")
    ours = models("convnext", torch.float32)[1]
    wrapped = peft.get_peft_model(ours, peft.LoraConfig(target_modules=["classifier"], init_lora_weights=False))
    logits = wrapped(pixel_values=images(2, 3, 32, 32, dtype=torch.float32), labels=segmentation_labels(2, 32, 32))
    assert logits.loss > 0
    with pytest.raises(ValueError, match="labels must be from 0 to 6"):
        wrapped(pixel_values=images(2, 3, 32, 32, dtype=torch.float32), labels=torch.full((2, 32, 32), 9))

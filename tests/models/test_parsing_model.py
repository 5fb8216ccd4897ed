"""The model of Unified Perceptual Parsing: logits, losses, label maps, and what users do with a model.

tests/parity compares the head with the official network; here the losses are compared with the same plain statement.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastuper import UnifiedPerceptualParsingConfig, UperNetForUnifiedPerceptualParsing
from fastuper.data.parsing_labels import TASKS
from fastuper.models.outputs import ParsingOutput
from fastuper.weights.errors import CheckpointError
from tests.models.heads import error, randomize
from tests.models.test_parsing_configuration import LABELS, PARTS
from tests.models.test_upernet import BACKBONES
from tests.parity.parsing_reference import reference_loss

MAPS = TASKS[1:]
CHANNELS = {"scene": 2, "object": 5, "part": 6, "material": 4, "texture": 2}


def config(kind: str = "convnext", **values: Any) -> UnifiedPerceptualParsingConfig:
    small = {"hidden_size": 12, "pool_channels": 8, "texture_channels": 8, "labels": LABELS, "object_parts": PARTS}
    return UnifiedPerceptualParsingConfig(BACKBONES[kind](), **{**small, **values})


def model(kind: str = "convnext", seed: int = 0, **values: Any) -> UperNetForUnifiedPerceptualParsing:
    torch.manual_seed(seed)
    made = UperNetForUnifiedPerceptualParsing(config(kind, **values))
    randomize(made.decode_head, seed)
    made.eval()
    with torch.no_grad():  # so that every class is the best somewhere
        for task, logits in made(images(seed=seed)).items():
            classifier = getattr(made.decode_head, f"{task}_head").classifier
            classifier.bias -= logits.transpose(0, 1).flatten(1).mean(dim=1)
    return made


def images(batch: int = 2, height: int = 64, width: int = 80, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def labels(height: int = 37, width: int = 50, *, seed: int = 0, batch: int = 2) -> dict[str, torch.Tensor]:
    """Return random labels; the parts of each pixel are its object's."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, *size: int) -> torch.Tensor:
        return torch.randint(count, size, generator=generator)

    objects = draw(5, batch, height, width)
    parts = torch.zeros_like(objects)
    for number, own in PARTS.items():
        inside = objects == number
        parts[inside] = torch.tensor([0, *own])[draw(3, int(inside.sum()))]
    parts[0][objects[0] == 3] = 0  # in the first image no part of this object is labelled
    return {
        "scene": draw(2, batch),
        "object": objects,
        "part": parts,
        "material": draw(4, batch, height, width),
        "texture": draw(3, batch, height, width) - 1,
    }


@pytest.fixture(scope="module")
def network() -> UperNetForUnifiedPerceptualParsing:
    return model()


# --------------------------------------------------------------------------------------------------- logits and outputs


def test_output(network):
    output = network(images())
    assert isinstance(output, ParsingOutput)
    assert list(output) == list(TASKS)
    assert {task: tuple(output[task].shape) for task in TASKS} == {
        task: (2, count) if task == "scene" else (2, count, 16, 20) for task, count in CHANNELS.items()
    }
    maps = network.backbone(images()).feature_maps
    for task, logits in network.decode_head(maps).items():
        torch.testing.assert_close(output[task], logits)


def test_tuple_hidden_states_and_attentions():
    swin = model("swin")
    output = swin(images(1), tasks=["texture", "scene"], output_hidden_states=True, output_attentions=True)
    assert list(output) == ["scene", "texture", "hidden_states", "attentions"]
    assert [tuple(x.shape[2:]) for x in output.hidden_states] == [(16, 20), (16, 20), (8, 10), (4, 5), (2, 3)]
    assert len(output.attentions) == 4
    same = swin(images(1), tasks=["texture", "scene"], return_dict=False)
    assert isinstance(same, tuple)
    assert torch.equal(same[1], output.texture)
    given = {"scene": torch.tensor([1])}
    assert len(swin(images(1), given, ["scene", "texture"], return_dict=False)) == 4  # loss, logits, scene_loss


@pytest.mark.parametrize("tasks", [("scene",), ("material",), ("texture",), ("object", "scene"), ("part",), TASKS])
def test_only_what_is_asked_for_runs(network, tasks):
    called = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in network.named_modules()
        if name.startswith("decode_head.") and name.count(".") == 1
    ]
    try:
        output = network(images(1), tasks=tasks)
        run = {name.removeprefix("decode_head.") for name in called}
        called.clear()
        network.parse(images(1), tasks=tasks)
        parsed = {name.removeprefix("decode_head.") for name in called}
    finally:
        for hook in hooks:
            hook.remove()
    assert list(output) == [task for task in TASKS if task in tasks]
    assert {name for name in run if name.endswith("_head")} == {f"{task}_head" for task in tasks}
    assert ("fpn_bottleneck" in run) is any(task in tasks for task in ("object", "part"))
    assert ("bottleneck" in run) is (tasks != ("texture",))
    extra = {"object_head"} if "part" in tasks else set()
    assert parsed == run | extra


def test_gradients_of_textures_stop_at_the_first_map(network):
    network.zero_grad()
    network(images(), tasks=["texture"], labels={"texture": torch.tensor([0, 1])}).loss.backward()
    assert all(p.grad is None for p in network.backbone.parameters())
    assert network.decode_head.texture_head.classifier.weight.grad.abs().sum() > 0
    network.zero_grad()


# --------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("size", [(16, 20), (37, 50)], ids=["of-logits", "other"])
def test_losses_and_gradients(size):
    exact = model().double()
    given = labels(*size)
    pixels = images().double()
    output = exact(pixels, given)
    logits = {task: output[task].detach().requires_grad_() for task in TASKS}
    expected, terms = reference_loss(logits, given, exact.config.object_parts, exact.config.loss_weights)
    assert error(output.loss, expected) < 1e-10
    for task in TASKS:
        assert error(output[f"{task}_loss"], terms[task]) < 1e-10, task
    expected.backward()
    found = torch.autograd.grad(output.loss, [output[task] for task in TASKS])
    for task, gradient in zip(TASKS, found, strict=True):
        assert error(gradient, logits[task].grad) < 1e-10, task


def test_textures_of_whole_images(network):
    whole = network(images(), {"texture": torch.tensor([1, -1])}).loss
    pixels = torch.tensor([1, -1])[:, None, None].expand(2, 16, 20)
    torch.testing.assert_close(whole, network(images(), {"texture": pixels}).loss)
    expected = F.cross_entropy(network(images()).texture[:1], pixels[:1])
    torch.testing.assert_close(whole, expected)


def test_weights_and_labels_of_some_tasks():
    weighted = model(loss_weights={"scene": 3, "object": 0})
    given = {task: x for task, x in labels().items() if task in ("scene", "object")}
    output = weighted(images(), given)
    assert list(output) == ["loss", *TASKS, "scene_loss", "object_loss"]
    torch.testing.assert_close(output.loss, 3 * output.scene_loss)
    # Objects place the parts, though the task does not run.
    parts = {task: labels()[task] for task in ("object", "part")}
    output = weighted(images(), parts, ["part"])
    assert list(output) == ["loss", "part", "part_loss"]
    torch.testing.assert_close(output.loss, 0.5 * output.part_loss)


def empty(height: int = 16, width: int = 20) -> dict[str, torch.Tensor]:
    zeros = torch.zeros(2, height, width, dtype=torch.long)
    none = torch.full((2,), -1)
    return {"scene": none, "object": zeros, "part": zeros, "material": zeros, "texture": none}


@pytest.mark.parametrize("task", [*TASKS, "all", "parts-of-none"])
def test_empty_targets_give_0(network, task):
    given = empty()
    if task == "parts-of-none":  # an object with parts, of which none is labelled
        given = {"object": torch.full_like(given["object"], 2), "part": given["part"]}
    elif task != "all":
        given = {name: given[name] for name in {task, *(["object"] if task == "part" else [])}}
    network.zero_grad()
    output = network(images(), given)
    names = list(given) if task != "parts-of-none" else ["part"]
    assert all(output[f"{name}_loss"] == 0 for name in names)
    (output.loss if task != "parts-of-none" else output.part_loss).backward()
    gradients = [p.grad for p in network.decode_head.parameters() if p.grad is not None]
    assert gradients
    assert all(not gradient.any() for gradient in gradients)
    network.zero_grad()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_labels_of_any_integer_type(network, dtype):
    given = {task: x for task, x in labels().items() if task in ("object", "part", "material")}
    expected = network(images(), given).loss
    assert torch.equal(network(images(), {task: x.to(dtype) for task, x in given.items()}).loss, expected)


WRONG: dict[str, tuple[Any, str]] = {
    "no-mapping": (torch.zeros(2), "labels must map tasks to tensors, got Tensor"),
    "none": ({}, "labels are empty"),
    "task": ({"depth": torch.zeros(2)}, "labels has 'depth', which is none of the tasks that run: scene, object, part"),
    "scene-map": ({"scene": torch.zeros(2, 4, 4).long()}, r"labels of scene must be \(2,\), got \(2, 4, 4\)"),
    "object-vector": ({"object": torch.zeros(2).long()}, r"of object must be \(2, height, width\), got \(2,\)"),
    "texture-4d": (
        {"texture": torch.zeros(2, 1, 4, 4).long()},
        r"of texture must be \(2,\) or \(2, height, width\), got",
    ),
    "batch": ({"material": torch.zeros(3, 4, 4).long()}, r"of material must be \(2, height, width\), got \(3, 4, 4\)"),
    "size-0": ({"material": torch.zeros(2, 0, 4).long()}, r"of material must be .*, got \(2, 0, 4\)"),
    "dtype": ({"scene": torch.zeros(2)}, r"labels of scene must be integers, got torch\.float32"),
    "list": ({"scene": [0, 1]}, "labels of scene must be a tensor, got list"),
    "scene-2": ({"scene": torch.tensor([0, 2])}, "labels of scene must be from 0 to 1, or -1 for no label; found 2"),
    "scene-minus-2": ({"scene": torch.tensor([0, -2])}, "found -2"),
    "object-5": ({"object": torch.full((2, 4, 4), 5)}, "labels of object must be from 0 to 4, or 0 .*; found 5"),
    "object-minus-1": ({"object": torch.full((2, 4, 4), -1)}, "labels of object must be .*; found -1"),
    "material-255": ({"material": torch.full((2, 4, 4), 255)}, "labels of material must be .*; found 255"),
    "part-alone": ({"part": torch.zeros(2, 4, 4).long()}, "labels has parts without objects"),
    "part-size": (
        {"part": torch.zeros(2, 4, 4).long(), "object": torch.zeros(2, 4, 5).long()},
        r"parts and of objects must have one size, got \(2, 4, 4\) and \(2, 4, 5\)",
    ),
    "part-5": (
        {"part": torch.full((2, 4, 4), 5), "object": torch.zeros(2, 4, 4).long()},
        "labels of part must be from 0 to 4, or 0 for no label; found 5",
    ),
    "part-of-another": (
        {"part": torch.full((2, 4, 4), 4), "object": torch.full((2, 4, 4), 2)},
        r"labels of part has 4 \('knob'\) inside object 2 \('person'\), which has no such part in object_parts",
    ),
    "part-of-an-object-without": (
        {"part": torch.full((2, 4, 4), 1), "object": torch.full((2, 4, 4), 1)},
        r"labels of part has 1 \('head'\) inside object 1 \('wall'\), which has no such part",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_labels_are_refused(network, case):
    given, message = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        network(images(), given)
    assert "\n" not in str(caught.value)


def test_parts_outside_objects_are_not_read(network):
    given = {task: labels()[task] for task in ("object", "part")}
    expected = network(images(), given).part_loss
    given["part"] = given["part"].masked_fill(given["object"] == 0, 3)
    assert torch.equal(network(images(), given).part_loss, expected)


def test_labels_of_a_task_that_does_not_run(network):
    with pytest.raises(ValueError, match="labels has 'object', which is none of the tasks that run: scene"):
        network(images(), labels(), tasks=["scene"])


@pytest.mark.parametrize("method", ["forward", "parse"])
def test_unknown_tasks_are_refused(method):
    some = model(tasks=["scene", "part"])
    call = getattr(some, method)
    for tasks, message in (
        (["depth"], "task 'depth' is not known; known are scene, part"),
        (["material"], "task 'material' is not known; known are scene, part"),
        ([], "tasks must be a list of one or more of scene, part"),
        ("scene", "tasks must be a list"),
    ):
        with pytest.raises(ValueError, match=message):
            call(images(1), tasks=tasks)
    assert some(images(1), tasks=["part"]).part is not None
    with pytest.raises(ValueError, match="the model has no task 'object', and the parts of a pixel depend on"):
        some.parse(images(1), tasks=["part"])


# ----------------------------------------------------------------------------------------------------------- label maps


@pytest.mark.parametrize("sizes", [[(47, 61), (47, 61)], [(90, 33), (20, 70)]], ids=["one-size", "two-sizes"])
@pytest.mark.parametrize("scales", [1, 2])
@pytest.mark.parametrize("mask_background", [False, True])
def test_parse(network, sizes, scales, mask_background):
    given = [images(), images(height=48, width=57, seed=1)][:scales]
    found = network.parse(given if scales > 1 else given[0], sizes, mask_background=mask_background, top=None)
    logits = [network(x) for x in given]
    for image, (size, own) in enumerate(zip(sizes, found, strict=True)):
        scene = torch.stack([x.scene.softmax(1) for x in logits]).mean(0)[image]
        order = scene.argsort(descending=True).tolist()
        assert [number for number, _ in own.scene] == order
        assert [value for _, value in own.scene] == pytest.approx(scene[order].tolist())

        def resampled(task, logits=logits, image=image, size=size):
            return [F.interpolate(x[task], size=size, mode="bilinear")[image] for x in logits]

        def voted(maps, first=0):
            votes = maps[0] if len(maps) == 1 else torch.stack([x.softmax(0) for x in maps]).mean(0)
            return votes[first:].argmax(0) + first

        objects = voted(resampled("object"), int(mask_background))
        parts = torch.zeros_like(objects)
        for number, channels in network.config.part_slices.items():
            ids = torch.tensor([0, *network.config.object_parts[number]])
            best = ids[voted([x[channels] for x in resampled("part")])]
            parts = torch.where(objects == number, best, parts)
        expected = {
            "objects": objects,
            "parts": parts,
            "materials": voted(resampled("material"), int(mask_background)),
            "textures": voted(resampled("texture")),
        }
        for name, labels_ in expected.items():
            ours = getattr(own, name)
            assert ours.dtype == torch.int64
            assert labels_.unique().numel() > 1, name
            assert (ours != labels_).float().mean() < 1e-3, name  # ties of rounded logits


def test_fields_of_tasks_that_are_not_asked_for_are_none(network):
    (own,) = network.parse(images(1), tasks=["part", "scene"], top=1)
    assert (own.objects, own.materials, own.textures) == (None, None, None)
    assert own.parts.shape == (64, 80)
    assert len(own.scene) == 1
    assert isinstance(own.scene[0][0], int)
    assert isinstance(own.scene[0][1], float)
    assert network.parse(images(1), tasks=["object"])[0].scene is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, None], ids=str)
def test_dtypes_of_label_maps(network, dtype):
    (own,), (wide,) = network.parse(images(1), dtype=dtype), network.parse(images(1))
    for name in ("objects", "parts", "materials", "textures"):
        assert getattr(own, name).dtype == (dtype or torch.uint8)
        assert torch.equal(getattr(own, name).long(), getattr(wide, name))


def test_many_objects_fit_uint16():
    many = {**LABELS, "object": ["-", *map(str, range(299))]}
    network = model(labels=many, object_parts={298: (3, 4)})
    nn.init.constant_(network.decode_head.object_head.classifier.bias[298:299], 1e4)
    (own,), (wide,) = network.parse(images(1), dtype=None), network.parse(images(1))
    assert own.objects.dtype == torch.uint16
    assert (own.objects.long() == 298).all()
    assert torch.equal(own.parts.long(), wide.parts)
    assert wide.parts.any()
    with pytest.raises(ValueError, match=r"torch\.uint8 does not hold the 300 labels of object"):
        network.parse(images(1), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"torch\.float32 does not hold"):
        network.parse(images(1), dtype=torch.float32)
    with pytest.raises(TypeError, match=r"dtype must be a torch\.dtype, such as torch\.int64, got 'uint8'"):
        network.parse(images(1), dtype="uint8")


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (None, {}, "pixel_values are missing"),
        ([], {}, "pixel_values are missing"),
        (images(1)[0], {}, r"must be \(batch, channels, height, width\), got \(3, 64, 80\)"),
        ([images(1), images(2)], {}, r"the same images at several scales, got \[\(1, 3, 64, 80\), \(2, 3, 64, 80\)\]"),
        (images(2), {"target_sizes": [(4, 4)]}, "1 target_sizes for a batch of 2 images"),
        (images(1), {"target_sizes": [(0, 4)]}, "target_sizes must be a"),
        (images(1), {"top": 0}, "top must be a whole number of at least 1, or None for all scenes, got 0"),
        (images(1), {"top": 2.5}, r"got 2\.5"),
        (images(1) + float("nan"), {}, "logits are not finite.*: pixel_values contain NaN or infinity"),
    ],
)
def test_parse_refuses(network, given, options, message):
    with pytest.raises(ValueError, match=message):
        network.parse(given, **options)


def test_parse_refuses_weights_that_are_not_finite(network):
    broken = copy.deepcopy(network)
    nn.init.constant_(broken.decode_head.scene_head.classifier.bias, float("nan"))
    with pytest.raises(ValueError, match=r"not finite.*: weights are not finite, or they overflow torch\.float32"):
        broken.parse(images(1))
    broken.parse(images(1), tasks=["material"])


def test_parse_keeps_the_mode(network):
    training = copy.deepcopy(network).train()
    training.parse(images())
    assert training.training
    assert training.decode_head.bottleneck.batch_norm.num_batches_tracked == 1


# ------------------------------------------------------------------------------------------- what users do with a model


def same_outputs(first: nn.Module, second: nn.Module) -> None:
    ours, theirs = first(images(1)), second(images(1))
    for task in TASKS:
        assert torch.equal(ours[task], theirs[task]), task


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies(network, way):
    same_outputs(network, way(network))


def test_save_and_load(network, tmp_path):
    network.save_pretrained(tmp_path)
    loaded = UperNetForUnifiedPerceptualParsing.from_pretrained(tmp_path)
    assert not loaded.training
    same_outputs(network, loaded)
    assert loaded.config.object_parts == {2: (1, 2), 3: (3, 4)}
    fewer = UperNetForUnifiedPerceptualParsing.from_pretrained(tmp_path, tasks=["scene", "object"])
    assert torch.equal(fewer(images(1)).object, network(images(1)).object)
    with pytest.raises(ValueError, match="give labels= and no num_labels"):
        UperNetForUnifiedPerceptualParsing.from_pretrained(tmp_path, num_labels=7)


def test_a_checkpoint_without_a_task(network, tmp_path):
    network.save_pretrained(tmp_path)
    four = UperNetForUnifiedPerceptualParsing.from_pretrained(tmp_path, tasks=TASKS[:4])
    four.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"tensors are missing.*texture_head.*ignore_mismatched_sizes=True"):
        UperNetForUnifiedPerceptualParsing.from_pretrained(tmp_path, tasks=TASKS)
    loaded = UperNetForUnifiedPerceptualParsing.from_pretrained(tmp_path, tasks=TASKS, ignore_mismatched_sizes=True)
    assert torch.equal(loaded(images(1)).part, network(images(1)).part)
    assert loaded.decode_head.texture_head.convs[0].batch_norm.bias.eq(1e-4).all()
    assert loaded.decode_head.texture_head.classifier.weight.std() > 0.1


def test_names_of_transformers_5_are_loaded():
    swin, other = model("swin"), model("swin", seed=1)
    state = {f"backbone.swin.{n[9:]}" if n.startswith("backbone.") else n: x for n, x in swin.state_dict().items()}
    renamed = {name.replace("attention.self.query", "attention.q_proj"): x for name, x in state.items()}
    assert any("q_proj" in name for name in renamed)
    other.load_state_dict(renamed)
    same_outputs(swin, other)


def test_a_checkpoint_of_another_model_is_refused(network, tmp_path):
    state = {
        name: x for name, x in network.state_dict().items() if not name.startswith("decode_head.object_head.conv.")
    }
    with pytest.raises(CheckpointError, match=r"such as decode_head\.object_head\.conv"):
        UperNetForUnifiedPerceptualParsing.from_pretrained(None, config=network.config, state_dict=state)


def test_initial_values():
    new = UperNetForUnifiedPerceptualParsing(config(hidden_size=64))
    conv = new.decode_head.fpn_bottleneck.conv.weight
    assert conv.std().item() == pytest.approx((2 / conv[0].numel()) ** 0.5, rel=0.02)
    classifier = new.decode_head.object_head.classifier
    assert classifier.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.2)
    assert 0 < classifier.bias.abs().max() <= 1 / 8
    for module in new.decode_head.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all()
            assert module.bias.eq(1e-4).all()
            assert module.running_mean.eq(0).all()
            assert module.running_var.eq(1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(network, dtype):
    half = copy.deepcopy(network).to(dtype)
    exact = network(images(), labels())
    output = half(images().to(dtype), labels())
    assert {output[task].dtype for task in TASKS} == {dtype}
    assert output.loss.dtype == dtype
    assert output.loss.item() == pytest.approx(exact.loss.item(), rel=0.05)
    (first, second) = half.parse(images().to(dtype)), network.parse(images())
    assert (first[0].objects == second[0].objects).float().mean() > 0.9


def test_autocast(network):
    exact = network(images(), labels())
    with torch.autocast("cpu", torch.bfloat16):
        output = network(images(), labels())
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(exact.loss.item(), rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(checkpointing):
    training = model().train()
    if checkpointing:
        training.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD(training.parameters(), lr=0.005)
    losses = []
    for _ in range(4):
        loss = training(images(), labels()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in training.decode_head.parameters())
    norms = [m for m in training.decode_head.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {int(norm.num_batches_tracked) for norm in norms} == {4}


def test_checkpointing_changes_no_gradient():
    ways = [model().train().double() for _ in range(2)]
    ways[1].gradient_checkpointing_enable()
    for way in ways:
        way(images().double(), labels()).loss.backward()
    for (name, first), second in zip(ways[0].named_parameters(), ways[1].parameters(), strict=True):
        assert error(second.grad, first.grad) < 1e-10, name


@pytest.fixture
def forgotten():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def outputs_agree(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-4)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("forgotten")
def test_compile(network):
    compiled = torch.compile(network, fullgraph=True, backend="eager", dynamic=True)
    with torch.no_grad():
        for height, width in ((64, 80), (67, 91)):
            outputs_agree(compiled(images(2, height, width)), network(images(2, height, width)))


@pytest.mark.exhaustive
@pytest.mark.usefixtures("forgotten")
def test_compiled_loss(network):
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    found, expected = (way(images(), labels()) for way in (compiled, network))
    outputs_agree(found, expected)
    ours, theirs = (torch.autograd.grad(x.loss, list(network.decode_head.parameters())) for x in (found, expected))
    for first, second in zip(ours, theirs, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


@pytest.mark.exhaustive
def test_export(network):
    auto = torch.export.Dim.AUTO
    with torch.no_grad():
        program = torch.export.export(
            network, (images(),), dynamic_shapes={"pixel_values": {0: auto, 2: auto, 3: auto}}
        )
        for batch, height, width in ((2, 64, 80), (3, 97, 70)):
            outputs_agree(
                dict(program.module()(images(batch, height, width))), dict(network(images(batch, height, width)))
            )


@pytest.mark.exhaustive
def test_its_class_is_known_to_transformers(network):
    transformers = pytest.importorskip("transformers")
    assert isinstance(network, transformers.PreTrainedModel)
    assert isinstance(network.config, transformers.PretrainedConfig)

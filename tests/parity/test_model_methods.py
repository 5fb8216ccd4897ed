"""The public methods and attributes of `transformers.PreTrainedModel`, on Transformers' UPerNet and on ours."""

from __future__ import annotations

import copy
import inspect
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload, infer_auto_device_map
from torch import nn

import fastuper
from bench.pairs import VERSION_5, images, pair
from fastuper import UperNetForSemanticSegmentation
from tests.parity.models import FAMILIES, config, segmentation_labels

DOCUMENT = Path(__file__).parents[2] / "docs" / "differences.md"
# Not compared: parts of the network and of its configuration, which other tests compare, and methods that the document
# lists with another answer than Transformers'.
PARTS = {"auxiliary_head", "backbone", "config", "config_class", "decode_head"}
OTHER_ANSWER = {
    "activation_checkpointing_disable",
    "activation_checkpointing_enable",
    "disable_input_require_grads",
    "dummy_inputs",
    "enable_input_require_grads",
    "gradient_checkpointing_disable",
    "gradient_checkpointing_enable",
    "is_custom_code",
    "supports_gradient_checkpointing",
    "supports_pp_plan",
    "supports_tp_plan",
}


def left_out() -> set[str]:
    """Return the names in the document's table of what is left out."""
    text = DOCUMENT.read_text(encoding="utf-8").split("### Left out")[1].split("\n#")[0]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return set(re.findall(r"`(\w+)`", " ".join(rows)))


@pytest.fixture(scope="module")
def models() -> Any:
    return pair(config("convnext"), dtype=torch.float32)


def names_of_theirs(theirs: nn.Module) -> set[str]:
    names = {*dir(transformers.PreTrainedModel), *dir(theirs)} - set(dir(nn.Module()))
    return {name for name in names if not name.startswith("_")}


def answer(model: nn.Module, name: str) -> Any:
    """Return an attribute, or what a method without required arguments returns; or the type of the exception."""
    try:
        value = getattr(model, name)
        if callable(value) and not isinstance(value, nn.Module | type):
            value = value()
    except Exception as error:
        return type(error)
    if value is model:
        return "the model itself"
    return list(value) if inspect.isgenerator(value) else value


def test_every_name_is_answered_or_documented(models):
    theirs, ours = models
    missing = {name for name in names_of_theirs(theirs) if not hasattr(ours, name)}
    assert missing <= left_out()
    assert not {name for name in left_out() if hasattr(ours, name)}, "the document lists these as left out"


def test_answers_without_arguments_are_transformers(models):
    theirs, ours = copy.deepcopy(models)  # `init_weights` changes weights
    compared = 0
    for name in sorted(names_of_theirs(theirs) - left_out() - PARTS - OTHER_ANSWER):
        value = getattr(theirs, name)
        if callable(value) and not isinstance(value, type):
            parameters = inspect.signature(value).parameters.values()
            if any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters):
                continue
        assert answer(ours, name) == answer(theirs, name), name
        compared += 1
    assert compared > 25
    text = DOCUMENT.read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in OTHER_ANSWER)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("set_input_embeddings", (nn.Embedding(2, 2),)),
        ("resize_token_embeddings", (5,)),
        ("resize_position_embeddings", (5,)),
        ("get_parameter_or_buffer", ("no.such.tensor",)),
        ("get_correct_attn_implementation", ("no such attention",)),
        ("set_attn_implementation", ("no such attention",)),
        ("set_attn_implementation", ({"": "no such attention"},)),
    ],
    ids=str,
)
def test_refused_as_by_transformers(models, name, args):
    errors = []
    for model in models:
        with pytest.raises(Exception, match=r".") as raised:
            getattr(model, name)(*args)
        errors.append(raised.type)
    assert issubclass(errors[1], errors[0])


@pytest.mark.parametrize("given", ["eager", None, {"": "eager"}, {"": "eager", "backbone_config": "eager"}], ids=str)
def test_attention_is_set(models, given):
    for model in models:
        model.set_attn_implementation(given)
    ours = models[1]
    ours.set_attn_implementation("sdpa")
    with torch.no_grad():
        assert torch.isfinite(ours(images(1, 3, 32, 32, dtype=torch.float32)).logits).all()


def test_calls_with_arguments(models):
    theirs, ours = models
    assert ours.get_memory_footprint(return_buffers=False) == theirs.get_memory_footprint(return_buffers=False)
    for name in ("decode_head.classifier.weight", "decode_head.bottleneck.batch_norm.running_mean"):
        assert torch.equal(ours.get_parameter_or_buffer(name), theirs.get_parameter_or_buffer(name))
    assert ours.num_parameters(True, True) == theirs.num_parameters(True, True)
    batch = {"pixel_values": images(2, 3, 32, 32, dtype=torch.float32)}
    if not VERSION_5:
        assert ours.floating_point_ops(batch) == theirs.floating_point_ops(batch) > 0
    ours(**ours.dummy_inputs)
    assert UperNetForSemanticSegmentation.can_generate() is False
    assert [n for n, _ in pair(config("swin"))[1].named_non_persistent_buffers()] == []


class Extended:
    """What a user's subclass of either library's class adds."""

    def add(self: Any) -> None:
        self.extra = nn.Conv2d(7, 7, 1)
        self.last = nn.Sequential(nn.ConvTranspose2d(7, 7, 2, stride=2), nn.GroupNorm(1, 7), nn.Bilinear(2, 3, 4))
        self.scale = nn.Parameter(torch.full((3,), 5.0))
        self.post_init()


def extended(base: Any) -> Any:
    class Mine(Extended, base):
        def __init__(self, config: Any):
            super().__init__(config)
            self.add()

    return Mine


@pytest.mark.parametrize("library", [transformers, fastuper], ids=["Transformers", "ours"])
def test_a_subclass_initialises_what_it_adds(library):
    torch.manual_seed(0)
    model = extended(library.UperNetForSemanticSegmentation)(config("convnext", initializer_range=0.1))
    assert 0.05 < model.extra.weight.std() < 0.2
    assert not model.extra.bias.any()
    if library is fastuper or VERSION_5:  # 4.x leaves transposed convolutions as they are
        assert 0.05 < model.last[0].weight.std() < 0.2
        assert not model.last[0].bias.any()
    assert (model.last[1].weight == 1).all()
    assert (model.scale == 5).all()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for method in (model.post_init, model.init_weights, model.tie_weights):
        method()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_loaded_model_keeps_its_weights(models, tmp_path):
    ours = models[1]
    ours.save_pretrained(tmp_path)

    class Mine(fastuper.UperNetForSemanticSegmentation):
        def __init__(self, config: Any):
            super().__init__(config)
            self.extra = nn.Sequential(nn.Conv2d(7, 7, 1), nn.Bilinear(2, 3, 4))
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            if isinstance(module, nn.Bilinear):
                nn.init.constant_(module.weight, 2.0)
                nn.init.constant_(module.bias, 3.0)
            elif isinstance(module, nn.Conv2d):
                nn.init.constant_(module.weight, 0.5)
            else:
                super()._init_weights(module)

    built = Mine(ours.config)
    assert (built.decode_head.classifier.weight == 0.5).all()
    assert (built.backbone.embeddings.patch_embeddings.weight != 0.5).any()
    model = Mine.from_pretrained(tmp_path)
    model.post_init()
    model.init_weights()
    assert (model.extra[0].weight == 0.5).all()
    assert (model.extra[1].weight == 2).all()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())

    class NoRule(fastuper.UperNetForSemanticSegmentation):
        def __init__(self, config: Any):
            super().__init__(config)
            self.extra = nn.Bilinear(2, 3, 4)

    with pytest.raises(NotImplementedError, match=r"no initial value is defined for weight of Bilinear; override"):
        NoRule.from_pretrained(tmp_path)


def test_a_model_from_the_meta_device(models):
    ours = models[1]
    with torch.device("meta"):
        model = fastuper.UperNetForSemanticSegmentation(ours.config)
    model.to_empty(device="cpu").init_weights()
    assert model.eval()(images(1, 3, 32, 32, dtype=torch.float32)).logits.isfinite().all()
    assert (model.decode_head.bottleneck.batch_norm.running_var == 1).all()


def test_weights_as_an_argument(models, tmp_path):
    theirs, ours = models
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    for library, given in ((transformers, theirs.config), (fastuper, theirs.config), (fastuper, ours.config)):
        model = library.UperNetForSemanticSegmentation.from_pretrained(None, config=given, state_dict=state)
        assert library is transformers or model.name_or_path == ""
        assert not model.training
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    ours.save_pretrained(tmp_path)
    shifted = {name: tensor + 1 for name, tensor in state.items()}
    model = fastuper.UperNetForSemanticSegmentation.from_pretrained(tmp_path, state_dict=shifted)
    assert torch.equal(model.decode_head.classifier.bias, state["decode_head.classifier.bias"] + 1)
    load = fastuper.UperNetForSemanticSegmentation.from_pretrained
    with pytest.raises(ValueError, match="needs both config= and state_dict="):
        load(None, state_dict=state)
    with pytest.raises(TypeError, match="state_dict holds tensors; a are none"):
        load(None, config=ours.config, state_dict={"a": 1})


def test_values_of_a_batch_that_forward_does_not_read(models, caplog):
    ours = models[1]
    pixels = images(1, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="fastuper"):
        expected = ours(pixels).logits
        for _ in range(2):
            output = ours(pixels, pixel_mask_of_this_test=torch.ones(1), mask_labels_of_this_test=None)
    assert torch.equal(output.logits, expected)
    assert caplog.text.count("forward does not read pixel_mask_of_this_test, mask_labels_of_this_test") == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_backbone_is_called_by_transformers_name(family):
    theirs, ours = pair(config(family), dtype=torch.float32)
    pixels = images(1, 3, 32, 32, dtype=torch.float32)
    arguments = {"output_hidden_states": True, "output_attentions": False}
    with torch.no_grad():
        maps = [m.backbone.forward_with_filtered_kwargs(pixels, **arguments).feature_maps for m in (theirs, ours)]
    for expected, found in zip(*maps, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_auto_classes_build_our_model(models, tmp_path):
    auto = transformers.AutoModelForSemanticSegmentation
    auto.register(fastuper.UperNetConfig, fastuper.UperNetForSemanticSegmentation, exist_ok=True)
    try:
        given = models[1].config
        for kwargs in ({}, {"dtype": torch.bfloat16}, {"torch_dtype": "bfloat16"}, {"attn_implementation": "eager"}):
            model = auto.from_config(given, **kwargs)
            assert type(model) is fastuper.UperNetForSemanticSegmentation
            assert model.dtype == (torch.bfloat16 if "bfloat16" in str(kwargs) else torch.float32)
            given = fastuper.UperNetConfig.from_dict({**given.to_dict(), "dtype": None})
        models[1].save_pretrained(tmp_path)
        loaded = auto.from_pretrained(tmp_path, config=fastuper.UperNetConfig.from_pretrained(tmp_path))
        assert type(loaded) is fastuper.UperNetForSemanticSegmentation
    finally:
        del auto._model_mapping._extra_content[fastuper.UperNetConfig]


@pytest.mark.parametrize("family", FAMILIES)
def test_accelerate_divides_the_model_between_its_blocks(family):
    ours = pair(config(family), dtype=torch.float32)[1]
    pixels = images(1, 3, 64, 64, dtype=torch.float32)
    blocks = ours._no_split_modules
    assert blocks
    with torch.no_grad():
        expected = ours(pixels).logits
        places = infer_auto_device_map(
            ours, max_memory={"cpu": int(0.8 * ours.get_memory_footprint())}, no_split_module_classes=blocks
        )
        assert set(places.values()) == {"cpu", "disk"}
        inside = {name for name, module in ours.named_modules() if type(module).__name__ in blocks}
        assert not any(any(place.startswith(f"{block}.") for block in inside) for place in places)
        cpu_offload(ours, execution_device=torch.device("cpu"))
        torch.testing.assert_close(ours(pixels).logits, expected, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_in_an_old_configuration():
    given = config("convnext")
    given.gradient_checkpointing = True
    ours = fastuper.UperNetForSemanticSegmentation(given).train()
    assert ours.is_gradient_checkpointing
    assert not hasattr(ours.config, "gradient_checkpointing")
    labels = segmentation_labels(2, 64, 64)
    ours(images(2, 3, 64, 64, dtype=torch.float32), labels=labels).loss.backward()

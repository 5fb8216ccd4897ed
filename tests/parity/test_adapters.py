"""Adapters of PEFT: trained on Transformers' model and loaded on ours, and the other way."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from bench.pairs import VERSION_5, images, pair
from fastuper.models.pretrained import rename_on_load
from tests.parity.models import config

BOTH = ["query", "value", "q_proj", "v_proj"]
# The two pairs of names in each library: Transformers 5 has renamed the modules of its Swin.
THEIRS = ["q_proj", "v_proj"] if VERSION_5 else ["query", "value"]
OURS = ["query", "value"]

# PEFT's key_mapping for the other direction, from docs/training.md.
TO_TRANSFORMERS_5 = {
    rf"^backbone\.encoder\.(.+)\.{ours}\.": rf"backbone.swin.encoder.\1.{theirs}."
    for ours, theirs in {
        r"attention\.self\.query": "attention.q_proj",
        r"attention\.self\.key": "attention.k_proj",
        r"attention\.self\.value": "attention.v_proj",
        r"attention\.output\.dense": "attention.o_proj",
        r"intermediate\.dense": "mlp.fc1",
        r"output\.dense": "mlp.fc2",
    }.items()
}


def models() -> Any:
    return pair(config("swin"), dtype=torch.float32)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=images(1, 3, 48, 64, dtype=torch.float32)).logits


def trained(model: nn.Module, adapter: Any, folder: Path) -> torch.Tensor:
    """Put an adapter with random weights on a model, save it, and return the logits."""
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, adapter)
    wrapped.save_pretrained(str(folder))
    return logits(wrapped)


def load(model: nn.Module, folder: Path, **kwargs: Any) -> nn.Module:
    """Load an adapter; every tensor must have found its place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected) adapter keys")
        return peft.PeftModel.from_pretrained(model, str(folder), **kwargs)


def lora(targets: Any, **kwargs: Any) -> Any:
    return peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False, **kwargs)


ADAPTERS = {
    "names-of-both": lambda: lora(BOTH),
    "expression": lambda: lora(r".*attention.*\.(query|q_proj)"),
    "classifier-saved": lambda: lora(BOTH, modules_to_save=["classifier"]),
    "MLP": lambda: lora(["intermediate.dense", "output.dense", "fc1", "fc2", "o_proj"]),
    "IA3": lambda: peft.IA3Config(target_modules=BOTH, feedforward_modules=[], init_ia3_weights=False),
    "LoHa": lambda: peft.LoHaConfig(target_modules=BOTH, r=2, init_weights=False),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_was_trained_on_transformers_model(name, tmp_path):
    theirs, ours = models()
    before = logits(ours)
    expected = trained(theirs, ADAPTERS[name](), tmp_path)
    wrapped = load(ours, tmp_path)
    torch.testing.assert_close(logits(wrapped), expected, rtol=1e-4, atol=1e-5)
    assert (expected - before).abs().max() > 1e-3


def test_an_adapter_with_only_transformers_names(tmp_path):
    theirs, ours = models()
    expected = trained(theirs, lora(THEIRS), tmp_path)
    adapter = peft.PeftConfig.from_pretrained(str(tmp_path))
    adapter.target_modules = set(OURS)
    torch.testing.assert_close(logits(load(ours, tmp_path, config=adapter)), expected, rtol=1e-4, atol=1e-5)


def test_a_second_adapter(tmp_path):
    theirs, ours = models()
    expected = trained(theirs, lora(BOTH), tmp_path)
    wrapped = peft.get_peft_model(ours, lora(OURS))
    wrapped.load_adapter(str(tmp_path), "second", key_mapping=ours.adapter_key_mapping)
    wrapped.set_adapter("second")
    torch.testing.assert_close(logits(wrapped), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["names-of-both", "MLP"])
def test_an_adapter_that_was_trained_on_our_model(name, tmp_path):
    theirs, ours = models()
    expected = trained(ours, ADAPTERS[name](), tmp_path)
    wrapped = load(theirs, tmp_path, key_mapping=TO_TRANSFORMERS_5 if VERSION_5 else None)
    torch.testing.assert_close(logits(wrapped), expected, rtol=1e-4, atol=1e-5)


def test_names_that_no_module_has_are_refused_in_one_line():
    ours = models()[1]
    with pytest.raises(ValueError, match=r"^Target modules .*q_proj.* not found in the base model") as error:
        peft.get_peft_model(ours, lora(["q_proj", "v_proj"]))
    assert "\n" not in str(error.value)


def test_tensors_of_an_adapter_without_a_place_are_named(caplog):
    ours = models()[1]
    name = "backbone.swin.encoder.layers.0.blocks.0.attention.k_proj.lora_A.weight"
    state = {f"base_model.model.{name}": torch.zeros(2, 16)}
    with caplog.at_level(logging.WARNING, logger="fastuper"):
        rename_on_load(ours, state, "base_model.model.")
    assert "1 tensors have no place in the model, such as " in caplog.text
    assert "attention.self.key.lora_A.weight" in caplog.text
    caplog.clear()
    rename_on_load(ours, {**ours.state_dict(), "decode_head.unknown.weight": torch.zeros(1)}, "")
    assert not caplog.text


def test_training_with_gradient_checkpointing_then_merging():
    ours = models()[1]
    wrapped = peft.get_peft_model(ours, lora(BOTH))
    ours.gradient_checkpointing_enable()
    ours.enable_input_require_grads()
    labels = torch.zeros(2, 48, 64, dtype=torch.long)
    wrapped.train()(pixel_values=images(2, 3, 48, 64, dtype=torch.float32), labels=labels).loss.backward()
    grads = [p.grad for name, p in wrapped.named_parameters() if "lora_" in name]
    assert grads
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
    expected = logits(wrapped)
    torch.testing.assert_close(logits(wrapped.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)

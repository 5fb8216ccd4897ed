"""A model that is built, not loaded, has initial weights of the same distributions as in Transformers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import transformers

import fastuper
from bench.pairs import hub_names
from tests.parity.models import FAMILIES, config

CASES = {
    **{family: (family, {}, {}) for family in FAMILIES},
    "convnext-other-range": (
        "convnext",
        {"initializer_range": 0.1, "layer_scale_init_value": 0.3},
        {"initializer_range": 0.005},
    ),
    "swin-other-range": (
        "swin",
        {"initializer_range": 0.1, "use_absolute_embeddings": True, "image_size": 32},
        {"initializer_range": 0.005},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_distributions(case):
    family, backbone, head = CASES[case]
    given = config(family, backbone, **head)
    torch.manual_seed(1)
    theirs = transformers.UperNetForSemanticSegmentation(copy.deepcopy(given))
    torch.manual_seed(2)
    ours = fastuper.UperNetForSemanticSegmentation(given)
    expected = hub_names({**dict(theirs.named_parameters()), **dict(theirs.named_buffers())})
    tensors = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
    drawn = 0
    for name, tensor in tensors.items():
        if name.endswith("relative_position_index"):
            continue  # flat in Transformers 5; the tests of attentions check it
        reference = expected[name]
        if "position_embeddings" in name and tensor.shape != reference.shape:
            assert reference.shape[1] == tensor.shape[1] + 1  # 4.56 has one position too many
            reference = reference[:, 1:]
        assert tensor.shape == reference.shape, name
        if reference.unique().numel() == 1:
            assert torch.equal(tensor, reference), name
            continue
        drawn += 1
        n = reference.numel()
        std = reference.std().item()
        # Of n normal draws the mean deviates by std / sqrt(n), the standard deviation by std / sqrt(2 n): allow 5 of
        # these, for the difference of two samples.
        assert abs(tensor.mean().item() - reference.mean().item()) < 5 * std * math.sqrt(2 / n), name
        assert abs(tensor.std().item() - std) < 5 * std / math.sqrt(n), name
        # Five or more deviations from the mean are rare for a normal distribution, and impossible for a uniform one.
        kurtosis = ((tensor - tensor.mean()) / tensor.std()).pow(4).mean().item()
        assert abs(kurtosis - 3) < 5 * math.sqrt(24 / n) + 10 / n, name
    assert drawn > 20
    assert {name for name in expected if not name.endswith("relative_position_index")} == {
        name for name in tensors if not name.endswith("relative_position_index")
    }


def test_initialize_can_fill_some_tensors_alone():
    ours = fastuper.UperNetForSemanticSegmentation(config("swin"))
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    name = "decode_head.classifier.weight"
    ours.initialize({name})
    changed = {key for key, tensor in ours.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == {name}


def test_a_seed_gives_the_same_model_twice():
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(fastuper.UperNetForSemanticSegmentation(config("convnext")).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])

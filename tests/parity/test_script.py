"""Transformers' example script with one added line, `fastuper.accelerate(model)`: the same losses."""

from __future__ import annotations

import pytest
import transformers

from bench import script
from bench.names import ACCELERATED, BEFORE
from bench.pairs import STAGES, randomize
from fastuper.patch.accelerated import Accelerated
from fastuper.scenes import ID2LABEL

BACKBONES = {
    "convnext": transformers.ConvNextConfig(hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 2, 1], out_features=STAGES),
    "swin": transformers.SwinConfig(
        embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4], drop_path_rate=0.0, out_features=STAGES
    ),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", BACKBONES)
def test_the_example_script_has_the_same_losses(kind, tmp_path):
    channels = {"convnext": 32, "swin": 64}[kind]
    head = {"hidden_size": 32, "auxiliary_channels": 16, "auxiliary_in_channels": channels, "num_labels": len(ID2LABEL)}
    config = transformers.UperNetConfig(backbone_config=BACKBONES[kind], **head)
    model = transformers.UperNetForSemanticSegmentation(config)
    randomize(model)
    script.write_checkpoint(tmp_path / "checkpoint", model, 64)
    plain, accelerated = (
        script.train(tmp_path / "checkpoint", tmp_path / variant, variant, steps=20, batch=2)
        for variant in (BEFORE[0], ACCELERATED)
    )
    assert plain.model is transformers.UperNetForSemanticSegmentation
    assert issubclass(accelerated.model, plain.model)
    assert issubclass(accelerated.model, Accelerated)
    assert len(plain.losses) == 20
    assert len(set(plain.losses)) == 20
    assert script.compare(plain, accelerated) < 1e-4
    # Transformers loads what the accelerated model's Trainer has saved.
    loaded = transformers.UperNetForSemanticSegmentation.from_pretrained(tmp_path / ACCELERATED)
    assert type(loaded) is plain.model

"""The recipes of vision transformers are those of the configuration files that mmsegmentation installs."""

from __future__ import annotations

from pathlib import Path

import mmseg
import pytest
from mmengine.config import Config
from mmseg.engine.optimizers.layer_decay_optimizer_constructor import get_layer_id_for_vit

from tests.recipes.test_recipes import VISION_TRANSFORMERS, mmsegmentation_vit_scale

FOLDER = Path(mmseg.__file__).parent / ".mim" / "configs"


@pytest.mark.parametrize("name", VISION_TRANSFORMERS)
def test_values_are_those_of_the_configuration_file(name):
    file, rate, weight_decay, layer_decay, drop_path, blocks = VISION_TRANSFORMERS[name]
    config = Config.fromfile(FOLDER / f"{file}.py")
    optimizer, backbone = config.optim_wrapper.optimizer, config.model.backbone
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("AdamW", rate, weight_decay)
    assert optimizer.betas == (0.9, 0.999)
    assert config.optim_wrapper.paramwise_cfg.get("layer_decay_rate", 1) == layer_decay
    assert (backbone.drop_path_rate, list(backbone.out_indices)) == (drop_path, blocks)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("backbone.patch_embed.projection.weight", "backbone.embeddings.patch_embeddings.projection.weight"),
        ("backbone.cls_token", "backbone.embeddings.cls_token"),
        ("backbone.layers.0.ln1.weight", "backbone.encoder.layers.0.layernorm_before.weight"),
        ("backbone.layers.11.attn.proj.bias", "backbone.encoder.layers.11.attention.output.bias"),
        ("neck.upsample_4x.0.weight", "backbone.neck.levels.0.0.weight"),
        ("decode_head.conv_seg.weight", "decode_head.classifier.weight"),
    ],
)
def test_layers_are_those_of_the_constructor(theirs, ours):
    layers = 12
    scale = 0.9 ** (layers + 2 - get_layer_id_for_vit(theirs, layers + 2) - 1)
    assert mmsegmentation_vit_scale(ours, layers, 0.9) == pytest.approx(scale)

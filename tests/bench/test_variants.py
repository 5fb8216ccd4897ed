"""Tests of bench.variants: all variants compute the same logits, and pack their weights once."""

from typing import Any

import pytest
import torch

from bench import pairs, peers, variants
from bench.numerics import error
from fastuper_kernels.cpu import packs
from tests.parity.models import backbone_config

TASK = peers.Task("logits", "convnext", 64)


@pytest.fixture(scope="module")
def world():
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setitem(pairs.BACKBONES, "convnext", lambda: backbone_config("convnext"))
        yield peers.World("convnext")


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that receives each pack made during the test."""
    made = []
    entry = packs._Entry

    def spy(*args: Any) -> Any:
        made.append(entry(*args))
        return made[-1]

    monkeypatch.setattr(packs, "_Entry", spy)
    packs.clear()
    return made


@pytest.mark.parametrize("step", variants.VARIANTS)
def test_steps_agree_and_pack_nothing_twice(world: peers.World, step: str, packed: list[Any]):
    with torch.inference_mode():
        truth = world.theirs("float32")(world.pixels(TASK)).logits
        call = variants.VARIANTS[step].build(world, TASK)
        assert error(call(), truth) < 3e-6
        first = len(packed)
        assert error(call(), truth) < 3e-6
    assert len(packed) == first, "a timed call packs weights"
    if step == "Winograd":
        assert first

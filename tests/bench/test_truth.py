"""Tests of bench.truth: the cached float64 logits are found by the contents of weights and pixels."""

from pathlib import Path

import pytest
import torch

from bench import pairs, peers, truth
from tests.parity.models import backbone_config

TASK = peers.Task("logits", "convnext", 32)


def test_other_weights_or_pixels_have_another_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(pairs.BACKBONES, "convnext", lambda: backbone_config("convnext"))
    monkeypatch.setattr(truth, "CACHE", tmp_path)
    with torch.inference_mode():
        same, weights, pixels = (peers.World("convnext") for _ in range(3))
        weights._theirs.decode_head.classifier.bias[3] += 1
        pixels.pixels(TASK)[0, 0, 0, 0] += 1
        first = truth.stride_4_logits(peers.World("convnext"), TASK)
        assert len(list(tmp_path.iterdir())) == 1
        monkeypatch.setattr(truth, "exact", lambda world: pytest.fail("it was computed again"))
        assert torch.equal(truth.stride_4_logits(same, TASK), first)
        monkeypatch.undo()
        monkeypatch.setattr(truth, "CACHE", tmp_path)
        for count, world in enumerate((weights, pixels), start=2):
            assert not torch.equal(truth.stride_4_logits(world, TASK), first)
            assert len(list(tmp_path.iterdir())) == count

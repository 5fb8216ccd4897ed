"""The accelerated heads of Transformers' BEiT and Data2Vec are the same functions as before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fastuper
from bench.numerics import error
from tests.patch.sameness import CHECKS, EXACT, Kind, check_explain, equal, pair

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 48,
    "patch_size": 8,
    "num_labels": 5,
    "out_indices": [1, 2, 3, 4],
    "auxiliary_channels": 8,
    "auxiliary_concat_input": True,
    "use_relative_position_bias": True,
}


def made(name: str) -> Callable[[], nn.Module]:
    config = getattr(transformers, f"{name}Config")
    return lambda: getattr(transformers, f"{name}ForSemanticSegmentation")(config(**SMALL))


KINDS = {
    name: Kind(
        made(name),
        lambda model, images: model(images).logits,
        "decode_head",
        lambda model, images, labels: model(images, labels=labels).loss,
    )
    for name in ("Beit", "Data2VecVision")
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", KINDS)
def test_same(name: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    CHECKS[check](KINDS[name], monkeypatch)


@pytest.mark.parametrize("name", KINDS)
def test_explain(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    check_explain(KINDS[name], monkeypatch, capsys)


def test_saves_as_before(tmp_path: Path) -> None:
    ours, theirs = pair(KINDS["Beit"])
    ours.save_pretrained(tmp_path)
    loaded = type(theirs).from_pretrained(tmp_path).double().eval()
    assert type(loaded) is type(theirs)
    equal(KINDS["Beit"], fastuper.accelerate(loaded), theirs)


def maps_of_head() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(1, 16, side, side, dtype=torch.float64) for side in (24, 12, 6, 3))


@pytest.mark.parametrize("name", ["Beit", pytest.param("Data2VecVision", marks=pytest.mark.exhaustive)])
def test_traced(name: str) -> None:
    ours, theirs = pair(KINDS[name])
    maps = maps_of_head()
    traced = torch.jit.trace(Listed(ours.decode_head), maps)
    assert error(traced(*maps), theirs.decode_head(maps)) < EXACT


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", KINDS)
def test_exported(name: str) -> None:
    ours, theirs = pair(KINDS[name])
    maps = maps_of_head()
    with torch.no_grad():
        program = torch.export.export(Listed(ours.decode_head), maps)
        assert error(program.module()(*maps), theirs.decode_head(maps)) < EXACT


@pytest.mark.exhaustive
def test_compiled() -> None:
    kind = KINDS["Beit"]
    ours, theirs = pair(kind)
    compiled: Any = torch.compile(ours.decode_head)
    with torch.no_grad():
        maps = maps_of_head()
        assert error(compiled(maps), theirs.decode_head(maps)) < EXACT


class Listed(nn.Module):
    """A head that takes its maps as separate arguments, as tracers require."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, *maps: torch.Tensor) -> torch.Tensor:
        return self.head(maps)

"""bench.backbones: processes are measured in turns, the table has the results' figures, the tests exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import backbones, tables
from bench.results import TESTED
from fastuper.recipes import BACKBONES

ROOT = Path(__file__).parents[2]


@pytest.mark.exhaustive  # processes import the libraries
def test_backbones_are_measured_in_their_processes():
    found = {}
    for rows in backbones.measure(["resnet-18", "timm/no-such-model"], rounds=2, size=64):
        found.update(rows)
    assert found["timm/no-such-model"]["skipped"].startswith("ValueError: timm")
    row = found["resnet-18"]
    assert len(row["rounds"]) == 2
    assert row["peak"] > 0
    assert row["parameters"] == pytest.approx(40e6, rel=0.2)


class Fake:
    """A worker without a process; its forwards are numbered."""

    count = 0

    def __init__(self, name: str, size: int):
        self.name = name
        sizes = {"a": 2e8, "b": 2e8, "c": 1e8, "huge": 9e8}
        self.facts = {"parameters": sizes[name]} if name in sizes else {"skipped": "no"}

    def seconds(self) -> float:
        Fake.count += 1
        return float(Fake.count)

    def stop(self) -> None:
        pass


def test_models_of_a_group_take_turns(monkeypatch):
    monkeypatch.setattr(backbones, "Worker", Fake)
    monkeypatch.setattr(Fake, "count", 0)
    found = list(backbones.measure(["a", "b", "c", "huge", "broken"], rounds=2, size=64))
    assert [list(rows) for rows in found] == [["a", "b"], ["c"], ["huge"], ["broken"]]
    assert (found[0]["a"]["rounds"], found[0]["b"]["rounds"]) == ([1, 3], [2, 4])
    assert found[2:] == [{"huge": {"parameters": 9e8}}, {"broken": {"skipped": "no"}}]


def test_the_table():
    row = {"family": "convnext", "parameters": 60.2e6, "peak": 5.6e8, "rounds": [1.5, 1.0, 9.0]}
    text = tables.backbones_table_of(
        {
            "run": "2030-01-02 03:04:05",
            "machine": {"cpu": "A CPU", "instructions": "AVX512", "threads": 2},
            "versions": {"torch": "9.9"},
            "size": 512,
            "classes": 150,
            "rows": {
                "convnext-tiny": row,
                "convnext-large": {**{key: row[key] for key in row if key != "rounds"}, "parameters": 4e8},
                "timm/new": {**row, "family": "timm_backbone"},
                "timm/old": {"skipped": "ValueError: `old`"},
            },
        }
    )
    steps = "forward, training step, save and load, export"
    assert (
        f"| `convnext-tiny` | 60 M | 46.11 (ImageNet-1K, 512; {tables.MMSEG}/convnext)) | 1.5 s | 0.56 GB | {steps} |"
        in text
    )
    assert "| `convnext-large` | 400 M |" in text
    assert "| not timed |" in text
    assert "| `timm/new` | 60 M | - | 1.5 s |" in text
    assert "- `timm/old`: `ValueError: old`" in text
    assert "A CPU (AVX512), 2 threads; PyTorch 9.9; 2030-01-02." in text
    assert tables.backbones_table_of(None) == "Not measured yet: `python -m bench.backbones`."


def test_the_named_tests_exist():
    for steps in TESTED.values():
        for place in steps.values():
            file, _, name = place.partition("::")
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), place
    assert {preset().model_type for preset in BACKBONES.values()} <= TESTED.keys()


def test_published_values_are_those_of_presets():
    assert tables.MIOU.keys() <= BACKBONES.keys()
    for hub, (title, _, _, miou) in tables.PUBLISHED.items():
        if (preset := hub.removeprefix("openmmlab/upernet-")) in tables.MIOU:
            assert float(tables.MIOU[preset][0]) == miou, title

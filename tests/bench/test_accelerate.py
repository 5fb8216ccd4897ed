"""bench.accelerate: rows are measured beside the unchanged model, and the table has the results' figures."""

from __future__ import annotations

import pytest
import transformers

from bench import accelerate, tables
from bench.names import ACCELERATED, BEFORE
from bench.results import ACCELERATIONS, acceleration_targets, verdict
from bench.timing import CannotDo


def tiny(size: int) -> transformers.UperNetForSemanticSegmentation:
    backbone = transformers.ConvNextConfig(
        hidden_sizes=[8, 16, 16, 32], depths=[1] * 4, out_features=[f"stage{number}" for number in (1, 2, 3, 4)]
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=16, auxiliary_in_channels=16, num_labels=5
    )
    return transformers.UperNetForSemanticSegmentation(config)


@pytest.mark.parametrize("row", ["convnext-t", "beit-head"])
def test_a_row_is_measured(row, monkeypatch):
    monkeypatch.setitem(accelerate.MODELS, row, tiny)
    found = accelerate.measure(row, rounds=2, size=64)
    assert list(found["peers"]) == [*BEFORE, ACCELERATED]
    assert all(len(peer["rounds"]) == 2 for peer in found["peers"].values())
    assert all(0 < peer["error"] < 1e-5 for peer in found["peers"].values())
    assert found["accurate"]


def test_a_library_that_is_missing_is_skipped(monkeypatch):
    def missing(size: int) -> None:
        raise CannotDo("smp is not installed")

    monkeypatch.setitem(accelerate.MODELS, "smp-512", missing)
    assert accelerate.measure("smp-512", rounds=1, size=64) == {"skipped": "smp is not installed"}


@pytest.fixture
def result():
    row = {
        "size": 512,
        "peers": {
            BEFORE[0]: {"rounds": [3.0, 9.0, 1.0], "error": 1e-6},
            BEFORE[1]: {"rounds": [4.0, 2.0, 5.0], "error": 8e-7},
            ACCELERATED: {"rounds": [1.0, 0.5, 2.0], "error": 1.3e-6},
        },
    }
    accelerate.conclude(row)
    found = {
        "run": "2030-01-02 03:04:05",
        "machine": {"cpu": "A CPU", "instructions": "AVX512", "threads": 2},
        "versions": {"torch": "9.9"},
        "rows": {"convnext-t": row, "swin-t": row, "smp-512": {"skipped": "smp is not installed"}},
    }
    found["targets"] = acceleration_targets(found)
    return found


def test_ratios_and_targets(result):
    row = result["rows"]["convnext-t"]
    assert (row["faster"], row["accurate"]) == (3.0, False)
    verdicts = [verdict(target) for target in result["targets"]]
    assert verdicts == ["met", "met", "not measured", "not measured", "not measured"]
    assert ACCELERATIONS.keys() == accelerate.MODELS.keys()


def test_the_table(result):
    text = tables.acceleration_table_of(result)
    title = "| Transformers' UPerNet, ConvNeXt-T, 512 x 512 |"
    assert f"{title} 3 s | **1 s** | 3.00 x | 2.4 x, met | 1.0e-6 | 1.3e-6 (**above the rule**) |" in text
    assert "smp's UPerNet, `tu-convnext_tiny`, `decoder_channels=512`, 512 x 512: smp is not installed." in text
    assert "A CPU (AVX512), 2 threads; PyTorch 9.9; 2030-01-02." in text
    assert tables.acceleration_table_of(None) == "Not measured yet: `python -m bench.accelerate`."

"""bench.exports: label maps by NumPy are the definition's, the table and the picture have the results' figures."""

from __future__ import annotations

import re

import pytest
import torch

from bench import exports, plots, tables
from bench.names import OURS_COMPILED
from bench.results import EXPORTS, TINY, export_targets, load_exports, verdict
from fastuper_kernels.ops.upsample_argmax import reference


def test_label_maps_by_numpy():
    logits = torch.randn(1, 7, 9, 11, generator=torch.Generator().manual_seed(0))
    found = torch.from_numpy(exports.label_map(logits[0].numpy(), (13, 20)))
    assert (found != reference(logits, [(13, 20)])[0]).float().mean() < 0.01  # ties within rounding


@pytest.fixture
def result():
    peers = {name: {"rounds": [2.0, 9.0, 1.0], "error": 1e-6} for name in exports.NAMES}
    peers["fastuper, ONNX Runtime"] = {"rounds": [1.0], "error": 8.1e-7}
    peers["fastuper, ONNX Runtime, label map"] = {"rounds": [0.5], "pixels": 1000, "differ_beyond_rounding": 3}
    peers["fastuper, ONNX Runtime, int8"] = {"rounds": [0.25], "error": 0.1}
    peers["Transformers, AOTInductor"] = {"skipped": "RuntimeError: no `compiler`"}
    found = {
        "run": "2030-01-02 03:04:05",
        "machine": {"cpu": "A CPU", "instructions": "AVX512", "threads": 2},
        "versions": {"torch": "9.9"},
        "rows": {key: {"size": 512, "target": [683, 1024], "peers": peers} for key in TINY},
    }
    found["targets"] = export_targets(found)
    return found


def test_targets(result):
    verdicts = [verdict(target) for target in result["targets"][: len(EXPORTS)]]
    missed = [f"missed by a factor of {factor}" for factor in ("1.90", "2.20", "1.50")]
    assert verdicts == ["met", "met", *missed, "not measured", "met"]
    assert {row.before for row in EXPORTS} | {row.after for row in EXPORTS} <= {*exports.NAMES}
    assert {row.int8 for row in EXPORTS} <= {*exports.NAMES, ""}
    assert OURS_COMPILED in exports.NAMES
    assert {model.folder for model in exports.MODELS.values()} == exports.WRITERS.keys()


def test_the_table(result):
    text = tables.exports_table_of(result)
    assert "| ONNX Runtime | 2 s | **1 s** | 2.00 x (1.65 x, met) | 8.1e-7 | 0.25 s |" in text
    assert "| 4.00 x (2.2 x, met) | 3 of 1,000 labels |" in text
    assert "ConvNeXt-T, Transformers, AOTInductor: `RuntimeError: no compiler`." in text
    assert "A CPU (AVX512), 2 threads; PyTorch 9.9; 2030-01-02." in text
    assert tables.exports_table_of(None) == "Not measured yet: `python -m bench.exports`."


def test_the_picture(result, tmp_path):
    assert "0.50 s" in plots.draw_exports(result, tmp_path).read_text()


def test_the_picture_shows_the_committed_results(tmp_path):
    measured = load_exports()
    if measured is None:
        pytest.skip("bench.exports has not run")
    drawn = [path.read_text() for path in (plots.draw_exports(measured, tmp_path), plots.DOCS / "exports.svg")]
    new, old = (re.findall("<text[^>]*>(.*?)</text>", text, re.DOTALL) for text in drawn)
    assert new == old, "run `python -m bench.plots`"

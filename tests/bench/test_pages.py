"""Tables, pictures and verdicts drawn from results: their figures, and that every drawing is the same."""

import copy
import re
from pathlib import Path

import pytest

from bench import plots, tables
from bench.names import COMPILED, EAGER, FASTUPER, ONNX, OPENVINO
from bench.results import TARGETS, Results, conclude, load, load_training, training_targets, verdict
from bench.summary import summary

PEERS = [*EAGER, OPENVINO, ONNX, COMPILED, FASTUPER]
RUN = "2030-01-02 03:04:05"


def task(part: str, backbone: str, size: int, dtype: str = "float32", **seconds: float):
    times = {**dict.fromkeys(PEERS, 3.0), "fastuper": 1.0, **seconds}
    peers = {peer: {"rounds": [time, 9 * time, 0.5 * time], "error": 2e-7} for peer, time in times.items()}
    flop = {"backbone": 5e10, "head": 2e11, "logits": 2.5e11, "as_written": 4.7e11}
    return {
        "run": RUN,
        "section": str(size),
        "part": part,
        "backbone": backbone,
        "size": size,
        "dtype": dtype,
        "flop": flop,
        "peers": peers,
    }


@pytest.fixture
def results():
    tasks = {}
    for backbone in ("convnext-t", "swin-t"):
        for part in ("logits", "labels", "head", "backbone", "waterfall"):
            tasks[f"{part} {backbone} 512 float32"] = task(part, backbone, 512)
        tasks[f"logits {backbone} 512 bfloat16"] = task("logits", backbone, 512, "bfloat16")
        for size in (1024, 2048):
            tasks[f"logits {backbone} {size} float32"] = task("logits", backbone, size)
    slower = tasks["head swin-t 512 float32"]["peers"]
    slower["fastuper"] = {"rounds": [2.0], "error": 1e-3}
    slower["OpenVINO"] = {"skipped": "RuntimeError: no such operator `x`"}
    tasks["logits convnext-t 512 float32"]["peers"]["one convolution"] = {"rounds": [0.1], "flop": 7.7e10}
    peaks = {"Transformers": 4e9, "Transformers, no auxiliary head": 2e9, "fastuper": 1e9}
    memory = {
        "logits convnext-t 1024 float32": {
            "run": RUN,
            "part": "logits",
            "backbone": "convnext-t",
            "size": 1024,
            "peers": {peer: {"peak": peak, "packed": 10**8, "weights": 10**8} for peer, peak in peaks.items()},
        }
    }
    found = {
        "machine": {"name": "m", "cpu": "A CPU", "instructions": "AVX512", "threads": 2},
        "runs": {RUN: {"commit": "c", "threads": 2, "versions": {"torch": "9.9", "openvino": "8.8"}}},
        "tasks": tasks,
        "memory": memory,
    }
    conclude(found)
    return found


def test_medians_ratios_and_targets(results):
    by_name = {target["name"]: target for target in results["targets"]}
    assert len(by_name) == len(TARGETS)
    logits = by_name["ConvNeXt-T, logits, float32, over Transformers"]
    assert (logits["value"], logits["met"], verdict(logits)) == (3.0, True, "met")
    head = by_name["Swin-T, head alone, over Transformers"]
    assert (head["value"], head["met"], verdict(head)) == (1.5, False, "missed by a factor of 1.47")
    memory = by_name["ConvNeXt-T, peak memory of logits at 1024"]
    assert (memory["value"], memory["met"]) == (0.5, True), "of Transformers' least"
    apart = by_name["ConvNeXt-T, peak memory of logits at 1024, packed weights apart"]
    assert apart["value"] == pytest.approx(0.45)
    assert by_name["Swin-T, peak memory of logits at 1024"]["met"] is None  # it was not measured
    assert by_name["tasks at which the accuracy rule is broken"]["value"] == 1
    (limit,) = results["limits"]
    assert limit["limit"] == pytest.approx(2.5e11 / 7.7e11)


def test_targets_of_training():
    faster, memory = training_targets({"backbones": {"convnext-t": {"faster": 1.5, "memory": 0.5}}})
    assert (faster["value"], faster["met"], verdict(faster)) == (1.5, False, "missed by a factor of 1.20")
    assert (memory["value"], memory["met"], verdict(memory)) == (0.5, True, "met")
    assert [verdict(target) for target in training_targets({"backbones": {}})] == ["not measured"] * 2


def test_pages_are_drawn_from_the_results_alone(results):
    before = copy.deepcopy(results)
    for page in tables.PAGES:
        text = page.read_text()
        drawn = tables.with_tables(text, page, results)
        assert drawn == tables.with_tables(drawn, page, results)
        # Drawn from the committed results again, the page is as committed: nothing outside the blocks has changed.
        assert tables.with_tables(drawn, page) == text
    assert results == before
    readme = tables.with_tables(tables.README.read_text(), tables.README, results)
    assert "**3.0x faster on a CPU with ConvNeXt-T" in readme
    assert "(1 s instead of 3 s for the logits of one 512 x 512 image" in readme
    assert "A CPU (AVX512), 2 threads; PyTorch 9.9; 2030-01-02." in readme
    assert "| logits, 512 x 512 | 3 s | **1 s** | [3.0x faster](docs/benchmarks.md#time) |" in readme
    assert "| ConvNeXt-T | ImageNet-1K, 512 | 46.11 | **1 s** (3 s) | not measured |" in readme
    page = tables.with_tables(tables.BENCHMARKS.read_text(), tables.BENCHMARKS, results)
    assert "| Transformers | 3 s (3.00 x) |" in page
    assert "A CPU (AVX512), 2 threads; PyTorch 9.9, OpenVINO 8.8; 2030-01-02." in page
    assert "| at least 2.2 x | 1.50 | **missed by a factor of 1.47** |" in page
    assert "- head swin-t 512 float32: `OpenVINO: RuntimeError: no such operator x`" in page
    assert "missed by a factor" in summary(results)


def test_without_results_pages_say_so():
    text = tables.with_tables(tables.BENCHMARKS.read_text(), tables.BENCHMARKS, None)
    assert f"<!-- table: speed -->\n{tables.NOT_MEASURED}\n<!-- end -->" in text
    text = tables.with_tables(tables.README.read_text(), tables.README, None)
    for name in ("headline", "peers", "numbers", "waterfall"):
        assert f"<!-- table: {name} -->\n{tables.NOT_MEASURED}\n<!-- end -->" in text


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_pages_show_the_committed_results(page: Path):
    assert tables.with_tables(page.read_text(), page) == page.read_text(), "run `python -m bench.tables`"


def test_pictures_are_the_same_each_time(results, tmp_path: Path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        written = plots.draw(results, folder)
        assert [path.stem for path in written] == [plot.name for plot in plots.PLOTS]
    for path in written:
        assert path.read_bytes() == (folders[0] / path.name).read_bytes()


def without_last_digits(picture: str) -> str:
    """Return a picture without the texts that depend on the processor: last digits of coordinates, names from them."""
    picture = re.sub(r"\b[mp][0-9a-f]{10}\b", "part", picture)
    # matplotlib's version has fewer digits after the point and stays.
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.3f}", picture)


def check_pictures(results: Results | None, committed: Path, folder: Path) -> None:
    """Draw the pictures again and compare them: their bytes, or their texts if another matplotlib drew them."""
    drawn = plots.draw(results, folder) if results is not None else []
    names = [path.name for path in drawn]
    assert sorted(names) == sorted(path.name for path in committed.glob("bench-*.svg")), "run `python -m bench.plots`"
    for path in drawn:
        new, old = (without_last_digits(file.read_text()) for file in (path, committed / path.name))
        creators = [re.findall("Matplotlib v[0-9.]+", text) for text in (new, old)]
        assert creators[0], "a picture names matplotlib's version"
        if creators[0] != creators[1]:
            new, old = (re.findall("<text[^>]*>(.*?)</text>", text, re.DOTALL) for text in (new, old))
        assert new == old, "run `python -m bench.plots`"


def test_pictures_show_the_committed_results(tmp_path: Path):
    check_pictures(load(), plots.DOCS, tmp_path)


def test_the_training_picture_shows_the_committed_results(tmp_path: Path):
    trained = load_training()
    if trained is None:
        pytest.skip("bench.training has not run")
    new, old = plots.draw_training(trained, tmp_path).read_text(), (plots.DOCS / "training.svg").read_text()
    new, old = (re.findall("<text[^>]*>(.*?)</text>", text, re.DOTALL) for text in (new, old))
    assert new == old, "run `python -m bench.plots`"


def test_pictures_of_other_results_are_found(results, tmp_path: Path):
    committed, again = tmp_path / "committed", tmp_path / "again"
    committed.mkdir()
    again.mkdir()
    paths = plots.draw(results, committed)
    check_pictures(results, committed, again)
    for path in paths:
        path.write_text(re.sub("Matplotlib v[0-9.]+", "Matplotlib v0.1", path.read_text()))
    check_pictures(results, committed, again)
    results["tasks"]["waterfall swin-t 512 float32"]["peers"]["fastuper"]["rounds"] = [7.0]
    with pytest.raises(AssertionError, match="run `python"):
        check_pictures(results, committed, again)
    with pytest.raises(AssertionError, match="run `python"):
        check_pictures(None, committed, again)

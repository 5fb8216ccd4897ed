"""Exports to OpenVINO: the file, and every family."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import openvino
import pytest
import torch

from bench.numerics import error
from fastuper import UperNetImageProcessor
from fastuper.export import ExportSettings, export_model
from fastuper.export import openvino as exporter
from tests.export.test_onnx import graph_of, small
from tests.models.test_upernet import BACKBONES

METADATA = {"class_names": '["sky", "paved road"]', "fastuper_version": "1"}


def write(folder: Path, model, **options) -> openvino.Model:
    graph = graph_of(model, format="openvino", **options)
    with torch.no_grad():
        exporter.write(graph, graph.settings, folder, METADATA)
    return exporter.core().read_model(folder / "model.xml")


def test_the_file(tmp_path):
    network = small()
    model = write(tmp_path, network)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    assert [x.any_name for x in model.inputs] == ["pixel_values"]
    assert [x.any_name for x in model.outputs] == ["logits"]
    assert str(model.inputs[0].partial_shape) == "[?,3,?,?]"
    information = {name: model.get_rt_info(["model_info", name]).astype(str) for name in model.rt_info["model_info"]}
    assert information.items() >= METADATA.items()
    assert information["labels"] == "sky paved_road"
    assert information["mean_values"] == "123.675 116.28 103.53"
    assert information["scale_values"] == "58.395 57.12 57.375"
    pixels = torch.randn(2, 3, 65, 97)
    run = exporter.load(tmp_path, ExportSettings(format="openvino"))
    with torch.no_grad():
        assert error(torch.from_numpy(run({"pixel_values": pixels.numpy()})["logits"]), network(pixels).logits) < 2e-5
    survives_a_signal(tmp_path)


LOADED_TWICE = """
import signal, sys
from pathlib import Path
from fastuper.export import ExportSettings, openvino

settings = ExportSettings(format="openvino")
first = openvino.load(Path(sys.argv[1]), settings)
second = openvino.load(Path(sys.argv[1]), settings)
del first
del second
signal.signal(signal.SIGUSR1, lambda number, frame: print("handled"))
signal.raise_signal(signal.SIGUSR1)
"""


def survives_a_signal(folder: Path) -> None:
    """Two models that end in the order in which they began leave a process that handles signals."""
    command = [sys.executable, "-c", LOADED_TWICE, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout) == (0, "handled\n"), result.stderr


@pytest.mark.exhaustive
def test_weights_of_float16_take_half_the_space(tmp_path):
    sizes = {}
    for dtype in ("float32", "float16"):
        (tmp_path / dtype).mkdir()
        write(tmp_path / dtype, small(), dtype=dtype)
        sizes[dtype] = (tmp_path / dtype / "model.bin").stat().st_size
    assert sizes["float16"] < 0.55 * sizes["float32"]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"labels": True},
        {"labels": True, "target_size": True, "with_preprocessing": True},
        {"with_preprocessing": True, "size": "70x91"},
        {"size": "97x65"},
        {"dtype": "float16"},
        {"dtype": "bfloat16"},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()) or "default",
)
@pytest.mark.parametrize("family", BACKBONES)
def test_every_family(family, options, tmp_path):
    """Each export has been run at eight sizes, or an error is raised."""
    processor = UperNetImageProcessor(size=(64, 96))
    report = export_model(small(family), tmp_path / "a", format="openvino", processor=processor, **options)
    assert report["checked"]
    model = exporter.core().read_model(tmp_path / "a/model.xml")
    shapes = [[x.get_length() if x.is_static else "?" for x in port.partial_shape] for port in model.inputs]
    free = [[x if isinstance(x, int) else "?" for x in entry["shape"]] for entry in report["inputs"].values()]
    assert shapes == free
    assert [x.any_name for x in model.inputs] == [*report["inputs"]]
    assert json.loads(model.get_rt_info(["model_info", "class_names"]).astype(str)) == [f"LABEL_{i}" for i in range(5)]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "values",
    [{"num_labels": 1}, {"num_labels": 300}, {"use_auxiliary_head": False}, {"align_corners": True}],
    ids=lambda values: next(iter(values)) + "=" + str(next(iter(values.values()))),
)
@pytest.mark.parametrize("labels", [False, True])
def test_other_heads(values, labels, tmp_path):
    processor = UperNetImageProcessor()
    options = {"format": "openvino", "processor": processor, "labels": labels}
    assert export_model(small(**values), tmp_path / "a", **options)["checked"]

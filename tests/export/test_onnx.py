"""Exports to ONNX: the file, the versions of its operators, and every family in ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import fastuper
from fastuper import UperNetImageProcessor
from fastuper.export import ExportError, ExportSettings, export_model
from fastuper.export import onnx as exporter
from fastuper.export.graph import Graph
from fastuper.scenes import ID2LABEL
from tests.models.heads import randomize
from tests.models.test_upernet import BACKBONES
from tests.models.test_upernet import model as small_model

ROOT = Path(__file__).parents[2]


def small(family="convnext", **values):
    torch.manual_seed(0)
    return randomize(small_model(family, hidden_size=16, **values))


def graph_of(model, **options) -> Graph:
    settings = ExportSettings(**{"format": "onnx", **options})
    return Graph(model.to(getattr(torch, settings.dtype)), settings, UperNetImageProcessor()).eval()


def axes(value) -> list[int | str]:
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


def test_the_file(exported_onnx):
    """Names of inputs, outputs and axes, operators, metadata; and nothing of the machine."""
    model = onnx.load(exported_onnx / "model.onnx")
    assert not (exported_onnx / "model.onnx.data").exists()
    assert {x.name: axes(x) for x in model.graph.input} == {"pixel_values": ["batch", 3, "height", "width"]}
    assert {x.name: axes(x) for x in model.graph.output} == {"logits": ["batch", 10, "height", "width"]}
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", exporter.OPSET)]
    assert json.loads((exported_onnx / "export.json").read_text())["opset"] == exporter.OPSET
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["class_names"]) == list(ID2LABEL.values())
    assert json.loads(metadata["mean"]) == [0.485, 0.456, 0.406]
    assert metadata["fastuper_version"] == fastuper.__version__
    assert str(ROOT) not in str(model.graph.node)


def test_large_weights_are_in_a_file_of_their_own(exported_onnx, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "LIMIT", 1000)
    exporter.save(onnx.load(exported_onnx / "model.onnx"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert (tmp_path / "model.onnx").stat().st_size < (exported_onnx / "model.onnx").stat().st_size
    pixels = {"pixel_values": torch.randn(1, 3, 65, 97).numpy()}
    settings = ExportSettings(format="onnx")
    expected = exporter.load(exported_onnx, settings)(pixels)["logits"]
    np.testing.assert_array_equal(exporter.load(tmp_path, settings)(pixels)["logits"], expected)


@pytest.mark.parametrize("opset", [13, 21])
def test_other_versions_are_refused(opset, tmp_path):
    graph = graph_of(small(), opset=opset)
    with pytest.raises(ExportError, match=f"^opset={opset}: give a version of ONNX's operators from 14 to 20$"):
        exporter.write(graph, graph.settings, tmp_path, {})
    assert not any(tmp_path.iterdir())


@pytest.mark.exhaustive
@pytest.mark.parametrize("opset", range(exporter.OLDEST, exporter.NEWEST + 1))
@pytest.mark.parametrize("family", ["convnextv2", "swin", "swinv2", "resnet", "vit_pyramid"])
def test_every_version_of_the_operators(family, opset, tmp_path):
    report = export_model(small(family), tmp_path / "a", processor=UperNetImageProcessor(), opset=opset)
    assert report["checked"]
    assert onnx.load(tmp_path / "a/model.onnx").opset_import[0].version == opset


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
        {"dtype": "float16", "labels": True, "target_size": True},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()) or "default",
)
@pytest.mark.parametrize("family", BACKBONES)
def test_every_family(family, options, tmp_path):
    """Each export has been run at eight sizes, or an error is raised."""
    processor = UperNetImageProcessor(size=(64, 96))
    report = export_model(small(family), tmp_path / "a", format="onnx", processor=processor, **options)
    assert report["checked"]
    session = onnxruntime.InferenceSession(tmp_path / "a/model.onnx")
    assert [x.name for x in session.get_inputs()] == [*report["inputs"]]
    assert [x.shape for x in session.get_inputs()] == [x["shape"] for x in report["inputs"].values()]
    assert session.get_modelmeta().custom_metadata_map["class_names"] == json.dumps([f"LABEL_{i}" for i in range(5)])


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "values",
    [{"num_labels": 1}, {"num_labels": 300}, {"use_auxiliary_head": False}, {"align_corners": True}],
    ids=lambda values: next(iter(values)) + "=" + str(next(iter(values.values()))),
)
@pytest.mark.parametrize("labels", [False, True])
def test_other_heads(values, labels, tmp_path):
    processor = UperNetImageProcessor()
    assert export_model(small(**values), tmp_path / "a", processor=processor, labels=labels)["checked"]

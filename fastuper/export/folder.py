"""The files beside an exported model: export.json, the image processor's configuration, run.py and photo.py."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastuper.data.classes import class_palette
from fastuper.data.panels import task_palette
from fastuper.evaluation.loop import classes_of
from fastuper.export.formats import ExportFormat
from fastuper.export.graph import Graph
from fastuper.export.onnx import opset_of
from fastuper.export.preparing import Prepared
from fastuper.export.proof import bound_of
from fastuper.export.sizes import channels_of, output_of
from fastuper.io.version import __version__
from fastuper.models.parsing import UperNetForUnifiedPerceptualParsing

REPORT = "export.json"


def metadata_of(prepared: Prepared) -> dict[str, str]:
    """Return what is stored inside the model's file, where the format has a place: texts by their names.

    `class_names` is a JSON list; of a parsing model, a JSON object with a list for each task. `mean`, `std` (lists) and
    `size` (an object) are JSON too, of the image processor; empty without that step.
    """
    config, processor = prepared.model.config, prepared.processor
    parses = isinstance(prepared.model, UperNetForUnifiedPerceptualParsing)
    names = {task: list(labels) for task, labels in _tasks(config)} if parses else list(classes_of(config).values())
    return {
        "class_names": json.dumps(names, ensure_ascii=False),
        "mean": json.dumps(processor.image_mean) if processor.do_normalize else "",
        "std": json.dumps(processor.image_std) if processor.do_normalize else "",
        "size": json.dumps(dict(processor.size)) if processor.do_resize else "",
        "fastuper_version": __version__,
    }


def write_beside(
    folder: Path,
    prepared: Prepared,
    graph: Graph,
    exporter: ExportFormat,
    checked: Sequence[Mapping[str, Any]] | None,
    int8: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Write export.json, preprocessor_config.json, run.py and photo.py; return the content of export.json.

    Args:
        folder: has the model's files.
        prepared: the model and its image processor.
        graph: what was exported.
        exporter: the format.
        checked: what the proof found at each size; None without a proof.
        int8: what quantisation changed; None without it.

    Raises:
        OSError: a file cannot be written.
    """
    settings = graph.settings
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    report: dict[str, Any] = {
        "format": settings.format,
        "files": [name for name in exporter.MODEL_FILES if (folder / name).exists()],
        "model": type(prepared.model).__name__,
        "backbone": getattr(prepared.model.config.backbone_config, "model_type", None),
        "versions": {"fastuper": __version__, "python": platform.python_version(), **exporter.versions()},
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in values.items()},
        "inputs": _inputs(graph),
        "outputs": {name: output_of(name, graph) for name in graph.output_names},
        "checked": checked is not None,
    }
    if checked is not None:
        report["proof"] = {"bound": bound_of(graph), "sizes": list(checked)}
    if int8 is not None:
        report["int8"] = dict(int8)
    if settings.format == "onnx":
        report["opset"] = opset_of(settings)
    report |= _classes(prepared.model)
    report["preprocessing"] = prepared.processor.to_dict()
    if prepared.notes:
        report["notes"] = list(prepared.notes)
    (folder / REPORT).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    prepared.processor.save_pretrained(folder)
    for name, script in {"run.py": f"run_{settings.format}.py", "photo.py": "photo.py"}.items():
        (folder / name).write_bytes((files("fastuper.export") / "scripts" / script).read_bytes())
    return report


def _inputs(graph: Graph) -> dict[str, dict[str, Any]]:
    """Return the dtype and shape of each input: numbers, and names of sides that are free."""
    settings = graph.settings
    batch: int | str = 1 if settings.format == "executorch" else "batch"
    sides: Sequence[int | str] = settings.image_size or ("height", "width")
    inputs: dict[str, dict[str, Any]] = {}
    if settings.with_preprocessing:
        inputs["images"] = {"dtype": "uint8", "shape": [batch, *sides, 3]}
    else:
        inputs["pixel_values"] = {"dtype": "float32", "shape": [batch, channels_of(graph.model), *sides]}
    if settings.target_size:
        inputs["target_size"] = {"dtype": "int64", "shape": [2]}
    return inputs


def _classes(model: Any) -> dict[str, Any]:
    """Return the names and colours of the classes in label maps; of a parsing model, of each task by its name."""
    config = model.config
    if not isinstance(model, UperNetForUnifiedPerceptualParsing):
        names = classes_of(config)
        return {"id2label": names, "palette": class_palette(names, getattr(config, "palette", None)).tolist()}
    return {
        "id2label": {task: dict(enumerate(names)) for task, names in _tasks(config)},
        "palette": {task: task_palette(task, len(names)).tolist() for task, names in _tasks(config)},
    }


def _tasks(config: Any) -> list[tuple[str, Sequence[str]]]:
    return [(task, config.labels[task]) for task in config.tasks]

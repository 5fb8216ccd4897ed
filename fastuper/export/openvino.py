"""OpenVINO's intermediate representation: model.xml, the graph, and model.bin, the weights."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastuper.export.formats import runtime_dtype
from fastuper.export.onnx import free_axes
from fastuper.export.settings import ExportSettings
from fastuper.export.sizes import example_inputs
from fastuper_kernels.dispatch.modes import writing_for

if TYPE_CHECKING:
    from fastuper.export.formats import Arrays, Runner
    from fastuper.export.graph import Graph

EXTRA: str | None = "openvino"
PACKAGES: tuple[str, ...] = ("openvino",)
RUNTIME = "openvino"
MODEL_FILES: tuple[str, ...] = ("model.xml", "model.bin")

HINTS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""OpenVINO's names of the dtypes: without a hint it computes in bfloat16 on processors that have it."""


@functools.cache
def core() -> Any:
    """Return OpenVINO's runtime, one for the process.

    For processors with AMX each `openvino.Core` gives the thread a signal stack, and takes it away at its end. Two that
    end in the order in which they began leave the thread a stack that is unmapped: the next signal, such as Ctrl-C or
    the end of a child process, then ends Python (seen with OpenVINO 2026.4).
    """
    import openvino

    return openvino.Core()


def write(graph: Graph, settings: ExportSettings, folder: Path, metadata: Mapping[str, str]) -> None:
    """Write model.xml and model.bin; see `ExportFormat`.

    The weights are stored in float16 for dtype=float16, in float32 otherwise; the arithmetic follows from the hint with
    which a model is compiled, and from the processor.
    """
    import openvino

    wide = copy.deepcopy(graph).float()  # of the weights as the dtype rounds them
    inputs = example_inputs(graph)
    shapes: list[Any] = [list(x.shape) for x in inputs]
    for axis in free_axes(graph):
        shapes[0][axis] = -1
    is_of_one_size = settings.image_size is not None
    with writing_for("openvino", one_size=is_of_one_size, dtype=runtime_dtype(settings)):
        model = openvino.convert_model(wide, example_input=inputs, input=shapes)
    for ports, names in ((model.inputs, graph.input_names), (model.outputs, graph.output_names)):
        for port, name in zip(ports, names, strict=True):
            port.get_tensor().set_names({name})
    for name, value in information(graph, metadata).items():
        model.set_rt_info(value, ["model_info", name])
    file = folder / MODEL_FILES[0]
    openvino.save_model(model, file, compress_to_fp16=settings.dtype == "float16")
    # To resize to one pixel, "pytorch_half_pixel" takes the first pixel, and PyTorch does not.
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace('"pytorch_half_pixel"', '"half_pixel"'), encoding="utf-8")


def load(folder: Path, settings: ExportSettings) -> Runner:
    """Return the model in OpenVINO as a function of arrays; see `ExportFormat`."""
    hints = {"INFERENCE_PRECISION_HINT": HINTS[settings.dtype]}
    model = core().compile_model(folder / MODEL_FILES[0], "CPU", hints)
    names = [output.any_name for output in model.outputs]

    def run(arrays: Arrays) -> dict[str, np.ndarray]:
        return dict(zip(names, model(dict(arrays)).to_tuple(), strict=True))

    return run


def versions() -> dict[str, str]:
    """Return the versions of OpenVINO, and of PyTorch, which traces the graph."""
    import openvino

    return {"torch": torch.__version__, "openvino": openvino.__version__.partition("-")[0]}


def information(graph: Graph, metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata, and what Model API needs to run a model of logits: numbers and names apart by spaces.

    Model API does not rescale pixels: its mean and scale are of 8-bit levels.
    """
    found = dict(metadata)
    names = json.loads(metadata.get("class_names") or "[]")
    if isinstance(names, list):
        found |= {"model_type": "Segmentation", "labels": " ".join("_".join(name.split()) for name in names)}
    steps = graph.processor
    if "images" in graph.input_names or steps is None:
        return found
    factor = steps.rescale_factor if steps.do_rescale else 1.0
    mean, std = (steps.image_mean, steps.image_std) if steps.do_normalize else (0.0, 1.0)
    for key, values in (("mean_values", mean), ("scale_values", std)):
        found[key] = " ".join(f"{value / factor:.9g}" for value in np.ravel(values))
    if steps.do_flip_channel_order:
        found["reverse_input_channels"] = "YES"
    return found

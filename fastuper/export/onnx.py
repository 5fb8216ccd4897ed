"""ONNX: model.onnx, which ONNX Runtime and other runtimes run; weights above 1.8 GB are in model.onnx.data beside it.

`torch.jit.trace` traces the graph, and PyTorch's exporter of such traces writes it: all sizes stay free.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastuper.export.formats import runtime_dtype
from fastuper.export.settings import ExportError, ExportSettings
from fastuper.export.sizes import example_inputs
from fastuper_kernels.dispatch.modes import writing_for

if TYPE_CHECKING:
    from fastuper.export.formats import Runner
    from fastuper.export.graph import Graph

EXTRA: str | None = "onnx"
PACKAGES: tuple[str, ...] = ("onnx",)
RUNTIME = "onnxruntime"
MODEL_FILES: tuple[str, ...] = ("model.onnx", "model.onnx.data")

OPSET = 18
"""The version of ONNX's operators, unless another is asked for."""

OLDEST, NEWEST = 14, 20
"""The oldest version in which all models can be written, and the newest that PyTorch's exporter writes."""

LIMIT = 1_800_000_000
"""The most bytes of weights inside model.onnx; a file of protobuf holds at most 2 GiB."""


def write(graph: Graph, settings: ExportSettings, folder: Path, metadata: Mapping[str, str]) -> None:
    """Write model.onnx; see `ExportFormat`."""
    import onnx

    opset = opset_of(settings)
    inputs = example_inputs(graph)
    outputs = graph(*inputs)
    is_of_one_size = settings.image_size is not None
    way = writing_for("onnxruntime", one_size=is_of_one_size, dtype=runtime_dtype(settings))
    with tempfile.TemporaryDirectory(dir=folder) as temporary, way:
        traced = str(Path(temporary) / "model.onnx")
        torch.onnx.export(
            graph,
            inputs,
            traced,
            dynamo=False,
            opset_version=opset,
            input_names=graph.input_names,
            output_names=graph.output_names,
            dynamic_axes={graph.input_names[0]: free_axes(graph)},
        )
        model = onnx.load(traced)  # with the weights, which above 2 GiB are files of their own
    for node in _nodes(model.graph):
        _as_pytorch_resizes(node)
    for output, example in zip(model.graph.output, outputs if isinstance(outputs, tuple) else (outputs,), strict=True):
        _name_axes(output, example, graph)
    model.producer_name, model.producer_version = "fastuper", metadata.get("fastuper_version", "")
    onnx.helper.set_model_props(model, dict(metadata))
    save(model, folder)


def save(model: Any, folder: Path) -> None:
    """Write a model of ONNX into a folder, its weights in a file of their own if they are large, and check it."""
    import onnx

    file = str(folder / MODEL_FILES[0])
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    onnx.save(model, file, save_as_external_data=size > LIMIT, location=MODEL_FILES[1])
    onnx.checker.check_model(file, full_check=True)


def load(folder: Path, settings: ExportSettings) -> Runner:
    """Return the model in ONNX Runtime as a function of arrays; see `ExportFormat`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # an error is raised, and need not be printed
    session = onnxruntime.InferenceSession(folder / MODEL_FILES[0], options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda arrays: dict(zip(names, session.run(names, dict(arrays)), strict=True))


def versions() -> dict[str, str]:
    """Return the versions of PyTorch, which traces, of ONNX, and of ONNX Runtime if it is installed."""
    import onnx

    found = {"torch": torch.__version__, "onnx": onnx.__version__}
    try:
        import onnxruntime
    except ImportError:  # then there is no proof
        return found
    return {**found, "onnxruntime": onnxruntime.__version__}


def opset_of(settings: ExportSettings) -> int:
    """Return the version of ONNX's operators.

    Raises:
        ExportError: the version that the settings ask for cannot be written.
    """
    if settings.opset is None:
        return OPSET
    if not OLDEST <= settings.opset <= NEWEST:
        raise ExportError(f"opset={settings.opset}: give a version of ONNX's operators from {OLDEST} to {NEWEST}")
    return settings.opset


def free_axes(graph: Graph) -> dict[int, str]:
    """Return the axes of the images whose sizes are free, with their names."""
    if graph.settings.image_size is not None:
        return {0: "batch"}
    height, width = (1, 2) if graph.settings.with_preprocessing else (2, 3)
    return {0: "batch", height: "height", width: "width"}


def _name_axes(output: Any, example: torch.Tensor, graph: Graph) -> None:
    """Name the free axes of an output, and give the sizes of the others, which the exporter leaves open."""
    settings = graph.settings
    sides: tuple[int | str, int | str] = settings.image_size or ("height", "width")
    if settings.target_size:
        sides = ("target_height", "target_width")
    elif not settings.labels and (settings.with_preprocessing or graph.output_names != ["logits"]):
        sides = ("logits_height", "logits_width")
    names: list[int | str] = ["batch", *example.shape[1:]]
    if len(names) > 2:
        names[-2:] = sides
    for axis, name in zip(output.type.tensor_type.shape.dim, names, strict=True):
        if isinstance(name, str):
            axis.dim_param = name
        else:
            axis.dim_value = name


def _as_pytorch_resizes(node: Any) -> None:
    """Correct a Resize to one pixel: there "pytorch_half_pixel" takes the first pixel, and PyTorch does not."""
    for attribute in node.attribute:
        if attribute.name == "coordinate_transformation_mode" and attribute.s == b"pytorch_half_pixel":
            attribute.s = b"half_pixel"


def _nodes(graph: Any) -> Iterator[Any]:
    """Yield the nodes of a graph, and of the graphs inside its loops and branches."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)

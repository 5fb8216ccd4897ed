"""The graph that is exported, against the model's methods and the image processor: by itself, traced, and in runtimes.

Sizes off the traced one: odd sizes, small ones, sizes above and below the label maps', batches of 1 to 3.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import PIL.Image
import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

from fastuper import UperNetForSemanticSegmentation, UperNetImageProcessor
from fastuper.export import ExportError, ExportSettings
from fastuper.export.bands import Filter
from fastuper.export.graph import Graph
from fastuper.export.openvino import core
from fastuper.export.preprocessing import FILTERS, Preprocessing, _resampled
from fastuper.models.backbones.foreign import Sizes
from tests.models.heads import error, randomize
from tests.models.test_over import Maps
from tests.models.test_parsing_model import model as parsing_model
from tests.models.test_upernet import BACKBONES
from tests.models.test_upernet import model as small_model

# (batch, height, width) of images and (height, width) of label maps.
SIZES = [
    ((2, 67, 131), (97, 53)),
    ((1, 64, 64), (64, 64)),
    ((3, 35, 161), (7, 401)),
    ((1, 16, 19), (1, 1)),
    ((2, 130, 96), (17, 200)),
]
TRACED = ((2, 97, 113), (83, 107))


def network(kind: str = "convnext", **values: Any) -> Any:
    torch.manual_seed(0)
    if kind == "parsing":
        return parsing_model(**values)
    if kind == "padded":
        values = {"hidden_size": 8, "use_auxiliary_head": False, "num_labels": 5, **values}
        model = randomize(UperNetForSemanticSegmentation.over(Maps(), **values)).eval()
        model.image_sizes = Sizes("maps", (16, 16), (32, 48))
        return model
    return randomize(small_model(kind, **values))


def pixels_of(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1000 * height + width))


def photos_of(batch: int, height: int, width: int) -> torch.Tensor:
    """Return photos (B, H, W, 3) with smooth parts and edges."""
    coarse = torch.randn(batch, 3, 5, 6, generator=torch.Generator().manual_seed(1000 * height + width))
    smooth = F.interpolate(coarse, (height, width), mode="bicubic")
    return ((smooth * 90).round() + 128 * (smooth > 0.3)).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def check_labels(found: torch.Tensor, expected: torch.Tensor, votes: torch.Tensor) -> None:
    """Compare label maps where the best of logits (B, classes, height, width) leads in float64."""
    assert found.shape == expected.shape
    best = votes.topk(2, dim=1).values
    decided = best[:, 0] - best[:, 1] > 8 * torch.finfo(torch.float32).eps * best.abs().max()
    assert decided.double().mean() > 0.98
    assert torch.equal(found.long()[decided], expected.long()[decided])


def votes_of(model: Any, pixels: torch.Tensor, target: tuple[int, int]) -> torch.Tensor:
    """Return the float64 logits whose argmax `segment` returns."""
    double = copy.deepcopy(model).double()
    logits = double(pixels.double()).logits
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], 1)
    return logits if target == logits.shape[2:] else F.interpolate(logits, target, mode="bilinear")


@torch.no_grad()
def check_upernet(run: Callable[..., Any], model: Any, settings: ExportSettings, sizes: Any = SIZES) -> None:
    """Compare a graph of logits or label maps with the model."""
    for image, target in sizes:
        pixels = pixels_of(*image)
        given = (pixels, torch.tensor(target)) if settings.target_size else (pixels,)
        found = run(*given)
        if not settings.labels:
            assert found.dtype == torch.float32
            assert error(found, model(pixels).logits) < 2e-5
            continue
        target = target if settings.target_size else image[1:]
        expected = torch.stack(model.segment(pixels, [target] * len(pixels)))
        assert found.dtype == (torch.uint8 if model.config.num_labels <= 256 else torch.int32)
        check_labels(found, expected, votes_of(model, pixels, target))


MODELS: dict[str, dict[str, Any]] = {
    "one-class": {"num_labels": 1},
    "300-classes": {"num_labels": 300},
    "aligned": {},
    "padded": {"kind": "padded"},
    "padded-aligned": {"kind": "padded"},
}


@pytest.mark.parametrize(
    "kind", [*MODELS, *(pytest.param(kind, marks=[pytest.mark.exhaustive] * (kind != "swin")) for kind in BACKBONES)]
)
def test_label_maps_of_any_size(kind):
    model = network(**MODELS.get(kind, {"kind": kind}))
    if "aligned" in kind:
        model.align_corners = True
    for settings in (ExportSettings(labels=True), ExportSettings(labels=True, target_size=True)):
        check_upernet(Graph(model, settings), model, settings, SIZES[-3:])


TASKS = ("scene", "object", "part", "material", "texture")


@torch.no_grad()
def check_parsing(run: Callable[..., Any], model: Any, settings: ExportSettings, sizes: Any = SIZES) -> None:
    """Compare a graph of a parsing model with the model."""
    for image, target in sizes:
        pixels = pixels_of(*image)
        found = dict(
            zip(TASKS, run(*((pixels, torch.tensor(target)) if settings.target_size else (pixels,))), strict=True)
        )
        if not settings.labels:
            expected = model(pixels)
            for task in TASKS:
                assert error(found[task], expected[task]) < 2e-5, task
            continue
        parsed = model.parse(pixels, [target if settings.target_size else image[1:]] * len(pixels), top=None)
        for i, own in enumerate(parsed):
            assert own.scene[0][0] == found["scene"][i].argmax()
            assert torch.allclose(found["scene"][i][own.scene[0][0]], torch.tensor(own.scene[0][1]), rtol=1e-4)
            for name in TASKS[1:]:
                same = found[name][i].long() == getattr(own, f"{name}s")
                assert same.double().mean() > 0.99, (name, image, target)


@pytest.mark.parametrize("padded", [False, True])
def test_parsing(padded):
    model = network("parsing")
    if padded:
        model.image_sizes = Sizes("maps", (16, 16), (32, 48))
    for values in ({}, {"labels": True}, {"labels": True, "target_size": True}):
        settings = ExportSettings(**values)
        check_parsing(Graph(model, settings), model, settings, SIZES[-3:])


BILINEAR = FILTERS[PIL.Image.Resampling.BILINEAR]
OPTIONS: dict[str, dict[str, Any]] = {
    "fixed": {"size": (50, 71)},
    "larger": {"size": (300, 190)},
    "shortest-edge": {"size": {"shortest_edge": 47}},
    "divisor": {"size": {"shortest_edge": 47}, "size_divisor": 8, "do_rescale": False, "image_mean": 100.0},
    "parsing": {**UperNetImageProcessor.for_parsing(size={"shortest_edge": 45, "longest_edge": 60}).to_dict()},
    "bicubic": {"size": {"shortest_edge": 47}, "resample": PIL.Image.Resampling.BICUBIC},
    "not-resized": {"do_resize": False, "do_normalize": False},
}
PHOTOS = [(1, 97, 131), (2, 333, 211), (1, 20, 33), (1, 48, 47), (1, 90, 47), (1, 200, 50)]


def check_pixels(run: Callable[..., Any], processor: UperNetImageProcessor) -> None:
    """Compare pixel values with the processor's: at most one of 256 levels, and most of them equal."""
    level = processor.rescale_factor if processor.do_rescale else 1.0
    level = np.max(level / np.asarray(processor.image_std if processor.do_normalize else 1.0))
    for size in PHOTOS:
        photos = photos_of(*size)
        expected = processor(list(photos.numpy()), input_data_format="channels_last", return_tensors="pt")
        difference = (run(photos) - expected["pixel_values"]).abs() / level
        assert difference.max() < 1.001, size
        assert (difference > 0.01).double().mean() < (0.2 if processor.antialias is False else 0.002), size


@pytest.mark.parametrize("name", OPTIONS)
def test_preprocessing(name):
    options = {name: value for name, value in OPTIONS[name].items() if name != "image_processor_type"}
    processor = UperNetImageProcessor(**options)
    check_pixels(Preprocessing(processor), processor)


@pytest.mark.parametrize("pillow", ["12.3.0", "13.0.0"])
def test_the_axis_that_pillow_resizes_first(pillow, monkeypatch):
    """Each axis is rounded to levels of 8 bits: the order shows. Pillow 13 chooses it by the rows and columns saved."""
    monkeypatch.setattr(PIL, "__version__", pillow)
    x = photos_of(1, 200, 50).permute(0, 3, 1, 2)
    for rows, columns, saves_rows in ((60, 40, True), (180, 40, False), (181, 40, False), (179, 40, True)):
        order = [(Filter(200, rows, *BILINEAR), -2), (Filter(50, columns, *BILINEAR), -1)]
        order = order if saves_rows and pillow >= "13" else order[::-1]
        processor = UperNetImageProcessor(size=(rows, columns), do_rescale=False, do_normalize=False)
        found = Preprocessing(processor)(x.permute(0, 2, 3, 1))
        assert found.equal(_resampled(_resampled(x, *order[0]), *order[1])), (rows, columns)


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "lanczos": ({"resample": PIL.Image.Resampling.LANCZOS}, "resample is 1"),
    "longest-edge": ({"size": {"shortest_edge": 40, "longest_edge": 60}}, "size is .*longest_edge"),
    "frame": ({"size": {"max_height": 40, "max_width": 60}}, "size is .*max_height"),
    "two-channels": ({"image_mean": [0.5, 0.5], "image_std": [1, 1]}, "image_mean has 2 numbers"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_a_graph_cannot_prepare(name):
    options, message = ERRORS[name]
    with pytest.raises(ExportError, match=message):
        Graph(network(), ExportSettings(with_preprocessing=True), UperNetImageProcessor(**options))


class OneConvolution(nn.Module):
    """A head that is traced at once."""

    def __init__(self, classes: int):
        super().__init__()
        self.classifier = nn.Conv2d(4, classes, 1)

    def forward(self, maps: Any) -> torch.Tensor:
        return self.classifier(maps[0])


def plain_network() -> Any:
    model = network("padded")
    model.decode_head = OneConvolution(5)
    return model


def onnx_of(graph: Graph, path: Path) -> Path:
    """Write a graph by the exporter that follows `torch.jit.trace`."""
    inputs, free = example_of(graph)
    axes = {graph.input_names[0]: {axis: f"axis_{axis}" for axis in free}}
    names = {"input_names": graph.input_names, "output_names": graph.output_names}
    torch.onnx.export(graph, inputs, path, dynamo=False, opset_version=18, dynamic_axes=axes, **names)
    return path


def example_of(graph: Graph) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
    """Return example inputs, and the free axes of the first."""
    photos = graph.settings.with_preprocessing
    inputs = [photos_of(*TRACED[0]) if photos else pixels_of(*TRACED[0])]
    if graph.settings.target_size:
        inputs.append(torch.tensor(TRACED[1]))
    return tuple(inputs), (0, 1, 2) if photos else (0, 2, 3)


def by_onnxruntime(path: Path) -> Callable[..., Any]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*inputs: torch.Tensor) -> Any:
        found = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
        return torch.as_tensor(found[0]) if len(found) == 1 else [torch.as_tensor(x) for x in found]

    return run


def by_openvino(source: Any) -> Callable[..., Any]:
    compiled = core().compile_model(source, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(*inputs: torch.Tensor) -> Any:
        found = [torch.as_tensor(x.copy()) for x in compiled([x.numpy() for x in inputs]).values()]
        return found[0] if len(found) == 1 else found

    return run


def program_of(graph: Graph) -> torch.export.ExportedProgram:
    inputs, free = example_of(graph)
    shapes = [dict.fromkeys(free, Dim.AUTO), *[None for _ in inputs[1:]]]
    return torch.export.export(graph, inputs, dynamic_shapes=tuple(shapes), strict=False)


QUIET = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
TARGET = ExportSettings(labels=True, target_size=True)


@QUIET
@torch.no_grad()
def test_label_maps_in_runtimes(tmp_path):
    """Padded images of any size, and label maps of any size, in both runtimes of ONNX."""
    model = plain_network()
    path = onnx_of(Graph(model, TARGET).eval(), tmp_path / "a.onnx")
    check_upernet(by_onnxruntime(path), model, TARGET)
    check_upernet(by_openvino(path), model, TARGET, SIZES[:2])


@QUIET
@torch.no_grad()
@pytest.mark.parametrize("name", ["shortest-edge", pytest.param("parsing", marks=pytest.mark.exhaustive)])
def test_preprocessing_in_runtimes(name, tmp_path):
    processor = UperNetImageProcessor(**{k: v for k, v in OPTIONS[name].items() if k != "image_processor_type"})
    settings = ExportSettings(labels=True, with_preprocessing=True)
    graph = Graph(plain_network(), settings, processor).eval()
    path = onnx_of(graph, tmp_path / "a.onnx")
    check_photos(by_onnxruntime(path), graph, processor)
    check_photos(by_openvino(path), graph, processor)


@QUIET
@torch.no_grad()
def test_runtimes_find_the_same_levels(tmp_path):
    """OpenVINO divides by multiplying with a reciprocal: its weights are rounded in another way."""
    preparing = Preprocessing(UperNetImageProcessor(size={"shortest_edge": 47}, do_rescale=False, do_normalize=False))
    axes = {"images": {0: "batch", 1: "height", 2: "width"}}
    names = {"input_names": ["images"], "output_names": ["levels"]}
    path = tmp_path / "a.onnx"
    torch.onnx.export(
        preparing, (photos_of(*TRACED[0]),), path, dynamo=False, opset_version=18, dynamic_axes=axes, **names
    )
    run, run_close = by_onnxruntime(path), by_openvino(path)
    for size in PHOTOS:
        photos = photos_of(*size)
        levels = preparing(photos)
        assert run(photos).equal(levels), size
        difference = (run_close(photos) - levels).abs()
        assert difference.max() <= 1, size
        assert difference.mean() < 0.01, size


def check_photos(run: Callable[..., Any], graph: Graph, processor: UperNetImageProcessor) -> None:
    """Compare label maps of photos with those of `segment`; a pixel's level may decide a few."""
    for size in PHOTOS:
        photos = photos_of(*size)
        pixels = processor(list(photos.numpy()), input_data_format="channels_last", return_tensors="pt")
        expected = graph.model.segment(pixels["pixel_values"], [size[1:]] * len(photos))
        found = run(photos)
        assert found.shape == (size[0], *size[1:])
        assert (found == torch.stack(expected)).double().mean() > 0.98, size


@QUIET
@torch.no_grad()
@pytest.mark.exhaustive
def test_programs_and_the_exporters_that_read_them(tmp_path):
    model = plain_network()
    program = program_of(Graph(model, TARGET).eval())
    sizes = [size for size in SIZES if size[0][1] > 32]  # torch.export makes a graph of its own for maps of one pixel
    check_upernet(program.module(), model, TARGET, sizes)
    torch.onnx.export(program, (), tmp_path / "a.onnx", dynamo=True, verbose=False)
    check_upernet(by_onnxruntime(tmp_path / "a.onnx"), model, TARGET)
    check_upernet(by_openvino(tmp_path / "a.onnx"), model, TARGET)


@QUIET
@torch.no_grad()
@pytest.mark.exhaustive
def test_a_program_of_photos():
    processor = UperNetImageProcessor(size={"shortest_edge": 47})
    graph = Graph(plain_network(), ExportSettings(labels=True, with_preprocessing=True), processor).eval()
    check_photos(program_of(graph).module(), graph, processor)


@QUIET
@torch.no_grad()
@pytest.mark.exhaustive
@pytest.mark.parametrize("values", [{}, {"labels": True}, {"labels": True, "target_size": True}], ids=str)
@pytest.mark.parametrize("kind", [*BACKBONES, "parsing"])
def test_every_family_in_onnxruntime(kind, values, tmp_path):
    model, settings = network(kind), ExportSettings(**values)
    run = by_onnxruntime(onnx_of(Graph(model, settings).eval(), tmp_path / "a.onnx"))
    (check_parsing if kind == "parsing" else check_upernet)(run, model, settings)

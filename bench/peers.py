"""The peers that are timed, one row of PEERS each, built from the same weights where the peer can load them.

A row's function takes a task and returns a call without arguments. The call's input is prepared in the layout that is
fastest for the peer, and its output is the one that the peer's users get. A peer that does not support a task raises
`CannotDo` with the reason, which the results keep.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F

from bench.machine import one_line
from bench.names import (
    AUTOCAST,
    COMPILED,
    CONVOLUTION,
    EAGER,
    FASTUPER,
    FROZEN,
    ONNX,
    OPENVINO,
    OURS_COMPILED,
    SMALLER,
    SMP,
    TUNED,
    WITHOUT_AUXILIARY,
)
from bench.pairs import BACKBONES, give_attentions, images, pair
from bench.timing import CannotDo
from fastuper.export.openvino import core

CLASSES = 150
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


# timm's encoders of the same shapes, for segmentation_models_pytorch. timm builds a Swin for one image size.
TIMM: dict[str, Callable[[int], dict[str, Any]]] = {
    "convnext-t": lambda size: {"encoder_name": "tu-convnext_tiny"},
    "swin-t": lambda size: {"encoder_name": "tu-swin_tiny_patch4_window7_224", "img_size": size},
}


@dataclass(frozen=True)
class Task:
    """A part of the network to time.

    Args:
        part: "logits", "labels", "head" or "backbone".
        backbone: its name in `bench.pairs.BACKBONES`.
        size: height and width of the image.
        dtype: "float32" or "bfloat16".
        target: size (height, width) of the label map; None for parts other than "labels".
    """

    part: str
    backbone: str
    size: int
    dtype: str = "float32"
    target: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        return f"{self.part} {self.backbone} {self.size} {self.dtype}"


class Logits(nn.Module):
    """A segmentation model that returns only its logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixels).logits


class Backbone(nn.Module):
    """A model's backbone, which returns a tuple of feature maps."""

    def __init__(self, model: Any):
        super().__init__()
        self.backbone = model.backbone

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.backbone(pixels).feature_maps)


class Head(nn.Module):
    """A model's decode head, which takes the feature maps as positional arguments."""

    def __init__(self, model: Any):
        super().__init__()
        self.head = model.decode_head

    def forward(self, *features: torch.Tensor) -> torch.Tensor:
        return self.head(features)


class World:
    """The models and inputs that the tasks of one backbone share, exported and compiled models included."""

    def __init__(self, backbone: str):
        self.backbone = backbone
        self.config = transformers.UperNetConfig(backbone_config=BACKBONES[backbone](), num_labels=CLASSES)
        self._theirs, self._ours = pair(self.config, dtype=torch.float32)
        self._made: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return the value under a key; the first call makes and stores it."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def theirs(self, dtype: str, layout: torch.memory_format = CONTIGUOUS, auxiliary: bool = True) -> Any:
        """Return Transformers' model, with the auxiliary head or without; both share their weights."""
        model = self.once(
            ("theirs", dtype, layout),
            lambda: copy.deepcopy(self._theirs).to(getattr(torch, dtype)).to(memory_format=layout),
        )
        return model if auxiliary else without_auxiliary_head(model)

    def ours(self, dtype: str) -> Any:
        return self.once(("ours", dtype), lambda: copy.deepcopy(self._ours).to(getattr(torch, dtype)))

    def pixels(self, task: Task, layout: torch.memory_format = CONTIGUOUS, dtype: str | None = None) -> torch.Tensor:
        x = self.once(("pixels", task.size), lambda: images(1, 3, task.size, task.size, dtype=torch.float32))
        return x.to(getattr(torch, dtype or task.dtype)).contiguous(memory_format=layout)

    def features(self, task: Task, layout: torch.memory_format = CONTIGUOUS) -> list[torch.Tensor]:
        """Return the head's input: Transformers' float32 feature maps, the same for all peers, in the task's dtype."""
        given = self.once(
            ("features", task.size), lambda: self._theirs.backbone(self.pixels(task, dtype="float32")).feature_maps
        )
        return [x.to(getattr(torch, task.dtype)).contiguous(memory_format=layout) for x in given]


def without_auxiliary_head(model: Any) -> Any:
    """Return a model without an auxiliary head that shares its other modules with the given model."""
    bare = copy.copy(model)
    bare._modules = {**model._modules, "auxiliary_head": None}
    return bare


@functools.lru_cache
def processor() -> Any:
    return transformers.SegformerImageProcessor()


def post_process(logits: torch.Tensor, target: tuple[int, int]) -> torch.Tensor:
    """Return the label map of one image by Transformers' own post-processing.

    Compiled models return channels_last logits. They are made contiguous first, which takes far less time than
    resampling and comparing them in channels_last.
    """
    output = SimpleNamespace(logits=logits.contiguous())
    return processor().post_process_semantic_segmentation(output, target_sizes=[target])[0]


def torch_call(task: Task, model: Any, pixels: torch.Tensor, features: Callable[[], Any]) -> Callable[[], Any]:
    """Return a task's call on a model with the attributes of Transformers' model."""
    if task.part == "logits":
        return lambda: model(pixels).logits
    if task.part == "labels":
        assert task.target is not None
        return lambda: post_process(model(pixels).logits, task.target)
    if task.part == "backbone":
        return lambda: model.backbone(pixels).feature_maps
    given = features()
    return lambda: model.decode_head(given)


def transformers_eager(layout: torch.memory_format, auxiliary: bool = True) -> Any:
    def build(world: World, task: Task) -> Callable[[], Any]:
        model = world.theirs(task.dtype, layout, auxiliary)
        return torch_call(task, model, world.pixels(task, layout), lambda: world.features(task, layout))

    return build


def transformers_autocast(world: World, task: Task) -> Callable[[], Any]:
    """bfloat16 by autocast: weights stay float32, and autocast casts them in every call."""
    model = world.theirs("float32", CHANNELS_LAST)
    call = torch_call(task, model, world.pixels(task, CHANNELS_LAST, "float32"), lambda: _unused("autocast"))

    def autocast() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return call()

    return autocast


def transformers_compiled(mode: str, freezing: bool) -> Any:
    def build(world: World, task: Task) -> Callable[[], Any]:
        model = world.theirs(task.dtype, CHANNELS_LAST)
        # Logits and labels share one compiled model. Static sizes compile to the fastest code.
        if task.part in ("logits", "labels"):
            make, inputs = Logits, (world.pixels(task, CHANNELS_LAST),)
        elif task.part == "backbone":
            make, inputs = Backbone, (world.pixels(task, CHANNELS_LAST),)
        else:
            make, inputs = Head, tuple(world.features(task, CHANNELS_LAST))
        key = ("compiled", mode, freezing, make, task.dtype, task.size)
        compiled = world.once(key, lambda: compile_module(make(model), inputs, mode, freezing))
        if task.part == "labels":
            assert task.target is not None
            return lambda: post_process(compiled(*inputs), task.target)
        return lambda: compiled(*inputs)

    return build


def compile_module(module: nn.Module, inputs: tuple[torch.Tensor, ...], mode: str, freezing: bool) -> Any:
    """Return a module compiled for these inputs.

    Args:
        module: a module.
        inputs: the arguments of its calls.
        mode: of `torch.compile`.
        freezing: whether weights become constants. Inductor then folds BatchNorm into them and packs them for oneDNN.

    Raises:
        CannotDo: torch.compile ran the module without compiling it.
    """
    options = {**torch._inductor.list_mode_options(mode), "freezing": freezing}
    compiled = torch.compile(module, options=options, dynamic=False)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    # Without the setting the option has no effect: Dynamo does not read options, and makes the weights inputs of the
    # graph.
    with torch._inductor.config.patch(freezing=freezing):
        compiled(*inputs)
    if torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs:
        raise CannotDo("torch.compile ran the model uncompiled")
    return compiled


def smp(compiled: bool) -> Any:
    """segmentation_models_pytorch's UPerNet of the same shape, over timm's encoder, with other random weights."""

    def build(world: World, task: Task) -> Callable[[], Any]:
        import segmentation_models_pytorch

        def make() -> Any:
            torch.manual_seed(0)
            if world.backbone not in TIMM:
                raise CannotDo("TIMM lists no encoder of this shape")
            options = TIMM[world.backbone](task.size)
            model = segmentation_models_pytorch.UPerNet(
                encoder_weights=None, decoder_channels=512, classes=CLASSES, **options
            )
            return model.eval().to(memory_format=CHANNELS_LAST)

        model = world.once(("smp", task.size), make)
        pixels = world.pixels(task, CHANNELS_LAST)
        if task.part == "backbone":
            call = model.encoder
        elif task.part == "head":
            features = [x.contiguous(memory_format=CHANNELS_LAST) for x in model.encoder(pixels)]
            # The segmentation head is classifier, upsampling by 4, identity. The timed part ends at the classifier.
            return lambda: model.segmentation_head[0](model.decoder(features))
        else:
            call = model
            if compiled:
                call = world.once(
                    ("smp compiled", task.size), lambda: compile_module(model, (pixels,), "default", True)
                )
        if task.part == "labels":
            assert task.target is not None
            return lambda: post_process(call(pixels), task.target)
        return lambda: call(pixels)

    return build


def exportable(world: World, part: str) -> nn.Module:
    """Return the module to export, without auxiliary head and with eager attention.

    With `scaled_dot_product_attention` the ONNX exporter fails on Transformers' Swin, and OpenVINO runs it slower.
    """

    def make() -> Any:
        model = copy.deepcopy(without_auxiliary_head(world.theirs("float32")))
        give_attentions(model)
        return model

    model = world.once("exportable", make)
    return {"logits": Logits, "labels": Logits, "backbone": Backbone, "head": Head}[part](model)


def export_inputs(world: World, task: Task) -> tuple[torch.Tensor, ...]:
    if task.part == "head":
        return tuple(world.features(Task("head", task.backbone, task.size)))
    return (world.pixels(task, dtype="float32"),)


def exported_part(task: Task) -> str:
    """Return the part to export for a task: label maps are computed from the logits' model."""
    return "logits" if task.part == "labels" else task.part


def outputs_call(task: Task, run: Callable[[], Any]) -> Callable[[], Any]:
    """Return a task's call; `run` runs an exported model and returns its outputs as arrays."""
    if task.part == "labels":
        assert task.target is not None
        return lambda: post_process(torch.from_numpy(run()[0]), task.target)
    if task.part == "backbone":
        return lambda: [torch.from_numpy(x) for x in run()]
    return lambda: torch.from_numpy(run()[0])


def onnx_runtime(world: World, task: Task) -> Callable[[], Any]:
    import onnxruntime

    inputs = export_inputs(world, task)

    def make() -> Any:
        module = exportable(world, exported_part(task))
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = Path(folder) / "model.onnx"
            names = [f"input{i}" for i in range(len(inputs))]
            try:
                with torch.no_grad():
                    torch.onnx.export(module, inputs, path, dynamo=True, input_names=names, verbose=False)
            except Exception as error:
                raise CannotDo(f"torch.onnx.export: {one_line(error)}") from error
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            # Between runs its threads spin, which would slow down the next peer.
            options.add_session_config_entry("session.force_spinning_stop", "1")
            return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    session = world.once(("onnx", exported_part(task), task.size), make)
    feed = {entry.name: x.numpy() for entry, x in zip(session.get_inputs(), inputs, strict=True)}
    return outputs_call(task, lambda: session.run(None, feed))


def openvino(world: World, task: Task) -> Callable[[], Any]:
    import openvino as ov

    inputs = export_inputs(world, task)

    def convert() -> Any:
        example = inputs if len(inputs) > 1 else inputs[0]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return ov.convert_model(
                    exportable(world, exported_part(task)), example_input=example, input=[list(x.shape) for x in inputs]
                )
            except Exception as error:
                raise CannotDo(f"openvino.convert_model: {one_line(error)}") from error

    def make() -> Any:
        options = {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[task.dtype],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        model = world.once(("openvino", exported_part(task), task.size), convert)
        return core().compile_model(model, "CPU", options).create_infer_request()

    request = world.once(("openvino compiled", exported_part(task), task.size, task.dtype), make)
    feed = {i: x.numpy() for i, x in enumerate(inputs)}
    # Inputs and outputs are float32 in both precisions. Outputs are views of the request's memory: nothing is copied.
    return outputs_call(task, lambda: list(request.infer(feed, share_inputs=True, share_outputs=True).to_tuple()))


def fastuper(compiled: bool = False) -> Any:
    def build(world: World, task: Task) -> Callable[[], Any]:
        model = world.ours(task.dtype)
        pixels = world.pixels(task)
        if compiled:
            if task.part != "logits":
                raise CannotDo("the compiled model is timed on full logits alone")
            call = world.once(
                ("ours compiled", task.dtype, task.size),
                lambda: compile_module(Logits(model), (pixels,), "default", False),
            )
            return lambda: call(pixels)
        if task.part == "labels":
            return lambda: model.segment(pixels, target_sizes=[task.target])[0]
        # fastuper's backbone returns channels_last maps.
        return torch_call(task, model, pixels, lambda: world.features(task, CHANNELS_LAST))

    return build


def at_size(size: int) -> Any:
    """fastuper at another size than the task's, in the same rounds."""

    def build(world: World, task: Task) -> Callable[[], Any]:
        return fastuper()(world, dataclasses.replace(task, size=size))

    return build


def convolution(world: World, task: Task) -> Callable[[], Any]:
    """The head's largest convolution by PyTorch's operator: the machine's rate, measured in the same rounds."""
    dtype = getattr(torch, task.dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 512, 128, 128, generator=generator).to(dtype).contiguous(memory_format=CHANNELS_LAST)
    weight = torch.randn(512, 512, 3, 3, generator=generator).to(dtype).contiguous(memory_format=CHANNELS_LAST)
    return lambda: F.conv2d(x, weight, padding=1)


CONVOLUTION_FLOP = 2 * 512 * 512 * 9 * 128 * 128


def _unused(what: str) -> Any:
    raise CannotDo(f"{what} is timed on whole models alone")


@dataclass(frozen=True)
class Peer:
    """A row of PEERS.

    Args:
        build: takes a world and a task, and returns the task's call.
        shape_bound: whether the peer is prepared for one image size, and must warm up at that size.
        compared: whether the output is compared with float64: it must be the task's output.
    """

    build: Callable[[World, Task], Callable[[], Any]]
    shape_bound: bool = False
    compared: bool = True


PEERS: dict[str, Peer] = {
    EAGER[0]: Peer(transformers_eager(CONTIGUOUS)),
    EAGER[1]: Peer(transformers_eager(CHANNELS_LAST)),
    WITHOUT_AUXILIARY[0]: Peer(transformers_eager(CONTIGUOUS, auxiliary=False)),
    WITHOUT_AUXILIARY[1]: Peer(transformers_eager(CHANNELS_LAST, auxiliary=False)),
    AUTOCAST: Peer(transformers_autocast),
    COMPILED: Peer(transformers_compiled("default", freezing=False), shape_bound=True),
    FROZEN: Peer(transformers_compiled("default", freezing=True), shape_bound=True),
    TUNED: Peer(transformers_compiled("max-autotune", freezing=True), shape_bound=True),
    SMP[0]: Peer(smp(compiled=False), compared=False),
    SMP[1]: Peer(smp(compiled=True), shape_bound=True, compared=False),
    ONNX: Peer(onnx_runtime, shape_bound=True),
    OPENVINO: Peer(openvino, shape_bound=True),
    FASTUPER: Peer(fastuper()),
    SMALLER: Peer(at_size(1024), compared=False),
    OURS_COMPILED: Peer(fastuper(compiled=True), shape_bound=True),
    CONVOLUTION: Peer(convolution, compared=False),
}

"""Times exported models in their runtimes, fastuper's beside Transformers': `python -m bench.exports`.

All models of a backbone are exported first, for one size, to .cache/bench/exports. Then they take turns, and their
outputs are compared with float64. Transformers' model has no auxiliary head, and eager attention, which its exporters
need for Swin. The results go to bench/results/exports.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from bench.machine import commit, machine, now, one_line, versions
from bench.names import FASTUPER, OURS_COMPILED
from bench.peers import PEERS, Task, World, exportable
from bench.results import FOLDER, TINY, export_targets
from bench.timing import Call, CannotDo, alternate, medians, rounded
from bench.truth import errors
from fastuper.export import export_model, exporting
from fastuper.export.int8 import LEAST_PHOTOS
from fastuper.export.openvino import core
from fastuper.scenes import scene

RESULTS = FOLDER / "exports.json"
CACHE = Path(__file__).parent.parent / ".cache" / "bench" / "exports"
SIZE = 512
"""Height and width of the images."""
TARGET = (683, 1024)
"""Height and width of the label maps."""


Write = Callable[[World, torch.Tensor, Path], None]
Load = Callable[[Path, torch.Tensor], Callable[[], torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class Exported:
    """An exported model that is timed.

    Args:
        folder: its folder, a key of WRITERS.
        load: returns the model of a folder in its runtime: a function of no arguments that returns the output for
            these pixels.
        part: "logits" or "labels".
    """

    folder: str
    load: Load
    part: str = "logits"


# Exports --------------------------------------------------------------------------------------------------------------


def write_onnx(world: World, pixels: torch.Tensor, folder: Path) -> None:
    """Export Transformers' model to ONNX."""
    file = folder / "model.onnx"
    torch.onnx.export(exportable(world, "logits"), (pixels,), file, dynamo=True, verbose=False)


def write_openvino(world: World, pixels: torch.Tensor, folder: Path) -> None:
    """Export Transformers' model to OpenVINO's format."""
    import openvino

    converted = openvino.convert_model(exportable(world, "logits"), example_input=pixels, input=list(pixels.shape))
    openvino.save_model(converted, folder / "model.xml", compress_to_fp16=False)


def write_aoti(world: World, pixels: torch.Tensor, folder: Path) -> None:
    """Compile Transformers' model by AOTInductor."""
    program = torch.export.export(exportable(world, "logits"), (pixels,))
    torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))


def write_ours(format: str, **options: Any) -> Write:
    """Return a function that exports fastuper's model; `bench.exports` compares its outputs itself."""

    def write(world: World, pixels: torch.Tensor, folder: Path) -> None:
        size = f"{pixels.shape[2]}x{pixels.shape[3]}"
        export_model(world.ours("float32"), folder, format=format, size=size, check=False, **options)

    return write


def write_int8(format: str) -> Write:
    """Return a function that exports fastuper's model in 8-bit integers, calibrated on drawn scenes.

    The weights are random: its labels say nothing, only its time counts.
    """

    def write(world: World, pixels: torch.Tensor, folder: Path) -> None:
        size = f"{pixels.shape[2]}x{pixels.shape[3]}"
        with tempfile.TemporaryDirectory() as photos:
            for seed in range(LEAST_PHOTOS):
                scene(seed)[0].save(Path(photos) / f"{seed}.png")
            options = {"size": size, "int8": Path(photos), "accept_int8_loss": True}
            # The proof of the float model takes minutes at this size; its outputs are compared here.
            with mock.patch.object(exporting, "prove", return_value=[]):
                export_model(world.ours("float32"), folder, format=format, **options)

    return write


WRITERS: dict[str, Write] = {
    "transformers-onnx": write_onnx,
    "transformers-openvino": write_openvino,
    "transformers-aoti": write_aoti,
    "fastuper-onnx": write_ours("onnx"),
    "fastuper-onnx-labels": write_ours("onnx", labels=True, target_size=True),
    "fastuper-openvino": write_ours("openvino"),
    "fastuper-openvino-labels": write_ours("openvino", labels=True, target_size=True),
    "fastuper-openvino-bfloat16": write_ours("openvino", dtype="bfloat16"),
    "fastuper-aoti": write_ours("aoti"),
    "fastuper-onnx-int8": write_int8("onnx"),
    "fastuper-openvino-int8": write_int8("openvino"),
}
"""By the name of a folder, the function that writes an exported model into it."""


# Runtimes -------------------------------------------------------------------------------------------------------------


def onnx_runtime(folder: Path, pixels: torch.Tensor) -> Callable[[], torch.Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Between runs its threads spin, which would slow down the next model.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    arrays = [pixels.numpy(), np.array(TARGET)]
    feed = {entry.name: array for entry, array in zip(session.get_inputs(), arrays, strict=False)}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino(hint: str) -> Load:
    def load(folder: Path, pixels: torch.Tensor) -> Callable[[], torch.Tensor]:
        options = {
            "INFERENCE_PRECISION_HINT": hint,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        model = core().read_model(folder / "model.xml")
        model.reshape({model.inputs[0]: list(pixels.shape)})  # fixed sizes, with which OpenVINO fuses most
        request = core().compile_model(model, "CPU", options).create_infer_request()
        feed = dict(zip(range(len(model.inputs)), (pixels.numpy(), np.array(TARGET)), strict=False))
        # The output is a view of the request's memory: nothing is copied.
        return lambda: torch.from_numpy(request.infer(feed, share_inputs=True, share_outputs=True).to_tuple()[0])

    return load


def aot_inductor(folder: Path, pixels: torch.Tensor) -> Callable[[], torch.Tensor]:
    run = torch._inductor.aoti_load_package(str(folder / "model.pt2"))
    return lambda: run(pixels)


def then_labels(load: Load) -> Load:
    """Return a loader whose function resamples the logits by NumPy, and takes the best class of each pixel."""

    def with_labels(folder: Path, pixels: torch.Tensor) -> Callable[[], torch.Tensor]:
        run = load(folder, pixels)
        return lambda: torch.from_numpy(label_map(run()[0].numpy(), TARGET))

    return with_labels


def label_map(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the best class of each pixel, (height, width), of logits (classes, h, w) resampled (bilinear) to `size`.

    It is Transformers' post-processing for whoever has NumPy alone.
    """
    for axis, count in ((1, size[0]), (2, size[1])):
        position = (np.arange(count) + 0.5) * (logits.shape[axis] / count) - 0.5
        position = position.clip(0, logits.shape[axis] - 1)
        low = position.astype(np.int64)
        high = np.minimum(low + 1, logits.shape[axis] - 1)
        share = (position - low).astype(np.float32)
        share = share[:, None] if axis == 1 else share
        first = logits.take(low, axis)
        logits = logits.take(high, axis)
        logits -= first
        logits *= share
        logits += first
    labels: np.ndarray = logits.argmax(0)
    return labels


MODELS: dict[str, Exported] = {
    "Transformers, ONNX Runtime": Exported("transformers-onnx", onnx_runtime),
    "fastuper, ONNX Runtime": Exported("fastuper-onnx", onnx_runtime),
    "Transformers, ONNX Runtime, NumPy": Exported("transformers-onnx", then_labels(onnx_runtime), "labels"),
    "fastuper, ONNX Runtime, label map": Exported("fastuper-onnx-labels", onnx_runtime, "labels"),
    "Transformers, OpenVINO": Exported("transformers-openvino", openvino("f32")),
    "fastuper, OpenVINO": Exported("fastuper-openvino", openvino("f32")),
    "Transformers, OpenVINO, NumPy": Exported("transformers-openvino", then_labels(openvino("f32")), "labels"),
    "fastuper, OpenVINO, label map": Exported("fastuper-openvino-labels", openvino("f32"), "labels"),
    "Transformers, OpenVINO, bf16": Exported("transformers-openvino", openvino("bf16")),
    "fastuper, OpenVINO, bf16": Exported("fastuper-openvino-bfloat16", openvino("bf16")),
    "fastuper, ONNX Runtime, int8": Exported("fastuper-onnx-int8", onnx_runtime),
    "fastuper, OpenVINO, int8": Exported("fastuper-openvino-int8", openvino("f32")),
    "Transformers, AOTInductor": Exported("transformers-aoti", aot_inductor),
    "fastuper, AOTInductor": Exported("fastuper-aoti", aot_inductor),
}
"""The exported models, in the order of their turns."""


NAMES = [*MODELS, FASTUPER, OURS_COMPILED]
"""All models that are timed, those of PyTorch too."""


def export(world: World, task: Task, root: Path, names: list[str], reuse: bool) -> dict[str, str]:
    """Write exported models to folders in `root`, and return the reasons of those that failed, by their folder.

    Args:
        world: the models.
        task: has the size.
        root: a folder.
        names: names in NAMES.
        reuse: True to keep a model that is there.
    """
    failed = {}
    for name in dict.fromkeys(MODELS[name].folder for name in names if name in MODELS):
        folder = root / name
        if reuse and folder.exists():
            continue
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                WRITERS[name](world, world.pixels(task), folder)
            except Exception as error:  # the other models are timed all the same
                failed[name] = one_line(error)
                shutil.rmtree(folder)
    return failed


def measure(world: World, task: Task, root: Path, names: list[str], rounds: int) -> dict[str, Any]:
    """Return the seconds and the errors of exported models in `root`, and of fastuper in PyTorch."""

    def builder(name: str) -> Callable[[], tuple[Call, Call]]:
        def build() -> tuple[Call, Call]:
            if name not in MODELS:
                call = PEERS[name].build(world, task)
            elif not (root / MODELS[name].folder).exists():
                raise CannotDo("it could not be exported")
            else:
                call = MODELS[name].load(root / MODELS[name].folder, world.pixels(task))
            return call, call

        return build

    def examine(name: str, call: Call) -> dict[str, Any]:
        part = MODELS[name].part if name in MODELS else "logits"
        output = call()
        label_maps = part == "labels" and output.ndim == 3
        return errors(world, dataclasses.replace(task, part=part, target=TARGET), output[0] if label_maps else output)

    timed = alternate({name: builder(name) for name in names}, rounds, examine)
    peers: dict[str, Any] = {}
    for name in names:
        if name in timed.skipped:
            peers[name] = {"skipped": timed.skipped[name]}
        else:
            peers[name] = {"rounds": [rounded(second) for second in timed.seconds[name]], **timed.facts[name]}
    return {"size": task.size, "target": list(TARGET), "peers": peers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="of each model")
    parser.add_argument("--backbones", nargs="+", choices=TINY, default=list(TINY), help="some backbones only")
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES, metavar="MODEL", help="some models only")
    parser.add_argument("--reuse", action="store_true", help="do not export again what an earlier run has exported")
    parser.add_argument("--export-only", action="store_true", help="export, and time nothing")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the results file")
    arguments = parser.parse_args()
    result: dict[str, Any] = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"rows": {}}
    result |= {"run": now(), "commit": commit(), "machine": machine(), "versions": versions(), "dtype": "float32"}
    for backbone in arguments.backbones:
        world, task = World(backbone), Task("logits", backbone, SIZE)
        for name, reason in export(world, task, CACHE / backbone, arguments.models, arguments.reuse).items():
            print(f"{backbone}, {name}: {reason}", flush=True)
        if arguments.export_only:
            continue
        result["rows"][backbone] = row = measure(world, task, CACHE / backbone, arguments.models, arguments.rounds)
        result["targets"] = export_targets(result)
        for name, seconds in medians(row["peers"]).items():
            facts = {key: value for key, value in row["peers"][name].items() if key != "rounds"}
            print(f"{backbone}, {name}: {seconds:.4g} s, {facts}", flush=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Everything that needs a GPU, in one command and under one folder: `make gpu-check`, or `python -m bench.gpu`.

Tests first; then the rates that this GPU really has, of copies and of matrix products; then how far each operation is
from float64, ours and PyTorch's; then whole models and a step of training beside Transformers', and each operation
beside PyTorch's, eager and compiled. Times are medians over rounds in which everyone takes turns, between CUDA events,
each call but a step of training a CUDA graph, on inputs that take turns too, so that none is found in cache. What is
measured is written after every step. Compiling the peers takes most of the time: where ten minutes do not do for all
shapes, run it again, and it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import hashlib
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import fastuper_kernels as ops
from bench.machine import commit, now, versions, without_paths
from bench.names import COMPILED as THEIRS_COMPILED
from bench.names import EAGER as LAYOUTS
from bench.results import Target, verdict
from bench.roofline import Gpu, Shapes, head, loss
from fastuper_kernels import tune
from fastuper_kernels.dispatch.files import replace_json

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU is for the test of this file
OURS, EAGER, COMPILED = "fastuper", "PyTorch", "PyTorch, compiled"
THEIRS, CHANNELS_LAST = LAYOUTS
TESTS = [
    "tests/interpreted",
    "tests/models/test_cuda_graph.py",
    *(f"tests/parity/test_{name}.py" for name in ("forward", "gradients", "accuracy", "segment")),
]
LARGE = "tests/interpreted/test_large.py"
# Of images and heads, those first that are asked about most.
SHAPES = tuple(Shapes(*sizes) for sizes in ((1, 512), (16, 512), (8, 512), (1, 1024), (8, 1024), (16, 1024)))
TRAINED = Shapes(16, 512)  # images of a step of training
# To be reached by it on an H200: the time of Transformers compiled over ours at least, and our peak over its at most.
TARGETS = (Target("its time over ours", "speedup", 1.7), Target("our peak memory over its", "memory", 0.5))
CACHE = 2 * 60 * 2**20  # bytes, twice an H200's
KINDS = ("models", "training", "operations")  # of what is timed
GMAC = 129  # of a UPerNet-ConvNeXt-T for an image of 512 x 512, with the head's arithmetic as it is here
Call = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / ".cache" / "gpu-check", help="the folder")
    parser.add_argument("--seconds", type=float, default=480, help="no new measurement begins after so long")
    parser.add_argument("--no-tests", action="store_true", help="measure alone")
    arguments = parser.parse_args()
    if DEVICE != "cuda":
        parser.error("there is no GPU here: `make test` runs the kernels in Triton's interpreter")
    check = Check(arguments.output, time.monotonic() + arguments.seconds)
    if not arguments.no_tests:
        check.tests()
    check.measure()
    sys.exit(0 if check.results.get("tests", {}).get("passed", True) else 1)


class Check:
    """The steps, and their results so far: those of an earlier run of the same commit on the same GPU among them.

    Args:
        folder: where `gpu.json`, `gpu.md`, `gpu.svg` and `tests.log` go.
        end: of `time.monotonic()`, after which nothing new begins.
        compiled: whether peers are compiled too.
        rounds: of each measurement.
        copies: of the inputs, at most, which take turns.
    """

    def __init__(self, folder: Path, end: float, compiled: bool = True, rounds: int = 15, copies: int = 400):
        import triton

        self.folder, self.end, self.compiled, self.rounds, self.copies = folder, end, compiled, rounds, copies
        self.results: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "no GPU",
            "commit": commit(),
            "versions": {**versions(), "triton": triton.__version__, "cuda": torch.version.cuda},
            "source": source(),
            "date": now(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError, ValueError):
            before = json.loads((folder / "gpu.json").read_text(encoding="utf-8"))
            if all(before.get(key) == self.results[key] for key in ("device", "source", "versions")):
                before.pop("broken", None)
                for kind in ("accuracy", *KINDS):  # what failed is tried again
                    before[kind] = [row for row in before.get(kind, []) if "failed" not in json.dumps(row)]
                self.results = before

    def save(self) -> None:
        replace_json(self.folder / "gpu.json", self.results)

    @property
    def is_late(self) -> bool:
        return time.monotonic() > self.end

    @cached_property
    def _world(self) -> Any:
        """Return UPerNet-ConvNeXt-Ts with the same weights, Transformers' and ours."""
        from bench.peers import World

        return World("convnext-t")

    def tests(self, seconds: float = 240) -> None:
        """Run the tests of the kernels, and the comparisons with Transformers, on the GPU, unless they have passed."""
        if self.results.get("tests", {}).get("passed"):
            return
        workers = []
        if importlib.util.find_spec("xdist"):  # what takes time is compiling kernels, on the host
            workers = ["-n", str(min(12, len(os.sched_getaffinity(0)))), "--dist", "worksteal"]
        # The kernels are what is tested, wherever cuDNN is measured to be faster.
        environment = {**os.environ, "FASTUPER_TEST_DEVICE": "cuda", "FASTUPER_CHOICES": "conv=triton"}
        begin, codes = time.monotonic(), []
        with (self.folder / "tests.log").open("w", encoding="utf-8") as log:
            # Large maps want the GPU's memory for themselves.
            for selected in ([*TESTS, f"--ignore={LARGE}", *workers], [LARGE]):
                command = [sys.executable, "-m", "pytest", *selected, "-v", "-p", "no:cacheprovider"]
                process = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
                try:
                    codes.append(process.wait(timeout=max(1.0, begin + seconds - time.monotonic())))
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    codes.append(process.wait())
        text = (self.folder / "tests.log").read_text(encoding="utf-8")
        failures = sorted(set(re.findall(r"(?:FAILED|ERROR) (tests/\S+)", text)))
        self.results["tests"] = {
            "passed": not any(codes),
            "seconds": round(time.monotonic() - begin),
            "summary": "; ".join(re.findall(r"=+ (.* in [\d.]+s.*?) =+", text)) or "stopped, out of time",
            "failures": failures,
        }
        print("tests:", self.results["tests"], flush=True)
        self.save()

    def measure(self, shapes: Sequence[Shapes] = SHAPES, world: Any = None, trained: Shapes = TRAINED) -> None:
        """Measure everything that there is time for, and write the table and the plot.

        Args:
            shapes: of images and heads; accuracy is a matter of the first.
            world: what `models` and `training` take.
            trained: shapes of the images that a step of training takes.
        """
        torch.backends.cudnn.benchmark = True
        if "rates" not in self.results:
            self.rates()
        self.results["configurations"] = list(tune.show())
        first, *others = shapes
        self.accuracy(first)
        self.models(first, world)
        self.operations(first)
        self.training(trained, world)
        for each in others:
            self.models(each, world)
            self.operations(each)
        self.results["targets"] = targets(self.results)
        self.results["complete"] = not self.is_late  # nor broken, which ends the time
        self.save()
        text = table(self.results)
        (self.folder / "gpu.md").write_text(text, encoding="utf-8")
        plot(self.results, self.folder / "gpu.svg")
        print(text)

    def rates(self) -> None:
        """Measure what this GPU's memory and its tensor cores do at best."""
        size, count = (8192, 2**32) if DEVICE == "cuda" else (64, 2**16)
        source = torch.randint(255, (count,), dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        one, two = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(one)
        found = alternate(
            {"copy": [lambda: target.copy_(source)], "matmul": [lambda: torch.mm(one, two, out=out)]}, self.rounds
        )
        self.results["rates"] = {
            "copy": 2 * count / found["copy"]["median"],
            "matmul": 2 * size**3 / found["matmul"]["median"],
        }
        print("rates:", self.results["rates"], flush=True)
        self.save()

    def accuracy(self, shapes: Shapes) -> None:
        """Measure how far each operation is from float64 on the same operands, ours and PyTorch's."""
        rows = self.results.setdefault("accuracy", [])
        done = {(row["name"], row["dtype"]) for row in rows}
        for operation in OPERATIONS:
            for kind, dtype in DTYPES.items():
                if (operation.name, kind) in done or self.is_late:
                    continue
                row: dict[str, Any] = {"name": operation.name, "dtype": kind}
                try:
                    with float32_as(kind), torch.no_grad():
                        row["errors"] = errors_of(operation, dtype, shapes)
                except Exception as error:
                    row["failed"] = said(error)
                    if not self._is_alive(f"{operation.name}, {kind}: {said(error)}"):
                        return
                rows.append(row)
                print(*row.values(), flush=True)
                self.save()

    def operations(self, shapes: Shapes) -> None:
        """Time each operation beside PyTorch's."""
        rates = self.results["rates"]
        gpu = Gpu(rates["matmul"], rates["copy"])
        floors = {work.name: work.floor(gpu) for work in [*head(shapes), loss(shapes)]}
        for operation in OPERATIONS:
            if self._has("operations", operation.name, shapes) or self.is_late:
                continue
            floor = sum(floors[work] for work in operation.works)
            try:
                given = self._inputs(operation, shapes)
                prepared = [operation.prepared(*operands) for operands in given]
            except torch.OutOfMemoryError as error:
                print(operation.name, said(error), flush=True)
                continue
            builders = {
                OURS: partial(calls, operation.ours, given),
                EAGER: partial(calls, operation.theirs, prepared),
                COMPILED: partial(lambda *args: calls(compiled(args[0]), args[1]), operation.theirs, prepared),
            }
            self._row("operations", operation.name, shapes, floor, builders, operation.comparable)

    def _inputs(self, operation: Operation, shapes: Shapes) -> list[tuple[torch.Tensor, ...]]:
        """Return so many sets of operands that each has left the cache when its turn comes again."""
        given = [operation.operands(Draw(torch.bfloat16, seed=0), shapes)]
        copies = min(self.copies, 1 + CACHE // sum(operand.nbytes for operand in given[0]))
        return given + [operation.operands(Draw(torch.bfloat16, seed=n), shapes) for n in range(1, copies)]

    def models(self, shapes: Shapes, world: Any = None) -> None:
        """Time whole models in bfloat16, from images to logits.

        Args:
            shapes: of the images.
            world: where the models come from, one of `bench.peers.World`; a UPerNet-ConvNeXt-T's where None.
        """
        name = "ConvNeXt-T, logits"
        if self._has("models", name, shapes) or self.is_late:
            return
        world = world or self._world
        pixels = [
            Draw(torch.bfloat16, seed=n)(shapes.batch, 3, shapes.size, shapes.size) for n in range(min(2, self.copies))
        ]

        def prepared(model: Any) -> Any:
            model = copy.deepcopy(model).eval().to(DEVICE, torch.bfloat16, memory_format=torch.channels_last)
            return model.requires_grad_(False)

        def builder(make: Callable[[], Any], wrap: Callable[[Any], Any] = lambda model: model) -> Callable[[], Any]:
            return lambda: replays(wrap(prepared(make())), pixels)

        floor = 2e9 * GMAC * shapes.batch * (shapes.size / 512) ** 2 / self.results["rates"]["matmul"]
        builders = {
            OURS: builder(lambda: world.ours("float32")),
            "fastuper, compiled": builder(lambda: world.ours("float32"), compiled),
            THEIRS: builder(lambda: world.theirs("float32")),
            "Transformers, without its auxiliary head": builder(lambda: world.theirs("float32", auxiliary=False)),
            THEIRS_COMPILED: builder(lambda: world.theirs("float32"), compiled),  # leaves that head out itself
        }
        # Of the largest, the logits of five peers and what came before them are more than a GPU holds.
        together = shapes.batch * shapes.size**2 <= 8 * 1024**2
        self._row("models", name, shapes, floor, builders, together=together)

    def training(self, shapes: Shapes, world: Any = None) -> None:
        """Time a step of training: forward in bfloat16 where autocast says so, backward, and a fused AdamW.

        Peak memory is that of a step over the weights: gradients and the optimizer's averages are in it. How far peers
        are apart is said of their losses after some steps, which what went backward has changed.

        Args:
            shapes: of the images, of two at least: Transformers' BatchNorm refuses the single pooled cell of one.
            world: as in `models`.
        """
        name = "ConvNeXt-T, a step of training"
        if self._has("training", name, shapes) or self.is_late:
            return
        from bench.training import data

        world = world or self._world
        classes = world.ours("float32").config.num_labels
        given = data(CHANNELS_LAST, shapes.size, shapes.batch, classes=classes)
        batch = {key: x.to(DEVICE) for key, x in given.items()}
        # Backward is twice forward: the gradients of maps and of weights.
        floor = 3 * 2e9 * GMAC * shapes.batch * (shapes.size / 512) ** 2 / self.results["rates"]["matmul"]
        builders = {
            OURS: lambda: training_step(world.ours("float32"), batch),
            THEIRS: lambda: training_step(world.theirs("float32"), batch),
            # As people train. Tuning, of what goes backward too, would be most of the ten minutes.
            THEIRS_COMPILED: lambda: training_step(
                world.theirs("float32"), batch, partial(torch.compile, fullgraph=True, dynamic=False)
            ),
        }
        self._row("training", name, shapes, floor, builders)

    def _has(self, kind: str, name: str, shapes: Shapes) -> bool:
        rows = self.results.setdefault(kind, [])
        return any((row["name"], row["batch"], row["size"]) == (name, shapes.batch, shapes.size) for row in rows)

    def _row(
        self,
        kind: str,
        name: str,
        shapes: Shapes,
        floor: float,
        builders: dict[str, Callable[[], list[Replay]]],
        comparable: Callable[[Any], torch.Tensor] = lambda result: result,
        together: bool = True,
    ) -> None:
        """Measure peers in turns, and keep the row; a peer that fails is a result too.

        Args:
            kind: of the row: "models", "training" or "operations".
            name: of what is measured.
            shapes: see there.
            floor: the least seconds that it takes.
            builders: of each peer's calls.
            comparable: brings the others' results to the form of ours.
            together: whether all peers are in memory at once, and take turns.
        """
        builders = {peer: build for peer, build in builders.items() if self.compiled or "compiled" not in peer}
        found: dict[str, dict[str, Any]] = {}
        firsts: list[torch.Tensor] = []
        for group in [list(builders)] if together else [[peer] for peer in builders]:
            peers: dict[str, list[Replay]] = {}
            for peer in group:
                if self.is_late:  # the row is the next run's
                    return
                try:
                    peers[peer], found[peer] = built(builders[peer])
                    result = peers[peer][0]()
                    if peer == OURS or (OURS in found and len(firsts) == 1):  # ours, and the first of the others
                        firsts.append((result if peer == OURS else comparable(result))[:1].clone())
                except Exception as error:
                    peers.pop(peer, None)
                    found[peer] = {"failed": said(error)}
                    if not self._is_alive(f"{name}, {peer}: {said(error)}"):
                        return
            for peer, times in alternate(peers, self.rounds).items():
                found[peer].update(times)
        row = {"name": name, "batch": shapes.batch, "size": shapes.size, "floor": floor, "peers": found}
        if len(firsts) == 2:
            row["difference"] = distance(firsts[0], firsts[1])
        self.results[kind].append(row)
        print(line(row), flush=True)
        self.save()
        torch._dynamo.reset()

    def _is_alive(self, doing: str) -> bool:
        """Return whether the GPU answers; after an illegal access nothing runs in this process any more."""
        if DEVICE != "cuda":
            return True
        try:
            torch.cuda.synchronize()
        except Exception:
            self.results["broken"], self.end = doing, 0.0
            self.save()
        return "broken" not in self.results


def said(error: Exception) -> str:
    return without_paths(f"{type(error).__name__}: {error}")[:300]


def source() -> str:
    """Return a hash of the code that is measured."""
    digest = hashlib.sha256()
    measuring = [ROOT / "bench" / name for name in ("gpu.py", "training.py")]
    for path in sorted([*ROOT.glob("fastuper/**/*.py"), *ROOT.glob("kernels/**/*.py"), *measuring]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# How calls are made, and timed ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replay:
    """A call as it is timed, and the most memory that was allocated while it ran once, not as a CUDA graph."""

    run: Call
    peak: int

    def __call__(self) -> Any:
        return self.run()


def calls(function: Callable[..., Any], inputs: Sequence[Sequence[Any]]) -> list[Replay]:
    """Return a replay of the function for each set of inputs."""
    return [captured(lambda given=given: function(*given)) for given in inputs]


def replays(model: Any, inputs: Sequence[torch.Tensor]) -> list[Replay]:
    """Return calls of a model, one for each image batch: a replay on a static input that is written before."""
    static = inputs[0].clone()
    replay = captured(lambda: model(static).logits)
    return [Replay(lambda given=given: (static.copy_(given), replay())[1], replay.peak) for given in inputs]


def compiled(function: Any) -> Any:
    """Return what torch.compile makes of it at its best; the CUDA graph is made as for everyone else."""
    return torch.compile(function, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")


def captured(call: Call) -> Replay:
    """Return a replay of the call as a CUDA graph: launches cost everyone alike, next to nothing."""
    if DEVICE != "cuda":
        _without_gradients(call)
        return Replay(lambda: _without_gradients(call), 0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        peak = peak_of(lambda: _without_gradients(call))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        kept = call()
    return Replay(lambda: (graph.replay(), kept)[1], peak)


def training_step(
    model: Any, batch: dict[str, torch.Tensor], wrap: Callable[[Any], Any] = lambda model: model
) -> list[Replay]:
    """Return a peer's only call, a step of training of a copy of the model; the weights are no part of its peak."""
    from bench.training import step_of

    model = copy.deepcopy(model).to(DEVICE, memory_format=torch.channels_last).train()
    weights = sum(x.nbytes for x in [*model.parameters(), *model.buffers()])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.05, fused=True)
    step = step_of(wrap(model), batch, optimizer, torch.bfloat16)
    return [Replay(lambda: step()[None], peak_of(step) - weights)]


def peak_of(call: Call) -> int:
    """Return the most memory that is allocated while a call runs, after some that compile and tune kernels."""
    if DEVICE != "cuda":
        call()
        return 0
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _without_gradients(call: Call) -> Any:
    with torch.no_grad():
        return call()


def built(build: Callable[[], list[Replay]]) -> tuple[list[Replay], dict[str, Any]]:
    """Return the calls that are built, and the most memory that the first takes, parameters included."""
    if DEVICE != "cuda":
        return build(), {"peak_bytes": 0}
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    found = build()
    return found, {"peak_bytes": found[0].peak - before}


def alternate(peers: Mapping[str, Sequence[Call]], rounds: int) -> dict[str, dict[str, Any]]:
    """Return each peer's seconds a call: `rounds` turns of all, each of them over all of a peer's inputs.

    One to whom the others leave too little memory "failed", and has no further turns.
    """
    counts, failed = {}, {}
    times: dict[str, list[float]] = {name: [] for name in peers}
    for n in range(1 + rounds):
        for name, each in peers.items():
            if name in failed:
                continue
            try:
                if n == 0:
                    seconds_of(each, 1)
                    # So many turns of the inputs that a measurement takes some milliseconds, and launches are hidden.
                    counts[name] = max(1, min(50, int(0.005 / max(seconds_of(each, 1), 1e-6))))
                else:
                    times[name].append(seconds_of(each, counts[name]) / counts[name] / len(each))
            except torch.OutOfMemoryError as error:
                failed[name] = said(error)
    return {
        name: {"failed": failed[name]} if name in failed else {"median": statistics.median(found), "rounds": found}
        for name, found in times.items()
    }


def seconds_of(each: Sequence[Call], count: int) -> float:
    """Return the seconds that so many turns of the calls take, on the GPU's own clock where there is one."""
    if DEVICE != "cuda":
        start = time.perf_counter()
        for _ in range(count):
            for call in each:
                call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(count):
        for call in each:
            call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


# The operations -------------------------------------------------------------------------------------------------------

SCALES = Shapes().scales
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,
    "float32": torch.float32,
}


@contextlib.contextmanager
def float32_as(kind: str) -> Iterator[None]:
    """Have convolutions take float32 as TF32, or as it is: PyTorch's default on a GPU is the first."""
    conv: Any = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = "tf32" if kind == "tf32" else "ieee"
    try:
        yield
    finally:
        conv.fp32_precision = before


class Draw:
    """Random operands, the same for the same seed: of a dtype, and given in another one where `cast` says so."""

    def __init__(self, dtype: torch.dtype, seed: int, cast: torch.dtype | None = None):
        self.dtype, self.cast = dtype, cast
        self.generator = torch.Generator(DEVICE).manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Return normal numbers times `scale`: maps and weights in channels_last, vectors in float32."""
        x = torch.randn(*shape, generator=self.generator, device=DEVICE) * scale
        if len(shape) != 4:
            return x.to(self.cast or torch.float32)
        return x.to(self.dtype).to(self.cast or self.dtype).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Operation:
    """One of ours, and the same of PyTorch's operators.

    Args:
        name: for the table.
        works: the names of what it does in `bench.roofline`.
        operands: (draw, shapes) -> what `ours` takes.
        ours: the operation.
        theirs: PyTorch's, of what `prepared` gives.
        prepared: what PyTorch's is given without its time counting: neither upsampling nor concatenation does.
        comparable: brings the other's result to the form of ours.
    """

    name: str
    works: tuple[str, ...]
    operands: Callable[[Draw, Shapes], tuple[torch.Tensor, ...]]
    ours: Callable[..., torch.Tensor]
    theirs: Callable[..., Any]
    prepared: Callable[..., tuple[torch.Tensor, ...]] = lambda *operands: operands
    comparable: Callable[[Any], torch.Tensor] = lambda result: result


def errors_of(operation: Operation, dtype: torch.dtype, shapes: Shapes) -> dict[str, float]:
    """Return how far an operation is from float64 on the same operands, ours and PyTorch's."""
    given = operation.operands(Draw(dtype, seed=1), shapes)
    ours, theirs = operation.ours(*given), operation.theirs(*operation.prepared(*given))
    exact = operation.operands(Draw(dtype, seed=1, cast=torch.float64), shapes)
    truth = operation.comparable(operation.theirs(*operation.prepared(*exact)))
    return {OURS: distance(ours, truth), EAGER: distance(operation.comparable(theirs), truth)}


def distance(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Return ||result - truth|| / ||truth||; of labels, the share of those that differ."""
    if not truth.is_floating_point():
        return float((result != truth).double().mean())
    return float((result.double() - truth).norm() / truth.double().norm())


def norm(y: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return F.relu(y * scale[:, None, None].to(y.dtype) + shift[:, None, None].to(y.dtype))


def _upsampled(x: torch.Tensor, size: Any) -> torch.Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def _fusion(weight: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, *levels: torch.Tensor) -> torch.Tensor:
    first, *others = weight.split(levels[0].shape[1], dim=1)
    addend = ops.upsampled_conv3x3(levels[1:], others, levels[0].shape[2:])
    return ops.conv_bn_relu(levels[0], first, scale, shift, addend=addend)


def _concatenated(
    weight: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, *levels: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    whole = torch.cat([_upsampled(x, levels[0].shape[2:]) for x in levels], dim=1)
    return weight, scale, shift, whole.contiguous(memory_format=torch.channels_last)


def _branches(x: torch.Tensor, *parameters: torch.Tensor) -> list[torch.Tensor]:
    pooled = [F.adaptive_avg_pool2d(x, scale) for scale in SCALES]
    return [norm(F.conv2d(cells, w), a, b) for cells, w, a, b in zip(pooled, *_by_kind(parameters), strict=True)]


def _by_kind(parameters: Sequence[torch.Tensor]) -> list[Sequence[torch.Tensor]]:
    """Return the weights, the scales and the shifts of all branches."""
    n = len(SCALES)
    return [parameters[:n], parameters[n : 2 * n], parameters[2 * n :]]


def _rows(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)


def _smooth_logits(draw: Draw, s: Shapes) -> tuple[torch.Tensor, ...]:
    # Smooth, as logits are: the classes of neighbouring pixels are much alike.
    coarse = draw(s.batch, s.classes, 16, 16, scale=3.0).float()
    smooth = F.interpolate(coarse, size=(s.size // 4, s.size // 4), mode="bicubic")
    smooth = smooth.to(draw.dtype).to(draw.cast or draw.dtype)
    return (smooth.contiguous(memory_format=torch.channels_last),)


def _logits_and_labels(draw: Draw, s: Shapes) -> tuple[torch.Tensor, ...]:
    size = (s.batch, s.size, s.size)
    labels = torch.randint(s.classes, size, generator=draw.generator, device=DEVICE)
    return *_smooth_logits(draw, s), labels


def _gradient_of_loss(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(ops.upsample_cross_entropy(x, labels), x)[0]


OPERATIONS = (
    Operation(
        "fusion, with its coarser levels",
        ("fusion", "fusion, products and sum of the taps"),
        lambda draw, s: (
            draw(s.dim, 4 * s.dim, 3, 3, scale=s.dim**-0.5 / 6),
            draw(s.dim),
            draw(s.dim),
            *(draw(s.batch, s.dim, s.size // stride, s.size // stride) for stride in (4, 8, 16, 32)),
        ),
        _fusion,
        lambda weight, scale, shift, x: norm(F.conv2d(x, weight, padding=1), scale, shift),
        _concatenated,
    ),
    Operation(
        "3x3 convolution at stride 4",
        ("FPN, stride 4",),
        lambda draw, s: (
            draw(s.batch, s.dim, s.size // 4, s.size // 4),
            draw(s.dim, s.dim, 3, 3, scale=s.dim**-0.5 / 3),
            draw(s.dim),
            draw(s.dim),
        ),
        ops.conv_bn_relu,
        lambda x, weight, scale, shift: norm(F.conv2d(x, weight, padding=1), scale, shift),
    ),
    Operation(
        "lateral at stride 4, and the coarser level",
        ("lateral, stride 4",),
        lambda draw, s: (
            draw(s.batch, s.channels[0], s.size // 4, s.size // 4),
            draw(s.dim, s.channels[0], 1, 1, scale=s.channels[0] ** -0.5),
            draw(s.dim),
            draw(s.dim),
            draw(s.batch, s.dim, s.size // 8, s.size // 8),
        ),
        lambda x, weight, scale, shift, coarser: ops.conv_bn_relu(x, weight, scale, shift, upsampled=coarser),
        lambda x, weight, scale, shift, coarser: (
            norm(F.conv2d(x, weight), scale, shift) + _upsampled(coarser, x.shape[2:])
        ),
    ),
    Operation(
        "upsample_argmax",
        ("upsample_argmax",),
        _smooth_logits,
        lambda x: ops.upsample_argmax(x, [(4 * x.shape[2], 4 * x.shape[3])]),
        lambda x: _upsampled(x, (4 * x.shape[2], 4 * x.shape[3])).argmax(1),
    ),
    Operation(
        "upsample_cross_entropy and its gradient",
        ("upsample_cross_entropy",),
        _logits_and_labels,
        _gradient_of_loss,
        # In float32 from the resampled logits on, as autocast has it.
        lambda x, labels: torch.func.grad(
            lambda x: F.cross_entropy(
                _upsampled(x, labels.shape[1:]).to(torch.promote_types(x.dtype, torch.float32)), labels
            )
        )(x),
    ),
    Operation(
        "pyramid_pool",
        ("pyramid_pool",),
        lambda draw, s: (draw(s.batch, s.channels[-1], s.size // 32, s.size // 32),),
        lambda x: ops.pyramid_pool(x, SCALES),
        lambda x: [F.adaptive_avg_pool2d(x, scale) for scale in SCALES],
        comparable=_rows,
    ),
    Operation(
        "pool_conv_bn_relu",
        ("pyramid_pool", "branches of the pyramid"),
        lambda draw, s: (
            draw(s.batch, s.channels[-1], s.size // 32, s.size // 32),
            *(draw(s.dim, s.channels[-1], 1, 1, scale=s.channels[-1] ** -0.5) for _ in SCALES),
            *(draw(s.dim) for _ in range(2 * len(SCALES))),
        ),
        lambda x, *parameters: ops.pool_conv_bn_relu(x, SCALES, *_by_kind(parameters)),
        _branches,
        comparable=_rows,
    ),
)


# What comes out -------------------------------------------------------------------------------------------------------


def line(row: dict[str, Any]) -> str:
    peers = ", ".join(
        f"{name} {1e6 * peer['median']:.1f} us" if "median" in peer else f"{name} {peer.get('failed', 'failed')}"
        for name, peer in row["peers"].items()
    )
    floor, apart = f"floor {1e6 * row['floor']:.1f} us", f"apart {row.get('difference', float('nan')):.1e}"
    return f"{row['name']}, batch {row['batch']}, {row['size']}: {floor}, {apart}; {peers}"


def timed(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of everything that was timed."""
    return [row for kind in KINDS for row in results.get(kind, [])]


def targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what a step of training was to reach, and whether it does; None where a peer has failed."""
    peers: dict[str, Any] = next((row["peers"] for row in results.get("training", [])), {})
    ours, theirs = (peers.get(name, {}) for name in (OURS, THEIRS_COMPILED))
    values: dict[str, float | None] = dict.fromkeys(("speedup", "memory"))
    if "median" in ours and "median" in theirs:
        values["speedup"] = theirs["median"] / ours["median"]
    if ours.get("peak_bytes") and theirs.get("peak_bytes"):
        values["memory"] = ours["peak_bytes"] / theirs["peak_bytes"]
    found = []
    for target in TARGETS:
        value = values[target.kind]
        met = None if value is None else target.met(value)
        found.append({"name": target.name, "kind": target.kind, "bound": target.bound, "value": value, "met": met})
    return found


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown tables."""
    rates, version = results["rates"], results["versions"]
    lines = [
        f"{results['device']}, {results['date']}, commit {results['commit']}; PyTorch {version['torch']}, Triton "
        f"{version['triton']}, Transformers {version['transformers']}; copies {rates['copy'] / 1e12:.2f} TB/s, bf16 "
        f"products {rates['matmul'] / 1e12:.0f} TFLOP/s. Tests: {results.get('tests', {}).get('summary', 'not run')}.",
        "",
        "| bfloat16 | batch | size | floor, us | ours, us | share of the floor | the others' times over ours "
        "| our memory over the others' |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in timed(results):
        ours = row["peers"].get(OURS, {})
        cells = [row["name"], row["batch"], row["size"], f"{1e6 * row['floor']:.1f}"]
        if "median" not in ours:
            cells += [f"failed: {ours.get('failed', '')}", "", "", ""]
        else:
            others = {name: peer for name, peer in row["peers"].items() if name != OURS}
            times = [
                f"{name} {peer['median'] / ours['median']:.2f}" if "median" in peer else f"{name} failed"
                for name, peer in others.items()
            ]
            memory = [
                f"{name} {ours['peak_bytes'] / peer['peak_bytes']:.2f}"
                for name, peer in others.items()
                if peer.get("peak_bytes")
            ]
            share = row["floor"] / ours["median"]
            cells += [f"{1e6 * ours['median']:.1f}", f"{share:.0%}", ", ".join(times), ", ".join(memory)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "| a step of training beside Transformers, compiled | to reach on an H200 | measured | |"]
    lines += ["|---|---|---|---|"]
    for target in results.get("targets", []):
        bound = f"at {'least' if target['kind'] == 'speedup' else 'most'} {target['bound']:g}"
        value = "" if target["value"] is None else f"{target['value']:.2f}"
        lines.append(f"| {target['name']} | {bound} | {value} | {verdict(target)} |")
    lines += ["", "| distance from float64 | | ours | PyTorch's |", "|---|---|---|---|"]
    for row in results.get("accuracy", []):
        if "failed" in row:
            lines.append(f"| {row['name']} | {row['dtype']} | {row['failed']} | |")
            continue
        errors = row["errors"]
        lines.append(f"| {row['name']} | {row['dtype']} | {errors[OURS]:.2e} | {errors[EAGER]:.2e} |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw each row's share of its floor, everyone's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = timed(results)
    names = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    width = 0.8 / max(len(names), 1)
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(rows) + 1.5))
    for n, name in enumerate(names):
        found = [(place, row) for place, row in enumerate(rows) if "median" in row["peers"].get(name, {})]
        places = [place + width * (n - len(names) / 2) for place, _ in found]
        shares = [row["floor"] / row["peers"][name]["median"] for _, row in found]
        axes.barh(places, shares, width, label=name)
    axes.set_yticks(range(len(rows)), [f"{row['name']}, {row['batch']} x {row['size']}" for row in rows], fontsize=7)
    axes.set_xlabel("share of the floor: 1 is as fast as this GPU's memory and tensor cores allow")
    axes.invert_yaxis()
    if names:
        axes.legend(fontsize=7)
    figure.suptitle(results["device"])
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()

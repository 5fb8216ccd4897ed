"""The steps of the GPU check: tests, rates, accuracy, timings. Results are written after every step."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu.calls import (
    DEVICE,
    Replay,
    built,
    calls,
    compiled,
    replays,
    said,
    times_of,
    training_step,
)
from bench.gpu.operations import DTYPES, OPERATIONS, Draw, Operation, distance, errors_of
from bench.gpu.report import KINDS, line, plot, table, targets
from bench.machine import commit, now, versions
from bench.names import COMPILED, EAGER, FASTUPER, OURS_COMPILED, PYTORCH
from bench.numerics import float32_as
from bench.peers import World
from bench.roofline import Gpu, Shapes, head, loss, precise_roi
from bench.training import data
from fastuper_kernels import tune
from fastuper_kernels.dispatch.files import replace_json

ROOT = Path(__file__).parents[2]
TESTS = [
    "tests/interpreted",
    "tests/models/test_cuda_graph.py",
    *(f"tests/parity/test_{name}.py" for name in ("forward", "gradients", "accuracy", "segment")),
]
LARGE = "tests/interpreted/test_large.py"
MEASURING = ("numerics", "pairs", "peers", "timing", "training")  # files of bench that decide the figures
# The shapes of images and heads, the most important first.
SHAPES = tuple(Shapes(*sizes) for sizes in ((1, 512), (16, 512), (8, 512), (1, 1024), (8, 1024), (16, 1024)))
TRAINED = Shapes(16, 512)  # images of a training step
CACHE = 2 * 60 * 2**20  # bytes, twice an H200's
GMAC = 129  # of fastuper's UPerNet-ConvNeXt-T for an image of 512 x 512


class Check:
    """The steps of the check and their results, with the results of an earlier run of the same code on the same GPU.

    Args:
        folder: for `gpu.json`, `gpu.md`, `gpu.svg` and `tests.log`.
        end: value of `time.monotonic()` after which no measurement starts.
        compiled: whether compiled peers are measured.
        rounds: of each measurement.
        copies: the largest number of copies of the inputs, which take turns.
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
                for kind in ("accuracy", *KINDS):  # failed rows are measured again
                    before[kind] = [row for row in before.get(kind, []) if "failed" not in json.dumps(row)]
                self.results = before

    def save(self) -> None:
        replace_json(self.folder / "gpu.json", self.results)

    @property
    def is_late(self) -> bool:
        return time.monotonic() > self.end

    @cached_property
    def _world(self) -> Any:
        """Return a pair of UPerNet-ConvNeXt-T models."""
        return World("convnext-t")

    def tests(self, seconds: float = 240) -> None:
        """Run the tests of the kernels and the parity tests on the GPU, unless they have passed before."""
        if self.results.get("tests", {}).get("passed"):
            return
        workers = []
        if importlib.util.find_spec("xdist"):  # most of the time is compiling kernels on the host
            workers = ["-n", str(min(12, len(os.sched_getaffinity(0)))), "--dist", "worksteal"]
        # Force Triton: the tests are of its kernels, even where cuDNN is faster.
        environment = {**os.environ, "FASTUPER_TEST_DEVICE": "cuda", "FASTUPER_CHOICES": "conv=triton"}
        begin, codes = time.monotonic(), []
        with (self.folder / "tests.log").open("w", encoding="utf-8") as log:
            # The tests of large maps run alone: they need most of the GPU's memory.
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
            "summary": "; ".join(re.findall(r"=+ (.* in [\d.]+s.*?) =+", text)) or "stopped at the time limit",
            "failures": failures,
        }
        print("tests:", self.results["tests"], flush=True)
        self.save()

    def measure(self, shapes: Sequence[Shapes] = SHAPES, world: Any = None, trained: Shapes = TRAINED) -> None:
        """Measure as much as time allows, and write the tables and the plot.

        Args:
            shapes: of images and heads. Accuracy is measured at the first shape.
            world: models, passed to `models` and `training`.
            trained: shapes of a training step.
        """
        torch.backends.cudnn.benchmark = True
        if "rates" not in self.results:
            self.rates()
        self.results["configurations"] = list(tune.text_lines())
        first, *others = shapes
        self.accuracy(first)
        self.models(first, world)
        self.operations(first)
        self.training(trained, world)
        for each in others:
            self.models(each, world)
            self.operations(each)
        self.results["targets"] = targets(self.results)
        self.results["complete"] = not self.is_late  # a broken GPU sets the end to 0
        self.save()
        text = table(self.results)
        (self.folder / "gpu.md").write_text(text, encoding="utf-8")
        plot(self.results, self.folder / "gpu.svg")
        print(text)

    def rates(self) -> None:
        """Measure this GPU's highest rates of copies and of matrix products."""
        size, count = (8192, 2**32) if DEVICE == "cuda" else (64, 2**16)
        source = torch.randint(255, (count,), dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        one, two = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(one)
        found = times_of(
            {"copy": [lambda: target.copy_(source)], "matmul": [lambda: torch.mm(one, two, out=out)]}, self.rounds
        )
        self.results["rates"] = {
            "copy": 2 * count / found["copy"]["median"],
            "matmul": 2 * size**3 / found["matmul"]["median"],
        }
        print("rates:", self.results["rates"], flush=True)
        self.save()

    def accuracy(self, shapes: Shapes) -> None:
        """Measure each operation's distance from float64 on the same operands, fastuper's and PyTorch's."""
        rows = self.results.setdefault("accuracy", [])
        done = {(row["name"], row["dtype"]) for row in rows}
        for operation in OPERATIONS:
            for kind, dtype in DTYPES.items():
                if (operation.name, kind) in done or self.is_late:
                    continue
                row: dict[str, Any] = {"name": operation.name, "dtype": kind}
                try:
                    with float32_as("tf32" if kind == "tf32" else "ieee"), torch.no_grad():
                        row["errors"] = errors_of(operation, dtype, shapes)
                except Exception as error:
                    row["failed"] = said(error)
                    if not self._is_alive(f"{operation.name}, {kind}: {said(error)}"):
                        return
                rows.append(row)
                print(*row.values(), flush=True)
                self.save()

    def operations(self, shapes: Shapes) -> None:
        """Time each operation beside PyTorch's operators."""
        rates = self.results["rates"]
        gpu = Gpu(rates["matmul"], rates["copy"])
        floors = {work.name: work.floor(gpu) for work in [*head(shapes), loss(shapes), precise_roi(shapes)]}
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
                FASTUPER: partial(calls, operation.ours, given),
                PYTORCH[0]: partial(calls, operation.theirs, prepared),
                PYTORCH[1]: partial(lambda *args: calls(compiled(args[0]), args[1]), operation.theirs, prepared),
            }
            self._row("operations", operation.name, shapes, floor, builders, operation.comparable)

    def _inputs(self, operation: Operation, shapes: Shapes) -> list[tuple[torch.Tensor, ...]]:
        """Return sets of operands, enough that each has left the GPU's cache before its next turn."""
        given = [operation.operands(Draw(torch.bfloat16, seed=0), shapes)]
        copies = min(self.copies, 1 + CACHE // sum(operand.nbytes for operand in given[0]))
        return given + [operation.operands(Draw(torch.bfloat16, seed=n), shapes) for n in range(1, copies)]

    def models(self, shapes: Shapes, world: Any = None) -> None:
        """Time whole models in bfloat16, from images to logits.

        Args:
            shapes: of the images.
            world: a `bench.peers.World` with the models; UPerNet-ConvNeXt-T if None.
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
            FASTUPER: builder(lambda: world.ours("float32")),
            OURS_COMPILED: builder(lambda: world.ours("float32"), compiled),
            EAGER[0]: builder(lambda: world.theirs("float32")),
            "Transformers, without its auxiliary head": builder(lambda: world.theirs("float32", auxiliary=False)),
            COMPILED: builder(lambda: world.theirs("float32"), compiled),  # compiling drops the auxiliary head
        }
        # At the largest shape the five peers' logits and activations do not fit into the GPU together.
        together = shapes.batch * shapes.size**2 <= 8 * 1024**2
        self._row("models", name, shapes, floor, builders, together=together)

    def training(self, shapes: Shapes, world: Any = None) -> None:
        """Time a training step: forward under bfloat16 autocast, backward, and a fused AdamW.

        Peak memory is a step's peak over the weights; it includes gradients and the optimizer's averages. The row's
        difference compares losses after some steps, which depend on the backward passes.

        Args:
            shapes: of the images, at least two: Transformers' BatchNorm rejects the single pooled cell of one image.
            world: as in `models`.
        """
        name = "ConvNeXt-T, a step of training"
        if self._has("training", name, shapes) or self.is_late:
            return
        world = world or self._world
        classes = world.ours("float32").config.num_labels
        given = data(EAGER[1], shapes.size, shapes.batch, classes=classes)
        batch = {key: x.to(DEVICE) for key, x in given.items()}
        # The backward pass has twice the operations: gradients of maps and of weights.
        floor = 3 * 2e9 * GMAC * shapes.batch * (shapes.size / 512) ** 2 / self.results["rates"]["matmul"]
        builders = {
            FASTUPER: lambda: training_step(world.ours("float32"), batch),
            EAGER[0]: lambda: training_step(world.theirs("float32"), batch),
            # The step is compiled without max-autotune: tuning the backward pass would take most of the ten minutes.
            COMPILED: lambda: training_step(
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
        """Measure peers in turns and keep the row; it records peers that fail.

        Args:
            kind: of the row: "models", "training" or "operations".
            name: of the row.
            shapes: of the row.
            floor: the least seconds of a call.
            builders: of each peer's calls.
            comparable: converts a peer's result to the form of fastuper's.
            together: whether all peers are in memory at once and take turns.
        """
        builders = {peer: build for peer, build in builders.items() if self.compiled or "compiled" not in peer}
        found: dict[str, dict[str, Any]] = {}
        firsts: list[torch.Tensor] = []
        for group in [list(builders)] if together else [[peer] for peer in builders]:
            peers: dict[str, list[Replay]] = {}
            for peer in group:
                if self.is_late:  # the next run measures the row
                    return
                try:
                    peers[peer], found[peer] = built(builders[peer])
                    result = peers[peer][0]()
                    if peer == FASTUPER or (
                        FASTUPER in found and len(firsts) == 1
                    ):  # fastuper, and the first other peer
                        firsts.append((result if peer == FASTUPER else comparable(result))[:1].clone())
                except Exception as error:
                    peers.pop(peer, None)
                    found[peer] = {"failed": said(error)}
                    if not self._is_alive(f"{name}, {peer}: {said(error)}"):
                        return
            for peer, times in times_of(peers, self.rounds).items():
                found[peer].update(times)
        row = {"name": name, "batch": shapes.batch, "size": shapes.size, "floor": floor, "peers": found}
        if len(firsts) == 2:
            row["difference"] = distance(firsts[0], firsts[1])
        self.results[kind].append(row)
        print(line(row), flush=True)
        self.save()
        torch._dynamo.reset()

    def _is_alive(self, doing: str) -> bool:
        """Return True if the GPU answers. After an illegal access this process cannot use the GPU any more."""
        if DEVICE != "cuda":
            return True
        try:
            torch.cuda.synchronize()
        except Exception:
            self.results["broken"], self.end = doing, 0.0
            self.save()
        return "broken" not in self.results


def source() -> str:
    """Return a hash of the measured and the measuring code."""
    digest = hashlib.sha256()
    measuring = [*ROOT.glob("bench/gpu/*.py"), *(ROOT / "bench" / f"{name}.py" for name in MEASURING)]
    for path in sorted([*ROOT.glob("fastuper/**/*.py"), *ROOT.glob("kernels/**/*.py"), *measuring]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]

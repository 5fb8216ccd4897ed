"""Everything that needs a GPU, in one command and under one folder: `make gpu-check`, or `python -m bench.gpu`.

Tests of the kernels first; then the rates that this GPU really has, of copies and of matrix products; then each
operation beside PyTorch's, eager and compiled; then whole models beside Transformers'. Times are medians over rounds
in which everyone takes turns, between CUDA events, with inputs that take turns too, so that none is found in cache.
What is measured is written after every step: a run that is cut short leaves what it has.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import fastuper_kernels as ops
from bench.machine import commit, now, versions
from bench.roofline import Gpu, Shapes, head

ROOT = Path(__file__).parent.parent
OURS, EAGER, COMPILED = "fastuper", "PyTorch", "PyTorch, compiled"
Call = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / ".cache" / "gpu-check", help="the folder")
    parser.add_argument("--seconds", type=float, default=540, help="no new measurement begins after so long")
    parser.add_argument("--no-tests", action="store_true", help="measure alone")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here: `make test` runs the kernels in Triton's interpreter")
    arguments.output.mkdir(parents=True, exist_ok=True)
    check = Check(arguments.output, time.monotonic() + arguments.seconds)
    if not arguments.no_tests:
        check.tests()
    check.rates()
    check.operations()
    check.models()
    print(table(check.results))
    plot(check.results, arguments.output / "gpu.svg")
    (arguments.output / "gpu.md").write_text(table(check.results), encoding="utf-8")
    sys.exit(0 if check.results.get("tests", {}).get("passed", True) else 1)


class Check:
    """The steps, and their results so far."""

    def __init__(self, folder: Path, end: float):
        self.folder, self.end = folder, end
        import triton

        self.results: dict[str, Any] = {
            "device": torch.cuda.get_device_name(),
            "date": now(),
            "commit": commit(),
            "versions": {**versions(), "triton": triton.__version__, "cuda": torch.version.cuda},
            "operations": [],
            "models": [],
        }

    def save(self) -> None:
        path = self.folder / "gpu.json"
        path.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")

    def tests(self) -> None:
        """Run the kernels' tests on the GPU."""
        command = [sys.executable, "-m", "pytest", "tests/interpreted", "-q", "-p", "no:cacheprovider", "-x", "-rfE"]
        with (self.folder / "tests.log").open("w") as log:
            done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False)
        tail = (self.folder / "tests.log").read_text().strip().splitlines()[-1:]
        self.results["tests"] = {"passed": done.returncode == 0, "summary": tail}
        print("tests:", *tail, flush=True)
        self.save()

    def rates(self) -> None:
        """Measure what this GPU's memory and its tensor cores do at best."""
        copy_rate = self._copy_rate()
        matrices = [torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        out = torch.empty_like(matrices[0])
        (seconds,) = alternate({"mm": [lambda: torch.mm(*matrices[:2], out=out)]}, rounds=10).values()
        self.results["rates"] = {"copy": copy_rate, "matmul": 2 * 8192**3 / seconds["median"]}
        print("rates:", self.results["rates"], flush=True)
        self.save()

    def _copy_rate(self) -> float:
        source = torch.randint(255, (2**32,), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        (seconds,) = alternate({"copy": [lambda: target.copy_(source)]}, rounds=10).values()
        return 2 * source.numel() / float(seconds["median"])

    def operations(self) -> None:
        gpu = Gpu(self.results["rates"]["matmul"], self.results["rates"]["copy"])
        for batch, size in ((1, 512), (16, 512), (8, 512), (1, 1024), (8, 1024)):
            floors = {work.name: work for work in head(Shapes(batch=batch, size=size))}
            for name, works, make in OPERATIONS:
                if time.monotonic() > self.end:
                    self.results["stopped"] = "out of time"
                    return
                copies = max(1, min(4, int(2e9 // (batch * size * size * 150))))
                peers = make(batch, size, copies)
                floor = sum(floors[work].floor(gpu) for work in works)
                row = {"name": name, "batch": batch, "size": size, "floor": floor, "peers": alternate(peers, rounds=15)}
                self.results["operations"].append(row)
                print(line(row), flush=True)
                self.save()
                torch._dynamo.reset()

    def models(self) -> None:
        from bench.peers import World

        for batch, size in ((1, 512), (16, 512), (8, 512), (1, 1024), (8, 1024)):
            if time.monotonic() > self.end:
                self.results["stopped"] = "out of time"
                return
            floor = 2 * 129e9 * batch * (size / 512) ** 2 / self.results["rates"]["matmul"]
            row = {"name": "ConvNeXt-T, logits", "batch": batch, "size": size, "floor": floor, "peers": {}}
            for peer, build in model_peers(World("convnext-t"), batch, size).items():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                try:
                    calls = build()
                    found = alternate({peer: calls}, rounds=15)[peer]
                    found["peak_bytes"] = torch.cuda.max_memory_allocated()
                except Exception as error:  # a peer that cannot do it is a result
                    found = {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
                row["peers"][peer] = found
                torch._dynamo.reset()
            self.results["models"].append(row)
            print(line(row), flush=True)
            self.save()


def alternate(peers: dict[str, Sequence[Call]], rounds: int) -> dict[str, dict[str, Any]]:
    """Return each peer's seconds a call: `rounds` turns of all, each of them over all of a peer's inputs."""
    counts = {}
    for name, calls in peers.items():
        for call in calls:
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for call in calls:
            call()
        torch.cuda.synchronize()
        # So many turns of the inputs that a measurement takes some milliseconds, and launches are hidden.
        counts[name] = max(1, min(50, int(0.005 / max(time.perf_counter() - start, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(rounds):
        for name, calls in peers.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(counts[name]):
                for call in calls:
                    call()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / 1e3 / counts[name] / len(calls))
    return {name: {"median": statistics.median(found), "rounds": found} for name, found in times.items()}


# The operations, each as several calls on inputs of its own -----------------------------------------------------------


def tensor(*shape: int) -> torch.Tensor:
    x = torch.randn(*shape, device="cuda").to(torch.bfloat16)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def calls(function: Callable[..., Any], inputs: Sequence[Sequence[Any]]) -> list[Call]:
    return [lambda given=given: function(*given) for given in inputs]


def peers_of(
    ours: Callable[..., Any], theirs: Callable[..., Any], inputs: Sequence[Any], given: Sequence[Any] | None = None
) -> dict[str, list[Call]]:
    """Return us, PyTorch and PyTorch compiled; `given` are their inputs where they are others."""
    compiled = torch.compile(theirs, fullgraph=True, mode="max-autotune-no-cudagraphs")
    found = {OURS: calls(ours, inputs)}
    for name, function in ((EAGER, theirs), (COMPILED, compiled)):
        found[name] = calls(function, inputs if given is None else given)
    return {name: [captured(call) for call in found[name]] for name in found}


def captured(call: Call) -> Call:
    """Return a replay of the call as a CUDA graph: launches cost everyone alike, next to nothing."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        kept = call()
    return lambda: (graph.replay(), kept)[1]


def norm(y: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return F.relu(y * scale[:, None, None].to(y.dtype) + shift[:, None, None].to(y.dtype))


def _conv3x3(batch: int, size: int, copies: int) -> Any:
    weight = tensor(512, 512, 3, 3) / 68
    scale, shift = torch.rand(2, 512, device="cuda").unbind()
    inputs = [(tensor(batch, 512, size // 4, size // 4),) for _ in range(copies)]
    return peers_of(
        lambda x: ops.conv_bn_relu(x, weight, scale, shift),
        lambda x: norm(F.conv2d(x, weight, padding=1), scale, shift),
        inputs,
    )


def _fusion(batch: int, size: int, copies: int) -> Any:
    weight = tensor(512, 2048, 3, 3) / 136
    scale, shift = torch.rand(2, 512, device="cuda").unbind()
    parts = list(weight.split(512, dim=1))
    inputs = [[tensor(batch, 512, size // s, size // s) for s in (4, 8, 16, 32)] for _ in range(copies)]

    def ours(x: torch.Tensor, *levels: torch.Tensor) -> torch.Tensor:
        addend = ops.upsampled_conv3x3(levels, parts[1:], x.shape[2:])
        return ops.conv_bn_relu(x, parts[0], scale, shift, addend=addend)

    # The others are given what they convolve: neither upsampling nor concatenation counts.
    whole = [
        (torch.cat([F.interpolate(x, size=levels[0].shape[2:], mode="bilinear") for x in levels], dim=1),)
        for levels in inputs
    ]
    return peers_of(ours, lambda x: norm(F.conv2d(x, weight, padding=1), scale, shift), inputs, whole)


def _lateral(batch: int, size: int, copies: int) -> Any:
    weight, (scale, shift) = tensor(512, 96, 1, 1) / 10, torch.rand(2, 512, device="cuda").unbind()
    inputs = [
        (tensor(batch, 96, size // 4, size // 4), tensor(batch, 512, size // 8, size // 8)) for _ in range(copies)
    ]

    def theirs(x: torch.Tensor, coarser: torch.Tensor) -> torch.Tensor:
        y = norm(F.conv2d(x, weight), scale, shift)
        return y + F.interpolate(coarser, size=y.shape[2:], mode="bilinear")

    return peers_of(lambda x, c: ops.conv_bn_relu(x, weight, scale, shift, upsampled=c), theirs, inputs)


def _pool(batch: int, size: int, copies: int) -> Any:
    inputs = [(tensor(batch, 768, size // 32, size // 32),) for _ in range(copies)]
    scales = (1, 2, 3, 6)
    return peers_of(
        lambda x: ops.pyramid_pool(x, scales), lambda x: [F.adaptive_avg_pool2d(x, scale) for scale in scales], inputs
    )


def _argmax(batch: int, size: int, copies: int) -> Any:
    # Smooth, as logits are: the classes of neighbouring pixels are much alike.
    inputs = [
        (F.interpolate(3 * tensor(batch, 150, 16, 16), size=(size // 4, size // 4), mode="bicubic"),)
        for _ in range(copies)
    ]
    inputs = [(x.contiguous(memory_format=torch.channels_last),) for (x,) in inputs]
    return peers_of(
        lambda x: ops.upsample_argmax(x, [(size, size)]),
        lambda x: F.interpolate(x, size=(size, size), mode="bilinear").argmax(1),
        inputs,
    )


OPERATIONS: list[tuple[str, list[str], Callable[[int, int, int], Any]]] = [
    ("fusion, with its coarser levels", ["fusion", "fusion, products and sum of the taps"], _fusion),
    ("3x3 convolution at stride 4", ["FPN, stride 4"], _conv3x3),
    ("lateral at stride 4, and the coarser level", ["lateral, stride 4"], _lateral),
    ("upsample_argmax", ["upsample_argmax"], _argmax),
    ("pyramid_pool", ["pyramid_pool"], _pool),
]


def model_peers(world: Any, batch: int, size: int) -> dict[str, Callable[[], list[Call]]]:
    """Return whole models in bfloat16: builders of calls, each a replay of a CUDA graph where that is possible."""
    pixels = [tensor(batch, 3, size, size) for _ in range(2)]

    def prepared(model: Any) -> Any:
        model = copy.deepcopy(model).eval().to("cuda", torch.bfloat16, memory_format=torch.channels_last)
        return model.requires_grad_(False)

    def eager(model: Any) -> Callable[[], list[Call]]:
        def build() -> list[Call]:
            ready = prepared(model)
            return [captured(lambda x=x: ready(x).logits) for x in pixels]

        return build

    def compiled() -> list[Call]:
        ready = torch.compile(prepared(world.theirs("float32")), mode="max-autotune-no-cudagraphs")
        return [captured(lambda x=x: ready(x).logits) for x in pixels]

    def ours() -> list[Call]:
        replay = prepared(world.ours("float32")).capture(pixels[0])
        return [lambda x=x: replay(x) for x in pixels]

    return {
        "Transformers": eager(world.theirs("float32")),
        "Transformers, compiled, max-autotune": compiled,
        OURS: ours,
    }


# What comes out ---------------------------------------------------------------------------------------------------


def line(row: dict[str, Any]) -> str:
    peers = ", ".join(
        f"{name} {1e6 * peer['median']:.1f} us" if "median" in peer else f"{name} failed"
        for name, peer in row["peers"].items()
    )
    return f"{row['name']}, batch {row['batch']}, {row['size']}: floor {1e6 * row['floor']:.1f} us; {peers}"


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    rates = results["rates"]
    lines = [
        f"{results['device']}, {results['date']}; PyTorch {results['versions']['torch']}, Triton "
        f"{results['versions']['triton']}; copies {rates['copy'] / 1e12:.2f} TB/s, bf16 products "
        f"{rates['matmul'] / 1e12:.0f} TFLOP/s.",
        "",
        "| | batch | size | floor, us | ours, us | share of the floor | the others' times over ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in [*results["operations"], *results["models"]]:
        ours = row["peers"].get(OURS, {}).get("median")
        if ours is None:
            lines.append(f"| {row['name']} | {row['batch']} | {row['size']} | {1e6 * row['floor']:.1f} | failed | | |")
            continue
        others = ", ".join(
            f"{name} {peer['median'] / ours:.2f} x" if "median" in peer else f"{name} failed"
            for name, peer in row["peers"].items()
            if name != OURS
        )
        lines.append(
            f"| {row['name']} | {row['batch']} | {row['size']} | {1e6 * row['floor']:.1f} | {1e6 * ours:.1f} | "
            f"{row['floor'] / ours:.0%} | {others} |"
        )
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw each operation's share of its floor, ours and the others'."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [*results["operations"], *results["models"]]
    figure, axes = plt.subplots(figsize=(9, 0.4 * len(rows) + 1.5))
    for offset, name in enumerate((OURS, EAGER, COMPILED)):
        for place, row in enumerate(rows):
            peer = row["peers"].get(name) or row["peers"].get(name.replace("PyTorch", "Transformers"), {})
            if "median" in peer:
                axes.barh(place + 0.27 * (offset - 1), row["floor"] / peer["median"], 0.25, color=f"C{offset}")
    axes.set_yticks(range(len(rows)), [f"{row['name']}, {row['batch']} x {row['size']}" for row in rows], fontsize=7)
    axes.set_xlabel("share of the floor: 1 is as fast as this GPU's memory and tensor cores allow")
    axes.set_xlim(0, 1)
    axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()

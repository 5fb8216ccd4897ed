"""Builds the calls that are timed on a GPU (CUDA graphs, training steps), and times them in alternating turns."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.machine import without_paths
from bench.timing import Call, turns
from bench.training import step_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the CPU is for tests of this package


@dataclass(frozen=True)
class Replay:
    """A call to time, and the peak of allocated memory in bytes of one eager run."""

    run: Call
    peak: int

    def __call__(self) -> Any:
        return self.run()


def calls(function: Callable[..., Any], inputs: Sequence[Sequence[Any]]) -> list[Replay]:
    """Return a replay of the function for each set of inputs."""
    return [captured(lambda given=given: function(*given)) for given in inputs]


def replays(model: Any, inputs: Sequence[torch.Tensor]) -> list[Replay]:
    """Return a model's calls, one for each image batch. Each copies its batch into a static input and replays."""
    static = inputs[0].clone()
    replay = captured(lambda: model(static).logits)
    return [Replay(lambda given=given: (static.copy_(given), replay())[1], replay.peak) for given in inputs]


def compiled(function: Any) -> Any:
    """Return the function compiled for the highest speed; its CUDA graph is captured like every peer's."""
    return torch.compile(function, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")


def captured(call: Call) -> Replay:
    """Return a replay of the call as a CUDA graph, in which every peer's launches cost the same and nearly nothing."""
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
    """Return a peer's single call: a training step of a copy of the model. Its peak excludes the weights."""
    model = copy.deepcopy(model).to(DEVICE, memory_format=torch.channels_last).train()
    weights = sum(x.nbytes for x in [*model.parameters(), *model.buffers()])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.05, fused=True)
    step = step_of(wrap(model), batch, optimizer, torch.bfloat16)
    return [Replay(lambda: step()[None], peak_of(step) - weights)]


def peak_of(call: Call) -> int:
    """Return the peak of allocated memory, in bytes, while a call runs. Calls before it compile and tune kernels."""
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
    """Return a peer's calls, and the peak memory of the first over the memory in use before, parameters included."""
    if DEVICE != "cuda":
        return build(), {"peak_bytes": 0}
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    found = build()
    return found, {"peak_bytes": found[0].peak - before}


def times_of(peers: Mapping[str, Sequence[Call]], rounds: int) -> dict[str, dict[str, Any]]:
    """Time peers in alternating turns, each turn over all of a peer's inputs.

    Returns each peer's "median" and "rounds" in seconds a call. A peer that runs out of memory is "failed" and has no
    further turns.
    """
    failed: dict[str, dict[str, Any]] = {}

    def out_of_memory(name: str, error: Exception) -> None:
        if not isinstance(error, torch.OutOfMemoryError):
            raise error
        failed[name] = {"failed": said(error)}

    def second_turn(each: Sequence[Call]) -> float:
        seconds_of(each, 1)
        return seconds_of(each, 1)

    def clock(each: Sequence[Call], seconds: float) -> Callable[[], float]:
        # A turn repeats the inputs until it takes some milliseconds, which hides the launches.
        count = max(1, min(50, int(0.005 / max(seconds, 1e-6))))
        return lambda: seconds_of(each, count) / count / len(each)

    warm_ups = {name: partial(second_turn, each) for name, each in peers.items()}
    clocks = {name: clock(peers[name], seconds) for name, seconds in turns(warm_ups, 1, out_of_memory)}
    times: dict[str, list[float]] = {name: [] for name in peers}
    for name, seconds in turns(clocks, rounds, out_of_memory):
        times[name].append(seconds)
    return {
        name: failed.get(name) or {"median": statistics.median(found), "rounds": found} for name, found in times.items()
    }


def seconds_of(each: Sequence[Call], count: int) -> float:
    """Return the seconds of `count` repetitions of the calls: between CUDA events on a GPU, of the wall on a CPU."""
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


def said(error: Exception) -> str:
    """Return an exception's type and message in one line, without paths."""
    return without_paths(f"{type(error).__name__}: {error}")[:300]

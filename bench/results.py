"""What was measured on a machine, and what follows from it: medians, ratios, the accuracy rule, targets met or missed.

A machine's file bench/results/<machine>.json holds `machine`; `runs` (date, commit, versions, threads by the run's id);
`tasks`, by name, each with its run's id and for each peer every round's seconds and its distance from float64, or why
it was skipped; `memory`, likewise, in bytes; and `targets` and `limits`, which are computed from those.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.names import (
    AUTOCAST,
    COMPILED,
    CONVOLUTION,
    EAGER,
    FASTUPER,
    FROZEN,
    ONNX,
    OPENVINO,
    SMALLER,
    TUNED,
    WITHOUT_AUXILIARY,
)

FOLDER = Path(__file__).parent / "results"
TINY = {"convnext-t": "ConvNeXt-T", "swin-t": "Swin-T"}
LOSS = "loss"  # of training, what is measured alone
TITLES = {**TINY, "convnext-b": "ConvNeXt-B", "swin-b": "Swin-B", "convnext-l": "ConvNeXt-L", "swin-l": "Swin-L"}

MACHINE_EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-7}

Results = dict[str, Any]


def load(path: Path | None = None) -> Results | None:
    """Return a machine's results, those with the newest run where no file is named; None where there are none."""
    if path is not None:
        return json.loads(path.read_text())
    found = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    found = [results for results in found if "tasks" in results]
    return max(found, key=lambda results: max(results["runs"]), default=None)


def load_training() -> dict[str, Any] | None:
    """Return what bench.training measured; None where it has not."""
    path = FOLDER / "training.json"
    return json.loads(path.read_text()) if path.exists() else None


def seconds(results: Results, task: str, peer: str) -> float | None:
    """Return the median of a peer's rounds."""
    rounds = results["tasks"].get(task, {}).get("peers", {}).get(peer, {}).get("rounds")
    return median(rounds) if rounds else None


def best(results: Results, task: str, peers: Sequence[str]) -> float | None:
    """Return the median of the fastest of these peers: one library at its best layout and mode."""
    found = [time for peer in peers if (time := seconds(results, task, peer)) is not None]
    return min(found, default=None)


def speedup(results: Results, task: str, peers: Sequence[str]) -> float | None:
    """Return how many times faster ours is than the fastest of these peers."""
    theirs, ours = best(results, task, peers), seconds(results, task, FASTUPER)
    return theirs / ours if theirs is not None and ours is not None else None


def accuracy(entry: dict[str, Any]) -> dict[str, Any] | None:
    """Return what the accuracy rule says about a task: our error over the largest allowed, or pixels that differ."""
    peers = entry["peers"]
    ours = peers.get(FASTUPER, {})
    if "differ_beyond_rounding" in ours:
        beyond = ours["differ_beyond_rounding"]
        return {"differ_beyond_rounding": beyond, "pixels": ours["pixels"], "met": beyond == 0}
    theirs = [peers[name]["error"] for name in EAGER if "error" in peers.get(name, {})]
    if "error" not in ours or len(theirs) < len(EAGER):  # the rule is about both of its layouts
        return None
    allowed = max(1.25 * max(theirs), 4 * MACHINE_EPSILON[entry["dtype"]])
    return {"error": ours["error"], "allowed": allowed, "met": ours["error"] <= allowed}


def rules(results: Results) -> list[dict[str, Any]]:
    """Return what the accuracy rule says, of every task that it says something about."""
    return [rule for entry in results["tasks"].values() if (rule := accuracy(entry)) is not None]


@dataclass(frozen=True)
class Target:
    """Something to reach: a value computed from results (see `value`), and its bound.

    `kind` is speedup (of `task` over `peers`), memory (our peak over theirs at `task`), "memory, packed weights apart"
    (the same without our second copy of the weights), growth (our time at `task`, of 2048, over that at 1024 in the
    same rounds) or accuracy (tasks at which the rule is broken).
    """

    name: str
    kind: str
    bound: float
    task: str = ""
    peers: tuple[str, ...] = ()

    def value(self, results: Results) -> float | None:
        if self.kind == "speedup":
            return speedup(results, self.task, self.peers)
        if self.kind.startswith("memory"):
            peers = results["memory"].get(self.task, {}).get("peers", {})
            ours = peers.get(FASTUPER, {})
            theirs = [peers[name]["peak"] for name in self.peers if "peak" in peers.get(name, {})]
            if "peak" not in ours or not theirs:
                return None
            return (ours["peak"] - (0 if self.kind == "memory" else ours["packed"])) / min(theirs)
        if self.kind == "growth":
            large, small = (seconds(results, self.task, peer) for peer in (FASTUPER, SMALLER))
            return large / small if large is not None and small is not None else None
        found = rules(results)
        return sum(not rule["met"] for rule in found) if found else None

    def met(self, value: float) -> bool:
        return value >= self.bound if self.kind == "speedup" else value <= self.bound


def _targets() -> list[Target]:
    targets = []
    for key, title in TINY.items():
        logits, bfloat16 = f"logits {key} 512 float32", f"logits {key} 512 bfloat16"

        def faster(what: str, bound: float, task: str, peers: Sequence[str], title: str = title) -> None:
            targets.append(Target(f"{title}, {what}", "speedup", bound, task, tuple(peers)))

        faster("logits, float32, over Transformers", 2.5, logits, EAGER)
        faster("logits, float32, over Transformers compiled", 1.8, logits, [COMPILED, FROZEN, TUNED])
        faster("logits, float32, over ONNX Runtime", 1.4, logits, [ONNX])
        faster("logits, float32, over OpenVINO", 1.4, logits, [OPENVINO])
        faster("logits, bfloat16, over OpenVINO", 1.3, bfloat16, [OPENVINO])
        faster("logits, bfloat16, over Transformers", 1.5, bfloat16, [*EAGER, AUTOCAST])
        faster("photo to labels, over Transformers", 3.0, f"labels {key} 512 float32", EAGER)
        faster("head alone, over Transformers", 2.2, f"head {key} 512 float32", EAGER)
        bound = {"convnext-t": 1.8, "swin-t": 1.5}[key]
        faster("backbone alone, over Transformers", bound, f"backbone {key} 512 float32", EAGER)
        # Of its two ways, with and without the auxiliary head, Transformers' better one.
        peers = (EAGER[0], WITHOUT_AUXILIARY[0])
        for what, size, bound in (("logits", 1024, 0.55), ("labels", 2048, 0.25)):
            name, task = f"{title}, peak memory of {what} at {size}", f"{what} {key} {size} float32"
            apart = ", packed weights apart"
            targets.append(Target(name + apart, "memory" + apart, bound, task, peers))
            targets.append(Target(name, "memory", bound, task, peers))
        targets.append(Target(f"{title}, time at 2048 over time at 1024", "growth", 4.4, f"logits {key} 2048 float32"))
    targets.append(Target("tasks at which the accuracy rule is broken", "accuracy", 0))
    return targets


TARGETS = _targets()


def limits(results: Results) -> list[dict[str, Any]]:
    """Return for each task with a measured convolution the least time that its operations take at that one's rate."""
    found = []
    for name, entry in results["tasks"].items():
        ours, convolution = seconds(results, name, FASTUPER), seconds(results, name, CONVOLUTION)
        if ours is None or convolution is None:
            continue
        rate = entry["peers"][CONVOLUTION]["flop"] / convolution
        flop = entry["flop"][entry["part"]]
        found.append(
            {
                "task": name,
                "flop": flop,
                "rate": rate,
                "limit": flop / rate,
                "seconds": ours,
                "share": flop / rate / ours,
            }
        )
    return found


def conclude(results: Results) -> None:
    """Store what follows from the measurements: targets, each met or missed, and limits."""
    results["targets"] = [_judged(target, target.value(results)) for target in TARGETS]
    results["limits"] = limits(results)


def training_targets(training: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what was to be reached by a step of training, of bench.training's results, each met or missed."""
    row = training["backbones"].get("convnext-t", {})
    return [
        _judged(Target("ConvNeXt-T, a step, over Transformers", "speedup", 1.8), row.get("faster")),
        _judged(Target("ConvNeXt-T, peak memory of a step", "memory", 0.6), row.get("memory")),
    ]


def _judged(target: Target, value: float | None) -> dict[str, Any]:
    met = None if value is None else target.met(value)
    return {"name": target.name, "kind": target.kind, "bound": target.bound, "value": value, "met": met}


def verdict(target: dict[str, Any]) -> str:
    """Return met, or by what factor it is missed."""
    if target["met"] is None:
        return "not measured"
    if target["met"]:
        return "met"
    if not target["bound"]:
        return "missed"
    low, high = sorted([target["bound"], target["value"]])
    return f"missed by a factor of {high / low:.2f}"


def summary(results: Results) -> str:
    """Return the medians, ratios and verdicts as text for a terminal."""
    lines = []
    for name, entry in results["tasks"].items():
        ours = seconds(results, name, FASTUPER)
        lines.append(f"\n{name}")
        for peer, row in entry["peers"].items():
            if "skipped" in row:
                lines.append(f"  {peer:50} {row['skipped'][:70]}")
                continue
            time = median(row["rounds"])
            ratio = f"{time / ours:6.2f} x ours" if ours else ""
            distance = f"  error {row['error']:.1e}" if "error" in row else ""
            if "differ_beyond_rounding" in row:
                distance = f"  {row['differ_beyond_rounding']} labels wrong"
            lines.append(f"  {peer:50} {time:8.4f} s {ratio}{distance}")
    for name, entry in results["memory"].items():
        lines.append(f"\npeak memory over the weights, {name}")
        for peer, row in entry["peers"].items():
            lines.append(f"  {peer:50} " + (row.get("skipped") or f"{row['peak'] / 1e9:8.3f} GB"))
    lines.append("")
    for entry in results["limits"]:
        lines.append(
            f"limit of {entry['task']}: {entry['flop'] / 1e9:.0f} GFLOP at the {entry['rate'] / 1e9:.0f} GFLOP/s of "
            f"one convolution take {entry['limit']:.3f} s; ours takes {entry['seconds']:.3f} s, that is "
            f"{entry['share']:.0%} of the rate"
        )
    lines.append("")
    for target in results["targets"]:
        if target["value"] is not None:
            sign = ">=" if target["kind"] == "speedup" else "<="
            lines.append(f"{target['name']:62} {target['value']:6.2f} {sign} {target['bound']:<5} {verdict(target)}")
    return "\n".join(lines)

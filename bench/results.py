"""Reads results files and computes medians, ratios, the accuracy rule, targets and limits.

A machine's file bench/results/<machine>.json holds `machine`; `runs` (commit, versions, threads, by the run's date);
`tasks` by name, with the run and for each peer the seconds of every round and the error against float64, or the reason
why the peer was skipped; `memory` in the same form, in bytes; and `targets` and `limits`, computed from the other
entries.
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
    OURS_COMPILED,
    SMALLER,
    TUNED,
    WITHOUT_AUXILIARY,
)

FOLDER = Path(__file__).parent / "results"
TINY = {"convnext-t": "ConvNeXt-T", "swin-t": "Swin-T"}
PARSING = {"resnet-50-deep-stem": "ResNet-50, deep stem", "convnext-tiny": "ConvNeXt-T"}  # bench.parsing's backbones
LOSS = "loss"  # training.json's key of the loss, which is measured alone too
TITLES = {**TINY, "convnext-b": "ConvNeXt-B", "swin-b": "Swin-B", "convnext-l": "ConvNeXt-L", "swin-l": "Swin-L"}


@dataclass(frozen=True)
class Acceleration:
    """A row of bench.accelerate: what is timed, the side of its images, and how many times as fast it is to be."""

    title: str
    size: int
    bound: float | None


ACCELERATIONS = {
    "convnext-t": Acceleration("Transformers' UPerNet, ConvNeXt-T", 512, 2.4),
    "swin-t": Acceleration("Transformers' UPerNet, Swin-T", 512, 2.2),
    "smp-512": Acceleration("smp's UPerNet, `tu-convnext_tiny`, `decoder_channels=512`", 512, 2.0),
    "smp-256": Acceleration("smp's UPerNet, `tu-convnext_tiny`, `decoder_channels=256` (the default)", 512, 1.3),
    "beit-head": Acceleration("the head of Transformers' BEiT-B", 640, 2.5),
    "beit": Acceleration("Transformers' BEiT-B, the whole model", 640, None),
}
"""The rows of bench.accelerate, in the order of its table."""


@dataclass(frozen=True)
class Export:
    """A row of bench.exports' table: two models of its results, and how many times as fast the second is to be.

    `int8` is the second in 8-bit integers, "" if there is none.
    """

    title: str
    before: str
    after: str
    bounds: dict[str, float]
    int8: str = ""


EXPORTS = [
    Export(
        "ONNX Runtime",
        "Transformers, ONNX Runtime",
        "fastuper, ONNX Runtime",
        {"convnext-t": 1.65, "swin-t": 1.5},
        "fastuper, ONNX Runtime, int8",
    ),
    Export(
        "ONNX Runtime, label map (Transformers': logits, then NumPy)",
        "Transformers, ONNX Runtime, NumPy",
        "fastuper, ONNX Runtime, label map",
        dict.fromkeys(TINY, 2.2),
    ),
    Export(
        "OpenVINO",
        "Transformers, OpenVINO",
        "fastuper, OpenVINO",
        dict.fromkeys(TINY, 1.9),
        "fastuper, OpenVINO, int8",
    ),
    Export(
        "OpenVINO, label map (Transformers': logits, then NumPy)",
        "Transformers, OpenVINO, NumPy",
        "fastuper, OpenVINO, label map",
        dict.fromkeys(TINY, 2.2),
    ),
    Export("OpenVINO, bfloat16", "Transformers, OpenVINO, bf16", "fastuper, OpenVINO, bf16", dict.fromkeys(TINY, 1.5)),
    Export("AOTInductor", "Transformers, AOTInductor", "fastuper, AOTInductor", dict.fromkeys(TINY, 1.6)),
    Export(
        "AOTInductor, beside fastuper with `torch.compile`",
        OURS_COMPILED,
        "fastuper, AOTInductor",
        dict.fromkeys(TINY, 1.0),
    ),
]
"""The rows of bench.exports' table."""

BACKBONE_RESULTS = FOLDER / "backbones.json"
FOREIGN_BACKBONES = [
    "timm/resnext50_32x4d",
    "timm/efficientnet_b4",
    "timm/maxvit_tiny_tf_512",
    "timm/swinv2_tiny_window8_256",
    "timm/vit_base_patch16_224.mae",
    "timm/beit_base_patch16_224",
    "timm/vit_small_patch14_dinov2",
    "timm/vit_small_patch16_dinov3",
    "timm/eva02_small_patch14_224",
    "transformers/dinov2",
    "transformers/dinov2_with_registers",
    "transformers/beit",
    "transformers/vitdet",
    "transformers/dinov3_vit",
    "transformers/hiera",
    "transformers/focalnet",
    "transformers/hgnet_v2",
]
"""The other libraries' backbones of bench.backbones: timm's names, and model types of Transformers (default sizes)."""

_PARITY = {
    "forward": "tests/parity/test_forward.py::test_any_size",
    "training step": "tests/parity/test_gradients.py::test_gradients_in_float64",
    "save and load": "tests/models/test_pretrained.py::test_round_trip",
    "export": "tests/models/test_backbone_tracing.py::test_export_with_dynamic_sizes",
}
_FOREIGN = {
    "forward": "tests/models/test_foreign_backbones.py::"
    "test_the_network_is_the_librarys_backbone_with_a_plain_neck_and_head",
    "training step": "tests/models/test_foreign_backbones.py::test_all_that_is_read_learns_and_has_a_depth",
    "save and load": "tests/models/test_foreign_backbones.py::"
    "test_the_network_is_the_librarys_backbone_with_a_plain_neck_and_head",
}
TESTED = {
    "convnext": _PARITY,
    "convnextv2": _PARITY,
    "swin": _PARITY,
    "swinv2": _PARITY,
    "resnet": _PARITY,
    "resnet_deep_stem": {
        "forward": "tests/parity/test_deep_stem.py::test_the_official_encoder",
        "training step": "tests/parity/test_deep_stem.py::test_gradients",
        "save and load": "tests/models/test_pretrained.py::test_round_trip",
    },
    "vit_pyramid": {
        "forward": "tests/parity/test_mmseg_vit_weights.py::test_the_same_maps",
        "training step": "tests/models/test_training_mode.py::test_checkpointing_changes_nothing_but_memory",
        "save and load": "tests/models/test_pretrained.py::test_round_trip",
    },
    "timm": _FOREIGN,
    "transformers": _FOREIGN,
}
"""For each family of backbones, and for timm and Transformers: what tests run at small widths, and one of the tests."""

MACHINE_EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-7}

Results = dict[str, Any]


def load(path: Path | None = None) -> Results | None:
    """Return the results of a file, by default the file with the newest run; None if there is none."""
    if path is not None:
        return json.loads(path.read_text())
    found = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    found = [results for results in found if "tasks" in results]
    return max(found, key=lambda results: max(results["runs"]), default=None)


def load_training() -> dict[str, Any] | None:
    """Return the results of bench.training; None if there are none."""
    path = FOLDER / "training.json"
    return json.loads(path.read_text()) if path.exists() else None


def load_parsing() -> dict[str, Any] | None:
    """Return the results of bench.parsing; None if there are none."""
    path = FOLDER / "parsing.json"
    return json.loads(path.read_text()) if path.exists() else None


def load_backbones() -> dict[str, Any] | None:
    """Return the results of bench.backbones; None if there are none."""
    return json.loads(BACKBONE_RESULTS.read_text()) if BACKBONE_RESULTS.exists() else None


def load_acceleration() -> dict[str, Any] | None:
    """Return the results of bench.accelerate; None if there are none."""
    path = FOLDER / "accelerate.json"
    return json.loads(path.read_text()) if path.exists() else None


def load_exports() -> dict[str, Any] | None:
    """Return the results of bench.exports; None if there are none."""
    path = FOLDER / "exports.json"
    return json.loads(path.read_text()) if path.exists() else None


def seconds(results: Results, task: str, peer: str) -> float | None:
    """Return the median seconds of a peer's rounds; None if it has none."""
    rounds = results["tasks"].get(task, {}).get("peers", {}).get(peer, {}).get("rounds")
    return median(rounds) if rounds else None


def best(results: Results, task: str, peers: Sequence[str]) -> float | None:
    """Return the least of the peers' medians: a library in its fastest layout and mode."""
    found = [time for peer in peers if (time := seconds(results, task, peer)) is not None]
    return min(found, default=None)


def speedup(results: Results, task: str, peers: Sequence[str]) -> float | None:
    """Return the fastest peer's median over fastuper's."""
    theirs, ours = best(results, task, peers), seconds(results, task, FASTUPER)
    return theirs / ours if theirs is not None and ours is not None else None


def accuracy(entry: dict[str, Any]) -> dict[str, Any] | None:
    """Return fastuper's error and the largest allowed, or the pixels that differ; None if the rule does not apply."""
    peers = entry["peers"]
    ours = peers.get(FASTUPER, {})
    if "differ_beyond_rounding" in ours:
        beyond = ours["differ_beyond_rounding"]
        return {"differ_beyond_rounding": beyond, "pixels": ours["pixels"], "met": beyond == 0}
    theirs = [peers[name]["error"] for name in EAGER if "error" in peers.get(name, {})]
    if "error" not in ours or len(theirs) < len(EAGER):  # the rule needs Transformers' error in both layouts
        return None
    allowed = max(1.25 * max(theirs), 4 * MACHINE_EPSILON[entry["dtype"]])
    return {"error": ours["error"], "allowed": allowed, "met": ours["error"] <= allowed}


def rules(results: Results) -> list[dict[str, Any]]:
    """Return `accuracy` of every task that the rule applies to."""
    return [rule for entry in results["tasks"].values() if (rule := accuracy(entry)) is not None]


@dataclass(frozen=True)
class Target:
    """A target: a value computed from the results, and its bound.

    Args:
        name: for tables.
        kind: the value. "speedup" is the time of the fastest of `peers` over fastuper's at `task`. "memory" is
            fastuper's peak over the least of the peers' peaks. "memory, packed weights apart" leaves out fastuper's
            packed copy of the weights. "growth" is fastuper's time at `task`, of size 2048, over its time at 1024 in
            the same rounds. "accuracy" is the number of tasks that break the accuracy rule.
        bound: the least speedup, or the largest value of another kind.
        task: the task's name.
        peers: the peers' names.
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
        # Transformers with and without its auxiliary head: the better one counts.
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
    """Return each task's least time: its operations at the rate of the convolution timed in the same rounds."""
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
    """Store the targets, each met or missed, and the limits in the results."""
    results["targets"] = [_judged(target, target.value(results)) for target in TARGETS]
    results["limits"] = limits(results)


def training_targets(training: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the targets of a training step, each met or missed, from bench.training's results."""
    row = training["backbones"].get("convnext-t", {})
    return [
        _judged(Target("ConvNeXt-T, a step, over Transformers", "speedup", 1.8), row.get("faster")),
        _judged(Target("ConvNeXt-T, peak memory of a step", "memory", 0.6), row.get("memory")),
    ]


def acceleration_targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the targets of models accelerated in place, each met or missed, from bench.accelerate's results."""
    return [
        _judged(Target(row.title, "speedup", row.bound), result["rows"].get(key, {}).get("faster"))
        for key, row in ACCELERATIONS.items()
        if row.bound is not None
    ]


def export_targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the targets of exported models, each met or missed, from bench.exports' results."""
    targets = []
    for key, title in TINY.items():
        peers = result["rows"].get(key, {}).get("peers", {})
        for row in EXPORTS:
            times = [
                median(peers[name]["rounds"]) for name in (row.before, row.after) if "rounds" in peers.get(name, {})
            ]
            value = times[0] / times[1] if len(times) == 2 else None
            targets.append(_judged(Target(f"{title}, {row.title}", "speedup", row.bounds[key]), value))
    return targets


def parsing_targets(parsing: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the targets of Unified Perceptual Parsing, each met or missed, from bench.parsing's results."""
    targets = []
    for key, title in PARSING.items():
        row = parsing["backbones"].get(key, {})
        targets += [
            _judged(Target(f"{title}, five tasks, over the textbook", "speedup", 2.5), row.get("faster")),
            _judged(Target(f"{title}, time of five tasks over objects alone", "time", 1.9), row.get("over_objects")),
            _judged(Target(f"{title}, peak memory over the textbook's", "memory", 0.25), row.get("memory")),
        ]
    return targets


def _judged(target: Target, value: float | None) -> dict[str, Any]:
    met = None if value is None else target.met(value)
    return {"name": target.name, "kind": target.kind, "bound": target.bound, "value": value, "met": met}


def verdict(target: dict[str, Any]) -> str:
    """Return "met", "not measured", or "missed" with the factor."""
    if target["met"] is None:
        return "not measured"
    if target["met"]:
        return "met"
    if not target["bound"]:
        return "missed"
    low, high = sorted([target["bound"], target["value"]])
    return f"missed by a factor of {high / low:.2f}"

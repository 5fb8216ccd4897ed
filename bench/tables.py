"""The tables of README and docs/: `python -m bench.tables` rewrites them in place, from only the committed results."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bench.machine import ABSENT
from bench.names import (
    ACCELERATED,
    AUTOCAST,
    BEFORE,
    COMPILED,
    EAGER,
    FASTUPER,
    FROZEN,
    OBJECTS,
    ONNX,
    OPENVINO,
    OURS_COMPILED,
    REFERENCE,
    SEGMENTATION,
    SMP,
    TEXTBOOK,
    TUNED,
    WITHOUT_AUXILIARY,
)
from bench.plots import PLOTS, STEPS
from bench.results import (
    ACCELERATIONS,
    EXPORTS,
    FOLDER,
    LOSS,
    PARSING,
    TESTED,
    TINY,
    TITLES,
    Results,
    accuracy,
    best,
    load,
    load_acceleration,
    load_backbones,
    load_exports,
    load_parsing,
    load_training,
    rules,
    seconds,
    verdict,
)

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
ACCURACY = ROOT / "docs" / "accuracy.md"
BACKBONES = ROOT / "docs" / "backbones.md"
EXPORT = ROOT / "docs" / "export.md"
NOT_MEASURED = "Not measured yet: `make bench`."
MEMORY_PEERS = (EAGER[0], WITHOUT_AUXILIARY[0], FASTUPER)


def scientific(value: float) -> str:
    """Write 0.00000123 as 1.2e-6, and 0 as 0."""
    return f"{value:.1e}".replace("e-0", "e-") if value else "0"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cells) + " |" if cells[0] != "---" else "|" + "---|" * len(head) for cells in lines]


def load_accuracy() -> dict[str, Any]:
    """Return the results of `make accuracy`."""
    return json.loads((FOLDER / "accuracy.json").read_text())


def accuracy_table(_: Results | None) -> str:
    """Return the table of errors against float64, from `make accuracy`'s results."""
    result = load_accuracy()
    head = [
        "UPerNet with",
        "float64: fastuper from Transformers",
        "float32: fastuper",
        "float32: Transformers",
        "bfloat16: fastuper",
        "bfloat16: Transformers",
        "labels that differ, float32",
    ]
    rows = []
    for row in result["rows"]:
        cells = [row["backbone"], scientific(row["float64"])]
        for dtype in ("float32", "bfloat16"):
            errors = dict(row[dtype]["errors"])
            cells += [scientific(errors.pop("fastuper")), scientific(max(errors.values()))]
        labels = row["float32"]["labels"]
        cells.append(f"{labels['differ']:,} of {labels['pixels']:,}")
        rows.append(cells)
    versions = result["versions"]
    note = (
        "The second column is the relative difference between the logits of both libraries in float64. The next four "
        "columns are relative errors of the logits against float64. Both are root mean squares over "
        f"{result['seeds']} draws of weights and of {result['size']} x {result['size']} images, with 150 classes. For "
        "Transformers the table gives the larger error of its two memory layouts. "
        f"Transformers {versions['transformers']}, PyTorch {versions['torch']}, {result['machine']}, "
        f"{result['date']}. `make accuracy` repeats the measurement."
    )
    return "\n".join([*table(head, rows), "", note])


def exact_lines(_: Results | None) -> str:
    """Return README's two sentences about accuracy, with ConvNeXt-T's figures."""
    result = load_accuracy()
    row = result["rows"][0]
    errors = dict(row["float32"]["errors"])
    ours, theirs, labels = errors.pop("fastuper"), max(errors.values()), row["float32"]["labels"]
    differ, tied = labels["differ"], labels["differ"] - labels["differ_beyond_rounding"]
    ties = f", {'all' if tied == differ else tied} of them at pixels whose two best classes are tied within rounding"
    return (
        f"With the same weights, fastuper's float32 logits of a UPerNet-{row['backbone']} have a relative error of "
        f"{scientific(ours)} against float64, and Transformers' logits have {scientific(theirs)}. "
        f"{differ:,} of {labels['pixels']:,} labels differ{ties if differ else ''} "
        "([the rule and all numbers](docs/accuracy.md))."
    )


def duration(value: float) -> str:
    """Write seconds with three digits."""
    return f"{value * 1e3:.3g} ms" if value < 0.1 else f"{value:.3g} s" if value < 100 else f"{value:.0f} s"


def cell(results: Results, task: str, peers: Sequence[str]) -> str:
    """Return the median of the fastest of some peers, and its ratio to fastuper's median."""
    time, ours = best(results, task, peers), seconds(results, task, FASTUPER)
    if time is None:
        rows = [results["tasks"].get(task, {}).get("peers", {}).get(peer, {}) for peer in peers]
        return "fails" if any(row.get("skipped") not in (None, "not asked for") for row in rows) else ""
    if tuple(peers) == (FASTUPER,):
        return f"**{duration(time)}**"
    return f"{duration(time)} ({time / ours:.2f} x)" if ours else duration(time)


def compared(results: Results, columns: dict[str, str], rows: dict[str, Sequence[str]]) -> list[str]:
    """Return a table of times: tasks in columns, peers in rows. Rows and columns without times are left out."""
    columns = {title: task for title, task in columns.items() if task in results["tasks"]}
    cells = {title: [cell(results, task, peers) for task in columns.values()] for title, peers in rows.items()}
    return table(["", *columns], [[title, *row] for title, row in cells.items() if any(row)])


LIBRARIES = {
    "torch": "PyTorch",
    "transformers": "Transformers",
    "segmentation_models_pytorch": "segmentation_models_pytorch",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}


def source(
    results: Results, names: Sequence[str], kind: str = "tasks", libraries: Sequence[str] = tuple(LIBRARIES)
) -> str:
    """Return the machine, the libraries' versions and the dates that some tasks were measured with."""
    machine = results["machine"]
    ids = sorted({results[kind][name]["run"] for name in names if name in results[kind]})
    versions = {package: version for key in ids for package, version in results["runs"][key]["versions"].items()}
    listed = ", ".join(
        f"{LIBRARIES[package]} {versions[package]}" for package in libraries if versions.get(package, ABSENT) != ABSENT
    )
    dates = ", ".join(sorted({key[:10] for key in ids}))
    return f"{machine['cpu']} ({machine['instructions']}), {machine['threads']} threads; {listed}; {dates}."


SPEED_ROWS: dict[str, Sequence[str]] = {
    FASTUPER: [FASTUPER],
    "fastuper, `torch.compile`": [OURS_COMPILED],
    "Transformers": EAGER,
    "Transformers without auxiliary head": WITHOUT_AUXILIARY,
    "Transformers, `torch.compile`": [COMPILED],
    "Transformers, `torch.compile`, freezing": [FROZEN],
    "Transformers, `torch.compile`, freezing, max-autotune": [TUNED],
    "segmentation_models_pytorch": [SMP[0]],
    "segmentation_models_pytorch, `torch.compile`, freezing": [SMP[1]],
    "ONNX Runtime": [ONNX],
    "OpenVINO": [OPENVINO],
}
BFLOAT16_ROWS = {
    **SPEED_ROWS,
    "Transformers, autocast": [AUTOCAST],
}


def tiny(part: str, size: int = 512, dtype: str = "float32", title: str = "") -> dict[str, str]:
    """Return the columns of a part with both Tiny backbones: task name by title."""
    return {f"{title or part}, {name}": f"{part} {key} {size} {dtype}" for key, name in TINY.items()}


def speed_table(results: Results | None) -> str:
    """Return the times of logits and of label maps beside the peers'."""
    columns = {**tiny("logits"), **tiny("labels", title="label map")}
    if results is None or not any(task in results["tasks"] for task in columns.values()):
        return NOT_MEASURED
    note = (
        "Seconds for one image of 512 x 512, float32, and in parentheses the ratio to fastuper. Each figure is a "
        "median of rounds in which all peers take turns, each library in its faster memory layout. The label maps have "
        "683 x 1024 pixels. " + source(results, list(columns.values()))
    )
    return "\n".join([*compared(results, columns, SPEED_ROWS), "", note])


def times_table(columns: dict[str, str], rows: dict[str, Sequence[str]], results: Results | None) -> str:
    """Return a table of times, and below it the machine, versions and dates."""
    if results is None or not any(task in results["tasks"] for task in columns.values()):
        return NOT_MEASURED
    return "\n".join([*compared(results, columns, rows), "", source(results, list(columns.values()))])


def larger_table(results: Results | None) -> str:
    """Return the times of Tiny, Base and Large: the backbone's share of the work grows, and the gain shrinks."""
    names = [f"logits {key} 512 float32" for key in TITLES]
    if results is None or not any(name in results["tasks"] for name in names):
        return NOT_MEASURED
    rows = []
    for key, name in zip(TITLES, names, strict=True):
        if name not in results["tasks"]:
            continue
        flop = results["tasks"][name]["flop"]
        theirs, ours = best(results, name, EAGER), seconds(results, name, FASTUPER)
        if theirs is None or ours is None:
            continue
        work = f"{flop['as_written'] / 1e9:.0f}", f"{flop['logits'] / 1e9:.0f}"
        rows.append([TITLES[key], *work, duration(theirs), duration(ours), f"{theirs / ours:.2f} x"])
    head = ["", "GFLOP, standard head", "GFLOP, fastuper", "Transformers", "fastuper", "faster"]
    return "\n".join([*table(head, rows), "", source(results, names)])


def memory_table(results: Results | None) -> str:
    """Return the peak memory over the weights, beside Transformers'."""
    if results is None or not results["memory"]:
        return NOT_MEASURED
    rows = []
    for entry in results["memory"].values():
        peers = entry["peers"]
        cells = [f"{entry['part']}, {TITLES[entry['backbone']]}, {entry['size']} x {entry['size']}"]
        for peer in MEMORY_PEERS:
            row = peers.get(peer, {})
            cells.append(f"{row['peak'] / 1e9:.2f} GB" if "peak" in row else "fails")
        theirs = [peers[peer]["peak"] for peer in MEMORY_PEERS[:-1] if "peak" in peers.get(peer, {})]
        ours = peers.get(FASTUPER, {})
        cells.append(f"{ours['packed'] / 1e9:.2f} GB" if "packed" in ours else "")
        cells.append(f"{ours['peak'] / min(theirs):.2f}" if theirs and "peak" in ours else "")
        rows.append(cells)
    head = [
        "",
        "Transformers",
        "Transformers without auxiliary head",
        FASTUPER,
        "of which packed weights",
        "fastuper / smaller Transformers",
    ]
    note = "Peak memory of one run, less the weights, each in a fresh process, float32. " + source(
        results, list(results["memory"]), "memory"
    )
    return "\n".join([*table(head, rows), "", note])


def training_source(result: dict[str, Any]) -> str:
    """Return the machine, the versions and the date of bench.training's results."""
    return source({"machine": result["machine"], "runs": {result["run"]: result}, "tasks": {"": result}}, [""])


def training_table(_: Results | None) -> str:
    """Return the time and peak memory of a training step beside Transformers', and the targets."""
    result = load_training()
    if result is None:
        return "Not measured yet: `python -m bench.training`."
    rows = []
    for name, row in {**result["backbones"], LOSS: result["loss"]}.items():
        medians = {peer: median(found["rounds"]) for peer, found in row["peers"].items()}
        peaks = {peer: found["peak"] for peer, found in row["peers"].items()}
        theirs, least = min(medians[peer] for peer in EAGER), min(peaks[peer] for peer in EAGER)
        gradients = row["gradients"]
        rows.append(
            [
                TINY.get(name, "the loss alone"),
                duration(theirs),
                f"**{duration(medians[FASTUPER])}**",
                f"{row['faster']:.2f} x",
                f"{least / 1e9:.2f} GB",
                f"{peaks[FASTUPER] / 1e9:.2f} GB",
                f"{row['memory']:.2f}",
                f"{gradients['median_ratio']:.2f}, {gradients['largest_ratio']:.2f}",
            ]
        )
    size = next(iter(result["backbones"].values()))["gradients"]["size"]
    head = [
        "",
        "time, Transformers",
        "time, fastuper",
        "faster",
        "peak memory, Transformers",
        "peak memory, fastuper",
        "memory ratio",
        "gradient errors: median, largest",
    ]
    targets = ", ".join(f"{target['name']} {target['bound']:g} ({verdict(target)})" for target in result["targets"])
    note = (
        f"A step is forward, backward and AdamW on {result['batch']} images of {result['size']} x {result['size']}, "
        "float32, 150 classes. Times are medians of rounds in which all take turns; peak memory is measured in fresh "
        "processes, less the weights. Transformers runs in the better of its two memory layouts. The last column "
        "divides fastuper's error against float64 by Transformers' in its worse layout: the median over the parameters "
        f"and the largest, geometric means over {result['loss']['gradients']['seeds']} draws of {size} x {size} (the "
        f"loss alone: {result['size']} x {result['size']}). The loss alone starts at logits of stride 4 and ends at "
        "their gradient; Transformers resamples the logits first. "
        + training_source(result)
        + f" Targets: {targets}."
        + " `python -m bench.training` repeats the measurement."
    )
    caption = "Seconds and peak memory of a training step"
    return "\n".join([*table(head, rows), "", note, "", f"![{caption}](training.svg)"])


def parsing_table(_: Results | None) -> str:
    """Return the time and peak memory of Unified Perceptual Parsing beside the textbook's, and the targets."""
    return parsing_table_of(load_parsing())


def parsing_table_of(result: dict[str, Any] | None) -> str:
    """Return the table of bench.parsing's results."""
    if result is None:
        return "Not measured yet: `python -m bench.parsing`."
    rows = []
    for name, row in result["backbones"].items():
        medians = {peer: median(found["rounds"]) for peer, found in row["peers"].items()}
        peaks = {peer: found["peak"] for peer, found in row["peers"].items() if "peak" in found}
        rows.append(
            [
                PARSING[name],
                duration(min(medians[peer] for peer in TEXTBOOK)),
                f"**{duration(medians[FASTUPER])}**",
                f"{row['faster']:.2f} x",
                f"{duration(medians[OBJECTS])} ({row['over_objects']:.2f} x)",
                f"{duration(medians[SEGMENTATION])} ({row['over_segmentation']:.2f} x)",
                f"{min(peaks[peer] for peer in TEXTBOOK) / 1e9:.2f} GB",
                f"{peaks[FASTUPER] / 1e9:.2f} GB",
                f"{row['memory']:.2f}",
            ]
        )
    head = [
        "",
        "time, textbook",
        "time, fastuper",
        "faster",
        "time of objects alone (five tasks take)",
        "time of `segment` (five tasks take)",
        "peak memory, textbook",
        "peak memory, fastuper",
        "memory ratio",
    ]
    (height, width), (tall, wide) = result["size"], result["memory_size"]
    differ = "; ".join(
        f"{PARSING[name]}: "
        + ", ".join(f"{task} {count:,}" for task, count in row["differ"].items())
        + f" of {row['pixels']:,}, with {row['objects']} objects in the image"
        for name, row in result["backbones"].items()
    )
    targets = ", ".join(f"{target['name']} {target['bound']:g} ({verdict(target)})" for target in result["targets"])
    note = (
        "`parse` finds the scene, objects, parts, materials and textures of one image, "
        f"{height} x {width}, float32, with the official classes and random weights. The textbook is the same network "
        "in PyTorch's modules, in the better of two memory layouts, with probabilities of full size "
        "(`bench/textbook.py`). `segment` is `UperNetForSemanticSegmentation`'s, over the same backbone, with "
        "150 classes. Times are medians of rounds in which all take turns. Peak memory is that of one run on an image "
        f"of {tall} x {wide}, less the weights, in fresh processes. All labels are the textbook's, or tied with them "
        f"within rounding; pixels that differ: {differ}. "
        + training_source(result)
        + f" Targets: {targets}."
        + " `python -m bench.parsing` repeats the measurement."
    )
    return "\n".join([*table(head, rows), "", note])


def acceleration_table(_: Results | None) -> str:
    """Return the times of other libraries' models before and after `fastuper.accelerate`, and the targets."""
    return acceleration_table_of(load_acceleration())


def acceleration_table_of(result: dict[str, Any] | None) -> str:
    """Return the table of bench.accelerate's results."""
    if result is None:
        return "Not measured yet: `python -m bench.accelerate`."
    targets = {target["name"]: target for target in result["targets"]}
    rows, skipped = [], []
    for key, row in result["rows"].items():
        known = ACCELERATIONS[key]
        title = f"{known.title}, {known.size} x {known.size}"
        if "skipped" in row:
            skipped.append(f" {title}: {row['skipped']}.")
            continue
        medians = {peer: median(found["rounds"]) for peer, found in row["peers"].items()}
        errors = {peer: found["error"] for peer, found in row["peers"].items()}
        target = targets.get(known.title)
        rows.append(
            [
                title,
                duration(min(medians[peer] for peer in BEFORE)),
                f"**{duration(medians[ACCELERATED])}**",
                f"{row['faster']:.2f} x",
                "-" if target is None else f"{target['bound']:g} x, {verdict(target)}",
                scientific(max(errors[peer] for peer in BEFORE)),
                scientific(errors[ACCELERATED]) + ("" if row["accurate"] else " (**above the rule**)"),
            ]
        )
    head = ["", "before", "accelerated", "faster", "target", "error before", "error accelerated"]
    note = (
        "Seconds for the logits of one image, float32, 150 classes, random weights. The model as it is runs in the "
        "better of two memory layouts; the accelerated one is a copy of it. Times are medians of rounds in which all "
        "take turns. Errors are relative to float64. "
        + training_source(result)
        + "".join(skipped)
        + " `python -m bench.accelerate` repeats the measurement."
    )
    return "\n".join([*table(head, rows), "", note])


def targets_table(results: Results | None) -> str:
    """Return the targets, the measured values and the verdicts."""
    if results is None or all(target["value"] is None for target in results["targets"]):
        return NOT_MEASURED
    rows = []
    for target in results["targets"]:
        bound = f"at least {target['bound']:g} x" if target["kind"] == "speedup" else f"at most {target['bound']:g}"
        value = "" if target["value"] is None else f"{target['value']:.2f}"
        if target["kind"] == "accuracy" and target["value"] is not None:
            value = f"{int(target['value'])} of {len(rules(results))}"
        verdict_ = verdict(target)
        rows.append([target["name"], bound, value, verdict_ if target["met"] else f"**{verdict_}**"])
    return "\n".join(table(["", "target", "measured", "verdict"], rows))


def limits_table(results: Results | None) -> str:
    """Return fastuper's time beside the time of its operations at the rate of one convolution."""
    if results is None or not results["limits"]:
        return NOT_MEASURED
    rows = []
    for entry in results["limits"]:
        task = results["tasks"][entry["task"]]
        rows.append(
            [
                f"{task['part']}, {TITLES[task['backbone']]}, {task['dtype']}",
                f"{entry['flop'] / 1e9:.0f} GFLOP",
                f"{entry['rate'] / 1e9:.0f} GFLOP/s",
                duration(entry["limit"]),
                duration(entry["seconds"]),
                f"{entry['share']:.0%}",
            ]
        )
    return "\n".join(
        table(["512 x 512", "operations", "rate of one convolution", "limit", "fastuper", "share of the rate"], rows)
    )


def operations_table(results: Results | None) -> str:
    """Return the time and error of each operation beside its reference's."""
    entries = {} if results is None else {n: t for n, t in results["tasks"].items() if t["section"] == "operations"}
    if results is None or not entries:
        return NOT_MEASURED
    rows = []
    for name, entry in entries.items():
        faster = min(REFERENCE, key=lambda peer: seconds(results, name, peer) or math.inf)
        theirs, ours = seconds(results, name, faster), seconds(results, name, FASTUPER)
        if theirs is None or ours is None:
            continue
        errors = [
            scientific(row["error"]) if "error" in row else f"{row.get('differ', 0):,} differ"
            for row in (entry["peers"][FASTUPER], entry["peers"][faster])
        ]
        title = f"`{entry['part']}`, {entry['use']}, {entry['dtype']}"
        rows.append([title, duration(theirs), duration(ours), f"{theirs / ours:.2f} x", *errors])
    head = ["", "reference, faster layout", FASTUPER, "faster", "error, fastuper", "error, reference"]
    return "\n".join([*table(head, rows), "", source(results, list(entries))])


def waterfall_table(results: Results | None) -> str:
    """Return the gain of each technique: time and error of each step from Transformers to fastuper."""
    names = [f"waterfall {key} 512 float32" for key in TINY]
    if results is None or not any(name in results["tasks"] for name in names):
        return NOT_MEASURED
    names = [name for name in names if name in results["tasks"]]
    head = ["step, together with the steps above it"]
    for name in names:
        head += [TITLES[results["tasks"][name]["backbone"]], "gain", "error"]
    steps = list(results["tasks"][names[0]]["peers"])
    before: dict[str, float] = {}
    rows = []
    for step in steps:
        cells = [STEPS.get(step, step)]
        for name in names:
            row = results["tasks"][name]["peers"].get(step, {})
            if "rounds" not in row:
                cells += ["", "", ""]
                continue
            time = median(row["rounds"])
            cells += [duration(time), f"{before[name] / time:.2f} x" if name in before else ""]
            cells.append(scientific(row["error"]) if "error" in row else "")
            before[name] = time
        rows.append(cells)
    return "\n".join([*table(head, rows), "", source(results, names)])


def accuracy_of_timed_table(results: Results | None) -> str:
    """Return the error against float64 of each timed output, beside the largest error that the rule allows."""
    if results is None:
        return NOT_MEASURED
    rows = []
    for name, entry in results["tasks"].items():
        rule = accuracy(entry)
        if rule is None or entry["section"] == "operations":
            continue
        if "error" in rule:
            cells = [scientific(rule["error"]), scientific(rule["allowed"])]
        else:
            cells = [f"{rule['differ_beyond_rounding']:,} of {rule['pixels']:,} labels", "0"]
        rows.append([name, *cells, "holds" if rule["met"] else "**broken**"])
    return "\n".join(table(["task", FASTUPER, "allowed", "the rule"], rows)) if rows else NOT_MEASURED


def failures_list(results: Results | None) -> str:
    """Return the tasks that peers failed at, with their errors."""
    if results is None:
        return NOT_MEASURED
    found: dict[str, list[str]] = {}
    for name, entry in results["tasks"].items():
        for peer, row in entry["peers"].items():
            if row.get("skipped") not in (None, "not asked for"):
                found.setdefault(f"{peer}: {row['skipped']}", []).append(name)
    # Backticks keep Markdown in an error's text from taking effect.
    return "\n".join(f"- {', '.join(names)}: `{why.replace('`', '')}`" for why, names in found.items()) or "None."


def plot_block(name: str, folder: str, results: Results | None) -> str:
    """Return a picture that bench.plots draws from these results; `folder` is its path from the page, "" or "docs/"."""
    (plot,) = [plot for plot in PLOTS if plot.name == name]
    if results is None or not plot.drawable(results):
        return NOT_MEASURED
    return f"![{plot.caption}]({folder}{plot.name}.svg)"


def ratio(value: float) -> str:
    """Write how many times as fast something is: 2.8x."""
    return f"{value:.1f}x"


TWO = ("torch", "transformers")  # the libraries that README's own tables compare


def headline(results: Results | None) -> str:
    """Return README's first sentence: the gain over Transformers, and its conditions."""
    task = "logits convnext-t 512 float32"
    theirs, ours = (None, None) if results is None else (best(results, task, EAGER), seconds(results, task, FASTUPER))
    if results is None or theirs is None or ours is None:
        return NOT_MEASURED
    return (
        f"UPerNet for semantic segmentation in PyTorch and Triton: **{ratio(theirs / ours)} faster on a CPU with "
        "ConvNeXt-T, same checkpoints, same outputs: change one import.**\n\n"
        f"({duration(ours)} instead of {duration(theirs)} for the logits of one 512 x 512 image in float32, beside "
        f"Hugging Face Transformers in its faster memory layout. {source(results, [task], libraries=TWO)})"
    )


def numbers_table(results: Results | None) -> str:
    """Return README's three numbers: logits, a large label map and a training step, each with its link."""
    training = load_training()
    if results is None or training is None:
        return NOT_MEASURED
    rows, names = [], []
    logits = "logits convnext-t 512 float32"
    theirs, ours = best(results, logits, EAGER), seconds(results, logits, FASTUPER)
    if theirs is not None and ours is not None:
        link = f"[{ratio(theirs / ours)} faster](docs/benchmarks.md#time)"
        rows.append(["logits, 512 x 512", duration(theirs), f"**{duration(ours)}**", link])
        names.append(logits)
    labels = "labels convnext-t 2048 float32"
    theirs, ours = best(results, labels, EAGER), seconds(results, labels, FASTUPER)
    peaks = {peer: row.get("peak") for peer, row in results["memory"].get(labels, {}).get("peers", {}).items()}
    peak = min((found for name in MEMORY_PEERS[:-1] if (found := peaks.get(name))), default=None)
    ours_peak = peaks.get(FASTUPER)
    if theirs is not None and ours is not None and peak and ours_peak:
        link = f"[{ratio(theirs / ours)} faster, {ours_peak / peak:.2f} of the memory](docs/benchmarks.md#memory)"
        cells = [f"{duration(time)}, {size / 1e9:.1f} GB" for time, size in ((theirs, peak), (ours, ours_peak))]
        rows.append(["label map, 2048 x 2048", cells[0], f"**{cells[1]}**", link])
        names.append(labels)
    step = training["backbones"].get("convnext-t")
    if step is not None:
        medians = {peer: median(found["rounds"]) for peer, found in step["peers"].items()}
        peaks = {peer: found["peak"] for peer, found in step["peers"].items()}
        fastest, least = min(medians[peer] for peer in EAGER), min(peaks[peer] for peer in EAGER)
        cells = [
            f"{duration(time)}, {size / 1e9:.1f} GB"
            for time, size in ((fastest, least), (medians[FASTUPER], peaks[FASTUPER]))
        ]
        link = f"[{ratio(step['faster'])} faster, {step['memory']:.2f} of the memory](docs/benchmarks.md#training)"
        title = f"training step, {training['batch']} images of {training['size']} x {training['size']}"
        rows.append([title, cells[0], f"**{cells[1]}**", link])
    if not rows:
        return NOT_MEASURED
    note = (
        f"UPerNet-ConvNeXt-T, float32, 150 classes. GB are peak memory less the weights. Inference: "
        f"{source(results, names, libraries=TWO)} Training: {training_source(training)}"
    )
    return "\n".join([*table(["", "Transformers", FASTUPER, ""], rows), "", note])


# The checkpoints that Transformers' authors converted from mmsegmentation: backbone, training crop, pretraining, and
# mIoU on ADE20K's validation set (one scale, no flip) from mmsegmentation's configs/convnext and configs/swin README.
PUBLISHED = {
    "openmmlab/upernet-convnext-tiny": ("ConvNeXt-T", 512, "1K", 46.11),
    "openmmlab/upernet-convnext-small": ("ConvNeXt-S", 512, "1K", 48.56),
    "openmmlab/upernet-convnext-base": ("ConvNeXt-B", 512, "1K", 48.71),
    "openmmlab/upernet-convnext-large": ("ConvNeXt-L", 640, "21K", 53.16),
    "openmmlab/upernet-convnext-xlarge": ("ConvNeXt-XL", 640, "21K", 53.58),
    "openmmlab/upernet-swin-tiny": ("Swin-T", 512, "1K", 44.41),
    "openmmlab/upernet-swin-small": ("Swin-S", 512, "1K", 47.72),
    "openmmlab/upernet-swin-base": ("Swin-B, window 12", 512, "22K", 50.76),
    "openmmlab/upernet-swin-large": ("Swin-L, window 12", 512, "22K", 52.25),
}
ZOO = "https://github.com/open-mmlab/mmsegmentation/tree/main/configs"


def models_table(results: Results | None) -> str:
    """Return the published checkpoints: backbone, mIoU as published, time and memory as measured here."""
    keys = {title: key for key, title in TITLES.items()}
    rows, names = [], []
    for hub, (backbone, crop, pretraining, miou) in PUBLISHED.items():
        cells = [f"[{hub}](https://huggingface.co/{hub})", backbone, f"ImageNet-{pretraining}, {crop}", f"{miou:.2f}"]
        times, memory = "not measured", "not measured"
        if results is not None and backbone in keys:
            task = f"logits {keys[backbone]} 512 float32"
            theirs, ours = best(results, task, EAGER), seconds(results, task, FASTUPER)
            if theirs is not None and ours is not None:
                times = f"**{duration(ours)}** ({duration(theirs)})"
                names.append(task)
            peers = results["memory"].get(task, {}).get("peers", {})
            if all("peak" in peers.get(peer, {}) for peer in (EAGER[0], FASTUPER)):
                memory = f"{peers[FASTUPER]['peak'] / 1e9:.2f} GB ({peers[EAGER[0]]['peak'] / 1e9:.2f} GB)"
        rows.append([*cells, times, memory])
    head = ["checkpoint", "backbone", "pretraining, crop", "mIoU", "time (Transformers)", "peak memory (Transformers)"]
    note = (
        f"mIoU: ADE20K validation, one scale, as published by mmsegmentation ([ConvNeXt]({ZOO}/convnext), "
        f"[Swin]({ZOO}/swin)), not measured again here. Time and peak memory less the weights: logits of a 512 x 512 "
        "image, float32, random weights of the same shapes."
    )
    if results is not None and names:
        note += f" {source(results, names, libraries=TWO)}"
    return "\n".join([*table(head, rows), "", note])


MMSEG = f"[mmsegmentation]({ZOO}"
CSAIL = "[CSAIL](https://github.com/CSAILVision/semantic-segmentation-pytorch)"
# mIoU on ADE20K's validation set, one scale, as published: the value, the crop, what it was trained on before, source.
MIOU = {
    **{
        hub.removeprefix("openmmlab/upernet-"): (
            f"{miou:.2f}",
            crop,
            f"ImageNet-{pretraining}",
            f"{MMSEG}/{hub.split('-')[1]})",
        )
        for hub, (_, crop, pretraining, miou) in PUBLISHED.items()
        if not hub.endswith("-xlarge")  # no preset
    },
    "resnet-50-deep-stem": ("40.44", None, "ImageNet-1K", CSAIL),
    "resnet-101-deep-stem": ("41.98", None, "ImageNet-1K", CSAIL),
    "vit-base-16": ("47.73", 512, "ImageNet-21K, ImageNet-1K", f"{MMSEG}/vit)"),
    "deit-small-16": ("43.82", 512, "ImageNet-1K", f"{MMSEG}/vit)"),
    "deit-base-16": ("45.46", 512, "ImageNet-1K", f"{MMSEG}/vit)"),
    "beit-base-16": ("53.08", 640, "BEiT, ImageNet-22K", f"{MMSEG}/beit)"),
    "beit-large-16": ("56.33", 640, "BEiT, ImageNet-22K", f"{MMSEG}/beit)"),
    "mae-base-16": ("48.13", 512, "MAE, ImageNet-1K", f"{MMSEG}/mae)"),
}


def backbones_table(_: Results | None) -> str:
    """Return the table of docs/backbones.md: each backbone's size, published mIoU, time, memory and tests."""
    return backbones_table_of(load_backbones())


def backbones_table_of(result: dict[str, Any] | None) -> str:
    """Return the table of bench.backbones' results."""
    if result is None:
        return "Not measured yet: `python -m bench.backbones`."
    rows, failed = [], []
    for name, row in result["rows"].items():
        if "skipped" in row:
            failed.append(f"- `{name}`: `{row['skipped'].replace('`', '')}`")
            continue
        miou = "-"
        if name in MIOU:
            value, crop, data, where = MIOU[name]
            miou = f"{value} ({data}{'' if crop is None else f', {crop}'}; {where})"
        library, foreign, _ = name.partition("/")
        steps = TESTED.get(library if foreign else row["family"], {})
        rows.append(
            [
                f"`{name}`",
                f"{row['parameters'] / 1e6:.0f} M",
                miou,
                duration(median(row["rounds"])) if "rounds" in row else "not timed",
                f"{row['peak'] / 1e9:.2f} GB",
                ", ".join(steps),
            ]
        )
    head = ["backbone", "parameters", "published mIoU", "time", "peak memory", "what tests run"]
    size = result["size"]
    note = (
        f"Parameters of the whole UPerNet, {result['classes']} classes, with its auxiliary head. mIoU: ADE20K "
        "validation, one scale, as the source publishes it, with the pretraining and the crop; not measured again "
        f"here. Time and memory: logits of a {size} x {size} image, float32, random weights. Times are medians of "
        "forwards in turns; models of more than 200 M parameters are run and not timed. Peak memory is that of the "
        "first forward, less the weights. The tests run each family at small widths. "
        + training_source(result)
        + " `python -m bench.backbones` repeats the measurement."
    )
    if failed:
        note += "\n\nBackbones that could not be built or run with these versions:\n\n" + "\n".join(failed)
    return "\n".join([*table(head, rows), "", note])


def exports_table(_: Results | None) -> str:
    """Return the times of exported models beside Transformers', and the targets."""
    return exports_table_of(load_exports())


def exports_table_of(result: dict[str, Any] | None) -> str:
    """Return the table of bench.exports' results."""
    if result is None:
        return "Not measured yet: `python -m bench.exports`."
    targets = {target["name"]: target for target in result["targets"]}
    lines, skipped = [], {}
    for known in EXPORTS:
        cells = [known.title]
        for key in result["rows"]:
            peers = result["rows"][key]["peers"]
            times = []
            for name in (known.before, known.after, known.int8):
                row = peers.get(name, {})
                if "skipped" in row:
                    skipped[f"{TINY[key]}, {name}"] = row["skipped"]
                times.append(duration(median(row["rounds"])) if "rounds" in row else "-")
            cells += [times[0], f"**{times[1]}**"]
            target = targets[f"{TINY[key]}, {known.title}"]
            value = "-" if target["value"] is None else f"{target['value']:.2f} x"
            judged = f"{value} ({target['bound']:g} x, {verdict(target)})"
            cells += [judged, _difference(peers.get(known.after, {})), times[2]]
        lines.append(cells)
    head = [""]
    for key in result["rows"]:
        head += [f"{TINY[key]}: Transformers", "fastuper", "faster (target)", "error", "int8"]
    size, (height, width) = (next(iter(result["rows"].values()))[name] for name in ("size", "target"))
    note = (
        f"Seconds for the logits of one {size} x {size} image, float32, 150 classes, random weights; label maps have "
        f"{height} x {width} pixels. Transformers' model has no auxiliary head. Models are exported for this size, and "
        "take turns; times are medians. Errors are fastuper's relative to float64; of label maps, the pixels that "
        "differ beyond rounding. int8: fastuper's time in 8-bit integers. "
        + training_source(result)
        + " `python -m bench.exports` repeats the measurement."
    )
    note += "".join(f" {name}: `{reason.replace('`', '')}`." for name, reason in skipped.items())
    return "\n".join([*table(head, lines), "", note, "", "![Seconds of exported models](exports.svg)"])


def _difference(row: dict[str, Any]) -> str:
    """Return the error of logits, or the number of labels that differ beyond rounding; "-" if nothing was compared."""
    if "differ_beyond_rounding" in row:
        return f"{row['differ_beyond_rounding']:,} of {row['pixels']:,} labels"
    return scientific(row["error"]) if "error" in row else "-"


Draw = Callable[["Results | None"], str]
SIZES = {
    f"{title}, {size} x {size}": f"logits {key} {size} float32"
    for key, title in TINY.items()
    for size in (512, 1024, 2048)
}
PAGES: dict[Path, dict[str, Draw]] = {
    README: {
        "headline": headline,
        "peers": partial(plot_block, "bench-peers", "docs/"),
        "numbers": numbers_table,
        "models": models_table,
        "waterfall": partial(plot_block, "bench-waterfall", "docs/"),
        "exact": exact_lines,
    },
    ACCURACY: {"accuracy": accuracy_table},
    BACKBONES: {"backbones": backbones_table},
    EXPORT: {"exports": exports_table},
    BENCHMARKS: {
        "targets": targets_table,
        "limits": limits_table,
        "peers": partial(plot_block, "bench-peers", ""),
        "speed": speed_table,
        "larger": larger_table,
        "bfloat16": partial(times_table, tiny("logits", dtype="bfloat16"), BFLOAT16_ROWS),
        "parts": partial(times_table, {**tiny("head"), **tiny("backbone")}, SPEED_ROWS),
        "sizes": partial(times_table, SIZES, SPEED_ROWS),
        "sizes-plot": partial(plot_block, "bench-sizes", ""),
        "memory": memory_table,
        "training": training_table,
        "parsing": parsing_table,
        "accelerate": acceleration_table,
        "waterfall-plot": partial(plot_block, "bench-waterfall", ""),
        "waterfall": waterfall_table,
        "operations": operations_table,
        "accuracy-of-timed": accuracy_of_timed_table,
        "failures": failures_list,
    },
}
NEWEST: Any = object()


def with_tables(text: str, page: Path = README, results: Results | None = NEWEST) -> str:
    """Return a page's text in which each `<!-- table: NAME -->` block is drawn from the results.

    Raises:
        ValueError: the page lacks a block, or has it twice.
    """
    if results is NEWEST:
        results = load()
    for name, draw in PAGES[page].items():
        block = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = block.subn(lambda match, draw=draw: f"{match[1]}{draw(results)}\n{match[2]}", text)
        if count != 1:
            raise ValueError(f"{page.name} must have one block `<!-- table: {name} -->`, it has {count}")
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text(), page))

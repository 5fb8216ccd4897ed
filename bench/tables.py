"""The tables of README and docs/, from the committed results alone: `python -m bench.tables` rewrites them in place."""

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
    AUTOCAST,
    COMPILED,
    EAGER,
    FASTUPER,
    FROZEN,
    ONNX,
    OPENVINO,
    OURS_COMPILED,
    REFERENCE,
    SMP,
    TUNED,
    WITHOUT_AUXILIARY,
)
from bench.results import (
    FOLDER,
    LOSS,
    TINY,
    TITLES,
    Results,
    accuracy,
    best,
    load,
    load_training,
    rules,
    seconds,
    verdict,
)

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
NOT_MEASURED = "Not measured yet: `make bench`."
MEMORY_PEERS = (EAGER[0], WITHOUT_AUXILIARY[0], FASTUPER)


def scientific(value: float) -> str:
    """Return 0.00000123 as 1.2e-6, and 0 as 0."""
    return f"{value:.1e}".replace("e-0", "e-") if value else "0"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cells) + " |" if cells[0] != "---" else "|" + "---|" * len(head) for cells in lines]


def accuracy_table(results: Results | None) -> str:
    """Return the table of errors against float64."""
    result = json.loads((FOLDER / "accuracy.json").read_text())
    head = [
        "UPerNet with",
        "float64: ours from Transformers'",
        "float32: ours, Transformers'",
        "bfloat16: ours, Transformers'",
        "labels that differ, float32",
    ]
    rows = []
    for row in result["rows"]:
        cells = [row["backbone"], scientific(row["float64"])]
        for dtype in ("float32", "bfloat16"):
            errors = dict(row[dtype]["errors"])
            cells.append(f"{scientific(errors.pop('fastuper'))}, {scientific(max(errors.values()))}")
        labels = row["float32"]["labels"]
        cells.append(f"{labels['differ']:,} of {labels['pixels']:,}")
        rows.append(cells)
    versions = result["versions"]
    note = (
        f"Relative errors of the logits against float64, root mean square over {result['seeds']} draws of weights and "
        f"of {result['size']} x {result['size']} images, 150 classes; Transformers' in the worse of its two memory "
        f"layouts ([the rule](docs/accuracy.md)). Transformers {versions['transformers']}, PyTorch "
        f"{versions['torch']}, "
        f"{result['machine']}, {result['date']}; `make accuracy` repeats it."
    )
    return "\n".join([*table(head, rows), "", note])


def duration(value: float) -> str:
    """Return seconds with three digits."""
    return f"{value * 1e3:.3g} ms" if value < 0.1 else f"{value:.3g} s" if value < 100 else f"{value:.0f} s"


def cell(results: Results, task: str, peers: Sequence[str]) -> str:
    """Return the median of the fastest of some peers, and how many times ours that is."""
    time, ours = best(results, task, peers), seconds(results, task, FASTUPER)
    if time is None:
        rows = [results["tasks"].get(task, {}).get("peers", {}).get(peer, {}) for peer in peers]
        return "fails" if any(row.get("skipped") not in (None, "not asked for") for row in rows) else ""
    if tuple(peers) == (FASTUPER,):
        return f"**{duration(time)}**"
    return f"{duration(time)} ({time / ours:.2f} x)" if ours else duration(time)


def compared(results: Results, columns: dict[str, str], rows: dict[str, Sequence[str]]) -> list[str]:
    """Return a table of times: tasks in columns, peers in rows; rows and columns without any time are left out."""
    columns = {title: task for title, task in columns.items() if task in results["tasks"]}
    cells = {title: [cell(results, task, peers) for task in columns.values()] for title, peers in rows.items()}
    return table(["", *columns], [[title, *row] for title, row in cells.items() if any(row)])


def source(results: Results, names: Sequence[str], kind: str = "tasks") -> str:
    """Return where some tasks come from: machine, versions, dates."""
    machine = results["machine"]
    ids = sorted({results[kind][name]["run"] for name in names if name in results[kind]})
    versions = {package: version for key in ids for package, version in results["runs"][key]["versions"].items()}
    labels = {
        "torch": "PyTorch",
        "transformers": "Transformers",
        "segmentation_models_pytorch": "segmentation_models_pytorch",
        "onnxruntime": "ONNX Runtime",
        "openvino": "OpenVINO",
    }
    listed = ", ".join(
        f"{label} {versions[package]}" for package, label in labels.items() if versions.get(package, ABSENT) != ABSENT
    )
    dates = ", ".join(sorted({key[:10] for key in ids}))
    return f"{machine['cpu']} ({machine['instructions']}), {machine['threads']} threads; {listed}; {dates}."


SPEED_ROWS: dict[str, Sequence[str]] = {
    FASTUPER: [FASTUPER],
    "fastuper, `torch.compile`": [OURS_COMPILED],
    "Transformers": EAGER,
    "Transformers, auxiliary head taken off": WITHOUT_AUXILIARY,
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
    """Return the columns of a part with both Tiny backbones."""
    return {f"{title or part}, {name}": f"{part} {key} {size} {dtype}" for key, name in TINY.items()}


def speed_table(results: Results | None) -> str:
    """Return full logits and photo to labels against the peers."""
    columns = {**tiny("logits"), **tiny("labels", title="photo to labels")}
    if results is None or not any(task in results["tasks"] for task in columns.values()):
        return NOT_MEASURED
    note = (
        "Seconds for one image of 512 x 512, float32, and how many times ours that is: medians of rounds in which all "
        "take turns, each library in its faster memory layout. Photo to labels: to a label map of 683 x 1024. "
        + source(results, list(columns.values()))
        + " `make bench` repeats it; [how it is measured](docs/benchmarks.md)."
    )
    return "\n".join([*compared(results, columns, SPEED_ROWS), "", note])


def times_table(columns: dict[str, str], rows: dict[str, Sequence[str]], results: Results | None) -> str:
    """Return a table of times with its source."""
    if results is None or not any(task in results["tasks"] for task in columns.values()):
        return NOT_MEASURED
    return "\n".join([*compared(results, columns, rows), "", source(results, list(columns.values()))])


def larger_table(results: Results | None) -> str:
    """Return Tiny, Base and Large beside each other: the share of the backbone grows, the gain shrinks."""
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
    head = ["", "GFLOP as everyone writes it", "GFLOP as we do", "Transformers", "fastuper", "faster"]
    return "\n".join([*table(head, rows), "", source(results, names)])


def memory_table(results: Results | None) -> str:
    """Return the peak memory over the weights."""
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
    head = ["", "Transformers", "auxiliary head taken off", FASTUPER, "of it packed weights", "of Transformers' least"]
    note = "Peak memory of one run over the weights, each in a fresh process, float32. " + source(
        results, list(results["memory"]), "memory"
    )
    return "\n".join([*table(head, rows), "", note])


def training_table(_: Results | None) -> str:
    """Return a training step's time and peak memory beside Transformers', and what was to be reached."""
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
    head = ["", "Transformers", FASTUPER, "faster", "peak memory, Transformers", FASTUPER, "of it", "gradients' errors"]
    reached = ", ".join(f"{target['name']} {target['bound']:g} ({verdict(target)})" for target in result["targets"])
    note = (
        f"A step (forward, backward, AdamW) on {result['batch']} images of {result['size']} x {result['size']}, "
        "float32, 150 classes: medians of rounds in which all take turns, and peak memory over the weights in fresh "
        "processes; Transformers in the better of its two memory layouts. Gradients' errors: ours from float64 over "
        "Transformers' in the worse of them, the median over the parameters and the largest; geometric means over "
        f"{result['loss']['gradients']['seeds']} draws of {size} x {size}, of the loss alone {result['size']} x "
        f"{result['size']}. That goes from logits at stride 4 to their gradient; Transformers resamples them first. "
        + source({"machine": result["machine"], "runs": {result["run"]: result}, "tasks": {"": result}}, [""])
        + f" To reach: {reached}."
        + " `python -m bench.training` repeats it."
    )
    caption = "Seconds and peak memory of a step of training"
    return "\n".join([*table(head, rows), "", note, "", f"![{caption}](docs/training.svg)"])


def targets_table(results: Results | None) -> str:
    """Return what was to be reached, and whether it is."""
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
    return "\n".join(table(["", "to reach", "measured", ""], rows))


def limits_table(results: Results | None) -> str:
    """Return how far ours is from what the operations take at the rate of one convolution."""
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
    return "\n".join(table(["512 x 512", "operations", "one convolution", "limit", "ours", "of the rate"], rows))


def operations_table(results: Results | None) -> str:
    """Return each operation against its reference."""
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
    head = ["", "reference, in the faster layout", FASTUPER, "faster", "our error", "the reference's"]
    return "\n".join([*table(head, rows), "", source(results, list(entries))])


def waterfall_table(results: Results | None) -> str:
    """Return which idea brought what: time and error of each step from Transformers to ours."""
    names = [f"waterfall {key} 512 float32" for key in TINY]
    if results is None or not any(name in results["tasks"] for name in names):
        return NOT_MEASURED
    names = [name for name in names if name in results["tasks"]]
    head = ["each step with those above it"]
    for name in names:
        head += [TITLES[results["tasks"][name]["backbone"]], "brings", "error"]
    steps = list(results["tasks"][names[0]]["peers"])
    before: dict[str, float] = {}
    rows = []
    for step in steps:
        cells = [step]
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
    """Return the distance from float64 of what was timed."""
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
    return "\n".join(table(["", "ours", "allowed", "the rule"], rows)) if rows else NOT_MEASURED


def failures_list(results: Results | None) -> str:
    """Return what peers could not do, and why."""
    if results is None:
        return NOT_MEASURED
    found: dict[str, list[str]] = {}
    for name, entry in results["tasks"].items():
        for peer, row in entry["peers"].items():
            if row.get("skipped") not in (None, "not asked for"):
                found.setdefault(f"{peer}: {row['skipped']}", []).append(name)
    # Errors may hold anything: in backticks it stays text.
    return "\n".join(f"- {', '.join(names)}: `{why.replace('`', '')}`" for why, names in found.items()) or "None."


def plots_block(results: Results | None) -> str:
    """Return the pictures that bench.plots has drawn from these results."""
    from bench.plots import PLOTS

    if results is None:
        return NOT_MEASURED
    drawn = [plot for plot in PLOTS if plot.drawable(results)]
    return "\n\n".join(f"![{plot.caption}](docs/{plot.name}.svg)" for plot in drawn) or NOT_MEASURED


Draw = Callable[["Results | None"], str]
SIZES = {
    f"{title}, {size} x {size}": f"logits {key} {size} float32"
    for key, title in TINY.items()
    for size in (512, 1024, 2048)
}
PAGES: dict[Path, dict[str, Draw]] = {
    README: {
        "accuracy": accuracy_table,
        "speed": speed_table,
        "plots": plots_block,
        "memory": memory_table,
        "larger": larger_table,
        "training": training_table,
    },
    BENCHMARKS: {
        "targets": targets_table,
        "limits": limits_table,
        "bfloat16": partial(times_table, tiny("logits", dtype="bfloat16"), BFLOAT16_ROWS),
        "parts": partial(times_table, {**tiny("head"), **tiny("backbone")}, SPEED_ROWS),
        "sizes": partial(times_table, SIZES, SPEED_ROWS),
        "waterfall": waterfall_table,
        "operations": operations_table,
        "accuracy-of-timed": accuracy_of_timed_table,
        "failures": failures_list,
    },
}
NEWEST: Any = object()


def with_tables(text: str, page: Path = README, results: Results | None = NEWEST) -> str:
    """Return a page's text with each of its `<!-- table: NAME -->` blocks filled anew."""
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

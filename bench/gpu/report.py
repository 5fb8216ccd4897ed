"""Writes the GPU check's results: a line of progress, the Markdown tables, the plot and the targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.names import COMPILED, FASTUPER, PYTORCH
from bench.results import Target, verdict

KINDS = ("models", "training", "operations")  # of timings
# The targets of a training step on an H200: compiled Transformers' time over fastuper's, and fastuper's peak over
# Transformers'.
TARGETS = (Target("its time over ours", "speedup", 1.7), Target("our peak memory over its", "memory", 0.5))


def line(row: dict[str, Any]) -> str:
    """Return a row as a line of progress."""
    peers = ", ".join(
        f"{name} {1e6 * peer['median']:.1f} us" if "median" in peer else f"{name} {peer.get('failed', 'failed')}"
        for name, peer in row["peers"].items()
    )
    floor, apart = f"floor {1e6 * row['floor']:.1f} us", f"apart {row.get('difference', float('nan')):.1e}"
    return f"{row['name']}, batch {row['batch']}, {row['size']}: {floor}, {apart}; {peers}"


def timed(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of all timings."""
    return [row for kind in KINDS for row in results.get(kind, [])]


def targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the targets of a training step, each met or missed; "value" and "met" are None if a peer failed."""
    peers: dict[str, Any] = next((row["peers"] for row in results.get("training", [])), {})
    ours, theirs = (peers.get(name, {}) for name in (FASTUPER, COMPILED))
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
        "| bfloat16 | batch | size | floor, us | fastuper, us | share of the floor | peers' times over fastuper's "
        "| fastuper's memory over the peers' |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in timed(results):
        ours = row["peers"].get(FASTUPER, {})
        cells = [row["name"], row["batch"], row["size"], f"{1e6 * row['floor']:.1f}"]
        if "median" not in ours:
            cells += [f"failed: {ours.get('failed', '')}", "", "", ""]
        else:
            others = {name: peer for name, peer in row["peers"].items() if name != FASTUPER}
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
    lines += ["", "| a training step beside Transformers, compiled | target on an H200 | measured | |"]
    lines += ["|---|---|---|---|"]
    for target in results.get("targets", []):
        bound = f"at {'least' if target['kind'] == 'speedup' else 'most'} {target['bound']:g}"
        value = "" if target["value"] is None else f"{target['value']:.2f}"
        lines.append(f"| {target['name']} | {bound} | {value} | {verdict(target)} |")
    lines += ["", "| distance from float64 | | fastuper | PyTorch |", "|---|---|---|---|"]
    for row in results.get("accuracy", []):
        if "failed" in row:
            lines.append(f"| {row['name']} | {row['dtype']} | {row['failed']} | |")
            continue
        errors = row["errors"]
        lines.append(f"| {row['name']} | {row['dtype']} | {errors[FASTUPER]:.2e} | {errors[PYTORCH[0]]:.2e} |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw each peer's share of the floor, a group of bars for each row."""
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

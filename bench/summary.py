"""Results as tables for a terminal: times, ratios, errors, peak memory, limits and targets."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from rich.table import Table

from bench.names import FASTUPER
from bench.results import Results, seconds, verdict
from bench.terminal import table, text
from bench.timing import quantile


def times(results: Results) -> Iterator[Table]:
    """Yield a table for each task: the median and the quantiles of each peer's rounds, and its error."""
    for name, entry in results["tasks"].items():
        ours, rows = seconds(results, name, FASTUPER), []
        for peer, row in entry["peers"].items():
            if "skipped" in row:
                rows.append([f"{peer}: {row['skipped'][:70]}"])
                continue
            time = median(row["rounds"])
            low, high = (quantile(row["rounds"], share) for share in (0.2, 0.8))
            error = f"{row['error']:.1e}" if "error" in row else ""
            if "differ_beyond_rounding" in row:
                error = f"{row['differ_beyond_rounding']} labels wrong"
            ratio = f"{time / ours:.2f}" if ours else ""
            rows.append([peer, f"{time:.4f}", f"{low:.4f} to {high:.4f}", ratio, error])
        yield table(name, ("peer", "seconds", "20 to 80 %", "x fastuper", "error"), rows)


def peaks(results: Results) -> Table:
    """Return the peak memory of each task and peer."""
    rows = [
        [name, peer, row.get("skipped") or f"{row['peak'] / 1e9:.3f}"]
        for name, entry in results["memory"].items()
        for peer, row in entry["peers"].items()
    ]
    return table("peak memory over the weights", ("task", "peer", "GB"), rows)


def limits(results: Results) -> Table:
    """Return each task's least time at the rate of one convolution, beside fastuper's."""
    rows = [
        [
            entry["task"],
            f"{entry['flop'] / 1e9:.0f}",
            f"{entry['rate'] / 1e9:.0f}",
            f"{entry['limit']:.3f}",
            f"{entry['seconds']:.3f}",
            f"{entry['share']:.0%}",
        ]
        for entry in results["limits"]
    ]
    columns = ("task", "GFLOP", "GFLOP/s of one convolution", "limit, s", "fastuper, s", "share of the rate")
    return table("limits", columns, rows)


def targets(results: Results) -> Table:
    """Return the measured targets."""
    rows = [
        [
            target["name"],
            f"{target['value']:.2f}",
            f"{'>=' if target['kind'] == 'speedup' else '<='} {target['bound']}",
            verdict(target),
        ]
        for target in results["targets"]
        if target["value"] is not None
    ]
    return table("targets", ("target", "value", "bound", "verdict"), rows)


def summary(results: Results) -> str:
    """Return all tables as text."""
    return text([*times(results), peaks(results), limits(results), targets(results)])

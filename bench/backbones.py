"""Times a UPerNet over each backbone: `python -m bench.backbones` writes bench/results/backbones.json.

Each backbone has a process of its own, which builds the model with random weights and measures the peak memory of its
first forward (see bench.memory). Then the processes of a group of backbones take turns. The largest models are built
and run once; they are not timed. docs/backbones.md shows the results.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.machine import commit, machine, now, versions
from bench.results import BACKBONE_RESULTS, FOREIGN_BACKBONES
from bench.timing import rounded, turns
from bench.workers import CLASSES, Worker
from fastuper.recipes import BACKBONES

SIZE = 512
LARGEST = 200e6  # parameters of the largest model that is timed
GROUP = 400e6  # parameters of the models that take turns


def groups(names: list[str], size: int) -> Iterator[list[Worker]]:
    """Yield workers whose models fit into memory together, in the order of the names."""
    group: list[Worker] = []
    for name in names:
        worker = Worker(name, size)
        count = worker.facts.get("parameters", 0)
        if group and sum(other.facts.get("parameters", 0) for other in group) + count > GROUP:
            yield group
            group = []
        group.append(worker)
    if group:
        yield group


def measure(names: list[str], rounds: int, size: int) -> Iterator[dict[str, dict[str, Any]]]:
    """Yield the facts of backbones by name, a group at a time."""
    for group in groups(names, size):
        timed = {worker.name: worker for worker in group if worker.facts.get("parameters", LARGEST + 1) <= LARGEST}
        found: dict[str, list[float]] = {name: [] for name in timed}
        clocks: dict[str, Callable[[], float]] = {name: worker.seconds for name, worker in timed.items()}
        for name, seconds in turns(clocks, rounds):
            found[name].append(rounded(seconds))
        for worker in group:
            worker.stop()
        yield {
            worker.name: {**worker.facts, **({"rounds": found[worker.name]} if worker.name in found else {})}
            for worker in group
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of each backbone")
    parser.add_argument("--only", default="", help="backbones whose names contain one of these texts, separated by ,")
    parser.add_argument(
        "--quick", action="store_true", help="a round of small images, to see that all runs; the file stays as it is"
    )
    parser.add_argument("--output", type=Path, default=BACKBONE_RESULTS, help="the results file")
    arguments = parser.parse_args()
    names = [
        name for name in (*BACKBONES, *FOREIGN_BACKBONES) if any(part in name for part in arguments.only.split(","))
    ]
    size, rounds = (128, 1) if arguments.quick else (SIZE, arguments.rounds)
    result: dict[str, Any] = {
        "run": now(),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "size": size,
        "classes": CLASSES,
        "dtype": "float32",
        "rows": {},
    }
    if arguments.output.exists():  # rows of the same commit, machine and libraries stay
        before = json.loads(arguments.output.read_text())
        if all(before[key] == result[key] for key in ("commit", "machine", "versions", "size")):
            result["rows"] = before["rows"]
    begun = time.monotonic()
    for rows in measure(names, rounds, size):
        found = {**result["rows"], **rows}
        result["rows"] = {name: found[name] for name in (*BACKBONES, *FOREIGN_BACKBONES) if name in found}
        for name, row in rows.items():
            print(f"{time.monotonic() - begun:.0f} s {name}: {row}", flush=True)
        if not arguments.quick:
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

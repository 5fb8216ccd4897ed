"""Times everything and files it under this machine: `python -m bench.run`, or parts of it with `--only` and `-k`.

Each measured task replaces the same task in bench/results/<machine>.json, with its own date and versions; other tasks
stay. Ratios are fair only between rounds of one run. Therefore the file takes a task only with all of its peers: a run
with fewer peers or other rounds needs `--output`. Each section of each backbone is a process of its own, because
exported and compiled models stay in memory. If a process fails, the tasks measured before it are kept.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import memory
from bench.machine import commit, machine, machine_name, now, versions
from bench.names import FASTUPER, NOT_SELECTED
from bench.results import FOLDER, Results, conclude
from bench.summary import summary
from bench.timing import rounded

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache" / "bench"
TIMED = ["512", "waterfall", "bfloat16", "1024", "2048"]
SECTIONS = ["operations", *TIMED, "larger", "memory"]


def batches(sections: list[str]) -> list[tuple[str, str]]:
    """Return each process's section and its `-k` expression."""
    found = [("operations", "")] if "operations" in sections else []
    for section in sections:
        if section in (*TIMED, "quick"):
            found += [(section, backbone) for backbone in ("convnext-t", "swin-t")]
        elif section == "larger":
            found += [(section, backbone) for backbone in ("convnext-b", "swin-b", "convnext-l", "swin-l")]
    return found


def time_batch(section: str, tests: str, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Run one process of pytest-benchmark and return its tasks; None if it fails."""
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / "pytest-benchmark.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "bench", "-q", "--timeout=0", "-p", "no:cacheprovider"]
    command += ["--tb=short", "--benchmark-quiet", f"--benchmark-json={path}"]
    command += [f"--sections={section}", f"--peers={arguments.peers}"]
    if expression := " and ".join(f"({part})" for part in (tests, arguments.k) if part):
        command += ["-k", expression]
    if arguments.rounds:
        command += [f"--rounds={arguments.rounds}"]
    if arguments.no_truth or arguments.quick:  # float64 would take a third of the quick run
        command += ["--no-truth"]
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode == 5:  # no test was selected
        return {}
    if done.returncode or not path.exists():
        return None
    return tasks_of(json.loads(path.read_text()), whole=is_filed(arguments))


def is_filed(arguments: argparse.Namespace) -> bool:
    """Return True if the results go to the machine's file in bench/results."""
    return not (arguments.quick or arguments.output)


def tasks_of(report: dict[str, Any], whole: bool = True) -> dict[str, Any]:
    """Return pytest-benchmark's report as tasks with their peers; with `whole`, drop tasks that lack a peer."""
    tasks: dict[str, Any] = {}
    for entry in report["benchmarks"]:
        facts = dict(entry["extra_info"])
        task, peer = facts.pop("task"), facts.pop("peer")
        row = tasks.setdefault(task["name"], {**task, "peers": {}})
        row["peers"][peer] = {"rounds": [rounded(second) for second in entry["stats"]["data"]], **facts}
    for name, peers in report["skipped"].items():
        if name in tasks:
            tasks[name]["peers"].update({peer: {"skipped": reason} for peer, reason in peers.items()})
    for name, task in list(tasks.items()):
        task.pop("name")
        order = task.pop("order")  # the table's order: skipped peers keep their place
        if whole and (missing := [peer for peer in order if peer not in task["peers"]]):
            print(f"not filed, because -k leaves out {', '.join(missing)}: {name}", flush=True)
            del tasks[name]
            continue
        task["peers"] = {peer: task["peers"][peer] for peer in order if peer in task["peers"]}
    return tasks


def selects(expression: str, name: str) -> bool:
    """Return True if a `-k` expression holds for a name; a word of the expression holds if the name contains it.

    Raises:
        SyntaxError: the expression cannot be parsed.
    """
    name = re.sub(r"[^a-z0-9]+", "-", name.lower())

    def value(word: re.Match[str]) -> str:
        return word[0] if word[0] in ("and", "or", "not") else str(word[0].lower() in name)

    return not expression.strip() or bool(eval(re.sub(r"[^\s()]+", value, expression)))


def measure_memory(only: str) -> dict[str, Any]:
    """Return the peak memory of the tasks of bench.memory that the expression `only` selects."""
    tasks: dict[str, Any] = {}
    for name, (part, backbone, size) in memory.TASKS.items():
        if not selects(only, f"memory {name}"):
            continue
        task = tasks[name] = {"part": part, "backbone": backbone, "size": size, "peers": {}}
        for peer in memory.PEERS:
            task["peers"][peer] = memory.in_fresh_process(part, backbone, size, peer)
            print(f"memory of {name}, {peer}: {task['peers'][peer]}", flush=True)
    return tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"sections, separated by commas, of {', '.join(SECTIONS)}")
    parser.add_argument(
        "--quick", action="store_true", help="time the essential ratios; the machine's file stays as it is"
    )
    parser.add_argument("-k", default="", help="only the benchmarks that this pytest expression selects")
    parser.add_argument("--peers", default="", help="only peers whose names contain one of these texts, separated by ;")
    parser.add_argument("--rounds", type=int, help="rounds of each peer")
    parser.add_argument("--no-truth", action="store_true", help="skip the comparison with float64")
    parser.add_argument("--output", type=Path, help="the results file; bench/results/<machine>.json by default")
    arguments = parser.parse_args()
    if is_filed(arguments) and (arguments.peers or arguments.rounds or arguments.no_truth):
        parser.error("--peers, --rounds and --no-truth need --output FILE: the machine's file holds only whole tasks")
    try:
        selects(arguments.k, "")
    except SyntaxError:
        parser.error(f"-k {arguments.k!r} is no expression of words, and, or, not, parentheses")
    sections = ["quick"] if arguments.quick else arguments.only.split(",") if arguments.only else SECTIONS
    if unknown := [section for section in sections if section not in (*SECTIONS, "quick")]:
        parser.error(f"unknown sections {unknown}; the sections are {SECTIONS}")
    quick = CACHE / "quick.json"
    path = arguments.output or (quick if arguments.quick else FOLDER / f"{machine_name()}.json")
    results: Results = {"runs": {}, "tasks": {}, "memory": {}}
    if path.exists() and not arguments.quick:
        results = json.loads(path.read_text())
    run, begun, failed = now(), time.monotonic(), False
    results["machine"] = machine()
    results["runs"][run] = {"commit": commit(), "threads": torch.get_num_threads(), "versions": versions()}

    def save() -> None:
        used = {task["run"] for task in [*results["tasks"].values(), *results["memory"].values()]} | {run}
        results["runs"] = {key: value for key, value in sorted(results["runs"].items()) if key in used}
        results["runs"][run]["seconds"] = round(time.monotonic() - begun)
        results["memory"] = {name: results["memory"][name] for name in memory.TASKS if name in results["memory"]}
        conclude(results)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")

    for section, tests in batches(sections):
        start = time.monotonic()
        tasks = time_batch(section, tests, arguments)
        failed |= tasks is None
        if tasks:
            results["tasks"].update({name: {"run": run, **task} for name, task in tasks.items()})
            save()
        print(f"{section} {tests}: {time.monotonic() - start:.0f} s", flush=True)
    if "memory" in sections:
        start = time.monotonic()
        found = measure_memory(arguments.k)
        results["memory"].update({name: {"run": run, **task} for name, task in found.items()})
        save()
        print(f"memory: {time.monotonic() - start:.0f} s", flush=True)
    print(summary(results))
    if is_filed(arguments):
        print(
            f"\nfiled in {path.relative_to(ROOT)}; `python -m bench.tables` and `python -m bench.plots` draw the pages"
        )
    gone = [name for name, task in results["tasks"].items() if "skipped" in task["peers"].get(FASTUPER, {})]
    wrong = [name for name in gone if results["tasks"][name]["peers"][FASTUPER]["skipped"] != NOT_SELECTED]
    if wrong:
        print(f"\nfastuper failed at {', '.join(wrong)}")
    sys.exit(1 if failed or wrong else 0)


if __name__ == "__main__":
    main()

"""Does a busy moment slow later runs? `python -m bench.busy`, on an idle machine, takes about two minutes.

A new process runs a model while as many processes as there are processors keep the machine busy. Its measured choices
(`fastuper_kernels.dispatch.choices`) are kept. Then the machine is idle, and two kinds of processes take turns: with
the choices of the busy moment, and with none. The exit status is 0 if the medians of their times differ by at most 5 %.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT = 1.05
WORK = """
import json, time
start = time.perf_counter()
import torch
from fastuper import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation
torch.manual_seed(0)
backbone = ConvNextConfig(hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 1, 1])
model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, num_labels=150)).eval()
pixels, seconds = torch.randn(1, 3, 512, 512), []
with torch.inference_mode():
    for _ in range({calls}):
        start = time.perf_counter()
        model(pixels)
        seconds.append(time.perf_counter() - start)
print(json.dumps(seconds))
"""


def run(folder: Path, calls: int) -> list[float]:
    """Return the seconds of each call of a small model at 512 x 512 in a new process, with choices in a folder."""
    environment = {**os.environ, "FASTUPER_CACHE": str(folder)}
    environment.pop("FASTUPER_CHOICES", None)
    command = [sys.executable, "-c", WORK.replace("{calls}", str(calls))]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [float(seconds) for seconds in json.loads(done.stdout)]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="processes of each kind")
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
        try:
            time.sleep(1)
            first = run(root / "busy", 3)
        finally:
            for process in busy:
                process.kill()
                process.wait()
        file = root / "busy" / "choices.json"
        entries = json.loads(file.read_text()) if file.exists() else {}
        print(f"busy: first call {first[0]:.2f} s, third {first[2]:.2f} s; kept: {entries}")
        (root / "busy").mkdir(exist_ok=True)
        times: dict[str, list[float]] = {"busy": [], "fresh": []}
        for i in range(rounds):
            for kind in times:
                folder = root / f"{kind} {i}"
                if kind == "busy":
                    shutil.copytree(root / "busy", folder)
                seconds = run(folder, 8)
                times[kind].append(statistics.median(seconds[2:]))
                print(f"{kind}: first call {seconds[0]:.3f} s, then {times[kind][-1]:.3f} s", flush=True)
    ratio = statistics.median(times["busy"]) / statistics.median(times["fresh"])
    print(f"after a busy first run: {ratio:.3f} of the time with no choices kept; at most {LIMIT}")
    sys.exit(ratio > LIMIT)


if __name__ == "__main__":
    main()

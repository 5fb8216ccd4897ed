"""The peak memory of one run over the weights, each peer in a fresh process: `python -m bench.memory --help`.

What is measured: the model is built and its weights are in place; the heap's free pages are given back; the process's
resident memory (VmRSS) is the baseline. The kernel's high-water mark (VmHWM) is set back to it, the task runs once, for
the first time, and the mark is read again. `peak` is the mark less the baseline: it holds activations, outputs, what
libraries load and make as they first run, and packed weights, which are a number of their own too. The input image is
part of the baseline.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.machine import without_paths
from bench.names import EAGER, FASTUPER, WITHOUT_AUXILIARY

ROOT = Path(__file__).parent.parent
# {name: (part, backbone, size)}; label maps have the image's own size.
TASKS = {
    f"{part} {backbone} {size} float32": (part, backbone, size)
    for backbone in ("convnext-t", "swin-t")
    for part, sizes in (("logits", (512, 1024, 2048)), ("labels", (1024, 2048)))
    for size in sizes
}
PEERS = [EAGER[0], WITHOUT_AUXILIARY[0], FASTUPER]


def status(entry: str) -> int:
    """Return an entry of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(entry + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(entry)


def peak_of(run: Callable[[], object]) -> dict[str, Any]:
    """Return the peak of what `run` takes beside what is there before it, and since when the mark counts."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    baseline = status("VmRSS")
    # Not everywhere may a process do this; then the mark since its start counts, which building does not reach.
    try:
        Path("/proc/self/clear_refs").write_text("5")
        mark = "reset before the run"
    except OSError:
        mark = "since the start"
    kept = run()  # until the mark is read
    peak = status("VmHWM") - baseline
    del kept
    return {"peak": peak, "mark": mark}


def measure(part: str, backbone: str, size: int, peer: str) -> dict[str, Any]:
    """Return the peak of one run in this process, which must be fresh."""
    import torch
    import transformers

    import fastuper
    from bench.peers import BACKBONES, CLASSES, post_process
    from fastuper_kernels.cpu.packs import packed_bytes
    from tests.parity.models import images, randomize, uninitialized

    config = transformers.UperNetConfig(
        backbone_config=BACKBONES[backbone](), num_labels=CLASSES, use_auxiliary_head=peer != WITHOUT_AUXILIARY[0]
    )
    library = fastuper if peer == FASTUPER else transformers
    with uninitialized():
        model = library.UperNetForSemanticSegmentation(config).eval()
    randomize(model)
    pixels = images(1, 3, size, size, dtype=torch.float32)

    def run(x: torch.Tensor) -> Any:
        if part == "logits":
            return model(x).logits
        target = (x.shape[2], x.shape[3])
        if peer == FASTUPER:
            return model.segment(x, target_sizes=[target])
        return post_process(model(x).logits, target)

    seconds = 0.0

    def timed() -> Any:
        nonlocal seconds
        with torch.inference_mode():
            start = time.perf_counter()
            output = run(pixels)
            seconds = time.perf_counter() - start
        return output

    found = peak_of(timed)
    return {
        "peak": found["peak"],
        "packed": packed_bytes(),
        "weights": sum(x.numel() * x.element_size() for x in [*model.parameters(), *model.buffers()]),
        "seconds": seconds,
        "mark": found["mark"],
    }


def in_fresh_process(part: str, backbone: str, size: int, peer: str) -> dict[str, Any]:
    return said_by("bench.memory", "--run", part, backbone, str(size), peer)


def said_by(module: str, *arguments: str) -> dict[str, Any]:
    """Return what a module of ours, run in a process of its own, prints last as JSON; or why it was "skipped"."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return {"skipped": f"exit status {done.returncode}: {without_paths(lines[-1])[:200]}"}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs=4, metavar=("PART", "BACKBONE", "SIZE", "PEER"), help="measure this one alone")
    arguments = parser.parse_args()
    if arguments.run:
        part, backbone, size, peer = arguments.run
        print(json.dumps(measure(part, backbone, int(size), peer)))
        return
    for part, backbone, size in TASKS.values():
        for peer in PEERS:
            print(part, backbone, size, peer, in_fresh_process(part, backbone, size, peer), flush=True)


if __name__ == "__main__":
    main()

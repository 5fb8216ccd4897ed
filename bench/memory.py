"""Measures the peak memory of one run over the weights, each peer in a fresh process: `python -m bench.memory --help`.

The process builds the model, returns the heap's free pages, and reads its resident memory (VmRSS) as the baseline. It
resets the kernel's high-water mark (VmHWM), runs the task once, for the first time, and reads the mark. `peak` is the
mark less the baseline. It includes activations, outputs, packed weights (also given apart) and the memory that
libraries allocate in their first run. The baseline includes weights and the input image.
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
    """Return the peak memory of `run` over the memory in use before it, and the start of the high-water mark."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    baseline = status("VmRSS")
    # Some systems forbid the reset. The mark since the process's start is then used: building the model stays below it.
    try:
        Path("/proc/self/clear_refs").write_text("5")
        mark = "reset before the run"
    except OSError:
        mark = "since the start"
    kept = run()  # kept until the mark is read
    peak = status("VmHWM") - baseline
    del kept
    return {"peak": peak, "mark": mark}


def measure(part: str, backbone: str, size: int, peer: str) -> dict[str, Any]:
    """Return the peak of one run in this process, which must be fresh."""
    # Imported here, so that bench.run reads TASKS without loading the libraries.
    import torch
    import transformers

    import fastuper
    from bench.pairs import BACKBONES, images, randomize, uninitialized
    from bench.peers import CLASSES, post_process
    from fastuper_kernels.cpu.packs import packed_bytes

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
    """Return `measure` of a process of its own, or {"skipped": reason}."""
    return json_of("bench.memory", "--run", part, backbone, str(size), peer)


def json_of(module: str, *arguments: str) -> dict[str, Any]:
    """Run a module of bench in a process of its own, and return the JSON in its last line, or {"skipped": reason}."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return {"skipped": f"exit status {done.returncode}: {without_paths(lines[-1])[:200]}"}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", nargs=4, metavar=("PART", "BACKBONE", "SIZE", "PEER"), help="measure one task and peer in this process"
    )
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

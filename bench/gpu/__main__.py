"""Measures everything that needs a GPU, in one command and one folder: `make gpu-check`, or `python -m bench.gpu`.

The steps: tests; the GPU's rates of copies and matrix products; each operation's distance from float64, fastuper's and
PyTorch's; whole models and a training step beside Transformers; each operation beside PyTorch's operators, eager and
compiled. Times are medians over alternating turns, between CUDA events. Each call except a training step is a CUDA
graph. Inputs take turns too: no input is in the cache. Results are written after every step. Compiling the peers takes
most of the time. If ten minutes are too short for all shapes, run the command again: it continues where it stopped.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from bench.gpu.calls import DEVICE
from bench.gpu.check import ROOT, Check


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / ".cache" / "gpu-check", help="the folder")
    parser.add_argument("--seconds", type=float, default=480, help="start no measurement after this time")
    parser.add_argument("--no-tests", action="store_true", help="skip the tests")
    arguments = parser.parse_args()
    if DEVICE != "cuda":
        parser.error("this machine has no GPU; `make test` runs the kernels in Triton's interpreter")
    check = Check(arguments.output, time.monotonic() + arguments.seconds)
    if not arguments.no_tests:
        check.tests()
    check.measure()
    sys.exit(0 if check.results.get("tests", {}).get("passed", True) else 1)


if __name__ == "__main__":
    main()

"""Memory that stays after images of many sizes: `python -m bench.many_sizes`, about ten minutes on two cores.

Small models of fastuper and of Transformers, each in a new process, take one image of each size. The resident memory
after the third size is the baseline; free heap pages are given back before each reading.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import random
import subprocess
import sys
from typing import Any

import torch

from bench.memory import status
from bench.names import FASTUPER

FAMILIES: dict[str, dict[str, Any]] = {
    "convnext": {"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 2, 1]},
    "swin": {"embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8]},
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1]},
}


def resident() -> int:
    """Return the bytes of resident memory after the heap's free pages are given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status("VmRSS")


def measure(peer: str, family: str, count: int) -> None:
    """Print the megabytes that `count` sizes add."""
    if peer == FASTUPER:
        import fastuper as library
    else:
        import transformers as library
    torch.manual_seed(0)
    names = {"convnext": "ConvNextConfig", "swin": "SwinConfig", "resnet": "ResNetConfig"}
    backbone = getattr(library, names[family])(
        out_features=["stage1", "stage2", "stage3", "stage4"], **FAMILIES[family]
    )
    config = library.UperNetConfig(backbone_config=backbone, hidden_size=64, num_labels=20)
    model = library.UperNetForSemanticSegmentation(config).eval()
    sides = itertools.product(range(64, 64 + 8 * 30, 8), repeat=2)
    sizes = [(height + i % 3, width + i % 5) for i, (height, width) in enumerate(sides)]
    random.Random(0).shuffle(sizes)
    with torch.inference_mode():
        for i, size in enumerate(sizes[:count]):
            if i == 3:
                before = resident()
            model(torch.randn(1, 3, *size))
    print(f"{family}, {peer}: {(resident() - before) / 1e6:.0f} MB after {count} sizes", flush=True)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, default=900, help="the number of sizes, from 4 to 900")
    parser.add_argument("--one", nargs=2, metavar=("PEER", "FAMILY"), help="measure in this process")
    arguments = parser.parse_args()
    if arguments.one:
        measure(*arguments.one, arguments.sizes)
        return
    for family, peer in itertools.product(FAMILIES, (FASTUPER, "Transformers")):
        command = [sys.executable, "-m", "bench.many_sizes", "--one", peer, family, "--sizes", str(arguments.sizes)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()

"""Measures both libraries' distance from float64: `make accuracy` writes bench/results/accuracy.json.

docs/accuracy.md states the rule. Both libraries get the same random weights and images, at full size (512 x 512, 150
classes as in ADE20K); each seed draws a pair of models and an image.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

import fastuper
from bench.machine import commit
from bench.numerics import error, root_mean_square
from bench.pairs import BACKBONES, pair
from bench.results import FOLDER

RESULTS = FOLDER / "accuracy.json"
SIZE = 512
TITLES = {"convnext-t": "ConvNeXt-T", "swin-t": "Swin-T", "resnet-50": "ResNet-50"}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@torch.inference_mode()
def measure(config: Any, seed: int, size: int = SIZE) -> dict[str, Any]:
    """Return the errors of both libraries for one draw of weights and one image."""
    theirs, ours = pair(config, seed=seed)
    x = torch.randn(1, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    truth = theirs(x).logits
    result: dict[str, Any] = {"float64": error(ours(x).logits, truth)}
    best = truth.topk(2, dim=1).values
    margin, scale = best[:, 0] - best[:, 1], truth.abs().max()
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        theirs.to(dtype), ours.to(dtype)
        errors = {"fastuper": error(ours(x.to(dtype)).logits, truth)}
        for layout, memory_format in LAYOUTS.items():
            theirs.to(memory_format=memory_format)
            pixels = x.to(dtype).contiguous(memory_format=memory_format)
            logits = theirs(pixels).logits
            errors[f"transformers {layout}"] = error(logits, truth)
            if layout == "contiguous":
                differ = ours.segment(pixels)[0] != logits.argmax(1)[0]
                decided = margin[0] > 8 * torch.finfo(dtype).eps * scale
                labels = {
                    "pixels": differ.numel(),
                    "differ": int(differ.sum()),
                    "differ_beyond_rounding": int((differ & decided).sum()),
                }
        result[name] = {"errors": errors, "labels": labels}
    return result


def row_of(backbone: str, seeds: int, size: int) -> dict[str, Any]:
    """Return a backbone's row: errors as root mean squares over the seeds, and labels that differ as sums."""
    config = transformers.UperNetConfig(backbone_config=BACKBONES[backbone](), num_labels=150)
    runs = [measure(config, seed, size) for seed in range(seeds)]
    row: dict[str, Any] = {"backbone": TITLES[backbone], "float64": max(run["float64"] for run in runs)}
    for dtype in ("float32", "bfloat16"):
        first = runs[0][dtype]
        row[dtype] = {
            "errors": {
                peer: root_mean_square([run[dtype]["errors"][peer] for run in runs]) for peer in first["errors"]
            },
            "labels": {key: sum(run[dtype]["labels"][key] for run in runs) for key in first["labels"]},
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="draws of weights and images for each backbone")
    parser.add_argument("--size", type=int, default=SIZE, help="height and width of the images")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the results file")
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    measured = commit()  # before the measurement, during which files may change
    rows = []
    for backbone in TITLES:
        rows.append(row_of(backbone, arguments.seeds, arguments.size))
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "date": date.today().isoformat(),
        "commit": measured,
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "versions": {
            "fastuper": fastuper.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "size": arguments.size,
        "seeds": arguments.seeds,
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

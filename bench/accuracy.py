"""How far the network is from float64, beside Transformers: `make accuracy` writes bench/results/accuracy.json.

The rule is docs/accuracy.md's. Both libraries get the same random weights and images, of full size (512 x 512, ADE20K's
150 classes), one pair a seed.
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
from tests.parity.models import STAGES, pair

RESULTS = Path(__file__).parent / "results" / "accuracy.json"
SIZE = 512
BACKBONES = {
    "ConvNeXt-T": lambda: transformers.ConvNextConfig(
        hidden_sizes=[96, 192, 384, 768], depths=[3, 3, 9, 3], out_features=STAGES
    ),
    "Swin-T": lambda: transformers.SwinConfig(drop_path_rate=0.0, out_features=STAGES),
    "ResNet-50": lambda: transformers.ResNetConfig(out_features=STAGES),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def relative_error(y: torch.Tensor, truth: torch.Tensor) -> float:
    return ((y.double() - truth).norm() / truth.norm()).item()


@torch.inference_mode()
def measure(config: Any, seed: int) -> dict[str, Any]:
    """Return the errors of both libraries for one draw of weights and one image."""
    theirs, ours = pair(config, seed=seed)
    x = torch.randn(1, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    truth = theirs(x).logits
    result: dict[str, Any] = {"float64": relative_error(ours(x).logits, truth)}
    best = truth.topk(2, dim=1).values
    margin, scale = best[:, 0] - best[:, 1], truth.abs().max()
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        theirs.to(dtype), ours.to(dtype)
        errors = {"fastuper": relative_error(ours(x.to(dtype)).logits, truth)}
        for layout, memory_format in LAYOUTS.items():
            theirs.to(memory_format=memory_format)
            pixels = x.to(dtype).contiguous(memory_format=memory_format)
            logits = theirs(pixels).logits
            errors[f"transformers {layout}"] = relative_error(logits, truth)
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


def root_mean_square(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).square().mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    measured = commit()  # before it takes its time: files may change meanwhile
    rows = []
    for name, config in BACKBONES.items():
        runs = [
            measure(transformers.UperNetConfig(backbone_config=config(), num_labels=150), seed)
            for seed in range(arguments.seeds)
        ]
        row: dict[str, Any] = {"backbone": name, "float64": max(run["float64"] for run in runs)}
        for dtype in ("float32", "bfloat16"):
            row[dtype] = {
                "errors": {
                    who: root_mean_square([run[dtype]["errors"][who] for run in runs])
                    for who in runs[0][dtype]["errors"]
                },
                "labels": {key: sum(run[dtype]["labels"][key] for run in runs) for key in runs[0][dtype]["labels"]},
            }
        rows.append(row)
        print(json.dumps(row), flush=True)
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
        "size": SIZE,
        "seeds": arguments.seeds,
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

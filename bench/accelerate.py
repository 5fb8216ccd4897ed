"""Times other libraries' models before and after `fastuper.accelerate`: `python -m bench.accelerate`.

Three copies of a model with the same random weights take turns: the library's own, in both memory layouts, and the
accelerated one. Their outputs are compared with float64 afterwards. The results go to bench/results/accelerate.json.
A library that is not installed is skipped.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import fastuper
from bench.machine import commit, machine, now, versions
from bench.names import ACCELERATED, BEFORE
from bench.numerics import error
from bench.pairs import BACKBONES, images, randomize, uninitialized
from bench.results import ACCELERATIONS, FOLDER, acceleration_targets
from bench.timing import Call, CannotDo, alternate, medians, rounded

RESULTS = FOLDER / "accelerate.json"
CLASSES = 150
PEERS = [*BEFORE, ACCELERATED]

Inputs = tuple[Any, ...]


def upernet(backbone: str) -> nn.Module:
    """Return Transformers' UPerNet."""
    config = transformers.UperNetConfig(backbone_config=BACKBONES[backbone](), num_labels=CLASSES)
    with uninitialized():
        return transformers.UperNetForSemanticSegmentation(config)


def smp(decoder_channels: int) -> nn.Module:
    """Return segmentation_models_pytorch's UPerNet over timm's ConvNeXt-T."""
    try:
        import segmentation_models_pytorch
    except ImportError:
        raise CannotDo("segmentation_models_pytorch is not installed") from None
    return segmentation_models_pytorch.UPerNet(
        "tu-convnext_tiny", encoder_weights=None, decoder_channels=decoder_channels, classes=CLASSES
    )


def beit(size: int) -> nn.Module:
    """Return Transformers' BEiT-B with its UPerNet head, as published for ADE20K."""
    config = transformers.BeitConfig(
        image_size=size,
        use_relative_position_bias=True,
        use_absolute_position_embeddings=False,
        out_indices=[3, 5, 7, 11],
        num_labels=CLASSES,
    )
    with uninitialized():
        return transformers.BeitForSemanticSegmentation(config)


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "convnext-t": lambda size: upernet("convnext-t"),
    "swin-t": lambda size: upernet("swin-t"),
    "smp-512": lambda size: smp(512),
    "smp-256": lambda size: smp(256),
    "beit-head": beit,
    "beit": beit,
}
"""Functions that build the model of a row of `ACCELERATIONS`, for images of a size."""


def inputs_of_head(model: Any, pixels: torch.Tensor) -> Inputs:
    """Return the arguments with which a model calls its `decode_head`."""
    found: list[Inputs] = []
    handle = model.decode_head.register_forward_pre_hook(lambda module, inputs: found.append(inputs))
    model(pixels)
    handle.remove()
    return found[0]


def call_of(model: nn.Module, inputs: Inputs, layout: torch.memory_format) -> Call:
    """Return a call of the model, or of its head, that returns logits; parameters and inputs get the memory layout."""

    def laid_out(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.contiguous(memory_format=layout)
        return type(value)(laid_out(part) for part in value)

    model, inputs = model.to(memory_format=layout), laid_out(inputs)

    def call() -> torch.Tensor:
        output = model(*inputs)
        return output if isinstance(output, torch.Tensor) else output.logits

    return call


def cast(value: Any) -> Any:
    """Return arguments in float64."""
    return value.double() if isinstance(value, torch.Tensor) else type(value)(cast(part) for part in value)


@torch.inference_mode()
def measure(row: str, rounds: int, size: int) -> dict[str, Any]:
    """Return the seconds and the errors of a row's peers, or {"skipped": reason}."""
    accelerated: Any
    inputs: Inputs
    try:
        whole: Any = MODELS[row](size)
    except CannotDo as reason:
        return {"skipped": str(reason)}
    randomize(whole)
    whole.eval()
    pixels = images(1, 3, size, size, dtype=torch.float32)
    before, accelerated, inputs = whole, fastuper.accelerate(copy.deepcopy(whole)), (pixels,)
    if row.endswith("-head"):
        inputs = inputs_of_head(whole, pixels)
        before, accelerated = before.decode_head, accelerated.decode_head
    calls = {
        BEFORE[0]: call_of(before, inputs, torch.contiguous_format),
        BEFORE[1]: call_of(copy.deepcopy(before), inputs, torch.channels_last),
        ACCELERATED: call_of(accelerated, inputs, torch.contiguous_format),
    }
    truth = call_of(copy.deepcopy(before).double(), cast(inputs), torch.contiguous_format)()
    timed = alternate(
        {peer: lambda call=call: (call, call) for peer, call in calls.items()},
        rounds,
        lambda peer, call: {"error": error(call(), truth)},
    )
    if timed.skipped:
        raise RuntimeError(f"{row}: {timed.skipped}")
    found: dict[str, Any] = {
        "size": size,
        "peers": {
            peer: {"rounds": [rounded(second) for second in timed.seconds[peer]], **timed.facts[peer]} for peer in PEERS
        },
    }
    conclude(found)
    return found


def conclude(row: dict[str, Any]) -> None:
    """Store a row's speedup over the library's faster layout ("faster"), and whether the rule of accuracy holds."""
    seconds = medians(row["peers"])
    row["faster"] = min(seconds[peer] for peer in BEFORE) / seconds[ACCELERATED]
    errors = {peer: facts["error"] for peer, facts in row["peers"].items()}
    largest = max(errors[peer] for peer in BEFORE)
    row["accurate"] = errors[ACCELERATED] <= max(1.25 * largest, 4 * 2.0**-23)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="of each peer")
    parser.add_argument("--rows", nargs="+", choices=MODELS, default=list(MODELS), metavar="ROW", help="some rows only")
    parser.add_argument(
        "--quick", action="store_true", help="a round of small images, to see that all runs; the file stays as it is"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="the results file")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "run": now(),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "dtype": "float32",
        "rows": {},
    }
    for row in arguments.rows:
        size = 64 if arguments.quick else ACCELERATIONS[row].size
        found = measure(row, 1 if arguments.quick else arguments.rounds, size)
        result["rows"][row] = found
        result["targets"] = acceleration_targets(result)
        print(row, {key: value for key, value in found.items() if key != "peers"}, flush=True)
        for peer, facts in found.get("peers", {}).items():
            print(f"  {peer}: {medians({peer: facts})[peer]:.4g} s, error {facts['error']:.1e}", flush=True)
        if not arguments.quick:
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

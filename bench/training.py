"""Times a training step beside Transformers: `python -m bench.training` writes bench/results/training.json.

A step is forward, backward and AdamW. For each backbone the peers take turns. Each peer has its own weights, optimizer
and memory layout; images, labels and initial weights are the same. Peak memory over the weights is measured in fresh
processes (see bench.memory) over two steps, because the second step has the optimizer's averages. The gradients'
distances from float64 are measured on smaller images: a float64 step takes long. The loss is also measured without a
network, from logits at stride 4 to their gradient.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional as F

import fastuper
from bench.machine import commit, machine, now, versions
from bench.memory import json_of, peak_of
from bench.names import EAGER, FASTUPER
from bench.numerics import error, root_mean_square
from bench.pairs import BACKBONES, images, named_gradients, randomize, uninitialized
from bench.results import FOLDER, LOSS, TINY, training_targets
from bench.timing import medians, rounded, seconds_of, turns
from fastuper_kernels import upsample_cross_entropy

RESULTS = FOLDER / "training.json"
SIZE, BATCH, CLASSES = 512, 2, 150
PEERS = [*EAGER, FASTUPER]
GRADIENT_SIZE, SEEDS = 128, 5  # the size and the draws of the images whose gradients are compared with float64

Step = Callable[[], torch.Tensor]


def build(peer: str, backbone: str, seed: int = 0) -> torch.nn.Module:
    """Return a model in training mode whose weights depend only on the seed, without stochastic depth."""
    config = transformers.UperNetConfig(backbone_config=BACKBONES[backbone](), num_labels=CLASSES)
    if hasattr(config.backbone_config, "drop_path_rate"):
        config.backbone_config.drop_path_rate = 0.0
    with uninitialized():
        model: torch.nn.Module = transformers.UperNetForSemanticSegmentation(config)
    randomize(model, seed)
    if peer == FASTUPER:
        weights = model.state_dict()
        with uninitialized():
            model = fastuper.UperNetForSemanticSegmentation(config)
        model.load_state_dict(weights)
    return model.to(memory_format=torch.channels_last if peer == EAGER[1] else torch.contiguous_format).train()


def data(peer: str, size: int, batch: int, seed: int = 0, classes: int = CLASSES) -> dict[str, torch.Tensor]:
    """Return "pixel_values" (batch, 3, size, size) in the peer's layout, and "labels" (batch, size, size)."""
    pixels = images(batch, 3, size, size, seed=seed, dtype=torch.float32)
    # Segments of 32 x 32 pixels: labels drawn for single pixels would not resemble an image.
    labels = torch.randint(0, classes, (batch, size // 32, size // 32), generator=torch.Generator().manual_seed(seed))
    labels = labels.repeat_interleave(32, 1).repeat_interleave(32, 2)
    labels[:, :8] = 255
    if peer == EAGER[1]:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    return {"pixel_values": pixels, "labels": labels}


def stepper(peer: str, backbone: str) -> Step:
    """Return a function that runs a training step and returns its loss; for `LOSS`, only the loss and its gradient."""
    if backbone == LOSS:
        logits, labels = loss_data(peer)
        return lambda: loss_and_gradient(peer, logits, labels)[0]
    model = build(peer, backbone)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.05)
    return step_of(model, data(peer, SIZE, BATCH), optimizer)


def step_of(
    model: Any, batch: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer, autocast: torch.dtype | None = None
) -> Step:
    """Return a function that runs a training step and returns its loss; `autocast` is the forward pass's dtype."""
    device = batch["pixel_values"].device.type

    def step() -> torch.Tensor:
        with torch.autocast(device, autocast, enabled=autocast is not None):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def loss_data(peer: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits at stride 4, as a head computes them, and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(BATCH, CLASSES, SIZE // 4, SIZE // 4, generator=generator)
    layout = torch.contiguous_format if peer == EAGER[0] else torch.channels_last
    return logits.contiguous(memory_format=layout), data(peer, SIZE, BATCH, seed)["labels"]


def loss_and_gradient(peer: str, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss and its gradient by the logits, by Transformers' operations or by fastuper's."""
    logits = logits.detach().requires_grad_()
    if peer == FASTUPER:
        loss = upsample_cross_entropy(logits, labels, ignore_index=255)
    else:
        full = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
        loss = F.cross_entropy(full, labels, ignore_index=255)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def rounds_of(backbone: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Return each peer's seconds in alternating turns ("rounds") and its steps' "losses", the warm-up step's first."""
    losses: dict[str, list[torch.Tensor]] = {peer: [] for peer in PEERS}

    def stepping(peer: str) -> Callable[[], None]:
        step = stepper(peer, backbone)
        return lambda: losses[peer].append(step())

    steps = {peer: stepping(peer) for peer in PEERS}
    for step in steps.values():
        step()
    found: dict[str, list[float]] = {peer: [] for peer in PEERS}
    clocks = {peer: partial(seconds_of, step) for peer, step in steps.items()}
    for peer, seconds in turns(clocks, rounds):
        found[peer].append(rounded(seconds))
        print(backbone, peer, found[peer][-1], losses[peer][-1].item(), flush=True)
    return {peer: {"losses": [loss.item() for loss in losses[peer]], "rounds": found[peer]} for peer in PEERS}


def peak(peer: str, backbone: str) -> dict[str, Any]:
    """Return the peak memory of two steps over the weights. The process must be fresh."""
    step = stepper(peer, backbone)

    def twice() -> None:
        for _ in range(2):
            step()

    return peak_of(twice)


def peak_in_fresh_process(peer: str, backbone: str) -> dict[str, Any]:
    found = json_of("bench.training", "--peak", peer, backbone)
    if "skipped" in found:
        raise RuntimeError(f"{peer}, {backbone}: {found['skipped']}")
    return found


def gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the loss and every parameter's gradient, by the parameter's name in the Hub's checkpoints."""
    loss = model(**batch).loss
    loss.backward()
    found = {name: gradient for name, gradient in named_gradients(model).items() if gradient is not None}
    model.zero_grad()
    return {"loss": loss.detach(), **found}


def drawn_gradients(peer: str, backbone: str, seed: int, exact: bool = False) -> dict[str, torch.Tensor]:
    """Return a peer's gradients of one draw, in float32, or float64 if `exact`; for `LOSS` by the logits."""
    dtype = torch.float64 if exact else torch.float32
    if backbone == LOSS:
        logits, labels = loss_data(peer, seed)
        return {"logits": loss_and_gradient(peer, logits.to(dtype), labels)[1]}
    batch = data(peer, GRADIENT_SIZE, 4, seed)
    pixel_values = batch["pixel_values"].to(dtype)
    return gradients(build(peer, backbone, seed).to(dtype), {**batch, "pixel_values": pixel_values})


def distances(backbone: str) -> dict[str, Any]:
    """Compare the float32 gradients' errors: fastuper's over the larger of Transformers' two layouts.

    A parameter's ratio is that of geometric means over the draws. In some draws rounding changes the sign of a ReLU's
    input, and the error grows by a factor of up to 100. Such a draw would decide a mean of squares. Returns the median
    and the largest of the parameters' ratios, and the median ratio by squares too.
    """
    errors: dict[str, dict[str, list[float]]] = {peer: {} for peer in PEERS}
    for seed in range(SEEDS):
        truth = drawn_gradients(EAGER[0], backbone, seed, exact=True)
        largest = max(gradient.norm() for gradient in truth.values())
        for peer in PEERS:
            found = drawn_gradients(peer, backbone, seed)
            for name, gradient in truth.items():
                if gradient.norm() > 1e-9 * largest:  # a key's bias has a zero gradient: its values are rounding
                    errors[peer].setdefault(name, []).append(max(error(found[name], gradient), 1e-12))

    def ratios_of(mean: Callable[[list[float]], float]) -> dict[str, float]:
        means = {peer: {name: mean(draws) for name, draws in of.items()} for peer, of in errors.items()}
        return {name: ours / max(means[peer][name] for peer in EAGER) for name, ours in means[FASTUPER].items()}

    ratios = ratios_of(statistics.geometric_mean)
    by_squares = ratios_of(root_mean_square)
    worst = max(ratios, key=ratios.__getitem__)
    return {
        "median_errors": {
            peer: [float(f"{statistics.median(draw):.3g}") for draw in zip(*of.values(), strict=True)]
            for peer, of in errors.items()
        },
        "median_ratio": statistics.median(ratios.values()),
        "largest_ratio": ratios[worst],
        "largest_at": worst,
        "median_ratio_of_squares": statistics.median(by_squares.values()),
        "size": SIZE if backbone == LOSS else GRADIENT_SIZE,
        "seeds": SEEDS,
    }


def conclude(row: dict[str, Any]) -> None:
    """Store a backbone's speedup ("faster") and its ratio of peaks ("memory"), over Transformers' better layout."""
    seconds = medians(row["peers"])
    peaks = {peer: found["peak"] for peer, found in row["peers"].items() if "peak" in found}
    row["faster"] = min(seconds[peer] for peer in EAGER) / seconds[FASTUPER]
    row["memory"] = peaks[FASTUPER] / min(peaks[peer] for peer in EAGER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of each backbone; the loss alone has five times as many")
    parser.add_argument("--backbones", nargs="+", choices=TINY, default=list(TINY), metavar="NAME")
    parser.add_argument(
        "--peak", nargs=2, metavar=("PEER", "BACKBONE"), help="measure the peak memory of one peer in this process"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="the results file")
    arguments = parser.parse_args()
    if arguments.peak:
        print(json.dumps(peak(*arguments.peak)))
        return
    result: dict[str, Any] = {
        "run": now(),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "size": SIZE,
        "batch": BATCH,
        "dtype": "float32",
        "backbones": {},
        "loss": {},
    }
    if arguments.output.exists():  # rows of the same commit, machine and libraries stay
        before = json.loads(arguments.output.read_text())
        if all(before[key] == result[key] for key in ("commit", "machine", "versions", "size", "batch")):
            result["backbones"] = before["backbones"]
    for backbone in [LOSS, *arguments.backbones]:
        is_loss = backbone == LOSS
        row: dict[str, Any] = {"peers": rounds_of(backbone, arguments.rounds * (5 if is_loss else 1))}
        for peer in PEERS:
            row["peers"][peer].update(peak_in_fresh_process(peer, backbone))
        row["gradients"] = distances(backbone)
        conclude(row)
        if is_loss:
            result["loss"] = row
        else:
            result["backbones"][backbone] = row
        result["targets"] = training_targets(result)
        print(backbone, {key: row[key] for key in ("faster", "memory", "gradients")}, flush=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Training beside Transformers: `python -m bench.training` writes bench/results/training.json.

A step is forward, backward and AdamW. For each backbone all take turns, each with weights, optimizer and memory layout
of its own; the images, labels and starting weights are the same. Peak memory is that of two steps (the second has the
optimizer's averages) over the weights, in a fresh process each: see bench.memory. The gradients' distances from float64
are measured on smaller images: a step of float64 takes long. The loss is measured alone as well, from logits at stride
4 to their gradient.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from bench.machine import commit, machine, now, versions
from bench.memory import peak_of, said_by
from bench.names import EAGER, FASTUPER
from bench.results import FOLDER, LOSS, TINY, training_targets

RESULTS = FOLDER / "training.json"
SIZE, BATCH, CLASSES = 512, 2, 150
PEERS = [*EAGER, FASTUPER]
GRADIENT_SIZE, SEEDS = 128, 5  # of the images whose gradients are compared with float64, and draws of them

Step = Callable[[], torch.Tensor]


def build(peer: str, backbone: str, seed: int = 0) -> torch.nn.Module:
    """Return a model in training, with random weights that depend on the seed alone; nothing in it is random."""
    import transformers

    import fastuper
    from bench.peers import BACKBONES
    from tests.parity.models import randomize, uninitialized

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
    from tests.parity.models import images

    pixels = images(batch, 3, size, size, seed=seed, dtype=torch.float32)
    # Objects of 32 pixels: labels of single pixels would be no picture.
    labels = torch.randint(0, classes, (batch, size // 32, size // 32), generator=torch.Generator().manual_seed(seed))
    labels = labels.repeat_interleave(32, 1).repeat_interleave(32, 2)
    labels[:, :8] = 255
    if peer == EAGER[1]:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    return {"pixel_values": pixels, "labels": labels}


def stepper(peer: str, backbone: str) -> Step:
    """Return a function that takes a step and returns its loss; of `LOSS`, one that takes its gradient."""
    if backbone == LOSS:
        logits, labels = loss_data(peer)
        return lambda: loss_and_gradient(peer, logits, labels)[0]
    model = build(peer, backbone)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.05)
    return step_of(model, data(peer, SIZE, BATCH), optimizer)


def step_of(
    model: Any, batch: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer, autocast: torch.dtype | None = None
) -> Step:
    """Return a function that takes a step and returns its loss; `autocast` is the dtype to compute forward in."""
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
    """Return logits at stride 4, as a head has them, and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(BATCH, CLASSES, SIZE // 4, SIZE // 4, generator=generator)
    layout = torch.contiguous_format if peer == EAGER[0] else torch.channels_last
    return logits.contiguous(memory_format=layout), data(peer, SIZE, BATCH, seed)["labels"]


def loss_and_gradient(peer: str, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss and its gradient by the logits, Transformers' way or ours."""
    from fastuper_kernels import upsample_cross_entropy

    logits = logits.detach().requires_grad_()
    if peer == FASTUPER:
        loss = upsample_cross_entropy(logits, labels, ignore_index=255)
    else:
        full = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
        loss = F.cross_entropy(full, labels, ignore_index=255)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def alternate(backbone: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Return each peer's seconds, all taking turns, and the losses of its steps."""
    steps = {peer: stepper(peer, backbone) for peer in PEERS}
    results: dict[str, dict[str, Any]] = {
        peer: {"losses": [step().item()], "rounds": []} for peer, step in steps.items()
    }
    for _ in range(rounds):
        for peer, step in steps.items():
            gc.collect()
            time.sleep(0.02)
            start = time.perf_counter()
            loss = step()
            results[peer]["rounds"].append(float(f"{time.perf_counter() - start:.5g}"))
            results[peer]["losses"].append(loss.item())
            print(backbone, peer, results[peer]["rounds"][-1], results[peer]["losses"][-1], flush=True)
    return results


def peak(peer: str, backbone: str) -> dict[str, Any]:
    """Return the peak memory of two steps over the weights, in this process, which must be fresh."""
    step = stepper(peer, backbone)

    def twice() -> None:
        for _ in range(2):
            step()

    return peak_of(twice)


def peak_in_fresh_process(peer: str, backbone: str) -> dict[str, Any]:
    found = said_by("bench.training", "--peak", peer, backbone)
    if "skipped" in found:
        raise RuntimeError(f"{peer}, {backbone}: {found['skipped']}")
    return found


def gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the loss and the gradients of every parameter, as our model names it."""
    from tests.parity.models import named_gradients

    loss = model(**batch).loss
    loss.backward()
    found = {name: gradient for name, gradient in named_gradients(model).items() if gradient is not None}
    model.zero_grad()
    return {"loss": loss.detach(), **found}


def drawn_gradients(peer: str, backbone: str, seed: int, exact: bool = False) -> dict[str, torch.Tensor]:
    """Return a peer's gradients of one draw, in float32, or `exact` ones in float64; of `LOSS` the logits' own."""
    dtype = torch.float64 if exact else torch.float32
    if backbone == LOSS:
        logits, labels = loss_data(peer, seed)
        return {"logits": loss_and_gradient(peer, logits.to(dtype), labels)[1]}
    batch = data(peer, GRADIENT_SIZE, 4, seed)
    pixel_values = batch["pixel_values"].to(dtype)
    return gradients(build(peer, backbone, seed).to(dtype), {**batch, "pixel_values": pixel_values})


def distances(backbone: str) -> dict[str, Any]:
    """Return how far float32's gradients are from float64's, ours over the larger of Transformers' two layouts.

    Of each parameter the geometric mean over the draws: rounding turns the sign of a ReLU's input in one draw and not
    in another, which makes the error up to a hundred times as large, and whoever had that last would decide a mean of
    squares (which is given as well). Of the parameters' ratios the median and the largest.
    """
    errors: dict[str, dict[str, list[float]]] = {peer: {} for peer in PEERS}
    for seed in range(SEEDS):
        truth = drawn_gradients(EAGER[0], backbone, seed, exact=True)
        largest = max(gradient.norm() for gradient in truth.values())
        for peer in PEERS:
            found = drawn_gradients(peer, backbone, seed)
            for name, gradient in truth.items():
                if gradient.norm() > 1e-9 * largest:  # a key's bias has no gradient but rounding
                    distance = ((found[name].double() - gradient).norm() / gradient.norm()).item()
                    errors[peer].setdefault(name, []).append(max(distance, 1e-12))

    def ratios_of(mean: Callable[[list[float]], float]) -> dict[str, float]:
        means = {peer: {name: mean(draws) for name, draws in of.items()} for peer, of in errors.items()}
        return {name: ours / max(means[peer][name] for peer in EAGER) for name, ours in means[FASTUPER].items()}

    ratios = ratios_of(statistics.geometric_mean)
    by_squares = ratios_of(lambda draws: statistics.fmean(error**2 for error in draws) ** 0.5)
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
    """Store what follows from a backbone's measurements."""
    medians = {peer: statistics.median(found["rounds"]) for peer, found in row["peers"].items()}
    peaks = {peer: found["peak"] for peer, found in row["peers"].items() if "peak" in found}
    row["faster"] = min(medians[peer] for peer in EAGER) / medians[FASTUPER]
    row["memory"] = peaks[FASTUPER] / min(peaks[peer] for peer in EAGER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of the loss alone: five times as many")
    parser.add_argument("--backbones", nargs="+", choices=TINY, default=list(TINY), metavar="NAME")
    parser.add_argument("--peak", nargs=2, metavar=("PEER", "BACKBONE"), help="measure the memory of this one alone")
    parser.add_argument("--output", type=Path, default=RESULTS)
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
    if arguments.output.exists():  # rows of the same code, machine and libraries stay
        before = json.loads(arguments.output.read_text())
        if all(before[key] == result[key] for key in ("commit", "machine", "versions", "size", "batch")):
            result["backbones"] = before["backbones"]
    for backbone in [LOSS, *arguments.backbones]:
        is_loss = backbone == LOSS
        row: dict[str, Any] = {"peers": alternate(backbone, arguments.rounds * (5 if is_loss else 1))}
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

"""Compares outputs with Transformers' network in float64."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F

from bench.peers import Task, World, without_auxiliary_head

CACHE = Path(__file__).parent.parent / ".cache" / "bench"
EPS = {"float32": torch.finfo(torch.float32).eps, "bfloat16": torch.finfo(torch.bfloat16).eps}
CLASSES_AT_A_TIME = 10


class StripConv(nn.Module):
    """A 3x3 convolution computed in strips of rows, with the same result.

    In float64 PyTorch allocates all nine shifted copies of the input: 38 GB for the fusion of a 2048 x 2048 image.
    """

    def __init__(self, conv: nn.Conv2d, rows: int = 32):
        super().__init__()
        self.conv, self.rows = conv, rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        strips = []
        for top in range(0, x.shape[2], self.rows):
            bottom = min(top + self.rows, x.shape[2])
            strip = x[:, :, max(top - 1, 0) : bottom + 1]
            strip = F.pad(strip, (1, 1, int(top == 0), int(bottom == x.shape[2])))
            strips.append(F.conv2d(strip, self.conv.weight, self.conv.bias))
        return torch.cat(strips, dim=2)


def exact(world: World) -> Any:
    """Return Transformers' model in float64, without its auxiliary head."""

    def make() -> Any:
        model = copy.deepcopy(without_auxiliary_head(world._theirs)).double()
        for parent in list(model.decode_head.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.Conv2d) and child.kernel_size == (3, 3):
                    setattr(parent, name, StripConv(child))
        return model

    return world.once("float64", make)


def checksum(tensors: Iterable[torch.Tensor]) -> str:
    """Return a checksum of the contents of tensors."""
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(x.detach().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def stride_4_logits(world: World, task: Task) -> torch.Tensor:
    """Return the float64 logits at stride 4. They are cached in .cache/bench: at 2048 they take minutes.

    The file's name holds checksums of the weights and the pixels, and the libraries' versions.
    """

    def make() -> torch.Tensor:
        libraries = f"torch-{torch.__version__}-transformers-{transformers.__version__}"
        weights = world.once("checksum", lambda: checksum(world._theirs.state_dict().values()))
        pixels = checksum([world.pixels(task, dtype="float32")])
        path = CACHE / f"{world.backbone}-{task.size}-weights-{weights}-pixels-{pixels}-{libraries}.pt"
        if path.exists():
            return torch.load(path)
        model = exact(world)
        logits = model.decode_head(model.backbone(world.pixels(task, dtype="float64")).feature_maps)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        torch.save(logits.clone(), partial)
        partial.replace(path)
        return logits

    return world.once(("truth", task.size), make)


def errors(world: World, task: Task, output: Any) -> dict[str, Any]:
    """Return a peer's "error" against float64; for label maps "pixels", "differ" and "differ_beyond_rounding"."""
    size = (task.size, task.size)
    if task.part == "logits":
        return {"error": _error_of_parts(_upsampled_parts(output, stride_4_logits(world, task), [size]))}
    if task.part == "labels":
        assert task.target is not None
        return _labels(output, stride_4_logits(world, task), [size, task.target], EPS[task.dtype])
    # A head is compared with a float64 head that gets the same features, already rounded to the task's dtype.
    if task.part == "head":
        features = [x.double() for x in world.features(task)]
        truth = world.once(("head truth", task.dtype), lambda: [exact(world).decode_head(features)])
        output = [output]
    else:
        pixels = world.pixels(task).double()
        truth = world.once(("backbone truth", task), lambda: list(exact(world).backbone(pixels).feature_maps))
    return {"error": _error_of_parts(zip(output, truth, strict=True))}


def _upsampled_parts(output: torch.Tensor, low: torch.Tensor, sizes: Sequence[tuple[int, int]]) -> Any:
    for start in range(0, low.shape[1], CLASSES_AT_A_TIME):
        part = slice(start, start + CLASSES_AT_A_TIME)
        yield output[:, part], _resample(low[:, part], sizes)


def _resample(x: torch.Tensor, sizes: Sequence[tuple[int, int]]) -> torch.Tensor:
    for size in sizes:
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    return x


def _error_of_parts(parts: Any) -> float:
    """Return ||output - truth|| / ||truth|| over all parts."""
    difference = total = 0.0
    for output, truth in parts:
        difference += (output.double() - truth).square().sum().item()
        total += truth.square().sum().item()
    return (difference / total) ** 0.5


def _labels(output: torch.Tensor, low: torch.Tensor, sizes: Sequence[tuple[int, int]], eps: float) -> dict[str, int]:
    best = second = label = None
    scale = 0.0
    for start in range(0, low.shape[1], CLASSES_AT_A_TIME):
        part = _resample(low[:, start : start + CLASSES_AT_A_TIME], sizes)[0]
        scale = max(scale, part.abs().max().item())
        values, indices = part.topk(2, dim=0)
        if best is None or second is None or label is None:
            best, second, label = values[0], values[1], indices[0]
            continue
        label = torch.where(values[0] > best, indices[0] + start, label)
        second = torch.maximum(torch.minimum(best, values[0]), torch.maximum(second, values[1]))
        best = torch.maximum(best, values[0])
    assert best is not None
    assert second is not None
    differ = output != label
    decided = best - second > 8 * eps * scale
    return {
        "pixels": differ.numel(),
        "differ": int(differ.sum()),
        "differ_beyond_rounding": int((differ & decided).sum()),
    }

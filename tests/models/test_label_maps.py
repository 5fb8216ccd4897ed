"""Label maps from coarse logits, against probabilities of full size in float64."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from fastuper.models import label_maps
from fastuper.models.label_maps import class_map, part_map
from fastuper_kernels.cpu import argmax
from tests.kernels.common import random, traced

ROOT = Path(__file__).parents[2]
PARTS = {1: (5,), 3: (1, 2, 9), 4: (), 7: (300, 2, 8, 4, 7, 6, 5, 3)}
ENDS = [0, 2, 6, 7, 16]
SLICES = {name: slice(start, stop) for name, (start, stop) in zip(PARTS, pairwise(ENDS), strict=True)}
SIZES = [(1, 1), (7, 5), (33, 41), (70, 67)]


def scales(count: int, channels: int) -> list[torch.Tensor]:
    return [random(2, channels, 6 + 2 * i, 9 - i, seed=i) for i in range(count)]


def resampled(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(logits.double(), size=size, mode="bilinear", align_corners=False)


def classes_of(logits: list[torch.Tensor], size: tuple[int, int], first: int = 0) -> torch.Tensor:
    mean = sum(resampled(scale, size).softmax(1) for scale in logits)
    return mean[:, first:].argmax(1) + first


def parts_of(logits: list[torch.Tensor], objects: torch.Tensor) -> torch.Tensor:
    """Return part ids: all objects' probabilities everywhere, and then the ids of the object at each pixel."""
    size = (objects.shape[1], objects.shape[2])
    result = torch.zeros(objects.shape, dtype=torch.int64)
    for name, parts in PARTS.items():
        mean = sum(resampled(scale, size)[:, SLICES[name]].softmax(1) for scale in logits)
        ids = torch.tensor([0, *parts])[mean.argmax(1)]
        result = torch.where(objects.long() == name, ids, result)
    return result


def objects_of(kind: str, size: tuple[int, int]) -> torch.Tensor:
    if kind == "mixed":  # also objects without parts, beyond the last object with parts too
        return torch.randint(12, (2, *size), generator=torch.Generator().manual_seed(0))
    if kind == "regions":
        rows = torch.arange(size[0])[:, None] * 4 // size[0]
        columns = torch.arange(size[1]) * 2 // size[1]
        return torch.tensor([7, 0, 3, 1, 4, 2, 7, 9])[2 * rows + columns].expand(2, -1, -1)
    return torch.full((2, *size), 0)


@pytest.fixture(params=["tiles", "small-tiles", "traced"])
def way(request, monkeypatch):
    """Return a function that runs another: tile by tile, in tiles of a few rows and columns, or under a tracer."""
    if request.param == "small-tiles":
        monkeypatch.setattr(argmax, "BLOCK_BYTES", 4000)
        monkeypatch.setattr(argmax, "ROWS", 8)
        monkeypatch.setattr(argmax, "COLUMNS", 16)
        monkeypatch.setattr(label_maps, "ROWS", 10)
    return traced if request.param == "traced" else lambda function, *args, **kwargs: function(*args, **kwargs)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_classes(count, size, way):
    logits = scales(count, 12)
    for first, dtype in [(0, torch.int64), (1, torch.uint16), (5, torch.uint8)]:
        labels = way(class_map, logits, size, first=first, dtype=dtype)
        assert labels.dtype == dtype
        assert torch.equal(labels.long(), classes_of(logits, size, first))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["mixed", "regions", "none"])
def test_parts(count, size, kind, way):
    logits = scales(count, ENDS[-1])
    objects = objects_of(kind, size)
    expected = parts_of(logits, objects)
    assert expected.any() or kind == "none" or size == (1, 1)
    for integer, dtype in [(torch.int64, torch.int64), (torch.uint16, torch.uint16), (torch.uint8, torch.int16)]:
        labels = way(part_map, logits, objects.to(integer), SLICES, PARTS, dtype=dtype)
        assert labels.dtype == dtype
        assert torch.equal(labels.long(), expected)


def test_the_background_takes_part_in_the_softmax():
    """The first map prefers class 1 a little, but is sure of the background; the second prefers class 2."""
    sure = torch.tensor([9.0, 2.0, 0.0]).reshape(1, 3, 1, 1)
    other = torch.tensor([0.0, 0.0, 1.0]).reshape(1, 3, 1, 1)
    assert class_map([sure, other], (1, 1), first=1, dtype=torch.int64).item() == 2
    without = torch.stack([sure[:, 1:].softmax(1), other[:, 1:].softmax(1)]).sum(0).argmax() + 1
    assert without == 1


def test_parts_are_compared_within_their_object():
    """In the slice of object 3 the scales disagree; the sizes of logits in other slices do not matter."""
    first, second = torch.full((2, 1, 16, 1, 1), 50.0)
    first[:, 2:6], second[:, 2:6] = (
        torch.tensor(values).reshape(1, 4, 1, 1) for values in ([0.0, 3.0, 0.0, 0.0], [0.0, 0.0, 9.0, 0.0])
    )
    objects = torch.tensor([[[3]]])
    for logits, part in [([first], 1), ([second], 2), ([first, second], 2)]:
        assert part_map(logits, objects, SLICES, PARTS, dtype=torch.int64).item() == part


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_votes_in_float32(dtype):
    logits = [scale.to(dtype) for scale in scales(2, ENDS[-1])]
    exact = [scale.float() for scale in logits]
    objects = objects_of("mixed", (33, 41))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        labels = class_map(logits, (33, 41), dtype=torch.int64)
        parts = part_map(logits, objects, SLICES, PARTS, dtype=torch.int64)
    assert torch.equal(labels, class_map(exact, (33, 41), dtype=torch.int64))
    assert torch.equal(parts, part_map(exact, objects, SLICES, PARTS, dtype=torch.int64))


def test_large_logits_do_not_overflow():
    """The softmax is stable: exp(1000) is infinite."""
    logits = [scale + 1000 for scale in scales(2, 12)]
    assert torch.equal(class_map(logits, (20, 30), dtype=torch.int64), classes_of(logits, (20, 30)))


def test_infinity_and_nan_are_large_numbers(way):
    """In several scales too a class that is -inf everywhere is never a label, and NaN is the best class."""
    logits = scales(2, 4)
    for scale in logits:
        scale[:, 0] = -torch.inf
        scale[0, 2], scale[1, 3] = torch.inf, torch.nan
    labels = way(class_map, logits, (9, 11), dtype=torch.int64)
    assert (labels[0] == 2).all()
    assert (labels[1] == 3).all()
    logits = scales(2, ENDS[-1])
    for scale in logits:
        scale[:, 2] = -torch.inf  # "other" of object 3
        scale[:, 5] = torch.nan
        scale[:, 0] = torch.inf
    assert (way(part_map, logits, torch.full((2, 5, 6), 3), SLICES, PARTS, dtype=torch.int64) == 9).all()


def test_no_gradients_and_no_changes():
    logits = [scale.requires_grad_() for scale in scales(2, ENDS[-1])]
    before = [scale.detach().clone() for scale in logits]
    objects = objects_of("mixed", (12, 13))
    kept = objects.clone()
    for given in (logits, logits[:1]):
        assert not class_map(given, (12, 13), dtype=torch.int64).requires_grad
        assert not part_map(given, objects, SLICES, PARTS, dtype=torch.int64).requires_grad
    assert torch.equal(objects, kept)
    assert all(torch.equal(a, b) for a, b in zip(logits, before, strict=True))


def test_an_empty_batch():
    logits = [scale[:0] for scale in scales(2, ENDS[-1])]
    for given in (logits, logits[:1]):
        objects = class_map(given, (4, 5), dtype=torch.int64)
        assert objects.shape == (0, 4, 5)
        assert part_map(given, objects, SLICES, PARTS, dtype=torch.uint16).shape == (0, 4, 5)


@pytest.mark.exhaustive  # tests/kernels/test_upsample_argmax.py compiles labels of one map
@pytest.mark.parametrize("count", [1, 2])
def test_compiled(count):
    torch._dynamo.reset()

    def both(logits: list[torch.Tensor], size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        objects = class_map([scale[:, :8] for scale in logits], size, first=1, dtype=torch.uint8)
        return objects, part_map(logits, objects, SLICES, PARTS, dtype=torch.int16)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    for height in (9, 14):
        logits = [random(2, ENDS[-1], height, 4, seed=i) for i in range(count)]
        objects, parts = compiled(logits, (2 * height, 9))
        assert torch.equal(objects.long(), classes_of([scale[:, :8] for scale in logits], (2 * height, 9), 1))
        assert torch.equal(parts.long(), parts_of(logits, objects))


@pytest.mark.parametrize(
    ("logits", "options", "message"),
    [
        ([], {}, "each scale needs logits"),
        ([torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 2, 2)], {}, r"got \[\(1, 3, 2, 2\), \(1, 4, 2, 2\)\]"),
        ([torch.zeros(1, 3, 2, 2), torch.zeros(2, 3, 2, 2)], {}, "of the same B and classes"),
        ([torch.zeros(3, 2, 2)] * 2, {}, "each scale needs logits"),
        ([torch.zeros(1, 300, 2, 2)] * 2, {"dtype": torch.uint8}, "uint8 does not hold labels up to 299"),
        ([torch.zeros(1, 3, 2, 2)] * 2, {"dtype": torch.float32}, "float32 does not hold labels"),
        ([torch.zeros(1, 3, 2, 2)] * 2, {"first": 3}, "first must be one of the 3 classes"),
        ([torch.zeros(1, 3, 2, 2)], {"first": 3}, "first must be one of the 3 classes"),
        ([torch.zeros(1, 3, 2, 2)] * 2, {"size": (0, 4)}, "sizes must be one or more positive"),
    ],
)
def test_wrong_classes(logits, options, message):
    size = options.pop("size", (4, 4))
    with pytest.raises(ValueError, match=message):
        class_map(logits, size, **{"dtype": torch.int64, **options})


@pytest.mark.parametrize("count", [1, 2])
def test_objects_without_parts(count):
    """Numbers that are not objects have no parts, nor has an object with a slice and without ids of parts."""
    logits, (height, width) = scales(count, ENDS[-1]), (4, 5)
    objects = torch.tensor([-1, -300, 255, 1 << 40, 5]).expand(2, height, width)
    assert not part_map(logits, objects, {**SLICES, 5: slice(0, 16)}, PARTS, dtype=torch.int64).any()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.uint8}, "uint8 does not hold labels up to 300"),
        (
            {"slices": {**SLICES, 3: slice(2, 5)}},
            r"object 3 needs a slice of 4 channels for its parts, got slice\(2, 5",
        ),
        ({"slices": {1: slice(0, 2)}}, "object 3 needs a slice of 4 channels for its parts, got None"),
        ({"slices": {**SLICES, 7: slice(8, 17)}}, r"slices must be \(start, stop\) within 16 classes"),
        ({"objects": torch.zeros(2, 4, 4)}, "groups must be integers"),
        ({"objects": torch.zeros(4, 4, dtype=torch.int64)}, r"of shape \(2, 4, 4\), got \(4, 4\)"),
        ({"objects": torch.zeros(1, 4, 4, dtype=torch.int64)}, r"of shape \(2, 4, 4\), got \(1, 4, 4\)"),
    ],
)
def test_wrong_parts(count, options, message):
    given = {"objects": torch.zeros(2, 4, 4, dtype=torch.int64), "slices": SLICES, "dtype": torch.int64, **options}
    with pytest.raises(ValueError, match=message):
        part_map(scales(count, ENDS[-1]), given["objects"], given["slices"], PARTS, dtype=given["dtype"])


# Memory ---------------------------------------------------------------------------------------------------------------

CHILD = """
import sys
import torch
from bench.memory import peak_of
from fastuper.models.label_maps import class_map, part_map

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
shapes = [(188, 250), (113, 150), (94, 125), (75, 100)][: int(sys.argv[1])]
tasks = [[torch.randn(1, c, *shape, generator=generator) for shape in shapes] for c in (336, 427, 26, 47)]
slices = {name: slice(7 * name, 7 * name + 7) for name in range(61)}
parts = {name: range(1, 7) for name in slices}
def run(size):
    maps = [class_map(task, size, dtype=torch.int64) for task in (tasks[0], *tasks[2:])]
    return maps, part_map(tasks[1], maps[0] % 61, slices, parts, dtype=torch.int64)
run((64, 64))  # loads the libraries
print(peak_of(lambda: run((750, 1000)))["peak"])
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.skipif(sys.platform != "linux", reason="the peak's unit is Linux's")
def test_memory_of_all_maps_at_1000_by_750(count):
    """Beyond the logits, with the four maps of 6 MB each: under 100 MB. The probabilities would be 2.5 GB."""
    command = [sys.executable, "-c", CHILD, str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100e6


def test_no_tensor_has_the_size_of_the_probabilities():
    logits = [random(1, 120, 30, 30).float(), random(1, 120, 20, 25).float()]
    objects = random(1, 300, 400).mul(9).long().abs()
    slices = {name: slice(12 * name, 12 * name + 12) for name in range(10)}
    parts = {name: range(1, 12) for name in slices}
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for given in (logits, logits[:1]):
            class_map(given, (300, 400), dtype=torch.int64)
            part_map(given, objects, slices, parts, dtype=torch.int64)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < 120 * 300 * 400 * 4 / 8

"""`upsample_argmax` against resampling by matrices in float64, in blocks of a few rows or of all rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fastuper_kernels import upsample_argmax
from fastuper_kernels.cpu import argmax
from fastuper_kernels.ops.upsample_argmax import label_dtype
from tests.kernels.common import LAYOUTS, elements_of_calls, laid_out, parameters_of, random, traced
from tests.kernels.test_upsample_add import resampling_matrix


def resampled(logits: torch.Tensor, sizes: list[tuple[int, int]], corners: list[bool] | None = None) -> torch.Tensor:
    """Return float64 logits, resampled through each size in turn, with `align_corners` of each step."""
    logits = logits.double()
    for (height, width), aligned in zip(sizes, corners or [False] * len(sizes), strict=True):
        if aligned:
            logits = F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=True)
            continue
        rows, columns = resampling_matrix(logits.shape[2], height), resampling_matrix(logits.shape[3], width)
        logits = torch.einsum("yh,bchw,xw->bcyx", rows, logits, columns)
    return logits


def check(
    logits: torch.Tensor, sizes: list[tuple[int, int]], labels: torch.Tensor, corners: list[bool] | None = None
) -> None:
    """Check that the labels are the best class wherever the best two differ by more than rounding."""
    full = resampled(logits, sizes, corners)
    assert labels.shape == (len(logits), *sizes[-1])
    if logits.shape[1] == 1:
        assert not labels.any()
        return
    labels = labels.long()
    best, classes = full.topk(2, dim=1)
    certain = best[:, 0] - best[:, 1] > 8 * torch.finfo(logits.dtype).eps * full.abs().max()
    assert torch.equal(labels[certain], classes[:, 0][certain])
    assert labels.min() >= 0
    assert labels.max() < logits.shape[1]


def test_signature():
    ordinary = "positional or keyword"
    assert parameters_of(upsample_argmax) == [
        ("logits", ordinary, "required"),
        ("sizes", ordinary, "required"),
        ("dtype", "keyword-only", torch.int64),
        ("first", "keyword-only", 0),
        ("groups", "keyword-only", None),
        ("slices", "keyword-only", None),
        ("align_corners", "keyword-only", False),
    ]


sizes_of = st.tuples(st.integers(1, 15), st.integers(1, 15))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    classes=st.integers(1, 9),
    size=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    sizes=st.lists(sizes_of, min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    corners=st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_any_sizes(batch, classes, size, sizes, dtype, corners):
    logits, corners = random(batch, classes, *size).to(dtype), corners[: len(sizes)]
    labels = upsample_argmax(logits, sizes, align_corners=corners)
    assert labels.dtype == torch.int64
    check(logits, sizes, labels, corners)


@pytest.mark.parametrize("way", ["eager", "traced"])
def test_align_corners(way):
    """A flag for all steps or for each, in many tiles, with groups too; Triton's kernels decline."""
    run = upsample_argmax if way == "eager" else lambda *args, **kwargs: traced(upsample_argmax, *args, **kwargs)
    logits, sizes = random(2, 7, 9, 8), [(31, 40), (150, 133)]
    for value, corners in ((True, [True, True]), ([True, False], [True, False]), ([False, True], [False, True])):
        check(logits, sizes, run(logits, sizes, align_corners=value), corners)
        check(logits[:, 2:], sizes, run(logits, sizes, align_corners=value, first=2) - 2, corners)
        groups = torch.ones(2, 150, 133, dtype=torch.int64)
        labels = run(logits, sizes, groups=groups, slices=[(0, 2), (2, 7)], align_corners=value)
        check(logits[:, 2:], sizes, labels, corners)
    assert not torch.equal(run(logits, sizes), run(logits, sizes, align_corners=True))
    with pytest.raises(ValueError, match="resample with align_corners=False only"):
        upsample_argmax(logits, sizes, align_corners=True, backend="triton")
    for wrong in ([True], [True] * 3, [0, 1], [None, True], 1, None):
        with pytest.raises(ValueError, match="once or for each of 2 sizes"):
            upsample_argmax(logits, sizes, align_corners=wrong)


@pytest.mark.parametrize("limit", [1, 4 * 11 * 31 * 4, 10**9], ids=["one-row", "four-rows", "all-rows"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
def test_a_few_rows_at_a_time(limit, layout, monkeypatch):
    monkeypatch.setattr(argmax, "BLOCK_BYTES", limit)
    logits = random(2, 11, 6, 8).float().contiguous(memory_format=layout)
    check(logits, [(23, 31)], upsample_argmax(logits, [(23, 31)]))


@pytest.mark.parametrize("limit", [1, 10**9], ids=["one-row", "all-rows"])
def test_ties_go_to_the_first_class(limit, monkeypatch):
    monkeypatch.setattr(argmax, "BLOCK_BYTES", limit)
    logits = torch.zeros(1, 5, 3, 3)
    logits[:, [2, 4]] = 1.0
    assert (upsample_argmax(logits, [(7, 7)]) == 2).all()


@pytest.mark.parametrize("sizes", [[(150, 170)], [(60, 70), (150, 99)]], ids=str)
def test_classes_without_a_chance_are_left_out(sizes, monkeypatch):
    """The labels equal those of all classes, also if a class is below another by less than the rounding error."""
    logits = torch.nn.functional.interpolate(random(2, 40, 4, 5), size=(30, 34), mode="bilinear").float()
    logits[:, 30:] = logits[:, :10] * (1 - torch.finfo(torch.float32).eps)
    rivals, counts = argmax._rivals, []
    monkeypatch.setattr(argmax, "_rivals", lambda x: counts.append(len(rivals(x))) or rivals(x))
    labels = upsample_argmax(logits, sizes)
    check(logits, sizes, labels)
    assert min(counts) < 20
    monkeypatch.setattr(argmax, "_rivals", lambda x: torch.arange(x.shape[2]))
    assert torch.equal(labels, upsample_argmax(logits, sizes))


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64], ids=lambda d: str(d)[6:]
)
def test_dtypes_of_labels(dtype):
    labels = upsample_argmax(random(1, 256, 2, 3), [(4, 5)], dtype=dtype)
    assert labels.dtype == dtype
    check(random(1, 256, 2, 3), [(4, 5)], labels)


@pytest.mark.parametrize(
    ("classes", "dtype"),
    [(1, torch.uint8), (256, torch.uint8), (257, torch.uint16), (65536, torch.uint16), (65537, torch.int32)],
)
def test_the_smallest_dtype_holds_the_classes(classes, dtype):
    assert label_dtype(classes) == dtype
    assert torch.iinfo(dtype).max >= classes - 1
    logits = torch.zeros(1, classes, 1, 1)
    logits[0, -1] = 1
    assert int(upsample_argmax(logits, [(1, 2)], dtype=label_dtype(classes))[0, 0, 1]) == classes - 1


@pytest.mark.parametrize(
    "sizes",
    [
        [],
        [(0, 3)],
        [(4, 4), (3, 0)],
        [(-1, 2)],
        [5, 5],
        (5, 5),
        [(5.0, 5.0)],
        [(5, 5, 5)],
        [(5,)],
        [("5", "5")],
        5,
        None,
    ],
    ids=str,
)
def test_sizes_must_be_positive(sizes):
    with pytest.raises(ValueError, match=r"sizes must be one or more positive \(height, width\), got"):
        upsample_argmax(torch.zeros(1, 3, 2, 2), sizes)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor], ids=lambda kind: kind.__name__)
def test_sizes_of_other_integers(kind):
    logits = random(1, 3, 2, 4)
    assert torch.equal(upsample_argmax(logits, [(kind(5), kind(9))]), upsample_argmax(logits, [(5, 9)]))


# Infinities and NaN --------------------------------------------------------------------------------------------------


def compiled(*args):
    torch._dynamo.reset()
    return torch.compile(upsample_argmax, fullgraph=True, backend="eager")(*args)


WAYS = {"eager": upsample_argmax, "traced": lambda *args: traced(upsample_argmax, *args), "compiled": compiled}
CHAINS = [[(5, 7)], [(10, 14)], [(23, 31)], [(3, 2)], [(10, 14), (33, 17)]]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", CHAINS, ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:]
)
def test_a_masked_class_is_never_a_label(dtype, sizes, way):
    logits = random(2, 6, 5, 7).to(dtype)
    masked = logits.clone()
    masked[:, [0, 3]] = -float("inf")
    before = masked.clone()
    labels = WAYS[way](masked, sizes)
    others = torch.tensor([1, 2, 4, 5])
    assert torch.equal(labels, others[WAYS[way](logits[:, others], sizes)])
    assert torch.equal(masked, before)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf")], ids=str)
def test_infinity_and_nan_change_only_their_neighbours(value, way):
    logits = random(1, 4, 40, 40).float()
    logits[0, 2, 20, 10] = logits[0, 2].max() + 1
    broken = logits.clone()
    broken[0, 2, 20, 10] = value
    before, after = (WAYS[way](x, [(80, 80)])[0] for x in (logits, broken))
    near = torch.zeros(80, 80, dtype=torch.bool)
    near[39:43, 19:23] = True  # the pixels that are resampled from the logit
    assert torch.equal(before[~near], after[~near])
    assert (after[near] != 2).all() if value < 0 else (after[near] == 2).all()


@pytest.mark.parametrize("way", WAYS)
def test_all_classes_masked(way):
    assert not WAYS[way](torch.full((1, 4, 3, 3), -float("inf")), [(7, 7)]).any()


def test_a_large_sum_of_finite_logits():
    logits = torch.full((1, 3, 8, 8), 1e38)
    logits[:, 1] = 2e38
    assert (upsample_argmax(logits, [(20, 20)]) == 1).all()


@pytest.mark.parametrize(("dtype", "classes"), [(torch.float32, 3), (torch.uint8, 257), (torch.int8, 129)], ids=str)
def test_a_dtype_too_small_for_the_classes(dtype, classes):
    with pytest.raises(ValueError, match=f"{dtype} does not hold the labels of {classes} classes"):
        upsample_argmax(torch.zeros(1, classes, 2, 2), [(2, 2)], dtype=dtype)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    classes=st.integers(2, 6),
    size=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    sizes=st.lists(sizes_of, min_size=1, max_size=3),
    layout=st.sampled_from(LAYOUTS),
    way=st.sampled_from(["inference", "training", "traced", "autocast"]),
)
def test_every_way(classes, size, sizes, layout, way):
    logits = laid_out(random(2, classes, *size), layout)
    before = logits.clone()
    if way == "inference":
        with torch.inference_mode():
            labels = upsample_argmax(logits, sizes).clone()
    elif way == "training":
        labels = upsample_argmax(logits.clone().requires_grad_(), sizes)
    elif way == "traced":
        labels = traced(upsample_argmax, logits, sizes)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            labels = upsample_argmax(logits, sizes)
    check(logits, sizes, labels)
    assert labels.is_contiguous()
    assert not labels.requires_grad
    assert torch.equal(before, logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_half_precision_is_resampled_in_float32(dtype):
    logits = random(1, 9, 6, 7).to(dtype)
    check(logits.float(), [(31, 29)], upsample_argmax(logits, [(31, 29)]))


def test_autocast_does_not_round_the_logits():
    logits = random(1, 9, 6, 7).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(logits, [(31, 29)], upsample_argmax(logits, [(31, 29)]))


def test_compiled():
    torch._dynamo.reset()
    compiled = torch.compile(upsample_argmax, fullgraph=True, backend="aot_eager", dynamic=True)
    for height in (3, 5):
        logits = random(2, 4, height, 4)
        check(logits, [(2 * height, 9), (7, 7)], compiled(logits, [(2 * height, 9), (7, 7)]))


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_tensors_without_values(device):
    logits = random(2, 3, 5, 7)
    logits = logits.to("meta") if device == "meta" else torch._subclasses.FakeTensorMode().from_tensor(logits)
    labels = upsample_argmax(logits, [(9, 8)], dtype=torch.uint8)
    assert labels.shape == (2, 9, 8)
    assert labels.dtype == torch.uint8


def test_an_empty_batch():
    assert upsample_argmax(torch.zeros(0, 3, 5, 7), [(9, 8)]).shape == (0, 9, 8)


def test_resampled_logits_are_never_whole(monkeypatch):
    monkeypatch.setattr(argmax, "BLOCK_BYTES", 1 << 20)
    logits = random(1, 60, 32, 32).float()
    found = elements_of_calls(lambda: upsample_argmax(logits, [(128, 128), (500, 480)]))
    assert max(found) <= max((1 << 20) // 4, 500 * 480)


@pytest.mark.parametrize("shape", [(3, 2, 2), (1, 0, 2, 2), (1, 3, 0, 2), (1, 3, 2, 0)], ids=str)
def test_logits_must_be_maps(shape):
    with pytest.raises(ValueError, match=r"logits must be \(B, classes, H, W\).*got"):
        upsample_argmax(torch.zeros(shape), [(4, 4)])


def test_logits_of_integers():
    with pytest.raises(ValueError, match=r"floating-point numbers, got .* of torch.int64"):
        upsample_argmax(torch.zeros(1, 3, 2, 2, dtype=torch.int64), [(4, 4)])


# Classes that compete -------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    classes=st.integers(2, 6),
    first=st.integers(0, 5),
    size=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    sizes=st.lists(sizes_of, min_size=1, max_size=2),
    way=st.sampled_from(["eager", "traced"]),
)
def test_the_first_class_that_competes(classes, first, size, sizes, way):
    first = min(first, classes - 1)
    logits = random(2, classes, *size)
    logits[:, :first] += 9
    run = upsample_argmax if way == "eager" else lambda *args, **kwargs: traced(upsample_argmax, *args, **kwargs)
    labels = run(logits, sizes, first=first)
    assert labels.min() >= first
    check(logits[:, first:], sizes, labels - first)


LENGTHS = st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 2),
    lengths=LENGTHS,
    size=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    sizes=st.lists(st.tuples(st.integers(1, 15), st.integers(1, 15)), min_size=1, max_size=2),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    integer=st.sampled_from([torch.int64, torch.uint16, torch.uint8]),
    way=st.sampled_from(["eager", "traced"]),
)
def test_groups_compete_in_their_slices(batch, lengths, size, sizes, dtype, integer, way):
    slices = slices_of(lengths)
    logits = random(batch, slices[-1][1], *size).to(dtype)
    groups = mixed_groups(len(slices) + 2, (batch, *sizes[-1])).to(integer)  # two groups have no slice
    run = upsample_argmax if way == "eager" else lambda *args, **kwargs: traced(upsample_argmax, *args, **kwargs)
    labels = run(logits, sizes, groups=groups, slices=slices, dtype=integer)
    assert labels.dtype == integer
    check_slices(logits, sizes, groups, slices, labels)


def slices_of(lengths: list[int]) -> list[tuple[int, int]]:
    ends = np.cumsum(lengths).tolist()
    return [(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def mixed_groups(count: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(count, shape, generator=torch.Generator().manual_seed(3))


def check_slices(logits, sizes, groups, slices, labels):
    """Check each group's pixels against the best class of its slice; 0 where the group has none."""
    known = torch.zeros_like(groups, dtype=torch.bool)
    for group, (start, stop) in enumerate(slices):
        mask = groups.long() == group
        if start < stop and len(logits):
            alone = upsample_argmax(logits[:, start:stop].double(), sizes)
            check(logits[:, start:stop], sizes, torch.where(mask, labels.long(), alone))
            known |= mask
    assert not labels[~known].any()


@pytest.mark.parametrize("limit", [1, 10**9], ids=["one-row", "all-rows"])
def test_groups_in_many_tiles(limit, monkeypatch):
    monkeypatch.setattr(argmax, "BLOCK_BYTES", limit)
    monkeypatch.setattr(argmax, "ROWS", 8)
    monkeypatch.setattr(argmax, "COLUMNS", 16)
    slices = slices_of([3, 0, 7, 2])
    groups = mixed_groups(5, (2, 1, 2)).repeat_interleave(23, 1).repeat_interleave(20, 2)[:, :, :39]
    logits = random(2, 12, 6, 8).float()
    labels = upsample_argmax(logits, [(23, 39)], groups=groups, slices=slices)
    check_slices(logits, [(23, 39)], groups, slices, labels)


@pytest.mark.parametrize("run", [lambda call: call(), traced], ids=["eager", "traced"])
@pytest.mark.parametrize("stranger", [-1, -300, 1 << 32, 1 << 60])
def test_groups_without_a_slice(stranger, run):
    """Any number that is no place in the slices has label 0, also -1 for "not labelled"."""
    logits = torch.arange(5.0).reshape(1, 5, 1, 1)
    groups = torch.tensor([[[1, stranger, 0]]])
    labels = run(lambda: upsample_argmax(logits, [(1, 3)], groups=groups, slices=[(0, 3), (1, 5)]))
    assert labels.tolist() == [[[3, 0, 2]]]


def test_only_groups_that_occur_are_resampled(monkeypatch):
    """Tiles without a group that has classes are not resampled at all, and other tiles only in that group's slice."""
    resampled = []
    strips = argmax.Tile.strips
    monkeypatch.setattr(
        argmax.Tile, "strips", lambda tile: resampled.append((tile.rows.start, tile.source.shape[2])) or strips(tile)
    )
    groups = torch.full((1, 200, 64), 9)
    groups[:, 70:80] = 1
    groups[:, 150:] = 2
    upsample_argmax(random(1, 50, 50, 16), [(200, 64)], groups=groups, slices=[(0, 30), (30, 45), (50, 50)])
    assert resampled == [(64, 15)]


def test_infinite_logits_in_slices():
    """NaN and infinity are the best of their slice only, and -inf loses to every number."""
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([0.0, nan, 1.0, -inf, -5.0, inf])[None, :, None, None]
    groups = torch.tensor([[[0, 1, 2, 3]]])
    slices = [(0, 3), (2, 4), (3, 5), (3, 6)]
    assert upsample_argmax(logits, [(1, 4)], groups=groups, slices=slices).tolist() == [[[1, 0, 1, 2]]]


def test_ties_in_slices_go_to_the_first_class():
    logits = torch.zeros(1, 7, 2, 2)
    logits[:, [2, 3, 5, 6]] = 1.0
    labels = upsample_argmax(logits, [(1, 5)], groups=torch.tensor([[[0, 1, 0, 1, 2]]]), slices=[(0, 4), (4, 7)])
    assert labels.tolist() == [[[2, 1, 2, 1, 0]]]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"first": 5}, "first must be one of the 5 classes, got 5"),
        ({"first": -1}, "first must be one of the 5 classes, got -1"),
        ({"slices": [(0, 5)]}, "groups and slices go together"),
        ({"groups": torch.zeros(1, 4, 3, dtype=torch.int64)}, "groups and slices go together"),
        ({"groups": torch.zeros(1, 4, 3, dtype=torch.int64), "slices": [(0, 5)], "first": 1}, "without first"),
        (
            {"groups": torch.zeros(1, 3, 4, dtype=torch.int64), "slices": [(0, 5)]},
            r"shape \(1, 4, 3\), got \(1, 3, 4\)",
        ),
        ({"groups": torch.zeros(1, 4, 3), "slices": [(0, 5)]}, "groups must be integers"),
        ({"groups": torch.zeros(1, 4, 3, dtype=torch.int64), "slices": []}, "slices must be"),
        ({"groups": torch.zeros(1, 4, 3, dtype=torch.int64), "slices": [(0, 6)]}, "within 5 classes"),
        ({"groups": torch.zeros(1, 4, 3, dtype=torch.int64), "slices": [(3, 2)]}, "within 5 classes"),
        ({"groups": torch.zeros(1, 4, 3, dtype=torch.int64), "slices": [2, 5]}, "slices must be"),
        ({"groups": torch.zeros(1, 4, 3, dtype=torch.int64), "slices": [(0.5, 2)]}, "slices must be"),
    ],
)
def test_wrong_first_classes_groups_and_slices(own, message):
    with pytest.raises(ValueError, match=message):
        upsample_argmax(torch.zeros(1, 5, 2, 2), [(4, 3)], **own)


def test_a_dtype_need_only_hold_the_positions_in_slices():
    groups = torch.zeros(1, 1, 1, dtype=torch.uint8)
    logits = torch.arange(300.0).reshape(1, 300, 1, 1)
    labels = upsample_argmax(logits, [(1, 1)], groups=groups, slices=[(44, 300)], dtype=torch.uint8)
    assert labels.item() == 255
    with pytest.raises(ValueError, match="uint8 does not hold the labels of 257 classes"):
        upsample_argmax(logits, [(1, 1)], groups=groups, slices=[(43, 300)], dtype=torch.uint8)

"""`upsample_cross_entropy` against PyTorch's resampling and cross entropy in float64, in blocks of few or all rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastuper_kernels import upsample_cross_entropy
from fastuper_kernels.cpu import cross_entropy
from tests.kernels.common import (
    DTYPES,
    LAYOUTS,
    check_accuracy,
    check_every_way,
    elements_of_calls,
    gradients,
    laid_out,
    name_of,
    parameters_of,
    random,
    same,
    traced,
)

IGNORED = 255


def labels_of(
    batch: int, classes: int, size: tuple[int, int], *, seed: int = 0, ignored: float = 0.3, dtype: Any = torch.int64
) -> torch.Tensor:
    """Return random labels (B, H, W); a share `ignored` of them has the ignored label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, max(classes, 2), (batch, *size), generator=generator)
    return labels.masked_fill(torch.rand(labels.shape, generator=generator) < ignored, IGNORED).to(dtype)


def weight_of(classes: int, seed: int = 0) -> torch.Tensor:
    return random(max(classes, 2), seed=seed).abs() + 0.1


def truth(
    logits: torch.Tensor,
    labels: torch.Tensor,
    sizes: Any = None,
    *,
    ignore_index: int = IGNORED,
    weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    align_corners: Sequence[bool] = (),
) -> torch.Tensor:
    """Return the loss by PyTorch's operators; for one class it is binary cross entropy."""
    labels = labels.long()
    sizes = sizes or [labels.shape[1:]]
    for size, aligned in zip(sizes, align_corners or [False] * len(sizes), strict=True):
        logits = F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=aligned)
    if logits.shape[1] > 1:
        weight = None if weight is None else weight.to(logits.dtype)
        return F.cross_entropy(
            logits,
            labels,
            weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )
    assert weight is None
    valid = labels != ignore_index
    target = labels.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / 2
    losses = F.binary_cross_entropy_with_logits(logits[:, 0], target, reduction="none").where(valid, 0)
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / valid.sum()}[reduction]


def compare(logits: torch.Tensor, labels: torch.Tensor, sizes: Any = None, **options: Any) -> None:
    """Compare inference, training and the traceable way with PyTorch, all in float64."""
    check_every_way(
        lambda x: upsample_cross_entropy(x, labels, sizes, **options),
        lambda x: truth(x, labels, sizes, **options),
        [logits],
    )


def test_signature():
    ordinary = "positional or keyword"
    assert parameters_of(upsample_cross_entropy) == [
        ("logits", ordinary, "required"),
        ("labels", ordinary, "required"),
        ("sizes", ordinary, None),
        ("ignore_index", "keyword-only", 255),
        ("weight", "keyword-only", None),
        ("label_smoothing", "keyword-only", 0.0),
        ("reduction", "keyword-only", "mean"),
        ("align_corners", "keyword-only", False),
    ]


size_of = st.tuples(st.integers(1, 15), st.integers(1, 15))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    classes=st.integers(1, 9),
    size=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    sizes=st.lists(size_of, min_size=1, max_size=3),
    layout=st.sampled_from(LAYOUTS),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    weighted=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 99),
    corners=st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_any_sizes(batch, classes, size, sizes, layout, smoothing, weighted, reduction, seed, corners):
    logits = laid_out(5 * random(batch, classes, *size, seed=seed), layout)
    labels = labels_of(batch, classes, sizes[-1], seed=seed)
    labels[0, 0, 0] = 0  # at least one pixel is not ignored
    weight = weight_of(classes) if weighted and classes > 1 else None
    options = {"label_smoothing": smoothing, "reduction": reduction, "align_corners": corners[: len(sizes)]}
    compare(logits, labels, sizes, weight=weight, **options)


def test_align_corners():
    """Over several blocks; Triton's kernels decline."""
    logits, labels = random(2, 5, 9, 11), labels_of(2, 5, (70, 131))
    compare(logits, labels, [(20, 30), (70, 131)], align_corners=[True, False], label_smoothing=0.2)
    aligned = upsample_cross_entropy(logits, labels, align_corners=True)
    torch.testing.assert_close(aligned, truth(logits, labels, align_corners=[True]))
    assert abs(aligned - upsample_cross_entropy(logits, labels)) > 1e-4
    with pytest.raises(ValueError, match="resample with align_corners=False only"):
        upsample_cross_entropy(logits, labels, align_corners=True, backend="triton")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("limit", [1, 10**9], ids=["one-row", "all-rows"])
def test_every_option_over_several_blocks(limit, weighted, smoothing, reduction, monkeypatch):
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", limit)
    labels = labels_of(2, 5, (70, 131))
    weight = weight_of(5) if weighted else None
    compare(random(2, 5, 9, 11), labels, weight=weight, label_smoothing=smoothing, reduction=reduction)


@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_class_is_binary_cross_entropy(reduction, weighted):
    logits, labels = random(2, 1, 4, 5), labels_of(2, 1, (9, 13))
    if not weighted:
        compare(logits, labels, label_smoothing=0.2, reduction=reduction)
        return
    weight = weight_of(1)
    check_every_way(
        lambda x: upsample_cross_entropy(x, labels, weight=weight, reduction=reduction),
        lambda x: truth(torch.cat([0 * x, x], 1), labels, weight=weight, reduction=reduction),
        [logits],
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=name_of)
def test_dtypes_of_labels(dtype):
    compare(random(1, 7, 3, 4), labels_of(1, 7, (8, 9), dtype=dtype))


@pytest.mark.parametrize("ignore_index", [-100, 2, 255])
def test_ignore_index(ignore_index):
    labels = labels_of(2, 5, (9, 8), ignored=0)
    labels[:, :4] = ignore_index
    compare(random(2, 5, 3, 4), labels, ignore_index=ignore_index)


def test_labels_of_any_layout():
    labels = labels_of(2, 5, (8, 18)).transpose(1, 2)[:, ::2]
    assert not labels.is_contiguous()
    compare(random(2, 5, 3, 4), labels)


@pytest.mark.parametrize("way", ["eager", "traced"])
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (0, 5, 3, 4), (2, 1, 3, 4)], ids=str)
def test_all_pixels_ignored(shape, smoothing, weighted, way):
    """The mean and its gradients are 0; PyTorch's are NaN."""
    logits = random(*shape).requires_grad_()
    labels = torch.full((shape[0], 7, 9), IGNORED)
    options = {"weight": weight_of(shape[1]) if weighted else None, "label_smoothing": smoothing}

    def function(logits: torch.Tensor) -> torch.Tensor:
        return upsample_cross_entropy(logits, labels, **options)

    loss = function(logits) if way == "eager" else traced(function, logits)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0
    assert grad.shape == logits.shape
    assert not grad.count_nonzero()


def test_labels_outside_the_classes():
    labels = labels_of(1, 5, (7, 9))
    labels[0, 1, 2:5] = torch.tensor([5, -1, 77])
    with pytest.raises(ValueError, match=r"from 0 to 4, or ignore_index=255; found -1, 5, 77$"):
        upsample_cross_entropy(random(1, 5, 3, 3), labels)
    with pytest.raises(ValueError, match=r"from 0 to 1, or ignore_index=0; found 2, 3, 4, 5, 77, \.\.\.$"):
        upsample_cross_entropy(random(1, 1, 3, 3), labels.clamp(min=0), ignore_index=0)


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_accuracy(dtype, reduction):
    """By the rule of docs/accuracy.md."""
    labels, weight = labels_of(2, 30, (34, 41)), weight_of(30)

    def of(function: Any) -> Any:
        return lambda x: function(x, labels, weight=weight, label_smoothing=0.1, reduction=reduction)

    check_accuracy(
        of(upsample_cross_entropy), of(truth), lambda s: ((random(2, 30, 9, 11, seed=s).to(dtype),), {}), dtype
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
def test_large_logits(scale, smoothing):
    """Neighbouring pixels have large logits of different classes: in between all exponentials may underflow."""
    logits, labels = (scale * random(2, 6, 5, 7)).float(), labels_of(2, 6, (19, 27))

    def of(function: Any) -> Any:
        return lambda x: function(x, labels, label_smoothing=smoothing, reduction="none")

    ours, theirs = gradients(of(upsample_cross_entropy), [logits], {}), gradients(of(truth), [logits.double()], {})
    for mine, other in zip(ours, theirs, strict=True):
        same(mine.double(), other, 1e-5 if mine is ours[0] else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("sizes", [[(10, 14)], [(5, 7)], [(10, 14), (33, 17)]], ids=str)
def test_a_masked_class(sizes, dtype):
    """A class of -inf has no influence; in PyTorch infinity times a weight of zero is NaN."""
    logits, labels = random(2, 6, 5, 7).to(dtype), labels_of(2, 4, sizes[-1])
    others = torch.tensor([1, 2, 4, 5])
    masked = logits.clone()
    masked[:, [0, 3]] = -float("inf")
    before = masked.clone()
    named = torch.where(labels == IGNORED, labels, others[labels.clamp(max=3)])
    ours = gradients(lambda x: upsample_cross_entropy(x, named, sizes, reduction="none"), [masked], {})
    theirs = gradients(lambda x: upsample_cross_entropy(x, labels, sizes, reduction="none"), [logits[:, others]], {})
    same(ours[0], theirs[0], torch.finfo(dtype).eps)
    same(ours[1][:, others], theirs[1], torch.finfo(dtype).eps)
    assert not ours[1][:, [0, 3]].count_nonzero()
    assert torch.equal(masked, before)


def test_a_masked_label_has_a_large_finite_loss():
    logits = random(1, 4, 3, 3).float().requires_grad_()
    masked = logits.masked_fill(torch.arange(4)[:, None, None] == 2, -float("inf"))
    for smoothing in (0.0, 0.1):
        labels = torch.full((1, 12, 12), 2)
        loss = upsample_cross_entropy(masked, labels, label_smoothing=smoothing, reduction="none")
        assert (loss > 1e37).all()
        (grad,) = torch.autograd.grad(loss, logits, torch.ones_like(loss), retain_graph=True)
        assert grad.isfinite().all()


@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
def test_infinity_and_nan_reach_the_loss(value):
    """Gradient scalers detect overflow by them."""
    logits = random(1, 4, 40, 40).float()
    logits[0, 2, 20, 10] = value
    logits.requires_grad_()
    loss = upsample_cross_entropy(logits, labels_of(1, 4, (160, 160)))
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.isnan()
    assert grad.isnan().any()


# Ways -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=name_of)
def test_autocast_gives_float32(dtype):
    logits, labels = random(2, 6, 5, 7).to(dtype).requires_grad_(), labels_of(2, 6, (19, 27))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = upsample_cross_entropy(logits, labels)
        theirs = F.cross_entropy(logits.new_zeros(2, 6, 19, 27), labels, ignore_index=IGNORED)
        both = [loss, traced(lambda x: upsample_cross_entropy(x, labels), logits)]
    for ours in both:
        assert ours.dtype == theirs.dtype
        same(ours.double(), truth(logits.double(), labels), 1e-6)
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.dtype == dtype
    (exact,) = torch.autograd.grad(truth(logits.double(), labels), logits)
    same(grad.double(), exact.double(), torch.finfo(dtype).eps)


@pytest.mark.parametrize("options", [{}, {"weight": weight_of(3), "label_smoothing": 0.1}], ids=["default", "all"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_of_gradients(reduction, options):
    logits, labels = random(1, 3, 2, 3).requires_grad_(), labels_of(1, 3, (4, 5))

    def function(logits: torch.Tensor) -> torch.Tensor:
        return upsample_cross_entropy(logits, labels, reduction=reduction, **options)

    assert torch.autograd.gradcheck(function, logits, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, logits)


def test_the_same_graph_twice():
    logits, labels = random(2, 6, 5, 7).requires_grad_(), labels_of(2, 6, (19, 27))
    loss = upsample_cross_entropy(2 * logits, labels)
    first, second = (torch.autograd.grad(loss * k, logits, retain_graph=True)[0] for k in (1, 3))
    same(3 * first, second)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    logits, labels = random(2, 6, 5, 7).requires_grad_(), labels_of(2, 6, (19, 27))
    loss = checkpoint(lambda x: upsample_cross_entropy(x, labels), logits, use_reentrant=use_reentrant)
    (grad,) = torch.autograd.grad(loss, logits) if not use_reentrant else (loss.backward(), logits.grad)[1:]
    (exact,) = torch.autograd.grad(truth(logits, labels), logits)
    same(grad, exact)


def test_functional_transforms():
    logits, labels = random(3, 4, 3, 5), labels_of(3, 4, (9, 8))
    each = torch.func.vmap(torch.func.grad(lambda x, y: upsample_cross_entropy(x[None], y[None])))(logits, labels)
    for n in range(3):
        x = logits[n : n + 1].clone().requires_grad_()
        same(each[n : n + 1], torch.autograd.grad(truth(x, labels[n : n + 1]), x)[0])
    loss, tangent = torch.func.jvp(lambda x: upsample_cross_entropy(x, labels), (logits,), (logits,))
    same(loss, truth(logits, labels))
    same(tangent, (logits * gradients(lambda x: truth(x, labels), [logits], {})[1]).sum() / random(1, seed=99)[0])


def test_compiled():
    torch._dynamo.reset()

    def function(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return upsample_cross_entropy(logits, labels, label_smoothing=0.1)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for height in (3, 5):
        logits, labels = random(2, 4, height, 4), labels_of(2, 4, (2 * height, 9))
        ours = gradients(lambda x, y=labels: compiled(x, y), [logits], {})
        theirs = gradients(lambda x, y=labels: truth(x, y, label_smoothing=0.1), [logits], {})
        for mine, other in zip(ours, theirs, strict=True):
            same(mine, other)


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_tensors_without_values(device):
    logits, labels = random(2, 3, 5, 7), labels_of(2, 3, (9, 8))
    if device == "meta":
        logits, labels = logits.to("meta"), labels.to("meta")
    else:
        mode = torch._subclasses.FakeTensorMode()
        logits, labels = mode.from_tensor(logits), mode.from_tensor(labels)
    assert upsample_cross_entropy(logits, labels).shape == ()
    assert upsample_cross_entropy(logits.requires_grad_(), labels, reduction="none").shape == (2, 9, 8)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_resampled_logits_are_never_whole(reduction, monkeypatch):
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 1 << 18)
    logits, labels = random(1, 40, 24, 24).float().requires_grad_(), labels_of(1, 40, (200, 240))
    found = elements_of_calls(
        lambda: upsample_cross_entropy(logits, labels, [(96, 96), (200, 240)], reduction=reduction)
    )
    # Logits that are resampled along the columns alone have few rows. Whole ones would have 40 * 200 * 240 elements.
    assert max(found) <= max((1 << 18) // 4, 40 * 64 * 64)


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(3, 2, 2)}, r"logits must be \(B, classes, h, w\).*got \(3, 2, 2\)"),
        ({"logits": torch.zeros(1, 0, 2, 2)}, r"logits must be \(B, classes, h, w\).*got \(1, 0, 2, 2\)"),
        ({"logits": torch.zeros(1, 3, 2, 2, dtype=torch.int64)}, "floating-point numbers, got .* of torch.int64"),
        ({"labels": torch.zeros(1, 4, 4)}, "labels must be integers, got torch.float32"),
        ({"labels": torch.zeros(1, 4, 4, dtype=torch.bool)}, "labels must be integers, got torch.bool"),
        ({"labels": torch.zeros(2, 4, 4, dtype=torch.int64)}, r"labels must be \(1, H, W\).*got \(2, 4, 4\)"),
        ({"labels": torch.zeros(1, 1, 4, 4, dtype=torch.int64)}, r"labels must be \(1, H, W\).*got \(1, 1, 4, 4\)"),
        ({"labels": torch.zeros(1, 0, 4, dtype=torch.int64)}, r"labels must be \(1, H, W\).*got \(1, 0, 4\)"),
        ({"labels": torch.zeros(1, 4, 4, dtype=torch.int64, device="meta")}, "one device, got cpu, meta"),
        ({"sizes": []}, "sizes must be one or more positive"),
        ({"sizes": [(8, 8), (4, 5)]}, r"the last of sizes must be the labels' \(4, 4\), got .*\(4, 5\)"),
        ({"weight": torch.ones(2)}, r"weight must be \(3,\) floating-point numbers, one per class, got \(2,\)"),
        ({"weight": torch.ones(3, dtype=torch.int64)}, r"weight must be \(3,\) floating-point.* of torch.int64"),
        ({"weight": torch.ones(3, requires_grad=True)}, r"weight takes no gradient: pass weight.detach\(\)"),
        ({"logits": torch.zeros(1, 1, 2, 2), "weight": torch.ones(1)}, r"weight must be \(2,\)"),
        ({"label_smoothing": 1.1}, "label_smoothing must be from 0 to 1, got 1.1"),
        ({"label_smoothing": float("nan")}, "label_smoothing must be from 0 to 1, got nan"),
        ({"reduction": "batchmean"}, "reduction must be one of mean, sum, none, got 'batchmean'"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
    ids=lambda part: part if isinstance(part, str) else "-".join(part),
)
def test_errors(changes, message):
    given = {"logits": torch.zeros(1, 3, 2, 2), "labels": torch.zeros(1, 4, 4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        upsample_cross_entropy(**{**given, **changes})

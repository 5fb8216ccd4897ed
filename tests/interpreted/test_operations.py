"""Each operation's kernels against its reference in float64, on random shapes, dtypes and layouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_map

import fastuper_kernels as ops
from bench.numerics import float32_as
from fastuper_kernels import (
    conv_bn_relu,
    fold_norm,
    pool_conv_bn_relu,
    pyramid_pool,
    upsample_add,
    upsample_argmax,
    upsample_cross_entropy,
    upsampled_conv3x3,
)
from fastuper_kernels.gpu.configs import CONV_CONFIGS
from fastuper_kernels.ops.upsample_argmax import in_slices
from tests.kernels.common import LAYOUTS, error, gradients, laid_out, name_of, random

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
sizes = st.integers(1, 12)
seeds = st.integers(0, 999)


def reference_of(operation: Any) -> Any:
    import importlib

    return importlib.import_module(f"fastuper_kernels.ops.{operation.__name__}").reference


def on_device(tree: Any, dtype: torch.dtype) -> Any:
    """Return a tree with its tensors on the device: vectors (scales, shifts) in float32, the others in `dtype`."""

    def convert(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(DEVICE, torch.float32 if value.ndim == 1 else dtype)

    return tree_map(convert, tree)


def check(operation: Any, args: Any, kwargs: Any, dtype: torch.dtype, grads: bool = True) -> None:
    """Compare the result and, with `grads`, every gradient with the reference's, in float64 on the same values."""
    args, kwargs = on_device(args, dtype), on_device(kwargs, dtype)
    exact = tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) else t, (args, kwargs))
    tolerance = tolerance_of(dtype)

    def ours(*args: Any, **kwargs: Any) -> torch.Tensor:
        result: torch.Tensor = operation(*args, **kwargs, backend="triton")
        return result

    reference = reference_of(operation)
    with torch.no_grad():
        result, truth = ours(*args, **kwargs), reference(*exact[0], **exact[1])
    assert result.dtype == dtype
    assert result.shape == truth.shape
    close(result, truth, tolerance)
    if grads:
        theirs = gradients(reference, *exact)[1:]
        for mine, other in zip(gradients(ours, args, kwargs)[1:], theirs, strict=True):
            close(mine, other, 4 * tolerance)


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the allowed relative error: two roundings, as the interpreter truncates where a GPU rounds."""
    return {torch.float32: 16, torch.bfloat16: 2, torch.float16: 2}[dtype] * torch.finfo(dtype).eps


def close(ours: torch.Tensor, truth: torch.Tensor, tolerance: float) -> None:
    assert ours.isfinite().all(), "unwritten memory was read"
    if truth.norm() > 0:
        assert error(ours, truth) <= tolerance
    else:
        assert not ours.count_nonzero()


layouts = st.sampled_from(LAYOUTS)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@given(data=st.data())
@settings(max_examples=4, deadline=None, phases=[Phase.explicit, Phase.generate])
def test_conv_bn_relu(dtype: torch.dtype, data: Any) -> None:
    draw = data.draw
    batch, channels, channels_out = draw(st.integers(0, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    height, width, k, seed = draw(sizes), draw(sizes), draw(st.sampled_from([1, 3])), draw(seeds)
    x = laid_out(random(batch, channels, height, width, seed=seed), draw(layouts))
    weight = laid_out(random(channels_out, channels, k, k, seed=seed + 1) / (channels * k * k) ** 0.5, draw(layouts))
    scale = random(channels_out, seed=seed + 2) if draw(st.booleans()) else None
    shift = random(channels_out, seed=seed + 3) if draw(st.booleans()) else None
    addend = random(batch, channels_out, height, width, seed=seed + 4) if draw(st.booleans()) else None
    upsampled = random(batch, channels_out, draw(sizes), draw(sizes), seed=seed + 5) if draw(st.booleans()) else None
    kwargs = {"addend": addend, "upsampled": upsampled, "relu": draw(st.booleans())}
    check(ops.conv_bn_relu, (x, weight, scale, shift), kwargs, dtype, grads=dtype == torch.float32)


def _configs() -> list[Any]:
    return [config for config in CONV_CONFIGS if config.way == "pointers" or DEVICE == "cpu" or _has_tma()]


def _has_tma() -> bool:
    from fastuper_kernels.gpu.configs import has_tma

    return has_tma(torch.device(DEVICE))


@pytest.mark.parametrize(
    "dtype",
    # To the interpreter, which computes in float32, the two dtypes of 16 bits are alike.
    [pytest.param(dtype, marks=[pytest.mark.exhaustive] * (dtype == torch.float16)) for dtype in DTYPES],
    ids=name_of,
)
@pytest.mark.parametrize("number", range(len(CONV_CONFIGS)))
@pytest.mark.parametrize("k", [1, 3])
def test_every_configuration(number: int, k: int, dtype: torch.dtype) -> None:
    from fastuper_kernels.gpu.conv_bn_relu import conv

    configs = _configs()
    if number >= len(configs):
        pytest.skip("this GPU has no tensor descriptors")
    x, weight = random(2, 72, 9, 11, seed=1), random(136, 72, k, k, seed=2) / (72 * k * k) ** 0.5
    scale, shift = random(136, seed=3), random(136, seed=4)
    addend, upsampled = random(2, 136, 9, 11, seed=5), random(2, 136, 5, 7, seed=6)
    args = on_device((x, weight, scale, shift, addend, upsampled), dtype)
    exact = [t.double() for t in args]
    truth = conv_bn_relu_reference(*exact, relu=True)
    close(conv(*args, True, configs[number]), truth, tolerance_of(dtype))


def test_operands_without_a_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice of weights that does not start at a multiple of 16 bytes is read by pointers."""
    from fastuper_kernels.gpu import conv_bn_relu as module

    asked: list[bool] = []
    fallback = module.pointers_config
    monkeypatch.setattr(module, "pointers_config", lambda *args: asked.append(True) or fallback(*args))
    x, whole = random(1, 8, 5, 6, seed=1).to(DEVICE, torch.float16), random(6, 17, 3, 3, seed=2)
    whole = whole.to(DEVICE, torch.float16).contiguous(memory_format=torch.channels_last)
    for first in (0, 3):
        weight = whole[:, first : first + 8]
        result = module.conv(x, weight, None, None, None, None, False, CONV_CONFIGS[0])
        close(result, torch.nn.functional.conv2d(x.double(), weight.double(), padding=1), tolerance_of(torch.float16))
    assert asked == [True, True]  # nor are rows of 17 channels a multiple of 16 bytes


def test_float32_as_tf32() -> None:
    """With TF32 a GPU's tensor cores take 10 bits of float32's mantissa; with IEEE float32 they do not run."""
    from fastuper_kernels.gpu.conv_bn_relu import conv

    x, weight = random(1, 64, 9, 11, seed=1), random(48, 64, 3, 3, seed=2) / 24
    truth = torch.nn.functional.conv2d(x, weight, padding=1).to(DEVICE)
    args = on_device((x, weight), torch.float32)
    errors = {}
    for precision in ("tf32", "ieee"):
        with float32_as(precision):
            errors[precision] = [
                error(conv(*args, None, None, None, None, False, _configs()[0]), truth),
                error(ops.upsampled_conv3x3(args[:1], args[1:], (9, 11), backend="triton"), truth),
            ]
    assert max(errors["ieee"]) <= tolerance_of(torch.float32)
    assert max(errors["tf32"]) <= 2**-9
    if DEVICE == "cuda":
        assert min(errors["tf32"]) >= 2**-14


def conv_bn_relu_reference(x: Any, weight: Any, scale: Any, shift: Any, addend: Any, upsampled: Any, relu: bool) -> Any:
    return reference_of(ops.conv_bn_relu)(x, weight, scale, shift, addend=addend, upsampled=upsampled, relu=relu)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@given(data=st.data())
@settings(max_examples=4, deadline=None, phases=[Phase.explicit, Phase.generate])
def test_upsampled_conv3x3(dtype: torch.dtype, data: Any) -> None:
    draw = data.draw
    batch, channels_out, seed = draw(st.integers(0, 2)), draw(st.integers(1, 40)), draw(seeds)
    count, size = draw(st.integers(1, 4)), (draw(sizes), draw(sizes))
    alike = draw(st.booleans())
    widths = [draw(st.integers(1, 40))] * count if alike else [draw(st.integers(1, 40)) for _ in range(count)]
    levels = [
        laid_out(random(batch, c, draw(sizes), draw(sizes), seed=seed + i), draw(layouts)) for i, c in enumerate(widths)
    ]
    whole = random(channels_out, sum(widths), 3, 3, seed=seed + 9) / (9 * sum(widths)) ** 0.5
    weights = list(laid_out(whole, draw(layouts)).split(widths, dim=1))
    check(ops.upsampled_conv3x3, (levels, weights, size), {}, dtype, grads=dtype == torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@given(data=st.data())
@settings(max_examples=4, deadline=None, phases=[Phase.explicit, Phase.generate])
def test_pyramid_pool(dtype: torch.dtype, data: Any) -> None:
    draw = data.draw
    x = random(draw(st.integers(0, 2)), draw(st.integers(1, 40)), draw(sizes), draw(sizes), seed=draw(seeds))
    scales = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    pooling = draw(st.sampled_from(["adaptive", "precise_roi"]))
    check(ops.pyramid_pool, (laid_out(x, draw(layouts)), scales), {"pooling": pooling}, dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
@pytest.mark.parametrize("size", [(1, 1), (9, 7)], ids=str)
def test_precise_roi_pooling(size: tuple[int, int], dtype: torch.dtype) -> None:
    check(ops.pyramid_pool, (random(1, 5, *size, seed=1), [1, 2, 3, 6]), {"pooling": "precise_roi"}, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@given(data=st.data())
@settings(max_examples=4, deadline=None, phases=[Phase.explicit, Phase.generate])
def test_pool_conv_bn_relu(dtype: torch.dtype, data: Any) -> None:
    draw = data.draw
    channels, channels_out, seed = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(seeds)
    x = laid_out(random(draw(st.integers(0, 2)), channels, draw(sizes), draw(sizes), seed=seed), draw(layouts))
    scales = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    weights = [random(channels_out, channels, 1, 1, seed=seed + i) / channels**0.5 for i, _ in enumerate(scales)]
    scale = [random(channels_out, seed=seed + 10 + i) for i, _ in enumerate(scales)]
    shift = [random(channels_out, seed=seed + 20 + i) for i, _ in enumerate(scales)]
    options = {"pooling": draw(st.sampled_from(["adaptive", "precise_roi"])), "relu": draw(st.booleans())}
    check(ops.pool_conv_bn_relu, (x, scales, weights, scale, shift), options, dtype, grads=dtype == torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@given(data=st.data())
@settings(max_examples=4, deadline=None, phases=[Phase.explicit, Phase.generate])
def test_upsample_add(dtype: torch.dtype, data: Any) -> None:
    draw = data.draw
    batch, channels, seed = draw(st.integers(0, 2)), draw(st.integers(1, 40)), draw(seeds)
    x = laid_out(random(batch, channels, draw(sizes), draw(sizes), seed=seed), draw(layouts))
    lateral = laid_out(random(batch, channels, draw(sizes), draw(sizes), seed=seed + 1), draw(layouts))
    check(ops.upsample_add, (x, lateral), {}, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("given_too", ["weight and bias", "weight", "bias", "neither"])
def test_fold_norm(given_too: str, dtype: torch.dtype) -> None:
    for channels in (1, 200):
        mean, var, weight, bias = (random(channels, seed=seed).to(DEVICE, dtype) for seed in range(4))
        var = var.abs()
        args = (mean, var, weight if "weight" in given_too else None, bias if "bias" in given_too else None)
        if given_too == "neither":
            args = (mean, var, None, None)
        exact = [None if vector is None else vector.double() for vector in args]
        for ours, truth in zip(
            ops.fold_norm(*args, 1e-3, backend="triton"), reference_of(ops.fold_norm)(*exact, 1e-3), strict=True
        ):
            assert ours.dtype == torch.float32
            close(ours, truth, tolerance_of(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@given(data=st.data())
@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.generate])
def test_upsample_argmax(dtype: torch.dtype, data: Any) -> None:
    draw = data.draw
    classes, seed = draw(st.integers(1, 70)), draw(seeds)
    logits = random(draw(st.integers(0, 2)), classes, draw(sizes), draw(sizes), seed=seed)
    if draw(st.booleans()):  # few rivals
        logits = logits + 5 * random(1, classes, 1, 1, seed=seed + 1)
    logits = laid_out(logits, draw(layouts)).to(DEVICE, dtype)
    chain = draw(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=2))
    kind = draw(st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8, torch.uint16, torch.uint8]))
    first = draw(st.integers(0, classes - 1))
    labels = ops.upsample_argmax(logits, chain, dtype=kind, first=first, backend="triton")
    full = resampled(logits, chain)
    assert labels.dtype == kind
    assert labels.shape == (len(logits), *chain[-1])
    assert (labels.long() >= first).all()
    is_best(full[:, first:], labels.long() - first, logits)


def resampled(logits: torch.Tensor, chain: list[tuple[int, int]]) -> torch.Tensor:
    full = logits.double()
    for size in chain:
        full = torch.nn.functional.interpolate(full, size=size, mode="bilinear", align_corners=False)
    return full


def is_best(full: torch.Tensor, labels: torch.Tensor, logits: torch.Tensor) -> None:
    """Check that the labels are the best of the resampled logits, or below it by no more than rounding."""
    if len(logits):
        slack = 8 * torch.finfo(torch.float32).eps * logits.abs().max().double()
        assert (full.amax(1) - full.gather(1, labels[:, None])[:, 0] <= slack).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@given(data=st.data())
@settings(max_examples=4, deadline=None, phases=[Phase.explicit, Phase.generate])
def test_upsample_argmax_in_slices(dtype: torch.dtype, data: Any) -> None:
    draw = data.draw
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any))
    ends = torch.tensor(lengths).cumsum(0).tolist()
    slices = [(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    logits = random(draw(st.integers(0, 2)), ends[-1], draw(sizes), draw(sizes), seed=draw(seeds))
    logits = laid_out(logits, draw(layouts)).to(DEVICE, dtype)
    chain = draw(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 40)), min_size=1, max_size=2))
    # Two groups have no slice.
    groups = random(len(logits), *chain[-1], seed=9).mul(1e3).long().abs().remainder(len(slices) + 2)
    groups = groups.to(DEVICE, draw(st.sampled_from([torch.int64, torch.uint16, torch.uint8])))
    if groups.dtype == torch.int64:
        groups = groups.masked_fill(groups == len(slices), -1).masked_fill(groups > len(slices), 1 << 32)
    kind = draw(st.sampled_from([torch.int64, torch.uint16, torch.uint8]))
    labels = ops.upsample_argmax(logits, chain, dtype=kind, groups=groups, slices=slices, backend="triton")
    assert labels.dtype == kind
    assert labels.shape == groups.shape
    for group, length in enumerate(lengths):
        assert (labels.long()[groups.long() == group] < max(length, 1)).all()
    assert not labels.long()[(groups.long() < 0) | (groups.long() >= len(slices))].any()
    is_best(in_slices(resampled(logits, chain), groups, slices), labels.long(), logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@given(data=st.data())
@settings(max_examples=3, deadline=None, phases=[Phase.explicit, Phase.generate])
def test_upsample_cross_entropy(dtype: torch.dtype, data: Any) -> None:
    draw = data.draw
    classes, seed = draw(st.integers(1, 40)), draw(seeds)
    logits = random(draw(st.integers(0, 2)), classes, draw(st.integers(1, 6)), draw(st.integers(1, 18)), seed=seed)
    logits = laid_out(draw(st.sampled_from([1, 300])) * logits, draw(layouts)).to(DEVICE, dtype)
    chain = draw(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 12)), min_size=1, max_size=2))
    weight = random(max(classes, 2), seed=seed + 1).abs().float().to(DEVICE) if draw(st.booleans()) else None
    smoothing, reduction = draw(st.sampled_from([0.0, 0.1])), draw(st.sampled_from(["mean", "sum", "none"]))
    check_loss(logits, chain, weight, smoothing, reduction, seed)


def check_loss(
    logits: torch.Tensor,
    chain: list[tuple[int, int]],
    weight: torch.Tensor | None = None,
    smoothing: float = 0.0,
    reduction: str = "mean",
    seed: int = 0,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, max(logits.shape[1], 2), (len(logits), *chain[-1]), generator=generator)
    labels = labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.2, 255).to(DEVICE)

    def ours(x: torch.Tensor) -> torch.Tensor:
        return ops.upsample_cross_entropy(
            x, labels, chain, weight=weight, label_smoothing=smoothing, reduction=reduction, backend="triton"
        )

    def theirs(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = reference_of(ops.upsample_cross_entropy)(
            x, labels, chain, weight=weight, label_smoothing=smoothing, reduction=reduction
        )
        return result

    before = logits.clone()
    with torch.no_grad():
        result, truth = ours(logits), theirs(logits.double())
    assert result.dtype == logits.dtype
    close(result, truth, tolerance_of(logits.dtype))
    for mine, other in zip(gradients(ours, [logits], {}), gradients(theirs, [logits.double()], {}), strict=True):
        assert mine.dtype == logits.dtype
        # The rounding error of a large logit is an absolute error in the exponent.
        close(mine, other, tolerance_of(logits.dtype) + 1e-7 * float(logits.abs().sum() and logits.abs().max()))
    assert torch.equal(logits, before)


def test_loss_through_a_size_that_shrinks() -> None:
    """Each pixel reads many logits: PyTorch's operators run."""
    check_loss(random(1, 5, 40, 30, seed=3).float().to(DEVICE), [(2, 3), (9, 7)])


def test_loss_of_masked_classes_infinity_and_nan() -> None:
    """A class that is -inf everywhere has no influence. Labels outside the classes, NaN and +inf make NaN."""
    logits, labels = random(1, 5, 3, 4).float().to(DEVICE), torch.tensor([[[0, 1, 4, 255]] * 3], device=DEVICE)

    def losses(x: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
        return gradients(
            lambda x: ops.upsample_cross_entropy(x, labels, reduction="none", backend="triton"), [x], {}
        )  # fmt: skip

    others = torch.tensor([0, 1, 4], device=DEVICE)
    masked = logits.clone()
    masked[:, 2:4] = -float("inf")
    named = labels.where(labels != 4, 2)
    for ours, theirs in zip(losses(masked, labels), losses(logits[:, others], named), strict=True):
        close(ours if ours.ndim == 3 else ours[:, others], theirs.double(), tolerance_of(torch.float32))
    for value in (float("inf"), float("nan")):
        broken = logits.clone()
        broken[0, 1, 1, 1] = value
        loss, grad = losses(broken, labels)
        assert loss[0, 1, 1].isnan()
        assert loss[0, 2, 2].isfinite()
        assert grad[0, :, 1, 1].isnan().all()
    if DEVICE == "cuda":  # on a CPU such labels raise an error
        loss, grad = losses(logits, labels.where(labels != 4, 77))
        assert loss[0, :, 2].isnan().all()
        assert loss[0, :, :2].isfinite().all()


def test_loss_with_all_pixels_ignored() -> None:
    logits = random(1, 5, 3, 4).float().to(DEVICE)
    labels = torch.full((1, 6, 8), 255, device=DEVICE)
    loss, grad = gradients(lambda x: ops.upsample_cross_entropy(x, labels, backend="triton"), [logits], {})
    assert not loss.count_nonzero()
    assert not grad.count_nonzero()


def test_autocast() -> None:
    """Operands are cast as a convolution's operands are."""
    x, coarse, k = (random(*shape).float().to(DEVICE) for shape in ((1, 8, 5, 6), (1, 8, 3, 3), (8, 8, 3, 3)))
    vector, point = random(8).float().to(DEVICE), random(8, 8, 1, 1).float().to(DEVICE)

    def operations(kind: torch.dtype, **way: str) -> list[torch.Tensor]:
        given = [x.to(kind), coarse.to(kind), k.to(kind), point.to(kind)]
        a, b, c, d = given
        return [
            ops.conv_bn_relu(a, c, vector, vector, addend=a.to(kind), upsampled=b, **way),
            ops.upsampled_conv3x3([b], [c], (5, 6), **way),
            ops.pool_conv_bn_relu(a, [2], [d], [vector], [vector], **way),
        ]

    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        results = operations(torch.float32, backend="triton")
    for ours, cast in zip(results, operations(torch.bfloat16, backend="triton"), strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, cast)


def test_argmax_of_infinity_and_nan() -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[0.0, nan, -inf], [1.0, 2.0, -inf], [0.5, inf, 3.0]], device=DEVICE)[None, :, None, :]
    labels = ops.upsample_argmax(logits, [(1, 3)], backend="triton")
    assert labels.tolist() == ops.upsample_argmax(logits, [(1, 3)], backend="torch").tolist() == [[[1, 0, 2]]]
    own = {"groups": torch.tensor([[[0, 1, 1]]], device=DEVICE), "slices": [(0, 2), (1, 3)]}
    labels = ops.upsample_argmax(logits, [(1, 3)], **own, backend="triton")
    assert labels.tolist() == ops.upsample_argmax(logits, [(1, 3)], **own, backend="torch").tolist() == [[[1, 1, 1]]]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_argmax_of_large_float16(backend: str) -> None:
    """Finite logits are compared up to the largest, and infinity is greater."""
    logits = torch.tensor([[40000.0, 65504.0], [50000.0, float("inf")], [60000.0, 0.0]], device=DEVICE)
    labels = ops.upsample_argmax(logits.half()[None, :, None, :], [(1, 2)], backend=backend)
    assert labels.tolist() == [[[2, 1]]]


def test_argmax_through_a_size_that_shrinks() -> None:
    """Each label reads many logits: PyTorch's operators run."""
    logits = random(1, 5, 40, 30, seed=3).float().to(DEVICE)
    chain = [(2, 3), (9, 7)]
    groups = torch.arange(63, device=DEVICE).reshape(1, 9, 7) % 3
    for own in ({}, {"first": 2}, {"groups": groups, "slices": [(0, 3), (3, 5)]}):
        labels = ops.upsample_argmax(logits, chain, **own, backend="triton")
        assert torch.equal(labels, ops.upsample_argmax(logits, chain, **own, backend="torch"))


def test_ties_go_to_the_first_class() -> None:
    logits = torch.zeros(1, 70, 3, 3, device=DEVICE)
    assert not ops.upsample_argmax(logits, [(7, 5)], backend="triton").any()
    logits[:, 40:] = 1
    assert (ops.upsample_argmax(logits, [(7, 5)], backend="triton") == 40).all()


# Registration -------------------------------------------------------------------------------------------------------


def _opchecks() -> dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]]:
    def tensor(*shape: int, grad: bool = True) -> torch.Tensor:
        return random(*shape, dtype=torch.float32).to(DEVICE).requires_grad_(grad)

    labels = torch.arange(12, device=DEVICE).reshape(1, 3, 4) % 5
    fastuper = torch.ops.fastuper
    return {
        "conv_bn_relu": lambda: (
            fastuper.conv_bn_relu,
            (
                tensor(1, 5, 4, 6),
                tensor(7, 5, 3, 3),
                tensor(7),
                tensor(7),
                tensor(1, 7, 4, 6),
                tensor(1, 7, 2, 3),
                True,
            ),
        ),
        "conv_bn_relu without": lambda: (
            fastuper.conv_bn_relu,
            (tensor(1, 5, 4, 6), tensor(7, 5, 1, 1), None, None, None, None, False),
        ),
        "fold_norm": lambda: (fastuper.fold_norm, (*(tensor(5, grad=False).abs() for _ in range(4)), 1e-5)),
        "fold_norm without": lambda: (
            fastuper.fold_norm,
            (tensor(5, grad=False), tensor(5, grad=False).abs(), None, None, 1e-5),
        ),
        "upsampled_conv3x3": lambda: (
            fastuper.upsampled_conv3x3,
            ([tensor(1, 5, 3, 3), tensor(1, 5, 2, 2)], [tensor(4, 5, 3, 3), tensor(4, 5, 3, 3)], 6, 7),
        ),
        "upsampled_conv3x3_backward": lambda: (fastuper.upsampled_conv3x3_backward, (tensor(1, 5, 4, 6), 2, 3)),
        "upsampled_conv3x3_double_backward": lambda: (
            fastuper.upsampled_conv3x3_double_backward,
            (tensor(1, 6, 9, 5), [2, 3], 4, 6),
        ),
        "upsample_add_backward": lambda: (fastuper.upsample_add_backward, (tensor(1, 5, 4, 6), 2, 3)),
        "pyramid_pool_backward": lambda: (
            fastuper.pyramid_pool_backward,
            (tensor(1, 5, 4), [1, 2], "precise_roi", 4, 6),
        ),
        "pyramid_pool": lambda: (fastuper.pyramid_pool, (tensor(1, 5, 4, 6), [1, 2], "precise_roi")),
        "pool_conv_bn_relu": lambda: (
            fastuper.pool_conv_bn_relu,
            (
                tensor(1, 5, 4, 6),
                [1, 2],
                [tensor(3, 5, 1, 1)] * 2,
                [tensor(3)] * 2,
                [tensor(3)] * 2,
                "precise_roi",
                False,
            ),
        ),
        "upsample_add": lambda: (fastuper.upsample_add, (tensor(1, 5, 2, 3), tensor(1, 5, 4, 6))),
        "upsample_argmax": lambda: (
            fastuper.upsample_argmax,
            (tensor(1, 5, 2, 3, grad=False), [4], [6], torch.int64, 2),
        ),
        "upsample_argmax_in_slices": lambda: (
            fastuper.upsample_argmax_in_slices,
            (tensor(1, 5, 2, 3, grad=False), [3], [4], labels, [0, 2], [2, 5], torch.int64),
        ),
        "upsample_cross_entropy": lambda: (
            fastuper.upsample_cross_entropy,
            (tensor(1, 5, 2, 3), labels, tensor(5, grad=False).abs(), [3], [4], 255, 0.1),
        ),
        "upsample_cross_entropy_backward": lambda: (
            fastuper.upsample_cross_entropy_backward,
            (tensor(1, 3, 4), tensor(1, 5, 2, 3), labels, None, tensor(1, 3, 4, grad=False), [3], [4], 255, 0.0),
        ),
    }


@pytest.mark.parametrize("name", list(_opchecks()))
def test_opcheck(name: str) -> None:
    for operation in (
        conv_bn_relu, fold_norm, upsampled_conv3x3, pool_conv_bn_relu, pyramid_pool, upsample_add, upsample_argmax,
        upsample_cross_entropy,
    ):  # fmt: skip
        __import__(f"fastuper_kernels.gpu.{operation.__name__}")
    operator, args = _opchecks()[name]()
    torch.library.opcheck(operator, args)


def _twice() -> dict[str, tuple[Any, list[torch.Tensor]]]:
    """Return each operation as a function of tensors, and tensors for it."""
    x, coarse, k = random(1, 4, 5, 6), random(1, 4, 3, 2, seed=1), random(4, 4, 3, 3, seed=2)
    point, vector = random(4, 4, 1, 1, seed=3), random(4, seed=4).float().to(DEVICE)
    labels = torch.arange(30, device=DEVICE).reshape(1, 5, 6) % 4
    return {
        "conv_bn_relu": (lambda a, b, c, **way: ops.conv_bn_relu(a, b, upsampled=c, relu=False, **way), [x, k, coarse]),
        "upsampled_conv3x3": (lambda a, b, **way: ops.upsampled_conv3x3([a], [b], (5, 6), **way), [coarse, k]),
        "pool_conv_bn_relu": (
            lambda a, b, **way: ops.pool_conv_bn_relu(a, [2], [b], [vector.to(a)], [vector.to(a)], **way),
            [x, point],
        ),
        "pyramid_pool": (lambda a, **way: ops.pyramid_pool(a, [1, 2], **way), [x]),
        "precise_roi": (lambda a, **way: ops.pyramid_pool(a, [1, 3], pooling="precise_roi", **way), [x]),
        "upsample_add": (lambda a, b, **way: ops.upsample_add(a, b, **way), [coarse, x]),
        "upsample_cross_entropy": (
            lambda a, **way: ops.upsample_cross_entropy(a, labels, weight=vector.abs(), label_smoothing=0.1, **way),
            [coarse],
        ),
    }


@pytest.mark.parametrize("name", list(_twice()))
def test_gradients_of_gradients(name: str) -> None:
    """Gradients have gradients: a loss may have a penalty on gradients."""
    function, given = _twice()[name]

    def second(dtype: torch.dtype, **way: Any) -> list[torch.Tensor]:
        leaves = [t.to(DEVICE, dtype).requires_grad_() for t in given]
        result = function(*leaves, **way).square().sum()
        first = torch.autograd.grad(result, leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

    ours, truth = second(torch.float32, backend="triton"), second(torch.float64, backend="torch")
    for mine, other in zip(ours, truth, strict=True):
        close(mine, other, 256 * torch.finfo(torch.float32).eps)


def test_compiled_whole() -> None:
    """Operations compile to one graph, and sizes may change."""
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"

    @torch.compile(fullgraph=True, backend=backend, dynamic=True)
    def function(x: torch.Tensor, weight: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
        levels = [coarse, ops.conv_bn_relu(coarse, weight, backend="triton")]
        addend = ops.upsampled_conv3x3(levels, [weight, weight], x.shape[2:], backend="triton")
        y = ops.conv_bn_relu(x, weight, addend=addend, backend="triton")
        return ops.upsample_argmax(ops.upsample_add(coarse, y, backend="triton"), [(9, 8)], backend="triton")

    @torch.compile(fullgraph=True, backend=backend, dynamic=True)
    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return ops.upsample_cross_entropy(logits, labels, backend="triton")

    for height, width in ((4, 6), (7, 5)):
        labels = torch.arange(6 * height * width, device=DEVICE).reshape(1, 2 * height, 3 * width) % 5
        given = random(1, 6, height, width).float().to(DEVICE)
        truths = gradients(lambda x, y=labels: reference_of(ops.upsample_cross_entropy)(x, y), [given.double()], {})
        for mine, other in zip(gradients(lambda x, y=labels: loss(x, y), [given], {}), truths, strict=True):
            close(mine, other, tolerance_of(torch.float32))
        x, weight = random(1, 6, height, width).float().to(DEVICE), random(6, 6, 3, 3).float().to(DEVICE)
        coarse = random(1, 6, 3, 2).float().to(DEVICE)
        levels = [coarse, reference_of(ops.conv_bn_relu)(coarse, weight)]
        addend = reference_of(ops.upsampled_conv3x3)(levels, [weight, weight], (height, width))
        y = reference_of(ops.conv_bn_relu)(x, weight, addend=addend)
        expected = reference_of(ops.upsample_argmax)(reference_of(ops.upsample_add)(coarse, y), [(9, 8)])
        assert (function(x, weight, coarse) == expected).float().mean() > 0.98


def test_configurations_are_data() -> None:
    from fastuper_kernels.gpu.configs import ConvConfig, as_json

    assert all(ConvConfig(**as_json(config)) == config for config in CONV_CONFIGS)
    assert len({dataclasses.astuple(config) for config in CONV_CONFIGS}) == len(CONV_CONFIGS)

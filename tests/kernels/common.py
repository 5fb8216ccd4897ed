"""Helpers of the operations' tests: inputs, memory layouts, the ways an operation runs, the rule of accuracy."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

LAYOUTS = ["contiguous", "channels-last", "strided", "transposed", "expanded", "channels-of-more"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def name_of(value: Any) -> str:
    """Return a readable id of a parameter."""
    return str(value).removeprefix("torch.")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """Return x (B, C, H, W) in a layout; "expanded" repeats the first image instead of the others."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels-last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        return x[:1].expand_as(x)
    return torch.cat([x, x, x], dim=1)[:, x.shape[1] : 2 * x.shape[1]]


# Ways to run ----------------------------------------------------------------------------------------------------------


class PassThrough(TorchDispatchMode):
    """A mode that passes every operator through: the operations take their traceable way inside it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def elements_of_calls(function: Callable[[], Any]) -> list[int]:
    """Return the number of elements of every operator's input while a function runs, its backward pass included.

    The profiler records the operators below autograd. The operations take their eager way: a profiler is no tracer.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        result = function()
        if result.requires_grad:
            result.sum().backward()
    return [
        math.prod(shape)
        for event in profile.events()
        for shape in event.input_shapes
        if shape and all(isinstance(n, int) for n in shape)
    ]


def elements_of_graph(graph: torch.fx.GraphModule) -> list[int]:
    """Return the number of elements of every tensor of a traced graph."""
    values = [node.meta.get("val") for node in graph.graph.nodes]
    return [value.numel() for value in values if isinstance(value, torch.Tensor)]


def traced(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run an operation's traceable way, on real values."""
    with PassThrough():
        return function(*args, **kwargs)


def leaves(tree: Any) -> Any:
    """Return copies of all tensors, in the same layout, that require gradients."""
    return tree_map(lambda t: t.detach().clone().requires_grad_() if isinstance(t, torch.Tensor) else t, tree)


def gradients(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Return the result and the gradients of every tensor argument, for a fixed random gradient of the result."""
    args, kwargs = leaves(args), leaves(kwargs)
    result = function(*args, **kwargs)
    wanted = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    grads = torch.autograd.grad(result, wanted, random(*result.shape, seed=99).to(result))
    return [result.detach(), *grads]


def same(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-12) -> None:
    """Compare whole float64 tensors: no element differs by more than `tolerance` of the largest, and none is NaN."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    if ours.numel():
        assert (ours - theirs).abs().max() <= tolerance * (1 + theirs.abs().max())


def check_every_way(function: Any, reference: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> None:
    """Compare inference, training with all gradients, and the traceable way with the reference, in float64."""
    kwargs = kwargs or {}
    before = [t.clone() for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    expected = reference(*args, **kwargs)
    with torch.inference_mode():
        same(function(*args, **kwargs).clone(), expected)
    with torch.no_grad():
        same(traced(function, *args, **kwargs), expected)
    theirs = gradients(reference, args, kwargs)
    for way in (function, lambda *a, **k: traced(function, *a, **k)):
        for ours, grad in zip(gradients(way, args, kwargs), theirs, strict=True):
            same(ours, grad)
    after = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "an argument was changed"


# Accuracy -------------------------------------------------------------------------------------------------------------


def error(y: torch.Tensor, truth: torch.Tensor) -> float:
    return float((y.double() - truth).norm() / truth.norm())


def rms(errors: Sequence[float]) -> float:
    return float(torch.tensor(errors, dtype=torch.float64).square().mean().sqrt())


def _in(tree: Any, layout: str) -> Any:
    return tree_map(lambda t: laid_out(t, layout) if isinstance(t, torch.Tensor) and t.ndim == 4 else t, tree)


def check_accuracy(
    function: Any, reference: Any, make: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]], dtype: torch.dtype
) -> None:
    """Check the rule of docs/accuracy.md for results and, as a median and a maximum over the arguments, for gradients.

    `make(seed)` returns the arguments, rounded to `dtype`. The truth is the reference in float64 on the same values.
    """
    ours: dict[str, list[float]] = {"contiguous": [], "channels-last": []}
    theirs: dict[str, list[float]] = {"contiguous": [], "channels-last": []}
    grads: dict[str, list[list[float]]] = {"ours": [], "theirs": []}
    for seed in range(5):
        args, kwargs = make(seed)
        double = tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) else t, (args, kwargs))
        truth = reference(*double[0], **double[1])
        true_grads = gradients(reference, *double)[1:]
        for layout in ours:
            a, k = _in((args, kwargs), layout)
            with torch.inference_mode():
                result = function(*a, **k)
            assert result.dtype == dtype
            ours[layout].append(error(result, truth))
            theirs[layout].append(error(reference(*a, **k), truth))
        a, k = _in((args, kwargs), "channels-last")
        for whose, way in (("ours", function), ("theirs", reference)):
            found = gradients(way, a, k)
            assert found[0].dtype == dtype
            grads[whose].append([error(g, t) for g, t in zip(found, [truth, *true_grads], strict=True)])
    eps = torch.finfo(dtype).eps
    worst = max(rms(errors) for errors in theirs.values())
    for layout, errors in ours.items():
        assert rms(errors) <= max(1.25 * worst, 4 * eps), (layout, rms(errors), worst)
    mine, other = ([rms(column) for column in zip(*grads[whose], strict=True)] for whose in ("ours", "theirs"))
    ratios = sorted(m / max(o, eps) for m, o in zip(mine, other, strict=True))
    assert ratios[len(ratios) // 2] <= 1.25, (mine, other)
    assert ratios[-1] <= 4, (mine, other)


# Partitions -----------------------------------------------------------------------------------------------------------


def strips(height: int, cuts: Sequence[int]) -> list[tuple[int, int]]:
    """Return the strips (start, stop) between the cuts; each cut is taken modulo the height."""
    edges = sorted({0, height, *(cut % height for cut in cuts)})
    return list(pairwise(edges))


def parameters_of(function: Callable[..., Any]) -> list[tuple[str, str, Any]]:
    """Return the (name, kind, default) of every parameter but `strip` and `backend`, which do not change the result."""
    return [
        (p.name, str(p.kind.description), "required" if p.default is p.empty else p.default)
        for p in inspect.signature(function).parameters.values()
        if p.name not in ("strip", "backend")
    ]

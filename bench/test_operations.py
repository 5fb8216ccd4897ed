"""Times each operation beside its reference, at UPerNet's sizes for a 512 x 512 image."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import fastuper_kernels
from bench.conftest import readable
from bench.names import FASTUPER, REFERENCE
from bench.numerics import error
from bench.peers import CHANNELS_LAST
from bench.timing import Call, Timed, alternate

pytestmark = pytest.mark.timeout(0)
DTYPES = ("float32", "bfloat16")
PEERS = [*REFERENCE, FASTUPER]


def maps(generator: torch.Generator, channels: int, size: int) -> torch.Tensor:
    """Return a feature map (1, channels, size, size) after ReLU, channels_last."""
    x = torch.randn(1, channels, size, size, generator=generator, dtype=torch.float64)
    return x.relu().contiguous(memory_format=CHANNELS_LAST)


def weight(generator: torch.Generator, out: int, channels: int, kernel: int) -> torch.Tensor:
    drawn = torch.randn(out, channels, kernel, kernel, generator=generator, dtype=torch.float64)
    return drawn / (channels * kernel * kernel) ** 0.5


def scale_and_shift(generator: torch.Generator, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.randn(2, channels, generator=generator, dtype=torch.float64)
    return drawn[0].abs() + 0.5, drawn[1]


# The operation and its place in UPerNet -> its arguments in float64.
Arguments = tuple[Sequence[Any], dict[str, Any]]
OPERATIONS: dict[tuple[str, str], Callable[[torch.Generator], Arguments]] = {
    ("conv_bn_relu", "3x3 at stride 4"): lambda g: (
        [maps(g, 512, 128), weight(g, 512, 512, 3), *scale_and_shift(g, 512)],
        {},
    ),
    ("conv_bn_relu", "3x3 at stride 8"): lambda g: (
        [maps(g, 512, 64), weight(g, 512, 512, 3), *scale_and_shift(g, 512)],
        {},
    ),
    ("conv_bn_relu", "lateral at stride 4"): lambda g: (
        [maps(g, 96, 128), weight(g, 512, 96, 1), *scale_and_shift(g, 512)],
        {"upsampled": maps(g, 512, 64)},
    ),
    ("pyramid_pool", "1, 2, 3, 6"): lambda g: ([maps(g, 768, 16), [1, 2, 3, 6]], {}),
    ("pool_conv_bn_relu", "1, 2, 3, 6"): lambda g: (
        [
            maps(g, 768, 16),
            [1, 2, 3, 6],
            [weight(g, 512, 768, 1) for _ in range(4)],
            *(list(drawn) for drawn in zip(*(scale_and_shift(g, 512) for _ in range(4)), strict=True)),
        ],
        {},
    ),
    ("upsample_add", "stride 8 to 4"): lambda g: ([maps(g, 512, 64), maps(g, 512, 128)], {}),
    ("upsampled_conv3x3", "three levels to stride 4"): lambda g: (
        [[maps(g, 512, size) for size in (64, 32, 16)], [weight(g, 512, 512, 3) for _ in range(3)], (128, 128)],
        {},
    ),
    ("upsample_argmax", "150 classes to 512 x 512"): lambda g: ([logits(g), [(512, 512)]], {}),
    ("upsample_argmax", "150 classes to 683 x 1024"): lambda g: ([logits(g), [(512, 512), (683, 1024)]], {}),
}


def logits(generator: torch.Generator) -> torch.Tensor:
    drawn = torch.randn(1, 150, 128, 128, generator=generator, dtype=torch.float64)
    return drawn.contiguous(memory_format=CHANNELS_LAST)


def changed(arguments: Arguments, change: Callable[[torch.Tensor], torch.Tensor]) -> Arguments:
    """Return arguments with every tensor changed, also inside lists."""

    def of(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return change(value)
        return [of(item) for item in value] if isinstance(value, list) else value

    args, kwargs = arguments
    return [of(value) for value in args], {key: of(value) for key, value in kwargs.items()}


def compared(output: torch.Tensor, truth: torch.Tensor) -> dict[str, Any]:
    """Return the "error", or of labels the number that "differ" among all "pixels"."""
    if not output.is_floating_point():
        return {"differ": int((output != truth).sum()), "pixels": output.numel()}
    return {"error": error(output, truth)}


@pytest.fixture(scope="module")
def results() -> dict[Any, Timed]:
    return {}


def timed(name: str, use: str, dtype: str, rounds: int) -> Timed:
    drawn = OPERATIONS[name, use](torch.Generator().manual_seed(0))
    given = changed(drawn, lambda x: x.to(getattr(torch, dtype)) if x.is_floating_point() else x)
    reference = importlib.import_module(f"fastuper_kernels.ops.{name}").reference
    ours = getattr(fastuper_kernels, name)

    def build(function: Callable[..., Any], arguments: Arguments) -> Callable[[], tuple[Call, Call]]:
        args, kwargs = arguments

        def call() -> Any:
            return function(*args, **kwargs)

        return lambda: (call, call)

    def examine(peer: str, call: Call) -> dict[str, Any]:
        # The truth is the float64 reference of the given operands, already rounded to their dtype.
        args, kwargs = changed(given, lambda x: x.double() if x.is_floating_point() else x)
        return compared(call(), reference(*args, **kwargs))

    calls = (build(reference, changed(given, torch.Tensor.contiguous)), build(reference, given), build(ours, given))
    return alternate(dict(zip(PEERS, calls, strict=True)), rounds, examine)


@pytest.mark.section("operations")
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "use"), list(OPERATIONS), ids=lambda part: readable(part))
def test_operation(name: str, use: str, dtype: str, peer: str, results: dict[Any, Timed], request: Any, report: Any):
    key = (name, use, dtype)
    if key not in results:
        results[key] = timed(name, use, dtype, request.config.getoption("--rounds") or 15)
    task = {
        "name": f"{name}: {use}, {dtype}",
        "section": "operations",
        "order": PEERS,
        "part": name,
        "use": use,
        "dtype": dtype,
    }
    report(task, peer, results[key])

"""Tests of bench.peers.compile_module: modules are compiled, and frozen if asked."""

import shutil

import pytest
import torch
from torch import nn

from bench.peers import compile_module

pytestmark = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="there is no compiler")


@pytest.mark.slow
@pytest.mark.parametrize(
    "order",
    [
        pytest.param((False, True), id="frozen-last", marks=pytest.mark.exhaustive),
        pytest.param((True, False), id="frozen-first"),
    ],
)
def test_freezing_makes_weights_constants(order: tuple[bool, bool]):
    torch._dynamo.reset()
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()).eval()
        x = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
        before = model(x)
        compiled = {freezing: compile_module(model, (x,), "default", freezing) for freezing in order}
        for freezing in order:
            torch.testing.assert_close(compiled[freezing](x), before)
        # The frozen module alone does not read the weights any more.
        model[0].weight.mul_(2.0)
        torch.testing.assert_close(compiled[True](x), before)
        torch.testing.assert_close(compiled[False](x), model(x))

"""timm's ConvNeXt block, accelerated: the function of the library's block, whatever its options."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers import LayerNorm, RmsNorm
from timm.models.convnext import ConvNeXtBlock
from torch import nn

from bench.numerics import error
from fastuper.patch import timm as patch
from tests.models.heads import randomize
from tests.patch.sameness import EXACT

FASTER: dict[str, dict[str, Any]] = {
    "usual": {},
    "kernel and dilation": {"kernel_size": 5, "dilation": 2},
    "ratio": {"mlp_ratio": 2.5},
    "no bias": {"conv_bias": False},
    "no LayerScale": {"ls_init_value": None},
    "stochastic depth": {"drop_path": 0.4},
    "norm without weights": {"norm_layer": partial(LayerNorm, affine=False)},
    "epsilon": {"norm_layer": partial(LayerNorm, eps=0.01)},
    "tanh": {"act_layer": "gelu_tanh"},
    "SiLU": {"act_layer": "silu"},
    "SiLU in place": {"act_layer": partial(nn.SiLU, inplace=True)},
}
CALLED: dict[str, dict[str, Any]] = {
    "stride": {"stride": 2},
    "dilations": {"dilation": (1, 2)},
    "channels": {"out_chs": 16},
    "convolutions": {"conv_mlp": True},
    "GRN": {"use_grn": True},
    "RMSNorm": {"norm_layer": RmsNorm},
    "timm's activation": {"act_layer": "quick_gelu"},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [*FASTER, *CALLED])
def test_every_option_of_the_block(name: str, training: bool) -> None:
    theirs: Any = randomize(ConvNeXtBlock(8, **{**FASTER, **CALLED}[name])).double().train(training)
    ours: Any = copy.deepcopy(theirs)
    ours.__class__ = patch.ConvNeXtBlock
    assert (ours.why_not() == "") == (name in FASTER)
    x = torch.randn(2, 8, 13, 9, dtype=torch.float64)
    results: list[list[Any]] = []
    for block in (theirs, ours):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append([block(x)])
        given = x.clone().requires_grad_()
        block(given).square().mean().backward()
        results[-1] += [given.grad, *(p.grad for p in block.parameters())]
    for expected, result in zip(*results, strict=True):
        assert error(result, expected) < EXACT

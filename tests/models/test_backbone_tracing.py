"""Backbones traced by `torch.export` and `torch.compile` with dynamic sizes, compared with eager runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bench.numerics import error
from bench.pairs import images
from tests.models.pooling import pooling_asks
from tests.models.test_rewrites import build
from tests.parity.models import FAMILIES, VARIATIONS

# No size in OTHERS is a multiple of 32, or of Swin's patches and windows. The traced size has two windows in the last
# stage of a Swin: PyTorch would specialise the graph to a single window.
TRACED = (2, 3, 160, 192)
OTHERS = [(1, 3, 177, 231), (3, 3, 229, 165), (2, 3, 161, 200)]


class Maps(nn.Module):
    """A backbone that returns a list, because a BackboneOutput is not a pytree."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        output = self.backbone(pixel_values, output_hidden_states=True)
        return [*output.feature_maps, *output.hidden_states]


def model(family: str, training: bool, **values: Any) -> nn.Module:
    # A Swin's second block shifts its windows; further blocks of a stage repeat the first ones.
    depths = [2, 1, 2, 1] if family.startswith("swin") else [2, 1, 1, 1]
    backbone = build(family, depths=depths, **values).train(training)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # no pass changes the statistics, so that all passes can be compared
    return Maps(backbone)


def case(family: str, training: bool, name: str = "", **values: Any) -> Any:
    """Trace four families in evaluation, and ConvNeXt in training; the other cases are exhaustive tests."""
    marks = [pytest.mark.slow] * (family == "swin")
    if name or (training and family != "convnext") or family in VARIATIONS:
        marks = [pytest.mark.exhaustive]
    return pytest.param(family, values, training, marks=marks, id=f"{name or family}-{'train' if training else 'eval'}")


CASES = [case(family, training) for training in (False, True) for family in FAMILIES]
CASES += [
    case("swin", training, "swin-positions", use_absolute_embeddings=True, image_size=160) for training in (False, True)
]


def compare(traced: Any, eager: nn.Module) -> None:
    with torch.no_grad():
        for shape in [TRACED, *OTHERS]:
            pixels = images(*shape)
            for result, expected in zip(traced(pixels), eager(pixels), strict=True):
                assert error(result, expected) < 1e-13, shape


def except_for(covered: set[tuple[str, bool]]) -> list[Any]:
    """Return the cases; those whose (family, training) other tests cover are exhaustive tests."""
    return [
        pytest.param(
            *case.values, marks=[*case.marks, *[pytest.mark.exhaustive] * (case.values[::2] in covered)], id=case.id
        )
        for case in CASES
    ]


# A Swin is compiled below. tests/models/test_tracing.py exports a model over a ConvNeXt.
EXPORTED = except_for({("swin", False), ("convnext", False)})


@pytest.mark.parametrize(("family", "values", "training"), EXPORTED)
def test_export_with_dynamic_sizes(family, values, training):
    if family.startswith("resnet") and pooling_asks():
        pytest.skip("this PyTorch exports max pooling for odd or for even sizes only")
    eager, auto = model(family, training, **values), torch.export.Dim.AUTO
    with torch.no_grad():
        program = torch.export.export(eager, (images(*TRACED),), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    compare(program.module(), eager)


# Exported above. tests/models/test_tracing.py compiles a model over a ConvNeXt.
COMPILED = except_for({(family, training) for family in FAMILIES for training in (False, True)})


@pytest.mark.parametrize(("family", "values", "training"), COMPILED)
def test_compile_in_one_graph_for_all_sizes(family, values, training):
    eager, graphs = model(family, training, **values), []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compare(torch.compile(eager, fullgraph=True, dynamic=True, backend=backend), eager)
    # PyTorch compiles a second graph for a batch of 1.
    assert len(graphs) <= (4 if family.startswith("resnet") and pooling_asks() else 2)

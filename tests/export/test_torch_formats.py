"""The formats of PyTorch: torch.export's program, AOTInductor's package, ExecuTorch's program.

And a user's own `torch.export.export`: named ranges, `Dim.AUTO`, `Dim.DYNAMIC`, at sizes of a single window.
"""

from __future__ import annotations

import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from bench.numerics import error
from fastuper.export import ExportError
from fastuper.export.formats import format_of
from fastuper.export.graph import Graph
from fastuper.export.settings import ExportSettings
from fastuper.export.sizes import arrays_of, checked_cases
from fastuper.models.backbones.layers import pad_to
from fastuper.models.backbones.swin_timm import TimmSwinConfig
from fastuper.models.necks.vit_pyramid import Pool, Rescale
from fastuper_kernels.dispatch.modes import for_all_sizes
from tests.models.heads import randomize
from tests.models.test_upernet import BACKBONES as NATIVE
from tests.models.test_upernet import UperNetConfig, UperNetForSemanticSegmentation, ViTPyramidConfig

BACKBONES = {
    **NATIVE,
    "swin_timm": lambda: TimmSwinConfig(64, embed_dim=8, depths=[1, 2, 1, 1], num_heads=[1, 2, 2, 4], window_size=4),
}
exhaustive = pytest.mark.exhaustive


def swin_timm_of_two_stages() -> TimmSwinConfig:
    sizes: Any = {"depths": [2, 1], "num_heads": [1, 2], "window_size": 4}
    return TimmSwinConfig(64, embed_dim=8, out_features=["stage1", "stage2"], **sizes)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def network(family: str, **values: Any) -> Any:
    torch.manual_seed(0)
    values = {"hidden_size": 8, "num_labels": 5, "use_auxiliary_head": False, **values}
    return randomize(UperNetForSemanticSegmentation(UperNetConfig(BACKBONES[family](), **values))).eval()


def check_format(folder: Path, name: str, family: str, bound: float = 2e-5, **options: Any) -> None:
    """Write a model, load it, and compare it with the eager model at the sizes of the proof."""
    settings = ExportSettings(format=name, **options)
    dtype = getattr(torch, settings.dtype)
    graph, format = Graph(network(family).to(dtype), settings).eval(), format_of(name)
    format.write(graph, settings, folder, {"class_names": '["a"]'})
    assert [path.name for path in folder.iterdir()] == list(format.MODEL_FILES)
    run = format.load(folder, settings)
    for case in checked_cases(graph):
        arrays = arrays_of(case, graph)
        with torch.no_grad():
            expected = graph(*(torch.from_numpy(arrays[key]) for key in graph.input_names))
        found = {key: torch.from_numpy(value) for key, value in run(arrays).items()}
        assert list(found) == graph.output_names
        (result,) = found.values()
        if settings.labels:
            assert (result != expected).float().mean() < 1e-3, case
        else:
            assert error(result, expected) < bound, case


@pytest.mark.parametrize(
    "family", [name if name == "resnet" else pytest.param(name, marks=exhaustive) for name in BACKBONES]
)
def test_torch_of_any_size(family, tmp_path):
    check_format(tmp_path, "torch", family)


@exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", BACKBONES)
def test_aoti_of_any_size(family, tmp_path, monkeypatch):
    # To compile four stages of windows takes ten minutes; two have all kinds of windows, and a patch merging.
    monkeypatch.setitem(BACKBONES, "swin_timm", swin_timm_of_two_stages)
    check_format(tmp_path, "aoti", family)


@exhaustive
@pytest.mark.parametrize("family", BACKBONES)
def test_executorch(family, tmp_path):
    pytest.importorskip("executorch", reason="fastuper[executorch] is not installed")
    check_format(tmp_path, "executorch", family, size="67x97")


@exhaustive
@pytest.mark.parametrize("name", ["torch", "aoti", "executorch"])
def test_labels_of_one_size(name, tmp_path):
    if name == "executorch":
        pytest.importorskip("executorch", reason="fastuper[executorch] is not installed")
    check_format(tmp_path, name, "convnext", size="67x97", labels=True)


def test_aoti_without_a_compiler(tmp_path, monkeypatch):
    from torch._inductor import cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    monkeypatch.setattr(subprocess, "check_output", lambda *args, **kwargs: (_ for _ in ()).throw(FileNotFoundError()))
    settings = ExportSettings(format="aoti")
    with pytest.raises(ExportError, match=r"compiles C\+\+, and no compiler works: install one"):
        format_of("aoti").write(Graph(network("convnext"), settings), settings, tmp_path, {})
    assert not list(tmp_path.iterdir())


# A user's own export -------------------------------------------------------------------------------------------------

NAMED = {2: Dim("h", min=32, max=4096), 3: Dim("w", min=32, max=4096)}
SMALL = {2: Dim("h", min=16, max=4096), 3: Dim("w", min=16, max=4096)}
DYNAMIC = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
AUTO = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}


def check_own(model: nn.Module, dims: dict[int, Any], example: tuple[int, int], sizes: Any) -> None:
    batch = 2 if 0 in dims else 1
    with torch.no_grad():
        program = torch.export.export(
            model, (torch.randn(batch, 3, *example),), dynamic_shapes={"pixel_values": dims}, strict=False
        )
        for size in sizes:
            pixels = torch.randn(batch, 3, *size)
            assert error(program.module()(pixels).logits, model(pixels).logits) < 2e-5, size


SIZES = [(32, 32), (33, 47), (97, 131), (224, 224), (64, 449)]
EXAMPLES = [(64, 96), (224, 224), (160, 192)]  # in the first two, maps of some stages are a single window


@exhaustive
@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("family", BACKBONES)
def test_named_ranges(family, example):
    check_own(network(family), NAMED, example, SIZES)


@exhaustive
@pytest.mark.parametrize("dims", [SMALL, DYNAMIC, AUTO], ids=["from-16", "dynamic", "auto"])
@pytest.mark.parametrize("family", BACKBONES)
def test_other_dimensions(family, dims):
    check_own(network(family), dims, (160, 192), SIZES + [(16, 16), (17, 30)] * (dims is SMALL))


@exhaustive
def test_relative_positions_from_one_patch(monkeypatch):
    relative = ViTPyramidConfig(
        64, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, use_relative_position_bias=True
    )
    monkeypatch.setitem(BACKBONES, "vit_pyramid", lambda: relative)
    check_own(network("vit_pyramid"), SMALL, (160, 192), [(16, 16), (17, 30), (64, 64), (97, 131)])


# Steps whose results depend on small sizes ---------------------------------------------------------------------------


class Free(nn.Module):
    """A step that is traced as inside a network."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    @for_all_sizes
    def forward(self, x):
        return self.step(x)


class Padded(nn.Module):
    def forward(self, x):
        return pad_to(x, 2, 2)


@pytest.mark.parametrize(
    "step", [Padded(), Pool(2), Pool(4), Rescale(0.5), Rescale(0.25)], ids=["pad", "pool2", "pool4", "half", "quarter"]
)
def test_steps_of_small_maps(step):
    """The traced step has the eager step's results where a side is shorter than what it reads."""
    dims = {2: Dim("h", min=2, max=64), 3: Dim("w", min=2, max=64)}
    program = torch.export.export(Free(step), (torch.randn(1, 2, 9, 11),), dynamic_shapes=(dims,))
    for size in [(2, 2), (2, 3), (3, 2), (3, 4), (4, 5), (6, 7), (8, 12)]:
        x = torch.randn(1, 2, *size)
        torch.testing.assert_close(program.module()(x), step(x), rtol=1e-6, atol=1e-6)

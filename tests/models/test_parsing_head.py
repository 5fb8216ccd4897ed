"""The head of Unified Perceptual Parsing: against its steps as written, in strips, by need, touched, and traced."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fastuper import UnifiedPerceptualParsingConfig
from fastuper.data.parsing_labels import TASKS
from fastuper.models.heads import strips
from fastuper.models.heads.conv_module import ConvModule
from fastuper.models.heads.parsing import ParsingHead
from fastuper.models.heads.pooling import PreciseRoIPool2d, PyramidPooling
from tests.kernels.common import traced
from tests.models.heads import CHANNELS, error, feature_maps, parsing_as_written, randomize
from tests.models.test_parsing_configuration import LABELS, PARTS
from tests.models.test_width import Shapes, peak

SIZES = {
    "odd": [(17, 22), (9, 11), (5, 6), (3, 3)],
    "even": [(16, 24), (8, 12), (4, 6), (2, 3)],
    "one": [(1, 1), (1, 1), (1, 1), (1, 1)],
    "strips": [(49, 5), (24, 3), (13, 2), (6, 1)],
}
# The official order of pooling, and that of UperNetForSemanticSegmentation.
ORDERS = [
    {"pooling": "precise_roi", "resample_first": True},
    {"pooling": "adaptive", "resample_first": False},
    {"pooling": "adaptive", "resample_first": True},
    {"pooling": "precise_roi", "resample_first": False},
]


def parsing_head(hidden_size: int = 12, **values: Any) -> Any:
    """Return a head in evaluation mode with random weights."""
    small = {"pool_channels": 10, "texture_channels": 14, "labels": LABELS, "object_parts": PARTS}
    config = UnifiedPerceptualParsingConfig(hidden_size=hidden_size, **{**small, **values})
    return randomize(ParsingHead(config, CHANNELS)).eval()


def id_of(values: dict[str, Any]) -> str:
    return "-".join(map(str, values.values()))


@pytest.fixture(params=[False, True], ids=["whole", "strips"])
def in_strips(request, monkeypatch):
    monkeypatch.setattr(strips, "STRIP_BYTES", 0 if request.param else 1 << 40)
    return request.param


def close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert ours
    for task, logits in ours.items():
        assert error(logits, theirs[task]) <= tolerance, task


# Results --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("order", ORDERS, ids=id_of)
def test_the_steps_as_written(order, sizes, in_strips):
    head, maps = parsing_head(**order).double(), feature_maps(sizes=SIZES[sizes], dtype=torch.float64)
    expected = parsing_as_written(head, maps)
    with torch.no_grad():
        assert strips.apply_to(head, maps, head.outputs(TASKS)) == in_strips
        result = head(maps)
    assert list(result) == list(TASKS)
    assert result["scene"].shape == (2, 2)
    assert all(result[task].shape[2:] == maps[0].shape[2:] for task in TASKS[1:])
    close(result, expected, 1e-12)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("order", ORDERS, ids=id_of)
def test_gradients(order, training):
    """Results, gradients and running statistics equal those of the steps as written, also with batch statistics."""
    head, maps = parsing_head(**order).double().train(training), feature_maps(dtype=torch.float64)
    found = []
    for way in (ParsingHead.__call__, parsing_as_written):
        own = copy.deepcopy(head)
        leaves = [x.clone().requires_grad_() for x in maps]
        logits = way(own, leaves)
        sum((i + 1) * x.sin().sum() for i, x in enumerate(logits.values())).backward()
        grads = {name: p.grad for name, p in own.named_parameters()} | {
            f"map {i}": x.grad for i, x in enumerate(leaves)
        }
        found.append({**logits, **grads, **dict(own.named_buffers())})
    ours, theirs = found
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert (value - theirs[name]).abs().max() <= 1e-10 * (1 + theirs[name].abs().max()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_accuracy(dtype, in_strips):
    """The rule of docs/accuracy.md: at most 1.25 times the error of the steps as written."""
    head, maps = parsing_head(64), feature_maps(sizes=SIZES["odd"])
    with torch.no_grad():
        truth = parsing_as_written(copy.deepcopy(head).double(), [x.double() for x in maps])
        head, maps = head.to(dtype), [x.to(dtype) for x in maps]
        wide = {"memory_format": torch.channels_last}
        written = [
            parsing_as_written(head, maps),
            parsing_as_written(copy.deepcopy(head).to(**wide), [x.to(**wide) for x in maps]),
        ]
        result = head(maps)
    for task, logits in result.items():
        assert logits.dtype == dtype
        worst = max(error(other[task], truth[task]) for other in written)
        assert error(logits, truth[task]) <= max(1.25 * worst, 4 * torch.finfo(dtype).eps), task


@pytest.mark.parametrize("tasks", [("object",), ("part", "texture"), ("material", "scene"), ("texture",)], ids=str)
def test_some_tasks(tasks, in_strips):
    head, maps = parsing_head(), feature_maps(sizes=SIZES["strips"])
    with torch.no_grad():
        result, all_tasks = head(maps, tasks), head(maps)
    assert list(result) == [task for task in TASKS if task in tasks]
    close(result, all_tasks, 1e-6)


@pytest.mark.parametrize("rows", [16, 32])
def test_strips_of_any_height(rows, monkeypatch):
    head, maps = parsing_head(), feature_maps(1, [(77, 10), (39, 5), (20, 3), (10, 2)])
    with torch.no_grad():
        expected = head(maps)
        monkeypatch.setattr(strips, "STRIP_BYTES", 4 * 14 * 10 * rows)
        close(head(maps), expected, 1e-6)


def test_no_row_is_computed_twice(monkeypatch):
    rows: dict[int, int] = {}
    fused = ConvModule.fused

    def counted(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = fused(self, *args, **kwargs)
        rows[id(self)] = rows.get(id(self), 0) + result.shape[2]
        return result

    head, maps = parsing_head(), feature_maps(1, SIZES["strips"])
    monkeypatch.setattr(ConvModule, "fused", counted)
    monkeypatch.setattr(strips, "STRIP_BYTES", 0)
    with torch.no_grad():
        head(maps)
    heads = [head.object_head.conv, head.part_head.conv, head.material_head.conv, *head.texture_head.convs]
    assert [rows[id(module)] for module in (head.lateral_convs[0], head.fpn_convs[0], *heads)] == [49] * 7


# By need --------------------------------------------------------------------------------------------------------------

PYRAMID = {"psp_modules", "bottleneck"}
TOP_DOWN = {"lateral_convs.0", "lateral_convs.1", "lateral_convs.2"}
SMOOTH = {"fpn_convs.0", "fpn_convs.1", "fpn_convs.2"}
NEEDS = {
    "scene": PYRAMID | {"scene_head"},
    "object": PYRAMID | TOP_DOWN | SMOOTH | {"fpn_bottleneck", "object_head"},
    "part": PYRAMID | TOP_DOWN | SMOOTH | {"fpn_bottleneck", "part_head"},
    "material": PYRAMID | TOP_DOWN | {"fpn_convs.0", "material_head"},
    "texture": {"texture_head"},
}


@pytest.mark.parametrize("tasks", [("scene",), ("object",), ("part",), ("material",), ("texture",), TASKS], ids=str)
def test_only_what_tasks_need_runs(tasks):
    head, called = parsing_head(), set()
    for name in set().union(*NEEDS.values()):
        head.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
    with torch.no_grad():
        head(feature_maps(), tasks)
    assert called == set().union(*(NEEDS[task] for task in tasks))


def test_a_head_exists_only_for_its_task():
    head = parsing_head(tasks=("material", "scene"))
    assert [name for name in TASKS if hasattr(head, f"{name}_head")] == ["scene", "material"]
    assert list(head(feature_maps())) == ["scene", "material"]
    with pytest.raises(ValueError, match="task 'object' is not known; known are scene, material"):
        head(feature_maps(), ["object"])


@pytest.mark.parametrize("tasks", ["object", [], ["objects"], ["object", "object"]], ids=str)
def test_tasks_that_are_refused(tasks):
    with pytest.raises(ValueError, match="task"):
        parsing_head()(feature_maps(), tasks)


def test_a_single_feature_map_is_refused():
    with pytest.raises(ValueError, match=r"two or more feature maps, got in_channels=\[8\]"):
        ParsingHead(parsing_head().config, [8])


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="pooling must be one of adaptive, precise_roi, got 'max'"):
        PyramidPooling([1], 3, 4, pooling="max")


def test_no_gradient_of_textures_reaches_the_backbone():
    head, maps = parsing_head().train(), [x.requires_grad_() for x in feature_maps()]
    head(maps, ["texture"])["texture"].sum().backward()
    assert all(x.grad is None for x in maps)
    assert all(p.grad is not None for p in head.texture_head.parameters())


def test_modules_have_the_names_of_the_upernet_head():
    branch = parsing_head().psp_modules[1]
    assert isinstance(branch[0], PreciseRoIPool2d)
    assert "output_size=2" in repr(branch)
    assert list(parsing_head().state_dict())[:2] == ["psp_modules.0.1.conv.weight", "psp_modules.0.1.batch_norm.weight"]


# Touched modules ------------------------------------------------------------------------------------------------------


POOLING = ["psp_modules", "psp_modules.1", "psp_modules.2.0", "psp_modules.3.1", "psp_modules.0.1.conv", "bottleneck"]
OTHERS = [
    *("fpn_bottleneck", "object_head.conv", "part_head.classifier", "material_head", "scene_head.conv.batch_norm"),
    *("texture_head.convs", "texture_head.convs.1.activation"),
]


@pytest.mark.parametrize(
    ("name", "order"),
    [*((name, ORDERS[0]) for name in POOLING + OTHERS), *((name, ORDERS[1]) for name in POOLING)],
    ids=lambda value: value if isinstance(value, str) else id_of(value),
)
def test_forward_hooks(name, order, in_strips):
    """The value that a hook returns replaces the module's result; the hooks of the steps as written run too."""
    head, maps = parsing_head(**order), feature_maps()
    with torch.no_grad():
        before = head(maps)
    calls = []

    def hook(module: Any, args: Any, result: Any) -> Any:
        calls.append(module)
        return [1.5 * x + 0.25 for x in result] if isinstance(result, list) else 1.5 * result + 0.25

    head.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        result = head(maps)
        assert len(calls) == 1
        if "head" not in name or name.count(".") > 1 or "classifier" in name or name == "object_head.conv":
            close(result, parsing_as_written(head, maps), 2e-6)
    assert max(error(result[task], before[task]) for task in result) > 1e-3


@pytest.mark.parametrize("order", ORDERS[:2], ids=id_of)
@pytest.mark.parametrize("pooling", [False, True])
def test_align_corners(pooling, order, in_strips):
    head, maps = parsing_head(**order), feature_maps()
    head.align_corners, head.psp_modules.align_corners = True, pooling
    with torch.no_grad():
        close(head(maps), parsing_as_written(head, maps), 2e-6)
        head.psp_modules[1].register_forward_hook(lambda *_: None)  # the branches are called
        close(head(maps), parsing_as_written(head, maps), 2e-6)


def test_a_replaced_branch_has_its_own_pooling():
    head, maps = parsing_head(), feature_maps()
    head.psp_modules[1][0] = nn.AdaptiveMaxPool2d(2)
    head.psp_modules[2][0] = nn.AdaptiveAvgPool2d(3)
    with torch.no_grad():
        close(head(maps), parsing_as_written(head, maps), 2e-6)


# Memory ---------------------------------------------------------------------------------------------------------------


def test_no_wide_map_at_the_finest_level():
    """No tensor of the finest level has more channels than the head's; the fusion makes no concatenation."""
    head, maps = parsing_head(32, texture_channels=32), feature_maps(sizes=SIZES["even"])
    with torch.no_grad(), Shapes() as seen:
        head(maps)
    assert seen.shapes
    assert max(shape[1] for shape in seen.shapes if len(shape) == 4 and shape[2:] == (16, 24)) == 32


def test_memory_of_strips_does_not_grow_with_the_map(monkeypatch):
    """Apart from the coarser levels and the logits, memory holds strips instead of maps."""
    monkeypatch.setattr(strips, "STRIP_BYTES", 4 * 64 * 40 * 16)
    head = parsing_head(64, texture_channels=64)

    def run(factor: int) -> int:
        x, above, *levels = feature_maps(1, [(factor * 40, 40), (4, 4), (4, 4), (4, 4)], [8, 64, 64, 64])
        outputs = head.outputs(("object", "part", "material"))
        texture = head.outputs(("texture",))["texture"]
        with torch.no_grad():
            call = lambda: (strips.tail(head, x, above, [above, *levels], outputs), strips.of_feature_map(x, texture))  # noqa: E731
            call()
            logits = sum(result.numel() for result in call()[0].values()) + call()[1].numel()
            return peak(call) - 4 * logits

    assert run(8) < 1.1 * run(2)


# Traced ---------------------------------------------------------------------------------------------------------------


class Listed(nn.Module):
    """A head that takes its maps as separate arguments, as tracers require."""

    def __init__(self, head: nn.Module, tasks: Any = None):
        super().__init__()
        self.head, self.tasks = head, tasks

    def forward(self, *maps: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.head(maps, self.tasks)


def test_the_traced_way():
    """Under a tracer the operations take other ways; here with real values."""
    for order in ORDERS:
        head, maps = parsing_head(**order).double(), feature_maps(dtype=torch.float64)
        with torch.no_grad():
            close(traced(head, maps), head(maps), 1e-12)


@pytest.mark.exhaustive
def test_compiled():
    torch._dynamo.reset()
    head = parsing_head()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for sizes in ("odd", "strips"):
            maps = feature_maps(sizes=SIZES[sizes])
            close(compiled(maps), head(maps), 2e-6)


@pytest.mark.exhaustive
def test_exported():
    """One exported program takes maps of any size."""
    head = Listed(parsing_head())
    sizes = tuple({2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO} for _ in CHANNELS)
    with torch.no_grad():
        program = torch.export.export(head, tuple(feature_maps()), dynamic_shapes=(sizes,))
        for name in ("odd", "even", "strips"):
            maps = feature_maps(sizes=SIZES[name])
            close(program.module()(*maps), head(*maps), 2e-6)


@pytest.mark.exhaustive
def test_compiled_training():
    torch._dynamo.reset()
    head = parsing_head().train()
    compiled = torch.compile(copy.deepcopy(head), fullgraph=True, backend="aot_eager")
    maps = feature_maps()
    found = []
    for way in (head, compiled):
        logits = way(maps)
        sum(x.sin().sum() for x in logits.values()).backward()
        found.append({**logits, **{name.removeprefix("_orig_mod."): p.grad for name, p in way.named_parameters()}})
    for name, value in found[0].items():
        assert (value - found[1][name]).abs().max() <= 1e-4 * (1 + value.abs().max()), name


def test_gradient_checkpointing():
    maps, found = feature_maps(dtype=torch.float64), []
    for checkpointed in (False, True):
        head = parsing_head().double().train()
        head.gradient_checkpointing = checkpointed
        logits = head(maps, ("scene", "object"))
        sum(x.sin().sum() for x in logits.values()).backward()
        grads = {name: p.grad for name, p in head.named_parameters() if p.grad is not None}
        found.append({**logits, **grads, **dict(head.named_buffers())})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert torch.allclose(value.double(), found[1][name].double(), rtol=1e-10, atol=1e-10), name

"""Each private PyTorch API of `torch_private` exists, and behaves as its reason says."""

from __future__ import annotations

import ast
import copy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fastuper
import fastuper_kernels
from fastuper_kernels.dispatch import torch_private
from tests.kernels.common import random

# Modes and transforms -------------------------------------------------------------------------------------------------


def test_has_modes():
    assert not torch_private.has_modes()
    with torch._subclasses.FakeTensorMode():
        assert torch_private.has_modes()
    with FlopCounterMode(display=False):
        assert torch_private.has_modes()
    found = []
    make_fx(lambda x: found.append(torch_private.has_modes()) or x + 1)(torch.ones(1))
    assert found == [True]
    with torch.device("cpu"):
        assert not torch_private.has_modes(), "the mode of torch.device counts"


def test_has_modes_counts_function_modes():
    class Function(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Function():
        assert torch_private.has_modes()
    assert not torch_private.has_modes()


def test_in_transform():
    found = []

    def record(x):
        found.append(torch_private.in_transform())
        return x.sum()

    assert not torch_private.in_transform()
    torch.func.vmap(record)(torch.ones(2, 2))
    torch.func.grad(record)(torch.ones(2))
    torch.func.jvp(record, (torch.ones(2),), (torch.ones(2),))
    torch.func.functionalize(record)(torch.ones(2))
    assert found == [True] * 4


def test_in_forward_ad():
    assert not torch_private.in_forward_ad()
    with forward_ad.dual_level():
        assert torch_private.in_forward_ad()
    assert not torch_private.in_forward_ad()


def test_is_batched():
    found = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            found.append((torch_private.is_batched(grad), torch_private.in_transform()))
            return 2 * grad

    x = torch.ones(3, requires_grad=True)
    torch.autograd.grad(Double.apply(x), x, torch.ones(3))
    torch.autograd.grad(Double.apply(x), x, torch.eye(3), is_grads_batched=True)
    assert [batched for batched, _ in found] == [False, True]
    assert not found[0][1]


def test_in_ddp():
    assert torch.nn.parallel.DistributedDataParallel._active_ddp_module is None
    assert not torch_private.in_ddp()


def test_in_ddp_during_a_forward_pass(tmp_path):
    found = []

    class Model(nn.Linear):
        def forward(self, x):
            found.append(torch_private.in_ddp())
            return super().forward(x)

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        nn.parallel.DistributedDataParallel(Model(2, 2))(torch.ones(1, 2))
    finally:
        torch.distributed.destroy_process_group()
    assert found == [True]
    assert not torch_private.in_ddp()


class FirstRows(nn.Module):
    """A convolution of the first quarter of the rows: a single row of a map of four."""

    def __init__(self, context):
        super().__init__()
        self.context, self.weight = context, nn.Parameter(random(3, 2, 3, 3))

    def forward(self, x):
        with self.context():
            rows = F.interpolate(x, size=(x.shape[2] // 4, 5), mode="bilinear")
            return F.conv2d(rows.contiguous(memory_format=torch.channels_last), self.weight, padding=1)


def test_free_sizes():
    shapes = ({2: torch.export.Dim("h", min=4, max=64)},)
    for height in (4, 12):  # without the context, the program is for one row, or for more than one
        with pytest.raises(Exception, match="Constraints violated"):
            torch.export.export(FirstRows(nullcontext), (random(1, 2, height, 6),), dynamic_shapes=shapes)
        module = FirstRows(torch_private.free_sizes)
        program = torch.export.export(module, (random(1, 2, height, 6),), dynamic_shapes=shapes)
        for other in (4, 8, 21):
            x = random(1, 2, other, 6)
            torch.testing.assert_close(program.module()(x), module(x))


# Memory ---------------------------------------------------------------------------------------------------------------


def test_storage_id():
    x, other = torch.ones(4, 4), torch.ones(4, 4)
    views = (x, x[1:], x.t(), x.detach(), nn.Parameter(x))
    assert len({torch_private.storage_id(view.untyped_storage()) for view in views}) == 1
    assert torch_private.storage_id(other.untyped_storage()) != torch_private.storage_id(x.untyped_storage())
    empty = torch.empty(0), torch.empty(0)
    assert empty[0].data_ptr() == empty[1].data_ptr() == 0
    assert len({torch_private.storage_id(tensor.untyped_storage()) for tensor in empty}) == 2


# Operators ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "algorithm", "function"),
    [
        ("none", "", lambda x: x),
        ("relu", "", F.relu),
        ("gelu", "none", F.gelu),
        ("gelu", "tanh", lambda x: F.gelu(x, approximate="tanh")),
    ],
    ids=["none", "relu", "gelu", "gelu-tanh"],
)
@pytest.mark.parametrize("biased", [False, True])
def test_mkldnn_linear(biased, activation, algorithm, function):
    assert torch_private.has_mkldnn_linear() == torch.backends.mkldnn.is_available()
    if not torch_private.has_mkldnn_linear():
        pytest.skip("a build of PyTorch without oneDNN")
    x, weight, bias = random(5, 8).float(), random(3, 8, seed=1).float(), random(3, seed=2).float()
    bias = bias if biased else None
    ours = torch_private.mkldnn_linear(x, weight, bias, activation, algorithm)
    torch.testing.assert_close(ours, function(F.linear(x, weight, bias)))


@pytest.mark.parametrize("biased", [False, True])
def test_mkldnn_linear_add(biased):
    if not torch_private.has_mkldnn_linear():
        pytest.skip("a build of PyTorch without oneDNN")
    x, weight, bias = random(5, 8).float(), random(3, 8, seed=1).float(), random(3, seed=2).float()
    other, bias = random(5, 3, seed=3).float(), bias if biased else None
    before = other.clone()
    ours = torch_private.mkldnn_linear_add(x, other, weight, bias)
    torch.testing.assert_close(ours, F.linear(x, weight, bias) + other)
    assert torch.equal(other, before)


def test_lerp_each_():
    targets, sources = [random(3), random(2, 2, seed=1)], [random(3, seed=2), random(2, 2, seed=3)]
    expected = [target + 0.25 * (source - target) for target, source in zip(targets, sources, strict=True)]
    torch_private.lerp_each_(targets, sources, 0.25)
    for target, wanted in zip(targets, expected, strict=True):
        torch.testing.assert_close(target, wanted)


def test_copy_each_():
    targets, sources = [torch.zeros(3), torch.zeros(2)], [torch.ones(3), torch.ones(2)]
    torch_private.copy_each_(targets, sources)
    assert all(map(torch.equal, targets, sources))


# Modules --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_batch_norm(kind):
    assert isinstance(kind(3), torch_private.BatchNorm)
    assert not isinstance(nn.InstanceNorm2d(3), torch_private.BatchNorm)
    assert not isinstance(nn.GroupNorm(1, 3), torch_private.BatchNorm)


def test_parameter_classes():
    """Ordinary parameters, and the tensors that stand for them in an export."""
    found = []

    class Model(nn.Linear):
        def forward(self, x):
            found.append(type(torch_private.parameters_of(self)["weight"]))
            return super().forward(x)

    Model(2, 2)(torch.ones(1, 2))
    torch.export.export(Model(2, 2), (torch.ones(1, 2),), strict=False)
    assert nn.Parameter in found
    assert set(found) <= set(torch_private.PARAMETER_CLASSES), found
    with torch._subclasses.FakeTensorMode() as mode:
        assert type(mode.from_tensor(torch.ones(1))) in torch_private.PARAMETER_CLASSES

    class Quantised(torch.Tensor):
        pass

    assert type(torch.ones(1).as_subclass(Quantised)) not in torch_private.PARAMETER_CLASSES


REGISTER = {
    "_forward_hooks": "register_forward_hook",
    "_forward_pre_hooks": "register_forward_pre_hook",
    "_backward_hooks": "register_full_backward_hook",
    "_backward_pre_hooks": "register_full_backward_pre_hook",
}


@pytest.mark.parametrize("name", REGISTER.values())
def test_hooks_of(name):
    module = nn.Linear(2, 2)
    tables = torch_private.hooks_of(module)
    assert len(tables) == 4
    assert not any(tables)
    assert not torch_private.has_hooks(module)
    handle = getattr(module, name)(lambda *_: None)
    assert torch_private.has_hooks(module)
    assert sum(map(len, tables)) == 1, "the tables are not live"
    handle.remove()
    assert not torch_private.has_hooks(module)


@pytest.mark.parametrize("name", REGISTER.values())
def test_global_hooks(name):
    tables = torch_private.global_hooks()
    assert len(tables) == 4
    assert not any(tables)
    assert not torch_private.has_global_hooks()
    handle = getattr(nn.modules.module, name.replace("register_", "register_module_"))(lambda *_: None)
    try:
        assert torch_private.has_global_hooks()
        assert sum(map(len, tables)) == 1, "the tables are not live"
    finally:
        handle.remove()
    assert not torch_private.has_global_hooks()


def test_tables_of_a_module():
    """The tables are live, hold None, and a state dict follows them."""
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2, bias=False))
    assert dict(torch_private.children_of(model)) == {"0": model[0], "1": model[1]}
    assert torch_private.parameters_of(model[1])["bias"] is None
    buffers = torch_private.buffers_of(model[0])
    assert set(buffers) == {"running_mean", "running_var", "num_batches_tracked"}
    buffers["running_mean"] = torch.full((2,), 7.0)
    assert torch.equal(model[0].running_mean, torch.full((2,), 7.0))
    assert torch.equal(model.state_dict()["0.running_mean"], torch.full((2,), 7.0))
    weight = nn.Parameter(torch.zeros(2, 2))
    torch_private.parameters_of(model[1])["weight"] = weight
    assert model[1].weight is weight
    torch_private.children_of(model)["1"] = nn.Identity()
    assert isinstance(copy.copy(model)[1], nn.Identity)


# Pytrees --------------------------------------------------------------------------------------------------------------


def test_register_pytree():
    class Pair:
        def __init__(self, first, second):
            self.first, self.second = first, second

    torch_private.register_pytree(
        Pair,
        lambda pair: ([pair.first, pair.second], None),
        lambda values, _: Pair(*values),
        lambda pair: (
            [(torch_private.MappingKey("first"), pair.first), (torch_private.MappingKey("second"), pair.second)],
            None,
        ),
        "tests.kernels.Pair",
    )
    pytree = torch.utils._pytree
    values, spec = pytree.tree_flatten(Pair(1, 2))
    assert values == [1, 2]
    assert pytree.tree_unflatten(values, pytree.treespec_loads(pytree.treespec_dumps(spec))).second == 2
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(Pair(1, 2))[0]]
    assert paths == ["['first']", "['second']"]


# Other files ---------------------------------------------------------------------------------------------------------


def private_names(path: Path) -> set[str]:
    """Return the private names of torch that a file imports or reads as attributes of `torch`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "torch"}
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name.split(".")[0] in ("torch", "forward_ad") and "(" not in name:
                found.add(name)
            elif node.attr in ("_cdata", "_parameters", "_buffers", "_modules"):
                found.add(node.attr)
    return {name for name in found if any(p.startswith("_") and not p.startswith("__") for p in name.split("."))}


@pytest.mark.parametrize("package", [fastuper, fastuper_kernels], ids=lambda package: package.__name__)
def test_no_other_file_uses_a_private_name(package):
    # The scripts of exported models run without the packages.
    files = [path for path in sorted(Path(package.__file__).parent.rglob("*.py")) if path.parent.name != "scripts"]
    assert len(files) > 30
    found = {path.name: names for path in files if (names := private_names(path))}
    assert set(found) == ({"torch_private.py"} if package is fastuper_kernels else set()), found

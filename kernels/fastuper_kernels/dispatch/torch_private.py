"""Each private PyTorch API in use, behind one small name, with the reason and the PyTorch versions it was seen in.

Nothing else in `fastuper_kernels` or `fastuper` uses a private name of PyTorch. If a new PyTorch renames or changes a
private API, the API's test in `tests/kernels/test_torch_private.py` fails. All of them exist in PyTorch 2.11 and
2.14.1.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx.experimental._config
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn.modules import module as _module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree
from torch.utils._device import DeviceContext

# Modes and transforms -------------------------------------------------------------------------------------------------


def has_modes() -> bool:
    """Return True if a mode intercepts operators: FakeTensorMode, make_fx, FlopCounterMode or another.

    The mode of `torch.device` and `torch.set_default_device` does not count: it only places new tensors.

    Reason: `torch.overrides` and `torch.utils._python_dispatch` have no public function that returns the active modes.
    """
    if torch._C._len_torch_dispatch_stack():
        return True
    return any(type(mode) is not DeviceContext for mode in torch.overrides._get_current_function_mode_stack())


def in_transform() -> bool:
    """Return True inside a transform of torch.func: vmap, grad, jvp, functionalize.

    Reason: torch.func has no public function that returns the active transforms.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None


def in_forward_ad() -> bool:
    """Return True inside `torch.autograd.forward_ad.dual_level()`, where tensors carry tangents.

    Reason: a tangent exists although nothing requires grad, and no public function returns the current level.
    """
    return forward_ad._current_level >= 0


def is_batched(x: torch.Tensor) -> bool:
    """Return True if x holds several gradients at once: autograd's `is_grads_batched=True`.

    Reason: autograd maps a backward pass over a batch of gradients by tensors of a class of its own, outside any
    torch.func transform. Operators that write to given memory fail on these tensors.
    """
    result: bool = torch._C._functorch.is_legacy_batchedtensor(x)
    return result


def in_ddp() -> bool:
    """Return True while DistributedDataParallel runs the forward pass of a module.

    Reason: DDP waits for a gradient of each parameter that the output can reach, and has no public flag.
    """
    return torch.nn.parallel.DistributedDataParallel._active_ddp_module is not None


@contextmanager
def free_sizes() -> Iterator[None]:
    """A context in which torch.export takes no free size for 1 because it is 1 in the example, nor for larger than 1.

    The network's own comparisons of sizes are recorded as always; only choices of layouts and kernels are not.

    Reason: the number of windows of a small map, or its rows, may be 1. PyTorch makes it a constant, or refuses it.
    `torch.onnx.export` uses the first private setting here; torch.export has no public one.
    """
    with torch.fx.experimental._config.patch(backed_size_oblivious=True), _UnguardedChoices():  # type: ignore[attr-defined]
        yield


class _UnguardedChoices(torch.overrides.TorchFunctionMode):
    """Runs the operators that choose a memory layout or a kernel by sizes, without guards on these sizes.

    The choice is made again when the graph runs. The layout of a map of one row, for example, is ambiguous.
    """

    operators = frozenset(
        {
            torch.conv2d,
            torch.conv_transpose2d,
            torch.nn.functional.interpolate,
            torch.nn.functional.scaled_dot_product_attention,
            torch.Tensor.contiguous,
        }
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        chooses = func in self.operators and kwargs.get("scale_factor") is None  # a factor computes a size
        # The sizes of tensors, and those given as arguments, such as the size that a table is resampled to.
        leaves = _pytree.tree_leaves((args, kwargs)) if chooses else []
        sides = (side for leaf in leaves for side in (leaf.shape if isinstance(leaf, torch.Tensor) else [leaf]))
        for side in (side for side in sides if isinstance(side, torch.SymInt)):
            environment: Any = side.node.shape_env
            with environment.suppress_guards():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def check_size(condition: Any) -> None:
    """Tell a tracer that a condition on sizes holds; raise RuntimeError where it does not.

    Reason: the documented function has an underscore in its name.
    """
    torch._check(condition)


# Compiled packages ----------------------------------------------------------------------------------------------------


def aoti_compile(program: Any, configs: dict[str, Any]) -> bytes:
    """Compile a program of torch.export; return the package of AOTInductor, the content of a .pt2 file.

    Args:
        program: the program.
        configs: Inductor's options.

    Reason: the documented functions for packages are in a private module. Inductor notes what holds for the example's
    sizes, such as maps of more than one row, and simplifies sizes by it, but a package does not check it.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # it takes time to import

    file = io.BytesIO()  # on a full disk PyTorch's own file ends the process
    with ShapeEnv().suppress_guards():  # of this thread, whatever the instance
        torch._inductor.aoti_compile_and_package(program, package_path=file, inductor_configs=configs)
    return file.getvalue()


def aoti_load(path: str) -> Any:
    """Return the function of a package of AOTInductor. Reason: see `aoti_compile`."""
    return torch._inductor.aoti_load_package(path)


def has_cpp_compiler() -> bool:
    """Return True if Inductor finds a C++ compiler. Reason: PyTorch has no public function that says so."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


# Memory ---------------------------------------------------------------------------------------------------------------


def storage_id(storage: torch.UntypedStorage) -> int:
    """Return the address of the storage object in C++: equal for all tensors that share it, whatever their offset.

    Reason: `data_ptr()` is 0 for every empty storage, and `id()` is that of a Python wrapper, which may be short-lived.
    """
    return storage._cdata


# Operators ------------------------------------------------------------------------------------------------------------


def has_mkldnn_linear() -> bool:
    """Return True if this build of PyTorch has oneDNN's linear layer with a fused activation or addition.

    Reason: PyTorch registers the operator for torch.compile (Inductor) only, under a private name.
    """
    return bool(torch.backends.mkldnn.is_available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def mkldnn_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str, algorithm: str
) -> torch.Tensor:
    """Return `activation(x @ weight.T + bias)` by oneDNN, the activation applied while the result is in registers.

    Args:
        x: (N, C_in), contiguous.
        weight: (C_out, C_in), contiguous.
        bias: (C_out,), contiguous: the operator ignores its strides.
        activation: "none", "gelu" or "relu".
        algorithm: for "gelu" "none" or "tanh", else "".

    Reason: see `has_mkldnn_linear`.
    """
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, activation, [], algorithm)
    return result


def mkldnn_linear_add(
    x: torch.Tensor, other: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return `x @ weight.T + bias + other` by oneDNN, the addition done while the result is in registers.

    Args:
        x: (N, C_in), contiguous.
        other: (N, C_out), contiguous.
        weight: (C_out, C_in), contiguous.
        bias: (C_out,), contiguous: the operator ignores its strides.

    Reason: see `has_mkldnn_linear`.
    """
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, "add")
    return result


def lerp_each_(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], weight: float) -> None:
    """Set each target to `target + weight * (source - target)`, in place; one launch for many tensors on a GPU.

    Reason: the public `Tensor.lerp_` is one launch a tensor. `torch.optim.swa_utils` uses the same private function.
    """
    torch._foreach_lerp_(list(targets), list(sources), weight)


def copy_each_(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each source to its target, in place; one launch for many tensors on a GPU.

    Reason: the public `Tensor.copy_` is one launch a tensor.
    """
    torch._foreach_copy_(list(targets), list(sources))


# Modules --------------------------------------------------------------------------------------------------------------

# The base class of BatchNorm1d, BatchNorm2d, BatchNorm3d and SyncBatchNorm.
# Reason: these four have no public base class. Lazy and third-party BatchNorms derive from this class too.
BatchNorm: type[torch.nn.Module] = _BatchNorm

# The classes of an ordinary parameter. Under a tracer (torch.export, AOTAutograd) the last two classes stand for it.
# Reason: the tracers have no public name for their tensors.
PARAMETER_CLASSES = (torch.Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


def global_hooks() -> list[dict[int, Any]]:
    """Return the live tables of the hooks on all modules, such as `register_module_forward_hook` fills.

    Reason: PyTorch has no public list of the registered hooks.
    """
    return [getattr(_module, name) for name in _GLOBAL_HOOKS]


def hooks_of(module: torch.nn.Module) -> list[dict[int, Any]]:
    """Return the live tables of a module's own hooks: before and after its forward and its backward pass.

    Reason: see `global_hooks`.
    """
    return [getattr(module, name) for name in _HOOKS]


def has_global_hooks() -> bool:
    """Return True if a hook is registered on all modules. Reason: see `global_hooks`."""
    return any(getattr(_module, name) for name in _GLOBAL_HOOKS)


def has_hooks(module: torch.nn.Module) -> bool:
    """Return True if a hook is registered on this module.

    Reason: see `global_hooks`. A module that was unpickled from an old version may lack a table, and then has no hook.
    """
    return any(module.__dict__.get(name) for name in _HOOKS)


def parameters_of(module: torch.nn.Module) -> dict[str, torch.nn.Parameter | None]:
    """Return the live table of a module's own parameters, None included; a change of the table changes the module.

    Reason: `named_parameters` skips None and repeated tensors, cannot be written to, and takes longer.
    """
    return module._parameters


def buffers_of(module: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    """Return the live table of a module's own buffers, None included; a change of the table changes the module.

    Reason: see `parameters_of`. A write to the table keeps a non-persistent buffer out of the state dict.
    """
    return module._buffers


def children_of(module: torch.nn.Module) -> dict[str, torch.nn.Module | None]:
    """Return the live table of a module's children, None included; a change of the table changes the module.

    Reason: `named_children` skips None and repeated modules, and cannot be written to.
    """
    return module._modules


# Pytrees --------------------------------------------------------------------------------------------------------------

# The key of a mapping's entry in the path of a leaf. Reason: see `register_pytree`.
MappingKey: Any = _pytree.MappingKey


def register_pytree(
    kind: type[Any],
    flatten: Callable[[Any], tuple[list[Any], Any]],
    unflatten: Callable[[Any, Any], Any],
    flatten_with_keys: Callable[[Any], tuple[list[Any], Any]],
    name: str,
) -> None:
    """Register a class as a pytree, so that DDP, torch.export and torch.compile find the tensors inside.

    Args:
        kind: the class.
        flatten: from an instance to (leaves, context).
        unflatten: from leaves and a context to an instance.
        flatten_with_keys: from an instance to (pairs of key and leaf, context).
        name: the class's name in a saved program; it stays the same from release to release.

    Reason: the public `torch.export.register_dataclass` takes dataclasses whose fields are the leaves, and no others.
    """
    _pytree.register_pytree_node(
        kind, flatten, unflatten, serialized_type_name=name, flatten_with_keys_fn=flatten_with_keys
    )

"""Detects hooked, replaced or quantised modules, which must run unmodified.

LoRA, pruning, quantisation, hooks, offloading and parametrizations replace a module or hook it. A faster way may stand
in for a module only if nobody has touched the module.
"""

from __future__ import annotations

from torch import nn

from fastuper_kernels.dispatch.torch_private import (
    PARAMETER_CLASSES,
    children_of,
    has_global_hooks,
    has_hooks,
    parameters_of,
)

KNOWN: set[type[nn.Module]] = set()
"""Classes of other libraries whose `forward` this library knows; `fastuper.patch` adds them."""

HOOKED = "a hook is registered on it"


def is_untouched(*modules: nn.Module) -> bool:
    """Return True if no hook, subclass or parametrization changes these modules. Their children are not checked.

    A module is touched in these cases. A hook is registered on it or on all modules. Its instance has another
    `forward`. Its class is neither PyTorch's nor this library's, nor in `KNOWN`. It has parametrizations. One of its
    parameters is not an ordinary tensor (it is quantised, for example).
    """
    return not any(touched_by(module) for module in modules)


def touched_by(module: nn.Module) -> str:
    """Return what makes `is_untouched(module)` False, in words; "" if it is True."""
    kind = type(module)
    if has_global_hooks():
        return "a hook is registered on all modules"
    if kind.__module__.split(".")[0] not in ("torch", "fastuper") and kind not in KNOWN:
        return f"its class is {kind.__name__} of {kind.__module__.split('.')[0]}"
    if "parametrizations" in children_of(module):
        return "it has parametrizations"
    if is_replaced(module):
        return "its forward was replaced"
    if has_hooks(module):
        return HOOKED
    for parameter in parameters_of(module).values():
        if parameter is not None and type(parameter) not in PARAMETER_CLASSES:
            return f"a parameter is of the class {type(parameter).__name__}"
    return ""


def is_hooked_inside(module: nn.Module) -> bool:
    """Return True if a hook is registered on a module, on one of the modules inside it, or on all modules."""
    return has_global_hooks() or any(has_hooks(part) for part in module.modules())


def is_replaced(module: nn.Module) -> bool:
    """Return True if the instance has a `forward` other than its class's.

    Accelerate, when it removes its hooks, leaves the class's own `forward` on the instance.
    """
    forward = module.__dict__.get("forward")
    if forward is None:
        return False
    return getattr(forward, "__func__", None) is not type(module).forward or forward.__self__ is not module


def is_exactly(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return True if a module is untouched and its class is `kind` itself, not a subclass."""
    return type(module) is kind and is_untouched(module)


def is_supported_conv(conv: nn.Module) -> bool:
    """Return True if a module is an untouched convolution that `conv_bn_relu` supports: 1x1 or 3x3, stride 1."""
    return (
        is_exactly(conv, nn.Conv2d)
        and (conv.kernel_size, conv.padding) in (((1, 1), (0, 0)), ((3, 3), (1, 1)))
        and (conv.stride, conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), (1, 1), 1, "zeros")
    )

"""Fixtures of the tests of Triton's kernels, on a GPU or in Triton's interpreter: `TRITON_INTERPRET=1 pytest ...`.

The variable must be set before Triton is imported. So without a GPU these tests run in a process of their own, and are
skipped in a process without the variable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from bench.numerics import float32_as
from fastuper_kernels.dispatch.backend import interpreted
from tests.kernels.conftest import poisoned_memory as poisoned_memory  # new memory is filled with NaN here too


def pytest_collection_modifyitems(items: list[Any]) -> None:
    if torch.cuda.is_available() or interpreted():
        return
    for item in items:
        if item.path.parent.name == "interpreted":
            item.add_marker(pytest.mark.skip(reason="no GPU, and TRITON_INTERPRET=1 is not set"))


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Compute in IEEE float32 on a GPU: PyTorch's default for convolutions is TF32."""
    with float32_as("ieee"):
        yield


@pytest.fixture(autouse=True, scope="session")
def mended_interpreter() -> None:
    """Patch the interpreter: it multiplies the bits of bfloat16 as integers, and prepares the language at each call."""
    if not interpreted():
        return
    from triton.language import bfloat16, core
    from triton.runtime import interpreter

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != bfloat16:
            return handle.data.astype(np.float32)
        return (handle.data.astype(np.uint32) << 16).view(np.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        return interpreter.TensorHandle(np.matmul(wide(a), wide(b)) + d.data, d.dtype.scalar)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if core.is_builtin(core.arange):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpreterBuilder.create_dot = create_dot
    # On a GPU the minimum of a number and NaN is the number; in Triton 3.6's interpreter it is NaN.
    interpreter.InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    interpreter.InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    # The interpreter prepares the language at every call of a helper, which takes most of its time. Once is enough.
    interpreter.InterpretedFunction.__call__ = call
    interpreter.InterpretedFunction.run = with_room(interpreter.InterpretedFunction.run)


def with_room(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with a large frame, so that its calls have space on Python's stack.

    The stack grows by chunks of 16 KB, and an empty chunk is freed at once. Repeated calls at the edge of a chunk take
    three times as long.
    """

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    wrapper.__code__ = wrapper.__code__.replace(co_stacksize=1 << 16)
    return wrapper


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use few, large programs for the loss of an image: the interpreter runs programs one after the other."""
    if not interpreted():
        return
    from fastuper_kernels.gpu import upsample_cross_entropy

    for name, size in {"PIXELS": 128, "PIXELS_BACK": 128, "ROWS": 16, "COLUMNS": 32}.items():
        monkeypatch.setattr(upsample_cross_entropy, name, size)

"""Triton's kernels, on a GPU where there is one, and else by Triton's interpreter: `TRITON_INTERPRET=1 pytest ...`.

The interpreter has to be chosen before Triton is imported, so that these tests run in processes of their own; in others
they are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from bench.numerics import float32_as
from fastuper_kernels.dispatch.backend import interpreted
from tests.kernels.conftest import poisoned_memory as poisoned_memory  # what is allocated is filled with NaN here too


def pytest_collection_modifyitems(items: list[Any]) -> None:
    if torch.cuda.is_available() or interpreted():
        return
    for item in items:
        if item.path.parent.name == "interpreted":
            item.add_marker(pytest.mark.skip(reason="no GPU, and TRITON_INTERPRET=1 is not set"))


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Have a GPU take float32 as it is: PyTorch's own default for convolutions is TF32."""
    with float32_as("ieee"):
        yield


@pytest.fixture(autouse=True, scope="session")
def mended_interpreter() -> None:
    """Have the interpreter multiply bfloat16 numbers, where it multiplies their 16 bits as integers; and be quicker."""
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
    # A GPU's minimum of a number and NaN is the number; that of Triton 3.6's interpreter was NaN.
    interpreter.InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    interpreter.InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    # It prepares the language at every call of a helper, most of its time: once is enough.
    interpreter.InterpretedFunction.__call__ = call
    interpreter.InterpretedFunction.run = with_room(interpreter.InterpretedFunction.run)


def with_room(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with space for its calls on Python's stack.

    The stack grows by pieces of 16 KB, and a piece is given back as soon as it is empty: a call at the edge of one,
    over and over, takes three times as long.
    """

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    wrapper.__code__ = wrapper.__code__.replace(co_stacksize=1 << 16)
    return wrapper


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the loss of a whole image take few programs, where the interpreter runs them one after the other."""
    if not interpreted():
        return
    from fastuper_kernels.gpu import upsample_cross_entropy

    for name, size in {"PIXELS": 128, "PIXELS_BACK": 128, "ROWS": 16, "COLUMNS": 32}.items():
        monkeypatch.setattr(upsample_cross_entropy, name, size)

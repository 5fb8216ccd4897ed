"""Maps of more than 2^31 elements: no offset is computed in 32 bits.

The interpreter runs only the last programs. Memory is allocated lazily: only the pages that these programs touch exist.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import fastuper_kernels as ops
from fastuper_kernels.dispatch.backend import interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, CHANNELS, SIZE = 1030, 512, 64  # 2.16e9 elements


def zeros(*shape: Any, dtype: torch.dtype = torch.float16, **_: Any) -> torch.Tensor:
    if len(shape) == 1 and not isinstance(shape[0], int):
        (shape,) = shape
    if DEVICE == "cuda":
        return torch.zeros(shape, dtype=dtype, device=DEVICE)
    kind = {torch.float16: np.float16, torch.float32: np.float32, torch.int64: np.int64}[dtype]
    return torch.from_numpy(np.zeros(shape, dtype=kind))


@pytest.fixture(autouse=True)
def last_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cuda":
        if torch.cuda.mem_get_info()[0] < 24 << 30:
            pytest.skip("needs 24 GB of a GPU's memory")
        return
    from triton.runtime import interpreter

    def last(*args: int) -> range:
        whole = builtins.range(*args)
        is_grid = sys._getframe(1).f_code is interpreter.GridExecutor.__call__.__code__
        if not is_grid or len(whole) <= 8:  # all blocks of channels
            return whole
        return whole[-2:] if len(whole) < 2000 else whole[-10:]  # images, rows or columns, or tiles of all pixels

    monkeypatch.setattr(interpreter, "range", last, raising=False)

    def new_empty(tensor: torch.Tensor, *shape: Any, **kwargs: Any) -> torch.Tensor:
        return zeros(*shape, **{"dtype": tensor.dtype, **kwargs})

    assert interpreted()
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    # Zeros: filling 4.3 GB with NaN takes 10 s, and the pages would exist.
    monkeypatch.setattr(torch, "empty_like", lambda tensor: new_empty(tensor, *tensor.shape))
    # It would write each operand to itself.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)


def large(seed: int, batch: int = BATCH, channels: int = CHANNELS, size: int = SIZE) -> torch.Tensor:
    """Return a map (B, C, H, W) in channels_last memory; only the last rows of the last image are not zero."""
    x = zeros(batch, size, size, channels)
    generator = torch.Generator().manual_seed(seed)
    # Similar values in all pixels: few classes are the best anywhere.
    values = 0.02 * torch.randn(32, size, channels, generator=generator) + torch.randn(channels, generator=generator)
    x[-1, -32:] = values.half().to(DEVICE)
    assert x.numel() > 2**31
    return x.permute(0, 3, 1, 2)


def weight(k: int, channels_out: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(channels_out, CHANNELS, k, k, generator=generator).half().to(DEVICE) / (CHANNELS * k * k) ** 0.5


def same(ours: torch.Tensor, truth: Callable[..., torch.Tensor], *maps: torch.Tensor) -> None:
    """Compare the last pixels of the last image."""
    exact = truth(*(x[-1:].double() for x in maps))[..., -1, -2:]
    assert exact.abs().max() > 0
    assert (ours[-1:, ..., -1, -2:] - exact).abs().max() <= 2e-3 * exact.abs().max()


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("way", ["tma", "pointers"])
def test_conv_bn_relu(way: str, k: int) -> None:
    from fastuper_kernels.gpu.configs import CONV_CONFIGS, has_tma
    from fastuper_kernels.gpu.conv_bn_relu import conv

    if DEVICE == "cuda" and way == "tma" and not has_tma(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("a GPU without tensor descriptors")
    x, w = large(1), weight(k)
    config = next(config for config in CONV_CONFIGS if config.way == way)
    same(conv(x, w, None, None, None, None, False, config), lambda x: F.conv2d(x, w.double(), padding=k // 2), x)


def test_operands_added_to_a_large_result() -> None:
    from fastuper_kernels.gpu.conv_bn_relu import conv

    x, addend = large(1), large(2)
    w = torch.eye(CHANNELS, dtype=torch.float16, device=DEVICE)[:, :, None, None]
    same(conv(x, w, None, None, addend, x, False), lambda x, addend: x + addend + x, x, addend)


def test_upsample_add() -> None:
    x, lateral = zeros(BATCH, CHANNELS, 1, 1), large(2)
    x[-1] = 1.5
    result = ops.upsample_add(x, lateral, backend="triton")
    same(result, lambda x, lateral: lateral + x, x, lateral)


def test_upsampled_conv3x3() -> None:
    x, w = large(1), weight(3)
    result = ops.upsampled_conv3x3([x], [w], (SIZE, SIZE), backend="triton")
    same(result, lambda x: F.conv2d(x, w.double(), padding=1), x)


@pytest.mark.exhaustive  # in the interpreter
def test_upsample_argmax() -> None:
    logits = large(1)
    labels = ops.upsample_argmax(logits, [(4 * SIZE, 4 * SIZE)], backend="triton")
    assert torch.equal(labels[-1, -1, -2:], logits[-1, :, -1, -1].argmax().expand(2))


@pytest.mark.exhaustive  # in the interpreter
def test_upsample_cross_entropy() -> None:
    from fastuper_kernels.gpu.upsample_cross_entropy import backward, forward

    logits, labels = large(1), zeros(BATCH, SIZE, SIZE, dtype=torch.int64)
    grad = zeros(BATCH, SIZE, SIZE, dtype=torch.float32)
    grad[-1, -1, -2:] = 1
    how = (None, [SIZE], [SIZE], 255, 0.0)
    losses, logs = forward(logits, labels, *how)
    same(losses, lambda x: F.cross_entropy(x, labels[-1:], reduction="none"), logits)
    logs = logs.nan_to_num()  # the programs that did not run wrote nothing
    result = backward(grad, logits, labels, None, logs, *how[1:])
    same(result[:, -32:], lambda x: x.softmax(1)[:, -32:], logits)  # the last 32 classes: the label is another class


def test_one_image() -> None:
    """Within one image."""
    logits = large(1, 1, CHANNELS, 2052)
    labels = ops.upsample_argmax(logits, [(8208, 8208)], backend="triton")
    assert torch.equal(labels[-1, -1, -2:], logits[0, :, -1, -1].argmax().expand(2))

"""The choice of a backend, and the errors where Triton's kernels cannot run."""

from __future__ import annotations

import pytest
import torch

from fastuper_kernels import pyramid_pool, upsample_add
from fastuper_kernels.dispatch.backend import interpreted, takes_triton

pytestmark = pytest.mark.skipif(interpreted(), reason="in the interpreter the kernels run on any device")
X = torch.ones(1, 2, 4, 4)


class Other(torch.Tensor):
    pass


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="auto, triton, torch"):
        pyramid_pool(X, [1], backend="cuda")


def test_error_of_triton_without_a_gpu() -> None:
    with pytest.raises(ValueError, match=r'backend="triton": .*on a GPU, not on cpu.*TRITON_INTERPRET=1'):
        upsample_add(X, X, backend="triton")


def test_the_environment_variable_decides_for_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTUPER_BACKEND", "triton")
    with pytest.raises(ValueError, match="on a GPU"):
        pyramid_pool(X, [1])
    assert pyramid_pool(X, [1], backend="torch").shape == (1, 1, 2)
    monkeypatch.setenv("FASTUPER_BACKEND", "tritn")
    with pytest.raises(ValueError, match=r"FASTUPER_BACKEND must be one of auto, triton, torch, got 'tritn'"):
        pyramid_pool(X, [1])


def test_operands_that_the_kernels_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that the device is no obstacle
    assert takes_triton("triton", X)
    assert not takes_triton("auto", X)
    assert not takes_triton("torch", X)
    for tensors, reason in (
        ([X.double()], "float32, bfloat16 and float16, not torch.float64"),
        ([X, X.to("meta")], "several devices"),
        ([X.as_subclass(Other)], "subclass"),
    ):
        with pytest.raises(ValueError, match=reason):
            takes_triton("triton", *tensors)


@pytest.mark.parametrize("strict", [False, True])
def test_export_refuses_triton(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    class Pool(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return pyramid_pool(x, [1], backend="triton")

    with pytest.raises(Exception, match="an exported graph may hold only"):
        torch.export.export(Pool(), (X,), strict=strict)

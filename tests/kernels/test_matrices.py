"""Operations as matrix products, for other runtimes' graphs: the same results, by no slow operator."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastuper.models.upernet import full_size
from fastuper_kernels import conv_bn_relu, upsample_add, upsampled_conv3x3
from fastuper_kernels.cpu import matrices
from fastuper_kernels.cpu.band import Band
from fastuper_kernels.dispatch.modes import writing_for, written_dtype, written_for
from fastuper_kernels.ops import upsampled_conv3x3 as file_of_upsampled_conv3x3

SIZES = [(3, 7), (128, 512), (77, 311), (512, 683), (9, 4), (1, 5), (5, 1), (300, 401)]


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(("size_in", "size_out"), SIZES)
def test_a_bands_matrix(size_in, size_out, aligned):
    band = Band.bilinear(size_in, size_out, align_corners=aligned)
    assert torch.equal(band.matrix(torch.float64), band.dense())


@pytest.mark.parametrize("shape", [(1, 5, 16, 16), (2, 3, 13, 18), (1, 2, 1, 1), (2, 4, 7, 64)])
def test_winograd(shape):
    x, weight = rand(*shape), rand(6, shape[1], 3, 3)
    torch.testing.assert_close(matrices.winograd_conv3x3(x, weight), F.conv2d(x, weight, padding=1))


@pytest.mark.parametrize("shape", [(1, 5, 16, 16), (2, 3, 12, 20), (1, 2, 4, 4)])
def test_winograd_of_maps(shape):
    x, weight = rand(*shape), rand(6, shape[1], 3, 3)
    torch.testing.assert_close(matrices._winograd_of_maps(x, weight), F.conv2d(x, weight, padding=1))


def test_winograd_in_float32():
    x, weight = rand(1, 256, 16, 16).float(), rand(8, 256, 3, 3).float()
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    assert (matrices.winograd_conv3x3(x, weight) - expected).norm() < 3e-6 * expected.norm()


@pytest.mark.parametrize("size", [(16, 16), (9, 31), (2, 3)])
def test_convolution_of_resampled_levels(size):
    levels = [rand(2, 3, *level) for level in [(5, 6), (3, 2), (1, 1), (20, 30)]]
    weights = [rand(4, 3, 3, 3) for _ in levels]
    expected = file_of_upsampled_conv3x3.reference(levels, weights, size)
    torch.testing.assert_close(matrices.upsampled_conv3x3(levels, weights, size), expected)
    torch.testing.assert_close(matrices._channels_last(levels, weights, size), expected)


def test_resampling():
    x = rand(2, 3, 7, 5)
    expected = F.interpolate(x, size=(9, 17), mode="bilinear", align_corners=False)
    torch.testing.assert_close(matrices.resample(x, (9, 17)), expected)


class Operations(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.scale, self.shift = rand(4, 4, 3, 3), rand(4), rand(4)

    def forward(self, x: torch.Tensor, coarser: torch.Tensor) -> torch.Tensor:
        y = upsampled_conv3x3([coarser], [self.weight], (x.shape[2], x.shape[3]))
        y = conv_bn_relu(x, self.weight, self.scale, self.shift, addend=y, upsampled=coarser)
        return upsample_add(coarser, y)


def operators(program: torch.jit.ScriptFunction) -> set[str]:
    return {node.kind() for node in program.inlined_graph.nodes()}


def test_graphs_for_a_runtime():
    """A graph for a runtime has the same result, and for one size no slow operator; elsewhere graphs are as before."""
    module, inputs = Operations(), (rand(2, 4, 12, 10), rand(2, 4, 5, 4))
    expected = module(*inputs)
    with writing_for("onnxruntime", one_size=True):
        assert written_for() is None, "nothing traces"
        program = torch.jit.trace(module, inputs)
    torch.testing.assert_close(program(*inputs), expected)
    assert not {"aten::upsample_bilinear2d", "aten::pad"} & operators(program)
    with writing_for("onnxruntime"):
        program = torch.jit.trace(module, inputs)
    assert "aten::upsample_bilinear2d" in operators(program)
    others = rand(1, 4, 9, 13), rand(1, 4, 3, 7)
    torch.testing.assert_close(program(*others), module(*others))


class Full(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return full_size(x, (24, 30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_for_openvino(dtype):
    """The graph for a dtype has the same result, also of other batches; OpenVINO's own operator resamples the rows."""
    module, inputs = Operations(), (rand(2, 4, 12, 10), rand(2, 4, 5, 4))
    expected = module(*inputs)
    with writing_for("openvino", one_size=True, dtype=dtype):
        assert written_dtype() is None, "nothing traces"
        program, full = torch.jit.trace(module, inputs), torch.jit.trace(Full(), inputs[0])
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.3}
    torch.testing.assert_close(program(*inputs), expected, **tolerance)
    first = tuple(x[:1] for x in inputs)
    torch.testing.assert_close(program(*first), module(*first), **tolerance)
    torch.testing.assert_close(full(first[0]), Full()(first[0]))
    assert ("aten::linear" in operators(full)) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_winograd_for_openvino_in_float32_alone(dtype):
    x, weight = torch.randn(1, 256, 32, 32), torch.randn(256, 256, 3, 3) / 48
    with writing_for("openvino", one_size=True, dtype=dtype):
        program = torch.jit.trace(lambda x: conv_bn_relu(x, weight), x)
    expected = F.conv2d(x.double(), weight.double(), padding=1).relu()
    assert (program(x) - expected).norm() < 3e-6 * expected.norm()
    convolutions = [node for node in program.inlined_graph.nodes() if node.kind() == "aten::_convolution"]
    assert (len(convolutions) > 36) == (dtype == torch.float32)

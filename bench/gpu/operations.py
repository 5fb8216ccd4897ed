"""The operations that the GPU check measures: operands, fastuper's operation, and the same by PyTorch's operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

import fastuper_kernels as ops
from bench.gpu.calls import DEVICE
from bench.names import FASTUPER, PYTORCH
from bench.roofline import Shapes
from fastuper_kernels.cpu.band import pool_matrix

SCALES = Shapes().scales
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,
    "float32": torch.float32,
}


class Draw:
    """Draws random operands from a seed.

    Args:
        dtype: of maps and weights, which are rounded to it.
        seed: of the draws.
        cast: dtype to convert the rounded operands to, for example float64.
    """

    def __init__(self, dtype: torch.dtype, seed: int, cast: torch.dtype | None = None):
        self.dtype, self.cast = dtype, cast
        self.generator = torch.Generator(DEVICE).manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Return normal numbers times `scale`: maps and weights channels_last, vectors in float32 or `cast`."""
        x = torch.randn(*shape, generator=self.generator, device=DEVICE) * scale
        if len(shape) != 4:
            return x.to(self.cast or torch.float32)
        return x.to(self.dtype).to(self.cast or self.dtype).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Operation:
    """An operation of fastuper_kernels, and the same computation by PyTorch's operators.

    Args:
        name: for the table.
        works: names of its parts in `bench.roofline`.
        operands: (draw, shapes) -> the arguments of `ours`.
        ours: the operation.
        theirs: PyTorch's operators; takes the results of `prepared`.
        prepared: computes the arguments of `theirs`, untimed: upsampling and concatenation do not count.
        comparable: converts the result of `theirs` to the form of the result of `ours`.
    """

    name: str
    works: tuple[str, ...]
    operands: Callable[[Draw, Shapes], tuple[torch.Tensor, ...]]
    ours: Callable[..., torch.Tensor]
    theirs: Callable[..., Any]
    prepared: Callable[..., tuple[torch.Tensor, ...]] = lambda *operands: operands
    comparable: Callable[[Any], torch.Tensor] = lambda result: result


def errors_of(operation: Operation, dtype: torch.dtype, shapes: Shapes) -> dict[str, float]:
    """Return the distances from float64 on the same operands, fastuper's and PyTorch's."""
    given = operation.operands(Draw(dtype, seed=1), shapes)
    ours, theirs = operation.ours(*given), operation.theirs(*operation.prepared(*given))
    exact = operation.operands(Draw(dtype, seed=1, cast=torch.float64), shapes)
    truth = operation.comparable(operation.theirs(*operation.prepared(*exact)))
    return {FASTUPER: distance(ours, truth), PYTORCH[0]: distance(operation.comparable(theirs), truth)}


def distance(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Return ||result - truth|| / ||truth||; for label maps the share of pixels that differ."""
    if not truth.is_floating_point():
        return float((result != truth).double().mean())
    return float((result.double() - truth).norm() / truth.double().norm())


def norm(y: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return F.relu(y * scale[:, None, None].to(y.dtype) + shift[:, None, None].to(y.dtype))


def _upsampled(x: torch.Tensor, size: Any) -> torch.Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def _fusion(weight: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, *levels: torch.Tensor) -> torch.Tensor:
    first, *others = weight.split(levels[0].shape[1], dim=1)
    addend = ops.upsampled_conv3x3(levels[1:], others, levels[0].shape[2:])
    return ops.conv_bn_relu(levels[0], first, scale, shift, addend=addend)


def _concatenated(
    weight: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, *levels: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    whole = torch.cat([_upsampled(x, levels[0].shape[2:]) for x in levels], dim=1)
    return weight, scale, shift, whole.contiguous(memory_format=torch.channels_last)


def _branches(x: torch.Tensor, *parameters: torch.Tensor) -> list[torch.Tensor]:
    pooled = [F.adaptive_avg_pool2d(x, scale) for scale in SCALES]
    return [norm(F.conv2d(cells, w), a, b) for cells, w, a, b in zip(pooled, *_by_kind(parameters), strict=True)]


def _by_kind(parameters: Sequence[torch.Tensor]) -> list[Sequence[torch.Tensor]]:
    """Split parameters into the branches' weights, scales and shifts."""
    n = len(SCALES)
    return [parameters[:n], parameters[n : 2 * n], parameters[2 * n :]]


def _positions(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)


def _smooth_logits(draw: Draw, s: Shapes) -> tuple[torch.Tensor, ...]:
    # The logits are smooth like logits of photos, whose neighbouring pixels have similar classes.
    coarse = draw(s.batch, s.classes, 16, 16, scale=3.0).float()
    smooth = F.interpolate(coarse, size=(s.size // 4, s.size // 4), mode="bicubic")
    smooth = smooth.to(draw.dtype).to(draw.cast or draw.dtype)
    return (smooth.contiguous(memory_format=torch.channels_last),)


def _logits_and_labels(draw: Draw, s: Shapes) -> tuple[torch.Tensor, ...]:
    size = (s.batch, s.size, s.size)
    labels = torch.randint(s.classes, size, generator=draw.generator, device=DEVICE)
    return *_smooth_logits(draw, s), labels


def _precise_roi_matrix(x: torch.Tensor, scale: int, dim: int) -> torch.Tensor:
    """Return the matrix of precise RoI pooling along an axis of x, in x's dtype."""
    return pool_matrix("precise_roi", x.shape[dim], scale, x.dtype, x.device)


def _gradient_of_loss(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(ops.upsample_cross_entropy(x, labels), x)[0]


OPERATIONS = (
    Operation(
        "fusion, with its coarser levels",
        ("fusion", "fusion, products and sum of the taps"),
        lambda draw, s: (
            draw(s.dim, 4 * s.dim, 3, 3, scale=s.dim**-0.5 / 6),
            draw(s.dim),
            draw(s.dim),
            *(draw(s.batch, s.dim, s.size // stride, s.size // stride) for stride in (4, 8, 16, 32)),
        ),
        _fusion,
        lambda weight, scale, shift, x: norm(F.conv2d(x, weight, padding=1), scale, shift),
        _concatenated,
    ),
    Operation(
        "3x3 convolution at stride 4",
        ("FPN, stride 4",),
        lambda draw, s: (
            draw(s.batch, s.dim, s.size // 4, s.size // 4),
            draw(s.dim, s.dim, 3, 3, scale=s.dim**-0.5 / 3),
            draw(s.dim),
            draw(s.dim),
        ),
        ops.conv_bn_relu,
        lambda x, weight, scale, shift: norm(F.conv2d(x, weight, padding=1), scale, shift),
    ),
    Operation(
        "lateral at stride 4, and the coarser level",
        ("lateral, stride 4",),
        lambda draw, s: (
            draw(s.batch, s.channels[0], s.size // 4, s.size // 4),
            draw(s.dim, s.channels[0], 1, 1, scale=s.channels[0] ** -0.5),
            draw(s.dim),
            draw(s.dim),
            draw(s.batch, s.dim, s.size // 8, s.size // 8),
        ),
        lambda x, weight, scale, shift, coarser: ops.conv_bn_relu(x, weight, scale, shift, upsampled=coarser),
        lambda x, weight, scale, shift, coarser: (
            norm(F.conv2d(x, weight), scale, shift) + _upsampled(coarser, x.shape[2:])
        ),
    ),
    Operation(
        "upsample_argmax",
        ("upsample_argmax",),
        _smooth_logits,
        lambda x: ops.upsample_argmax(x, [(4 * x.shape[2], 4 * x.shape[3])]),
        lambda x: _upsampled(x, (4 * x.shape[2], 4 * x.shape[3])).argmax(1),
    ),
    Operation(
        "upsample_cross_entropy and its gradient",
        ("upsample_cross_entropy",),
        _logits_and_labels,
        _gradient_of_loss,
        # PyTorch computes in float32 from the resampled logits on, as under autocast.
        lambda x, labels: torch.func.grad(
            lambda x: F.cross_entropy(
                _upsampled(x, labels.shape[1:]).to(torch.promote_types(x.dtype, torch.float32)), labels
            )
        )(x),
    ),
    Operation(
        "pyramid_pool",
        ("pyramid_pool",),
        lambda draw, s: (draw(s.batch, s.channels[-1], s.size // 32, s.size // 32),),
        lambda x: ops.pyramid_pool(x, SCALES),
        lambda x: [F.adaptive_avg_pool2d(x, scale) for scale in SCALES],
        comparable=_positions,
    ),
    Operation(
        "pyramid_pool, precise RoI",
        ("pyramid_pool, precise RoI",),
        lambda draw, s: (draw(s.batch, s.channels[-1], s.size // 32, s.size // 32),),
        lambda x: ops.pyramid_pool(x, SCALES, pooling="precise_roi"),
        lambda x: [_precise_roi_matrix(x, scale, 2) @ x @ _precise_roi_matrix(x, scale, 3).mT for scale in SCALES],
        comparable=_positions,
    ),
    Operation(
        "pool_conv_bn_relu",
        ("pyramid_pool", "branches of the pyramid"),
        lambda draw, s: (
            draw(s.batch, s.channels[-1], s.size // 32, s.size // 32),
            *(draw(s.dim, s.channels[-1], 1, 1, scale=s.channels[-1] ** -0.5) for _ in SCALES),
            *(draw(s.dim) for _ in range(2 * len(SCALES))),
        ),
        lambda x, *parameters: ops.pool_conv_bn_relu(x, SCALES, *_by_kind(parameters)),
        _branches,
        comparable=_positions,
    ),
)

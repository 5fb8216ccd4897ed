"""3x3 convolutions on a CPU by Winograd's F(4x2, 3x3) (https://arxiv.org/abs/1509.09308): 24 products for every 72.

A tile of 6 x 4 inputs gives 4 x 2 outputs. A block is a few rows of tiles: its transformed inputs and products stay in
cache. Each of a block's 24 products is a GEMM over its tiles.

The points are 0, 1, -1, 2, -1/2 and infinity down the columns, and 0, 1, -1 and infinity along the rows. In float32 the
relative error against float64 is about that of a direct convolution. With 512 channels it is 1.0e-6 (0.9e-6 after a
ReLU); PyTorch's own convolution in channels_last has 1.1e-6 (0.7e-6). F(2x2) would have a smaller error, and needs a
third more products. F(4x4) would need 18 products for 72, with two to three times the error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from fastuper_kernels.cpu.linear import linear
from fastuper_kernels.dispatch.choices import WINOGRAD_PRODUCT, machine

# Outputs of a tile.
HEIGHT, WIDTH = 4, 2
# Bytes of transformed input per block. With 1 MB of L2 cache a core and 32 MB of L3, blocks of 16 MB were 8 % slower:
# the transformed weights (24 MB for 512 channels) are read from memory for each block.
BLOCK_BYTES = 24 << 20
# The matrix G of both axes: the values of the kernel's three taps at each point.
DOWN = [[1, 0, 0], [-1 / 3, -1 / 3, -1 / 3], [1 / 3, -1 / 3, 1 / 3], [1 / 15, 2 / 15, 4 / 15]]
DOWN += [[-16 / 15, 8 / 15, -4 / 15], [0, 0, 1]]
ALONG = [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]


def pack(weight: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the transformed weight G w G^T of w (C_out, C_in, 3, 3): 24 matrices, point by point, row by row.

    The list has 24 matrices (C_out, C_in / 2) of the first half of the input channels, then 24 of the second half.
    """
    wide = weight if weight.dtype == torch.float64 else weight.float()
    down, along = (torch.tensor(g, dtype=wide.dtype, device=weight.device) for g in (DOWN, ALONG))
    matrices: list[torch.Tensor] = []
    for half in _halves(wide, 1):
        # One allocation for all matrices, filled one row of points at a time: small allocations between large temporary
        # ones would fragment the memory.
        block = half.new_empty(len(DOWN) * len(ALONG), *half.shape[:2], dtype=dtype)
        for i, g in enumerate(down):
            line = torch.einsum("j,ocjk->ock", g, half)
            block[i * len(ALONG) : (i + 1) * len(ALONG)] = torch.einsum("jk,ock->joc", along, line)
        matrices += block.unbind()
    return matrices


def conv3x3(
    x: torch.Tensor,
    kernels: list[torch.Tensor],
    halo: tuple[int, int],
    finish: Callable[[torch.Tensor, int, int], None],
    out: torch.Tensor,
) -> None:
    """Convolve the rows of a map with zero padding at its sides.

    Args:
        x: (top + H + bottom, W, C), the channels contiguous.
        kernels: the result of `pack`.
        halo: (top, bottom), each 0 or 1: the number of rows of x above and below the output's rows. With 0 the map ends
            there, and the padding is zero.
        finish: called with (block, start, stop) after each block: its rows [start, stop) of `out` (rows, W, C_out).
        out: (H, W, C_out), contiguous; written.
    """
    height, width, channels = out.shape[0], x.shape[1], x.shape[2]
    columns = -(-width // WIDTH)
    tile_rows = max(1, BLOCK_BYTES // (len(DOWN) * len(ALONG) * columns * channels * x.element_size()))
    for start in range(0, height, HEIGHT * tile_rows):
        stop = min(start + HEIGHT * tile_rows, height)
        rows = -(-(stop - start) // HEIGHT)
        padded = _padded(x, start - 1 + halo[0], HEIGHT * rows + 2, WIDTH * columns + 2)
        products = _products(padded, kernels, rows, columns)
        for b in range(WIDTH):
            _combine([line[b] for line in products], out[start:stop, b::WIDTH])
        finish(out[start:stop], start, stop)


def weight_gradient(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Return the gradient (C_out, C_in, 3, 3) of a 3x3 convolution's weight, also with 24 products for 72.

    `conv3x3` computes `A^T [sum_c (G w G^T) * (B^T x B)] A`. The gradient applies the transposed maps in reverse order:
    `G^T [sum_tiles (A g A^T) * (B^T x B)] G`.

    Args:
        x: the convolution's input, (B, C_in, H, W); its padding was zero.
        grad: the gradient of the convolution's result, (B, C_out, H, W).
    """
    _, channels, height, width = x.shape
    channels_out = grad.shape[1]
    columns = -(-width // WIDTH)
    wide = max(channels, channels_out)
    tile_rows = max(1, BLOCK_BYTES // (len(DOWN) * len(ALONG) * columns * wide * x.element_size()))
    products = x.new_zeros(len(DOWN), len(ALONG), channels_out, channels)
    for image, image_grad in zip(x.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1), strict=True):
        for start in range(0, height, HEIGHT * tile_rows):
            rows = -(-min(HEIGHT * tile_rows, height - start) // HEIGHT)
            stop = start + HEIGHT * rows
            padded = _padded(image, start - 1, HEIGHT * rows + 2, WIDTH * columns + 2)
            inputs = _down(*(padded[k : k + HEIGHT * rows : HEIGHT] for k in range(HEIGHT + 2)))
            block = image_grad[start:stop]
            if len(block) < stop - start or WIDTH * columns > width:
                block = F.pad(block, (0, 0, 0, WIDTH * columns - width, 0, stop - start - len(block)))
            outputs = _down_transposed(*(block[k::HEIGHT] for k in range(HEIGHT)))
            for line, line_grad, line_products in zip(inputs, outputs, products, strict=True):
                a, b, c, d = (line[:, k : k + WIDTH * columns : WIDTH] for k in range(WIDTH + 2))
                left, right = line_grad[:, ::WIDTH], line_grad[:, 1::WIDTH]
                pairs = (a - c, left), (b + c, left + right), (c - b, left - right), (d - b, right)
                for product, (tile, tile_grad) in zip(line_products, pairs, strict=True):
                    product.addmm_(tile_grad.reshape(-1, channels_out).t(), tile.reshape(-1, channels))
    down, along = (torch.tensor(g, dtype=x.dtype, device=x.device) for g in (DOWN, ALONG))
    return torch.einsum("iy,ijoc,jx->ocyx", down, products, along)


def _padded(x: torch.Tensor, top: int, height: int, width: int) -> torch.Tensor:
    """Return rows [top, top + height) and columns [-1, width - 1) of x (H, W, C), with zeros outside x."""
    padded = x.new_empty(height, width, x.shape[2])
    first, last = max(top, 0), min(top + height, x.shape[0])
    padded[: first - top] = 0
    padded[last - top :] = 0
    padded[:, 0] = 0
    padded[:, x.shape[1] + 1 :] = 0
    padded[first - top : last - top, 1 : x.shape[1] + 1] = x[first:last]
    return padded


def _halves(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
    """Return the halves of x along `dim`, the input channels: each product is the sum of two GEMMs.

    A GEMM adds its terms one after the other: with all channels in one sum, its rounding error would be larger.
    """
    return x.split(-(-x.shape[dim] // 2), dim=dim)


def _products(padded: torch.Tensor, kernels: list[torch.Tensor], rows: int, columns: int) -> list[list[torch.Tensor]]:
    """Return the products with A^T applied along the rows.

    Args:
        padded: (HEIGHT * rows + 2, WIDTH * columns + 2, C).
        kernels: the result of `pack`.
        rows: rows of tiles.
        columns: columns of tiles.

    Returns:
        For each of the six points down the columns, a list of WIDTH maps (rows, columns, C_out).
    """
    parts = _halves(padded, 2)
    multiply = PRODUCTS[_way(padded.dtype)]
    lines = [_down(*(part[k : k + HEIGHT * rows : HEIGHT] for k in range(HEIGHT + 2))) for part in parts]
    sums = []
    for i in range(len(DOWN)):
        neighbours = [[line[i][:, k : k + WIDTH * columns : WIDTH] for k in range(WIDTH + 2)] for line in lines]

        def product(j: int, inputs: list[torch.Tensor], total: Any = None, row: int = len(ALONG) * i) -> torch.Tensor:
            for part, x in enumerate(inputs):
                kernel = kernels[part * len(DOWN) * len(ALONG) + row + j]
                total = multiply(x.view(rows * columns, -1), kernel, total)
            return total

        second = product(1, [b + c for _, b, c, _ in neighbours])
        third = product(2, [c - b for _, b, c, _ in neighbours])
        left = product(0, [a - c for a, _, c, _ in neighbours], second + third)
        # The last point's input is negated, so that its product is added.
        right = product(3, [d - b for _, b, _, d in neighbours], second.sub_(third))
        sums.append([total.view(rows, columns, -1) for total in (left, right)])
    return sums


def _by_linear(x: torch.Tensor, kernel: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor:
    return linear(x, kernel, residual=total)


def _by_blas(x: torch.Tensor, kernel: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor:
    return torch.mm(x, kernel.t()) if total is None else total.addmm_(x, kernel.t())


PRODUCTS = {"linear": _by_linear, "blas": _by_blas}
"""The ways to x @ kernel.T + total, which may be written to `total`; None stands for zeros."""


def _way(dtype: torch.dtype) -> str:
    """Return the option of the choice `winograd_product`.

    If nothing is measured, it is MKL on Intel's processors. On an Intel Xeon 6 a product and the addition of another
    take 0.8 of oneDNN's time. On AMD's processors oneDNN is faster.
    """
    default = "blas" if torch.backends.mkl.is_available() and machine().startswith("Intel") else "linear"
    return WINOGRAD_PRODUCT(str(dtype).removeprefix("torch."), partial(_candidates, dtype), default=default)


def _candidates(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Return the ways to compute a product and to add another, as functions of no arguments."""
    x, kernel = (torch.linspace(-1, 1, 512 * 256, dtype=dtype, device="cpu").view(512, 256) for _ in range(2))
    return {way: partial(_sum_of_two, multiply, x, kernel) for way, multiply in PRODUCTS.items()}


def _sum_of_two(multiply: Callable[..., torch.Tensor], x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    return multiply(x, kernel, multiply(x, kernel, None))


def _down(*x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return B^T applied to the six rows of the tiles: their values at the points 0, 1, -1, 2, -1/2 and infinity."""
    even, odd = x[4] - x[2], x[3] - x[1]
    return (
        (x[0] - x[2]).add_(even).sub_(odd, alpha=1.5),
        torch.sub(even, x[2] + x[3], alpha=1.5).add_(odd),
        torch.sub(even, x[3] - x[2], alpha=1.5).sub_(odd),
        torch.add(even, odd, alpha=0.5),
        torch.sub(even, odd, alpha=2),
        (x[5] - x[3]).sub_(odd).sub_(even, alpha=1.5),
    )


def _down_transposed(*g: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return A applied to the four rows of the tiles' gradients: a map for each of the six points."""
    even, odd = g[0] + g[2], g[1] + g[3]
    two, half = torch.add(g[0], g[2], alpha=4), torch.add(g[0], g[2], alpha=0.25)
    two_odd, half_odd = torch.add(g[1], g[3], alpha=4).mul_(2), torch.add(g[1], g[3], alpha=0.25).mul_(0.5)
    return g[0], even + odd, even.sub_(odd), two.add_(two_odd), half.sub_(half_odd), g[3]


def _combine(lines: list[torch.Tensor], out: torch.Tensor) -> None:
    """Write A^T applied to the maps of six points, (rows, columns, C) each, to `out` (up to 4 * rows, columns, C)."""
    outs = [out[a::HEIGHT] for a in range(HEIGHT)]
    zero, one, minus, two, half, infinity = lines
    both, odd = one + minus, one.sub_(minus)

    def write(a: int, left: torch.Tensor, right: torch.Tensor, alpha: float = 1) -> None:
        count, columns = outs[a].shape[:2]
        torch.add(left[:count, :columns], right[:count, :columns], alpha=alpha, out=outs[a])

    write(0, zero.add_(both).add_(two), half)
    write(2, both.add_(two, alpha=4), half, 0.25)
    write(1, torch.add(odd, two, alpha=2), half, -0.5)
    write(3, odd.add_(two, alpha=8).sub_(half, alpha=0.125), infinity)

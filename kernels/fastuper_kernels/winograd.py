"""3x3 convolutions on a CPU by Winograd's F(2x2, 3x3) (https://arxiv.org/abs/1509.09308): 16 products for every 36.

A tile of 4 x 4 inputs gives 2 x 2 outputs. Everything is done a few rows of tiles at a time, so that what is between
the transforms stays in cache; the 16 products of a block are GEMMs over its tiles. In float32 the result is as near to
float64 as that of a direct convolution. F(4x4, 3x3) would need 9 products for 36, and errs three to six times more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastuper_kernels.linear import linear

# Bytes of transformed input at a time. With 1 MB of L2 a core and 32 MB of L3: the matrices, 16 MB of them for 512
# channels, come from memory for each block, and 8 MB were 10 % slower; 32 MB are 2 % faster than 16.
BLOCK_BYTES = 16 << 20


def pack(weight: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the 16 matrices (C_out, C_in) of a weight (C_out, C_in, 3, 3): G w G^T, row by row."""
    transform = [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]
    wide = weight if weight.dtype == torch.float64 else weight.float()
    g = torch.tensor(transform, dtype=wide.dtype, device=weight.device)
    rows = torch.einsum("ij,ocjk->iock", g, wide)
    return [torch.einsum("ock,k->oc", rows[i], g[j]).to(dtype).contiguous() for i in range(4) for j in range(4)]


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
        kernels: what `pack` returns.
        halo: (top, bottom), each 0 or 1: how many rows of x above and below are neighbours and give no output; where
            there are none, the map ends, and the padding is zero.
        finish: called with each block of finished rows (rows, W, C_out), in `out`, and its first and last row.
        out: (H, W, C_out), contiguous.
    """
    height, width, channels = out.shape[0], x.shape[1], x.shape[2]
    columns = (width + 1) // 2
    tiles = max(1, BLOCK_BYTES // (16 * columns * channels * x.element_size()))
    for start in range(0, height, 2 * tiles):
        stop = min(start + 2 * tiles, height)
        rows = (stop - start + 1) // 2
        padded = _padded(x, start - 1 + halo[0], 2 * rows + 2, 2 * columns + 2)
        sums = _products(padded, kernels, rows, columns)
        for a in range(2):
            for b, (first, *others) in enumerate((sums[a][:3], sums[a][1:])):
                target = out[start + a : stop : 2, b::2]
                first, second, third = (part[: target.shape[0], : target.shape[1]] for part in (first, *others))
                if b == 0:
                    torch.add(first.add_(second), third, out=target)
                else:
                    torch.sub(first.sub_(second), third, out=target)
        finish(out[start:stop], start, stop)


def _padded(x: torch.Tensor, top: int, height: int, width: int) -> torch.Tensor:
    """Return rows [top, top + height) and columns [-1, width - 1) of x (H, W, C), with zeros outside."""
    padded = x.new_empty(height, width, x.shape[2])
    first, last = max(top, 0), min(top + height, x.shape[0])
    padded[: first - top] = 0
    padded[last - top :] = 0
    padded[:, 0] = 0
    padded[:, x.shape[1] + 1 :] = 0
    padded[first - top : last - top, 1 : x.shape[1] + 1] = x[first:last]
    return padded


def _differences(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return B^T applied to four neighbours along one axis."""
    return a - c, b + c, c - b, b - d


def _products(padded: torch.Tensor, kernels: list[torch.Tensor], rows: int, columns: int) -> list[list[torch.Tensor]]:
    """Return A^T applied along the rows to the 16 products: [output row of the tile][tile column]."""
    a, b, c, d = (padded[k : k + 2 * rows : 2] for k in range(4))
    lines = (a - c, b + c, c - b, d - b)  # the last of them negative, for its product to be added to others

    def product(i: int, j: int, residual: torch.Tensor | None = None) -> torch.Tensor:
        return linear(tiles[i][j].view(rows * columns, -1), kernels[4 * i + j], residual=residual)

    tiles = [_differences(*(line[:, k : k + 2 * columns : 2] for k in range(4))) for line in lines]
    sums: list[list[torch.Tensor]] = [[], []]
    for j in range(4):
        second, third = product(1, j), product(2, j)
        sums[0].append(product(0, j, residual=second + third).view(rows, columns, -1))
        sums[1].append(product(3, j, residual=second.sub_(third)).view(rows, columns, -1))
    return sums

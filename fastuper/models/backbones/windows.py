"""Windows of a map: cut, put together, shifted (Swin Transformer, https://arxiv.org/abs/2103.14030).

Maps are (B, H, W, C). A window has L = window * window positions.
"""

from __future__ import annotations

import torch

from fastuper_kernels.dispatch.modes import is_eager


def window_partition(x: torch.Tensor, window: int) -> torch.Tensor:
    """Cut maps (B, H, W, C), H and W multiples of the window, into (B * windows, L, C)."""
    batch, height, width, channels = x.shape
    rows, columns = height // window, width // window
    x = x.view(batch, rows, window, columns, window, channels)
    return x.transpose(2, 3).reshape(batch * rows * columns, window * window, channels)


def window_reverse(windows: torch.Tensor, window: int, batch: int, rows: int, columns: int) -> torch.Tensor:
    """Put windows (B * rows * columns, L, C) together into maps (B, rows * window, columns * window, C)."""
    channels = windows.shape[-1]
    x = windows.view(batch, rows, columns, window, window, channels)
    return x.transpose(2, 3).reshape(batch, rows * window, columns * window, channels)


def crop(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the first rows and columns of maps (B, H, W, C)."""
    if is_eager():
        return x[:, :height, :width]
    # Sizes decide if a slice is contiguous: a network traced with slices is valid for sizes like its example's only.
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    return x.index_select(1, rows).index_select(2, columns)


def shifted_window_mask(
    rows: int, columns: int, window: int, shift: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return the mask of shifted windows, (rows * columns, L, L), which is added to attention scores.

    The map has (rows, columns) windows. After the cyclic shift, windows of the last row and column hold pieces of up to
    four regions of the map. The mask is -100 between positions of different regions, and 0 within a region.
    """

    def regions(n: int) -> torch.Tensor:
        index = torch.arange(n * window, device=device)
        return (index >= (n - 1) * window).long() + (index >= n * window - shift).long()

    region = regions(rows)[:, None] * 3 + regions(columns)[None, :]
    region = window_partition(region[None, :, :, None], window).squeeze(-1)
    differs = region[:, None, :] != region[:, :, None]
    return torch.zeros(differs.shape, dtype=dtype, device=device).masked_fill_(differs, -100.0)


def relative_position_index(window: int, device: torch.device | None = None) -> torch.Tensor:
    """Return the row of the relative position bias table for each pair of positions in a window, (L, L)."""
    y, x = torch.meshgrid(torch.arange(window, device=device), torch.arange(window, device=device), indexing="ij")
    y, x = y.flatten(), x.flatten()
    return (y[:, None] - y + window - 1) * (2 * window - 1) + (x[:, None] - x + window - 1)

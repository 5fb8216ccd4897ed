"""Windows of a map: cut, put together, shifted (Swin Transformer, https://arxiv.org/abs/2103.14030).

Maps are (B, H, W, C). A window (height, width) has L = height * width positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastuper.models.backbones.layers import pad_to_multiple
from fastuper_kernels.dispatch.modes import is_eager

Sides = tuple[int, int]
"""(height, width), or (rows, columns)."""


def copied(x: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy of x.

    `reshape` would first ask if a view will do, which depends on sizes: the map of one window is a view, a map of
    several is not. A network traced with it would be valid for sizes like its example's only.
    """
    return x.clone(memory_format=torch.contiguous_format)


def window_partition(x: torch.Tensor, window: Sides) -> torch.Tensor:
    """Cut maps (B, H, W, C), H and W multiples of the window's, into (B * windows, L, C)."""
    batch, height, width, channels = x.shape
    rows, columns = height // window[0], width // window[1]
    x = x.view(batch, rows, window[0], columns, window[1], channels)
    return copied(x.transpose(2, 3)).view(batch * rows * columns, window[0] * window[1], channels)


def window_reverse(windows: torch.Tensor, window: Sides, batch: int, rows: int, columns: int) -> torch.Tensor:
    """Put windows (B * rows * columns, L, C) together into maps (B, rows * height, columns * width, C)."""
    channels = windows.shape[-1]
    x = windows.view(batch, rows, columns, *window, channels)
    return copied(x.transpose(2, 3)).view(batch, rows * window[0], columns * window[1], channels)


def shifted(x: torch.Tensor, window: Sides, shift: Sides, pads_before_shift: bool) -> torch.Tensor:
    """Return maps (B, H, W, C) padded with zeros to whole windows, and shifted cyclically.

    Args:
        x: the maps.
        window: the window.
        shift: the rows and columns by which the maps move up and left.
        pads_before_shift: True to shift the padded maps, False to pad the shifted maps.
    """
    if pads_before_shift:
        x = pad_to_multiple(x, *window)
    if any(shift):
        x = x.roll((-shift[0], -shift[1]), dims=(1, 2))
    return x if pads_before_shift else pad_to_multiple(x, *window)


def unshifted(x: torch.Tensor, height: int, width: int, shift: Sides, pads_before_shift: bool) -> torch.Tensor:
    """Return maps (B, height, width, C) of the result of `shifted`: its steps undone, the last first."""
    if not pads_before_shift:
        x = crop(x, height, width)
    if any(shift):
        x = x.roll(shift, dims=(1, 2))
    return crop(x, height, width) if pads_before_shift else x


def crop(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the first rows and columns of maps (B, H, W, C)."""
    if is_eager():
        return x[:, :height, :width]
    # Sizes decide if a slice is contiguous: a network traced with slices is valid for sizes like its example's only.
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    return x.index_select(1, rows).index_select(2, columns)


def shifted_window_mask(
    rows: int, columns: int, window: Sides, shift: Sides, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return the mask of shifted windows, (rows * columns, L, L), which is added to attention scores.

    The map has (rows, columns) windows. After the cyclic shift, windows of the last row and column hold pieces of up to
    four regions of the map. The mask is -100 between positions of different regions, and 0 within a region.
    """

    def regions(n: int, side: int, shift: int) -> torch.Tensor:
        index = torch.arange(n * side, device=device)
        return (index >= (n - 1) * side).long() + (index >= n * side - shift).long()

    region = regions(rows, window[0], shift[0])[:, None] * 3 + regions(columns, window[1], shift[1])[None, :]
    region = window_partition(region[None, :, :, None], window).squeeze(-1)
    differs = region[:, None, :] != region[:, :, None]
    return torch.zeros(differs.shape, dtype=dtype, device=device).masked_fill_(differs, -100.0)


def relative_position_index(window: Sides, device: torch.device | None = None) -> torch.Tensor:
    """Return the row of the relative position bias table for each pair of positions in a window, (L, L)."""
    height, width = window
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    y, x = y.flatten(), x.flatten()
    return (y[:, None] - y + height - 1) * (2 * width - 1) + (x[:, None] - x + width - 1)


def attend_in_windows(
    attention: Callable[[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor | None]],
    x: torch.Tensor,
    window: Sides,
    shift: Sides,
    pads_before_shift: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pad a map (B, H, W, C) to whole windows, shift it, attend, and undo the shift and the padding.

    Args:
        attention: maps windows (B * windows, L, C) and their mask (B * windows, L, L), None if nothing is shifted, to
            the result, of the windows' shape, and the weights or None.
        x: the map.
        window: the window.
        shift: the rows and columns of the shift.
        pads_before_shift: see `shifted`.

    Returns:
        The map's result, (B, H, W, C), and the weights or None.
    """
    batch, height, width, _ = x.shape
    rows, columns = (height + window[0] - 1) // window[0], (width + window[1] - 1) // window[1]
    x = shifted(x, window, shift, pads_before_shift)
    mask = None
    if any(shift):
        mask = shifted_window_mask(rows, columns, window, shift, x.dtype, x.device).repeat(batch, 1, 1)
    windows, weights = attention(window_partition(x, window), mask)
    x = window_reverse(windows, window, batch, rows, columns)
    return unshifted(x, height, width, shift, pads_before_shift), weights


def squares(x: torch.Tensor) -> torch.Tensor:
    """Concatenate the channels of each 2x2 square of maps (B, H, W, C): (B, ceil(H / 2), ceil(W / 2), 4 C)."""
    x = pad_to_multiple(x, 2, 2)
    batch, height, width, channels = x.shape
    x = x.view(batch, height // 2, 2, width // 2, 2, channels)
    # This is the order of the checkpoints: left column first, the upper position of each column first.
    return copied(x.permute(0, 1, 3, 4, 2, 5)).view(batch, height // 2, width // 2, 4 * channels)

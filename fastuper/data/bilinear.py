"""Bilinear interpolation of 8-bit images without anti-aliasing, with the arithmetic of OpenCV's `INTER_LINEAR`."""

from __future__ import annotations

import numpy as np

# OpenCV rounds a weight to a multiple of 2 ** -11.
ONE = 2048


def interpolate(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize an image; each result is a weighted mean of four pixels, also where the image shrinks.

    The results equal those of `cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)` of OpenCV 5.0 on an
    x86 processor: weights have 11 bits, horizontal sums lose 4 of their bits, and products with vertical weights 16.

    Args:
        image: uint8 (C, H, W).
        height: of the result.
        width: of the result.

    Returns:
        uint8 (C, height, width).
    """
    if image.shape[1:] == (height, width):
        return image.copy()
    if image.shape[1:] == (2 * height, 2 * width):  # OpenCV rounds the exact mean here
        quads = image.reshape(-1, height, 2, width, 2).sum((2, 4), dtype=np.uint16)
        return ((quads + 2) >> 2).astype(np.uint8)
    rows, row_weights = _taps(image.shape[1], height)
    columns, column_weights = _taps(image.shape[2], width)
    # Beyond the outer columns a single column counts; beyond the outer rows the weights stay, of the same row twice.
    outside = (columns[0] < 0) | (columns[0] >= image.shape[2] - 1)
    column_weights[:, outside] = np.array([[ONE], [0]])
    columns = columns.clip(0, image.shape[2] - 1)
    rows = rows.clip(0, image.shape[1] - 1)
    result = np.full((len(image), height, width), 2, np.int32)
    for row, weight in zip(rows, row_weights, strict=True):
        taken = image[:, row]
        sums = taken[:, :, columns[0]] * column_weights[0] + taken[:, :, columns[1]] * column_weights[1]
        result += (sums >> 4) * weight[:, None] >> 16
    return (result >> 2).astype(np.uint8)


def _taps(size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the two neighbours of each result along an axis, and their weights in parts of `ONE`: int32 (2, count)."""
    positions = ((np.arange(count) + 0.5) * (1 / (count / size)) - 0.5).astype(np.float32)
    first = np.floor(positions)
    fraction = positions - first
    weights = np.rint(np.stack([1 - fraction, fraction]) * np.float32(ONE)).astype(np.int32)
    return np.stack([first, first + 1]).astype(np.int32), weights

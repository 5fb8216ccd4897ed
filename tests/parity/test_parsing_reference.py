"""The re-statement of Unified Perceptual Parsing: its Precise RoI pooling and its sizes, against other statements."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.parity import parsing_reference as reference


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (5, 3), (6, 7), (15, 20)])
@pytest.mark.parametrize("scale", reference.SCALES)
def test_precise_roi_is_the_integral_of_the_bilinear_surface(size: tuple[int, int], scale: int) -> None:
    """The midpoint rule is exact: with a step of 1/s, cells and bins begin between its points."""
    x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # Beyond the last cell lies a cell of zeros: the padded axis of size n + 1 has coordinate n at grid_sample's 1.
    padded = F.pad(x, (0, 1, 0, 1))
    down, across = (2 * (torch.arange(n * scale, dtype=torch.float64) + 0.5) / (scale * n) - 1 for n in size)
    grid = torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=-1).expand(2, -1, -1, -1)
    surface = F.grid_sample(padded, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    expected = surface.reshape(2, 3, scale, size[0], scale, size[1]).mean((3, 5))
    assert (reference.precise_roi(x, scale) - expected).abs().max() < 1e-13


def test_precise_roi_damps_a_constant_map() -> None:
    ones = torch.ones(1, 1, 15, 20, dtype=torch.float64)
    assert reference.precise_roi(ones, 1).item() == pytest.approx(0.9425, abs=1e-12)
    pooled = reference.precise_roi(ones, 3)[0, 0]
    damped = torch.ones(3, 3, dtype=torch.float64)
    damped[-1] *= 1 - 0.5 / 5
    damped[:, -1] *= 1 - 0.5 / (20 / 3)
    assert (pooled - damped).abs().max() < 1e-13


@pytest.mark.parametrize(
    ("photo", "size"),
    [((683, 512), (600, 456)), ((512, 683), (456, 600)), ((450, 450), (456, 456)), ((300, 3000), (104, 1000))],
)
def test_sizes_of_the_input(photo: tuple[int, int], size: tuple[int, int]) -> None:
    assert reference.reference_input_size(*photo) == size
    assert reference.reference_input(np.zeros((*photo, 3), np.uint8)).shape == (3, *size)


def test_input_is_blue_green_red_less_the_means() -> None:
    image = np.empty((456, 456, 3), np.uint8)
    image[:] = (200, 100, 50)
    values = reference.reference_input(image, short=456)
    expected = np.array([50 - 102.9801, 100 - 115.9465, 200 - 122.7717], np.float32)
    assert np.abs(values - expected[:, None, None]).max() < 1e-5

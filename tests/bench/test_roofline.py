"""Tests of bench.roofline against numbers computed by hand."""

from __future__ import annotations

import pytest

from bench.roofline import GPUS, Gpu, Shapes, head, loss, precise_roi, report


def test_the_work_of_a_convolution() -> None:
    work = {entry.name: entry for entry in head(Shapes(batch=2, size=512))}
    pixels = 2 * 128 * 128
    assert work["fusion"].flop == 2 * pixels * 9 * 512 * 512
    assert work["fusion"].bytes == 2 * (3 * pixels * 512 + 9 * 512 * 512)  # x, the addend, the result; the weights
    assert work["lateral, stride 4"].flop == 2 * pixels * 96 * 512


def test_the_floor_is_the_longer_of_two_times() -> None:
    work = head(Shapes())[0]
    assert work.floor(Gpu(flops=1.0, bandwidth=1e30)) == pytest.approx(work.flop)
    assert work.floor(Gpu(flops=1e30, bandwidth=1.0)) == pytest.approx(work.bytes)


def test_the_work_of_the_loss() -> None:
    """Logits and their gradient have 2 bytes an element, labels 8; no resampled logits are stored."""
    work = loss(Shapes(batch=2, size=512))
    assert work.bytes == 2 * (2 * 2 * 128 * 128 * 150 + 8 * 512 * 512)
    assert work.name in report(Shapes())


def test_twice_the_images_are_twice_the_operations() -> None:
    one, two = ([entry.flop for entry in head(Shapes(batch=batch))] for batch in (1, 2))
    assert two == [2 * flop for flop in one]
    assert all(name in report(Shapes()) for name in GPUS)


def test_the_work_of_precise_roi_pooling() -> None:
    """Each pixel is multiplied once for each of four scales; the map is read once, and 50 cells are written."""
    work = precise_roi(Shapes(batch=2, size=512, channels=(256, 512, 1024, 2048)))
    assert work.flop == 2 * 4 * 2 * 16 * 16 * 2048
    assert work.bytes == 2 * 2 * (16 * 16 + 50) * 2048
    assert work.name in report(Shapes())

"""Computes the least times ("floors") of the head's operations on a GPU: `python -m bench.roofline`.

Each operation has the shapes of a UPerNet-ConvNeXt-T. Its floor is the longer of two times at the rates of a GPU's data
sheet: of its floating-point operations, and of its bytes (every operand read once, every result written once). Nothing
is measured here; `make gpu-check` compares measured times with these floors.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from bench.terminal import table, text


@dataclass(frozen=True)
class Gpu:
    """A GPU's rates in its data sheet, per second: dense bfloat16 operations, and bytes of device memory."""

    flops: float
    bandwidth: float


GPUS = {"H200": Gpu(989e12, 4.8e12), "A100": Gpu(312e12, 2.04e12), "L4": Gpu(121e12, 0.3e12)}


@dataclass(frozen=True)
class Shapes:
    """Sizes of a head's operands.

    Args:
        batch: number of images.
        size: height and width of the images.
        channels: of the feature maps, finest first.
        dim: channels of the head.
        classes: of the classifier.
        scales: of the pyramid pooling.
        bytes: of one element.
    """

    batch: int = 1
    size: int = 512
    channels: tuple[int, ...] = (96, 192, 384, 768)
    dim: int = 512
    classes: int = 150
    scales: tuple[int, ...] = (1, 2, 3, 6)
    bytes: int = 2

    def pixels(self, level: int) -> int:
        """Return a level's pixels in all images; level 0 has stride 4."""
        return self.batch * (self.size // (4 << level)) ** 2


@dataclass(frozen=True)
class Work:
    """An operation's floating-point operations and its bytes to move."""

    name: str
    flop: int
    bytes: int

    def floor(self, gpu: Gpu) -> float:
        """Return the operation's least seconds."""
        return max(self.flop / gpu.flops, self.bytes / gpu.bandwidth)


def conv(
    name: str, pixels: int, channels: int, channels_out: int, taps: int, size: int, extra: Sequence[int] = ()
) -> Work:
    """Return a convolution's work; `extra` counts elements of further operands, `size` is an element's bytes."""
    elements = pixels * (channels + channels_out) + taps * channels * channels_out + sum(extra)
    return Work(name, 2 * pixels * taps * channels * channels_out, size * elements)


def head(shapes: Shapes) -> list[Work]:
    """Return the head's operations in evaluation, in order, up to labels at the image's size."""
    s, dim, size = shapes, shapes.dim, shapes.bytes
    top = len(s.channels) - 1
    cells = s.batch * sum(scale * scale for scale in s.scales)
    found = [
        Work("pyramid_pool", s.pixels(top) * s.channels[top], size * (s.pixels(top) + cells) * s.channels[top]),
        conv("branches of the pyramid", cells, s.channels[top], dim, 1, size, [3 * s.channels[top] * dim]),
        taps_work("pyramid, products and sum of the taps", [cells], len(s.scales), s.pixels(top), s),
        conv("bottleneck", s.pixels(top), s.channels[top], dim, 9, size, [s.pixels(top) * dim]),
    ]
    for level in reversed(range(top)):
        coarser = s.pixels(level + 1) * dim
        stride = 4 << level
        found.append(conv(f"lateral, stride {stride}", s.pixels(level), s.channels[level], dim, 1, size, [coarser]))
    for level in reversed(range(top)):
        found.append(conv(f"FPN, stride {4 << level}", s.pixels(level), dim, dim, 9, size))
    coarser_levels = [s.pixels(level) for level in range(1, top + 1)]
    found.append(taps_work("fusion, products and sum of the taps", coarser_levels, top, s.pixels(0), s))
    found.append(conv("fusion", s.pixels(0), dim, dim, 9, size, [s.pixels(0) * dim]))
    found.append(conv("classifier", s.pixels(0), dim, s.classes, 1, size))
    labels = s.batch * s.size**2
    found.append(Work("upsample_argmax", 4 * labels * s.classes, size * s.pixels(0) * s.classes + 8 * labels))
    return found


def loss(shapes: Shapes) -> Work:
    """Return the work of the cross entropy at the images' size and of its gradient."""
    logits, labels = shapes.pixels(0) * shapes.classes, shapes.batch * shapes.size**2
    # For each resampled logit: 4 operations to interpolate, 4 for the softmax, 4 for the gradient.
    return Work("upsample_cross_entropy", 12 * labels * shapes.classes, 2 * shapes.bytes * logits + 8 * labels)


def precise_roi(shapes: Shapes) -> Work:
    """Return the work of pooling the coarsest map into the cells of precise RoI pooling: a product for each scale."""
    pixels, channels = shapes.pixels(len(shapes.channels) - 1), shapes.channels[-1]
    cells = shapes.batch * sum(scale * scale for scale in shapes.scales)
    flop = 2 * len(shapes.scales) * pixels * channels
    return Work("pyramid_pool, precise RoI", flop, shapes.bytes * (pixels + cells) * channels)


def taps_work(name: str, levels: Sequence[int], weights: int, pixels: int, shapes: Shapes) -> Work:
    """Return the work of `upsampled_conv3x3`: it writes the products and reads them again to sum them."""
    dim = shapes.dim
    products = 9 * dim * sum(levels)
    elements = dim * sum(levels) + weights * 9 * dim * dim + 2 * products + pixels * dim
    return Work(name, 2 * products * dim + 2 * 6 * pixels * dim * len(levels), shapes.bytes * elements)


def report(shapes: Shapes) -> str:
    """Return the work, and the floors in microseconds, as a table for a terminal."""
    work = head(shapes)
    total = Work("all of the head", sum(w.flop for w in work), sum(w.bytes for w in work))
    rows = []
    for entry in [*work, total, loss(shapes), precise_roi(shapes)]:
        floors = [
            sum(part.floor(gpu) for part in work) if entry is total else entry.floor(gpu) for gpu in GPUS.values()
        ]
        rows.append(
            [entry.name, f"{entry.flop / 1e9:.2f}", f"{entry.bytes / 1e6:.1f}", *(f"{1e6 * t:.1f}" for t in floors)]
        )
    title = f"batch {shapes.batch}, {shapes.size} x {shapes.size}, {8 * shapes.bytes} bit"
    return text([table(title, ("operation", "GFLOP", "MB", *(f"{name}, us" for name in GPUS)), rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1, help="number of images")
    parser.add_argument("--size", type=int, default=512, help="height and width of the images")
    arguments = parser.parse_args()
    print(report(Shapes(batch=arguments.batch, size=arguments.size)))


if __name__ == "__main__":
    main()

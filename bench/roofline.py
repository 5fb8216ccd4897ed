"""The least time that the head's operations can take on a GPU: `python -m bench.roofline`.

Of each operation, at the shapes of a UPerNet-ConvNeXt-T: the floating-point operations, the bytes that it must move
(every operand read once, every result written once), and the longer of the two times that they take at the rates of a
GPU's data sheet. Nothing is measured here; `make gpu-check` sets what it measures beside these floors.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Rates of a GPU's data sheet: dense bfloat16 operations and bytes of device memory, a second."""

    flops: float
    bandwidth: float


GPUS = {"H200": Gpu(989e12, 4.8e12), "A100": Gpu(312e12, 2.04e12), "L4": Gpu(121e12, 0.3e12)}


@dataclass(frozen=True)
class Shapes:
    """A head's sizes.

    Args:
        batch: images.
        size: their height and width.
        channels: of the feature maps, finest first.
        dim: of the head.
        classes: of the classifier.
        scales: of the pyramid pooling.
        bytes: of a number.
    """

    batch: int = 1
    size: int = 512
    channels: tuple[int, ...] = (96, 192, 384, 768)
    dim: int = 512
    classes: int = 150
    scales: tuple[int, ...] = (1, 2, 3, 6)
    bytes: int = 2

    def pixels(self, level: int) -> int:
        """Return the pixels of a level, 0 being the one at stride 4, in all images."""
        return self.batch * (self.size // (4 << level)) ** 2


@dataclass(frozen=True)
class Work:
    """What an operation has to do."""

    name: str
    flop: int
    bytes: int

    def floor(self, gpu: Gpu) -> float:
        """Return the least seconds that it takes."""
        return max(self.flop / gpu.flops, self.bytes / gpu.bandwidth)


def conv(
    name: str, pixels: int, channels: int, channels_out: int, taps: int, size: int, extra: Sequence[int] = ()
) -> Work:
    """Return a convolution's work; `extra` are the elements of further operands, of `size` bytes a number."""
    elements = pixels * (channels + channels_out) + taps * channels * channels_out + sum(extra)
    return Work(name, 2 * pixels * taps * channels * channels_out, size * elements)


def head(shapes: Shapes) -> list[Work]:
    """Return the operations of the head in evaluation, in their order, down to labels at the image's size."""
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
    """Return the work of the cross entropy at the images' size and of its gradient: logits and labels in, that out."""
    logits, labels = shapes.pixels(0) * shapes.classes, shapes.batch * shapes.size**2
    # Of each resampled logit: 4 operations to make it, 4 for its share of the softmax, 4 to give its gradient back.
    return Work("upsample_cross_entropy", 12 * labels * shapes.classes, 2 * shapes.bytes * logits + 8 * labels)


def taps_work(name: str, levels: Sequence[int], weights: int, pixels: int, shapes: Shapes) -> Work:
    """Return the work of `upsampled_conv3x3`: levels and weights in, products out and in again, their sum out."""
    dim = shapes.dim
    products = 9 * dim * sum(levels)
    elements = dim * sum(levels) + weights * 9 * dim * dim + 2 * products + pixels * dim
    return Work(name, 2 * products * dim + 2 * 6 * pixels * dim * len(levels), shapes.bytes * elements)


def table(shapes: Shapes) -> str:
    """Return the work and the floors as a Markdown table, in microseconds."""
    lines = [
        f"| batch {shapes.batch}, {shapes.size} x {shapes.size}, {8 * shapes.bytes} bit | GFLOP | MB | "
        + " | ".join(f"{name}, us" for name in GPUS)
        + " |",
        "|---|---|---|" + "---|" * len(GPUS),
    ]
    work = head(shapes)
    total = Work("all of the head", sum(w.flop for w in work), sum(w.bytes for w in work))
    for entry in [*work, total, loss(shapes)]:
        floors = [
            sum(part.floor(gpu) for part in work) if entry is total else entry.floor(gpu) for gpu in GPUS.values()
        ]
        cells = [entry.name, f"{entry.flop / 1e9:.2f}", f"{entry.bytes / 1e6:.1f}", *(f"{1e6 * t:.1f}" for t in floors)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=512)
    arguments = parser.parse_args()
    print(table(Shapes(batch=arguments.batch, size=arguments.size)))


if __name__ == "__main__":
    main()

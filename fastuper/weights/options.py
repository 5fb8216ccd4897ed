"""The options of a conversion: what the caller may say where a checkpoint does not. This file imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fastuper.io.messages import shown


def plain(value: Any) -> Any:
    """Return a value with lists in place of tuples, so that equal values compare equal."""
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Option:
    """A value that the caller may give where a checkpoint does not say it.

    Args:
        text: what it says, for messages and the help of the command.
        kind: "integers" and "numbers" are lists; one number may stand for a list. "flag" is True or False.
        values: the values of a choice.
    """

    text: str
    kind: Literal["integers", "numbers", "flag", "choice"]
    values: tuple[str, ...] = ()

    def check(self, name: str, value: Any) -> Any:
        """Return a value of the option, with lists in place of tuples.

        Raises:
            ValueError: it is of another kind.
        """
        value = plain(value.tolist() if hasattr(value, "tolist") else value)
        if self.kind == "flag":
            fits, expected = isinstance(value, bool), "True or False"
        elif self.kind == "choice":
            fits, expected = value in self.values, " or ".join(self.values)
        else:
            number = int if self.kind == "integers" else int | float
            parts = value if isinstance(value, list) and value else [value]
            fits = all(isinstance(part, number) and not isinstance(part, bool) for part in parts)
            expected = f"{self.kind}, one or a list"
        if not fits:
            raise ValueError(f"{name} must be {expected}, got {shown(value)}")
        return value


OPTIONS: Mapping[str, Option] = {
    "num_heads": Option("number of attention heads of each stage (or of all blocks)", "integers"),
    "out_indices": Option("stages or blocks whose maps the head reads, counted from 0", "integers"),
    "pool_scales": Option("sides of the grids of the pyramid pooling", "integers"),
    "align_corners": Option("corners of the resampling", "flag"),
    "resnet_style": Option("ResNet's style: where a bottleneck has its stride", "choice", ("pytorch", "caffe")),
    "strides": Option("stride of each stage", "integers"),
    "dilations": Option("dilation of each stage", "integers"),
    "channel_order": Option("order of an image's channels", "choice", ("rgb", "bgr")),
    "neck_scales": Option("factors of a neck's levels, such as 4, 2, 1, 0.5", "numbers"),
    "image_size": Option("image size, height and width, of the position table or of timm's windows", "integers"),
    "mean": Option("mean of each channel, in 0 to 255", "numbers"),
    "std": Option("standard deviation of each channel, in 0 to 255", "numbers"),
    "pooling": Option(
        "pooling of Unified Perceptual Parsing's pyramid: the official code's, or adaptive",
        "choice",
        ("precise_roi", "adaptive"),
    ),
    "texture_head": Option(
        "a head for textures with random weights, which Unified Perceptual Parsing's code lacks", "flag"
    ),
}
"""The options of a conversion."""

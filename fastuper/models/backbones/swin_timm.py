"""Swin Transformer by the rules of timm (https://github.com/huggingface/pytorch-image-models), for its checkpoints.

The network is `SwinBackbone`'s, with the same names of modules and parameters. Three rules differ from those of the
authors' UPerNets, of Transformers and of mmsegmentation:

- A map that is no larger than the window, at the image size that the network was built for, is one window: the window
  shrinks to the map and is not shifted, each side for itself. The windows then stay as they are for images of any size.
- A map is shifted first, and then padded to whole windows. The two orders agree on maps of whole windows.
- The returned maps are not normed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastuper.io.bounds import BOUNDS, plain
from fastuper.io.messages import shown
from fastuper.models.backbones.layers import pair
from fastuper.models.backbones.registry import register
from fastuper.models.backbones.swin import DEPTHS, NAMES, SwinBackbone, SwinConfig
from fastuper.models.backbones.windows import Sides
from fastuper.models.configuration import as_list

WINDOW = replace(BOUNDS["window_size"], pair=True)


class TimmSwinConfig(SwinConfig):
    """Swin by the rules of timm; the defaults are timm's swin_tiny_patch4_window7_224. Transformers has no such model.

    Args:
        image_size: the image size, one number or (height, width), that the windows are made for; timm's `img_size`.
        window_sizes: the window of each stage, a number or (height, width), before it shrinks to a smaller map. None
            for `window_size` in all stages.
        always_partition: True for windows of full size, shifted, in all stages; timm's argument of this name.
        output_norms: True to norm the returned maps, as `SwinConfig` does.
        **values: see `SwinConfig`.

    Raises:
        ValueError: values contradict each other or are not valid; the message names them.
    """

    model_type = "swin_timm"

    def __init__(
        self,
        image_size: int | Sequence[int] = 224,
        window_sizes: Sequence[int | Sequence[int]] | None = None,
        always_partition: bool = False,
        output_norms: bool = False,
        **values: Any,
    ):
        self.window_sizes = plain(as_list(window_sizes))
        self.always_partition = always_partition
        self.output_norms = output_norms
        super().__init__(image_size=image_size, **values)

    def check(self) -> None:
        """Check all values; see `Config.check`."""
        super().check()
        sides = zip(pair(self.image_size), pair(self.patch_size), strict=True)
        if any(image < patch for image, patch in sides):
            raise ValueError(f"image_size={self.image_size} must be at least patch_size={self.patch_size}")
        if self.window_sizes is None:
            return
        if not isinstance(self.window_sizes, list) or len(self.window_sizes) != len(self.depths):
            raise ValueError(
                f"window_sizes must be a list of {len(self.depths)} windows, one for each stage, got "
                f"{shown(self.window_sizes)}"
            )
        for stage, window in enumerate(self.window_sizes):
            WINDOW.check(f"window_sizes[{stage}]", window)

    def windows(self, stage: int) -> tuple[Sides, Sides]:
        """Return the window of a stage, counted from 0, and the shift of every second block."""
        window = pair(self.window_size if self.window_sizes is None else self.window_sizes[stage])
        shift = window[0] // 2, window[1] // 2
        if self.always_partition:
            return window, shift
        # Patches beyond the last whole one are not counted, and merging rounds up: the sides are ceil(grid / 2^stage).
        images, patches = pair(self.image_size), pair(self.patch_size)
        sides = [-(-(image // patch) // 2**stage) for image, patch in zip(images, patches, strict=True)]
        (height, width), (down, right) = window, shift
        return (
            (min(sides[0], height), min(sides[1], width)),
            (down if sides[0] > height else 0, right if sides[1] > width else 0),
        )

    @property
    def pads_before_shift(self) -> bool:
        """Whether maps are padded to whole windows before they are shifted, or after."""
        return False

    @property
    def norms_outputs(self) -> bool:
        """Whether the returned maps are normed."""
        return self.output_norms


register("swin_timm", TimmSwinConfig, SwinBackbone, depths=DEPTHS, names=NAMES)

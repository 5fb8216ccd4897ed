"""From a photo to the model's inputs, and from its outputs to label maps. It needs numpy and Pillow."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps


class Photo:
    """The photo that the command line names, for the model in this folder: `python run.py PHOTO [OUTPUT.png]`.

    Attributes:
        inputs: the model's inputs by name, in their order. `pixel_values` (1, channels, height, width), float32, are
            prepared as the image processor does; `images` (1, height, width, 3), uint8, are prepared by the model
            itself. `target_size` (height, width), int64, is the size of the label maps: the photo's.
        dtype: the model's: "float32", "float16" or "bfloat16".
    """

    def __init__(self) -> None:
        if len(sys.argv) not in (2, 3):
            sys.exit("usage: python run.py PHOTO [OUTPUT.png]")
        name = sys.argv[1]
        self.output = Path(sys.argv[2] if len(sys.argv) == 3 else f"{Path(name).stem}_labels.png")
        self.export = json.loads(Path(__file__).with_name("export.json").read_text(encoding="utf-8"))
        self.dtype = self.export["settings"]["dtype"]
        try:
            photo = ImageOps.exif_transpose(Image.open(name))
        except OSError as error:
            sys.exit(f"cannot read {name}: {error}")
        self.size = photo.height, photo.width
        self.inputs = {}
        for name in self.export["inputs"]:
            if name == "pixel_values":
                self.inputs[name] = _pixels(photo, self.export["preprocessing"], self.export["settings"]["size"])
            elif name == "images":
                width, height = _target(photo, self.export["settings"]["size"], photo.size)
                self.inputs[name] = np.asarray(photo.convert("RGB").resize((width, height)))[None]
            else:
                self.inputs[name] = np.array(self.size, np.int64)

    def save(self, outputs: Any) -> None:
        """Write the label map in the photo's size, with its colours as a palette, and print the share of each class.

        A model of several tasks has a file for each task, and its scene is printed.

        Args:
            outputs: the model's outputs in their order: logits (1, classes, h, w) or label maps (1, h, w).
        """
        maps = dict(zip(self.export["outputs"], outputs, strict=True))
        for name, output in maps.items():
            names, palette = self.export["id2label"], self.export["palette"]
            if name in names:  # a model of several tasks
                names, palette = names[name], palette[name]
            names = list(names.values())
            if output.ndim == 2:
                print(f"{name}: {names[output[0].argmax()]}")
                continue
            labels = output[0] if output.ndim == 3 else _best(output[0], self.size)
            path = self.output if len(maps) == 1 else self.output.with_stem(f"{self.output.stem}_{name}")
            _save(labels, self.size, palette, path)
            print(f"{path}:")
            shares = np.bincount(labels.ravel(), minlength=len(names)) / labels.size
            for index in np.argsort(-shares, kind="stable")[: np.count_nonzero(shares)]:
                print(f"  {shares[index]:6.1%} {names[index]}")


def _pixels(photo: Image.Image, steps: dict[str, Any], fixed: str) -> np.ndarray:
    """Return a photo resized, rescaled and normalised: (1, channels, height, width), float32."""
    channels = np.size(steps["image_mean"])
    if channels not in (1, 3):
        sys.exit(f"the model takes images of {channels} channels, and a photo has 3")
    if steps.get("size_divisor") or steps.get("antialias") is False or steps.get("do_flip_channel_order"):
        sys.exit("run.py does not prepare photos in this way; export the model with --with-preprocessing")
    size = _resized(photo, steps["size"]) if steps["do_resize"] else photo.size
    photo = photo.convert("L" if channels == 1 else "RGB")
    photo = photo.resize(_target(photo, fixed, size), Image.Resampling(steps["resample"]))
    pixels = np.asarray(photo).reshape(photo.height, photo.width, channels)
    if steps["do_rescale"]:
        pixels = (pixels * steps["rescale_factor"]).astype(np.float32)
    if steps["do_normalize"]:
        pixels = (pixels - np.float32(steps["image_mean"])) / np.float32(steps["image_std"])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], np.float32)


def _target(photo: Image.Image, fixed: str, size: tuple[int, int]) -> tuple[int, int]:
    """Return the (width, height) of the model's images: of a model for one size that size, otherwise `size`."""
    if fixed == "any":
        return size
    height, width = fixed.lower().split("x")
    return int(width), int(height)


def _resized(photo: Image.Image, size: dict[str, int]) -> tuple[int, int]:
    """Return the (width, height) to which the image processor resizes a photo."""
    if {*size} == {"height", "width"}:
        return size["width"], size["height"]
    if {*size} != {"shortest_edge"}:
        sys.exit("run.py does not resize photos in this way; export the model with --with-preprocessing")
    edge, (width, height) = size["shortest_edge"], photo.size
    return (int(edge * width / height), edge) if height <= width else (edge, int(edge * height / width))


def _best(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the best class of each pixel (height, width), of logits (classes, h, w) that are interpolated bilinearly.

    A single class is 1 where its logit is above 0, and 0 elsewhere.
    """
    if len(logits) == 1:
        logits = np.concatenate([np.zeros_like(logits), logits])
    best, labels = np.full(size, -np.inf, np.float32), np.zeros(size, np.uint16)
    for index, plane in enumerate(logits):
        plane = _interpolated(_interpolated(plane, size[0]).T, size[1]).T
        labels[plane > best] = index
        np.maximum(best, plane, out=best)
    return labels


def _interpolated(plane: np.ndarray, length: int) -> np.ndarray:
    """Return a plane (h, w) with `length` rows, each between its two nearest rows."""
    at = np.clip((np.arange(length) + 0.5) * len(plane) / length - 0.5, 0, len(plane) - 1)
    low = at.astype(int)
    weight = (at - low).astype(np.float32)[:, None]
    return plane[low] * (1 - weight) + plane[np.minimum(low + 1, len(plane) - 1)] * weight


def _save(labels: np.ndarray, size: tuple[int, int], palette: list[list[int]], path: Path) -> None:
    """Write a label map as a PNG whose values are the classes; above 256 classes as 16-bit grey, without colours."""
    image = Image.fromarray(labels.astype(np.uint8 if len(palette) <= 256 else np.uint16))
    if len(palette) <= 256:
        image.putpalette(np.array(palette, np.uint8).tobytes())
    image.resize(size[::-1], Image.Resampling.NEAREST).save(path)

"""What to export: the options of `fastuper export`, which `export_model` takes too."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastuper.io.messages import shown
from fastuper.io.options import check_options, document_options, option

# The command line imports this file: nothing here imports torch.


class ExportError(RuntimeError):
    """A model cannot be exported, or its export is wrong; the message is one line with the reason and the remedy."""


class ProofError(ExportError):
    """The exported model does not run in its runtime, or gives other results than the model."""


DTYPES: dict[str, tuple[str, ...]] = {
    "onnx": ("float32", "float16"),  # ONNX Runtime has no convolution in bfloat16 on a CPU
    "openvino": ("float32", "float16", "bfloat16"),
    "torch": ("float32", "float16", "bfloat16"),
    "aoti": ("float32", "float16", "bfloat16"),
    "executorch": ("float32",),
}
"""The dtypes of each format that its runtime computes in on a CPU."""

QUANTISED = {"onnx": "onnxruntime", "openvino": "nncf"}
"""The formats that hold 8-bit integers, and the package that quantises for each."""

SIDES = (16, 16384)
"""The smallest and the largest side of `size`, in pixels."""


@document_options
@dataclass(frozen=True)
class ExportSettings:
    """How to export a model.

    A value that is not valid, or values that contradict each other, raise ValueError; the message names the options.
    """

    format: Literal["onnx", "openvino", "torch", "aoti", "executorch"] = option("onnx", "Format of the exported model.")
    labels: bool = option(False, "Export the label map instead of the logits.")
    target_size: bool = option(
        False, "With --labels: the height and width of the label map are a second input, target_size."
    )
    size: str = option("any", "Size of the images: any, or HEIGHTxWIDTH for one size.", metavar="any|HxW")
    dtype: Literal["float32", "float16", "bfloat16"] = option(
        "float32", "Floating-point type of the weights and of the arithmetic; inputs and logits are float32 in all."
    )
    opset: int | None = option(
        None, "Version of ONNX's operators.", at_least=1, default_text="the one that is tested", metavar="N"
    )
    with_preprocessing: bool = option(
        False, "The input is a photo, uint8 RGB (batch, height, width, 3); it is resized and normalised inside."
    )
    check: bool = option(
        True,
        "Run the exported model in its runtime, at eight sizes, before anything is written. --no-check writes it "
        "unproven.",
        flag="--check/--no-check",
    )
    int8: Path | None = option(  # noqa: RUF009
        None, "Quantise to 8-bit integers, calibrated on the photos of this folder.", metavar="FOLDER"
    )
    accept_int8_loss: bool = option(
        False, "With --int8: also write a model whose labels differ too much from the unquantised model's."
    )

    def __post_init__(self) -> None:
        check_options(self)
        self._check_size()
        runtimes = " or ".join(DTYPES[self.format])
        faults = (
            (self.target_size and not self.labels, "target_size is the size of label maps; it needs labels"),
            (
                self.opset is not None and self.format != "onnx",
                f"opset is for format=onnx; leave it out with format={self.format}",
            ),
            (
                self.dtype not in DTYPES[self.format],
                f"dtype={self.dtype}: the runtime of format={self.format} computes in {runtimes} on a CPU",
            ),
            (
                self.format == "executorch" and self.image_size is None,
                "format=executorch plans its memory for one size; give size=HEIGHTxWIDTH, such as size=512x512",
            ),
            (
                self.format == "executorch" and self.target_size,
                "format=executorch has label maps of one size; leave out target_size",
            ),
            (
                self.int8 is not None and self.format not in QUANTISED,
                f"int8 is for format={' or '.join(QUANTISED)}, not {self.format}",
            ),
            (self.int8 is not None and self.dtype != "float32", f"int8 is in place of dtype={self.dtype}; give one"),
            (
                self.int8 is not None and not self.check,
                "int8 is accepted by its results in the runtime; leave out int8 or no-check",
            ),
            (self.accept_int8_loss and self.int8 is None, "accept_int8_loss is for int8; give its folder"),
        )
        for is_there, fault in faults:
            if is_there:
                raise ValueError(fault)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) of the images, or None for any size."""
        if self.size == "any":
            return None
        height, width = self.size.split("x")
        return int(height), int(width)

    def _check_size(self) -> None:
        least, largest = SIDES
        sides = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", str(self.size))
        if self.size != "any" and not (sides and all(least <= int(side) <= largest for side in sides.groups())):
            raise ValueError(
                f"size={shown(self.size)}: give any, or HEIGHTxWIDTH in pixels, each from {least} to {largest}, such "
                "as 512x512"
            )

"""What to export: the options of `fastuper export`, which `export_model` takes too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastuper.io.options import check_options, document_options, option

# The command line imports this file: nothing here imports torch.

Format = Literal["onnx", "openvino", "torch", "aoti", "executorch"]


class ExportError(RuntimeError):
    """A model cannot be exported, or its export is wrong; the message is one line with the reason and the remedy."""


@document_options
@dataclass(frozen=True)
class ExportSettings:
    """How to export a model. A value that is not valid raises ValueError, and the message names the option."""

    format: Format = option("onnx", "Format of the exported model.")
    labels: bool = option(False, "Export the label map instead of the logits.")
    target_size: bool = option(
        False, "With --labels: the height and width of the label map are a second input, target_size."
    )
    size: str = option("any", "Size of the images: any, or HEIGHTxWIDTH for one size.", metavar="any|HxW")
    dtype: Literal["float32", "float16", "bfloat16"] = option(
        "float32", "Floating-point type of the weights and of the arithmetic; inputs and logits are float32 in all."
    )
    opset: int | None = option(None, "Version of ONNX's operators.", default_text="the one that is tested", metavar="N")
    with_preprocessing: bool = option(
        False, "The input is a photo, uint8 RGB (batch, height, width, 3); it is resized and normalised inside."
    )
    check: bool = option(True, "Run the exported model in its runtime before anything is written.")
    int8: Path | None = option(
        None, "Quantise to 8-bit integers, calibrated on the photos of this folder.", metavar="FOLDER"
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) of the images, or None for any size."""
        if self.size == "any":
            return None
        height, width = self.size.lower().split("x")
        return int(height), int(width)

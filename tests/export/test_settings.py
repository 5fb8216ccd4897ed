"""The options of an export: what contradicts what."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastuper.export import ExportSettings

REFUSED = {
    "format": ({"format": "tflite"}, "format='tflite' is not known; known are onnx, openvino, torch, aoti, executorch"),
    "dtype": ({"dtype": "float64"}, "dtype='float64' is not known; known are float32"),
    "target-size": ({"target_size": True}, "target_size is the size of label maps; it needs labels"),
    "opset": ({"format": "openvino", "opset": 17}, "opset is for format=onnx; leave it out with format=openvino"),
    "no-opset": ({"opset": 0}, "opset must be a whole number of at least 1, got 0"),
    "onnx-bfloat16": ({"dtype": "bfloat16"}, "format=onnx computes in float32 or float16 on a CPU"),
    "executorch-float16": (
        {"format": "executorch", "dtype": "float16", "size": "64x64"},
        "dtype=float16: the runtime of format=executorch computes in float32",
    ),
    "executorch-any": ({"format": "executorch"}, "plans its memory for one size; give size=HEIGHTxWIDTH"),
    "executorch-target": (
        {"format": "executorch", "size": "64x64", "labels": True, "target_size": True},
        "format=executorch has label maps of one size; leave out target_size",
    ),
    "int8-torch": ({"format": "torch", "int8": Path("photos")}, "int8 is for format=onnx or openvino, not torch"),
    "int8-float16": ({"dtype": "float16", "int8": Path("photos")}, "int8 is in place of dtype=float16; give one"),
    "int8-unchecked": ({"check": False, "int8": Path("photos")}, "leave out int8 or no-check"),
    "loss-without-int8": ({"accept_int8_loss": True}, "accept_int8_loss is for int8; give its folder"),
    **{
        f"size-{size}": ({"size": size}, f"size='{size}': give any, or HEIGHTxWIDTH in pixels, each from 16 to 16384")
        for size in (
            "",
            "512",
            "512x",
            "512x512x3",
            "-64x64",
            "8x512",
            "512x16385",
            "64.5x64",
            "512X512",
            "\uff16\uff14x\uff16\uff14",
            "all",
        )
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_contradicts_itself_is_refused(case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=r".") as raised:
        ExportSettings(**options)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_sizes():
    assert ExportSettings().image_size is None
    assert ExportSettings(size="512x640").image_size == (512, 640)
    assert ExportSettings("executorch", size="16x16384").image_size == (16, 16384)

"""Segment a photo with OpenVINO: python run.py PHOTO [OUTPUT.png]. It needs openvino, numpy and Pillow."""

from pathlib import Path

import openvino
from photo import Photo

photo = Photo()
# Without a hint OpenVINO computes in bfloat16 on processors that have it.
hint = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[photo.dtype]
file = Path(__file__).with_name("model.xml")
model = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": hint})
photo.save(model(photo.inputs).values())

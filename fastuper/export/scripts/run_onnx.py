"""Segment a photo with ONNX Runtime: python run.py PHOTO [OUTPUT.png]. It needs onnxruntime, numpy and Pillow."""

from pathlib import Path

import onnxruntime
from photo import Photo

photo = Photo()
session = onnxruntime.InferenceSession(Path(__file__).with_name("model.onnx"), providers=["CPUExecutionProvider"])
photo.save(session.run(None, photo.inputs))

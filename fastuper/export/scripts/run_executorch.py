"""Segment a photo with ExecuTorch: python run.py PHOTO [OUTPUT.png]. It needs executorch, torch, numpy and Pillow."""

from pathlib import Path

import torch
from executorch.runtime import Runtime
from photo import Photo

photo = Photo()
model = Runtime.get().load_program(Path(__file__).with_name("model.pte")).load_method("forward")
outputs = model.execute([*map(torch.from_numpy, photo.inputs.values())])
photo.save([output.numpy() for output in outputs])

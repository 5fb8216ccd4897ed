"""Segment a photo with torch.export's program: python run.py PHOTO [OUTPUT.png]. It needs torch, numpy and Pillow."""

from pathlib import Path

import torch
from photo import Photo

photo = Photo()
model = torch.export.load(Path(__file__).with_name("model.pt2")).module()
with torch.no_grad():
    outputs = model(*map(torch.from_numpy, photo.inputs.values()))
photo.save([output.numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))])

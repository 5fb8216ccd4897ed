"""A model behind FastAPI: `MODEL=FOLDER uvicorn examples.serve_fastapi:app`; without MODEL, the demo model.

curl --data-binary @photo.jpg http://127.0.0.1:8000/segment --output labels.png
"""

import asyncio
import io
import os

import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response
from PIL import Image

from fastuper import UperNetForSemanticSegmentation, UperNetImageProcessor
from fastuper.scenes import MODEL

LARGEST = 20_000_000  # bytes of a photo's file
SOURCE = os.environ.get("MODEL", str(MODEL))
model = UperNetForSemanticSegmentation.from_pretrained(SOURCE, dtype="float32").eval()
processor = UperNetImageProcessor.from_pretrained(SOURCE)
app, turn = FastAPI(), asyncio.Lock()


def segment(content: bytes) -> bytes:
    """Return a photo's label map as a PNG of its size; the values are the class numbers."""
    photo = Image.open(io.BytesIO(content)).convert("RGB")
    pixels = processor(photo, return_tensors="pt")["pixel_values"]
    (labels,) = model.segment(pixels, target_sizes=[(photo.height, photo.width)])
    Image.fromarray(labels.numpy().astype(np.uint8)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


@app.post("/segment")
async def answer(request: Request) -> Response:
    content = bytearray()
    async for block in request.stream():
        content += block
        if len(content) > LARGEST:
            raise HTTPException(413, f"the photo has more than {LARGEST} bytes")
    try:
        async with turn:  # one photo at a time has all cores
            return Response(await asyncio.to_thread(segment, bytes(content)), media_type="image/png")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise HTTPException(400, f"the photo cannot be read: {error}") from None

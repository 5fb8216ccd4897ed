"""Windows, scales and flips against mmsegmentation's loops, written over Transformers' model in float64.

Labels are equal wherever the margin between the two best classes is more than rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from bench.pairs import pair
from fastuper import UperNetImageProcessor
from fastuper.inference.predictor import Predictor
from tests.parity.models import config

PROCESSOR = UperNetImageProcessor(size={"height": 72, "width": 96})


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return pair(config("convnext"))


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Return smooth blobs of colour: noise would have a single class everywhere."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 12 + 2, width // 12 + 2, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def slide(model: Any, image: torch.Tensor, window: tuple[int, int], stride: tuple[int, int]) -> torch.Tensor:
    """mmsegmentation's EncoderDecoder.slide_inference, for one image (1, C, H, W): logits of its size."""
    (h_stride, w_stride), (h_crop, w_crop) = stride, window
    _, _, h_img, w_img = image.shape
    h_grids = max(h_img - h_crop + h_stride - 1, 0) // h_stride + 1
    w_grids = max(w_img - w_crop + w_stride - 1, 0) // w_stride + 1
    preds = image.new_zeros((1, model.config.num_labels, h_img, w_img))
    count = image.new_zeros((1, 1, h_img, w_img))
    for h_idx in range(h_grids):
        for w_idx in range(w_grids):
            y2, x2 = min(h_idx * h_stride + h_crop, h_img), min(w_idx * w_stride + w_crop, w_img)
            y1, x1 = max(y2 - h_crop, 0), max(x2 - w_crop, 0)
            logits = model(image[:, :, y1:y2, x1:x2]).logits
            preds += F.pad(logits, (x1, w_img - x2, y1, h_img - y2))
            count[:, :, y1:y2, x1:x2] += 1
    return preds / count


def expected(
    model: Any,
    image: Image.Image,
    sizes: list[tuple[int, int]],
    *,
    window: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    flips: tuple[bool, ...] = (False,),
) -> torch.Tensor:
    """mmsegmentation's inference and aug_test: the scores (classes, height, width) of every pixel of the photo."""
    views = []
    with torch.no_grad():
        for size in sizes:
            pixels = PROCESSOR(images=[image], size=size, return_tensors="pt")["pixel_values"].double()
            for flip in flips:
                view = pixels.flip(3) if flip else pixels
                logits = model(view).logits if window is None else slide(model, view, window, stride)
                logits = F.interpolate(logits, size=(image.height, image.width), mode="bilinear", align_corners=False)
                views.append(logits.flip(3) if flip else logits)
    if len(views) == 1:
        return views[0][0]
    return sum(view.softmax(dim=1) for view in views)[0] / len(views)


def check(labels: torch.Tensor, scores: torch.Tensor) -> None:
    best, classes = scores.topk(2, dim=0)
    certain = best[0] - best[1] > 1e-9 * scores.abs().max()
    assert labels.dtype == torch.uint8
    assert torch.equal(labels[certain].long(), classes[0][certain])
    assert certain.float().mean() > 0.999
    assert len(labels.unique()) > 1


@pytest.mark.parametrize(
    ("window", "stride", "size"),
    [
        ((64, 64), (43, 43), (100, 150)),  # the last windows are moved back, by less than a stride
        ((48, 80), (48, 37), (96, 150)),  # windows that meet without overlap vertically, not horizontally
        ((64, 96), (10, 90), (80, 97)),  # windows of several rows cover each pixel
        ((200, 64), (133, 43), (70, 140)),  # windows are clipped to the image
        ((500, 500), (300, 300), (60, 90)),  # a single window of the image's size
    ],
)
def test_windows(models: tuple[Any, Any], window: Any, stride: Any, size: Any) -> None:
    theirs, ours = models
    image = picture(*size)
    scores = expected(theirs, image, [size], window=window, stride=stride)
    for batch_size in (1, 4):
        (labels,) = Predictor(ours, PROCESSOR, window=window, stride=stride, batch_size=batch_size)([image])
        check(labels, scores)


def test_scales_and_flips(models: tuple[Any, Any]) -> None:
    theirs, ours = models
    image = picture(110, 140)
    sizes = [(54, 72), (72, 96), (108, 144)]
    scores = expected(theirs, image, sizes, flips=(False, True))
    predictor = Predictor(ours, PROCESSOR, scales=(0.75, 1, 1.5), flip=True, batch_size=2)
    check(predictor([image])[0], scores)
    single = expected(theirs, image, [(72, 96)])
    assert (single.argmax(0) != scores.argmax(0)).float().mean() > 0.005, "views change nothing, so nothing was tested"
    check(Predictor(ours, PROCESSOR)([image])[0], single)
    check(Predictor(ours, PROCESSOR, scales=(1.5,))([image])[0], expected(theirs, image, [(108, 144)]))
    check(Predictor(ours, PROCESSOR, flip=True)([image])[0], expected(theirs, image, [(72, 96)], flips=(False, True)))


def test_windows_scales_and_flips_of_several_images(models: tuple[Any, Any]) -> None:
    theirs, ours = models
    images = [picture(130, 100, seed=1), picture(40, 240, seed=2)]
    # The shorter side is 48 unless the longer side would exceed 192.
    bases = [(62, 48), (32, 192)]
    predictor = Predictor(
        ours, PROCESSOR, short_side=48, window=48, stride=32, scales=(1.0, 1.25), flip=True, batch_size=5
    )
    for labels, image, base in zip(predictor(images), images, bases, strict=True):
        sizes = [base, (round(base[0] * 1.25), round(base[1] * 1.25))]
        scores = expected(theirs, image, sizes, window=(48, 48), stride=(32, 32), flips=(False, True))
        check(labels, scores)

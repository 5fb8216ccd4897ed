"""`Predictor`: order, batches, windows and resampling, memory, and errors."""

from __future__ import annotations

import types
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from fastuper import UperNetImageProcessor
from fastuper.inference import votes
from fastuper.inference.predictor import PredictionError, Predictor, Prepared

PROCESSOR = UperNetImageProcessor(
    size=32, do_normalize=False, do_rescale=False, image_mean=[0.0] * 3, image_std=[1.0] * 3
)


class Colours(torch.nn.Module):
    """A model whose logits are the pixels: the label is the brightest channel."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.classes = classes
        self.batches: list[tuple[int, ...]] = []

    device = property(lambda self: self.weight.device)
    dtype = property(lambda self: self.weight.dtype)

    def forward(self, pixels: torch.Tensor) -> types.SimpleNamespace:
        self.batches.append(tuple(pixels.shape))
        return types.SimpleNamespace(logits=pixels[:, : self.classes] - (128 if self.classes == 1 else 0))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_images_come_back_in_order_and_windows_share_batches() -> None:
    model = Colours()
    images = [picture(40 + 8 * seed, 50, seed) for seed in range(4)]
    predictor = Predictor(model, PROCESSOR, window=(32, 32), stride=20, batch_size=4)
    for labels, image in zip(predictor(images), images, strict=True):
        np.testing.assert_array_equal(labels.numpy(), image.argmax(-1))
    # 2 x 2 windows of the first two images, 3 x 2 of the others.
    assert model.batches == [(4, 3, 32, 32)] * 5


def test_labels_of_another_size_and_of_one_class() -> None:
    image = picture(40, 50)
    predictor = Predictor(Colours(), PROCESSOR, window=32)
    (labels,) = predictor([Image.fromarray(image)], [(80, 25)])
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(image).permute(2, 0, 1)[None].double(), size=(80, 25), mode="bilinear"
    )
    margin = expected.topk(2, dim=1).values[0].diff(dim=0).abs()[0] > 1e-3
    assert torch.equal(labels[margin], expected.argmax(1)[0][margin])
    one = Predictor(Colours(classes=1), PROCESSOR, window=32, flip=True)
    np.testing.assert_array_equal(one([image])[0].numpy(), image[:, :, 0] > 128)


def test_a_processor_that_keeps_the_aspect_ratio() -> None:
    edges = UperNetImageProcessor(size={"shortest_edge": 32, "longest_edge": 40})
    predictor = Predictor(Colours(), edges)
    for size, expected in (((64, 70), (32, 35)), ((60, 300), (8, 40))):
        (pixels,) = predictor.prepare(picture(*size), "photo", size).scales
        assert pixels.shape == (3, *expected)


@pytest.mark.parametrize("size", [(20, 9), (390, 70), (1, 1), (800, 40)])
@pytest.mark.parametrize("rows", [1, 4, 500])
def test_rows_that_arrive_bit_by_bit_are_resampled_as_a_whole(
    size: tuple[int, int], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(votes, "STRIP_ROWS", rows)
    image = picture(400, 40)
    (labels,) = Predictor(Colours(), PROCESSOR, window=32, stride=7)([image], [size])
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    best, classes = torch.nn.functional.interpolate(pixels, size=size, mode="bilinear")[0].topk(2, dim=0)
    certain = best[0] - best[1] > 1e-3
    assert torch.equal(labels[certain], classes[0][certain])
    assert certain.float().mean() > 0.9


def test_images_are_asked_for_as_they_are_needed() -> None:
    asked = []

    def images() -> Iterator[Prepared]:
        for number in range(20):
            asked.append(number)
            yield predictor.prepare(picture(40, 40, number), number, (40, 40))

    predictor = Predictor(Colours(), PROCESSOR, window=32, stride=8, batch_size=4)
    for name, _ in predictor.predict(images()):
        assert len(asked) <= name + 3


def test_rows_that_are_done_with_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    add = votes.RowResampler.add

    def spy(self: object, rows: torch.Tensor, flipped: bool) -> None:
        add(self, rows, flipped)
        held.append(rows.shape[1] + (0 if self.held is None else self.held.shape[1]))

    monkeypatch.setattr(votes.RowResampler, "add", spy)
    monkeypatch.setattr(votes, "STRIP_ROWS", 4)
    image = picture(400, 32)
    (labels,) = Predictor(Colours(), PROCESSOR, window=32, stride=16)([image], [(300, 32)])
    assert labels.shape == (300, 32)
    assert max(held) < 60
    assert len(held) > 20


def test_what_the_model_fails_with_names_the_image() -> None:
    class Broken(Colours):
        def forward(self, pixels: torch.Tensor) -> types.SimpleNamespace:
            raise torch.OutOfMemoryError("CUDA out of memory")

    class NotFinite(Colours):
        def forward(self, pixels: torch.Tensor) -> types.SimpleNamespace:
            return types.SimpleNamespace(logits=pixels * float("nan"))

    for model, reason in ((Broken(), "CUDA out of memory"), (NotFinite(), "the logits are not finite")):
        predictor = Predictor(model, PROCESSOR, flip=True)
        with pytest.raises(PredictionError, match=f"^street.jpg: {reason}"):
            list(predictor.predict([predictor.prepare(picture(32, 32), "street.jpg", (32, 32))]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 3}, "give window too"),
        ({"window": 8, "stride": 9}, r"stride \(9, 9\) leaves gaps between windows of \(8, 8\)"),
        ({"window": (8, 0)}, r"window is \(8, 0\)"),
        ({"scales": ()}, r"scales are \(\)"),
        ({"scales": (1, -1)}, "scales are"),
        ({"scales": (float("nan"),)}, "scales are"),
        ({"short_side": 0}, "short_side is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_options_without_meaning(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Predictor(Colours(), PROCESSOR, **options)


def test_the_usual_strides() -> None:
    assert Predictor(Colours(), PROCESSOR, window=512).stride == (341, 341)
    assert Predictor(Colours(), PROCESSOR, window=640).stride == (426, 426)
    assert Predictor(Colours(), PROCESSOR, window=1).stride == (1, 1)

"""`segment()` against Transformers' forward and its processor's `post_process_semantic_segmentation`.

Label maps must be equal where the float64 margin between the two best logits exceeds 8 eps(dtype) max|logit|. Elsewhere
the two classes tie within rounding; the number of such pixels is reported.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F

from bench.pairs import images, pair
from tests.parity.models import FAMILIES, config

SIZE = (76, 101)

TARGETS: dict[str, Any] = {
    "own-size": None,
    "up-and-down": [(200, 310), (40, 33), SIZE],
    "one-pixel-and-slim": [(1, 1), (3, 400), (150, 2)],
    "tensor": torch.tensor([[90, 90], [91, 92], [30, 31]]),
}


def post_process(logits: torch.Tensor, targets: Any) -> list[torch.Tensor]:
    """Return the label maps that the image processor of Transformers' UPerNet makes of logits."""
    output = transformers.modeling_outputs.SemanticSegmenterOutput(logits=logits)
    sizes = [tuple(size) for size in targets.tolist()] if isinstance(targets, torch.Tensor) else targets
    return transformers.SegformerImageProcessor().post_process_semantic_segmentation(output, sizes)


def decided(logits: torch.Tensor, target: tuple[int, int] | None, dtype: torch.dtype) -> tuple[Any, torch.Tensor]:
    """Return the labels (H, W) of float64 logits (C, h, w), and where rounding in `dtype` cannot change them."""
    logits = logits[None]
    if target is not None:
        logits = F.interpolate(logits, size=target, mode="bilinear", align_corners=False)
    best, labels = logits[0].topk(2, dim=0)
    return labels[0], best[0] - best[1] > 8 * torch.finfo(dtype).eps * logits.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_labels_of_transformers(family, targets, dtype, record_property):
    theirs, ours = pair(config(family), dtype=dtype)
    sizes = TARGETS[targets]
    pixels = images(3, 3, *SIZE, dtype=dtype)
    with torch.no_grad():
        expected = post_process(theirs(pixels).logits, sizes)
        truth = copy.deepcopy(theirs).double()(pixels.double()).logits
    result = ours.segment(pixels, target_sizes=sizes)
    assert len(result) == 3
    undecided, different, total, classes = 0, 0, 0, set()
    for i, labels in enumerate(result):
        target = None if sizes is None else (int(sizes[i][0]), int(sizes[i][1]))
        true_labels, certain = decided(truth[i], target, dtype)
        assert labels.dtype == torch.int64
        assert labels.shape == (target or SIZE)
        assert torch.equal(labels[certain], true_labels[certain])
        assert torch.equal(labels[certain], expected[i][certain])
        undecided += int((~certain).sum())
        different += int((labels != expected[i]).sum())
        total += labels.numel()
        classes.update(labels.unique().tolist())
    record_property("pixels_below_the_margin", f"{undecided} of {total}")
    record_property("pixels_that_differ_from_transformers", different)
    assert len(classes) > 1
    # In bfloat16 8 eps are 6 % of the largest logit; this bound ensures that enough pixels are compared.
    assert undecided < (0.6 if dtype == torch.bfloat16 else 0.001) * total + 1
    assert different <= undecided


@pytest.mark.parametrize("family", FAMILIES)
def test_segment_is_forward_and_argmax(family):
    ours = pair(config(family))[1]
    pixels = images(2, 3, 65, 90)
    with torch.no_grad():
        logits = ours(pixels).logits
    for labels, expected in zip(ours.segment(pixels), logits.argmax(dim=1), strict=True):
        assert torch.equal(labels, expected)


@pytest.mark.parametrize(("classes", "smallest"), [(1, torch.uint8), (5, torch.uint8), (300, torch.uint16)])
def test_label_maps_of_other_dtypes(classes, smallest):
    """A label map takes one or two bytes a pixel where the caller asks for it."""
    ours = pair(config("convnext", num_labels=classes))[1]
    pixels = images(2, 3, 65, 90)
    expected = ours.segment(pixels, TARGETS["up-and-down"][:2])
    for dtype, given in ((None, smallest), (torch.int32, torch.int32)):
        for labels, wide in zip(ours.segment(pixels, TARGETS["up-and-down"][:2], dtype=dtype), expected, strict=True):
            assert labels.dtype == given
            assert torch.equal(labels.long(), wide)
    with pytest.raises(ValueError, match="does not hold the labels"):
        ours.segment(pixels, dtype=torch.uint8 if classes > 256 else torch.float32)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_segment_takes_no_gradient_and_leaves_the_mode(training):
    ours = pair(config("convnext"), train=training)[1]
    pixels = images(2, 3, 64, 64).requires_grad_()
    assert not any(labels.requires_grad for labels in ours.segment(pixels))
    assert ours.training is training
    assert torch.is_grad_enabled()


def test_segment_does_not_run_the_auxiliary_head():
    ours = pair(config("convnext"))[1]
    calls = []
    ours.auxiliary_head.register_forward_hook(lambda *_: calls.append(1))
    ours.segment(images(1, 3, 64, 64))
    assert not calls

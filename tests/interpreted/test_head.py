"""The whole network with Triton's kernels, compared with Transformers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.numerics import error
from bench.pairs import images, pair
from fastuper.data.parsing_labels import TASKS
from tests.models.heads import feature_maps, parsing_as_written
from tests.models.test_parsing_head import parsing_head
from tests.parity.models import config, segmentation_labels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTUPER_BACKEND", "triton")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Return a set that the names of the called launchers are added to."""
    from fastuper_kernels.gpu import conv_bn_relu, pyramid_pool, upsampled_conv3x3

    names: set[str] = set()
    for module, name in ((conv_bn_relu, "conv"), (pyramid_pool, "pool"), (upsampled_conv3x3, "products_of")):
        original = getattr(module, name)

        def record(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            names.add(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, record)
    return names


def test_evaluation(launched: set[str]) -> None:
    theirs, ours = (model.to(DEVICE) for model in pair(config("convnext"), dtype=torch.float32))
    pixels = images(2, 3, 32, 64, dtype=torch.float32).to(DEVICE)
    with torch.no_grad():
        truth = theirs.double()(pixels.double()).logits
        logits = ours(pixels).logits
        labels = ours.segment(pixels, target_sizes=[(50, 70)] * 2)
    assert launched == {"conv", "pool", "products_of"}
    assert error(logits, truth) <= 1e-5
    wanted = torch.nn.functional.interpolate(truth, size=(50, 70), mode="bilinear", align_corners=False)
    chosen = wanted.gather(1, torch.stack(labels)[:, None])[:, 0]
    assert (wanted.amax(1) - chosen).max() <= 1e-4


def test_training(launched: set[str], few_programs: None) -> None:
    theirs, ours = (
        model.to(DEVICE) for model in pair(config("convnext", pool_scales=[1, 3]), dtype=torch.float32, train=True)
    )
    theirs = theirs.double()
    pixels, labels = images(3, 3, 32, 32, dtype=torch.float32), segmentation_labels(3, 32, 32).to(DEVICE)
    expected = theirs(pixels.double().to(DEVICE), labels=labels).loss
    expected.backward()
    loss = ours(pixels.to(DEVICE), labels=labels).loss
    loss.backward()
    assert "products_of" in launched
    assert abs(loss.item() - expected.item()) <= 1e-4 * expected.item()
    exact = dict(theirs.named_parameters())
    errors = sorted(error(p.grad, exact[name].grad) for name, p in ours.named_parameters() if p.grad is not None)
    assert errors[len(errors) // 2] <= 1e-3


@pytest.mark.parametrize(
    ("tasks", "resample_first"),
    [
        (("scene",), True),
        pytest.param(TASKS, True, marks=pytest.mark.exhaustive),
        pytest.param(TASKS, False, marks=pytest.mark.exhaustive),
    ],
    ids=["scene", "all", "all-resampled-last"],
)
def test_the_parsing_head(
    tasks: tuple[str, ...], resample_first: bool, launched: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = parsing_head(8, pool_scales=[1, 3], resample_first=resample_first).to(DEVICE)
    maps = [x.to(DEVICE) for x in feature_maps(1, [(8, 6), (4, 3), (2, 3), (3, 2)])]
    with torch.no_grad():
        logits = head(maps, tasks)
        assert launched == {"conv", "pool", *(["products_of"] if "object" in tasks else [])}  # scenes need no fusion
        monkeypatch.setenv("FASTUPER_BACKEND", "torch")
        truth = parsing_as_written(head.double(), [x.double() for x in maps])
    assert list(logits) == list(tasks)
    assert all(error(logits[task], truth[task]) <= 1e-5 for task in tasks)

"""The heads without a backbone: their checks, their outputs' sizes and their inputs."""

from __future__ import annotations

import pytest
import torch

from fastuper import UperNetConfig
from fastuper.models.heads.fcn import FCNHead
from fastuper.models.heads.pyramid import PyramidHead
from fastuper.models.heads.upernet import UperNetHead


def config(**values):
    return UperNetConfig(**{"hidden_size": 8, "num_labels": 4, "auxiliary_channels": 6, **values})


@pytest.mark.parametrize(
    ("options", "channels", "message"),
    [
        (
            {},
            [8, 16],
            "reads feature map 3, but the backbone returns 2: name more stages in out_features, or set use_aux",
        ),
        (
            {"auxiliary_in_channels": 9},
            [8, 16, 24],
            "auxiliary_in_channels=9, but feature map 3 has 24 channels; set auxiliary_in_channels=None",
        ),
        (
            {"auxiliary_num_convs": 0},
            [8, 16, 24],
            r"auxiliary_channels must be the 24 channels of the feature map, got 6",
        ),
    ],
    ids=["too-few-maps", "in-channels", "no-convolutions"],
)
def test_auxiliary_head_refuses_options_that_do_not_fit(options, channels, message):
    with pytest.raises(ValueError, match=message):
        FCNHead(config(**options), channels)


def test_logits_have_the_size_of_the_finest_map():
    head = UperNetHead(config(), [3, 5, 7, 9]).eval()
    sizes = [(13, 17), (7, 9), (4, 5), (2, 3)]
    maps = [torch.randn(2, channels, *size) for channels, size in zip([3, 5, 7, 9], sizes, strict=True)]
    assert head(maps).shape == (2, 4, 13, 17)


@pytest.mark.parametrize(
    "shapes",
    [
        [(1, 3, 8, 8), (1, 5, 4, 4)],
        [(1, 3, 8, 8), (1, 5, 4, 4), (1, 7, 2, 2), (1, 9, 1, 1)],
        [(1, 3, 8, 8), (1, 5, 4, 4), (1, 8, 2, 2)],
        [(1, 7, 2, 2), (1, 5, 4, 4), (1, 3, 8, 8)],
        [(3, 8, 8), (5, 4, 4), (7, 2, 2)],
        [],
    ],
    ids=["too-few", "too-many", "channels", "coarsest-first", "no-batch", "none"],
)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_head_refuses_maps_that_do_not_fit(training, shapes):
    head = UperNetHead(config(), [3, 5, 7]).train(training)
    with pytest.raises(ValueError, match=r"in_channels=\[3, 5, 7\] channels, finest first, got \[") as error:
        head([torch.zeros(shape) for shape in shapes])
    assert all(str(shape) in str(error.value) for shape in shapes)


def test_head_takes_any_number_of_levels():
    for channels in ([5], [3, 5], [3, 5, 7, 9, 11]):
        head = UperNetHead(config(pool_scales=[2]), channels).eval()
        maps = [torch.randn(1, c, 16 >> i, 16 >> i) for i, c in enumerate(channels)]
        assert head(maps).shape == (1, 4, 16, 16)


def test_head_leaves_its_inputs_unchanged():
    head = UperNetHead(config(), [3, 5]).train()
    maps = [torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)]
    before = [x.clone() for x in maps]
    head(maps)
    assert all(torch.equal(x, y) for x, y in zip(maps, before, strict=True))


def test_auxiliary_head_reads_only_the_third_map():
    head = FCNHead(config(), [3, 5, 7, 9]).eval()
    maps = [torch.full((1, c, 4, 4), float("nan")) for c in (3, 5, 7, 9)]
    maps[2] = torch.randn(1, 7, 6, 5)
    assert head(maps).isfinite().all()
    assert head(maps).shape == (1, 4, 6, 5)


class SeveralResults(PyramidHead):
    """A head that reads the pyramid at three places, as a head for several tasks does."""

    def forward(self, feature_maps):
        pooled = self.psp_forward(feature_maps)
        levels = self.smooth(self.top_down(feature_maps[:-1], pooled))
        return pooled, levels[0], self.fuse(levels)


@pytest.mark.parametrize("gradients", [False, True])
def test_another_head_over_the_same_pyramid(gradients):
    """Its steps are those of `UperNetHead`: a classifier on the fused levels gives the same logits."""
    upernet = UperNetHead(config(), [3, 5, 7, 9]).eval()
    other = SeveralResults([3, 5, 7, 9], 8, config().pool_scales).eval()
    state = {name: value for name, value in upernet.state_dict().items() if not name.startswith("classifier")}
    other.load_state_dict(state)
    maps = [torch.randn(2, c, 16 >> i, 24 >> i) for i, c in enumerate([3, 5, 7, 9])]
    with torch.set_grad_enabled(gradients):
        pooled, finest, fused = other(maps)
        assert pooled.shape == (2, 8, 2, 3)
        assert finest.shape == fused.shape == (2, 8, 16, 24)
        assert torch.equal(upernet.classify(fused), upernet(maps))

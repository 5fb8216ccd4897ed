"""bench.parsing: the textbook network is fastuper's, wrong labels are noticed, the table has the results' figures."""

import dataclasses

import pytest
import torch

from bench import parsing, tables
from bench.names import FASTUPER, OBJECTS, SEGMENTATION, TEXTBOOK
from bench.pairs import images, randomize
from bench.results import parsing_targets, verdict
from bench.textbook import PreciseRoIPool, Textbook
from fastuper import ConvNextConfig, DeepStemResNetConfig, UnifiedPerceptualParsingConfig
from fastuper import UperNetForUnifiedPerceptualParsing as Network

STAGES = ["stage1", "stage2", "stage3", "stage4"]
BACKBONES = {
    "resnet": DeepStemResNetConfig((4, 4, 8), hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], out_features=STAGES),
    "convnext": ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], out_features=STAGES),
}


def networks(kind: str) -> tuple[Textbook, Network]:
    config = UnifiedPerceptualParsingConfig(BACKBONES[kind], hidden_size=16, pool_channels=12, texture_channels=12)
    textbook = Textbook(config)
    randomize(textbook)
    ours = Network(config)
    ours.load_state_dict(textbook.state_dict())
    return textbook.double().eval(), ours.double().eval()


@pytest.mark.parametrize("kind", BACKBONES)
@torch.inference_mode()
def test_the_textbook_is_the_same_network(kind):
    textbook, ours = networks(kind)
    pixels = images(1, 3, 70, 93)
    logits = textbook.decode_head(textbook.backbone(pixels).feature_maps)
    for task, found in ours.decode_head(ours.backbone(pixels).feature_maps).items():
        torch.testing.assert_close(found, logits[task], rtol=1e-9, atol=1e-9)
    (parsed,) = ours.parse(pixels)
    found = textbook(pixels, (70, 93))
    for task, labels in [("object", parsed.objects), ("part", parsed.parts), ("texture", parsed.textures)]:
        assert torch.equal(labels, found[task][0])
    assert parsed.parts.any()
    assert [number for number, _ in parsed.scene] == found["scene"].indices[0].tolist()


@torch.inference_mode()
def test_wrong_labels_are_noticed():
    textbook, ours = networks("resnet")
    pixels = images(1, 3, 64, 64)
    (parsed,) = ours.parse(pixels)
    assert parsing.compare(textbook, parsed, pixels) == {"object": 0, "material": 0, "texture": 0, "part": 0}
    for name in ("objects", "materials", "textures", "parts"):
        labels = getattr(parsed, name).clone()
        row, column = (labels > 0).nonzero()[0]
        labels[row, column] = 0
        with pytest.raises(AssertionError, match=r"a label is not the textbook's|its object has none"):
            parsing.compare(textbook, dataclasses.replace(parsed, **{name: labels}), pixels)
    (first, share), *others = parsed.scene
    for scene in ([(first, share / 2), *others], [(first - 1, share), *others]):
        with pytest.raises(AssertionError, match="not close"):
            parsing.compare(textbook, dataclasses.replace(parsed, scene=scene), pixels)


def test_precise_roi_pooling_is_damped_at_the_end():
    """The mean of a constant map over cells at the far ends is below the constant, as in the official code."""
    cells = PreciseRoIPool(1)(torch.ones(1, 1, 15, 20, dtype=torch.float64))
    assert cells.item() == pytest.approx((1 - 0.5 / 15) * (1 - 0.5 / 20))
    pool = PreciseRoIPool(3)(torch.ones(1, 1, 6, 3, dtype=torch.float64))[0, 0]
    assert pool[:, 0].tolist() == pytest.approx([1, 1, 0.75])
    assert pool[0].tolist() == pytest.approx([1, 1, 0.5])


@pytest.fixture
def result():
    seconds = {TEXTBOOK[0]: 9.0, TEXTBOOK[1]: 6.0, FASTUPER: 2.0, OBJECTS: 1.0, SEGMENTATION: 0.8}
    peers = {peer: {"rounds": [time, 9 * time, 0.5 * time]} for peer, time in seconds.items()}
    for peer, peak in {TEXTBOOK[0]: 5e9, TEXTBOOK[1]: 4e9, FASTUPER: 1e9}.items():
        peers[peer]["peak"] = peak
    differ = {"object": 3, "material": 0, "texture": 1, "part": 0}
    row = {"pixels": 512 * 512, "differ": differ, "objects": 17, "peers": peers}
    parsing.conclude(row)
    found = {
        "run": "2030-01-02 03:04:05",
        "machine": {"cpu": "A CPU", "instructions": "AVX512", "threads": 2},
        "versions": {"torch": "9.9"},
        "size": [512, 512],
        "memory_size": [750, 1000],
        "backbones": {"convnext-tiny": row},
    }
    found["targets"] = parsing_targets(found)
    return found


def test_ratios_and_targets(result):
    row = result["backbones"]["convnext-tiny"]
    assert [row[key] for key in ("faster", "over_objects", "over_segmentation", "memory")] == [3.0, 2.0, 2.5, 0.25]
    assert [verdict(target) for target in result["targets"][:3]] == ["not measured"] * 3
    assert [verdict(target) for target in result["targets"][3:]] == ["met", "missed by a factor of 1.05", "met"]


def test_the_table(result):
    text = tables.parsing_table_of(result)
    row = "| ConvNeXt-T | 6 s | **2 s** | 3.00 x | 1 s (2.00 x) | 0.8 s (2.50 x) | 4.00 GB | 1.00 GB | 0.25 |"
    assert row in text
    assert "ConvNeXt-T: object 3, material 0, texture 1, part 0 of 262,144, with 17 objects in the image" in text
    assert "objects alone 1.9 (missed by a factor of 1.05)" in text
    assert "A CPU (AVX512), 2 threads; PyTorch 9.9; 2030-01-02." in text
    assert tables.parsing_table_of(None) == "Not measured yet: `python -m bench.parsing`."

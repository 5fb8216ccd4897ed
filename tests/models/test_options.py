"""Options of UPerNet that Transformers lacks: `align_corners`, `output_align_corners` and `feature_norms`."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from fastuper import (
    UnifiedPerceptualParsingConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    UperNetImageProcessor,
)
from fastuper.inference import Predictor
from tests.models.heads import randomize
from tests.models.test_upernet import model

SIZE = (45, 70)
CASES = {
    "align_corners": {"align_corners": True},
    "output": {"output_align_corners": True},
    "head": {"align_corners": True, "output_align_corners": False},
    "feature_norms": {"feature_norms": True, "output_align_corners": True},
}


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def network(**options: bool) -> UperNetForSemanticSegmentation:
    return randomize(model(**options)).double().eval()


def as_written(net: UperNetForSemanticSegmentation, pixels: torch.Tensor, **options: bool) -> list[torch.Tensor]:
    """Return the full-size logits of both heads by the textbook's steps."""
    inner = options.get("align_corners", False)
    outer = options.get("output_align_corners", inner)
    head = net.decode_head

    def resampled(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=inner)

    given = maps = net.backbone(pixels).feature_maps
    if options.get("feature_norms"):
        norms = head.feature_norms
        maps = [
            F.layer_norm(x.movedim(1, -1), x.shape[1:2], norm.weight, norm.bias, 1e-6).movedim(-1, 1)
            for x, norm in zip(maps, norms, strict=True)
        ]
    x = maps[-1]
    levels = [head.bottleneck(torch.cat([x, *(resampled(branch(x), x) for branch in head.psp_modules)], 1))]
    for x, lateral in zip(maps[-2::-1], list(head.lateral_convs)[::-1], strict=True):
        y = lateral(x)
        levels.insert(0, y + resampled(levels[0], y))
    levels = [*(conv(x) for conv, x in zip(head.fpn_convs, levels[:-1], strict=True)), levels[-1]]
    fused = head.fpn_bottleneck(torch.cat([resampled(x, levels[0]) for x in levels], 1))
    logits = head.classifier(fused), net.auxiliary_head(given)
    return [F.interpolate(x, size=SIZE, mode="bilinear", align_corners=outer) for x in logits]


@pytest.mark.parametrize("case", CASES)
def test_logits_losses_and_labels(case, pixels):
    net = network(**CASES[case])
    labels = torch.randint(5, (2, *SIZE), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, auxiliary = as_written(net, pixels, **CASES[case])
        output = net(pixels, labels=labels)
        ordinary = network()
        ordinary.load_state_dict(net.state_dict(), strict="feature_norms" not in CASES[case])
        assert (ordinary(pixels).logits - expected).abs().max() > 1e-4
        torch.testing.assert_close(output.logits, expected, rtol=1e-10, atol=1e-10)
        loss = F.cross_entropy(expected, labels) + 0.4 * F.cross_entropy(auxiliary, labels)
        torch.testing.assert_close(output.loss, loss, rtol=1e-10, atol=0)
        count = int(labels.numel())
        torch.testing.assert_close(net(pixels, labels=labels, num_items_in_batch=count).loss, loss, rtol=1e-10, atol=0)
        # The label maps of another size are those of the processor, which resamples without aligned corners.
        processor = UperNetImageProcessor()
        for sizes in (None, [(33, 91), SIZE]):
            wanted = processor.post_process_semantic_segmentation(output, sizes or [SIZE] * 2)
            for ours, theirs in zip(net.segment(pixels, sizes), wanted, strict=True):
                assert torch.equal(ours, theirs)


def test_predictions_in_windows(pixels):
    """A window as large as the image has the labels of the whole image."""
    net = network(align_corners=True).float()
    processor = UperNetImageProcessor(do_resize=False)
    image = (pixels[0].sigmoid() * 255).byte().permute(1, 2, 0).numpy()
    whole = Predictor(net, processor)([image])[0]
    windows = Predictor(net, processor, window=max(SIZE))([image])[0]
    assert (whole == windows).float().mean() > 0.999
    assert len(whole.unique()) > 1


@pytest.mark.parametrize("case", CASES)
def test_config_json(case, pixels, tmp_path):
    """Only these models have a model_type of their own; the values at their defaults are not written."""
    net = network(**CASES[case]).float()
    net.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["model_type"] == "fastuper_upernet"
    assert values["backbone_config"]["model_type"] == "fastuper_convnext"
    assert {name: values[name] for name in CASES[case]} == CASES[case]
    assert {"align_corners", "output_align_corners", "feature_norms"} & values.keys() == CASES[case].keys()
    again = UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    assert type(again.config.backbone_config) is type(net.config.backbone_config)
    with torch.no_grad():
        assert torch.equal(again(pixels.float()).logits, net(pixels.float()).logits)
    diff = UperNetConfig.from_dict(net.config.to_diff_dict())
    assert (diff.align_corners, diff.aligns_output) == (net.config.align_corners, net.config.aligns_output)
    assert not {"align_corners", "output_align_corners", "feature_norms"} & UperNetConfig().to_dict().keys()
    assert UperNetConfig().to_dict()["model_type"] == UperNetConfig().to_diff_dict()["model_type"] == "upernet"
    # Transformers reads "upernet" without the options: such a file is an error, and no other network.
    values["model_type"] = "upernet"
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"overlook .*{next(iter(CASES[case]))}.*'fastuper_upernet'"):
        UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="overlook"):
        UperNetForSemanticSegmentation(values)


def test_transformers_refuses_the_file(tmp_path):
    transformers = pytest.importorskip("transformers")
    network(feature_norms=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="fastuper_upernet"):
        transformers.AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    with pytest.raises(KeyError, match="fastuper_convnext"):
        transformers.UperNetForSemanticSegmentation.from_pretrained(tmp_path)


@pytest.mark.parametrize("option", ["align_corners", "output_align_corners", "feature_norms"])
def test_a_model_with_parsing_heads_refuses_the_options(option):
    with pytest.raises(ValueError, match=f"{option} is an option of UperNetConfig"):
        UnifiedPerceptualParsingConfig(**{option: True})

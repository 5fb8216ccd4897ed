"""`UperNetConfig(backbone=..., use_pretrained_backbone=True)`: a classifier's weights under a new head."""

from pathlib import Path

import pytest
import torch

import fastuper

transformers = pytest.importorskip("transformers")

STAGES = ["stage1", "stage2", "stage3", "stage4"]
CLASSIFIERS = {
    "convnext": ("ConvNext", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}),
    "convnextv2": ("ConvNextV2", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}),
    "swinv2": (
        "Swinv2",
        {"image_size": 64, "embed_dim": 12, "depths": [1, 2, 2, 1], "num_heads": [1, 2, 3, 4], "window_size": 4},
    ),
    "beit": (
        "Beit",
        {
            "image_size": 64,
            "hidden_size": 16,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 20,
            "out_features": STAGES,
        },
    ),
    "swin": ("Swin", {"embed_dim": 12, "depths": [1, 2, 2, 1], "num_heads": [1, 2, 3, 4]}),
    "resnet": ("ResNet", {"embedding_size": 8, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 2, 1, 1]}),
}


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_backbone_of_a_classifier(family: str, tmp_path: Path) -> None:
    name, values = CLASSIFIERS[family]
    torch.manual_seed(0)
    classifier = getattr(transformers, f"{name}ForImageClassification")(
        getattr(transformers, f"{name}Config")(**values)
    )
    for parameter in classifier.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    classifier.save_pretrained(tmp_path / "classifier")
    theirs = getattr(transformers, f"{name}Backbone").from_pretrained(tmp_path / "classifier", out_features=STAGES)

    config = fastuper.UperNetConfig(
        backbone=str(tmp_path / "classifier"), use_pretrained_backbone=True, hidden_size=16, auxiliary_channels=8
    )
    ours = fastuper.UperNetForSemanticSegmentation(config).eval()
    x = torch.randn(2, 3, 65, 90)
    for a, b in zip(ours.backbone(x).feature_maps, theirs.eval()(x).feature_maps, strict=True):
        torch.testing.assert_close(a, b)

    # A saved model does not need the classifier, and does not load it again.
    assert ours.config.backbone is None
    assert config.backbone is not None
    ours.save_pretrained(tmp_path / "upernet")
    (tmp_path / "classifier" / "config.json").unlink()
    again = fastuper.UperNetForSemanticSegmentation.from_pretrained(tmp_path / "upernet")
    assert torch.equal(again(x).logits, ours(x).logits)


def test_configuration_of_a_named_backbone_alone(tmp_path: Path) -> None:
    """Without `use_pretrained_backbone` the name gives the configuration; `backbone_kwargs` override it."""
    fastuper.SwinConfig(embed_dim=12, depths=[1, 2, 2, 1], num_heads=[1, 2, 3, 4]).save_pretrained(tmp_path)
    config = fastuper.UperNetConfig(backbone=str(tmp_path), backbone_kwargs={"out_features": STAGES[:3]}, hidden_size=8)
    backbone = fastuper.UperNetForSemanticSegmentation(config).config.backbone_config
    assert (backbone.embed_dim, backbone.out_features) == (12, STAGES[:3])


def test_missing_and_foreign_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere"):
        fastuper.UperNetForSemanticSegmentation(fastuper.UperNetConfig(backbone=str(tmp_path / "nowhere")))
    fastuper.ResNetConfig(hidden_sizes=[16, 16, 16, 16], depths=[1, 1, 1, 1]).save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"no weights.*model\.safetensors"):
        fastuper.UperNetForSemanticSegmentation(
            fastuper.UperNetConfig(backbone=str(tmp_path), use_pretrained_backbone=True)
        )

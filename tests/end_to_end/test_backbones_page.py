"""docs/backbones.md: its code runs as written, and its errors are those that are raised."""

from __future__ import annotations

import re

import pytest

from fastuper import UperNetConfig, UperNetForSemanticSegmentation
from tests.end_to_end.pages import BACKBONES, run_section, sections

FAULTS = [
    ("no_such_model", {}),
    ("resnet18", {"out_indices": [1, 2, 3, 9]}),
    ("mixer_s32_224", {}),
    ("resnet18", {"neck": "resized"}),
    ("vit_tiny_patch16_224", {"out_indices": [1, 2, 3]}),
    ("vit_tiny_patch16_224", {"neck": "up"}),
]
"""timm's name and the arguments that give each error of the page, in the page's order."""


def test_code_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (heading,) = sections(BACKBONES)
    names = run_section(BACKBONES, heading)
    kinds = [type(model.backbone).__name__ for model in names["models"]]
    assert kinds == ["ResNetBackbone", "TimmBackbone", "SwinBackbone", "TimmBackbone"]
    assert type(names["models"][-1].neck).__name__ == "ResizedPyramid"


@pytest.mark.parametrize("row", range(len(FAULTS)))
def test_errors_are_those_that_are_raised(row):
    page = BACKBONES.read_text(encoding="utf-8").partition("## Errors and remedies")[2]
    *shown, absent = re.findall(r"^\| `([^`]+)`", page.partition("## ")[0], re.MULTILINE)
    assert len(shown) == len(FAULTS)
    assert "needs timm" in absent  # tests/models has it
    name, arguments = FAULTS[row]
    with pytest.raises(ValueError) as error:  # noqa: PT011, the page has the message
        UperNetForSemanticSegmentation(
            UperNetConfig(backbone=name, use_timm_backbone=True, backbone_kwargs=arguments, num_labels=3, hidden_size=8)
        )
    assert re.fullmatch(re.escape(shown[row]).replace(re.escape("..."), ".*"), str(error.value)), str(error.value)

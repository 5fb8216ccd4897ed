"""docs/accelerate.md: its code runs as written, and its table and errors are those that are printed.

The sections of segmentation_models_pytorch and mmsegmentation run in tests/foreign, beside the real libraries.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize

import fastuper
from fastuper.patch.accelerated import Accelerated
from tests.end_to_end.pages import ACCELERATE, run_section, sections
from tests.end_to_end.test_migrate import from_transformers

FOREIGN = {"segmentation_models_pytorch", "mmsegmentation"}


def beit(folder: Path) -> None:
    config = transformers.BeitConfig(
        image_size=64,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        out_indices=[1, 2, 3, 4],
        auxiliary_channels=8,
        num_labels=3,
    )
    transformers.BeitForSemanticSegmentation(config).save_pretrained(folder / "my-beit")


def in_a_process_group(folder: Path) -> None:
    from_transformers(folder)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)


MAKERS: dict[str, Callable[[Path], None]] = {
    "Transformers": from_transformers,
    "BEiT and Data2Vec": beit,
    "Inside other objects": in_a_process_group,
    "Explain": from_transformers,
    "Undo": from_transformers,
}
"""Makes what the code of a section needs in a folder."""


def test_every_section_with_code_is_run():
    assert sections(ACCELERATE).keys() == MAKERS.keys() | FOREIGN


@pytest.mark.parametrize("heading", [heading for heading in MAKERS if heading != "Explain"])
def test_code_runs_as_written(heading, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        MAKERS[heading](tmp_path)
        names = run_section(ACCELERATE, heading)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    models = [value for value in names.values() if isinstance(value, nn.Module)]
    assert models
    for model in models:
        accelerated = any(isinstance(part, Accelerated) for part in model.modules())
        assert accelerated is (heading != "Undo")


def test_the_table_is_what_explain_prints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from_transformers(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run_section(ACCELERATE, "Explain")
    found = "\n".join(line.rstrip() for line in printed.getvalue().splitlines())
    (shown,) = [text for language, text in sections(ACCELERATE)["Explain"] if language == "text"]
    assert shown.strip() == found.strip(), f"put this into docs/accelerate.md:\n{found}"
    assert "called as it is" in found


def test_errors_are_those_that_are_raised():
    page = re.split(r"^## ", ACCELERATE.read_text(encoding="utf-8"), flags=re.MULTILINE)[-1]
    shown = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)
    backbone = transformers.ConvNextConfig(
        hidden_sizes=[4] * 4, depths=[1] * 4, out_features=[f"stage{number}" for number in (1, 2, 3, 4)]
    )
    config = transformers.UperNetConfig(backbone_config=backbone, hidden_size=4, auxiliary_in_channels=4, num_labels=2)

    def built() -> transformers.UperNetForSemanticSegmentation:
        return transformers.UperNetForSemanticSegmentation(config)

    half = fastuper.accelerate(built())
    half.decode_head.bottleneck = built().decode_head.bottleneck
    headless = built()
    headless.decode_head = nn.Conv2d(4, 2, 1)
    whole = fastuper.UperNetForSemanticSegmentation(config)
    parametrized, trained = fastuper.accelerate(built()), fastuper.accelerate(built())
    block = parametrized.backbone.encoder.stages[0].layers[0]
    parametrize.register_parametrization(block, "layer_scale_parameter", nn.Identity())

    def with_small_labels(model: nn.Module) -> None:
        model(torch.zeros(1, 3, 64, 64), labels=torch.zeros(1, 8, 8, dtype=torch.long))

    raised = []
    for call, given in (
        (fastuper.accelerate, nn.Linear(1, 1)),
        (fastuper.accelerate, whole),
        (fastuper.accelerate, fastuper.accelerate(built())),
        (fastuper.accelerate, half),
        (fastuper.accelerate, headless),
        (fastuper.restore, nn.Linear(1, 1)),
        (fastuper.restore, parametrized),
        (with_small_labels, trained.eval()),
        (fastuper.explain, nn.Linear(1, 1)),
        (fastuper.accelerate, 3),
    ):
        with pytest.raises((TypeError, ValueError)) as error:
            call(given)
        raised.append(str(error.value))
    assert len(shown) == len(raised)
    for text, message in zip(shown, raised, strict=True):
        assert re.fullmatch(re.escape(text).replace(re.escape("..."), ".*"), message), (text, message)

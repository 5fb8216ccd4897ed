"""docs/backbones.md: its code runs as written."""

from tests.end_to_end.pages import BACKBONES, run_section, sections


def test_code_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (heading,) = sections(BACKBONES)
    names = run_section(BACKBONES, heading)
    kinds = [type(model.backbone).__name__ for model in names["models"]]
    assert kinds == ["ResNetBackbone", "TimmBackbone", "SwinBackbone"]

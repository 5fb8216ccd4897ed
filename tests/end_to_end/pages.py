"""Reads pages of docs/, and runs the commands and the Python code of their sections as they are written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from PIL import Image
from typer.testing import CliRunner

from fastuper.cli import app

DOCS = Path(__file__).parents[2] / "docs"
MIGRATE = DOCS / "migrate.md"
ACCELERATE = DOCS / "accelerate.md"
BACKBONES = DOCS / "backbones.md"


def sections(page: Path) -> dict[str, list[tuple[str, str]]]:
    """Return (language, text) of each fenced block, by the heading of its section; others are left out."""
    found = {}
    for section in re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        heading, _, text = section.partition("\n")
        if blocks := re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            found[heading] = blocks
    return found


def run_section(page: Path, heading: str) -> dict[str, object]:
    """Run the blocks of a section in the current folder, which has the checkpoints and gets a photo.jpg.

    The Python blocks of a section share their names, which are returned. Blocks of the language `text` are printed
    output, and not run.
    """
    Image.effect_noise((80, 60), 90).convert("RGB").save("photo.jpg")
    names: dict[str, object] = {}
    for language, text in sections(page)[heading]:
        if language == "text":
            continue
        if language == "python":
            exec(compile(text, f"{page.name}, {heading}", "exec"), names)
            continue
        assert language == "sh", language
        for line in text.splitlines():
            program, *arguments = shlex.split(line, comments=True)
            assert program == "fastuper", line
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, f"{line}\n{result.output}"
    return names

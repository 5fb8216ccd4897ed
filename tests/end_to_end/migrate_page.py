"""Reads docs/migrate.md, and runs the commands and the Python code of its sections as they are written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from PIL import Image
from typer.testing import CliRunner

from fastuper.cli import app

PAGE = Path(__file__).parents[2] / "docs" / "migrate.md"


def sections() -> dict[str, list[tuple[str, str]]]:
    """Return (language, text) of each fenced block, by the heading of its section; others are left out."""
    found = {}
    for section in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        heading, _, text = section.partition("\n")
        if blocks := re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            found[heading] = blocks
    return found


def run_section(heading: str) -> None:
    """Run the blocks of a section in the current folder, which has the checkpoints and gets a photo.jpg."""
    Image.effect_noise((80, 60), 90).convert("RGB").save("photo.jpg")
    for language, text in sections()[heading]:
        if language == "python":
            exec(compile(text, f"{PAGE.name}, {heading}", "exec"), {})
            continue
        assert language == "sh", language
        for line in text.splitlines():
            program, *arguments = shlex.split(line, comments=True)
            assert program == "fastuper", line
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, f"{line}\n{result.output}"

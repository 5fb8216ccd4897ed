"""README shows what was measured, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]


def test_tables_are_those_of_the_committed_results():
    from bench.tables import README, with_tables

    text = README.read_text()
    assert with_tables(text) == text, "run `python -m bench.tables`"
    assert "<!-- table: accuracy -->\n|" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"

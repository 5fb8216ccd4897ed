"""README, CONTRIBUTING and docs/: their tables are the committed results, and their links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_tables_are_those_of_the_committed_results():
    from bench.tables import ACCURACY, BENCHMARKS, README, with_tables

    for page in (README, ACCURACY, BENCHMARKS):
        text = page.read_text()
        assert with_tables(text, page) == text, "run `python -m bench.tables`"
    assert "<!-- table: numbers -->\n|" in README.read_text()
    assert "<!-- table: accuracy -->\n|" in ACCURACY.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text())):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(path), f"{page.name} links to {target}"


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, f"docs/README.md does not name {page.name}"


def test_rows_of_differences_name_tests_that_exist():
    """Each row of the tables about the model, training, and loading and saving."""
    sources = "\n".join(path.read_text() for path in ROOT.glob("tests/**/test_*.py"))
    sections = re.split(r"^## ", (ROOT / "docs/differences.md").read_text(), flags=re.MULTILINE)
    tables = [section for section in sections if section.startswith(("The model", "Training", "Loading"))]
    rows = re.findall(r"^\| [^|\n]+ \|[^|\n]+\|[^|\n]+\|$", "\n".join(tables), re.MULTILINE)
    assert len(rows) > 40
    for row in rows:
        if not row.startswith("| backbone |"):  # the head of a table
            tests = re.findall(r"`(test_\w+)`", row)
            files = re.findall(r"`(?:tests/)?([\w/]*test_\w+\.py)`", row)
            assert tests or files, row
            assert all(f"def {name}(" in sources for name in tests), row
            assert all(any(ROOT.glob(f"tests/**/{name}")) for name in files), row

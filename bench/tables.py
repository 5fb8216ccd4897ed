"""README's tables, drawn from the committed results alone: `python -m bench.tables` rewrites them in place."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"


def scientific(value: float) -> str:
    """Return 0.00000123 as 1.2e-6, and 0 as 0."""
    return f"{value:.1e}".replace("e-0", "e-") if value else "0"


def accuracy() -> str:
    """Return the table of errors against float64."""
    result = json.loads((RESULTS / "accuracy.json").read_text())
    lines = [
        "| UPerNet with | float64: ours from Transformers' | float32: ours, Transformers' "
        "| bfloat16: ours, Transformers' | labels that differ, float32 |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [row["backbone"], scientific(row["float64"])]
        for dtype in ("float32", "bfloat16"):
            errors = dict(row[dtype]["errors"])
            cells.append(f"{scientific(errors.pop('fastuper'))}, {scientific(max(errors.values()))}")
        labels = row["float32"]["labels"]
        cells.append(f"{labels['differ']:,} of {labels['pixels']:,}")
        lines.append("| " + " | ".join(cells) + " |")
    versions = result["versions"]
    lines += [
        "",
        f"Relative errors of the logits against float64, root mean square over {result['seeds']} draws of weights and "
        f"of {result['size']} x {result['size']} images, 150 classes; Transformers' in the worse of its two memory "
        f"layouts ([the rule](docs/accuracy.md)). Transformers {versions['transformers']}, PyTorch "
        f"{versions['torch']}, "
        f"{result['machine']}, {result['date']}; `make accuracy` repeats it.",
    ]
    return "\n".join(lines)


TABLES = {"accuracy": accuracy}


def with_tables(text: str) -> str:
    """Return a text with each `<!-- table: NAME -->` block filled anew."""
    for name, table in TABLES.items():
        block = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = block.subn(lambda match, table=table: f"{match[1]}{table()}\n{match[2]}", text)
        if count != 1:
            raise ValueError(f"{README.name} must have one block `<!-- table: {name} -->`, it has {count}")
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))

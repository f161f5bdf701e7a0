"""The tables of README and docs/measured.md say what the committed measurements say."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = {"SmolLM2-135M": "smollm2-135m", "Qwen3-0.6B": "qwen3-0.6b-*"}


def measured(model, depth):
    """mode -> row of the newest file of this model that has the depth"""
    name = next(name for start, name in FILES.items() if model.startswith(start))
    for path in sorted((ROOT / "benchmarks").glob(f"*-{name}.json"), reverse=True):
        rows = {row["mode"]: row for row in json.loads(path.read_text()) if row["depth"] == depth}
        if "sfi" in rows:
            return rows
    raise LookupError(f"no measurement of {model} at depth {depth}")


def table():
    lines = [line for page in ("README.md", "docs/measured.md") for line in (ROOT / page).read_text(encoding="utf-8").splitlines()]
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 7 and cells[1].isdigit():
            yield cells


def said(mode, row, depth):
    """How the table writes the speed of a mode."""
    ratio = f" ({row['ratio_to_stock']:.1f}x)" if depth and mode != "stock" else ""
    return f"{row['decode_tps']:.1f}{ratio}"


@pytest.mark.parametrize("cells", list(table()), ids=lambda cells: f"{cells[0]} @ {cells[1]}")
def test_the_readme_table_is_what_was_measured(cells):
    model, depth = cells[0], int(cells[1])
    rows = measured(model, depth)
    assert cells[2:5] == [said(mode, rows[mode], depth) for mode in ("stock", "dense", "sfi")]
    assert cells[5] == f"{100 * rows['sfi']['kv_read_share']:.0f} %"
    assert cells[6] == f"{rows['sfi']['ceiling']:.1f}x"


def test_the_table_is_there_and_no_measurement_names_a_private_path():
    assert len(list(table())) >= 8
    for path in (ROOT / "benchmarks").glob("*.json"):
        assert not re.search(r'"[^"]*(?:/tmp|/root|/home)/', path.read_text())

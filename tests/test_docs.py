"""The pages that walk through the code name what is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def named(page):
    """(file, names) of each `file`: `name`, `name` on a page."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for file, names in re.findall(r"`([\w./-]+\.py)`(?:: ((?:`[\w.]+`(?:, )?)+))?", text):
        yield file, re.findall(r"`([\w.]+)`", names)


@pytest.mark.parametrize("file, names", sorted({(file, tuple(names)) for file, names in named("a-request.md")}))
def test_what_a_request_passes_is_there(file, names):
    path = ROOT / file if file.startswith("tests/") else ROOT / "sfi_local" / file
    text = path.read_text(encoding="utf-8")
    for name in names:
        assert all(re.search(rf"^\s*(?:def|class) {part}\b", text, re.MULTILINE) for part in name.split(".")), (file, name)

"""docs/a-fast-step.md and docs/a-prefill.md name functions and files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("a-fast-step", "a-prefill")}
PAGE = "\n".join(PAGES.values())
NAMED = sorted({*re.findall(r"^\| *\d+ \| `(\w+)` \| `([^`]+)` \|", PAGE, re.M), *re.findall(r"`(\w+)` ?\(?,? ?`(native/[^`]+)`", PAGE)})


@pytest.mark.parametrize("function, file", NAMED, ids=lambda x: x.replace("/", "-"))
def test_the_file_has_the_function(function, file):
    assert re.search(rf"\b{function}\(", (ROOT / file).read_text(encoding="utf-8")), f"{file} has no {function}()"


@pytest.mark.parametrize("page", PAGES)
def test_every_step_of_the_walk_is_looked_at(page):
    steps = re.findall(r"^\| *(\d+) \| `", PAGES[page], re.M)
    assert steps == [str(i + 1) for i in range(len(steps))] and len(NAMED) >= len(steps) >= 10


@pytest.mark.parametrize("file", sorted(set(re.findall(r"`(native/[^`]+)`", PAGE))))
def test_every_file_exists(file):
    assert (ROOT / file).is_file()


@pytest.mark.parametrize("file", ["native/llama/kv-mirror.h", "native/llama/kv-mirror.cpp", "native/api/schedule.h", "native/api/schedule.cpp"])
def test_what_is_pure_includes_nothing_of_llama_cpp(file):
    includes = re.findall(r'#include "([^"]+)"', (ROOT / file).read_text(encoding="utf-8"))
    assert set(includes) <= {"kv-mirror.h", "schedule.h"}

"""What is known against llama.cpp, and whether our build contains it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

PATCHES = next(p / "patches" for p in Path(__file__).resolve().parents if (p / "patches" / "security.py").exists())


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("security", PATCHES / "security.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["security"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "tools").mkdir()
    (tmp_path / "src/reader.cpp").write_text("if (n > size) { return; }\n")
    (tmp_path / "tools/server.cpp").write_text("read(n);\n")
    return tmp_path


@pytest.mark.parametrize("file, fixed_by, accepted, state", [
    ("src/reader.cpp", "n > size", "", "fixed"),
    ("src/reader.cpp", "n >= size", "", "open"),
    ("src/reader.cpp", None, "", "open"),
    ("src/reader.cpp", None, "nobody can reach it", "accepted"),
    ("tools/server.cpp", "n > size", "", "not built"),
    ("tools/gone.cpp", "n > size", "", "not built"),
])
def test_the_state_of_a_hole(tool, tree, capsys, file, fixed_by, accepted, state):
    known = tool.Known("CVE-1", "reads too much", file, fixed_by, accepted)
    assert known.state(tree) == state
    assert tool.report(tree, [known]) == (state != "open")
    assert capsys.readouterr().out.startswith(state)


def test_a_file_that_moved_is_no_fix(tool, tree):
    with pytest.raises(tool.patchset.PatchsetError, match="say in security.json where it went"):
        tool.Known("CVE-1", "reads too much", "src/gone.cpp", "n > size").state(tree)


def test_nothing_known_is_open_in_our_build(tool, capsys):
    try:
        tool.patchset.fetch()
    except tool.patchset.PatchsetError as error:
        pytest.skip(str(error))
    assert tool.main() == 0, capsys.readouterr().out

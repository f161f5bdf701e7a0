"""Help that cannot drift: short for a person, whole for an expert, made from what it describes."""

import ast
import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from sfi_local.cli import help as topics
from sfi_local.cli.main import COMMANDS
from sfi_local.cli.main import cli as group
from sfi_local.cli.options import SAMPLERS
from sfi_local.environment import VARIABLES
from sfi_local.errors import SfiError
from sfi_local.fields import kinds
from sfi_local.params import SfiParams

ROOT = Path(__file__).resolve().parents[2]
LINES = 50  # of a terminal, a screen and a half


def shown(*words):
    done = CliRunner().invoke(group, words, terminal_width=80)
    assert done.exit_code == 0, done.output
    return done.output


def commands():
    return {name: group.get_command(None, name) for name in COMMANDS}


@pytest.mark.parametrize("name", ["run", "serve"])
def test_what_a_person_types_fits_a_screen_and_a_half(name):
    lines = shown(name, "--help").splitlines()
    assert len(lines) <= LINES and max(map(len, lines)) <= 80
    assert shown("help", name) == shown(name, "--help")


def test_every_knob_is_there_with_its_default_and_a_text():
    text = topics.knobs()
    for name in (*kinds(SfiParams), *SAMPLERS, "draft"):
        assert re.search(rf"^  (\w+, )*{name}(, \w+)*  \[", text, re.M) or re.search(rf"^  (\w+,\s+)*{name}\b", text, re.M), name
    assert "n_selected  [1024; frozen and window: 2048; oracle: 256]  cells" in text
    assert "min_p" in text and "  tolerance  [0.0003]" in text and max(map(len, text.splitlines())) <= 80 + 40


def test_a_topic_that_there_is_not_is_a_sentence():
    done = CliRunner().invoke(group, ["help", "knops"])
    assert "did you mean knobs?" in str(done.exception)
    assert "knobs" in shown("help") and "slow" in shown("help", "statistics")


def test_every_variable_that_is_read_is_listed():
    """... by its name as a text in Python, or in getenv() of the native code."""
    read = set()
    for path in (ROOT / "sfi_local").rglob("*.py"):
        if path.name == "environment.py":
            continue
        text = path.read_text(encoding="utf-8")
        read |= set(re.findall(r"[\"'](SFI_[A-Z_]+|XDG_[A-Z_]+|LOCALAPPDATA|NO_COLOR|TERM)[\"']", text))
    for path in (*(ROOT / "native").rglob("*.cpp"), *(ROOT / "native").rglob("*.c"), *(ROOT / "native").rglob("*.m")):
        if "tests" not in path.relative_to(ROOT).parts:
            read |= set(re.findall(r"getenv\(\"(\w+)\"\)", path.read_text(encoding="utf-8")))
    named = {name for name in read if not name.startswith(("SFI_ERR", "SFI_STEP"))}
    assert {"SFI_LOCAL_CACHE", "SFI_LOCAL_AUTO_DEPTH", "SFI_SIMD", "SFI_PORTABLE_PATH"} <= named <= set(VARIABLES)
    assert all(name in topics.environment() for name in VARIABLES)


def test_a_number_beyond_32_bits_is_refused_by_every_option_that_takes_one():
    """Of every command; a range without an end lets it through to the library."""
    numbers = [(name, option) for name, command in commands().items() for option in command.params
               if isinstance(option.type, click.types.IntParamType)]
    assert len(numbers) > 20
    assert [(name, option.opts[0]) for name, option in numbers if not (getattr(option.type, "max", None) or 2**40) < 2**32] == []


def test_defaults_are_written_once():
    """The command line takes them from the dataclasses: no number of Sampling or SfiParams stands in an option."""
    tree = ast.parse((ROOT / "sfi_local/cli/options.py").read_text(encoding="utf-8"))
    written = [(node.lineno, key.value.value) for node in ast.walk(tree) if isinstance(node, ast.Call) for key in node.keywords
               if key.arg == "default" and isinstance(key.value, ast.Constant)]
    assert written == []


def typed():
    """(file, command, words) of every command line in the documentation."""
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks/README.md", ROOT / "CONTRIBUTING.md"]
    for file in files:
        for name, rest in re.findall(r"sfi-local (run|view|bench|eval|inspect|calibrate) ([^`|>#&\n]*)", file.read_text(encoding="utf-8")):
            if "--help" not in rest and "..." not in rest:
                yield file.name, name, shlex.split(rest)


def test_every_command_in_the_documentation_can_be_parsed():
    found = list(typed())
    assert len(found) > 30
    for file, name, words in found:
        try:
            group.get_command(None, name).make_context(name, words)
        except (click.ClickException, SfiError) as error:
            pytest.fail(f"{file}: sfi-local {name} {' '.join(words)}: {error}")

"""README and docs/ cannot lie: their commands are run, and what is not run here is checked against the package."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.command_line import cli_env

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {page: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
SETS_UP = ("python3 -m venv", "CMAKE_ARGS=", "python -m pytest")  # the newcomer's part, done before this test runs


def blocks(language: str) -> list[str]:
    return [block for text in PAGES.values() for block in re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)]


def commands() -> list[str]:
    """Every shell command of the pages; a line that ends in && goes on."""
    lines = "".join(blocks("sh")).replace("&&\n", "&& ").splitlines()
    return [part.strip() for line in lines for part in line.split(" && ")]


def runnable() -> list[str]:
    return [c for c in commands() if not c.startswith((*SETS_UP, ". ", "sfi-local pull"))]


@pytest.fixture(scope="module")
def shell(smollm2, tmp_path_factory):
    """Run a command in a folder with the README, where `python` and `sfi-local` are those of the tests."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "README.md").write_text(README, encoding="utf-8")
    (folder / "bin").mkdir()
    for name, target in (("sfi-local", f'"{sys.executable}" -m sfi_local'), ("python", f'"{sys.executable}"')):
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec {target} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    (folder / "cache").mkdir()
    (folder / "cache" / "models").symlink_to(Path(smollm2).resolve().parents[1])
    env = cli_env(PATH=f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", SFI_LOCAL_CACHE=str(folder / "cache"))

    def run(command):
        budget = "1e9" if command.startswith("sfi-local cache") else "0"  # other commands read their texts, each time
        return subprocess.run(command, shell=True, cwd=folder, env={**env, "SFI_LOCAL_PREFIX_BUDGET": budget}, capture_output=True, text=True,
                              stdin=subprocess.DEVNULL, timeout=580)
    return run


def test_every_command_works(shell):
    assert len(runnable()) >= 8
    for command in runnable():
        done = shell(command)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        if "topics.txt" in command and "sfi-local" in command:
            n_fast = int(re.search(r"(\d+) fast", done.stderr)[1])
            assert n_fast > 50 and "6500 tokens read" in done.stderr and len(done.stdout) > 100


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_every_program_works(smollm2, number):
    done = subprocess.run([sys.executable, "-c", blocks("python")[number]], env=cli_env(), capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 20


def test_the_setting_up_is_that_of_the_package():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    installs = [c for c in commands() if "pip install" in c]
    assert installs == ["CMAKE_ARGS=-DLLAMA_BUILD=OFF pip install .", "CMAKE_ARGS=-DLLAMA_BUILD=OFF pip install '.[test]'"]
    assert re.search(r"^test = \[", pyproject, re.MULTILINE) and 'sfi-local = "sfi_local.cli.main:main"' in pyproject
    assert re.search(r'requires-python = ">=3\.10"', pyproject) and "Python 3.10 or newer" in README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_named_exists(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGES[page]):
        assert target.startswith("https://") or (page.parent / target).is_file(), target


def test_every_option_that_is_named_exists():
    from sfi_local.cli.run import command as run_command
    from sfi_local.cli.show import command as inspect_command

    known = {name for command in (run_command, inspect_command) for p in command.params for name in p.opts}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", " ".join(commands()))) <= known | {"--json"}

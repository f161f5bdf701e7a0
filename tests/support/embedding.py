"""The tree of libsfi as a stranger gets it: packed by native/package.py, unpacked elsewhere; and programs that are built with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sfi_local.binding import embedding
from sfi_local.errors import LibraryError

ROOT = Path(__file__).resolve().parents[2]
STRICT = ("-Wall", "-Wextra", "-pedantic", "-Werror")


def tree() -> Path:
    """Where this build or installation has libsfi; skips where it has none."""
    try:
        return embedding.prefix()
    except LibraryError as error:
        pytest.skip(str(error))


def unpacked(folder: Path) -> Path:
    """The archive that native/package.py makes of it, unpacked in a folder with a blank and an umlaut in its name."""
    sys.path.insert(0, str(ROOT / "native"))
    try:
        import package
    finally:
        sys.path.pop(0)
    archive = package.pack(tree(), folder / "dist", "linux-test-cpu")
    place = folder / "a stränger's"
    place.mkdir()
    shutil.unpack_archive(archive, place, filter="data")
    return next(place.iterdir())


def tool(name: str) -> str:
    return shutil.which(name) or pytest.skip(f"{name} is not installed")


def run(*command: object, cwd: Path | None = None, timeout: float = 240, input: str = "", **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=timeout, input=input,
                          env={**os.environ, **env})


def compiled(prefix: Path, source: Path, *options: str, out: Path | None = None) -> Path:
    """A program of one C or C++ file."""
    program = out or source.with_suffix("")
    cxx = source.suffix == ".cpp"
    lib = prefix / "lib"
    done = run(tool("c++" if cxx else "cc"), "-std=c++17" if cxx else "-std=c99", "-O1", *STRICT, f"-I{prefix / 'include'}", source, f"-L{lib}", "-lsfi",
               f"-Wl,-rpath,{lib}", *options, "-o", program)
    assert done.returncode == 0, done.stderr
    return program

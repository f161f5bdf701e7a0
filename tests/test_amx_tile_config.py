"""GCC's _tile_loadconfig() names 8 of the 64 bytes it reads; with our header all of them are stored."""

import shutil
import subprocess
from pathlib import Path

import pytest

HEADER = next(p / "native/cmake/sfi-amx-tile-config.h" for p in Path(__file__).resolve().parents if (p / "native").exists())
SOURCE = """
#include <immintrin.h>
void configure(char rows) {
    alignas(64) char config[64] = {};
    config[0] = 1;
    config[48] = rows;
    _tile_loadconfig(config);
}
"""


def test_the_whole_configuration_is_stored(tmp_path):
    gcc = shutil.which("g++")
    if not gcc:
        pytest.skip("g++ is not installed")
    source, out = tmp_path / "config.cpp", tmp_path / "config.s"
    source.write_text(SOURCE)
    done = subprocess.run([gcc, "-O3", "-march=sapphirerapids", "-include", HEADER, "-S", source, "-o", out], capture_output=True, text=True)
    if "unrecognized" in done.stderr or "bad value" in done.stderr:
        pytest.skip("this compiler knows no AMX")
    assert done.returncode == 0, done.stderr
    assert any("%dil" in line or "%edi" in line for line in out.read_text().splitlines())

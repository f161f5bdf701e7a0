"""A portable build leaves out the CPU variants that its compiler cannot make, and says so."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
cmake = shutil.which("cmake")

# what upstream makes of its variants
PROJECT = """
cmake_minimum_required(VERSION 3.21...3.28)
project(variants LANGUAGES C)
list(APPEND CMAKE_MODULE_PATH "{native}/cmake")
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY "${{CMAKE_BINARY_DIR}}/bin")
add_custom_target(ggml ALL)
foreach (name x64 armv8.0_1 sandybridge haswell)
    add_library(ggml-cpu-${{name}} MODULE cpu.c)
    add_dependencies(ggml ggml-cpu-${{name}})
endforeach()
target_compile_options(ggml-cpu-haswell PRIVATE -mno-such-thing)
set(SFI_PORTABLE {portable})
include(sfi-variants)
foreach (name x64 armv8.0_1 sandybridge haswell)
    sfi_take_variant(ggml-cpu-${{name}} taken)
    message(STATUS "taken ${{name}} ${{taken}}")
endforeach()
"""
pytestmark = pytest.mark.skipif(cmake is None or shutil.which("cc") is None, reason="needs cmake and a C compiler")


@pytest.fixture
def configured(tmp_path):
    """Configure with SFI_PORTABLE and further options; (names that are taken, lines about what the compiler cannot do)"""
    def configure(portable: str, *options: str) -> tuple[set[str], list[str]]:
        (tmp_path / "CMakeLists.txt").write_text(PROJECT.format(native=ROOT / "native", portable=portable))
        (tmp_path / "cpu.c").write_text("int a;\n")
        done = subprocess.run([cmake, "-S", tmp_path, "-B", tmp_path / "out", *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        return {line.split()[2] for line in lines if "taken" in line and line.endswith(" ON")}, [line for line in lines if "left out" in line]
    return configure


def test_what_the_compiler_does_not_know_is_left_out_and_said(configured, tmp_path):
    taken, said = configured("ON", "-DSFI_VARIANTS=all")
    assert taken == {"x64", "armv8.0_1", "sandybridge"}
    assert len(said) == 1 and "ggml-cpu-haswell is left out" in said[0] and "-mno-such-thing" in said[0]
    subprocess.run([cmake, "--build", tmp_path / "out"], check=True, capture_output=True)
    assert {path.name for path in (tmp_path / "out/bin").iterdir()} == {f"libggml-cpu-{name}.so" for name in taken}


def test_variants_are_the_usual_ones_unless_they_are_named(configured):
    assert configured("ON")[0] == {"x64", "armv8.0_1"}
    assert configured("ON", "-DSFI_VARIANTS=sandybridge;x64")[0] == {"x64", "sandybridge"}


def test_a_build_for_this_machine_has_its_one_library(configured):
    assert configured("OFF") == ({"x64", "armv8.0_1", "sandybridge", "haswell"}, [])

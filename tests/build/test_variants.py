"""A portable build leaves out the CPU variants that its compiler cannot make, and says so."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
cmake = shutil.which("cmake")

# what upstream makes of its variants, with instruction sets that every compiler knows, or none
PROJECT = """
cmake_minimum_required(VERSION 3.21...3.28)
project(variants LANGUAGES C)
list(APPEND CMAKE_MODULE_PATH "{native}/cmake")
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY "${{CMAKE_BINARY_DIR}}/bin")
add_library(upstream INTERFACE)
foreach (name plain odd)
    add_library(cpu-${{name}} MODULE cpu.c)
    target_link_libraries(cpu-${{name}} PRIVATE upstream)
endforeach()
target_compile_options(cpu-odd PRIVATE -mno-such-thing)
add_custom_target(ggml ALL)
add_dependencies(ggml cpu-plain cpu-odd)
include(sfi-variants)
foreach (target cpu-plain cpu-odd)
    sfi_compiler_can(${{target}} can)
    if (NOT can)
        sfi_drop_variant(${{target}})
    endif()
endforeach()
"""


@pytest.mark.skipif(cmake is None or shutil.which("cc") is None, reason="needs cmake and a C compiler")
def test_what_the_compiler_does_not_know_is_left_out(tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(PROJECT.format(native=ROOT / "native"))
    (tmp_path / "cpu.c").write_text("int a;\n")
    done = subprocess.run([cmake, "-S", tmp_path, "-B", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "left out" in line]
    assert len(said) == 1 and "cpu-odd is left out" in said[0] and "-mno-such-thing" in said[0]
    subprocess.run([cmake, "--build", tmp_path / "out"], check=True, capture_output=True)
    assert [path.name for path in (tmp_path / "out/bin").iterdir()] == ["libcpu-plain.so"]

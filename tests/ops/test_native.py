"""The programs of a build with SFI_TESTS=ON: unit tests in C++ and the C example."""

import pydoc_data.topics
import subprocess
from pathlib import Path

import pytest
from support.programs import program


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_boundaries_and_schedule():
    done = run(program("sfi-test-schedule"))
    assert done.returncode == 0, done.stdout


def test_the_basis_of_a_sketch():
    done = run(program("sfi-test-sketch-fit"))
    assert done.returncode == 0, done.stdout


def test_the_mirror_of_the_cells():
    done = run(program("sfi-test-kv-mirror"))
    assert done.returncode == 0, done.stdout


def test_an_embedder_s_mistakes(tiny):
    done = run(program("sfi-test-embed"), str(tiny))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("op", ["SPARSE_ATTN", "SUPPORT_EVIDENCE", "SUPPORT_SELECT", "SUPPORT_STABILITY",
                                "SKETCH_ENCODE", "SKETCH_SCAN"])
def test_backend_ops(op):
    done = run(program("test-backend-ops"), "test", "-b", "CPU", "-o", op)
    assert done.returncode == 0, done.stdout[-2000:]
    assert f"{op}(" in done.stdout and "FAIL" not in done.stdout


def test_c_example_decodes_slow_fast(smollm2, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(Path(pydoc_data.topics.__file__).read_text(encoding="utf-8")[:14000])
    done = run(program("sfi-example-generate"), str(smollm2), str(text), "80")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > 0
    assert "slow" in done.stderr and " 0 fast" not in done.stderr


def test_c_example_says_what_is_wrong(tmp_path):
    done = run(program("sfi-example-generate"), str(tmp_path / "no.gguf"), __file__)
    assert done.returncode == 1 and "no.gguf" in done.stderr

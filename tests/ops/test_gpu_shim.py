"""The GPUs' kernels, run on the CPU by native/tests/gpu-shim, against ggml's reference, what each case expects, and numpy's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.programs import check_ran, program, run_operations


@pytest.mark.parametrize("name", ["cuda", "metal"])
def test_kernels_match_the_reference(name):
    check_ran(run_operations(f"{name.upper()}-shim", GGML_BACKEND_PATH=program(f"libsfi-{name}-shim.so")))


@pytest.mark.parametrize("name", ["cuda", "metal"])
@pytest.mark.parametrize("seed", range(5))
def test_the_selection_does_not_depend_on_the_order_of_blocks(name, seed):
    """Nor on the evidence, which is another every time: once the number of listed cells was just that of the wanted ones."""
    shim = program(f"libsfi-{name}-shim.so")
    assert run_operations(f"{name.upper()}-shim", "SUPPORT_SELECT", GGML_BACKEND_PATH=shim, SFI_SHIM_SEED=str(seed))


@pytest.mark.parametrize("name", ["cuda", "metal"])
def test_kernels_match_the_reference_of_numpy(name):
    """Selection to the cell, large logits, empty lists, the bits of tokens that see different lengths of a list."""
    folder = Path(program(f"libsfi-{name}-shim.so")).parent
    tests = Path(__file__).parent
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests / "test_ops.py", tests / "test_sketch_ops.py",
                           tests / "test_visible.py",
                           "-k", "TestCore or pads or mass"], capture_output=True, text=True, cwd=tests.parents[1],
                          env={**os.environ, "SFI_TEST_DEVICE": f"{name.upper()}-shim", "SFI_LIB_DIR": str(folder)})
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout

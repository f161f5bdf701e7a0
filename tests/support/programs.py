"""The programs of a build with SFI_TESTS=ON, and the operations that they run."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = "SPARSE_ATTN,SUPPORT_.*,SKETCH_.*,BLOCK_.*,FEW_.*"
LEAST_CASES = {"SPARSE_ATTN": 60, "SUPPORT_EVIDENCE": 20, "SUPPORT_SELECT": 15, "SUPPORT_STABILITY": 12, "SKETCH_ENCODE": 15,
               "SKETCH_SCAN": 60}


def built(name):
    """A program of the development or test build; "" where the build has none."""
    lib = ROOT / "sfi_local" / "lib"
    return next((str(folder / name) for folder in (lib.resolve(), *ROOT.glob("build/*/bin")) if (folder / name).exists()), "")


def program(name):
    """The same; skips where the build has none."""
    return built(name) or pytest.skip(f"{name} is not built; configure with -DSFI_TESTS=ON")


def run_operations(backend: str, operations: str = OPERATIONS, **env: str) -> list[str]:
    """The lines of the cases that ran, all of which passed; a case that is not supported passes too, but did not run."""
    done = subprocess.run([program("test-backend-ops"), "test", "-b", backend, "-o", operations], capture_output=True, text=True,
                          env={**os.environ, **env})
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-1000:] + "\n".join(line for line in lines if "FAIL" in line)[:4000]
    return [line.strip() for line in lines if "OK" in line and "not supported" not in line]


def check_ran(lines: list[str]) -> None:
    for operation, least in LEAST_CASES.items():
        ran = [line for line in lines if line.startswith(f"{operation}(")]
        assert len(ran) >= least, f"{operation}: {len(ran)} cases ran"

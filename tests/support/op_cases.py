"""What the tests of operations share: the seed, tolerances, settings of a case, the kernel paths of this CPU."""

import os
import platform
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np

SEED = int(os.environ.get("SFI_TEST_SEED", 2603))
EPS32 = float(np.finfo(np.float32).eps)
TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")  # of rows of K and V


class Case:
    """A dataclass of settings whose id names the seed and what differs from the defaults."""

    def __str__(self):
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return "-".join(changed).replace(" ", "")

    def new_rng(self):
        return np.random.default_rng([self.seed, *str(self).encode()])


def simd_paths():
    """The values of SFI_SIMD that select a path of their own here."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return ["scalar", "neon"]
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    needs = {"avx2": {"avx2", "fma", "f16c"}, "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}}
    return ["scalar"] + [path for path, features in needs.items() if features <= flags]


def pass_on_path(path, tests):
    """Run tests (file::name) in a process of their own on one kernel path."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests],
                          env={**os.environ, "SFI_SIMD": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]

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


def logit_error(q, k, scale, logit_softcap):
    """Bound of the rounding error of a float32 logit: a sum of products errs by a few eps of the sum of their sizes.

    16 is the square root of 256: along the longest sequential sums the errors behave like a random walk. A softcap's
    tanh errs by an eps of the cap.
    """
    group = q.shape[-3] // k.shape[-3]
    sizes = np.abs(q) @ np.abs(np.repeat(k, group, axis=-3)).swapaxes(-1, -2)
    largest = np.max(sizes, initial=0.0, where=~np.isnan(sizes))
    return 16 * EPS32 * (1 + scale * largest + logit_softcap)


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

"""What the tests of operations share: the seed, tolerances, settings of a case, the kernel paths of this CPU."""

import os
import platform
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from support import reference as ref
from support.ggml_ops import Graph

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


@dataclass(frozen=True)
class ManyTokens(Case):
    """Attention of many tokens of one text to one list."""

    seed: int = SEED
    n_tokens: int = 19
    n_list: int = 300
    n_head: int = 6
    n_head_kv: int = 2
    n_embd_k: int = 64
    n_embd_v: int = 64
    type_k: str = "f16"
    type_v: str = "f16"
    n_stream: int = 1
    pads: bool = False
    sinks: bool = False
    logit_softcap: float = 0.0


class ManyTokensOp:
    """What an operation on such a case is made of: case, scale, q, k, v, cells, visible, sinks."""

    def compute(self, n_threads, **how):
        c = self.case
        with Graph() as g:
            out = g.sparse_attn(g.permuted(self.q), g.cache(self.k, c.type_k), g.cache(self.v, c.type_v),
                                g.tensor(self.cells[:, None, None]), sinks=g.tensor(self.sinks), scale=self.scale,
                                logit_softcap=c.logit_softcap, visible=g.tensor(self.visible), **how)
            assert g.supported(out)
            return g.compute(out, n_threads)

    def rows(self):
        return ref.dequantise(self.case.type_k, self.k), ref.dequantise(self.case.type_v, self.v)

    def tolerance(self):
        """As in test_ops: a logit off by d changes a weight by a factor exp(d), so the output by at most 2 d max|v|."""
        k, v = self.rows()
        largest_v = np.max(np.abs(v), initial=0.0, where=~np.isnan(v))
        return 2 * logit_error(self.q, k, self.scale, self.case.logit_softcap) * largest_v + 1e-12


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

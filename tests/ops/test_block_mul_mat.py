"""Products of weights with the activations of many tokens against numpy: weights as they are stored, activations not rounded."""

from dataclasses import dataclass

import numpy as np
import pytest
from support import reference as ref
from support.ggml_ops import Graph, encode
from support.op_cases import EPS32, SEED, Case, pass_on_path, simd_paths


@dataclass(frozen=True)
class ProductCase(Case):
    seed: int = SEED
    kind: str = "q8_0"
    n_in: int = 320
    n_out: int = 96
    n_tokens: int = 37


class Product:
    def __init__(self, case):
        rng = case.new_rng()
        self.case = case
        self.w = encode(rng.standard_normal((case.n_out, case.n_in), dtype=np.float32), case.kind)
        self.x = rng.standard_normal((case.n_tokens, case.n_in), dtype=np.float32)

    def run(self, n_threads=2, x=None):
        with Graph() as g:
            out = g.block_mul_mat(g.rows(self.w, self.case.kind), g.tensor(self.x if x is None else x))
            assert g.supported(out)
            return g.compute(out, n_threads)[0, 0]

    def check(self):
        w = ref.dequantise(self.case.kind, self.w)
        size = np.abs(self.x) @ np.abs(w).T
        # as in test_ops: along the longest sequential sums errors behave like a random walk
        assert (np.abs(self.run() - self.x.astype(np.float64) @ w.T) <= 16 * EPS32 * size + 1e-12).all()


def cases():
    for n_tokens in (1, 2, 5, 6, 7, 11, 12, 191, 192, 193, 400):
        yield ProductCase(n_tokens=n_tokens)
    for n_in in (32, 64, 224, 256, 288, 512, 544):
        for kind in ("q8_0", "q4_0", "f16"):
            yield ProductCase(n_in=n_in, kind=kind)
    yield ProductCase(n_in=16, kind="f32")
    yield ProductCase(n_in=272, kind="bf16")
    for n_out in (32, 512, 544, 1024):
        yield ProductCase(n_out=n_out)


class TestCore:
    @pytest.mark.parametrize("case", list(cases()), ids=str)
    def test_against_the_reference(self, case):
        Product(case).check()

    def test_a_bad_token_touches_only_itself(self):
        product = Product(ProductCase())
        bad = product.x.copy()
        bad[11, 3] = np.nan
        before, after = product.run(), product.run(x=bad)
        assert np.isnan(after[11]).all()
        assert np.array_equal(np.delete(before, 11, 0), np.delete(after, 11, 0))


@pytest.mark.parametrize("path", simd_paths())
def test_every_kernel_path_of_this_cpu(path):
    pass_on_path(path, f"{__file__}::TestCore")


def test_the_number_of_threads_changes_nothing():
    product = Product(ProductCase(n_out=544, n_tokens=200))
    assert all(np.array_equal(product.run(n), product.run(1)) for n in (2, 3, 5))

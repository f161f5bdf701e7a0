"""Products of quantised weights with the activations of many tokens against numpy: activations in 8 bits, all else exact."""

from dataclasses import dataclass

import gguf
import numpy as np
import pytest
from support.ggml_ops import TYPES, Graph, encode
from support.op_cases import EPS32, SEED, Case, pass_on_path, simd_paths

KINDS = ("q4_0", "q4_1", "q5_0", "q5_1", "q4_K", "q5_K", "q6_K")


@dataclass(frozen=True)
class ProductCase(Case):
    seed: int = SEED
    kind: str = "q4_1"
    n_in: int = 512
    n_out: int = 96
    n_tokens: int = 37


def rounded(x):
    """x [n_tokens, n_in] in 8 bits, blocks of 32 by their largest."""
    blocks = x.reshape(len(x), -1, 32)
    scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(scale > 0, np.rint(blocks * (1 / scale)), 0)
    return (codes.astype(np.float64) * scale).reshape(x.shape)


class Product:
    def __init__(self, case):
        rng = case.new_rng()
        self.case = case
        self.w = encode(rng.standard_normal((case.n_out, case.n_in), dtype=np.float32), case.kind)
        self.x = rng.standard_normal((case.n_tokens, case.n_in), dtype=np.float32) * np.exp(rng.normal(size=(case.n_tokens, 1))).astype(np.float32)

    def run(self, n_threads=2, x=None):
        with Graph() as g:
            out = g.block_mul_mat(g.rows(self.w, self.case.kind), g.tensor(self.x if x is None else x))
            assert g.supported(out)
            return g.compute(out, n_threads)[0, 0]

    def weights(self):
        return gguf.quants.dequantize(self.w, gguf.GGMLQuantizationType(TYPES[self.case.kind])).astype(np.float64)

    def check(self):
        w, x, got = self.weights(), rounded(self.x), self.run()
        # codes are taken times their scale and less their minimum apart, which may be larger than what is left: twice the largest of a row
        size = np.abs(x) @ np.full_like(w, 2 * np.abs(w).max()).T
        assert (np.abs(got - x @ w.T) <= 16 * EPS32 * size).all()
        return got, self.x @ w.T

    def check_rounding(self):
        got, whole = self.check()
        assert np.linalg.norm(got - whole) < 0.01 * np.linalg.norm(whole)


def cases():
    for kind in KINDS:
        yield ProductCase(kind=kind)
        yield ProductCase(kind=kind, n_in=768, n_out=544, n_tokens=9)
    for n_tokens in (1, 2, 3, 4, 5, 7, 8, 400):
        yield ProductCase(n_tokens=n_tokens)
    for n_in in (32, 64, 480, 544, 1056):
        yield ProductCase(n_in=n_in)
    for n_out in (32, 512, 1024):
        yield ProductCase(n_out=n_out)


class TestCore:
    @pytest.mark.parametrize("case", list(cases()), ids=str)
    def test_against_the_reference(self, case):
        Product(case).check_rounding()

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_largest_codes_overflow_nowhere(self, kind):
        product = Product(ProductCase(kind=kind, n_tokens=5))
        product.x[:] = np.where(np.arange(512) % 64 < 32, 1, -1)
        product.w = encode(np.where(np.arange(512) % 32 == 0, -1.0, 1.0).astype(np.float32) * np.ones((96, 1), np.float32), kind)
        product.check()

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_a_bad_token_touches_only_itself(self, bad):
        product = Product(ProductCase())
        x = product.x.copy()
        x[11, 3] = bad
        before, after = product.run(), product.run(x=x)
        assert not np.isfinite(after[11]).any()
        assert np.array_equal(np.delete(before, 11, 0), np.delete(after, 11, 0))

    def test_a_token_of_zeros(self):
        product = Product(ProductCase())
        product.x[5] = 0
        assert not product.run()[5].any()


@pytest.mark.parametrize("path", simd_paths())
def test_every_kernel_path_of_this_cpu(path):
    pass_on_path(path, f"{__file__}::TestCore")


def test_the_number_of_threads_changes_nothing():
    product = Product(ProductCase(n_out=544, n_tokens=200))
    assert all(np.array_equal(product.run(n), product.run(1)) for n in (2, 3, 5))

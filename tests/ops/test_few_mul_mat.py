"""Products of quantised weights with a few tokens: each bit for bit that of llama.cpp for the token alone."""

import platform
from dataclasses import dataclass

import numpy as np
import pytest
from support.ggml_ops import Graph, encode
from support.op_cases import SEED, Case, simd_paths

KINDS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_K", "q5_K", "q6_K")

pytestmark = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64") or "avx2" not in simd_paths(), reason="needs AVX2")


@dataclass(frozen=True)
class FewCase(Case):
    seed: int = SEED
    kind: str = "q4_K"
    n_in: int = 512
    n_out: int = 37
    n_tokens: int = 5
    wild: bool = False  # of very different sizes, some zero


class Product:
    def __init__(self, case):
        rng = case.new_rng()
        self.case = case
        self.w = encode(rng.standard_normal((case.n_out, case.n_in), dtype=np.float32), case.kind)
        self.x = rng.standard_normal((case.n_tokens, case.n_in), dtype=np.float32)
        if case.wild:
            sizes = np.exp(4 * rng.standard_normal((case.n_tokens, case.n_in // 32, 1))) * rng.integers(0, 4, (case.n_tokens, case.n_in // 32, 1))
            self.x = (self.x.reshape(case.n_tokens, -1, 32) * sizes.astype(np.float32)).reshape(self.x.shape)

    def run(self, n_threads=2):
        with Graph() as g:
            out = g.few_mul_mat(g.rows(self.w, self.case.kind), g.strided(self.x))
            assert g.supported(out)
            return g.compute(out, n_threads)[0, 0]

    def alone(self):
        rows = []
        for x in self.x:
            with Graph() as g:
                rows.append(g.compute(g.mul_mat(g.rows(self.w, self.case.kind), g.tensor(x[None])))[0, 0, 0])
        return np.stack(rows)

    def check(self):
        got, expected = self.run(), self.alone()
        assert np.array_equal(got.view(np.int32)[~np.isnan(got)], expected.view(np.int32)[~np.isnan(expected)])
        assert np.array_equal(np.isnan(got), np.isnan(expected))
        return expected


def cases():
    for kind in KINDS:
        for n_tokens in (*range(1, 34), 70):
            yield FewCase(kind=kind, n_tokens=n_tokens)
        for n_in in (256, 768, 1536, 4096):
            yield FewCase(kind=kind, n_in=n_in, n_tokens=11)
        yield FewCase(kind=kind, n_in=8960, n_tokens=3)
        yield FewCase(kind=kind, wild=True, n_tokens=31, n_in=1024)
        for n_out in (1, 2, 15, 16, 17, 32):
            yield FewCase(kind=kind, n_out=n_out)
        if not kind.endswith("K"):
            for n_in in (32, 64, 96, 288, 480, 544, 576, 864):
                yield FewCase(kind=kind, n_in=n_in, n_tokens=9)


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_each_token_has_what_it_has_alone(case):
    expected = Product(case).check()
    assert case.wild or np.isfinite(expected).all()  # sums of Q8_1 are halves: large ones are infinite


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_codes_overflow_nowhere(kind, sign):
    product = Product(FewCase(kind=kind, n_tokens=6))
    product.x[:] = np.where(np.arange(512) % 64 < 32, 1, sign)
    product.w = encode(np.where(np.arange(512) % 32 == 0, -1.0, 1.0).astype(np.float32) * np.ones((37, 1), np.float32), kind)
    product.check()


@pytest.mark.parametrize("kind", KINDS)
def test_any_bytes_of_weights(kind):
    """Scales of a file may be anything, codes and minima too."""
    product = Product(FewCase(kind=kind, n_tokens=6))
    product.w = np.random.default_rng(SEED).integers(0, 256, product.w.shape, dtype=np.uint8)
    product.check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e38, 1e-42])
def test_what_is_not_finite_does_what_it_does_alone(kind, bad):
    product = Product(FewCase(kind=kind, n_tokens=6))
    product.x[2, 3] = product.x[4, -1] = bad
    product.x[5] = bad
    product.x[3] = 0
    product.check()


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_threads_changes_nothing(kind):
    product = Product(FewCase(kind=kind, n_out=544, n_tokens=9))
    assert all(np.array_equal(product.run(n), product.run(1)) for n in (2, 3, 5))

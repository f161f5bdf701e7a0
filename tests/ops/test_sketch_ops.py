"""The sketch operations of ggml-sfi.h on the CPU against the reference.

Codes are random bytes where an operation only reads them, and everything an operation has no business reading (codes of
cells that do not count, rows that are not listed) is noise or NaN. SFI_TEST_SEED changes the seed.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from support import reference as ref
from support.ggml_ops import POISON, Graph, SketchFormat, encode, library
from support.op_cases import EPS32, SEED, TYPES, Case, pass_on_path, simd_paths

FORMATS = [ref.one_look(*f) for f in (
    (16, 0, 0, 16, 0), (4, 16, 16, 16, 0), (8, 0, 0, 16, 0), (16, 16, 32, 32, 0), (16, 32, 0, 0, 32), (4, 4, 8, 16, 16),
    (0, 0, 32, 0, 16), (0, 16, 0, 64, 16), (12, 4, 40, 16, 0), (32, 0, 0, 0, 0))]
DEFAULT = FORMATS[0]
TWICE = [ref.SketchFormat(*f) for f in (
    (4, 40, 0, 0, 16, 1), (8, 48, 0, 0, 16, 2), (8, 80, 0, 0, 32, 3), (16, 96, 0, 0, 32, 4), (4, 24, 32, 16, 0, 1), (4, 4, 40, 16, 16, 1),
    (0, 0, 96, 0, 0, 2), (16, 16, 32, 32, 0, 2))]
GROUPS = {1: (2, 2), 2: (4, 2), 3: (9, 3), 4: (8, 2), 5: (5, 1), 7: (14, 2), 8: (16, 2)}  # n_head, n_head_kv
SIZES = (64, 80, 128, 256)  # n_embd
LENGTHS = (16, 48, 240, 256, 272, 1024, 2032, 2048, 2064, 4112)  # both sides of every edge of a run or a chunk


def draw_basis(rng, form, n_embd_k, n_embd_v):
    """Components of rows of normal values get about the spread that a real sketch gives them."""
    def part(bits, n_embd):
        enc = rng.normal(size=(len(bits), n_embd)) * 2**bits[:, None] / 4 / np.sqrt(n_embd)
        dec = rng.normal(size=(len(bits), n_embd)) * 4 / 2**bits[:, None]
        return [part.astype(np.float32) for part in (rng.normal(size=n_embd), enc, dec.astype(np.float16))]

    return ref.Basis(*part(form.bits_k, n_embd_k), *part(form.bits_v, n_embd_v))


def draw_bases(rng, form, n_head_kv, n_embd_k, n_embd_v):
    return [draw_basis(rng, form, n_embd_k, n_embd_v) for _ in range(n_head_kv)]


def flat(bases):
    return np.array([basis.flat() for basis in bases])


def draw_codes(rng, form, n_head_kv, n_blocks):
    return rng.integers(0, 256, (n_head_kv, n_blocks, ref.CELLS * form.cell_bytes)).astype(np.uint8)


def in_double(basis):
    return ref.Basis(*(part.astype(np.float64) for part in basis))


# ---- sketch_encode ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodeCase(Case):
    seed: int = None
    form: ref.SketchFormat = DEFAULT
    n_head_kv: int = 2
    n_embd_k: int = 64
    n_embd_v: int = 64
    type_k: str = "f16"
    type_v: str = "f16"
    n_cells: int = 90
    n_listed: int = 50
    in_order: bool = False  # cells one after the other, as prefill writes them
    n_threads: int = 2


class Encode:
    def __init__(self, case):
        c, rng = case, case.new_rng()
        self.case = c
        self.bases = draw_bases(rng, c.form, c.n_head_kv, c.n_embd_k, c.n_embd_v)
        self.k_rows = encode(rng.normal(size=(1, c.n_head_kv, c.n_cells, c.n_embd_k)) * 2, c.type_k)
        self.v_rows = encode(rng.normal(size=(1, c.n_head_kv, c.n_cells, c.n_embd_v)) * 2, c.type_v)
        self.codes = draw_codes(rng, c.form, c.n_head_kv, -(-c.n_cells // ref.CELLS) + 1)
        self.cells = rng.permutation(c.n_cells)[:c.n_listed].astype(np.int32)
        if c.in_order:
            self.cells = np.arange(7, 7 + c.n_listed, dtype=np.int32)
        unlisted = np.setdiff1d(np.arange(c.n_cells), self.cells)
        self.k_rows[:, :, unlisted] = self.v_rows[:, :, unlisted] = POISON
        for pad in (-1, -1, c.n_cells, 2**31 - 1, -2**31):
            self.cells = np.insert(self.cells, rng.integers(0, len(self.cells) + 1), pad)

    def run(self, n_threads=None):
        c = self.case
        with Graph() as g:
            out = g.sketch_encode(g.tensor(self.codes), g.tensor(flat(self.bases)), g.cache(self.k_rows, c.type_k),
                                  g.cache(self.v_rows, c.type_v), g.tensor(self.cells), c.form)
            assert g.supported(out)
            return g.compute(out, n_threads or c.n_threads, in_place=True)[0]

    def check(self):
        """Every code is the unrounded one, rounded; what lies next to it has not changed."""
        c, got = self.case, self.run()
        cells = self.cells[(self.cells >= 0) & (self.cells < c.n_cells)]
        for h, basis in enumerate(map(in_double, self.bases)):
            k, v = (ref.dequantise(kind, rows[0, h, cells]) for kind, rows in ((c.type_k, self.k_rows), (c.type_v, self.v_rows)))
            of_k, of_v = (part[cells] for part in ref.unpack(c.form, got[h]))
            check_codes(of_k, k, basis.mean_k, basis.enc_k, c.form.bits_k)
            check_codes(of_v, v, basis.mean_v, basis.enc_v, c.form.bits_v)
            np.testing.assert_array_equal(got[h], ref.pack(c.form, self.codes[h], cells, of_k, of_v))


def check_codes(codes, x, mean, enc, bits):
    exact = ref.unrounded(x, mean, enc, bits)
    tolerance = 16 * EPS32 * (1 + np.abs(x - mean) @ np.abs(enc).T)
    largest = 2**bits - 1
    assert np.all(codes >= 0) and np.all(codes <= largest)
    assert np.all(np.abs(codes - np.clip(exact, 0, largest)) <= 0.5 + tolerance)


def encode_cases():
    def case(**settings):
        return EncodeCase(seed=SEED, **settings)

    for form in FORMATS + TWICE:
        yield case(form=form)
        yield case(form=form, n_listed=1, n_threads=3)
    for n_listed in (0, 1, 15, 16, 17, 83):
        yield case(n_listed=n_listed, in_order=True)
        yield case(n_listed=n_listed, n_head_kv=1, n_threads=3)
    for n_embd in SIZES:
        for kind in TYPES if n_embd % 32 == 0 else TYPES[:3]:
            yield case(n_embd_k=n_embd, n_embd_v=n_embd, type_k=kind, type_v=kind, form=FORMATS[1])
    yield case(n_embd_k=192, n_embd_v=128, type_k="q8_0", type_v="q4_0", n_head_kv=5)
    yield case(n_cells=2000, n_listed=1500, n_head_kv=3, n_threads=3, form=FORMATS[3])


# ---- sketch_scan --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScanCase(Case):
    seed: int = None
    form: ref.SketchFormat = DEFAULT
    n_head: int = 4
    n_head_kv: int = 2
    n_embd_k: int = 64
    n_embd_v: int = 64
    n_list: int = 1040
    n_used: int = None  # None: n_list
    n_skip: int = 20
    skip_all: bool = False
    n_selected: int = 50
    least: float = 0.0  # > 0: cells of a smaller share are not selected, in the n-th KV head an n-th of it
    logit_softcap: float = 0.0
    second_look: float = None  # None: 0.5 of two looks, 0 where the first is at all of K
    broken: bool = False  # the query of head 0 is not finite, nor is `least` of the last KV head
    largest: float = 8.0  # roughly: size of the largest logits
    n_different: int = 0  # > 0: so many blocks of codes, over and over, so that there are ties
    n_threads: int = 2


class Scan:
    def __init__(self, case):
        c, rng = case, case.new_rng()
        self.case = c
        self.bases = draw_bases(rng, c.form, c.n_head_kv, c.n_embd_k, c.n_embd_v)
        self.codes = draw_codes(rng, c.form, c.n_head_kv, -(-c.n_list // ref.CELLS) + 2)
        if c.n_different:
            self.codes = self.codes[:, rng.integers(0, c.n_different, self.codes.shape[1])]
        self.q = rng.normal(size=(c.n_head, c.n_embd_k)).astype(np.float32)
        self.scale = c.largest / 4 / c.n_embd_k
        self.n_used = c.n_list if c.n_used is None else min(c.n_used, c.n_list)
        self.skip = rng.permutation(c.n_list)[:c.n_list if c.skip_all else c.n_skip].astype(np.int32)
        for pad in (-1, -1, -1, 2**31 - 1):
            self.skip = np.insert(self.skip, rng.integers(0, len(self.skip) + 1), pad)
        self.least = (c.least / np.arange(1, c.n_head_kv + 1)).astype(np.float32)
        self.second_look = c.second_look if c.second_look is not None else 0.5 if c.form in TWICE else 0.0
        if c.broken:
            self.q[0, 5], self.least[-1] = np.nan, np.nan

    def run(self, n_threads=None):
        """(tail [n_head, n_embd_v + 1], selected [n_head_kv, n_selected])"""
        c = self.case
        with Graph() as g:
            store = g.tensor(np.full((c.n_head_kv, c.n_selected + 3), 7, np.int32))  # 7: to be overwritten; but not the last three
            selected = g.lib.ggml_view_4d(g.ctx, store, c.n_selected, c.n_head_kv, 1, 1, *store.contents.nb[1:], 0)
            counts = g.tensor(np.full((c.n_head_kv, 2), -7, np.int32))
            out = g.sketch_scan(g.strided(self.q, n_spare=4), g.tensor(self.codes), g.tensor(flat(self.bases)), g.tensor(self.skip),
                                g.tensor(np.array([self.n_used])), g.tensor(self.least) if c.least else None, selected,
                                counts, c.n_list, c.n_embd_v, c.form, self.scale, c.logit_softcap, self.second_look)
            assert g.supported(out)
            tail = g.compute(out, n_threads or c.n_threads)[0, 0]
            rows = g.read(store)[0, 0]
            assert np.all(rows[:, c.n_selected:] == 7)
            n_selected, self.n_looked = g.read(counts)[0, 0].T
            np.testing.assert_array_equal(n_selected, (rows[:, :c.n_selected] >= 0).sum(axis=1))
            return tail, rows[:, :c.n_selected]

    def logits(self, h, first=False):
        c, h_kv = self.case, h * self.case.n_head_kv // self.case.n_head
        return ref.sketch_logits(c.form, in_double(self.bases[h_kv]), self.codes[h_kv], self.q[h].astype(np.float64), self.skip,
                                 self.n_used, c.n_list, self.scale, c.logit_softcap, first)

    def unlooked(self, h_kv, x, off):
        """Of a group whose logits x [group, n_list] are: those of the cells that are not looked at again become -inf. Returns the
        log-sum-exp of these cells by the first look, per head, and whether it may be other cells, by rounding errors."""
        group = len(x)
        first = np.array([self.logits(h, first=True) for h in range(h_kv * group, (h_kv + 1) * group)])
        surely, perhaps = (ref.sketch_looked(first, self.second_look * np.exp(edge), self.n_used) for edge in (off, -off))
        assert surely.sum() <= self.n_looked[h_kv] <= perhaps.sum()
        x[:, ~perhaps] = first[:, perhaps] = -np.inf
        return [ref.log_sum_exp(row) for row in first], np.any(perhaps != surely)

    def logits_off(self, h):
        """Rounding errors of float32 in the projections, and a weight that they may push over the edge to the next."""
        c, basis = self.case, in_double(self.bases[h * self.case.n_head_kv // self.case.n_head])
        if c.broken and h == 0:
            return 0
        q, centre = np.abs(self.q[h].astype(np.float64)), (2**c.form.bits_k - 1) / 2
        rounding = 16 * EPS32 * (q @ np.abs(basis.mean_k) + centre @ np.abs(basis.dec_k) @ q)
        w, s = ref.sketch_weights(self.q[h].astype(np.float64), basis.dec_k)
        exact = basis.dec_k @ self.q[h] / s
        on_edge = np.abs(np.abs(exact - np.floor(exact)) - 0.5) < 64 * EPS32 * 127
        return self.scale * (rounding + s * centre[on_edge].sum()) + 16 * EPS32 * (1 + c.logit_softcap)

    def others_off(self, h, lse):
        """By how much the sum of the weights of cells that are not looked at again may be off, over exp(lse)."""
        if lse == -np.inf:
            return 0
        return 2.0**-18 * np.exp(min(ref.log_sum_exp(self.logits(h, first=True)) - lse, 80))

    def tail_off(self, h, x, lse):
        """(of V, of the log-sum-exp): errors of weights and of what the sum of cells that were looked at once may be off, relative to
        the sum of those that were not selected."""
        rest = 4 * EPS32 * np.exp(min(ref.log_sum_exp(x) - lse, 80)) + 2 * self.logits_off(h) + 2e-5 + self.others_off(h, lse)
        return rest, rest

    def check(self):
        c, (tail, selected) = self.case, self.run()
        group = c.n_head // c.n_head_kv
        for h_kv in range(c.n_head_kv):
            heads = range(h_kv * group, (h_kv + 1) * group)
            x, row = np.array([self.logits(h) for h in heads]), selected[h_kv]
            logits_off = 2 * max(map(self.logits_off, heads))
            others, is_unsure = self.unlooked(h_kv, x, 1e-5 + logits_off)
            if is_unsure:
                assert np.isfinite(x[-1][row[row >= 0]]).all()
                continue
            off = 1e-4 + logits_off + min(100, max(self.others_off(h, np.logaddexp(ref.log_sum_exp(x_h), o))
                                                   for h, x_h, o in zip(heads, x, others)))
            if c.least:
                check_least(row, x, self.least[h_kv], off, others)
            elif c.n_different:
                np.testing.assert_array_equal(np.sort(row), np.sort(ref.sketch_select(x[None], c.n_selected)[0]))
            else:
                check_best(row, ref.sketch_score(x, others), off)
            for h, x_h, others_h in zip(heads, x, others):
                self.check_tail(h, x_h, row[row >= 0], tail[h], others_h)

    def check_tail(self, h, x, cells, got, others):
        c, h_kv, n = self.case, h * self.case.n_head_kv // self.case.n_head, self.case.n_embd_v
        basis = in_double(self.bases[h_kv])
        expected = ref.sketch_tail(c.form, basis, self.codes[h_kv], x, cells, others)
        share = np.exp(expected[n] - np.logaddexp(ref.log_sum_exp(x), others)) if np.isfinite(expected[n]) else 0
        others_off = self.others_off(h, np.logaddexp(ref.log_sum_exp(x), others))
        if got[n] == -np.inf:
            assert share < 2.0**-19 + others_off and not got[:n].any()
            return
        assert share > 2.0**-21 - others_off
        off_v, off = self.tail_off(h, x, expected[n])
        size = (np.abs(basis.dec_v) * (2**c.form.bits_v[:, None] - 1) / 2).sum(axis=0).max(initial=0)
        np.testing.assert_allclose(got[:n], expected[:n], rtol=0, atol=2 * off_v * size + 1e-5)
        np.testing.assert_allclose(got[n], expected[n], rtol=4 * EPS32, atol=off)


def check_best(selected, score, off):
    """`selected` is a set of best cells, up to what a score may be off."""
    n = min(len(selected), np.isfinite(score).sum())
    cells = selected[selected >= 0]
    assert len(cells) == n and len(set(cells)) == n
    assert np.all(selected[selected < 0] == -1)
    is_selected = np.zeros(len(score), bool)
    is_selected[cells] = True
    assert np.isfinite(score[is_selected]).all()
    if n:
        worst = np.sort(score)[-n]  # the score of the last one to be selected
        assert np.all(score[is_selected] >= worst - off)
        assert np.all(score[~is_selected] <= worst + off)


def check_least(selected, x, least, off, others=()):
    """The best cells of a share of `least` or more, up to what shares may be off."""
    share, score, cells = ref.sketch_share(x, others), ref.sketch_score(x, others), selected[selected >= 0]
    surely, perhaps = share >= least * np.exp(2 * off), share >= least * np.exp(-2 * off)
    assert len(set(cells)) == len(cells) and perhaps[cells].all()
    assert min(surely.sum(), len(selected)) <= len(cells) <= perhaps.sum()
    left = surely.copy()
    left[cells] = False
    assert not left.any() or len(cells) == len(selected) and score[left].max() <= score[cells].min() + off


def scan_cases():
    def case(**settings):
        return ScanCase(seed=SEED, **settings)

    for form in TWICE:
        yield case(form=form)
        yield case(form=form, least=0.003, n_selected=1000)
        yield case(form=form, n_head=9, n_head_kv=3, n_embd_k=128, n_embd_v=128, n_threads=3, n_list=4112)
    for second_look in (0.0, 0.3, 1.0, 3.0, 1000.0):
        yield case(form=TWICE[0], least=0.003, n_selected=1000, second_look=second_look)
        yield case(form=TWICE[1], n_head=8, n_embd_k=128, n_embd_v=128, n_list=9008, second_look=second_look)
    yield case(form=TWICE[0], n_list=33008, n_head=2, n_head_kv=1, second_look=3.0, n_selected=300)  # large chunks of cells
    # as many components of V as a GPU's kernel takes
    yield case(form=ref.SketchFormat(16, 32, 0, 64, 64, 1), n_head=16, n_embd_k=128, n_embd_v=128, n_list=2064)
    for n_head, n_head_kv in GROUPS.values():
        yield case(n_head=n_head, n_head_kv=n_head_kv, form=TWICE[0], n_threads=3, n_list=2064)
        yield case(n_head=n_head, n_head_kv=n_head_kv, form=TWICE[0], least=0.005, n_selected=1000, n_threads=3)
    for n_list in LENGTHS:
        for n_used in (0, 1, n_list - 17, n_list - 1, n_list):
            yield case(n_list=n_list, n_used=max(n_used, 0), n_threads=3, n_skip=min(20, n_list), form=TWICE[0])
        for n_selected in (1, 250, 5000):
            yield case(n_list=n_list, n_selected=n_selected, n_threads=3, form=TWICE[3])
    yield case(skip_all=True, form=TWICE[0])
    yield case(n_skip=1030, form=TWICE[0])
    for least in (1e-6, 0.01, 2.0):
        yield case(least=least, n_selected=2000, n_list=2064, form=TWICE[0])
    for largest in (0.0, 30.0, 300.0, 1000.0):
        yield case(largest=largest, form=TWICE[0], n_list=2064)
        yield case(largest=largest, least=0.01, form=TWICE[0], n_list=2064)
    for form in FORMATS:
        yield case(form=form)
        yield case(form=form, least=0.003, n_selected=1000)
        yield case(form=form, n_head=9, n_head_kv=3, n_embd_k=128, n_embd_v=128, n_threads=3)
    for n_head, n_head_kv in GROUPS.values():
        yield case(n_head=n_head, n_head_kv=n_head_kv, form=FORMATS[5], n_threads=3)
        yield case(n_head=n_head, n_head_kv=n_head_kv, n_different=3, n_selected=300)
        yield case(n_head=n_head, n_head_kv=n_head_kv, least=0.005, n_selected=1000, n_threads=3)
    for n_embd in SIZES:
        yield case(n_embd_k=n_embd, n_embd_v=n_embd)
    yield case(n_embd_k=192, n_embd_v=128)
    for n_list in LENGTHS:
        for n_used in (0, 1, n_list - 17, n_list - 1, n_list):
            yield case(n_list=n_list, n_used=max(n_used, 0), n_threads=3, n_skip=min(20, n_list))
        for n_selected in (1, 16, 250, n_list - 1, n_list, 5000):
            yield case(n_list=n_list, n_selected=n_selected, n_threads=3)
    for n_skip in (0, 1, 1030):
        yield case(n_skip=n_skip)
        yield case(n_skip=n_skip, n_head=9, n_head_kv=3)
    yield case(skip_all=True)
    for n_different in (1, 3, 40):
        for n_selected in (1, 100, 2000):
            yield case(n_different=n_different, n_list=2064, n_selected=n_selected)
    for least in (1e-6, 1e-3, 0.01, 0.3, 2.0):
        for n_selected in (1, 20, 2000):
            yield case(least=least, n_selected=n_selected, n_list=2064)
        yield case(least=least, n_head=9, n_head_kv=3, n_threads=3, n_list=4112)
    for largest in (0.0, 1e-3, 30.0, 300.0, 1000.0):
        yield case(largest=largest)
        yield case(largest=largest, least=0.01)
        yield case(largest=largest, n_list=4112, n_head=9, n_head_kv=3, n_selected=256)
    for form in (TWICE[1], DEFAULT):
        for least in (0.0, 0.003):
            yield case(form=form, broken=True, least=least, n_head=6)
    for second_look in (0.5, 2.0):
        yield case(second_look=second_look, least=0.003, n_selected=1000)
    yield case(logit_softcap=5.0)
    yield case(largest=1000.0, logit_softcap=30.0, form=FORMATS[3])
    yield case(largest=1000.0, logit_softcap=30.0, least=0.01)


# ---- against the reference ----------------------------------------------------------------------------------------


class TestCore:
    """What is run again for every kernel path of this CPU."""

    @pytest.mark.parametrize("case", list(encode_cases()), ids=str)
    def test_encode(self, case):
        Encode(case).check()

    @pytest.mark.parametrize("case", list(scan_cases()), ids=str)
    def test_scan(self, case):
        Scan(case).check()


@pytest.mark.parametrize("path", simd_paths())
def test_every_kernel_path_of_this_cpu(path):
    pass_on_path(path, f"{__file__}::TestCore")


# ---- equivalences -------------------------------------------------------------------------------------------------

THREADS = [
    (Encode, EncodeCase(seed=SEED, n_cells=700, n_listed=600, n_head_kv=3, form=FORMATS[1])),
    (Scan, ScanCase(seed=SEED, n_list=8016, n_used=8000, n_head=9, n_head_kv=3, form=FORMATS[1])),
    (Scan, ScanCase(seed=SEED, n_list=8016, n_used=8000, n_head=8, n_head_kv=1, least=0.001, n_selected=1000)),
    (Scan, ScanCase(seed=SEED, n_list=8016, n_selected=256, n_head=2, n_head_kv=1, n_different=50)),
    (Scan, ScanCase(seed=SEED, n_list=8016, n_selected=256, n_head=4, n_head_kv=1, form=FORMATS[4])),
    (Scan, ScanCase(seed=SEED, n_list=20016, n_used=20000, n_head=9, n_head_kv=3, form=TWICE[0], least=0.001)),
    (Scan, ScanCase(seed=SEED, n_list=8016, n_selected=256, n_head=8, n_head_kv=1, form=TWICE[3])),
]


@pytest.mark.parametrize("inputs, case", THREADS, ids=lambda x: getattr(x, "__name__", None) or str(x))
def test_thread_count_changes_nothing(inputs, case):
    inputs = inputs(case)
    one = inputs.run(n_threads=1)
    for n_threads in (1, 2, 3, 5):
        for got, expected in zip(inputs.run(n_threads), one):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("form", FORMATS + TWICE, ids=str)
def test_the_library_and_the_reference_agree_on_sizes(form):
    f = SketchFormat(*form)
    assert library().ggml_sketch_cell_bytes(f) == form.cell_bytes
    assert library().ggml_sketch_basis_size(f, 96, 80) == draw_basis(np.random.default_rng(0), form, 96, 80).flat().size


@pytest.mark.parametrize("form", FORMATS + TWICE, ids=str)
def test_every_bit_of_the_codes_belongs_to_one_component_of_one_cell(form):
    count = np.zeros((3 * 16 * form.cell_bytes, 8), int)
    for bits, place in ((form.bits_k, ref.place_k), (form.bits_v, ref.place_v)):
        for j, b in enumerate(bits):
            for cell in range(3 * 16):
                byte, bit = place(form, j, cell, 3)
                count[byte, bit:bit + b] += 1
    assert np.all(count == 1)


def test_encoding_cells_one_by_one_equals_encoding_them_together():
    e = Encode(EncodeCase(seed=SEED, form=FORMATS[5], n_listed=40))
    together, cells = e.run(), e.cells
    for cell in cells:
        e.cells = np.array([cell])
        e.codes = e.run()
    np.testing.assert_array_equal(e.codes, together)


def test_logits_of_encoded_keys_are_those_of_the_decoded_keys():
    """The log-sum-exp of a single cell is its logit."""
    e = Encode(EncodeCase(seed=SEED, form=FORMATS[1], n_cells=256, n_listed=256, type_k="f32"))
    x = Scan(ScanCase(seed=SEED, form=FORMATS[1], n_list=256, least=4.0))
    x.bases = [ref.Basis(*e_basis[:3], *x_basis[3:]) for e_basis, x_basis in zip(e.bases, x.bases)]
    x.codes = e.run()
    for cell in (0, 5, 16, 255):
        x.skip = np.delete(np.arange(256, dtype=np.int32), cell)
        tail, selected = x.run()
        assert np.all(selected == -1)
        for h in range(4):
            basis, of_k = in_double(x.bases[h // 2]), ref.unpack(e.case.form, x.codes[h // 2])[0][:256]
            keys = ref.decode(of_k, basis.mean_k, basis.dec_k, e.case.form.bits_k)
            w, s = ref.sketch_weights(x.q[h].astype(np.float64), basis.dec_k)
            rounding = s / 2 * ((2**e.case.form.bits_k - 1) / 2).sum()  # of the weights
            np.testing.assert_allclose(tail[h, -1], x.scale * keys[cell] @ x.q[h], rtol=0, atol=x.scale * rounding + 1e-4)


def test_selected_cells_and_their_tail_are_all_there_is():
    """With values that the sketch holds exactly, exact attention over the selected cells and the tail of the others give
    attention over all cells."""
    s = Scan(ScanCase(seed=SEED, n_head=2, n_head_kv=2, n_skip=0))
    tail, selected = s.run()
    for h in range(2):
        basis, x = in_double(s.bases[h]), s.logits(h)
        v = ref.decode(ref.unpack(s.case.form, s.codes[h])[1][:len(x)], basis.mean_v, basis.dec_v, s.case.form.bits_v)
        merged = ref.attend(np.ones(1), x[selected[h], None], v[selected[h]], 1.0, tail=tail[h].astype(np.float64))
        np.testing.assert_allclose(merged, np.exp(x - ref.log_sum_exp(x)) @ v, rtol=0, atol=20 * s.tail_off(h, x, tail[h, -1])[0])


def test_a_group_of_equal_heads_selects_what_one_of_them_does():
    s = Scan(ScanCase(seed=SEED, n_head=2))
    one = np.sort(s.run()[1], axis=1)
    s.case = replace(s.case, n_head=6)
    s.q = np.repeat(s.q, 3, axis=0)
    np.testing.assert_array_equal(np.sort(s.run()[1], axis=1), one)


def test_what_is_not_used_is_not_read():
    """Codes of blocks and records after the last cell in use change nothing."""
    s = Scan(ScanCase(seed=SEED, n_list=1040, n_used=500))
    tail, selected = s.run()
    s.codes = s.codes.copy()
    form, n_blocks, codes = s.case.form, s.codes.shape[1], s.codes.reshape(len(s.codes), -1)
    codes[:, ref.PLANE * form.n_first * 32:ref.record(form, 0, n_blocks)] ^= 255
    codes[:, ref.record(form, 512, n_blocks):] ^= 255
    for got, expected in zip(s.run(), (tail, selected)):
        np.testing.assert_array_equal(got, expected)


# ---- what the CPU does not compute --------------------------------------------------------------------------------


def test_the_backend_says_no_to_rows_of_odd_sizes():
    with Graph() as g:
        basis = g.new("f32", (24 + 64) * (1 + 16 + 16 // 2), 2)
        out = g.sketch_encode(g.new("i8", 256, 4, 2), basis, g.new("f16", 24, 64, 2), g.new("f16", 64, 64, 2), g.new("i32", 8),
                              DEFAULT)
        assert not g.supported(out)


def test_the_backend_says_no_to_more_components_than_it_has_room_for():
    form = ref.one_look(272, 0, 0, 16, 0)
    with Graph() as g:
        codes, basis = g.new("i8", 16 * form.cell_bytes, 4, 2), g.new("f32", 64 * (1 + 272 + 272 // 2) + 64 * (1 + 16 + 16 // 2), 2)
        assert not g.supported(g.sketch_scan(g.new("f32", 64, 2), codes, basis, g.new("i32", 1), g.new("i32", 1), None,
                                             g.new("i32", 8, 2), g.new("i32", 2, 2), 64, 64, form))

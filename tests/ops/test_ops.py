"""The four operations of ggml-sfi.h on the CPU against the reference.

The reference sees exactly what the operation sees: quantised K and V are dequantised first. Whatever an operation has
no business reading (cells that no list names, the rest of the cache) is filled with NaN, and so is its result before it
runs. SFI_TEST_SEED changes the seed, which is part of every case's id.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from support import reference as ref
from support.ggml_ops import POISON, Graph, encode
from support.op_cases import EPS32, SEED, TYPES, Case, logit_error, pass_on_path, simd_paths

LENGTHS = (0, 1, 7, 8, 63, 64, 65, 255, 256, 257, 2308)  # both sides of every tile edge; 2308 = 4 + 256 + 2048
GROUPS = {"1": (2, 2), "2": (4, 2), "4": (8, 2), "8": (16, 2), "3": (9, 3), "7": (7, 1)}  # n_head, n_head_kv
TOPK, PAPER = 0, 1


# ---- sparse_attn --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttnCase(Case):
    seed: int = None
    n_head: int = 4
    n_head_kv: int = 2
    n_embd_k: int = 64
    n_embd_v: int = 64
    type_k: str = "f16"
    type_v: str = "f16"
    n_always: int = None  # None: a NULL argument
    n_selected: int = None
    n_tokens: int = 1
    always_per_token: bool = False
    selected_per_token: bool = False
    n_stream: int = 1
    pads: bool = True
    tail: bool = False
    sinks: bool = False
    logit_softcap: float = 0.0
    largest: float = 8.0  # roughly: size of the largest logits
    plain: bool = False  # contiguous q, k, v instead of llama.cpp's views
    n_threads: int = 2


class Attn:
    """The inputs of one sparse_attn: float32 and lists as arrays, K and V as rows of their storage type."""

    def __init__(self, case):
        c, rng = case, case.new_rng()
        self.case, self.scale = c, 1 / np.sqrt(c.n_embd_k)
        n_cells = (c.n_always or 0) + (c.n_selected or 0) + 37

        def normal(*shape):
            return rng.normal(size=shape).astype(np.float32)

        self.q = normal(c.n_stream, c.n_head, c.n_tokens, c.n_embd_k) * np.float32(c.largest / 4)
        k, v = normal(c.n_stream, c.n_head_kv, n_cells, c.n_embd_k), normal(c.n_stream, c.n_head_kv, n_cells, c.n_embd_v)
        self.k_rows, self.v_rows = encode(k, c.type_k), encode(v, c.type_v)
        self.always, self.selected = self.draw_lists(rng, n_cells)
        self.tail = self.sinks = None
        if c.tail:
            self.tail = normal(c.n_stream, c.n_tokens, c.n_head, c.n_embd_v + 1)
            self.tail[..., -1] += np.float32(c.largest)
        if c.sinks:
            self.sinks = normal(c.n_head) + np.float32(c.largest)
        self.poison_unlisted()

    def draw_lists(self, rng, n_cells):
        """Unique cells per query and KV head, in no order, pads scattered among them."""
        c = self.case
        t_always, t_selected = c.n_tokens if c.always_per_token else 1, c.n_tokens if c.selected_per_token else 1
        always = np.zeros((c.n_stream, t_always, c.n_always or 0), np.int32)
        selected = np.zeros((c.n_stream, t_selected, c.n_head_kv, c.n_selected or 0), np.int32)
        for s in range(c.n_stream):
            cells = rng.permutation(n_cells)  # a cell of `always` is in no head's `selected`
            for t in range(t_always):
                always[s, t] = rng.permutation(cells[:c.n_always or 0])
            for t in range(t_selected):
                for h in range(c.n_head_kv):
                    selected[s, t, h] = rng.permutation(cells[c.n_always or 0:])[:c.n_selected or 0]
        for lists in (always, selected):
            if c.pads:
                is_pad = rng.random(lists.shape) < 0.2
                lists[is_pad] = rng.choice([-1, -1, -1, n_cells, 2**31 - 1, -2**31], is_pad.sum())
        return always if c.n_always is not None else None, selected if c.n_selected is not None else None

    def poison_unlisted(self):
        n_cells = self.k_rows.shape[2]
        for s in range(self.case.n_stream):
            for h in range(self.case.n_head_kv):
                listed = [ref.support_of(self.always, self.selected, s, t, h, n_cells) for t in range(self.case.n_tokens)]
                unlisted = np.setdiff1d(np.arange(n_cells), np.concatenate(listed))
                self.k_rows[s, h, unlisted] = self.v_rows[s, h, unlisted] = POISON

    @property
    def k(self):
        return ref.dequantise(self.case.type_k, self.k_rows)

    @property
    def v(self):
        return ref.dequantise(self.case.type_v, self.v_rows)

    def but(self, **changes):
        """The same inputs with some replaced."""
        other = object.__new__(Attn)
        other.__dict__.update(self.__dict__, **changes)
        return other

    def run(self, n_threads=None):
        c = self.case
        with Graph() as g:
            store = g.rows if c.plain else g.cache
            lists = g.tensor if c.plain else g.strided
            out = g.sparse_attn(
                g.tensor(self.q) if c.plain else g.permuted(self.q),
                store(self.k_rows, c.type_k),
                store(self.v_rows, c.type_v),
                None if self.always is None else lists(self.always[:, None]),
                None if self.selected is None else lists(self.selected),
                None if self.tail is None else lists(self.tail),
                g.tensor(self.sinks), self.scale, c.logit_softcap)
            assert g.supported(out)
            return g.compute(out, n_threads or c.n_threads)

    def expected(self):
        return ref.sparse_attn(self.q, self.k, self.v, self.always, self.selected, self.scale,
                               self.case.logit_softcap, self.tail, self.sinks)

    def tolerance(self):
        """A logit off by d changes a weight by a factor exp(d), so the output by at most 2 d max|v|."""
        largest_v = max(np.max(np.abs(x), initial=0.0, where=~np.isnan(x))
                        for x in (self.v, self.tail[..., :-1] if self.tail is not None else np.zeros(1)))
        return 2 * logit_error(self.q, self.k, self.scale, self.case.logit_softcap) * largest_v + 1e-12

    def check(self, n_threads=None):
        np.testing.assert_allclose(self.run(n_threads), self.expected(), rtol=0, atol=self.tolerance())


def attn_cases():
    def case(**settings):
        return AttnCase(seed=SEED, **settings)

    for n in LENGTHS:
        yield case(n_selected=n)
        yield case(n_always=n, n_selected=n // 2, n_tokens=3, type_k="q8_0", type_v="q8_0", n_threads=3)
        yield case(n_always=n, n_head=9, n_head_kv=3, type_k="f32", type_v="f32", tail=True)
    for n_head, n_head_kv in GROUPS.values():
        yield case(n_head=n_head, n_head_kv=n_head_kv, n_always=20, n_selected=70, n_tokens=2)
    for n_embd in (16, 64, 80, 96, 128, 256, 512):
        for kind in TYPES if n_embd % 32 == 0 else TYPES[:3]:
            yield case(n_embd_k=n_embd, n_embd_v=n_embd, n_always=9, n_selected=65, type_k=kind, type_v=kind)
    for n_embd_k, n_embd_v in ((192, 128), (64, 256), (16, 80), (112, 48)):
        yield case(n_embd_k=n_embd_k, n_embd_v=n_embd_v, n_selected=65)
    for type_k in TYPES:
        for type_v in TYPES:
            if type_k != type_v:
                yield case(type_k=type_k, type_v=type_v, n_always=5, n_selected=64)
    for n_stream in (1, 2):
        for always_per_token, selected_per_token in ((0, 0), (0, 1), (1, 0), (1, 1)):
            for plain in (False, True):
                yield case(n_stream=n_stream, n_tokens=3, n_always=12, n_selected=33, plain=plain,
                           always_per_token=bool(always_per_token), selected_per_token=bool(selected_per_token))
    for logit_softcap in (0.0, 30.0):
        for sinks in (False, True):
            for tail in (False, True):
                yield case(n_always=7, n_selected=64, n_tokens=2, sinks=sinks, tail=tail, logit_softcap=logit_softcap)
                yield case(n_selected=0, n_tokens=2, sinks=sinks, tail=tail, logit_softcap=logit_softcap)
                yield case(sinks=sinks, tail=tail, logit_softcap=logit_softcap)  # both lists NULL
    for largest in (100.0, 1e4):
        for kind in TYPES:
            yield case(n_always=8, n_selected=120, largest=largest, type_k=kind, type_v=kind, sinks=True, tail=True)
        yield case(n_selected=120, largest=largest, logit_softcap=50.0)

    rng = np.random.default_rng(SEED)
    for i in range(40):
        n_head, n_head_kv = list(GROUPS.values())[rng.integers(len(GROUPS))]
        yield case(
            n_head=n_head, n_head_kv=n_head_kv, n_embd_k=int(rng.choice([64, 96, 128])), n_embd_v=int(rng.choice([64, 128])),
            type_k=str(rng.choice(TYPES)), type_v=str(rng.choice(TYPES)), n_always=int(rng.integers(0, 300)),
            n_selected=int(rng.integers(0, 300)), n_tokens=int(rng.integers(1, 4)), n_stream=int(rng.integers(1, 3)),
            always_per_token=bool(rng.integers(2)), selected_per_token=bool(rng.integers(2)), tail=bool(rng.integers(2)),
            sinks=bool(rng.integers(2)), logit_softcap=float(rng.choice([0, 20])), n_threads=int(rng.choice([1, 2, 3, 5])))


# ---- support_evidence ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvidenceCase(Case):
    seed: int = None
    n_head: int = 4
    n_head_kv: int = 2
    n_embd: int = 64
    type_k: str = "f16"
    n_list: int = 300
    n_queries: int = 16
    n_sink: int = 4
    n_recent: int = 32
    alpha: float = 1.0
    over: int = ref.VISIBLE
    logit_softcap: float = 0.0
    visible: str = "causal"  # the last queries of the text; "mixed": any, some unused; "none": all unused
    pads: bool = False
    largest: float = 8.0
    plain: bool = False
    n_threads: int = 2


class Evidence:
    """The inputs of one support_evidence."""

    def __init__(self, case):
        c, rng = case, case.new_rng()
        self.case, self.scale = c, 1 / np.sqrt(c.n_embd)
        n_cells = c.n_list + 13
        self.q = rng.normal(size=(c.n_queries, c.n_head, c.n_embd)).astype(np.float32) * np.float32(c.largest / 4)
        self.k_rows = encode(rng.normal(size=(c.n_head_kv, n_cells, c.n_embd)), c.type_k)
        self.cells = rng.permutation(n_cells)[:c.n_list].astype(np.int32)
        self.k_rows[:, np.setdiff1d(np.arange(n_cells), self.cells)] = POISON
        if c.pads:
            self.cells[rng.random(c.n_list) < 0.2] = -1
        self.j0, self.j1 = ref.candidates(c.n_list, c.n_sink, c.n_recent)
        self.n_visible = {
            "causal": np.maximum(c.n_list - np.arange(c.n_queries), min(c.n_list, 1)),
            "mixed": rng.integers(0, c.n_list + 1, c.n_queries) * (rng.random(c.n_queries) < 0.8),
            "none": np.zeros(c.n_queries, int),
        }[c.visible]

    @property
    def k(self):
        return ref.dequantise(self.case.type_k, self.k_rows)

    @property
    def plan(self):
        return np.array([self.j0, self.j1, *self.n_visible], np.int32)

    def run(self, n_threads=None):
        c = self.case
        with Graph() as g:
            out = g.support_evidence(
                g.tensor(self.q) if c.plain else g.strided(self.q),
                g.rows(self.k_rows, c.type_k) if c.plain else g.cache(self.k_rows[None], c.type_k),
                g.tensor(self.cells), g.tensor(self.plan), self.scale, c.logit_softcap, c.alpha, c.over)
            assert g.supported(out)
            return g.compute(out, n_threads or c.n_threads)[0, 0]

    def expected(self):
        return ref.evidence(self.q, self.k, self.cells, self.j0, self.j1, self.n_visible, self.scale,
                            self.case.logit_softcap, self.case.alpha, self.case.over)

    def check(self, n_threads=None):
        # relative: a logit and the log-sum-exp off by d each change p^alpha by a factor exp(2 alpha d)
        # absolute: an exp may give 0 below -87, where float32 ends
        queries = self.q.transpose(1, 0, 2)
        error = logit_error(queries, self.k, self.scale, self.case.logit_softcap)
        np.testing.assert_allclose(self.run(n_threads), self.expected(), rtol=2 * max(self.case.alpha, 1) * error,
                                   atol=np.exp(-87.0 * min(self.case.alpha, 1)))


def evidence_cases():
    def case(**settings):
        return EvidenceCase(seed=SEED, **settings)

    for n_list in LENGTHS:
        for over in (ref.VISIBLE, ref.CANDIDATES):
            yield case(n_list=n_list, over=over)
    for n_queries in (1, 2, 7, 8, 9, 63, 64):
        yield case(n_queries=n_queries, visible="mixed")
        yield case(n_queries=n_queries, visible="mixed", over=ref.CANDIDATES, alpha=0.5, n_list=70)
    for n_head, n_head_kv in GROUPS.values():
        yield case(n_head=n_head, n_head_kv=n_head_kv, n_queries=5, n_threads=3)
    for n_embd in (16, 64, 80, 96, 128, 256, 512):
        for type_k in TYPES if n_embd % 32 == 0 else TYPES[:3]:
            yield case(n_embd=n_embd, type_k=type_k, n_list=130, n_queries=3)
    for alpha in (0.25, 0.5, 1.0, 2.0):
        for over in (ref.VISIBLE, ref.CANDIDATES):
            for largest in (8.0, 1e4):
                yield case(alpha=alpha, over=over, largest=largest, n_queries=4)
    for over in (ref.VISIBLE, ref.CANDIDATES):
        yield case(over=over, pads=True, visible="mixed")
        yield case(over=over, pads=True, plain=True, n_list=65)
        yield case(over=over, visible="none")
        yield case(over=over, logit_softcap=20.0)
        yield case(over=over, n_sink=0, n_recent=0)
        yield case(over=over, n_sink=100, n_recent=200)  # no candidates
        yield case(over=over, n_sink=100, n_recent=199)  # one


# ---- sparse_attn_evidence -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SlowCase(EvidenceCase):
    type_v: str = "f16"
    n_embd_v: int = 64
    sinks: bool = False


class Slow(Evidence):
    """The inputs of one sparse_attn_evidence: those of an evidence, and a query that attends to all cells."""

    def __init__(self, case):
        super().__init__(case)
        rng = np.random.default_rng(case.seed)
        self.q_now = rng.normal(size=(1, case.n_head, 1, case.n_embd)).astype(np.float32) * np.float32(case.largest / 4)
        n_cells = self.k_rows.shape[1]
        self.v_rows = encode(rng.normal(size=(case.n_head_kv, n_cells, case.n_embd_v)), case.type_v)
        self.v_rows[:, np.setdiff1d(np.arange(n_cells), self.cells)] = POISON
        self.sinks = rng.normal(size=case.n_head).astype(np.float32) if case.sinks else None

    def run(self, n_threads=None):
        """attention [n_head, n_embd_v] and evidence [n_head_kv, n_list]"""
        c = self.case
        with Graph() as g:
            out = g.sparse_attn_evidence(
                g.permuted(self.q_now), g.cache(self.k_rows[None], c.type_k), g.cache(self.v_rows[None], c.type_v),
                g.tensor(self.cells), g.tensor(self.sinks), g.tensor(self.plan), self.scale, c.logit_softcap)
            assert g.supported(out)
            both = g.compute(out, n_threads or c.n_threads)[0, 0, 0]
        n = c.n_head * c.n_embd_v
        return both[:n].reshape(c.n_head, c.n_embd_v), both[n:].reshape(c.n_head_kv, c.n_list)

    def expected(self):
        return ref.evidence(self.q_now[:, :, 0], self.k, self.cells, self.j0, self.j1, [self.case.n_list], self.scale,
                            self.case.logit_softcap)

    def expected_attention(self):
        v = ref.dequantise(self.case.type_v, self.v_rows)
        return ref.sparse_attn(self.q_now, self.k[None], v[None], self.cells[None, None], None, self.scale,
                               self.case.logit_softcap, sinks=self.sinks)[0, 0]

    def check(self, n_threads=None):
        attention, evidence = self.run(n_threads)
        error = logit_error(self.q_now, self.k[None], self.scale, self.case.logit_softcap)
        np.testing.assert_allclose(evidence, self.expected(), rtol=2 * error, atol=np.exp(-87.0))
        largest_v = np.max(np.abs(self.v_rows_decoded()), initial=0.0)
        np.testing.assert_allclose(attention, self.expected_attention(), rtol=0, atol=2 * error * largest_v + 1e-12)

    def v_rows_decoded(self):
        v = ref.dequantise(self.case.type_v, self.v_rows)
        return v[~np.isnan(v)]


def slow_cases():
    def case(**settings):
        return SlowCase(seed=SEED, **settings)

    for n_list in LENGTHS:
        yield case(n_list=n_list)
    for n_head, n_head_kv in GROUPS.values():
        yield case(n_head=n_head, n_head_kv=n_head_kv, n_threads=3)
        yield case(n_head=n_head, n_head_kv=n_head_kv, n_list=1025, pads=True)
    for n_embd in (16, 64, 80, 96, 128, 256, 512):
        for type_k in TYPES if n_embd % 32 == 0 else TYPES[:3]:
            yield case(n_embd=n_embd, type_k=type_k, type_v=type_k if n_embd % 32 == 0 else "f16", n_embd_v=64, n_list=130)
    for largest in (1.0, 100.0):
        yield case(largest=largest)
    yield case(pads=True, n_list=65)
    yield case(pads=True, n_list=1025, n_head=9, n_head_kv=3, sinks=True)
    yield case(logit_softcap=20.0, sinks=True)
    yield case(n_sink=0, n_recent=0)
    yield case(n_sink=100, n_recent=200)
    yield case(n_sink=100, n_recent=199)


# ---- support_select -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SelectCase(Case):
    seed: int = None
    kind: int = TOPK
    n_head_kv: int = 2
    n_list: int = 300
    n_selected: int = 50
    n_sink: int = 4
    n_recent: int = 32
    pool_after: int = 0
    pool_before: int = 0
    levels: int = 0  # > 0: evidence takes so many values, so that there are ties
    flat: bool = False  # evidence nearly the same everywhere: the prior gets a small weight, or none
    like_prior: bool = False  # evidence is the prior, but for a thousandth: the prior's weight is a quotient of small differences
    pads: bool = False
    nms_radius: int = 16
    lambda_clip: float = 0.3
    a_soft: float = 1.0
    a_cross: float = 0.85
    alpha: float = 0.5
    n_embd: int = 64
    type_k: str = "f16"
    n_threads: int = 2


class Select:
    """The inputs of one support_select."""

    def __init__(self, case):
        c, rng = case, case.new_rng()
        self.case = c
        n_cells = c.n_list + 13
        self.evidence = rng.dirichlet(np.full(max(c.n_list, 1), 0.1), c.n_head_kv)[:, :c.n_list].astype(np.float32)
        if c.levels:
            self.evidence = rng.integers(0, c.levels, self.evidence.shape).astype(np.float32)
        if c.flat:
            self.evidence = rng.uniform(0.9, 1.1, self.evidence.shape).astype(np.float32)
        self.cells = rng.permutation(n_cells)[:c.n_list].astype(np.int32)
        norms = rng.uniform(0.3, 3.0, (c.n_head_kv, n_cells, 1))
        self.k_rows = encode(rng.normal(size=(c.n_head_kv, n_cells, c.n_embd)) * norms, c.type_k)
        self.k_rows[:, np.setdiff1d(np.arange(n_cells), self.cells)] = POISON
        if c.pads:
            is_pad = rng.random(c.n_list) < 0.2
            self.cells[is_pad] = -1
            self.evidence[:, is_pad] = 0
        self.j0, self.j1 = ref.candidates(c.n_list, c.n_sink, c.n_recent)
        if c.like_prior:
            self.evidence[:, self.j0:self.j1] = [beside(r, rng) ** c.alpha for r in self.priors()]

    def priors(self):
        cells, constants = self.cells[self.j0:self.j1], {name: self.paper[name] for name in ("gamma", "beta", "p", "eta")}
        return [ref.prior(norm, cells >= 0, **constants) for norm in np.linalg.norm(self.k[:, cells], axis=-1)]

    @property
    def k(self):
        return ref.dequantise(self.case.type_k, self.k_rows)

    @property
    def paper(self):
        c = self.case
        return dict(alpha=c.alpha, gamma=0.5, beta=0.568, p=1.8, eta=0.4, lambda_clip=c.lambda_clip, nms_radius=c.nms_radius,
                    a_soft=c.a_soft, a_cross=c.a_cross, temperature=2.0)

    def run(self, n_threads=None):
        c = self.case
        selector = self.paper if c.kind == PAPER else dict(pool_after=c.pool_after, pool_before=c.pool_before)
        with Graph() as g:
            out = g.support_select(g.tensor(self.evidence), g.tensor(self.cells), g.tensor(np.array([self.j0, self.j1, 7])),
                                   g.cache(self.k_rows[None], c.type_k) if c.kind == PAPER else None, c.n_selected,
                                   kind=c.kind, **selector)
            assert g.supported(out)
            return g.compute(out, n_threads or c.n_threads)[0, 0]

    def score(self):
        if self.case.kind == TOPK:
            return ref.pool(self.evidence, self.j0, self.j1, self.case.pool_after, self.case.pool_before)
        return ref.paper_score(self.evidence, self.cells, self.j0, self.j1, self.k, **self.paper)

    def check(self, n_threads=None):
        got, c = self.run(n_threads), self.case
        if c.kind == TOPK:  # nothing is computed, evidence is only compared: the sets are equal
            expected = ref.take_best(self.score(), self.cells[self.j0:self.j1], c.n_selected)
            np.testing.assert_array_equal(np.sort(got, axis=1), np.sort(expected, axis=1))
        else:
            for row, z in zip(got, self.score()):
                check_best(row, z, self.cells[self.j0:self.j1])


def beside(r, rng):
    """A distribution that is a thousandth off r, and in whose fusion with r each has the weight 1/2."""
    off = r * rng.uniform(-1e-3, 1e-3, len(r))
    off -= r * off.sum()
    slope = r * (r - r @ r)  # sums to 0, as `off` does
    return r + off - slope * (off @ off / 2 + r @ off) / (r @ slope)


def check_best(selected, z, candidates):
    """`selected` is a set of best candidates, up to what float32 makes of their scores.

    A score is the log of a sum: its relative error, a few dozen eps, becomes an absolute one, and scores near log(eps)
    are about 18, which the suppression and the competition scale by about 2.
    """
    tolerance = 64 * EPS32 * 18
    z, candidates = z[candidates >= 0], candidates[candidates >= 0]
    n = min(len(selected), len(candidates))
    cells = selected[selected >= 0]
    assert len(cells) == n and len(set(cells)) == n and set(cells) <= set(candidates)
    assert np.all(selected[selected < 0] == -1)
    if n:
        worst = np.sort(z)[-n]  # the score of the last one to be selected
        is_selected = np.isin(candidates, cells)
        assert np.all(z[is_selected] >= worst - tolerance)
        assert np.all(z[~is_selected] <= worst + tolerance)


def select_cases():
    def case(**settings):
        return SelectCase(seed=SEED, **settings)

    for kind in (TOPK, PAPER):
        for n_list in LENGTHS:
            for n_selected in (1, 64, 300) if n_list < 1000 else (64, 2048):
                yield case(kind=kind, n_list=n_list, n_selected=n_selected)
        for n_head_kv in (1, 2, 3, 4, 8):
            yield case(kind=kind, n_head_kv=n_head_kv, n_threads=3)
        yield case(kind=kind, n_sink=0, n_recent=0, n_selected=300)  # everything, exactly
        yield case(kind=kind, n_sink=100, n_recent=200)  # no candidates
        yield case(kind=kind, n_sink=100, n_recent=199)  # one
        yield case(kind=kind, pads=True)
        yield case(kind=kind, pads=True, n_selected=300)
    for pool_after, pool_before in ((16, 2), (1, 0), (0, 1), (500, 500)):
        yield case(pool_after=pool_after, pool_before=pool_before)
        yield case(pool_after=pool_after, pool_before=pool_before, pads=True, n_list=1025, n_selected=200)
        yield case(pool_after=pool_after, pool_before=pool_before, levels=3)
    for levels in (1, 2, 10):
        yield case(levels=levels, n_head_kv=4, n_list=2308, n_selected=700)
    for type_k in TYPES:
        yield case(kind=PAPER, type_k=type_k, n_head_kv=4, n_embd=96)
    for changes in (dict(nms_radius=0), dict(nms_radius=1), dict(nms_radius=400), dict(a_soft=0.0), dict(lambda_clip=0.0),
                    dict(lambda_clip=1.0), dict(lambda_clip=1.0, flat=True), dict(flat=True),
                    dict(lambda_clip=0.02, a_soft=0.5, a_cross=0.35), dict(a_cross=0.0), dict(alpha=1.0), dict(alpha=0.25)):
        yield case(kind=PAPER, n_head_kv=3, **changes)
    yield case(kind=PAPER, n_head_kv=1, n_embd=32, n_list=40000, n_selected=5000, lambda_clip=1.0, like_prior=True)


# ---- support_stability --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StabilityCase(Case):
    seed: int = None
    n_head_kv: int = 2
    n_list: int = 300
    n_selected: int = 50
    n_kept: int = 30  # how many of `selected` were in `previous`
    n_gone: int = 5  # cells of `previous` that are no candidates any more
    pads: bool = True
    n_threads: int = 2


class Stability:
    def __init__(self, case):
        c, rng = case, case.new_rng()
        self.case = c
        self.evidence = rng.dirichlet(np.ones(max(c.n_list, 1)), c.n_head_kv)[:, :c.n_list].astype(np.float32)
        self.cells = rng.permutation(c.n_list + 9)[:c.n_list].astype(np.int32)
        if c.pads:
            self.cells[::7] = -1
            self.evidence[:, ::7] = 0
        self.j0, self.j1 = ref.candidates(c.n_list, 4, 32)
        inside = self.cells[self.j0:self.j1][self.cells[self.j0:self.j1] >= 0]
        outside = np.setdiff1d(np.arange(c.n_list + 9), inside)
        self.selected, self.previous = np.full((2, c.n_head_kv, c.n_selected), -1, np.int32)
        for h in range(c.n_head_kv):
            order = rng.permutation(inside)
            now = order[:c.n_selected]
            new = order[c.n_selected:]
            before = np.concatenate([now[:c.n_kept], outside[:c.n_gone], new])[:c.n_selected]
            self.selected[h, :len(now)], self.previous[h, :len(before)] = now, before
            self.selected[h], self.previous[h] = rng.permutation(self.selected[h]), rng.permutation(self.previous[h])

    def run(self, n_threads=None):
        with Graph() as g:
            out = g.support_stability(g.tensor(self.evidence), g.tensor(self.cells),
                                      g.tensor(np.array([self.j0, self.j1])), g.tensor(self.selected),
                                      g.tensor(self.previous))
            assert g.supported(out)
            return g.compute(out, n_threads or self.case.n_threads)[0, 0]

    def check(self, n_threads=None):
        expected = ref.stability(self.evidence, self.cells, self.j0, self.j1, self.selected, self.previous)
        # sums of at most a few thousand positive float32: a random walk of 64 rounding errors
        np.testing.assert_allclose(self.run(n_threads), expected, rtol=64 * EPS32, atol=1e-30)


def stability_cases():
    def case(**settings):
        return StabilityCase(seed=SEED, **settings)

    for n_list in LENGTHS:
        yield case(n_list=n_list, n_kept=3)
    for n_head_kv in (1, 3, 8):
        yield case(n_head_kv=n_head_kv, n_threads=3)
    for n_kept in (0, 50):
        for pads in (False, True):
            yield case(n_kept=n_kept, n_gone=0, pads=pads)
    yield case(n_list=2308, n_selected=2048, n_kept=1000)


# ---- against the reference ----------------------------------------------------------------------------------------


class TestCore:
    """What is run again for every kernel path of this CPU."""

    @pytest.mark.parametrize("case", list(attn_cases()), ids=str)
    def test_sparse_attn(self, case):
        Attn(case).check()

    @pytest.mark.parametrize("case", list(evidence_cases()), ids=str)
    def test_evidence(self, case):
        Evidence(case).check()

    @pytest.mark.parametrize("case", list(slow_cases()), ids=str)
    def test_attention_with_evidence(self, case):
        Slow(case).check()

    @pytest.mark.parametrize("case", list(select_cases()), ids=str)
    def test_select(self, case):
        Select(case).check()

    @pytest.mark.parametrize("case", list(stability_cases()), ids=str)
    def test_stability(self, case):
        Stability(case).check()


@pytest.mark.parametrize("path", simd_paths())
def test_every_kernel_path_of_this_cpu(path):
    pass_on_path(path, f"{__file__}::TestCore")


# ---- equivalences -------------------------------------------------------------------------------------------------

WHOLE = AttnCase(seed=SEED, n_always=90, n_selected=210, n_tokens=3, n_head=9, n_head_kv=3, pads=False, type_k="f32",
                 type_v="f32", selected_per_token=True)


RNG = np.random.default_rng(SEED)  # for what is shuffled: no result may depend on it


def same(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("logit_softcap", [0.0, 30.0])
def test_a_support_of_everything_equals_flash_attention(sinks, logit_softcap):
    a = Attn(replace(WHOLE, sinks=sinks, logit_softcap=logit_softcap, n_always=300, n_selected=None))
    n_cells = 300
    a = a.but(k_rows=a.k_rows[:, :, np.sort(a.always[0, 0])], v_rows=a.v_rows[:, :, np.sort(a.always[0, 0])],
              always=RNG.permutation(n_cells).astype(np.int32)[None, None])
    with Graph() as g:
        dense = g.compute(g.flash_attn(g.permuted(a.q), g.cache(a.k_rows, "f32"), g.cache(a.v_rows, "f32"), None,
                                       g.tensor(a.sinks), a.scale, logit_softcap))
    same(a.run(), dense)


def test_shuffling_a_support_changes_nothing():
    a = Attn(WHOLE)
    shuffle = RNG.permuted
    same(a.but(always=shuffle(a.always, axis=-1), selected=shuffle(a.selected, axis=-1)).run(), a.run())


def test_splitting_a_support_between_always_and_selected_changes_nothing():
    a = Attn(replace(WHOLE, selected_per_token=False))
    shared = np.broadcast_to(a.always[:, :, None], (1, 1, 3, 90))
    same(a.but(always=None, selected=np.concatenate([a.selected, shared], axis=-1)).run(), a.run())


def test_one_list_for_all_tokens_equals_a_copy_for_each():
    a = Attn(replace(WHOLE, selected_per_token=False))
    each = a.but(always=np.repeat(a.always, 3, axis=1), selected=np.repeat(a.selected, 3, axis=1))
    np.testing.assert_array_equal(each.run(), a.run())


def test_three_tokens_equal_three_times_one_token():
    a = Attn(WHOLE)
    one_by_one = [a.but(q=a.q[:, :, t:t + 1], selected=a.selected[:, t:t + 1]).run() for t in range(3)]
    same(np.concatenate(one_by_one, axis=1), a.run())


@pytest.mark.parametrize("logit_softcap", [0.0, 20.0])
def test_the_tail_of_the_other_half_equals_the_whole(logit_softcap):
    a = Attn(replace(WHOLE, logit_softcap=logit_softcap))
    tail = np.zeros((1, 3, 9, 65), np.float32)
    for t in range(3):
        for h in range(9):
            cells = a.selected[0, t, h // 3, :105]
            tail[0, t, h] = ref.tail_of(a.q[0, h, t], a.k[0, h // 3, cells], a.v[0, h // 3, cells], a.scale, logit_softcap)
    same(a.but(selected=a.selected[..., 105:], tail=tail).run(), a.run())


def test_an_empty_tail_changes_nothing():
    a = Attn(WHOLE)
    tail = np.zeros((1, 3, 9, 65), np.float32)
    tail[..., -1] = -np.inf
    same(a.but(tail=tail).run(), a.run())
    nothing = a.but(always=None, selected=None, tail=tail)
    np.testing.assert_array_equal(nothing.run(), 0)


def test_a_tail_of_very_small_weight_survives_an_empty_support():
    a = Attn(replace(WHOLE, tail=True))
    a.tail[..., -1] -= 500
    same(a.but(always=None, selected=np.full((1, 1, 3, 9), -1, np.int32)).run(), a.tail[..., :-1])


@pytest.mark.parametrize("tail", [False, True])
def test_a_support_of_pads_alone_is_empty(tail):
    a = Attn(replace(WHOLE, tail=tail))
    pads = a.but(always=np.full_like(a.always, -1), selected=np.full_like(a.selected, -1), tail=a.tail)
    same(pads.run(), a.tail[..., :-1] if tail else np.zeros((1, 3, 9, 64)))


def test_pads_change_nothing():
    a = Attn(WHOLE)
    where = RNG.integers(0, 210, 60)
    padded = a.but(selected=np.insert(a.selected, where, -1, axis=-1), always=np.insert(a.always, where % 90, 337, axis=-1))
    same(padded.run(), a.run())


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_strides_change_nothing(kind):
    a = Attn(replace(WHOLE, type_k=kind, type_v=kind))
    contiguous = a.but(case=replace(a.case, plain=True))
    np.testing.assert_array_equal(contiguous.run(), a.run())


THREADS = [
    (Attn, replace(WHOLE, tail=True, n_always=260, n_selected=2048, type_k="f16", type_v="f16")),
    (Attn, replace(WHOLE, n_tokens=1, n_head=8, n_head_kv=1, n_always=260, n_selected=2048, type_k="q8_0", type_v="q4_0")),
    (Evidence, EvidenceCase(seed=SEED, n_list=2308, n_queries=16, n_head=9, n_head_kv=3)),
    (Evidence, EvidenceCase(seed=SEED, n_list=2308, n_queries=1, n_head=8, n_head_kv=1, alpha=0.5, over=ref.CANDIDATES)),
    (Select, SelectCase(seed=SEED, n_list=2308, n_selected=300, pool_after=16, pool_before=2, n_head_kv=3)),
    (Select, SelectCase(seed=SEED, kind=PAPER, n_list=2308, n_selected=300, n_head_kv=8)),
    (Stability, StabilityCase(seed=SEED, n_list=2308, n_selected=300, n_head_kv=3)),
]


@pytest.mark.parametrize("inputs, case", THREADS, ids=lambda x: getattr(x, "__name__", None) or str(x))
def test_thread_count_changes_nothing(inputs, case):
    inputs = inputs(case)
    one = inputs.run(n_threads=1)
    for n_threads in (1, 2, 3, 5):
        np.testing.assert_array_equal(inputs.run(n_threads), one)


def test_thread_count_changes_neither_attention_nor_evidence():
    s = Slow(SlowCase(seed=SEED, n_list=2308, n_head=9, n_head_kv=3))
    one = s.run(n_threads=1)
    for n_threads in (1, 2, 3, 5):
        for a, b in zip(s.run(n_threads), one):
            np.testing.assert_array_equal(a, b)


def test_evidence_on_the_way_equals_evidence_alone():
    s = Slow(SlowCase(seed=SEED, n_list=1025, n_head=9, n_head_kv=3))
    alone = Evidence(EvidenceCase(seed=SEED, n_list=1025, n_queries=1, n_head=9, n_head_kv=3))
    alone.q, alone.k_rows, alone.cells = s.q_now[:, :, 0], s.k_rows, s.cells
    np.testing.assert_allclose(s.run()[1], alone.run(), rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("over, n_sink, n_recent", [(ref.VISIBLE, 0, 0), (ref.CANDIDATES, 4, 32)])
def test_evidence_over_what_the_softmax_saw_sums_to_one(over, n_sink, n_recent):
    e = Evidence(EvidenceCase(seed=SEED, over=over, n_sink=n_sink, n_recent=n_recent, n_list=1025))
    same(e.run().sum(axis=1), 1.0)


def test_visible_evidence_is_the_mass_on_the_candidates():
    e = Evidence(EvidenceCase(seed=SEED, n_queries=1, n_head=2))
    whole = Evidence(EvidenceCase(seed=SEED, n_queries=1, n_head=2))
    whole.j0, whole.j1 = 0, 300
    same(e.run()[:, e.j0:e.j1], whole.run()[:, e.j0:e.j1], 1e-7)
    assert not e.run()[:, :e.j0].any() and not e.run()[:, e.j1:].any()


def test_the_order_of_the_queries_changes_nothing():
    e, other = (Evidence(EvidenceCase(seed=SEED, visible="mixed")) for _ in range(2))
    other.q, other.n_visible = e.q[::-1].copy(), e.n_visible[::-1].copy()
    same(other.run(), e.run(), 1e-7)


def test_selecting_every_candidate_selects_them_all():
    for kind in (TOPK, PAPER):
        s = Select(SelectCase(seed=SEED, kind=kind, n_selected=300))
        for row in s.run():
            assert set(row) - {-1} == set(s.cells[s.j0:s.j1])


def test_the_earlier_of_two_equals_wins_in_the_paper_too():
    s = Select(SelectCase(seed=SEED, kind=PAPER, n_head_kv=1, levels=2, lambda_clip=0.0, a_soft=0.0, n_selected=200))
    expected = ref.take_best(s.score(), s.cells[s.j0:s.j1], 200)
    assert set(s.run()[0]) == set(expected[0])


def test_an_unchanged_selection_is_perfectly_stable():
    s = Stability(StabilityCase(seed=SEED))
    s.previous = RNG.permuted(s.selected, axis=1)
    total, now, before, jaccard = s.run().T
    same(now, before, 1e-6)
    assert np.all(jaccard == 1) and np.all(now < total)


def test_evidence_select_stability_fit_together():
    e = Evidence(EvidenceCase(seed=SEED))
    s = Select(SelectCase(seed=SEED, n_selected=264))
    s.cells, s.evidence, s.k_rows = e.cells, e.run(), e.k_rows
    t = Stability(StabilityCase(seed=SEED))
    t.cells, t.evidence, t.selected = e.cells, s.evidence, s.run()
    t.previous = np.full_like(t.selected, -1)
    total, now, before, jaccard = t.run().T
    same(now, total, 1e-6)
    assert not before.any() and not jaccard.any()


# ---- what the CPU does not compute --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, n_embd", [("q4_1", 64), ("f16", 24), ("f16", 528)])
def test_the_backend_says_no_early(kind, n_embd):
    with Graph() as g:
        q, k, v = g.new("f32", n_embd, 1, 2), g.new(kind, n_embd, 64, 2), g.new("f16", 64, 64, 2)
        assert not g.supported(g.sparse_attn(q, k, v, g.new("i32", 8)))
        assert not g.supported(g.support_evidence(g.new("f32", n_embd, 2, 1), k, g.new("i32", 8), g.new("i32", 3)))

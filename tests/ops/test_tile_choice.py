"""Prefill that passes over tiles of cells: which ones, and that nothing else changes.

The queries of these cases lie in 16 dimensions, so that what is estimated is what is so, and it can be told which tiles are kept.
"""

from dataclasses import dataclass

import numpy as np
import pytest
from support import reference as ref
from support.ggml_ops import encode
from support.op_cases import TYPES, ManyTokens, ManyTokensOp, pass_on_path, simd_paths

TILE, TOKENS, LOCAL, RANK = 64, 60, 128, 16
RUN = 23  # tokens that look for the same


@dataclass(frozen=True)
class ChoiceCase(ManyTokens):
    n_tokens: int = 130
    n_list: int = 1700
    n_hot: int = 3      # cells that a query of a head looks for, beside what is near
    least: float = 0.0  # 0: some hundredth, so that it is clear of every tile which it tells


class Choice(ManyTokensOp):
    """Each head of a run of tokens looks for some cells, whose logits are far above all others."""

    def __init__(self, case):
        c, rng = case, case.new_rng()
        n_cells = c.n_list + 37
        draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
        self.case, self.scale, group = c, 1.0, c.n_head // c.n_head_kv
        axes = np.linalg.qr(draw(c.n_embd_k, c.n_embd_k))[0][:RANK]
        k = draw(c.n_stream, c.n_head_kv, n_cells, c.n_embd_k) * np.float32(0.1)
        self.q = draw(c.n_stream, c.n_head, c.n_tokens, RANK) @ axes
        self.q = self.q[:, :, np.arange(c.n_tokens) // RUN * RUN] / np.linalg.norm(self.q[:, :, :1], axis=-1, keepdims=True)
        self.cells = np.stack([rng.permutation(n_cells)[:c.n_list] for _ in range(c.n_stream)]).astype(np.int32)
        for s, h, t in np.ndindex(c.n_stream, c.n_head, c.n_tokens):
            if t % RUN == 0:
                for place in rng.integers(0, max(1, c.n_list - c.n_tokens), c.n_hot):
                    k[s, h // group, self.cells[s, place]] = 15 * self.q[s, h, t] / np.square(self.q[s, h, t]).sum()
        if c.pads:
            self.cells[rng.random(self.cells.shape) < 0.2] = -1
        self.k = encode(k, c.type_k)
        self.v = encode(draw(c.n_stream, c.n_head_kv, n_cells, c.n_embd_v), c.type_v)
        self.visible = np.tile(c.n_list - np.arange(c.n_tokens)[::-1], (c.n_stream, 1)).astype(np.int32)
        self.sinks = draw(c.n_head) if c.sinks else None
        self.least = c.least or self.clear_of(np.concatenate([most for *_, most in self.runs()]))

    @staticmethod
    def clear_of(shares):
        """The middle of the widest gap among shares of about a hundredth."""
        near = np.sort(np.log(np.concatenate([[0.003, 0.05], shares[(shares > 0.003) & (shares < 0.05)]])))
        i = np.diff(near).argmax()
        assert near[i + 1] - near[i] > 0.2, "more than the estimate may be off"
        return float(np.exp((near[i] + near[i + 1]) / 2))

    def runs(self):
        """(stream, head, tokens, first tile that all have, logits, largest share of each tile before it) of tokens that choose together."""
        c = self.case
        for s, h, t0 in np.ndindex(c.n_stream, c.n_head, -(-c.n_tokens // TOKENS)):
            tokens = np.arange(t0 * TOKENS, min((t0 + 1) * TOKENS, c.n_tokens))
            share, logits = self.shares(s, h, tokens)
            local = max(1, (self.visible[s, tokens].min() - LOCAL) // TILE)
            yield s, h, tokens, local, logits, share[:, 1:local].max(axis=0)

    def run(self, n_threads=2, least=None):
        return self.compute(n_threads, blocks=True, least=self.least if least is None else least)

    def shares(self, s, h, tokens):
        """Of the attention of each token, [n_tokens, n_tiles]; and the logits [n_tokens, n_list]."""
        c, cells = self.case, self.cells[s]
        rows = ref.dequantise(c.type_k, self.k)[s, h // (c.n_head // c.n_head_kv)]
        logits = self.scale * self.q[s, h, tokens].astype(np.float64) @ np.nan_to_num(rows[cells]).T.astype(np.float64)
        logits[:, cells < 0] = -np.inf
        logits[np.arange(c.n_list) >= self.visible[s, tokens][:, None]] = -np.inf
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        weights = np.pad(weights, ((0, 0), (0, -c.n_list % TILE))).reshape(len(logits), -1, TILE).sum(axis=2)
        return weights / weights.sum(axis=1, keepdims=True), logits

    def expected(self):
        """What the contract says, and how many of the tiles it keeps."""
        c = self.case
        out, kept = np.zeros((c.n_stream, c.n_tokens, c.n_head, c.n_embd_v)), []
        values = ref.dequantise(c.type_v, self.v)
        for s, h, tokens, local, logits, most in self.runs():
            wanted = np.concatenate([[True], most >= self.least, np.ones(-(-c.n_list // TILE) - local, bool)])
            kept.append(wanted.mean())
            logits[:, ~np.repeat(wanted, TILE)[:c.n_list]] = -np.inf
            sink = -np.inf if self.sinks is None else self.sinks[h]
            top = np.maximum(logits.max(axis=1), sink)[:, None]
            weights = np.exp(logits - top)
            v = values[s, h // (c.n_head // c.n_head_kv)][self.cells[s]]
            out[s, tokens, h] = weights @ v / (weights.sum(axis=1, keepdims=True) + np.exp(sink - top))
        return out, np.mean(kept)


def cases():
    yield ChoiceCase()
    for n_tokens in (1, 8, 59, 60, 61, 120, 121):
        yield ChoiceCase(n_tokens=n_tokens)
    for n_list in (140, 255, 256, 300, 1024, 1025):
        yield ChoiceCase(n_list=n_list)
    for kind in TYPES:
        yield ChoiceCase(type_k=kind, type_v=kind, n_embd_k=96, n_embd_v=96, n_stream=2)
    for size in (16, 80, 128, 256):
        yield ChoiceCase(n_embd_k=size, n_embd_v=size)
    for n_head, n_head_kv in ((2, 2), (9, 3), (14, 2), (16, 1)):
        yield ChoiceCase(n_head=n_head, n_head_kv=n_head_kv, n_tokens=70)
    yield ChoiceCase(pads=True, sinks=True)
    yield ChoiceCase(n_hot=0)
    yield ChoiceCase(n_hot=20)


class TestCore:
    @pytest.mark.parametrize("case", list(cases()), ids=str)
    def test_what_a_query_looks_for_is_kept_and_nothing_else(self, case):
        choice = Choice(case)
        expected, kept = choice.expected()
        np.testing.assert_allclose(choice.run(), expected, rtol=0, atol=choice.tolerance())
        if case == ChoiceCase():
            assert kept < 0.6

    def test_with_a_soft_cap_nothing_is_passed_over(self):
        choice = Choice(ChoiceCase(logit_softcap=10.0))
        np.testing.assert_allclose(choice.run(), choice.run(least=0.0), rtol=0, atol=choice.tolerance())

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    @pytest.mark.parametrize("place", [2, 70, 700, 1650])
    def test_a_bad_cell_touches_those_that_see_it(self, bad, place):
        choice = Choice(ChoiceCase(type_k="f32", type_v="f32"))
        before = choice.run()
        choice.k[:, :, choice.cells[0, place]] = choice.v[:, :, choice.cells[0, place]] = encode(np.full((1, 2, 64), bad, np.float32), "f32")
        after = choice.run()
        sees = choice.visible[0] > place
        assert not np.isfinite(after[:, sees]).any()
        assert np.isfinite(after[:, ~sees]).all() and np.isfinite(before).all()

    def test_a_bad_query_touches_only_its_own_head(self):
        choice = Choice(ChoiceCase())
        choice.q[0, 4, 11] = np.nan
        after = choice.run()
        assert np.isnan(after[0, 11, 4]).all()
        assert np.isfinite(np.delete(after[0].reshape(-1, 64), 11 * 6 + 4, axis=0)).all()


@pytest.mark.parametrize("path", simd_paths())
def test_every_kernel_path_of_this_cpu(path):
    pass_on_path(path, f"{__file__}::TestCore")


def test_the_number_of_threads_changes_nothing():
    choice = Choice(ChoiceCase(n_stream=2))
    assert all(np.array_equal(choice.run(n), choice.run(1)) for n in (2, 3, 5))


def test_where_every_tile_is_wanted_the_result_is_that_of_all():
    choice = Choice(ChoiceCase(least=1e-9, n_hot=0))
    np.testing.assert_allclose(choice.run(), choice.run(least=0.0), rtol=0, atol=choice.tolerance())


def test_keys_of_all_dimensions_are_told_apart_well_enough():
    """What is lost is what was passed over: with a hundredth of the attention at least in each of 20 tiles, a fifth."""
    choice = Choice(ChoiceCase(n_list=3000))
    rng = np.random.default_rng(1)
    choice.q = rng.standard_normal(choice.q.shape, dtype=np.float32)
    found, exact = choice.run(), choice.run(least=0.0)
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.2

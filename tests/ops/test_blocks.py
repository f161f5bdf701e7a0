"""Attention of many tokens at once, as in prefill: tiles of K and V that are packed once for all of them.

A result is not that of the token alone bit for bit; it keeps the same contract (tolerance() of test_ops).
"""

from dataclasses import dataclass

import numpy as np
import pytest
from support import reference as ref
from support.ggml_ops import POISON, encode
from support.op_cases import TYPES, ManyTokens, ManyTokensOp, pass_on_path, simd_paths

TILE = 128  # cells that are packed at once


@dataclass(frozen=True)
class BlockCase(ManyTokens):
    largest: float = 8.0  # roughly: size of the largest logits
    visible: tuple = None  # of each token; None: the last n_tokens cells of the list are its own


class Blocks(ManyTokensOp):
    """The inputs of one operation. Cells that nobody sees are NaN."""

    def __init__(self, case):
        c, rng = case, case.new_rng()
        n_cells = c.n_list + 37
        draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
        self.case, self.scale = c, c.n_embd_k**-0.5
        self.q = draw(c.n_stream, c.n_head, c.n_tokens, c.n_embd_k) * np.float32(c.largest / 4)
        self.k = encode(draw(c.n_stream, c.n_head_kv, n_cells, c.n_embd_k), c.type_k)
        self.v = encode(draw(c.n_stream, c.n_head_kv, n_cells, c.n_embd_v), c.type_v)
        self.cells = np.stack([rng.permutation(n_cells)[:c.n_list] for _ in range(c.n_stream)]).astype(np.int32)
        if c.pads:
            self.cells[rng.random(self.cells.shape) < 0.3] = -1
        causal = np.maximum(c.n_list - np.arange(c.n_tokens)[::-1], 0)
        self.visible = np.tile(causal if c.visible is None else c.visible, (c.n_stream, 1)).astype(np.int32)
        self.sinks = draw(c.n_head) + np.float32(c.largest) if c.sinks else None
        for s in range(c.n_stream):
            unseen = np.setdiff1d(np.arange(n_cells), self.cells[s, :self.visible.max()])
            self.k[s, :, unseen] = self.v[s, :, unseen] = POISON

    def run(self, n_threads=2, blocks=True):
        return self.compute(n_threads, blocks=blocks)

    def expected(self):
        lists = np.stack([[np.where(np.arange(self.case.n_list) < n, self.cells[s], -1) for n in self.visible[s]]
                          for s in range(self.case.n_stream)])
        return ref.sparse_attn(self.q, *self.rows(), lists, None, self.scale, self.case.logit_softcap, sinks=self.sinks)

    def check(self):
        np.testing.assert_allclose(self.run(), self.expected(), rtol=0, atol=self.tolerance())


def cases():
    for n_tokens in (1, 2, 7, 8, 9, 63, 64, 65, 127):
        yield BlockCase(n_tokens=n_tokens)
    for n_list in (0, 1, 8, 19, TILE - 1, TILE, TILE + 1, 5 * TILE + 3):
        yield BlockCase(n_list=n_list)
        yield BlockCase(n_list=n_list, pads=True, n_stream=2)
    for kind in TYPES:
        yield BlockCase(type_k=kind, type_v=kind, n_embd_k=96, n_embd_v=96, sinks=True)
        yield BlockCase(type_k=kind, type_v="f16", logit_softcap=15.0)
        yield BlockCase(type_v=kind, n_embd_k=192, n_embd_v=128, n_tokens=5)
    for size in (16, 80, 128, 256, 512):
        yield BlockCase(n_embd_k=size, n_embd_v=size)
    for n_head, n_head_kv in ((2, 2), (4, 2), (9, 3), (14, 2), (16, 1)):
        yield BlockCase(n_head=n_head, n_head_kv=n_head_kv, n_tokens=70)
    yield BlockCase(n_tokens=6, visible=(300, 0, 128, 1, 299, 129))
    yield BlockCase(n_tokens=3, visible=(0, 0, 0))
    yield BlockCase(n_tokens=3, visible=(0, 0, 0), sinks=True)
    yield BlockCase(largest=1e4, sinks=True)
    yield BlockCase(largest=0.0)


class TestCore:
    @pytest.mark.parametrize("case", list(cases()), ids=str)
    def test_against_the_reference(self, case):
        Blocks(case).check()

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_a_bad_cell_touches_only_those_that_see_it(self, bad):
        case = Blocks(BlockCase(n_tokens=40, n_list=300, type_k="f32", type_v="f32"))
        before = case.run()
        cell = case.cells[0, 280]
        case.k[:, :, cell] = case.v[:, :, cell] = encode(np.full((1, 2, 64), bad, np.float32), "f32")
        after = case.run()
        sees = case.visible[0] > 280
        assert np.array_equal(before[:, ~sees], after[:, ~sees])
        assert not np.isfinite(after[:, sees]).any()

    def test_a_bad_query_touches_only_its_own_head(self):
        case = Blocks(BlockCase(n_tokens=20))
        before = case.run()
        case.q[0, 4, 11] = np.nan
        after = case.run()
        assert np.isnan(after[0, 11, 4]).all()
        others = np.ones(before.shape, bool)
        others[0, 11, 4] = False
        assert np.array_equal(before[others], after[others])


@pytest.mark.parametrize("path", simd_paths())
def test_every_kernel_path_of_this_cpu(path):
    pass_on_path(path, f"{__file__}::TestCore")


def test_the_number_of_threads_changes_nothing():
    case = Blocks(BlockCase(n_tokens=200, n_list=650))
    assert all(np.array_equal(case.run(n), case.run(1)) for n in (2, 3, 5))


def test_one_by_one_gives_the_same_to_rounding():
    case = Blocks(BlockCase(n_tokens=33, n_list=400))
    np.testing.assert_allclose(case.run(), case.run(blocks=False), rtol=0, atol=case.tolerance())

"""Tokens that see different lengths of one list: for each, bit for bit, what the operation gives for it alone."""

from dataclasses import dataclass

import numpy as np
import pytest
from support.ggml_ops import Graph, encode
from support.tiny_model import SEED

N_CELLS = 2400
MANY = 2300  # from some blocks of a list on tokens go together


@dataclass
class Batch:
    """Queries [n_tokens], K and V, one list of all cells, and how much of it each token sees."""

    q: np.ndarray        # [n_stream, n_head, n_tokens, n_embd]
    k: np.ndarray        # encoded rows [n_stream, n_head_kv, N_CELLS, bytes]
    v: np.ndarray
    always: np.ndarray   # [n_stream, 1, 1, n_list]
    visible: np.ndarray  # [n_stream, n_tokens]
    kind: str
    extra: dict          # tail [n_stream, n_tokens, n_head, n_embd + 1] or None, sinks, logit_softcap

    def run(self, tokens=slice(None), n_list=None, visible=True, n_threads=2):
        """[n_stream, n_tokens, n_head, n_embd] of some tokens, the list cut, all of it visible or as much as it should be."""
        tail = self.extra["tail"]
        with Graph() as g:
            seen = g.tensor(np.ascontiguousarray(self.visible[:, tokens])) if visible else None
            out = g.sparse_attn(g.permuted(self.q[:, :, tokens]), g.cache(self.k, self.kind), g.cache(self.v, self.kind),
                                g.tensor(self.always[..., :n_list]), tail=g.tensor(tail if tail is None else tail[:, tokens]),
                                sinks=g.tensor(self.extra["sinks"]), scale=self.q.shape[-1]**-0.5,
                                logit_softcap=self.extra["logit_softcap"], visible=seen)
            return g.compute(out, n_threads)


def make(n_tokens, n_list, n_head=6, n_head_kv=2, n_embd=32, kind="f16", pads=False, n_stream=1, tail=False, sinks=False,
         logit_softcap=0.0, visible=None):
    rng = np.random.default_rng(SEED)
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    always = np.stack([rng.permutation(N_CELLS)[:n_list] for _ in range(n_stream)]).astype(np.int32)[:, None, None]
    always = np.where(rng.random(always.shape) < 0.3, -1, always).astype(np.int32) if pads else always
    causal = n_list - np.arange(n_tokens)[::-1] if visible is None else np.asarray(visible)
    k, v = (encode(draw(n_stream, n_head_kv, N_CELLS, n_embd), kind) for _ in "kv")
    extra = {"tail": draw(n_stream, n_tokens, n_head, n_embd + 1) if tail else None,
             "sinks": draw(n_head) if sinks else None, "logit_softcap": logit_softcap}
    return Batch(2 * draw(n_stream, n_head, n_tokens, n_embd), k, v, always,
                 np.repeat(causal[None], n_stream, 0).astype(np.int32), kind, extra)


def check(batch):
    together = batch.run()
    for t in range(together.shape[1]):
        alone = [batch.run(slice(t, t + 1), int(np.clip(n, 0, batch.always.shape[-1])), visible=False)[s]
                 for s, n in enumerate(batch.visible[:, t])]
        assert np.array_equal(together[:, t:t + 1], np.stack(alone))


@pytest.mark.parametrize("n_tokens, n_list", [(1, 300), (2, 64), (2, 65), (7, 63), (7, 256), (7, 257), (17, 513), (33, 600),
                                              (64, 700), (1, MANY), (3, 2111), (7, MANY + 5), (33, 2049)])
def test_a_batch_equals_its_tokens_one_by_one(n_tokens, n_list):
    check(make(n_tokens, n_list))


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("n_head, n_head_kv", [(4, 4), (6, 3), (9, 3), (8, 1), (5, 1)])
@pytest.mark.parametrize("n_list", [330, MANY])
def test_of_every_kind_and_group(kind, n_head, n_head_kv, n_list):
    check(make(5, n_list, n_head, n_head_kv, kind=kind))


@pytest.mark.parametrize("options", [{"pads": True}, {"n_stream": 2}, {"tail": True}, {"sinks": True},
                                     {"logit_softcap": 20.0}, {"pads": True, "tail": True, "sinks": True, "n_embd": 128}])
@pytest.mark.parametrize("n_list", [290, MANY])
def test_with_everything_that_may_come_along(options, n_list):
    check(make(6, n_list, **options))


@pytest.mark.parametrize("n_list", [300, MANY])
def test_any_lengths_in_any_order_and_none_at_all(n_list):
    check(make(6, n_list, visible=[n_list, 0, 128, 1, 5000, 64], tail=True))
    check(make(5, n_list, visible=[0, 0, n_list - 7, n_list, n_list], pads=True))


@pytest.mark.parametrize("n_list", [300, MANY])
def test_a_token_sees_nothing_beyond(n_list):
    batch = make(4, n_list)
    last = batch.always[0, 0, 0, -1]
    before = batch.run()
    batch.v[:, :, last] = encode(np.full((1, 2, 32), 1e3, np.float32), batch.kind)
    after = batch.run()
    assert np.array_equal(before[:, :3], after[:, :3]) and not np.array_equal(before[:, 3], after[:, 3])


@pytest.mark.parametrize("n_list", [650, MANY])
def test_the_number_of_threads_changes_nothing(n_list):
    batch = make(9, n_list)
    assert all(np.array_equal(batch.run(n_threads=n), batch.run(n_threads=1)) for n in (2, 3, 5))


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize("n_list", [700, MANY])
def test_pads_beyond_what_a_token_sees_are_as_good_as_a_cut(kind, n_list):
    """So much every backend promises: GPUs split a list by its length."""
    batch = make(6, n_list, n_embd=64, kind=kind, pads=True, tail=True)
    together = batch.run()
    for t, n in enumerate(batch.visible[0]):
        whole = batch.always.copy()
        batch.always[..., n:] = -1
        alone = batch.run(slice(t, t + 1), visible=False)
        batch.always = whole
        assert np.array_equal(together[:, t:t + 1], alone)

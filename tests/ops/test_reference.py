"""The reference against brute force and against cases small enough to compute by hand."""

import numpy as np
import pytest
from support import reference as ref

SEED = 20260312


@pytest.fixture
def rng():
    return np.random.default_rng(SEED)


def one_head(k, v):
    """k [n_cells, n_embd_k], v [n_cells, n_embd_v] as a cache of one stream and one KV head"""
    return np.asarray(k, float)[None, None], np.asarray(v, float)[None, None]


# ---- storage types ------------------------------------------------------------------------------------------------


def test_bf16_is_the_upper_half_of_a_float32():
    row = np.array([0x3F80, 0xC000], np.uint16).view(np.uint8)
    assert ref.dequantise("bf16", row).tolist() == [1.0, -2.0]


def test_q8_0_is_a_scale_and_32_bytes():
    row = np.concatenate([np.array([0.5], np.float16).view(np.uint8), np.arange(-16, 16, dtype=np.int8).view(np.uint8)])
    assert ref.dequantise("q8_0", row).tolist() == [0.5 * i for i in range(-16, 16)]


def test_q4_0_keeps_the_first_16_values_in_the_low_halves():
    low, high = np.arange(16), np.arange(16)[::-1]
    row = np.concatenate([np.array([2.0], np.float16).view(np.uint8), (low | high << 4).astype(np.uint8)])
    assert ref.dequantise("q4_0", row).tolist() == [2.0 * (i - 8) for i in [*low, *high]]


# ---- attention ----------------------------------------------------------------------------------------------------

LOG3 = np.log(3.0)
K2, V2 = np.array([[0.0], [LOG3]]), np.array([[4.0, 0.0], [0.0, 4.0]])  # logits 0 and ln 3: weights 1/4 and 3/4
ONE = np.array([1.0])


def test_attend_by_hand():
    np.testing.assert_allclose(ref.attend(ONE, K2, V2, 1.0), [1.0, 3.0])


def test_scale_multiplies_the_logits():
    np.testing.assert_allclose(ref.attend(ONE * 2, K2, V2, 0.5), [1.0, 3.0])


def test_softcap_bounds_the_logits():
    x = ref.logits(ONE, np.array([[1000.0], [-1000.0], [0.01]]), 1.0, logit_softcap=30.0)
    np.testing.assert_allclose(x, [30.0, -30.0, 0.01], rtol=1e-6)


def test_a_sink_takes_weight_and_gives_nothing():
    np.testing.assert_allclose(ref.attend(ONE, K2, V2, 1.0, sink=np.log(4.0)), [0.5, 1.5])  # 1 + 3 against 4


def test_a_tail_counts_as_the_cells_it_stands_for():
    tail = np.array([8.0, 8.0, np.log(4.0)])
    np.testing.assert_allclose(ref.attend(ONE, K2, V2, 1.0, tail=tail), [4.5, 5.5])


def test_an_empty_support_gives_zeros_or_the_tail():
    none = K2[:0], V2[:0]
    np.testing.assert_allclose(ref.attend(ONE, *none, 1.0), [0, 0])
    np.testing.assert_allclose(ref.attend(ONE, *none, 1.0, sink=1.0), [0, 0])
    np.testing.assert_allclose(ref.attend(ONE, *none, 1.0, tail=np.array([5.0, 6.0, -700.0])), [5, 6])
    np.testing.assert_allclose(ref.attend(ONE, *none, 1.0, tail=ref.tail_of(ONE, *none, 1.0)), [0, 0])


def test_very_large_logits_do_not_overflow():
    np.testing.assert_allclose(ref.attend(ONE * 1e6, K2, V2, 1.0, sink=1e5), [0.0, 4.0])


def test_the_tail_of_one_half_and_the_support_of_the_other_are_the_whole(rng):
    q, k, v = rng.normal(size=8), rng.normal(size=(20, 8)), rng.normal(size=(20, 4))
    tail = ref.tail_of(q, k[:11], v[:11], 0.3, 5.0)
    np.testing.assert_allclose(ref.attend(q, k[11:], v[11:], 0.3, 5.0, tail, 0.7),
                               ref.attend(q, k, v, 0.3, 5.0, sink=0.7))


def test_sparse_attn_against_a_masked_softmax(rng):
    n_stream, n_head, n_head_kv, n_tokens, n_cells = 2, 6, 2, 3, 15
    q = rng.normal(size=(n_stream, n_head, n_tokens, 8))
    k, v = rng.normal(size=(n_stream, n_head_kv, n_cells, 8)), rng.normal(size=(n_stream, n_head_kv, n_cells, 4))
    always = np.array([[[0, 1, -1]] * n_tokens] * n_stream)
    selected = np.array([rng.permutation(np.arange(2, n_cells))[:5] for _ in range(n_stream * n_tokens * n_head_kv)])
    selected = selected.reshape(n_stream, n_tokens, n_head_kv, 5)
    got = ref.sparse_attn(q, k, v, always, selected, 0.5)

    k, v = np.repeat(k, 3, axis=1), np.repeat(v, 3, axis=1)  # head h reads KV head h // 3
    x = np.einsum("shtd,shcd->sthc", q, k) * 0.5
    listed = np.zeros((n_stream, n_tokens, n_head, n_cells), bool)
    listed[..., [0, 1]] = True
    np.put_along_axis(listed, np.repeat(selected, 3, axis=2), True, axis=-1)
    w = np.where(listed, np.exp(x), 0)
    np.testing.assert_allclose(got, np.einsum("sthc,shcd->sthd", w / w.sum(-1, keepdims=True), v))


def test_entries_outside_the_cache_are_pads(rng):
    k, v = one_head(rng.normal(size=(9, 4)), rng.normal(size=(9, 4)))
    q = rng.normal(size=(1, 1, 1, 4))
    plain = ref.sparse_attn(q, k, v, np.array([[[0, 8]]]), None, 1.0)
    padded = ref.sparse_attn(q, k, v, np.array([[[-1, 8, 9, 0, 1000, -7]]]), None, 1.0)
    np.testing.assert_allclose(padded, plain)


def test_dense_attn_is_a_support_of_everything_visible(rng):
    k, v = one_head(rng.normal(size=(9, 4)), rng.normal(size=(9, 4)))
    q = rng.normal(size=(1, 1, 2, 4))
    causal = np.arange(9) < np.array([[8], [9]])
    got = ref.dense_attn(q, k, v, 1.0, visible=causal)
    np.testing.assert_allclose(got[0, 0, 0], ref.attend(q[0, 0, 0], k[0, 0, :8], v[0, 0, :8], 1.0))
    np.testing.assert_allclose(got[0, 1, 0], ref.attend(q[0, 0, 1], k[0, 0], v[0, 0], 1.0))


# ---- support ------------------------------------------------------------------------------------------------------


def test_support_is_sink_recent_and_selected_each_once():
    cells = np.array([7, 3, 9, 1, 0, 5])
    assert sorted(ref.support(cells, n_sink=1, n_recent=2, selected=[9, -1, 0])) == [0, 5, 7, 9]


@pytest.mark.parametrize("n_list, plan", [(20, (4, 14)), (10, (4, 4)), (9, (4, 4)), (3, (3, 3)), (0, (0, 0))])
def test_candidates_lie_between_sink_and_recent(n_list, plan):
    assert ref.candidates(n_list, n_sink=4, n_recent=6) == plan


def test_no_order_is_promised():
    orders = {tuple(ref.support(np.arange(9), 2, 3, [5], seed=s)) for s in range(5)}
    assert len(orders) > 1 and len({frozenset(o) for o in orders}) == 1
    assert list(ref.scramble(np.arange(9), 1)) == list(ref.scramble(np.arange(9), 1))


# ---- evidence -----------------------------------------------------------------------------------------------------


def test_evidence_by_hand():
    # logits 0, ln 3, 0 for every query; the second query sees two cells, the third row is not used
    k, q = np.array([[[0.0], [LOG3], [0.0]]]), np.ones((3, 1, 1))
    got = ref.evidence(q, k, np.array([0, 1, 2]), 1, 3, [3, 2, 0], 1.0)
    np.testing.assert_allclose(got, [[0.0, (3 / 5 + 3 / 4) / 2, (1 / 5 + 0) / 2]])
    got = ref.evidence(q, k, np.array([0, 1, 2]), 1, 3, [3, 2, 0], 1.0, over=ref.CANDIDATES)
    np.testing.assert_allclose(got, [[0.0, (3 / 4 + 1) / 2, (1 / 4 + 0) / 2]])
    got = ref.evidence(q, k, np.array([0, 1, 2]), 1, 3, [3, 2, 0], 1.0, alpha=0.5, over=ref.CANDIDATES)
    np.testing.assert_allclose(got, [[0.0, ((3 / 4) ** 0.5 + 1) / 2, (1 / 4) ** 0.5 / 2]])


def test_evidence_is_the_mean_over_the_group(rng):
    q, k = rng.normal(size=(2, 6, 4)), rng.normal(size=(2, 12, 4))
    cells, visible = rng.permutation(12)[:10], [9, 10]
    got = ref.evidence(q, k, cells, 0, 10, visible, 0.5)
    for h_kv in range(2):
        rows = [ref.evidence(q[i:i + 1, h:h + 1], k[h_kv:h_kv + 1], cells, 0, 10, visible[i:i + 1], 0.5)
                for i in range(2) for h in range(3 * h_kv, 3 * h_kv + 3)]
        np.testing.assert_allclose(got[h_kv], np.mean(rows, axis=0)[0])


@pytest.mark.parametrize("over, j0, j1", [(ref.VISIBLE, 0, 10), (ref.CANDIDATES, 3, 7)])
def test_evidence_sums_to_one(rng, over, j0, j1):
    q, k = rng.normal(size=(5, 4, 8)), rng.normal(size=(2, 10, 8))
    got = ref.evidence(q, k, rng.permutation(10), j0, j1, [10] * 5, 1.0, over=over)
    np.testing.assert_allclose(got.sum(axis=1), 1.0)


def test_pads_get_no_evidence_and_change_none(rng):
    q, k = rng.normal(size=(2, 4, 8)), rng.normal(size=(2, 10, 8))
    plain = ref.evidence(q, k, np.array([4, 2, 8]), 1, 3, [3, 2], 1.0)
    padded = ref.evidence(q, k, np.array([4, -1, 2, 8]), 1, 4, [4, 3], 1.0)
    np.testing.assert_allclose(padded, np.insert(plain, 1, 0.0, axis=1))


# ---- selection ----------------------------------------------------------------------------------------------------


def chosen(selected):
    return [sorted(int(c) for c in row if c >= 0) for row in selected]


def test_pooling_brings_the_cells_after_and_the_few_before():
    e = np.array([[0, 0, 0, 5, 0, 0, 0, 0, 9.0]])
    assert ref.pool(e, 0, 9, pool_after=2, pool_before=1).tolist() == [[0, 0, 5, 5, 5, 5, 0, 9, 9]]


def test_pooling_knows_candidates_only():
    e = np.array([[9.0, 0, 0, 1, 0, 9]])
    assert ref.pool(e, 1, 5, pool_after=1, pool_before=1).tolist() == [[0, 1, 1, 1]]


def test_topk_takes_the_earlier_of_two_equals():
    cells = np.array([40, 30, 20, 10, 0])
    e = np.array([[0, 1, 2, 1, 1.0], [3, 3, 3, 3, 3.0]])
    assert chosen(ref.select_topk(e, cells, 0, 5, 3)) == [[10, 20, 30], [20, 30, 40]]


def test_topk_pads_what_it_cannot_fill():
    got = ref.select_topk(np.array([[1.0, 2, 3, 4]]), np.array([5, 6, -1, 8]), 1, 4, 5)
    assert sorted(got[0]) == [-1, -1, -1, 6, 8]


def test_the_power_mean_of_one_row_is_that_row():
    p = np.array([0.1, 0.2, 0.7])
    for alpha in (0.25, 0.5, 1.0, 2.0):
        np.testing.assert_allclose(ref.power_mean(p**alpha, alpha), p)
    assert ref.power_mean(np.zeros(3), 0.5).tolist() == [0, 0, 0]


def test_prior_by_hand():
    r = ref.prior(np.array([1.0, 4.0, 1.0]), np.ones(3, bool), gamma=0.5, beta=2.0, p=1.0, eta=1.0)
    raw = np.array([1.0, 0.5 * np.exp(-1.0) * 0.5, 0.0])
    np.testing.assert_allclose(r, raw / raw.sum(), atol=1e-7)
    assert ref.prior(np.array([3.0]), np.ones(1, bool), 0.5, 0.5, 1.8, 0.4).tolist() == [1.0]


def test_the_weight_of_the_prior_makes_the_mixture_flattest(rng):
    f, r = rng.dirichlet(np.ones(20)), rng.dirichlet(np.ones(20))
    weights = np.linspace(0, 1, 10001)
    flatness = [np.sum(((1 - w) * f + w * r) ** 2) for w in weights]
    assert ref.prior_weight(f, r, 1.0) == pytest.approx(weights[np.argmin(flatness)], abs=1e-4)
    assert ref.prior_weight(f, r, 0.02) == pytest.approx(0.02)
    assert ref.prior_weight(f, f, 1.0) == 0.0


PLAIN = dict(alpha=1.0, gamma=0.0, beta=0.0, p=1.0, eta=0.0, lambda_clip=0.0, nms_radius=0, a_soft=0.0, a_cross=0.0,
             temperature=1.0)


def test_without_its_refinements_the_paper_is_topk(rng):
    e, k, cells = rng.random((3, 30)), rng.normal(size=(3, 40, 4)), rng.permutation(40)[:30]
    assert (chosen(ref.select_paper(e, cells, 4, 25, k, 7, **PLAIN)) == chosen(ref.select_topk(e, cells, 4, 25, 7)))


def test_soft_suppression_steps_down_beside_somebody_better():
    e, k = np.exp([[-1.0, -2.0, -5.0, -6.0]]), np.ones((1, 4, 1))
    z0 = ref.paper_score(e, np.arange(4), 0, 4, k, **PLAIN)
    z1 = ref.paper_score(e, np.arange(4), 0, 4, k, **{**PLAIN, "nms_radius": 1, "a_soft": 0.5})
    np.testing.assert_allclose(z1 - z0, [[0, -0.5, -1.5, -0.5]], atol=1e-4)


def test_heads_compete_from_three_on():
    k = np.ones((3, 1, 1))
    e = np.array([[1.0], [1.0], [1.0]])
    params = {**PLAIN, "a_cross": 0.5, "temperature": 2.0}
    np.testing.assert_allclose(ref.paper_score(e, np.arange(1), 0, 1, k, **params), [[-0.5 * LOG3]] * 3, atol=1e-6)
    np.testing.assert_allclose(ref.paper_score(e[:2], np.arange(1), 0, 1, k[:2], **params), [[0.0]] * 2, atol=1e-6)


# ---- stability ----------------------------------------------------------------------------------------------------


def test_stability_by_hand():
    e, cells = np.array([[9, 1, 2, 3, 4.0]] * 2), np.array([50, 10, 20, 30, 40])
    selected, previous = np.array([[10, -1, 40], [-1, -1, -1]]), np.array([[99, 40, -1], [-1, -1, -1]])
    got = ref.stability(e, cells, 1, 5, selected, previous)
    np.testing.assert_allclose(got, [[10, 5, 4, 1 / 3], [10, 0, 0, 1]])

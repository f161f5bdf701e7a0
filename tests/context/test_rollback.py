"""Taking tokens back leaves no trace; a verified batch leaves the K and V of dense steps."""

import numpy as np
import pytest
from support.tiny_model import SEED

N = 200  # tokens of the prompt
LAYERS, HEADS = range(4), range(2)  # of the tiny model
CLOSE = 1e-3  # of logits


@pytest.fixture(scope="module")
def small():
    from sfi_local import SfiParams

    return SfiParams.of("frozen", n_sink=4, n_recent=32, n_selected=24, max_span=16, min_span=2, boundary=False)


@pytest.fixture(scope="module")
def prompt():
    return np.random.default_rng(SEED).integers(0, 256, N).tolist()


@pytest.fixture
def opened(open_context, tiny_weights, small, prompt):
    """A context that holds the prompt and a support: opened(changes of the parameters, settings of the context)."""
    def make(changes=None, **settings):
        context = open_context(tiny_weights, small.replace(**(changes or {})), **settings)
        context.prefill(prompt)
        return context
    return make


def selected(context):
    return [sorted(context.engine.selected(il, h)[1]) for il in LAYERS for h in HEADS]


def took(info):
    return info.kind, info.reason, info.pos, info.depth, info.n_cells


def rows(context, n):
    """The logits after each token of the last batch, [n, n_vocab]."""
    return np.array([context.logits(i) for i in range(n)])


def kv(context):
    """K and V of all cells, as the state holds them."""
    return np.frombuffer(bytes(context.state()), np.uint8)


# ---- rollback ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["frozen", "window"])
@pytest.mark.parametrize("n_kept, n_drafts", [(0, 1), (0, 9), (3, 5), (12, 4)])
def test_after_a_rollback_all_is_as_if_nothing_had_been_drafted(opened, policy, n_kept, n_drafts):
    plain, drafted = opened({"policy": policy}), opened({"policy": policy})
    for context in (plain, drafted):
        context.steps(range(n_kept), "fast")
    drafted.steps([7] * n_drafts, "fast")
    drafted.engine.rollback(n_drafts)
    assert np.array_equal(kv(drafted), kv(plain))
    if policy == "frozen":
        assert selected(drafted) == selected(plain)
    for token in (50, 51, 52):
        assert took(drafted.step(token)) == took(plain.step(token))
        assert np.array_equal(drafted.logits(), plain.logits())


def test_what_a_rollback_may_take_ends_at_the_cells_that_are_candidates(opened, small):
    context = opened()
    context.steps([1, 2], "fast")
    context.engine.rollback(2 + small.n_recent)
    assert context.peek(1)[0] == "fast"
    context.engine.rollback(1)
    assert context.peek(1) == ("slow", "invalidated")
    assert context.step(1).depth == N - small.n_recent


def test_a_rollback_of_everything_leaves_an_empty_sequence(opened, prompt):
    context = opened()
    context.engine.rollback(N)
    assert took(context.step(prompt[0]))[2:] == (0, 1, 1)


def test_a_rollback_over_a_refresh_keeps_the_newer_support(opened):
    context = opened()
    context.steps([1, 2, 3], "fast"), context.step(4, "slow")
    refreshed = selected(context)
    context.engine.rollback(3)
    assert selected(context) == refreshed and context.step(9, "fast").pos == N + 1


def test_the_boundary_is_where_it_was_before_the_draft(opened):
    context = opened({"boundary": True, "min_span": 0})
    for token in b"End":
        context.step(token, "fast")
    for token in b". The":
        context.step(token, "fast")
    context.engine.rollback(4)  # what is left ends in a full stop
    assert context.peek(ord(" "))[0] == "fast" and context.step(ord(" ")).kind == "fast"
    assert context.peek(ord("T")) == ("slow", "boundary")
    context.engine.rollback(2)
    assert context.peek(ord("T"))[0] == "fast"


@pytest.mark.parametrize("n", [-1, N + 1, 1 << 30])
def test_more_than_there_is_cannot_be_taken_back(opened, n):
    from sfi_local.errors import ArgumentError

    context = opened()
    with pytest.raises(ArgumentError, match="n is"):
        context.engine.rollback(n)
    assert context.step(1, "fast").depth == N + 1


def test_one_sequence_is_rolled_back_and_the_other_stays(opened, prompt):
    context = opened(n_seq=2)
    context.prefill(prompt[:100], seq=1)
    context.steps([1, 2, 3], "fast"), context.steps([1, 2], "fast", seq=1)
    context.engine.rollback(3)
    assert context.step(5, "fast").depth == N + 1 and context.step(5, "fast", seq=1).depth == 103


# ---- a verified batch equals dense steps ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("n", [1, 2, 7, 17])
def test_a_verified_batch_has_the_logits_and_cells_of_dense_steps(opened, n, kind):
    dense, batch = opened(kv=kind), opened(kv=kind)
    logits = dense.steps(range(n), "dense")
    batch.steps(range(n - 1), "fast")
    info = batch.engine.verify(list(range(n)), n - 1, refresh=False)
    assert took(info) == ("dense", "verify", N + n - 1, N + n, N + n)
    assert np.abs(rows(batch, n) - logits).max() < CLOSE * (1 if kind == "f16" else 30)
    if n == 1:
        assert np.array_equal(kv(batch), kv(dense))


@pytest.mark.parametrize("n", [2, 5, 8, 16, 33])
def test_on_a_real_model_a_batch_equals_dense_steps_bit_for_bit(native, open_context, smollm2, n):
    """Its quantised matrices and our attention give each token of a batch what they give it alone."""
    from support.contexts import load_weights

    from sfi_local import SfiParams

    with load_weights(native, smollm2) as weights:
        dense, batch = (open_context(weights, SfiParams(n_selected=64), n_threads=2) for _ in "ab")
        for context in (dense, batch):
            context.prefill(list(range(1000, 1200)))
        tokens = list(range(2000, 2000 + n))
        logits = dense.steps(tokens, "dense")
        batch.steps(tokens[:-1], "fast")
        batch.engine.verify(tokens, len(tokens) - 1, refresh=False)
        assert np.array_equal(rows(batch, len(tokens)), logits) and np.array_equal(kv(batch), kv(dense))
        dense.close(), batch.close()


def test_a_batch_that_refreshes_selects_what_dense_steps_and_a_slow_one_select(opened):
    dense, batch = opened({"n_queries": 1}), opened({"n_queries": 1})  # a slow step takes its own
    dense.steps(range(6), "dense"), dense.step(6, "slow")
    batch.steps(range(6), "fast")
    assert batch.engine.verify(list(range(7)), 6).kind == "slow"
    assert selected(batch) == selected(dense)


@pytest.mark.parametrize("tokens, n_replaced", [([], 0), ([1, 2], 3), ([1], -1), ([1] * 513, 0), ([1, 999], 0)])
def test_a_batch_that_makes_no_sense_is_refused_and_nothing_happens(opened, tokens, n_replaced):
    from sfi_local.errors import ArgumentError

    context = opened()
    with pytest.raises(ArgumentError):
        context.engine.verify(tokens, n_replaced)
    assert context.step(1, "fast").depth == N + 1


def test_a_batch_that_does_not_fit_is_refused_and_nothing_happens(opened):
    from sfi_local.errors import ContextFullError

    context = opened(n_ctx=256)
    context.steps([1, 2], "fast")
    with pytest.raises(ContextFullError):
        context.engine.verify([1] * 57, 0)
    assert context.engine.verify([1] * 56, 2).depth == 256


def test_the_stats_say_what_was_verified_and_what_dense_steps_would_have_read(opened):
    context, dense = opened(), opened()
    context.engine.reset_stats()
    context.steps(range(5), "fast"), context.engine.verify(list(range(6)), 5), context.engine.rollback(2)
    dense.engine.reset_stats()
    dense.steps(range(4), "dense")
    stats = context.engine.stats()
    assert (stats.n_fast, stats.n_verify, stats.n_verified, stats.reasons["verify"]) == (5, 1, 6, 1)
    assert stats.kv_dense == dense.engine.stats().kv_dense and stats.ms_verify > 0


def test_layers_with_a_sliding_window_are_rolled_back_too(native, open_context, small, prompt, tmp_path):
    from support.contexts import load_weights, write_sliding

    with load_weights(native, write_sliding(tmp_path / "sliding.gguf")) as weights:
        plain, drafted = (open_context(weights, small) for _ in "ab")
        for context in (plain, drafted):
            context.prefill(prompt)
        drafted.steps([7] * 9, "fast"), drafted.engine.rollback(9)
        assert np.array_equal(plain.steps([1, 2, 3], "fast"), drafted.steps([1, 2, 3], "fast"))
        drafted.engine.verify([1, 2, 3], 3), plain.close(), drafted.close()


def test_cells_that_a_small_sliding_window_has_dropped_cannot_come_back(native, open_context, small, prompt, tmp_path):
    from support.contexts import load_weights, write_sliding

    from sfi_local.errors import ContextError

    with load_weights(native, write_sliding(tmp_path / "sliding.gguf")) as weights:
        context = open_context(weights, small, swa_full=False, n_batch=64, n_ubatch=64, n_ctx=2048)
        for _ in range(4):
            context.prefill(prompt)
        with pytest.raises(ContextError, match="swa_full"):
            context.engine.rollback(400)
        assert context.step(1, "fast").depth == 4 * N + 1
        context.close()

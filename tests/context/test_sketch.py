"""Policy sketch: every cell is attended to, exactly or by its codes, once; and nothing an edit leaves behind is used.

A fine sketch (4 bits for each of the 32 values of a head) makes a fast step nearly a dense one. The attention of the tiny
model is spread over all cells: where the sketch stands for none of them, logits are off by one or more.
"""

import ctypes

import numpy as np
import pytest
from support.contexts import Watch, load_weights, node_rows, values_of, write_scaling
from support.supports import EDITS, LAYERS, took
from support.tiny_model import SEED

N = 400  # tokens of the prompt
HEADS, GROUP = range(2), 2
BATCH = 32  # cells that leave the window at once
NEAR = 0.6  # of logits, by a fine sketch; measured: up to 0.44
FAR = 1.0   # without the tail; measured: up to 2.1


@pytest.fixture(scope="module")
def fine():
    from sfi_local import SfiParams

    return SfiParams.of("sketch", n_sink=4, n_recent=16, n_selected=64, tolerance=0, sketch_k4=32, sketch_v4=32)


@pytest.fixture(scope="module")
def text():
    return np.random.default_rng(SEED).integers(0, 256, 2000).tolist()


@pytest.fixture
def opened(open_context, tiny_weights, fine):
    def make(params=None, **settings):
        return open_context(tiny_weights, params or fine, **{"n_ctx": 1024, **settings})
    return make


@pytest.fixture
def ready(opened, text):
    """Up to two sequences, the first of which holds a prompt and has taken one fast step."""
    context = opened(n_seq=2)
    context.prefill(text[:N])
    assert context.step(1).kind == "fast"
    return context


def dense_logits(opened, tokens, n):
    """Logits of the last n of the tokens, densely."""
    context = opened()
    context.prefill(tokens[:-n])
    return context.steps(tokens[-n:], "dense")


# ---- what a fast step attends to ---------------------------------------------------------------------------------------


def test_a_fine_sketch_stands_for_every_cell(opened, text):
    context = opened()
    context.prefill(text[:N])
    fast = context.steps(text[N:N + 20])
    assert context.engine.stats().n_fast == 20
    assert np.abs(fast - dense_logits(opened, text[:N + 20], 20)).max() < NEAR


def test_what_is_scanned_and_what_is_always_attended_to_are_all_cells(opened, text):
    """Through three batches: the scan looks at each cell from the sink to the window, and at no other."""
    context = opened(watch=Watch("sketch_scan"))
    context.prefill(text[:N])
    scanned = {}

    def look(il, node):
        skip, plan = (values_of(node.src[i].contents) for i in (3, 4))
        scanned[il] = sorted(set(range(plan[0])) - set(skip.tolist()))
        return node_rows(node)[1].view(np.float32)

    context.watch.replace = look
    n_always = []
    for token in text[N:N + 3 * BATCH]:
        info = context.step(token)
        n_always.append(info.n_cells - 64)
        for il in LAYERS:
            assert scanned[il] == list(range(4, 4 + info.depth - n_always[-1]))
    assert min(n_always) == 4 + 16 + 1 and max(n_always) == 4 + 16 + BATCH


def test_without_values_the_tail_is_missed(opened, text, fine):
    context = opened(fine.replace(sketch_v4=0))
    context.prefill(text[:N])
    assert np.abs(context.steps(text[N:N + 5]) - dense_logits(opened, text[:N + 5], 5)).max() > FAR


def test_a_selection_of_everything_equals_dense(opened, text, fine):
    context = opened(fine.replace(n_selected=2000))
    context.prefill(text[:N])
    assert np.abs(context.steps(text[N:N + 5]) - dense_logits(opened, text[:N + 5], 5)).max() < 1e-4


@pytest.mark.parametrize("n", [1, 5, 20, 51, 52, 53])
def test_until_the_window_is_full_steps_are_exact(opened, text, n):
    """4 + 16 + 32 cells fit into always."""
    context = opened()
    context.prefill(text[:n])
    infos = [context.step(token) for token in text[n:52]]
    assert {i.kind for i in infos} <= {"fast"} and all(i.n_cells == i.depth and i.tail_mass == 0 for i in infos)
    if infos:
        assert np.abs(context.logits() - dense_logits(opened, text[:52], 52 - n)[-1]).max() < 1e-2


def test_cells_leave_the_window_in_batches_and_stay_attended_to(opened, text):
    context = opened()
    context.prefill(text[:60])
    infos = [context.step(token) for token in text[60:N]]
    assert all(i.kind == "fast" for i in infos)
    assert max(i.n_cells for i in infos) <= 4 + 16 + BATCH + 64
    assert np.abs(context.logits() - dense_logits(opened, text[:N], N - 60)[-1]).max() < NEAR


def test_cells_get_their_codes_without_a_new_graph_of_the_steps(opened, text):
    context = opened()
    context.prefill(text[:N])
    context.step(text[0])
    before = context.n_reused()
    assert all(context.step(token).kind == "fast" for token in text[:2 * BATCH])
    assert context.n_reused() - before == 2 * BATCH


def test_the_share_that_is_read_counts_codes_and_cells(ready, text):
    """Codes of K and V, 4 bits a value, are a quarter of F16; the bases, and 149 cells at most, come on top."""
    ready.engine.reset_stats()
    ready.steps(text[:20])
    assert 0.4 < ready.engine.stats().kv_read_share < 0.9


# ---- two looks -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twice(fine):
    """A quarter of the bytes of K are looked at first; some cells are selected."""
    return fine.replace(sketch_first=1, tolerance=1e-2, second_look=0.0)


def test_a_second_look_at_everything_is_one_look_in_two(opened, text, fine, twice):
    def logits(params):
        context = opened(params)
        context.prefill(text[:N])
        return context.steps(text[N:N + 20])

    np.testing.assert_allclose(logits(twice), logits(twice.replace(sketch_first=0)), rtol=0, atol=0.05)  # measured: 0.02, by roundings


def test_by_default_half_of_k_is_looked_at_first_but_not_without_a_tolerance(opened, text):
    from sfi_local import SfiParams

    def logits(**changes):
        context = opened(SfiParams(n_recent=16, n_selected=64, **changes))
        context.prefill(text[:N])
        return context.steps(text[N:N + 5])

    of_v = {"sketch_v2": 16}
    np.testing.assert_array_equal(logits(), logits(sketch_k4=8, sketch_k2=48, sketch_first=2, **of_v))
    np.testing.assert_array_equal(logits(tolerance=0), logits(tolerance=0, sketch_k4=4, sketch_k2=12, sketch_k1=24, **of_v))


def test_fewer_second_looks_read_less_and_what_is_left_still_weighs(opened, text, twice):
    dense, read, off = dense_logits(opened, text[:N + 20], 20), [], []
    for change in ({"second_look": 0.0}, {"second_look": 0.9}, {"second_look": 1.1}, {"second_look": 1.1, "sketch_v4": 0}):
        context = opened(twice.replace(**change))
        context.prefill(text[:N])
        off.append(np.abs(context.steps(text[N:N + 20]) - dense).mean())
        read.append(context.engine.stats().kv_read_share)
    assert read[0] > read[1] > read[2] > 0
    assert off[0] < off[2] < off[3]  # without V the tail is dropped


def test_what_is_read_counts_what_was_looked_at(opened, text, twice):
    """4 bytes of every cell, the rest of the codes of those looked at again, the cells attended to, means and decoding half of the bases."""
    context = opened(twice.replace(second_look=1.0), watch=Watch("sketch_scan"))
    context.prefill(text[:N])
    read, codes, cell = [], (4 * 32 + 4 * 32) // 8, 2 * 32 * 2

    def look(il, node):
        skip, plan, selected, counts = (node.src[i].contents for i in (3, 4, 6, 7))
        n_used, skipped = values_of(plan)[0], values_of(skip)
        n_skipped = ((skipped >= 0) & (skipped < n_used)).sum()
        rows = [(ctypes.c_int32 * selected.ne[0]).from_address(selected.data + h * selected.nb[1]) for h in HEADS]
        n_selected, n_looked = (np.array(rows) >= 0).sum(), values_of(counts)[1::2].sum()
        assert 0 < n_looked < len(HEADS) * (n_used - n_skipped)
        n_attended = len(HEADS) * (N + 1 - n_used + n_skipped) + n_selected
        read.append(4 * len(HEADS) * n_used + (codes - 4) * n_looked + cell * n_attended + len(HEADS) * 2 * 32 * (4 + 2 * 32))
        return node_rows(node)[1].view(np.float32)

    context.watch.replace = look
    context.engine.reset_stats()
    assert context.step(text[N]).kind == "fast"
    assert context.engine.stats().kv_read == pytest.approx(sum(read), rel=0.01)


@pytest.mark.parametrize("kv", ["f32", "q8_0", "q4_0"])
def test_every_kv_type_has_a_sketch(opened, text, kv):
    context, dense = opened(kv=kv), opened(kv=kv)
    for one in (context, dense):
        one.prefill(text[:N])
    assert np.abs(context.steps(text[N:N + 5]) - dense.steps(text[N:N + 5], "dense")).max() < NEAR


def test_the_number_of_threads_changes_nothing(opened, text):
    one, two = opened(n_threads=1), opened(n_threads=2)
    for context in (one, two):
        context.prefill(text[:N])
        context.set_state(context.state())  # threads may round the keys of a prefill apart
    two.set_state(one.state())
    assert np.abs(one.steps(text[N:N + 5]) - two.steps(text[N:N + 5])).max() < 1e-3


# ---- validity ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", EDITS)
def test_after_an_edit_a_slow_step_comes_first_and_fast_ones_see_what_is_left(ready, opened, text, edit):
    from sfi_local.errors import NoSupportError

    EDITS[edit](ready)
    with pytest.raises(NoSupportError, match="slow step first"):
        ready.step(2, "fast")
    slow, dense = ready.step(2), opened(n_seq=2)
    assert took(slow) == ("slow", "invalidated")
    dense.set_state(ready.state())
    for token in text[:4]:
        fast = ready.step(token)
        dense.step(token, "dense")
        assert took(fast) == ("fast", "")
        assert np.abs(ready.logits() - dense.logits()).max() < NEAR


def test_holes_in_the_cache_are_not_attended_to(ready, opened, text):
    """Cells 100 to 300 are freed, then filled again one by one, beyond the end of the window."""
    ready.cut(100, 300)
    dense = opened(n_seq=2)
    ready.step(2)
    dense.set_state(ready.state())
    for token in text[:100]:
        ready.step(token)
        dense.step(token, "dense")
    assert np.abs(ready.logits() - dense.logits()).max() < NEAR


def test_sequences_have_sketches_of_their_own(opened, text):
    def decode(context, seq):
        context.prefill(text[300 * seq:300 * seq + 200 + 50 * seq], seq=seq)
        for token in text[:12]:
            yield context.step(token, seq=seq).kind, context.logits()

    together = opened(n_seq=2)
    for row in zip(*[zip(decode(together, seq), decode(opened(n_seq=2), seq)) for seq in range(2)]):
        for (kind, logits), (_, expected) in row:
            assert kind == "fast" and np.abs(logits - expected).max() < 1e-3


def test_a_prefill_goes_on_with_the_codes_that_are_there(opened, text):
    """As in a chat: the second part is more than the first, so the basis is fitted anew; then less, and it is kept."""
    context = opened()
    for part in (text[:150], text[150:500], text[500:560]):
        context.prefill(part)
        context.steps(part[:3])
    dense = opened()
    tokens = text[:150] + text[:3] + text[150:500] + text[150:153] + text[500:560] + text[500:503]
    dense.prefill(tokens)
    assert np.abs(context.steps(text[:3]) - dense.steps(text[:3], "dense")).max() < NEAR


# ---- the hook --------------------------------------------------------------------------------------------------------------


def test_the_hook_tells_what_was_left_to_the_sketch(opened, text):
    """In each layer: the share of the tail, from the graph's own numbers, and the distinct cells of the selection."""
    context = opened(watch=Watch("sparse_attn"))
    context.prefill(text[:N])
    tails, shares = {}, {}

    def look(il, node):
        tails[il] = node_rows(node.src[5].contents)[1].view(np.float32)[0, :, -1]  # log-sum-exp of each head's tail
        return node_rows(node)[1].view(np.float32)

    context.watch.replace = look
    info = context.step(text[N])
    for il in LAYERS:
        shares[il] = [context.engine.tail(il, h).mass for h in range(len(HEADS) * GROUP)]
        for h in HEADS:
            cells, _ = context.engine.selected(il, h)
            assert len(set(cells)) == 64 and all(4 <= cell < N + 1 - 16 for cell in cells)
        assert len(tails[il]) == 4 and np.isfinite(tails[il]).all() and all(0 < share < 1 for share in shares[il])
        assert all(0 < context.engine.tail(il, h).logit_error < 0.5 for h in range(4))
    assert info.tail_mass == pytest.approx(np.mean([*shares.values()]), rel=1e-5)


def test_the_error_of_a_logit_is_that_of_the_graph_s_logits(native, open_context, opened, fine, text, tmp_path):
    """Layer 0 of the same weights, in an architecture that scales the logits and in one that scales Q before: measured
    6 times as much where the scale was taken twice."""
    coarse = fine.replace(sketch_k4=8, sketch_v4=16)
    with load_weights(native, write_scaling(tmp_path / "scaling.gguf")) as weights:
        theirs, ours = open_context(weights, coarse), opened(coarse)
        for context in (theirs, ours):
            context.prefill(text[:N])
            context.step(1)
        for head in range(4):
            error, same = (context.engine.tail(0, head).logit_error for context in (theirs, ours))
            assert 0.6 < error / same < 1.6


def test_a_row_that_is_not_finite_leaves_the_sketch_as_it_is(opened, text, fine):
    """K of one cell overflows in head 0 of the last layer: the other heads select nearly what they select without."""
    def selections(poisoned):
        context = opened(fine.replace(n_selected=200, tolerance=3e-4))
        context.prefill(text[:N])
        data, layer = context.state(), N * 64 * 2  # bytes: F16, 2 KV heads of 32 values; K of all layers, then V, a header before each
        if poisoned:
            k = np.frombuffer(data, np.float16, N * 64, len(data) - 4 * (12 + layer) - layer).reshape(N, 64)
            k[150, :3] = np.inf
        context.set_state(data)
        context.step(1, "slow")
        context.step(2)
        return [set(context.engine.selected(il, h)[0]) for il in LAYERS for h in HEADS]

    for at, (plain, poisoned) in enumerate(zip(selections(False), selections(True))):
        assert len(plain & poisoned) > (0.9 if at != 6 else 0.5) * len(plain | poisoned) > 0


def test_there_is_no_tail_without_a_sketch(opened, text, fine):
    from sfi_local.errors import NoSupportError
    from sfi_local.params import SfiParams

    for context in (opened(), opened(SfiParams.of("frozen", n_recent=32, n_selected=24))):
        context.prefill(text[:40])
        context.step(1)
        with pytest.raises(NoSupportError, match="tail"):
            context.engine.tail(0, 0)


# ---- the oracle -------------------------------------------------------------------------------------------------------------


def test_the_oracle_of_everything_equals_dense(opened, text):
    from sfi_local import SfiParams

    context = opened(SfiParams.of("oracle", n_recent=16, n_selected=1000))
    context.prefill(text[:N])
    fast = context.steps(text[N:N + 5])
    assert context.engine.stats().n_fast == 5
    assert np.abs(fast - dense_logits(opened, text[:N + 5], 5)).max() < 1e-3


def test_the_oracle_chooses_anew_at_every_step(opened, text):
    from sfi_local import SfiParams

    context = opened(SfiParams.of("oracle", n_recent=16, n_selected=8))
    context.prefill(text[:N])
    chosen = []
    for token in text[N:N + 4]:
        assert context.step(token).kind == "fast"
        chosen.append(sorted(context.engine.selected(0, 0)[0]))
    assert len({tuple(cells) for cells in chosen}) > 1

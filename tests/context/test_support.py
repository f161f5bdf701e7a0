"""The KV cache owns the support: what makes it invalid, what it holds, and what is refused."""

import ctypes
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support import reference as ref
from support.command_line import cli_env
from support.contexts import Watch, attend_to, node_rows
from support.supports import CLOSE, EDITS, HEADS, LAYERS, N, check_interleaved, took


@pytest.fixture
def opened(open_context, tiny_weights, small):
    """opened(params or changes of them, settings of the context)"""
    def make(params=None, **settings):
        return open_context(tiny_weights, params or small, **settings)
    return make


# ---- what makes a support invalid -------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_the_cache_makes_the_next_step_slow(ready, edit):
    from sfi_local.errors import NoSupportError

    EDITS[edit](ready)
    with pytest.raises(NoSupportError, match="slow step first"):
        ready.step(2, "fast")
    assert ready.peek(2) == ("slow", "invalidated") == took(ready.step(2))
    assert took(ready.step(3)) == ("fast", "")


@pytest.mark.parametrize("edit", EDITS)
def test_after_an_edit_slow_and_fast_steps_are_those_of_a_fresh_context(ready, opened, edit):
    """The fresh one is given the edited state once it is in effect: shifts and copies wait for the next step."""
    EDITS[edit](ready)
    slow, logits, fresh = ready.step(2), ready.logits(), opened(n_seq=2, n_ctx=512)
    fresh.set_state(ready.state())
    fresh.cut(slow.pos)
    assert np.abs(fresh.steps([2], "slow")[0] - logits).max() < CLOSE
    for token in (3, 4):
        one, other = ready.step(token), fresh.step(token)
        assert (one.kind, one.depth, one.n_cells, one.pos) == ("fast", other.depth, other.n_cells, other.pos)
        assert np.abs(ready.logits() - fresh.logits()).max() < CLOSE


@pytest.mark.parametrize("nothing", [
    lambda c: c.cut(N + 1),
    lambda c: c.cut(0, 0),
    lambda c: c.cut(0, seq=1),
    lambda c: c.llama.llama_memory_seq_add(c.memory, 0, 100, -1, 0),
    lambda c: c.llama.llama_memory_seq_keep(c.memory, 0),
    lambda c: c.llama.llama_memory_seq_keep(c.memory, 1),
    lambda c: c.llama.llama_memory_seq_cp(c.memory, 0, 1, -1, -1),
    lambda c: c.state(),
    lambda c: c.prefill([1, 2, 3], seq=1),
    lambda c: c.decode([1, 2, 3], seq=1),
    lambda c: c.decode([1] * 400, status=1),
], ids=["cut after the end", "empty range", "cut of an empty sequence", "shift by 0", "keep", "keep of another",
        "copy to another", "save", "prefill of another", "decode of another", "decode that does not fit"])
def test_what_leaves_the_cells_of_a_sequence_alone_keeps_its_support(ready, nothing):
    nothing(ready)
    assert took(ready.step(2, "fast")) == ("fast", "forced")


def test_a_copied_sequence_begins_with_a_slow_step_and_equals_the_original(ready):
    ready.llama.llama_memory_seq_cp(ready.memory, 0, 1, -1, -1)
    assert took(ready.step(7, seq=1))[0] == "slow"
    copied = ready.logits()
    ready.step(7, "slow", seq=0)
    assert np.abs(ready.logits() - copied).max() < CLOSE


def test_new_parameters_drop_every_support(ready, small):
    ready.engine.params = small.replace(n_selected=48)
    assert took(ready.step(2)) == ("slow", "first")
    assert ready.step(3).n_cells == 4 + 32 + 1 + 48


def test_a_refused_step_keeps_the_support(ready):
    from sfi_local.errors import ArgumentError

    with pytest.raises(ArgumentError, match="vocabulary"):
        ready.step(10_000)
    assert ready.step(2, "fast").depth == N + 2


# ---- graphs, and what they hold ---------------------------------------------------------------------------------------


def test_an_edit_that_another_one_hides_is_noticed(ready):
    """As many cells as before, but others: the cache is asked at each call, and plain decoding tells by itself."""
    ready.cut(N - 3)
    ready.decode([9, 9, 9, 9])
    assert took(ready.step(2)) == ("slow", "invalidated")


def test_a_graph_from_before_attaching_is_not_used_again(opened, open_context, tiny_weights, prompts, small):
    """Of the same shape as a slow step's, it would choose nothing."""
    from sfi_local.binding.engine import Engine

    context = open_context(tiny_weights, None)
    context.decode(prompts[0])
    context.decode([1])
    context.engine = Engine(context.address, small)
    assert took(context.step(2)) == ("slow", "first")
    assert len(context.engine.selected(0, 0)[0]) == small.n_selected


def resident():
    """Bytes of this process in memory, without what the allocator keeps for later."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_cells_take_memory_as_they_are_used(open_context, tiny_weights, prompts):
    from sfi_local.binding.state import rows_size

    before, context = resident(), open_context(tiny_weights, None, n_ctx=1 << 18)
    context.decode(prompts[0])
    assert resident() - before < rows_size(SimpleNamespace(ctx=context.address), 1 << 18) // 4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", ["close", "set_params"])
def test_what_a_support_took_is_given_back(opened, prompts, small, how):
    """Over 32 MB, so that the allocator returns it at once."""
    from sfi_local import SfiParams

    context = opened(SfiParams.of("sketch"), n_ctx=1 << 18, kv="q4_0")
    context.prefill(prompts[0])
    context.step(1)
    took, before = context.engine.memory(), resident()
    assert took > 36 << 20
    if how == "close":
        context.engine.close()
    else:
        context.engine.params = small
    assert before - resident() > 0.8 * took


def test_a_graph_that_was_made_anew_gives_the_same(opened, prompts):
    """A control vector, even none, has llama.cpp make scheduler and graphs anew."""
    def logits(renew):
        context = opened()
        context.prefill(prompts[0])
        out = []
        for i, token in enumerate(range(12)):
            if renew and i % 4 == 3:
                assert context.llama.llama_set_adapter_cvec(context.address, None, 0, 0, 0, 0) == 0
            out.append(context.steps([token], "slow" if i % 3 == 1 else "fast"))
        return np.array(out)

    assert np.array_equal(logits(True), logits(False))


# ---- several sequences ------------------------------------------------------------------------------------------------


def test_interleaved_sequences_decode_as_each_would_alone(opened, prompts):
    check_interleaved(opened, prompts)


def test_each_sequence_has_its_own_selection(opened, prompts):
    context = opened(n_seq=3)
    for seq in range(2):
        context.prefill(prompts[seq], seq=seq)
    before = context.engine.selected(1, 1, seq=0)
    assert sorted(before[1]) != sorted(context.engine.selected(1, 1, seq=1)[1])
    context.step(1, "slow", seq=1)
    assert context.engine.selected(1, 1, seq=0) == before


# ---- the window of policy frozen ---------------------------------------------------------------------------------------


def test_the_window_keeps_what_was_recent_and_grows_until_the_span_ends(opened, prompts, small):
    context = opened()
    context.prefill(prompts[0])
    infos = [context.step(token) for token in range(10)]
    assert [i.n_cells for i in infos[:8]] == [4 + 32 + 24 + i for i in range(1, 9)]
    assert [took(i) for i in infos] == [("fast", "")] * 8 + [("slow", "max_span"), ("fast", "")]
    assert infos[8].n_cells == infos[8].depth == N + 9 and infos[9].n_cells == 4 + 32 + 24 + 1


def test_the_window_bounds_forced_fast_steps_too(opened, prompts, small):
    context = opened()
    context.prefill(prompts[0])
    kinds = [context.step(token, "fast").kind for token in range(12)]
    assert kinds.index("slow") in (small.max_span, small.max_span + 1)


def test_a_cell_that_was_recent_stays_attended_to(opened, prompts):
    """The last fast step of a span, computed beside it: no cell between sink and selected has been lost."""
    context = opened(watch=Watch("sparse_attn"))
    context.prefill(prompts[0])
    fast = context.steps(range(8))[-1]
    always = np.r_[0:4, N - 32:N + 8]
    cells = [[np.append(always, context.engine.selected(il, h)[0]) for h in HEADS] for il in LAYERS]
    context.cut(N + 7)
    context.watch.replace = lambda il, node: attend_to(node, cells[il])
    assert np.abs(context.steps([7], "dense")[0] - fast).max() < CLOSE


def test_dense_steps_use_up_the_window_but_not_the_span(opened, prompts):
    context = opened()
    context.prefill(prompts[0])
    kinds = [context.step(token, "dense").kind for token in range(7)] + [context.step(1, "fast").kind for _ in range(2)]
    assert kinds == ["dense"] * 7 + ["fast", "slow"]


@pytest.mark.parametrize("n", [1, 3, 4, 5, 35, 36, 37, 60, 61])
def test_a_prompt_shorter_than_the_support_is_attended_to_as_a_whole(opened, prompts, n):
    fast, dense = opened(), opened()
    for context in (fast, dense):
        context.prefill(prompts[0][:n])
    for token in range(6):
        info = fast.step(token, "fast")
        dense.step(token, "dense")
        assert (info.kind, info.n_cells) == ("fast", info.depth if n <= 60 else 60 + token + 1)
        assert np.abs(fast.logits() - dense.logits()).max() < (CLOSE if n <= 60 else math.inf)


@pytest.mark.parametrize("name", ["max_span", "n_sink", "n_recent", "n_selected"])
def test_more_than_the_context_holds_costs_no_more_than_the_context(opened, prompts, small, name):
    def cost(value):
        context = opened(small.replace(**{name: value}))
        context.prefill(prompts[0])
        return context.engine.memory(), min(context.step(token).t_ms for token in range(5))

    (size, time), (most, longest) = cost(1024), cost(1 << 22)
    assert most <= 2 * size and longest < 5 + 3 * time


# ---- the support-stability hook ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", ["topk", "paper"])
@pytest.mark.parametrize("kv", ["f32", "q8_0"])
def test_a_refresh_selects_what_the_reference_selects(opened, prompts, small, selector, kv):
    """From the queries of 16 steps, taken from the graph, and the keys that the last of them finds in the cache."""
    params = small.replace(selector=selector, n_queries=16)
    context, queries, keys = after_sixteen_steps(opened, prompts, params, kv)
    for il in LAYERS:
        selected, evidence, mass = reference_refresh(params, np.array(queries[il]), keys[il])
        for h in HEADS:
            s = context.engine.stability(il, h)
            assert set(context.engine.selected(il, h)[0]) == set(selected[h])
            assert (s.evidence, s.mass) == (pytest.approx(evidence[h], rel=1e-4), pytest.approx(mass[h], rel=1e-4))


@pytest.mark.parametrize("policy", ["sketch", "oracle"])
def test_a_policy_that_selects_at_every_step_has_no_stability(opened, prompts, policy):
    from sfi_local import SfiParams
    from sfi_local.errors import NoSupportError

    context = opened(SfiParams.of(policy))
    context.prefill(prompts[0])
    context.step(1)
    with pytest.raises(NoSupportError, match="anew"):
        context.engine.stability(0, 0)


# ---- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("leave", ["detach", "other parameters"])
def test_what_a_support_took_is_given_back_at_once(opened, prompts, small, leave):
    from sfi_local import SfiParams

    context = opened(SfiParams.of("sketch", sketch_k4=32, sketch_v4=32), n_ctx=1 << 18)
    context.prefill(prompts[0])
    context.step(1)
    size, before = context.engine.memory(), resident()
    if leave == "detach":
        context.engine.close()
    else:
        context.engine.params = small
    assert size > 60e6 and before - resident() > 0.8 * size


def after_sixteen_steps(opened, prompts, params, kv):
    """(context, queries, keys) after 15 dense steps and a slow one; queries [layer][16] and keys [layer] of the last."""
    context, queries, keys = opened(params, kv=kv, watch=Watch("sparse_attn")), [[] for _ in LAYERS], {}

    def look(il, node):
        attn = node if node.src[2] else node.src[0].contents  # a slow step's attention is a view of a larger result
        queries[il].append(ref.dequantise("f32", node_rows(attn.src[0].contents)[1])[:, 0])
        kind, rows = node_rows(attn.src[1].contents)
        keys[il] = ref.dequantise(kind, rows[:, :N + 16])
        return node_rows(node)[1].view(np.float32)

    context.prefill(prompts[0])
    context.watch.replace = look
    context.steps(prompts[1][:15], "dense"), context.steps(prompts[1][15:16], "slow")
    return context, queries, keys


def reference_refresh(params, q, k):
    """(selected, evidence on all candidates, share of it on selected) per KV head; q [16, n_head, n_embd_k]."""
    cells, scale = np.arange(N + 16), q.shape[-1]**-0.5
    j0, j1 = ref.candidates(len(cells), params.n_sink, params.n_recent)
    if params.selector == "paper":
        names = "alpha gamma beta p eta lambda_clip nms_radius a_soft a_cross temperature".split()
        e = ref.evidence(q[-1:], k, cells, j0, j1, [N + 16], scale, alpha=params.alpha, over=ref.CANDIDATES)
        selected = ref.select_paper(e, cells, j0, j1, k, params.n_selected, **{n: getattr(params, n) for n in names})
    else:
        e = ref.evidence(q[-1:], k, cells, j0, j1, [N + 16], scale)
        selected = ref.select_topk(e, cells, j0, j1, params.n_selected, params.pool_after, params.pool_before)
    stability = ref.stability(e, cells, j0, j1, selected, selected)
    return selected, stability[:, 0], stability[:, 1] / stability[:, 0]


@pytest.mark.parametrize("parts", [[199, 1], [64, 64, 64, 8], [150, 50], [190, "steps"], [199, "slow"]])
def test_how_a_prompt_is_split_changes_no_selection(opened, prompts, small, parts):
    params = small.replace(n_queries=small.n_queries if type(parts[-1]) is int else 1)  # a slow step takes its own alone
    whole, split, at = opened(params, n_ubatch=512), opened(params, n_ubatch=50), 0
    whole.prefill(prompts[0])
    for part in parts:
        if part == "steps":
            split.steps(prompts[0][at:-1], "dense"), split.step(prompts[0][-1], "slow")
        elif part == "slow":
            split.step(prompts[0][-1], "slow")
        else:
            split.prefill(prompts[0][at:at + part])
            at += part
    for il in LAYERS:
        assert sorted(split.engine.selected(il, 0)[1]) == sorted(whole.engine.selected(il, 0)[1])


def test_a_sequence_may_begin_with_a_step(opened):
    context = opened()
    infos = [context.step(token) for token in range(12)]
    assert [took(i) for i in infos[:2]] == [("slow", "first"), ("fast", "")]
    assert all(i.n_cells == i.depth == i.pos + 1 for i in infos)


@pytest.mark.parametrize("selector", ["topk", "paper"])
def test_selected_cells_are_unique_candidates_at_their_positions(opened, prompts, small, selector):
    context = opened(small.replace(selector=selector))
    context.prefill(prompts[0])
    context.cut(60, 90), context.prefill(prompts[1][:50])  # some positions are gone, and their cells hold others
    candidates = [*range(60), *range(90, N + 50)][small.n_sink:-small.n_recent]
    for il in LAYERS:
        for h in HEADS:
            cells, positions = context.engine.selected(il, h)
            assert len(cells) == len(set(cells)) == len(set(positions)) == small.n_selected
            assert set(positions) <= set(candidates)
            assert set(cells) <= set(range(context.engine.step(0, "dense").depth + 60))


def test_a_selection_of_every_candidate_is_every_candidate_once(opened, prompts, small):
    context = opened(small.replace(n_selected=N))
    context.prefill(prompts[0])
    for il in LAYERS:
        assert sorted(context.engine.selected(il, 0)[1]) == list(range(small.n_sink, N - small.n_recent))
        stability = context.engine.stability(il, 0)
        assert (stability.mass, stability.n_selected) == (pytest.approx(1.0, abs=1e-6), N - 36)


def test_the_first_refresh_has_nothing_to_compare_with(opened, prompts, small):
    context = opened()
    context.prefill(prompts[0])
    for il in LAYERS:
        s = context.engine.stability(il, 1)
        assert math.isnan(s.mass_prev) and math.isnan(s.jaccard)
        assert s.n_selected == small.n_selected and 0 < s.mass < 1 and 0 < s.evidence < 1


@pytest.mark.parametrize("selector", ["topk", "paper"])
def test_stability_says_how_the_selection_changed(opened, prompts, small, selector):
    context = opened(small.replace(selector=selector))
    context.prefill(prompts[0])
    for token in (1, 2):
        before = [set(context.engine.selected(il, h)[0]) for il in LAYERS for h in HEADS]
        context.step(token, "slow")
        for i, one in enumerate(before):
            s, now = context.engine.stability(i // 2, i % 2), set(context.engine.selected(i // 2, i % 2)[0])
            assert s.jaccard == pytest.approx(len(one & now) / len(one | now), abs=1e-6)
            assert 0 <= s.mass_prev <= 1 and 0 < s.mass <= 1


def test_the_same_token_again_selects_the_same(opened, prompts):
    """A slow step, undone and done again: everything but the older queries is as it was."""
    context = opened()
    context.prefill(prompts[0])
    for _ in range(2):
        context.cut(N - 1), context.step(prompts[0][-1], "slow")
    for il in LAYERS:
        s = context.engine.stability(il, 0)
        assert s.jaccard == 1.0 and s.mass_prev == pytest.approx(s.mass, abs=1e-6)


def test_without_a_refresh_there_is_nothing_to_see(opened):
    from sfi_local.errors import NoSupportError

    context = opened()
    for look in (context.engine.selected, context.engine.stability):
        with pytest.raises(NoSupportError, match="prefill, or take a slow step"):
            look(0, 0)


def test_the_window_policy_selects_nothing(opened, prompts, small):
    from sfi_local.errors import NoSupportError

    context = opened(small.replace(policy="window"))
    context.prefill(prompts[0])
    assert took(context.step(1)) == ("fast", "") and context.step(2).n_cells == 4 + 32  # it slides
    with pytest.raises(NoSupportError, match="window"):
        context.engine.selected(0, 0)


def test_a_stopped_prefill_keeps_its_tokens_and_the_next_step_is_slow(opened, prompts):
    from sfi_local.errors import AbortedError

    context = opened(n_batch=64, n_ubatch=64)
    with pytest.raises(AbortedError, match="64 of 200"):
        context.prefill(prompts[0], progress=lambda done, total: False)
    assert took(context.step(1)) == ("slow", "first")
    context.engine.prefill(prompts[0][65:])
    assert context.step(2, "fast").pos == N


# ---- the schedule -----------------------------------------------------------------------------------------------------


def test_peek_says_what_step_will_do(opened, prompts, small):
    context = opened(small.replace(boundary=True, auto_depth=N + 5))
    context.prefill(prompts[0])
    for token in b"One. Two! And three; four. " * 4:
        expected = context.peek(token)
        assert context.peek(token) == expected == took(context.step(token))
    assert set(context.engine.stats().reasons) == {"short", "first", "boundary", "max_span"}


def test_on_a_cpu_a_short_step_is_a_dense_one(opened, prompts, small):
    """On a GPU it is llama.cpp's own attention, which rounds otherwise."""
    short, dense = opened(small.replace(auto_depth=1000)), opened()
    for context in (short, dense):
        context.prefill(prompts[0])
    assert np.array_equal(short.steps(range(10)), dense.steps(range(10), "dense"))
    assert set(short.engine.stats().reasons) == {"short"}


# ---- refusals ---------------------------------------------------------------------------------------------------------


BAD = [("policy", 4), ("sketch_k1", 4), ("sketch_v4", 8), ("sketch_first", 1), ("second_look", -1.0), ("second_look", math.nan),
       ("selector", 2), ("n_sink", -1), ("n_recent", 15), ("n_recent", 1 << 30), ("n_selected", 0),
       ("max_span", 0), ("min_span", -1), ("auto_depth", -2), ("n_queries", 0), ("n_queries", 65), ("pool_after", -1),
       ("pool_before", 1 << 20), ("nms_radius", -1), ("alpha", 0.0), ("alpha", math.nan), ("temperature", -1.0),
       ("lambda_clip", 1.5), ("lambda_clip", math.nan), ("struct_size", 8)]


@pytest.mark.parametrize("name, value", BAD)
def test_a_parameter_out_of_range_is_refused_by_name(opened, native, name, value):
    from sfi_local.binding.engine import _default_structs, _struct_of

    context = opened()
    context.engine.close()
    sfi, address = native.ffi.new("struct sfi **"), native.ffi.cast("struct llama_context *", context.address)
    params, research = _default_structs("frozen")
    params.research = research
    setattr(_struct_of(name, params, research), name, value)
    assert native.lib.sfi_attach(address, params, sfi) == native.lib.SFI_ERR_ARGUMENT
    assert sfi[0] == native.ffi.NULL and name in native.ffi.string(native.lib.sfi_last_error()).decode()
    assert native.lib.sfi_attach(address, native.ffi.NULL, sfi) == 0
    native.lib.sfi_free(sfi[0])


@pytest.mark.parametrize("name", ["gamma", "beta", "p", "eta", "a_soft", "a_cross"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1e30])
def test_whatever_the_constants_of_a_selector_its_cells_are_candidates(opened, prompts, small, name, value):
    from sfi_local.errors import ArgumentError

    try:
        context = opened(small.replace(selector="paper", **{name: value}))
    except ArgumentError:
        return
    context.prefill(prompts[0])
    cells = context.engine.selected(3, 1)[0]
    assert len(set(cells)) == small.n_selected and min(cells) >= 4 and max(cells) < N - 32


@pytest.mark.parametrize("settings, error, words", [
    (dict(n_seq=2, kv_unified=True), "ContextError", "kv_unified = false"),
    (dict(flash_attn_type=0), "ContextError", "flash_attn_type"),
    (dict(embeddings=True), "ContextError", "without embeddings"),
    (dict(kv=6), "KvTypeError", "q5_0"),
    (dict(type_v=20), "KvTypeError", "iq4_nl"),
    (dict(type_k=3), "KvTypeError", "q4_1"),
])
def test_a_context_that_rules_it_out_is_refused_with_the_remedy(open_context, tiny_weights, small, settings, error, words):
    from sfi_local import errors
    from sfi_local.binding.engine import Engine

    context = open_context(tiny_weights, None, **settings)
    with pytest.raises(getattr(errors, error), match=words):
        Engine(context.address, small)
    context.decode([1, 2, 3])


def test_a_second_engine_is_refused_until_the_first_is_closed(opened, small):
    from sfi_local.binding.engine import Engine
    from sfi_local.errors import ArgumentError

    context = opened()
    with pytest.raises(ArgumentError, match="attached"):
        Engine(context.address, small)
    context.engine.close()
    Engine(context.address, small).close()


@pytest.mark.parametrize("token", [-1, 260, 1 << 30, -(1 << 31)])
def test_a_token_outside_the_vocabulary_is_refused(ready, token):
    from sfi_local.errors import ArgumentError

    for call in (ready.step, ready.peek, lambda t: ready.prefill([1, t])):
        with pytest.raises(ArgumentError, match=str(token)):
            call(token)
    assert ready.step(1).depth == N + 2


@pytest.mark.parametrize("seq", [-1, 2, 1 << 30])
def test_a_sequence_that_does_not_exist_is_refused(ready, seq):
    from sfi_local.errors import ArgumentError

    for call in (lambda: ready.step(1, seq=seq), lambda: ready.prefill([1], seq=seq), lambda: ready.engine.peek(1, seq),
                 lambda: ready.engine.invalidate(seq), lambda: ready.engine.stability(0, 0, seq)):
        with pytest.raises(ArgumentError, match=str(seq)):
            call()


def test_what_does_not_fit_is_refused_and_nothing_is_lost(opened, prompts):
    from sfi_local.errors import ContextFullError

    context = opened(n_ctx=256)
    context.prefill(prompts[0])
    with pytest.raises(ContextFullError, match="57 tokens .* 256 cells .* 200"):
        context.prefill(prompts[1][:57])
    assert took(context.step(1, "fast")) == ("fast", "forced")
    context.prefill(prompts[1][:55])
    for kind in ("auto", "fast", "slow", "dense"):
        with pytest.raises(ContextFullError):
            context.step(1, kind)
    context.cut(N)
    assert context.step(1).depth == N + 1


def test_a_freed_context_detaches_its_engine(opened, prompts):
    from sfi_local.errors import DetachedError

    context = opened()
    context.prefill(prompts[0]), context.step(1)
    context.free_context()
    for call in (context.engine.step, context.engine.prefill, context.engine.peek):
        with pytest.raises(DetachedError, match="freed"):
            call([1] if call == context.engine.prefill else 1)
    context.engine.close()


def test_of_two_threads_one_is_refused_and_every_token_counts_once(ready):
    from sfi_local.errors import BusyError

    done, refused = [], []

    def work(token):
        for _ in range(60):
            try:
                done.append(ready.engine.step(token).depth)
            except BusyError:
                refused.append(token)

    threads = [threading.Thread(target=work, args=(token,)) for token in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) + len(refused) == 120
    assert sorted(done) == list(range(N + 2, N + 2 + len(done)))


CLOSE_WITHIN = """
import sys
from sfi_local.binding.library import open_library
sys.path.insert(0, {tests!r})
from support.contexts import Context, load_weights
from sfi_local import SfiParams
with load_weights(open_library(), {model!r}) as weights:
    context = Context(open_library(), weights, SfiParams.of("frozen", n_recent=32, n_selected=32))
    context.prefill([1] * 600, progress=lambda done, total: context.engine.close())
    context.free_context()
"""


def test_an_engine_may_be_closed_while_it_works(tiny):
    """In a process of its own, because it may crash; a second thread that closes does the same."""
    code = CLOSE_WITHIN.format(tests=str(Path(__file__).parents[1]), model=str(tiny))
    done = subprocess.run([sys.executable, "-c", code], env=cli_env(), capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 1), done.stderr

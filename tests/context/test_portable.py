"""The portable path: the support of layers whose device has ggml's own operations only, here on the CPU by force."""

import json
import pydoc_data.topics
from pathlib import Path

import numpy as np
import pytest
from support import reference as ref
from support.contexts import ROW_KINDS, Watch, attend_to, load_weights, node_rows, values_of, write_sliding
from support.supports import EDITS, HEADS, LAYERS, N, check_interleaved, took

# Of logits, to a step of another kernel over the same cells: stock on a CPU rounds q to the type of K, or to Q8_0. With the
# cells of another KV head they differ by several times as much.
CLOSE = {"f32": 0.06, "f16": 0.06, "bf16": 0.1, "q8_0": 0.15, "q4_0": 0.8}
NEAR = 0.01  # of evidence, relative: the dense steps before it were of other kernels


@pytest.fixture
def opened(open_context, tiny_weights, small, monkeypatch):
    """opened(params, settings of the context): on the portable path, or on the native one if that is asked for"""
    def make(params=None, native=False, **settings):
        monkeypatch.setenv("SFI_PORTABLE_PATH", "0" if native else "1")
        return open_context(tiny_weights, params or small, **settings)
    return make


def support(context, always):
    """{layer: [cells of a KV head]}: always and what was selected"""
    return {il: [np.append(always, context.engine.selected(il, h)[0]) for h in HEADS] for il in LAYERS}


# ---- what a fast step attends to --------------------------------------------------------------------------------------


def test_fast_steps_are_flash_attention_over_the_compact_cache(opened, prompts, small):
    context = opened(watch=Watch("portable_attn"))
    assert {layer.path for layer in context.engine.layers()} == {context.engine.path} == {"portable"}
    context.prefill(prompts[0])
    assert context.watch.seen == []
    assert context.step(1).kind == "fast"
    assert context.watch.seen == [(il, "FLASH_ATTN_EXT") for il in LAYERS]


@pytest.mark.parametrize("n_ctx", [512, 4096])
def test_a_fast_step_reads_no_more_where_there_is_more(opened, prompts, n_ctx):
    sizes = []
    context = opened(n_ctx=n_ctx, watch=Watch("portable_attn"))
    context.watch.replace = lambda il, node: sizes.append(node.src[1].contents.ne[1]) or node_rows(node)[1].view(np.float32)
    context.prefill(prompts[0] + prompts[1][:n_ctx // 10]), context.step(1)
    assert sizes == [256] * len(LAYERS)


@pytest.mark.parametrize("kv", ROW_KINDS)
def test_a_fast_step_equals_attention_masked_to_its_support(opened, prompts, small, kv):
    fast, dense = opened(small, kv=kv), opened(small, native=True, kv=kv, watch=Watch("sparse_attn"))
    fast.prefill(prompts[0]), dense.set_state(fast.state())
    logits = []
    for i, token in enumerate((1, 2, 3)):
        assert fast.step(token, "fast").kind == "fast"
        always = np.r_[0:4, N - 32:N + i + 1]
        cells = support(fast, always)
        dense.watch.replace = lambda il, node: attend_to(node, cells[il])
        dense.step(token, "dense")
        logits.append((fast.logits(), dense.logits()))
    assert max(np.abs(a - b).max() for a, b in logits) < CLOSE[kv]
    dense.cut(N + 2)
    dense.watch.replace = lambda il, node: attend_to(node, cells[il][::-1])  # of the other head
    assert np.abs(dense.steps([3], "dense")[0] - logits[-1][0]).max() > 1.5 * CLOSE[kv]


@pytest.mark.parametrize("kv", ROW_KINDS)
def test_the_compact_cache_holds_the_rows_of_the_cells(opened, prompts, small, kv):
    """Bit for bit, but that F32 becomes F16 as it does in stock attention: blocks that are coded again stay as they were."""
    ours, theirs = opened(kv=kv, watch=Watch("portable_attn")), opened(native=True, kv=kv, watch=Watch("sparse_attn"))
    rows = {}

    def look(il, node):
        attn = node if node.src[2] else node.src[0].contents
        rows[il] = [(kind, data.copy()) for kind, data in (node_rows(attn.src[i].contents) for i in (1, 2))]
        return node_rows(node)[1].view(np.float32)

    ours.watch.replace = theirs.watch.replace = look
    ours.prefill(prompts[0]), theirs.set_state(ours.state())
    ours.step(1, "fast")
    compact, rows = rows, {}
    theirs.step(1, "dense")
    always = np.r_[0:4, N - 32:N]
    slots = np.r_[0:4, 4 + (np.arange(N - 32, N) - 4) % 40]
    for il in LAYERS:
        for (kind, held), (_, cache) in zip(compact[il], rows[il]):
            for h in HEADS:
                cells = np.r_[ours.engine.selected(il, h)[0], always]
                mine, there = held[h][np.r_[0:24, 24 + slots]], cache[h][cells]
                if kv == "f32":
                    mine, there = mine.view(np.float16), there.view(np.float32).astype(np.float16)
                assert kind == ("f16" if kv == "f32" else kv) and np.array_equal(mine, there)


@pytest.mark.parametrize("kv", ROW_KINDS)
def test_a_budget_of_everything_gives_the_logits_of_stock(opened, prompts, small, kv):
    """Over a slow step in the middle, and dense ones, whose cells the next fast step must find."""
    ours, stock = opened(small.replace(n_selected=N), kv=kv), opened(kv=kv)
    ours.prefill(prompts[0]), stock.decode(prompts[0])
    for i, kind in enumerate(["fast"] * 3 + ["dense"] * 2 + ["fast"] * 2 + ["slow"] + ["fast"] * 4):
        info = ours.step(i, kind)
        assert (info.kind, info.n_cells) == (kind, N + i + 1)
        assert np.abs(ours.logits() - stock.decode([i])).max() < CLOSE[kv]


@pytest.mark.parametrize("n", [1, 3, 4, 5, 35, 36, 37, 60])
def test_a_prompt_shorter_than_the_support_is_attended_to_as_a_whole(opened, prompts, n):
    ours, stock = opened(), opened()
    ours.prefill(prompts[0][:n]), stock.decode(prompts[0][:n])
    for token in range(6):
        info = ours.step(token, "fast")
        assert (info.kind, info.n_cells) == ("fast", info.depth)
        assert np.abs(ours.logits() - stock.decode([token])).max() < CLOSE["f16"]


def test_a_sequence_may_begin_with_a_step(opened):
    ours, stock = opened(), opened()
    for token in range(12):
        assert ours.step(token).kind == ("slow" if token in (0, 9) else "fast")
        assert np.abs(ours.logits() - stock.decode([token])).max() < CLOSE["f16"]


def test_a_prefill_after_a_support_keeps_or_replaces_it(opened, prompts, small):
    """Without a refresh the new cells join the window; what does not fit makes the next step slow."""
    ours, stock = opened(small.replace(n_selected=N, auto_depth=1000)), opened()
    ours.prefill(prompts[0]), stock.decode(prompts[0])
    ours.step(1, "slow"), stock.decode([1])
    ours.prefill([2, 3, 4]), stock.decode([2, 3, 4])
    assert ours.step(5, "fast").kind == "fast"
    assert np.abs(ours.logits() - stock.decode([5])).max() < CLOSE["f16"]
    ours.prefill([6] * 20)
    assert took(ours.step(7, "fast")) == ("slow", "max_span")


def test_the_window_policy_attends_to_always(opened, prompts, small):
    params = small.replace(policy="window")
    fast, dense = opened(params), opened(params, native=True, watch=Watch("sparse_attn"))
    for context in (fast, dense):
        context.prefill(prompts[0])
    dense.watch.replace = lambda il, node: attend_to(node, [np.r_[0:4, N + 1 - 32:N + 1]] * 2)
    fast.step(1, "fast"), dense.step(1, "dense")
    assert np.abs(fast.logits() - dense.logits()).max() < CLOSE["f16"]
    assert fast.engine.memory() < 1 << 20


def test_layers_with_a_sliding_window_stay_as_they_are(native, open_context, small, prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("SFI_PORTABLE_PATH", "1")
    with load_weights(native, write_sliding(tmp_path / "sliding.gguf")) as weights:
        ours, stock = (open_context(weights, params, watch=Watch("portable_attn")) for params in (small.replace(n_selected=N), None))
        assert [layer.path for layer in ours.engine.layers()] == ["none"] * 3 + ["portable"]
        ours.prefill(prompts[0]), stock.decode(prompts[0])
        ours.step(1, "fast")
        assert ours.watch.seen == [(3, "FLASH_ATTN_EXT")]
        assert np.abs(ours.logits() - stock.decode([1])).max() < CLOSE["f16"]
        ours.close(), stock.close()


# ---- selection --------------------------------------------------------------------------------------------------------


class Look(Watch):
    """Of each native attention of a step: queries [layer][step], and the keys and cells of the last."""

    def __init__(self):
        super().__init__("sparse_attn")
        self.queries, self.keys, self.cells = [[] for _ in LAYERS], {}, {}

    def on_node(self, il, node):
        attn = node if node.src[2] else node.src[0].contents  # a slow step's attention is a view of a larger result
        self.queries[il].append(ref.dequantise("f32", node_rows(attn.src[0].contents)[1])[:, 0])
        kind, rows = node_rows(attn.src[1].contents)
        self.keys[il], self.cells[il] = ref.dequantise(kind, rows), values_of(attn.src[3].contents)


def edited(context, prompts):
    """Some positions are gone, and their cells hold later ones."""
    context.cut(60, 90), context.prefill(prompts[1][:60])


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("after, before", [(0, 0), (16, 2), (2, 16), (5, 5)])
def test_a_slow_step_selects_what_the_native_path_selects(opened, prompts, small, after, before, in_order):
    params = small.replace(n_queries=16, pool_after=after, pool_before=before)
    ours, theirs = opened(params, kv="f32"), opened(params, native=True, kv="f32", watch=Look())
    ours.prefill(prompts[0])
    if not in_order:
        edited(ours, prompts)
    theirs.set_state(ours.state())
    for context in (ours, theirs):
        context.steps(range(6), "dense"), context.step(7, "slow")
    n = theirs.step(0, "dense").depth - 1
    for il in LAYERS:
        cells, (j0, j1) = theirs.watch.cells[il][:n], ref.candidates(n, params.n_sink, params.n_recent)
        assert in_order == (cells == np.arange(n)).all()
        q = np.array(theirs.watch.queries[il][:7])[-1:]
        evidence = ref.evidence(q, theirs.watch.keys[il], cells, j0, j1, [n], q.shape[-1]**-0.5)
        score = ref.pool(evidence, j0, j1, after, before)
        for h in HEADS:
            of = dict(zip(cells[j0:j1], score[h]))
            best = np.sort(score[h])[::-1][:params.n_selected]
            mine = ours.engine.selected(il, h)[0]
            assert len(set(mine)) == params.n_selected
            assert np.allclose(np.sort([of[c] for c in mine])[::-1], best, rtol=NEAR)  # ties aside
            assert after + before or set(mine) == set(theirs.engine.selected(il, h)[0])


def test_a_prefill_selects_what_the_native_path_selects(opened, prompts, small):
    params = small.replace(pool_after=0, pool_before=0)
    ours, theirs = opened(params, kv="f32", n_ubatch=64), opened(params, native=True, kv="f32", n_ubatch=64)
    for context in (ours, theirs):
        context.prefill(prompts[0])
    for il in LAYERS:
        for h in HEADS:
            assert set(ours.engine.selected(il, h)[0]) == set(theirs.engine.selected(il, h)[0])


def test_selected_cells_are_unique_candidates(opened, prompts, small):
    context = opened()
    context.prefill(prompts[0])
    edited(context, prompts)
    candidates = [*range(60), *range(90, N + 60)][small.n_sink:-small.n_recent]
    for il in LAYERS:
        for h in HEADS:
            cells, positions = context.engine.selected(il, h)
            assert len(cells) == len(set(cells)) == len(set(positions)) == small.n_selected
            assert set(positions) <= set(candidates)


def test_a_selection_of_every_candidate_is_every_candidate_once(opened, prompts, small):
    context = opened(small.replace(n_selected=N))
    context.prefill(prompts[0])
    for il in LAYERS:
        assert sorted(context.engine.selected(il, 0)[1]) == list(range(small.n_sink, N - small.n_recent))
        stability = context.engine.stability(il, 0)
        assert (stability.mass, stability.n_selected) == (pytest.approx(1.0, abs=1e-6), N - 36)


def test_stability_is_that_of_the_native_path(opened, prompts, small):
    params = small.replace(pool_after=0, pool_before=0)
    ours, theirs = opened(params, kv="f32"), opened(params, native=True, kv="f32")
    for context in (ours, theirs):
        context.prefill(prompts[0])
    for i in range(3):
        for il in LAYERS:
            for h in HEADS:
                a, b = (context.engine.stability(il, h) for context in (ours, theirs))
                assert a.n_selected == b.n_selected and (a.evidence, a.mass) == pytest.approx((b.evidence, b.mass), rel=NEAR)
                assert (a.mass_prev, a.jaccard) == pytest.approx((b.mass_prev, b.jaccard), rel=NEAR, nan_ok=True)
                assert np.isnan(a.jaccard) == (i == 0)
        for context in (ours, theirs):
            context.step(7, "slow")


# ---- validity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_the_cache_makes_the_next_step_slow(ready, opened, edit):
    """And then fast steps are those of a fresh context that was given the edited state."""
    from sfi_local.errors import NoSupportError

    EDITS[edit](ready)
    with pytest.raises(NoSupportError, match="slow step first"):
        ready.step(2, "fast")
    slow, fresh = ready.step(2), opened(n_seq=2, n_ctx=512)
    assert took(slow) == ("slow", "invalidated")
    logits = ready.logits()
    fresh.set_state(ready.state())
    fresh.cut(slow.pos)
    assert np.abs(fresh.steps([2], "slow")[0] - logits).max() < CLOSE["f16"]
    for token in (3, 4):
        assert ready.step(token).kind == "fast" == fresh.step(token).kind
        assert np.abs(ready.logits() - fresh.logits()).max() < CLOSE["f16"]


@pytest.mark.parametrize("policy, n, kept", [("frozen", 3, True), ("frozen", 36, True), ("frozen", 37, False), ("window", 3, True), ("window", 9, False)])
def test_tokens_taken_back_leave_no_trace(opened, prompts, small, policy, n, kept):
    """Of a sliding window only as many as its rows outlast."""
    params = small.replace(policy=policy)
    ours, other = opened(params), opened(params)
    for context in (ours, other):
        context.prefill(prompts[0])
        context.steps([1, 2, 3, 4] if policy == "frozen" else range(1, 13), "fast")
    depth = N + (4 if policy == "frozen" else 12)
    ours.engine.rollback(n)
    assert took(ours.step(9, "auto" if not kept else "fast")) == (("fast", "forced") if kept else ("slow", "invalidated"))
    if kept and n == 3:
        other.engine.rollback(2), other.engine.rollback(1)
        assert depth - n + 1 == other.step(9, "fast").depth
        assert np.array_equal(ours.logits(), other.logits())


# ---- a real model -----------------------------------------------------------------------------------------------------


def test_a_real_model_stays_close_to_the_native_path(native, open_context, smollm2, monkeypatch):
    from sfi_local import SfiParams

    params, series = SfiParams.of("frozen", n_recent=64, n_selected=128), {}
    with load_weights(native, smollm2) as weights:
        text = tokens_of(native, weights, 700)
        for forced in ("0", "1"):
            monkeypatch.setenv("SFI_PORTABLE_PATH", forced)
            context = open_context(weights, params, n_threads=2)
            context.prefill(text[:600])
            series[context.engine.path] = context.steps(text[600:648])
            assert context.engine.stats().n_fast > 40
            context.close()
    assert kl(series["native"], series["portable"]) < 0.03  # 0.003 is the noise of dense; the support costs 0.1
    assert (series["native"].argmax(axis=1) == series["portable"].argmax(axis=1)).mean() > 0.9


def tokens_of(native, weights, n):
    """English prose with markup, which every Python brings along."""
    llama, prose = native.llama_cpp, Path(pydoc_data.topics.__file__).read_bytes()[:6000]
    tokens = (llama.llama_token * len(prose))()
    llama.llama_tokenize(llama.llama_model_get_vocab(weights), prose, len(prose), tokens, len(tokens), True, True)
    return list(tokens[:n])


def kl(a, b):
    """Mean KL divergence of two series of next-token distributions, from logits [n, n_vocab]."""
    p, q = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (a.astype(np.float64), b.astype(np.float64)))
    return (np.exp(p) * (p - q)).sum(axis=1).mean()


# ---- refusals and what the user is told -------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, words", [
    (dict(policy="sketch"), "policy frozen"), (dict(policy="oracle"), "policy frozen"), (dict(selector="paper"), "selector topk")])
def test_what_needs_our_operations_is_refused_with_what_works(opened, small, changes, words):
    from sfi_local.errors import BackendError

    with pytest.raises(BackendError, match=words):
        opened(small.replace(**changes))
    context = opened()
    with pytest.raises(BackendError, match=words):
        context.engine.params = small.replace(**changes)
    assert context.step(1).kind == "slow"


def test_a_batch_verifies_nothing(ready):
    from sfi_local.errors import BackendError

    with pytest.raises(BackendError, match="dense steps"):
        ready.engine.verify([1, 2], 1)
    assert ready.step(2).kind == "fast"


def test_run_takes_the_policy_that_works_unless_one_was_typed(cli, tiny):
    words = ("run", tiny, "-p", "word " * 60, "-n", 12, "--temp", 0, "--mode", "sfi", "-t", 1, "--json")
    out = json.loads(cli(*words, SFI_PORTABLE_PATH="1").stdout)
    assert (out["path"], out["support"]) == ("portable", "frozen") and out["steps"]["fast"] > 5
    assert any("frozen" in note and "sketch" in note for note in out["notes"])
    small = json.loads(cli(*words, "--set", "n_selected=64,n_recent=32", SFI_PORTABLE_PATH="1").stdout)
    assert small["budget"] == 4 + 32 + 64  # what was typed, even where it is the other policy's default
    typed = cli(*words, "--set", "policy=sketch", SFI_PORTABLE_PATH="1")
    assert typed.returncode == 1 and b"policy frozen" in typed.stderr
    plain = json.loads(cli(*words).stdout)
    assert (plain["path"], plain["support"], plain["notes"]) == ("native", "sketch", [])


def test_mode_exact_is_refused_before_the_prompt(cli, tiny):
    done = cli("run", tiny, "-p", "Hello", "-n", 4, "--mode", "exact", "-t", 1, SFI_PORTABLE_PATH="1")
    assert done.returncode == 1 and b"mode dense" in done.stderr


def test_llama_of_one_changed_import_falls_to_frozen_too(tiny, monkeypatch):
    monkeypatch.setenv("SFI_PORTABLE_PATH", "1")
    from sfi_local import SlowFastLlama

    llm = SlowFastLlama(str(tiny), mode="sfi", n_ctx=1024, n_threads=1, n_threads_batch=1)
    llm.create_completion("The quick brown fox. " * 12, max_tokens=12, temperature=0)
    assert (llm.engine.path, llm.engine.params.policy) == ("portable", "frozen") and llm.steps.n_fast > 5
    llm.close()


def test_doctor_names_the_path_of_each_policy(cli):
    facts = {forced: json.loads(cli("doctor", "--json", SFI_PORTABLE_PATH=forced).stdout)["devices"]["CPU"] for forced in "01"}
    assert "frozen native" in facts["0"] and "sketch native" in facts["0"] and "sketch_scan" in facts["0"]
    assert "frozen portable" in facts["1"] and "window portable" in facts["1"] and "sketch refused" in facts["1"]


def test_interleaved_sequences_decode_as_each_would_alone(opened, prompts):
    check_interleaved(opened, prompts)

"""Steps on a context, as equivalences: which kinds agree, what makes a step slow, and that nothing can be got wrong."""

import gc
import math
import threading

import numpy as np
import pytest

from sfi_local import SfiParams
from sfi_local.errors import ArgumentError, BusyError, ContextError, ContextFullError, DetachedError, KvTypeError, NoSupportError

TEXT = [72, 101, 108, 108, 111, 46, 32] * 60  # 420 byte tokens of "Hello. "
SMALL = SfiParams.of("frozen", n_sink=4, n_recent=32, n_selected=40, max_span=12, min_span=2)
EVERYTHING = SfiParams.of("frozen", n_sink=4, n_recent=64, n_selected=1900, max_span=12, min_span=2)


@pytest.fixture(scope="module")
def weights(tiny):
    from sfi_local import load

    with load(tiny, n_threads=1) as model:
        yield model.weights


@pytest.fixture
def session(weights):
    """Make slots of 2048 cells, one thread; they are closed at the end of the test."""
    from sfi_local.binding.context import maker
    from sfi_local.runtime.slot import Slot

    made = []

    def make(mode="sfi", params=SMALL, n_ctx=2048, kv="f16"):
        made.append(Slot(maker(weights, 1, kv, kv), n_ctx, mode, params))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def plain_attention(weights):
    """A stock slot of F32 K and V that multiplies matrices instead of using flash attention."""
    from llama_cpp import _internals
    from llama_cpp import llama_cpp as llama

    from sfi_local.runtime.slot import Slot

    def without_flash(n_ctx):
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = n_ctx, 1, 1
        params.flash_attn_type, params.type_k, params.type_v = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED, 0, 0
        return _internals.LlamaContext(model=weights, params=params, verbose=True)

    one = Slot(without_flash, 2048, "stock", SMALL)
    yield one
    one.close()


def logits(session):
    n = session.context.model.n_vocab()
    return np.ctypeslib.as_array(session.context.get_logits_ith(-1), shape=(n,)).copy()


def decode(session, n, schedule=None):
    """Greedy tokens after TEXT; returns them and the StepInfos."""
    session.prefill(TEXT[len(session.tokens):])
    tokens, infos = [], []
    for _ in range(n):
        tokens.append(int(logits(session).argmax()))
        infos.append(session.step(tokens[-1], schedule))
    return tokens, infos


def close(a, b):
    return np.abs(a - b).max() < 1e-3


# ---- equivalences ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kv", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_dense_follows_stock(session, kv):
    dense, stock = session("dense", kv=kv), session("stock", kv=kv)
    for one in (dense, stock):
        one.prefill(TEXT)
    for token in [1, 2, 3, 46, 32, 65] * 3:
        dense.step(token), stock.step(token)
        near = 0.15 if kv == "q4_0" else 0.1  # stock rounds queries to 8 bits where K is quantised
        assert np.abs(logits(dense) - logits(stock)).max() < near * logits(stock).std()


def test_dense_equals_attention_without_flash_where_stock_flash_attention_is_coarser(weights, session, plain_attention):
    dense, stock, plain = session("dense", kv="f32"), session("stock", kv="f32"), plain_attention
    for token in TEXT[:100]:
        for one in (dense, stock):
            one.step(token)
        plain.step(token)
    error = np.abs(logits(dense) - logits(plain)).max()
    assert error < 1e-4 and error <= np.abs(logits(stock) - logits(plain)).max()


def test_a_budget_of_everything_gives_the_tokens_of_dense(session):
    tokens, infos = decode(session("sfi", EVERYTHING), 60)
    assert tokens == decode(session("dense"), 60)[0]
    assert sum(info.kind == "fast" for info in infos) > 40


def test_a_slow_step_equals_a_dense_step(session):
    slow, dense = session(), session("dense")
    for one in (slow, dense):
        one.prefill(TEXT)
    for token in (5, 6, 7):
        slow.step(token, lambda *_: "slow"), dense.step(token)
        assert close(logits(slow), logits(dense))


def test_a_small_budget_changes_the_logits_and_reads_less(session):
    sparse, dense = session(), session("dense")
    decode(sparse, 1), decode(dense, 1)
    assert not close(logits(sparse), logits(dense))
    assert sparse.engine.stats().kv_read_share < 0.25


def test_window_keeps_no_selected_cells(session):
    window = session(params=SMALL.replace(policy="window"))
    _, infos = decode(window, 3)
    assert {info.kind for info in infos} == {"fast"}
    assert infos[0].n_cells <= SMALL.n_sink + SMALL.n_recent + 1 + SMALL.max_span


def test_two_threads_of_ggml_equal_one(weights, session):
    from sfi_local.binding.context import maker
    from sfi_local.runtime.slot import Slot

    one, two = session(), Slot(maker(weights, 2), 2048, "sfi", SMALL)
    assert decode(one, 30)[0] == decode(two, 30)[0]
    two.close()


# ---- the schedule ----------------------------------------------------------------------------------------------------

def test_spans_are_bounded_and_every_slow_step_has_a_reason(session):
    one = session(params=SMALL.replace(boundary=False))
    _, infos = decode(one, 40)
    kinds = [info.kind for info in infos]
    assert kinds == (["fast"] * 12 + ["slow"]) * 3 + ["fast"]
    assert [info.reason for info in infos if info.kind == "slow"] == ["max_span"] * 3
    assert one.engine.stats().reasons == {"max_span": 3}


def test_a_boundary_makes_the_next_content_token_slow(session):
    one = session(params=SMALL.replace(max_span=1000))
    one.prefill(TEXT[:-2])
    kinds = [one.step(token).kind for token in b"go on now. And then"]
    assert kinds.count("slow") == 1 and kinds[11] == "slow"  # the A of And


def test_peek_says_what_step_will_do(session):
    one = session()
    one.prefill(TEXT)
    for token in b"one. Two. Three. Four and five and six and seven":
        expected, info = one.engine.peek(token), one.step(token)
        assert expected == (info.kind, info.reason)


def test_a_python_schedule_overrules(session):
    seen = []

    def every_third(pos, token, kind, reason):
        seen.append((pos, token, kind))
        return "slow" if pos % 3 == 0 else "fast"

    tokens, infos = decode(session(), 12, every_third)
    assert [info.kind for info in infos] == ["slow" if info.pos % 3 == 0 else "fast" for info in infos]
    assert [pos for pos, _, _ in seen] == [info.pos for info in infos]
    assert [token for _, token, _ in seen] == tokens


def test_auto_is_dense_while_short(session):
    _, infos = decode(session("auto", SMALL.replace(n_selected=400)), 3)
    assert {(info.kind, info.reason) for info in infos} == {("dense", "short")}
    _, infos = decode(session("auto", SMALL), 3)
    assert {info.kind for info in infos} <= {"fast", "slow"}


# ---- validity of the support -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("edit", ["rm tail", "rm middle", "shift", "clear", "invalidate", "foreign decode"])
def test_any_edit_makes_the_next_step_slow(session, edit):
    one = session()
    decode(one, 3)
    llama, memory = one._llama, one._memory
    {
        "rm tail": lambda: llama.llama_memory_seq_rm(memory, 0, len(one.tokens) - 1, -1),
        "rm middle": lambda: llama.llama_memory_seq_rm(memory, 0, 100, 200),
        "shift": lambda: llama.llama_memory_seq_add(memory, 0, 200, -1, 5),
        "clear": lambda: llama.llama_memory_clear(memory, True),
        "invalidate": one.engine.invalidate,
        "foreign decode": lambda: one._decode([7]),
    }[edit]()
    info = one.engine.step(65)
    assert (info.kind, info.reason) in {("slow", "invalidated"), ("slow", "first")}


def test_removing_nothing_is_harmless(session):
    one = session()
    decode(one, 1)
    one._llama.llama_memory_seq_rm(one._memory, 0, len(one.tokens), -1)
    assert one.step(65).kind == "fast"


def test_a_state_that_was_saved_and_loaded_starts_slow(session):
    one = session()
    decode(one, 5)
    size = one._llama.llama_state_get_size(one.context.ctx)
    buffer = (one._llama.ctypes.c_uint8 * size)()
    one._llama.llama_state_get_data(one.context.ctx, buffer, size)
    one._llama.llama_state_set_data(one.context.ctx, buffer, size)
    assert one.step(65).kind == "slow"


# ---- inspection ------------------------------------------------------------------------------------------------------

def test_selected_cells_are_distinct_candidates(session):
    one = session()
    one.prefill(TEXT)
    for layer in range(4):
        for head in range(2):
            cells, positions = one.engine.selected(layer, head)
            assert len(set(cells)) == len(cells) == SMALL.n_selected
            assert min(positions) >= SMALL.n_sink and max(positions) < len(TEXT)


def test_stability_compares_with_the_set_before(session):
    one = session()
    one.prefill(TEXT)
    first = one.engine.stability(0, 0)
    one.step(65, lambda *_: "slow")
    second = one.engine.stability(0, 0)
    assert math.isnan(first.jaccard) and 0 <= second.jaccard <= 1
    assert 0 < second.mass <= 1 and second.mass_prev <= second.mass + 1e-6


def test_stats_count_every_step_and_can_be_reset(session):
    one = session()
    _, infos = decode(one, 30)
    stats = one.engine.stats()
    assert (stats.n_slow, stats.n_fast) == tuple(sum(i.kind == k for i in infos) for k in ("slow", "fast"))
    assert stats.n_prefill == len(TEXT) and 0 < stats.kv_read < stats.kv_dense
    one.engine.reset_stats()
    assert one.engine.stats().n_fast == 0 and one.engine.stats().kv_read_share == 1.0


def test_parameters_can_be_changed_and_the_next_step_is_slow(session):
    one = session()
    decode(one, 2)
    one.engine.params = SMALL.replace(n_selected=80)
    assert one.engine.params.n_selected == 80
    assert one.step(65).kind == "slow"
    assert one.step(66).n_cells > SMALL.budget


# ---- refusals --------------------------------------------------------------------------------------------------------

def test_a_fast_step_without_support_is_refused(session):
    one = session()
    with pytest.raises(NoSupportError):
        one.step(65, lambda *_: "fast")
    assert one.tokens == []
    with pytest.raises(NoSupportError):
        one.engine.selected(0, 0)


def test_a_full_context_is_a_sentence_and_stays_usable(session):
    one = session(n_ctx=512, params=SMALL)
    one.prefill(TEXT)
    with pytest.raises(ContextFullError, match="512"):
        one.prefill(TEXT)
    for token in range(512 - len(TEXT)):
        one.step(token % 250)
    with pytest.raises(ContextFullError, match="full"):
        one.step(1)
    one.reuse(TEXT)
    assert one.step(1).kind == "slow"


@pytest.mark.parametrize("call", [lambda e: e.step(100_000), lambda e: e.step(-1), lambda e: e.step(1, seq=1),
                                  lambda e: e.prefill([]), lambda e: e.selected(99, 0), lambda e: e.stability(0, 99)])
def test_arguments_out_of_range_are_refused(session, call):
    one = session()
    one.prefill(TEXT)
    with pytest.raises(ArgumentError):
        call(one.engine)


def test_two_engines_on_one_context_are_refused(session):
    from sfi_local import Engine

    with pytest.raises(ArgumentError):
        Engine(session().context.ctx)


def test_kv_types_without_a_kernel_are_refused(weights):
    from sfi_local.binding.context import GGML_TYPES, maker
    from sfi_local.runtime.slot import Slot

    GGML_TYPES["q5_0"] = 6
    try:
        with pytest.raises(KvTypeError, match="q5_0"):
            Slot(maker(weights, 1, "q5_0", "q5_0"), 512, "sfi", SMALL)
    finally:
        del GGML_TYPES["q5_0"]


def test_a_context_without_flash_attention_is_refused(weights, native):
    from llama_cpp import _internals

    from sfi_local import Engine

    params = native.llama_cpp.llama_context_default_params()
    params.n_ctx, params.flash_attn_type = 512, native.llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = _internals.LlamaContext(model=weights, params=params, verbose=True)
    with pytest.raises(ContextError, match="flash"):
        Engine(context.ctx)
    context.close()


def test_a_second_thread_is_refused_and_changes_nothing(session):
    one, refused, started = session(), [], threading.Event()

    def intrude():
        started.wait()
        for call in (lambda: one.step(1), lambda: one.engine.step(1)):
            try:
                call()
            except BusyError as error:
                refused.append(str(error))

    thread = threading.Thread(target=intrude)
    thread.start()
    one.prefill(TEXT, progress=lambda done, total: done and (started.set(), thread.join(10)))
    assert len(refused) == 2 and all("thread" in text for text in refused)
    assert one.tokens == TEXT


# ---- lifetimes -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("first", ["engine", "context"])
def test_engine_and_context_may_be_freed_in_either_order(session, first):
    one = session()
    one.prefill(TEXT)
    (one.engine if first == "engine" else one.context).close()
    with pytest.raises(DetachedError):
        one.engine.step(1)
    (one.context if first == "engine" else one.engine).close()
    gc.collect()


def test_an_engine_keeps_its_context_alive(weights):
    from sfi_local.binding.context import maker
    from sfi_local.runtime.slot import Slot

    engine = Slot(maker(weights, 1), 512, "sfi", SMALL).engine
    gc.collect()
    engine.prefill(TEXT[:100])
    assert engine.step(1).depth == 101


def test_an_exception_in_a_progress_callback_comes_out(session):
    one = session()
    with pytest.raises(ZeroDivisionError):
        one.engine.prefill(TEXT * 2, progress=lambda done, total: 1 / 0)
    assert one.engine.step(1).kind == "slow"

"""A sequence kept outside of its context: put into another one, it goes on bit for bit as if it had never left."""

import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
from support.tiny_model import SEED

from sfi_local import SfiParams
from sfi_local.errors import ArgumentError, ContextFullError

N = 600      # tokens of the text
STEPS = 50   # after it
FROZEN = SfiParams.of("frozen", n_sink=4, n_recent=32, n_selected=40, max_span=12, min_span=2)
SKETCH = SfiParams.of("sketch", n_sink=4, n_recent=64, n_selected=48)


@pytest.fixture(scope="module")
def text():
    return np.random.default_rng(SEED).integers(0, 256, N + STEPS).tolist()


def keep(context, n, seq=0):
    """(rows of the first n tokens, state)"""
    from sfi_local.binding import state

    of = SimpleNamespace(ctx=context.address)
    rows = bytearray(state.rows_size(of, n))
    state.get_rows(of, 0, n, rows, seq)
    return rows, state.get_state(context.engine, seq) if context.engine else bytearray()


def put(context, tokens, kept, n_rows, seq=0):
    """Tokens with kept rows and their state into a context; returns why the state does not serve."""
    from sfi_local.binding import state

    state.add_rows(SimpleNamespace(ctx=context.address), tokens, kept[0], n_rows, seq)
    return state.set_state(context.engine, kept[1], seq) if context.engine and kept[1] else ""


def went_on(context, tokens, kind):
    """(logits, kinds of the steps)"""
    if context.engine is None:
        return np.array([context.decode([token]) for token in tokens]), []
    infos = [(context.step(token, kind), context.logits()) for token in tokens]
    return np.array([logits for _, logits in infos]), [(info.kind, info.reason, info.n_cells) for info, _ in infos]


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
@pytest.mark.parametrize("params, kind", [(None, ""), (SKETCH, "dense"), (SKETCH, "auto"), (FROZEN, "auto"), (FROZEN, "dense")])
def test_what_was_put_into_another_context_goes_on_bit_for_bit(open_context, tiny_weights, text, params, kind, kv):
    first, other = open_context(tiny_weights, params, n_ctx=1024, kv=kv), open_context(tiny_weights, params, n_ctx=1792, kv=kv)
    if params:
        first.prefill(text[:N])
    else:
        first.decode(text[:300]), first.decode(text[300:N])
    if params:
        went_on(first, text[:7], kind), first.engine.rollback(5)  # so that not all counters are those of a prefill
        depth = N + 2
    else:
        depth = N
    kept = keep(first, depth)
    assert put(other, (text[:N] + text[:2])[:depth], kept, depth) == ""
    logits, kinds = went_on(other, text[N:], kind)
    expected, kinds_then = went_on(first, text[N:], kind)
    assert np.array_equal(logits, expected) and kinds == kinds_then
    if kind == "auto":
        assert kinds[0][0] == "fast" and (params is FROZEN or all(k == "fast" for k, *_ in kinds))


def test_no_basis_is_fitted_after_it_was_put_back(open_context, tiny_weights, text):
    first, other = (open_context(tiny_weights, SKETCH, n_ctx=1024) for _ in "ab")
    first.prefill(text[:N])
    put(other, text[:N], keep(first, N), N)
    phases = []
    from sfi_local.binding.library import open_library
    native = open_library()
    seen = native.ffi.callback("bool(void *, enum sfi_phase, int32_t, int32_t)", lambda user, phase, *_: phases.append(phase) or True)
    ids = native.ffi.new("llama_token[]", text[N:N + 20])
    for context in (other, first):
        assert native.lib.sfi_prefill(context.engine._sfi, 0, ids, 20, seen, native.ffi.NULL) == 0
    assert set(phases) == {0}  # SFI_PHASE_PREFILL
    assert np.array_equal(other.logits(), first.logits())
    assert np.array_equal(went_on(other, text[:STEPS], "auto")[0], went_on(first, text[:STEPS], "auto")[0])


@pytest.mark.parametrize("params", [SKETCH, FROZEN])
@pytest.mark.parametrize("left", [N - 1, N - 30, N - 100, 340, 100])
def test_a_part_of_it_is_what_a_rollback_leaves(open_context, tiny_weights, text, params, left):
    """The cells of the first tokens, their codes and the basis, where that may serve."""
    first, other = open_context(tiny_weights, params, n_ctx=1024), open_context(tiny_weights, params, n_ctx=768)
    first.prefill(text[:N])
    kept = keep(first, N)
    first.engine.rollback(N - left)
    why = put(other, text[:left], kept, N)
    assert (why == "") == (first.peek(1)[0] == "fast")
    assert first.peek(1)[0] == ("fast" if params is SKETCH and left >= 340 or left >= N - 32 else "slow")
    for context in (first, other):
        context.prefill(text[left:left + 9])
    assert np.array_equal(first.logits(), other.logits())
    (logits, kinds), (expected, kinds_then) = (went_on(context, text[N:], "auto") for context in (other, first))
    assert np.array_equal(logits, expected) and kinds == kinds_then


def test_one_sequence_of_several_is_kept_and_put(open_context, tiny_weights, text):
    first, other = (open_context(tiny_weights, SKETCH, n_ctx=1024, n_seq=2) for _ in "ab")
    first.prefill(text[:N], seq=1), other.prefill(text[:50], seq=0)
    assert put(other, text[:N], keep(first, N, seq=1), N, seq=1) == ""
    assert np.array_equal(other.steps(text[N:], "auto", seq=1), first.steps(text[N:], "auto", seq=1))
    assert other.step(1, "auto", seq=0).depth == 51


def test_rows_are_appended_in_pieces(open_context, tiny_weights, text):
    from sfi_local.binding import state

    first, other = (open_context(tiny_weights, SKETCH, n_ctx=1024) for _ in "ab")
    first.prefill(text[:N])
    of, to = SimpleNamespace(ctx=first.address), SimpleNamespace(ctx=other.address)
    for i in range(0, N, 256):
        n = min(256, N - i)
        rows = bytearray(state.rows_size(of, n))
        state.get_rows(of, i, n, rows)
        state.add_rows(to, text[i:i + n], rows, n)
    assert state.set_state(other.engine, state.get_state(first.engine)) == ""
    assert np.array_equal(other.steps(text[N:], "auto"), first.steps(text[N:], "auto"))


def test_a_sliding_window_is_kept_whole(native, open_context, text, tmp_path):
    from support.contexts import load_weights, write_sliding

    with load_weights(native, write_sliding(tmp_path / "sliding.gguf")) as weights:
        first, other = (open_context(weights, SKETCH, n_ctx=1024) for _ in "ab")
        first.prefill(text[:N])
        put(other, text[:N], keep(first, N), N)
        assert np.array_equal(other.steps(text[N:], "auto"), first.steps(text[N:], "auto"))
        first.engine.rollback(200), other.engine.rollback(200)
        assert np.array_equal(other.steps(text[N:], "auto"), first.steps(text[N:], "auto"))
        first.close(), other.close()


def test_rows_that_do_not_fit_are_refused_and_nothing_happens(open_context, tiny_weights, text):
    from sfi_local.binding import state

    first, other = open_context(tiny_weights, SKETCH, n_ctx=1024), open_context(tiny_weights, SKETCH, n_ctx=512)
    q8 = open_context(tiny_weights, SKETCH, n_ctx=1024, kv="q8_0")
    first.prefill(text[:N]), other.prefill(text[:100])
    rows, kept = keep(first, N)
    with pytest.raises(ContextFullError):
        put(other, text[:N], (rows, kept), N)
    for context, tokens, n_rows, data in ((q8, text[:N], N, rows), (other, text[:N], N, rows[:-1]), (other, [1] * 5, 4, rows),
                                          (other, [], N, rows)):
        with pytest.raises(ArgumentError):
            state.add_rows(SimpleNamespace(ctx=context.address), tokens, data, n_rows)
    with pytest.raises(ArgumentError):
        state.get_rows(SimpleNamespace(ctx=first.address), 10, N, bytearray(len(rows)))
    assert other.step(1).depth == 101
    assert state.set_state(q8.engine, kept)  # no rows
    assert state.set_state(other.engine, b"") and state.set_state(other.engine, kept[:40])


@pytest.mark.parametrize("params", [SKETCH, FROZEN])
def test_numbers_that_no_sequence_has_are_refused(open_context, tiny_weights, text, params):
    from sfi_local.binding import state

    first, other = (open_context(tiny_weights, params, n_ctx=1024) for _ in "ab")
    first.prefill(text[:N])
    rows, kept = keep(first, N)
    state.add_rows(SimpleNamespace(ctx=other.address), text[:N], rows, N)
    for at, n in ((40, 4), (52, 4), (56, 4), (60, 4), (64, 8)):  # tokens, span, cells and queries of the basis, refreshes
        changed = bytearray(kept)
        changed[at:at + n] = (2**(8 * n - 1) - 1).to_bytes(n, "little")
        assert "lengths do not fit" in state.set_state(other.engine, changed), at
    assert state.set_state(other.engine, kept) == ""


EXTREMES = tuple(value.to_bytes(n, "little", signed=True) for n in (4, 8) for value in (0, 1, -1, N, N + 1, 2**(8*n - 1) - 1, -2**(8*n - 1)))


def changed(draw, kept):
    """A state with up to three changes, most of them in its head and the numbers behind it."""
    data = bytearray(kept)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        at = draw.randrange(min(len(data), 120) if draw.random() < 0.6 else len(data)) // 4 * 4
        kind = draw.randrange(6)
        if kind == 0:
            data[at + draw.randrange(4) if at + 4 <= len(data) else at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at:at + 4] = draw.randbytes(4)
        elif kind <= 3:
            value = draw.choice(EXTREMES)
            data[at:at + len(value)] = value
        elif kind == 4:
            other, n = draw.randrange(len(data)), draw.randrange(1, 256)
            data[at:at + n], data[other:other + n] = data[other:other + n], data[at:at + n]
        else:
            del data[draw.randrange(1, len(data)):]
    return data


@pytest.mark.parametrize("params", [SKETCH, FROZEN])
def test_a_state_that_was_changed_is_refused_or_harmless(open_context, tiny_weights, text, params):
    """Whatever its bytes are, no cell is read that is not there and no step crashes. check-state.sh tries many more, under sanitizers."""
    from sfi_local.binding import state

    first, other = (open_context(tiny_weights, params, n_ctx=1024) for _ in "ab")
    first.prefill(text[:N])
    rows, kept = keep(first, N)
    draw = random.Random(SEED)
    state.add_rows(SimpleNamespace(ctx=other.address), text[:N], rows, N)
    taken = stepped = 0
    for _ in range(int(os.environ.get("SFI_FUZZ_CHANGES", 300))):
        if state.set_state(other.engine, changed(draw, kept)):
            continue
        taken += 1
        if taken % 4 == 0:
            other.steps(text[N:N + 5], "auto")
            other.engine.rollback(5)
            stepped += 1
    assert stepped
    assert state.set_state(other.engine, kept) == ""
    assert np.array_equal(other.steps(text[N:], "auto"), first.steps(text[N:], "auto"))


def test_the_checksum_sees_every_bit_and_every_length():
    from sfi_local.binding.state import checksum

    data = bytearray(random.Random(SEED).randbytes(100))
    seen = {checksum(data[:n]) for n in range(101)} | {checksum(data, begin=1)}
    for i in range(800):
        data[i // 8] ^= 1 << i % 8
        seen.add(checksum(data))
        data[i // 8] ^= 1 << i % 8
    assert len(seen) == 101 + 1 + 800 and checksum(data) == checksum(bytes(data))

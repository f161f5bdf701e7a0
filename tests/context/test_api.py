"""The C API as an embedder meets it: structs that grow, cancelling, meters of a step that runs, words for misuse."""

import threading
import time

import numpy as np
import pytest
from support.tiny_model import SEED

N = 200
READERS = {  # struct -> a call that fills it
    "sfi_params": lambda lib, sfi, out: lib.sfi_get_params(sfi, out),
    "sfi_stats": lambda lib, sfi, out: lib.sfi_get_stats(sfi, out),
    "sfi_layer": lambda lib, sfi, out: lib.sfi_get_layer(sfi, 0, out),
    "sfi_stability": lambda lib, sfi, out: lib.sfi_get_stability(sfi, 0, 0, 0, out),
    "sfi_step_info": lambda lib, sfi, out: lib.sfi_step(sfi, 0, 1, 0, out),
}


@pytest.fixture(scope="module")
def prompt():
    return np.random.default_rng(SEED).integers(0, 256, N).tolist()


@pytest.fixture
def small():
    from sfi_local import SfiParams

    return SfiParams.of("frozen", n_recent=32, n_selected=24, max_span=8, boundary=False)


@pytest.fixture
def ready(open_context, tiny_weights, small, prompt):
    context = open_context(tiny_weights, small)
    context.prefill(prompt)
    return context


def error(native):
    return native.ffi.string(native.lib.sfi_last_error()).decode()


# ---- structs that grow ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READERS)
def test_no_reader_writes_behind_a_callers_struct(ready, native, name):
    """A shorter struct than the library's, as an older program has; a longer one, as a newer has; and one without a size."""
    ffi, size = native.ffi, native.ffi.sizeof(f"struct {name}")
    full = ffi.new(f"struct {name} *", {"struct_size": size})
    assert READERS[name](native.lib, ready.engine._handle(), full) == 0
    for length in (12, 16, size - 4, size, size + 40):
        room = ffi.new("char[]", b"\xa5" * (size + 80))
        out = ffi.cast(f"struct {name} *", room)
        out.struct_size = length
        assert READERS[name](native.lib, ready.engine._handle(), out) == 0
        data = bytes(ffi.buffer(room))
        assert out.struct_size == length and data[length:size + 80] == b"\xa5" * (size + 80 - length)
        if length > size:
            assert data[size:length] == bytes(length - size)
        if name in ("sfi_params", "sfi_layer"):
            assert data[8:min(length, size)] == bytes(ffi.buffer(full))[8:length]
    out.struct_size = 0
    assert READERS[name](native.lib, ready.engine._handle(), out) == native.lib.SFI_ERR_ARGUMENT and "struct_size" in error(native)


def test_what_a_shorter_struct_lacks_has_its_default(open_context, tiny_weights, native):
    ffi, lib, context = native.ffi, native.lib, open_context(tiny_weights, None)
    params = ffi.new("struct sfi_params *", {"struct_size": 8 + 4 + 4, "policy": 2, "tolerance": 0.5, "n_selected": -7, "n_sink": -7})
    sfi, address = ffi.new("struct sfi **"), ffi.cast("struct llama_context *", context.address)
    assert lib.sfi_attach(address, params, sfi) == 0, error(native)
    got, research = (ffi.new(f"struct {n} *", {"struct_size": ffi.sizeof(f"struct {n}")}) for n in ("sfi_params", "sfi_research"))
    assert lib.sfi_get_params(sfi[0], got) == 0 == lib.sfi_default_research(research)
    assert (got.policy, got.tolerance, got.n_selected, got.n_sink) == (2, 0.5, 1024, 4)
    assert bytes(ffi.buffer(got.research)) == bytes(ffi.buffer(research))
    lib.sfi_free(sfi[0])


def test_a_longer_struct_is_taken_if_what_is_not_known_is_zero(open_context, tiny_weights, native):
    ffi, lib, context = native.ffi, native.lib, open_context(tiny_weights, None)
    size = ffi.sizeof("struct sfi_params")
    room = ffi.new("char[]", size + 16)
    params = ffi.cast("struct sfi_params *", room)
    params.struct_size = size
    assert lib.sfi_default_params(params, 2) == 0
    params.struct_size = size + 16
    sfi, address = ffi.new("struct sfi **"), ffi.cast("struct llama_context *", context.address)
    assert lib.sfi_attach(address, params, sfi) == 0
    lib.sfi_free(sfi[0])
    room[size + 3] = b"\1"
    assert lib.sfi_attach(address, params, sfi) == lib.SFI_ERR_ARGUMENT and "does not know" in error(native)


def test_auto_depth_by_rule(open_context, tiny_weights, native, prompt):
    """Below 1024 cells with a sketch a step is dense."""
    from sfi_local.binding.engine import _default_structs

    ffi, lib, context = native.ffi, native.lib, open_context(tiny_weights, None)
    params, _ = _default_structs("sketch")
    params.auto_depth = -1
    sfi, address = ffi.new("struct sfi **"), ffi.cast("struct llama_context *", context.address)
    kind, reason = ffi.new("enum sfi_step_kind *"), ffi.new("enum sfi_reason *")
    assert lib.sfi_attach(address, params, sfi) == 0
    assert lib.sfi_prefill(sfi[0], 0, prompt, N, ffi.NULL, ffi.NULL) == 0 == lib.sfi_peek(sfi[0], 0, 1, kind, reason)
    assert (kind[0], reason[0]) == (lib.SFI_STEP_DENSE, lib.SFI_REASON_SHORT)
    lib.sfi_free(sfi[0])


@pytest.mark.parametrize("policy", ["sketch", "frozen", "window", "oracle"])
def test_the_rule_for_auto_depth_is_that_of_python(native, policy):
    from sfi_local import SfiParams
    from sfi_local.binding.engine import _default_structs
    from sfi_local.params import auto_depth

    params, _ = _default_structs(policy)
    params.auto_depth = -1
    assert native.lib.sfi_auto_depth(params) == auto_depth(SfiParams.of(policy))
    params.auto_depth = 77
    assert native.lib.sfi_auto_depth(params) == 77
    params.auto_depth = -2
    assert native.lib.sfi_auto_depth(params) == native.lib.SFI_ERR_ARGUMENT


# ---- cancelling, and meters of what runs -------------------------------------------------------------------------------


def run(function):
    """Call it in a thread; returns that and the list its result comes into."""
    out = []

    def call():
        try:
            out.append(function())
        except Exception as error:
            out.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    return thread, out


def test_cancel_ends_a_prefill_within_an_operation(open_context, tiny_weights, native):
    """In one batch, between whose operations alone it can end."""
    from sfi_local.errors import AbortedError

    context = open_context(tiny_weights, None, n_ctx=8192, n_batch=8192, n_ubatch=8192)
    from sfi_local.binding.engine import Engine

    engine = context.engine = Engine(context.address)
    tokens = np.random.default_rng(SEED).integers(0, 256, 5000).tolist()
    start = time.perf_counter()
    engine.prefill(tokens)
    whole = time.perf_counter() - start
    engine.rollback(5000)

    thread, out = run(lambda: engine.prefill(tokens))
    time.sleep(whole / 10)
    start = time.perf_counter()
    engine.cancel()
    thread.join()
    assert isinstance(out[0], AbortedError) and "sfi_cancel" in str(out[0])
    assert time.perf_counter() - start < whole / 2
    engine.prefill(tokens[:300])
    assert engine.step(1).pos == 300


def test_cancel_without_a_call_inside_does_nothing(ready, native):
    native.lib.sfi_cancel(ready.engine._handle())
    native.lib.sfi_cancel(native.ffi.NULL)
    assert ready.step(1).kind == "fast"


def test_an_abort_callback_of_the_caller_works_beside_it_and_is_given_back(ready):
    from sfi_local.errors import AbortedError

    asked = []
    stop = ready.llama.ggml_abort_callback(lambda user: asked.append(1) or len(asked) > 3)
    ready.llama.llama_set_abort_callback(ready.address, stop, None)
    with pytest.raises(AbortedError, match="abort callback"):
        ready.step(1)
    with pytest.raises(AbortedError):
        ready.step(1)
    ready.engine.close()
    del asked[:]
    ready.decode([1], status=2)
    assert len(asked) > 3
    ready.llama.llama_set_abort_callback(ready.address, ready.llama.ggml_abort_callback(), None)
    ready.decode([1])


def test_meters_are_read_while_a_step_runs(open_context, tiny_weights, small, prompt):
    context, seen = open_context(tiny_weights, small, n_batch=64, n_ubatch=64), []

    def progress(done, total):
        seen.append((context.engine.stats().n_prefill, context.engine.memory() > 0))

    context.prefill(prompt, progress=progress)
    assert seen == [(64, True), (128, True), (192, True), (N, True)]


def test_a_call_from_a_callback_is_told_so(open_context, tiny_weights, small, prompt):
    from sfi_local.errors import BusyError

    context = open_context(tiny_weights, small, n_batch=64, n_ubatch=64)
    with pytest.raises(BusyError, match="from a callback"):
        context.prefill(prompt, progress=lambda done, total: context.step(1))


def test_progress_of_a_fit(open_context, tiny_weights, native, prompt):
    ffi, lib, context, seen = native.ffi, native.lib, open_context(tiny_weights, None), []

    @ffi.callback("sfi_progress_fn")
    def progress(user, phase, done, total):
        seen.append((phase, done, total))
        return phase == lib.SFI_PHASE_PREFILL or done < 2

    sfi, address = ffi.new("struct sfi **"), ffi.cast("struct llama_context *", context.address)
    assert lib.sfi_attach(address, ffi.NULL, sfi) == 0
    assert lib.sfi_prefill(sfi[0], 0, prompt, N, progress, ffi.NULL) == lib.SFI_ERR_ABORTED
    assert seen == [(lib.SFI_PHASE_FIT, 0, 4), (lib.SFI_PHASE_FIT, 1, 4), (lib.SFI_PHASE_FIT, 2, 4)]
    assert lib.sfi_step(sfi[0], 0, 1, 0, ffi.NULL) == 0
    lib.sfi_free(sfi[0])


def test_errors_name_parameters_not_flags(open_context, tiny_weights, native):
    """Of an embedder's program nobody knows the command line."""
    import re
    from pathlib import Path

    sources = next(p / "native" for p in Path(__file__).resolve().parents if (p / "native" / "api").exists())
    for source in (sources / "api").glob("*.cpp"):
        texts = re.findall(r'"((?:[^"\\]|\\.)*)"', source.read_text(encoding="utf-8"))
        assert not [text for text in texts if re.search(r"--[a-z]|[Mm]ode (stock|dense|sfi)", text)], source


def test_operations_of_a_device(native):
    text = native.ffi.string(native.lib.sfi_device_operations(0)).decode()
    assert "sparse_attn" in text.split() and "sketch_scan" in text.split()
    assert native.ffi.string(native.lib.sfi_device_operations(999)) == b""


@pytest.mark.parametrize("policy", ["sketch", "frozen"])
def test_bytes_of_a_context_before_it_is_made(open_context, tiny_weights, native, policy):
    """As they are afterwards, and without that memory: one too large for this machine can be asked about."""
    import ctypes

    from sfi_local import SfiParams
    from sfi_local.binding.engine import _sized, _to_native

    ffi, lib, llama = native.ffi, native.lib, native.llama_cpp
    params = SfiParams.of(policy)
    structs = _to_native(params)

    def ask(n_ctx, kv=1):
        settings = llama.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.type_k, settings.type_v = n_ctx, 512, 256, kv, kv
        settings.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        out = _sized("struct sfi_bytes")
        status = lib.sfi_context_bytes(ffi.cast("struct llama_model *", ctypes.cast(tiny_weights, ctypes.c_void_p).value),
                                       ffi.cast("struct llama_context_params *", ctypes.addressof(settings)), structs[0], out)
        return status, out

    status, out = ask(4096)
    context = open_context(tiny_weights, params, n_ctx=4096)
    assert status == 0 and out.sfi == context.engine.memory()
    assert out.kv == 4096 * 4 * 2 * 2 * 32 * 2  # cells, layers, K and V, heads, values, bytes
    assert 0 < out.compute < 1 << 28
    assert ask(1 << 20)[1].kv == out.kv << 8
    assert ask(4096, kv=6)[0] == lib.SFI_ERR_KV_TYPE and "q5_0" in error(native)
    context.prefill([1, 2, 3])


# ---- the exact loop ------------------------------------------------------------------------------------------------------


class Greedy:
    """A sample function over a context; wrong: every so many guesses another token is guessed."""

    def __init__(self, native, context, wrong=0):
        self.context, self.wrong, self.guesses = context, wrong, 0
        self.function = native.ffi.callback("sfi_sample_fn", self.sample)

    def sample(self, user, row, draft):
        llama, c = self.context.llama, self.context
        logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(c.address, row), shape=(c.n_vocab,))
        self.guesses += draft
        return int(logits.argmax()) + (1 if draft and self.wrong and self.guesses % self.wrong == 0 else 0)


@pytest.mark.parametrize("policy", ["sketch", "frozen"])
@pytest.mark.parametrize("wrong, n_drafts", [(0, 4), (3, 6), (1, 3), (0, 0)])
def test_exact_gives_what_dense_steps_give(open_context, tiny_weights, native, prompt, policy, wrong, n_drafts):
    from sfi_local import SfiParams

    n, ffi, lib = 60, native.ffi, native.lib
    dense, exact = (open_context(tiny_weights, SfiParams.of(policy, n_recent=32, n_selected=24)) for _ in range(2))
    dense.prefill(prompt)
    exact.prefill(prompt)
    expected = [int(dense.logits().argmax())]
    while len(expected) <= n:
        dense.step(expected[-1], "dense")
        expected.append(int(dense.logits().argmax()))

    greedy, out, got, calls = Greedy(native, exact, wrong), ffi.new("llama_token[]", n_drafts + 1), [expected[0]], 0
    while len(got) <= n:
        count = lib.sfi_exact(exact.engine._handle(), 0, got[-1], n_drafts, greedy.function, ffi.NULL, out)
        assert 1 <= count <= n_drafts + 1, error(native)
        got += list(out)[:count]
        calls += 1
    assert got[:n + 1] == expected[:n + 1]
    assert calls >= n if n_drafts == 0 else calls < n + 5
    assert exact.step(got[-1], "dense").pos == N + len(got) - 1


def test_exact_after_an_error_leaves_the_sequence_as_it_was(ready, native):
    ffi, lib, handle = native.ffi, native.lib, ready.engine._handle()

    @ffi.callback("sfi_sample_fn")
    def stop(user, row, draft):
        lib_stop[0] = True
        return 5

    lib_stop = [False]
    callback = ready.llama.ggml_abort_callback(lambda user: lib_stop[0])
    ready.llama.llama_set_abort_callback(ready.address, callback, None)
    out = ffi.new("llama_token[]", 5)
    assert lib.sfi_exact(handle, 0, 1, 4, stop, ffi.NULL, out) == lib.SFI_ERR_ABORTED and "abort" in error(native)
    lib_stop[0] = False
    assert ready.step(1).pos == N
    assert lib.sfi_exact(handle, 0, 1, 4, ffi.NULL, ffi.NULL, out) == lib.SFI_ERR_ARGUMENT
    assert lib.sfi_exact(handle, 0, 1, -1, stop, ffi.NULL, out) == lib.SFI_ERR_ARGUMENT and "n_drafts" in error(native)
    assert lib.sfi_exact(handle, 7, 1, 1, stop, ffi.NULL, out) == lib.SFI_ERR_ARGUMENT

"""One step of several sequences gives each what its own step would."""

import numpy as np
import pytest
from support.supports import CLOSE

POLICIES = {"sketch": {"n_recent": 32, "tolerance": 1e-3}, "frozen": {}, "window": {"policy": "window"}, "oracle": {"policy": "oracle"}}


@pytest.fixture(params=POLICIES)
def params(request, small):
    from sfi_local import SfiParams

    if request.param == "sketch":
        return SfiParams.of("sketch", n_sink=4, n_recent=32, n_selected=24)
    return small.replace(**POLICIES[request.param])


@pytest.fixture
def opened(open_context, tiny_weights, params):
    """A context of three sequences with prompts of different lengths, some of which the prefill ends with a support."""
    def make(prompts, **settings):
        context = open_context(tiny_weights, params, n_seq=3, n_ctx=512, **settings)
        for seq, prompt in enumerate(prompts):
            context.prefill(prompt[30 * seq:], seq=seq)
        return context
    return make


def took(info):
    return info.kind, info.reason, info.pos, info.depth, info.n_cells


def near(distances):
    """F32 weights are multiplied with several columns by another order of sums than with one. Where that makes a cell on the edge of what
    is selected another, a model of random weights, which attends to all alike, is further away; a real one is compared bit for bit below."""
    return np.median(distances) < CLOSE and np.max(distances) < 300 * CLOSE


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0], [1]])
@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_each_sequence_takes_the_step_it_would_take_alone(opened, prompts, params, order, kv):
    together, apart, distances = opened(prompts, kv=kv), opened(prompts, kv=kv), []
    for number, step in enumerate(np.random.default_rng(5).integers(0, 256, (40, 3)).tolist()):
        if number == 20 and params.policy != "sketch":  # one of them needs a new support: its step is slow among fast ones
            for context in (together, apart):
                context.engine.invalidate(order[0])
        infos = together.engine.step_many({seq: step[seq] for seq in order})
        for i, seq in enumerate(order):
            assert took(infos[i]) == took(apart.step(step[seq], seq=seq))
            distances.append(np.abs(together.logits(i) - apart.logits()).max())
    assert near(distances)
    one, other = together.engine.stats(), apart.engine.stats()
    assert (one.n_fast, one.n_slow, one.kv_dense) == (other.n_fast, other.n_slow, other.kv_dense)
    assert one.kv_read == pytest.approx(other.kv_read, rel=1e-4)  # a cell on the edge may be looked at twice, or not


def test_on_a_real_model_a_pass_gives_what_single_steps_give_bit_for_bit(native, open_context, smollm2):
    """Its products with a few tokens round as those with one, and each token attends to cells of its own choice."""
    from support.contexts import load_weights

    from sfi_local import SfiParams
    from sfi_local.binding.context import mapped_weights

    with mapped_weights(native.llama_cpp, True), load_weights(native, smollm2) as weights:
        one, several = (open_context(weights, SfiParams(n_selected=64), n_threads=2, n_seq=2) for _ in "ab")
        for context in (one, several):
            for seq in range(2):
                context.prefill(list(range(1000 + 50 * seq, 1200)), seq=seq)
        tokens = list(range(2000, 2040))
        expected = {seq: one.steps(tokens, "fast", seq) for seq in range(2)}
        assert np.array_equal(np.array([several.logits(1) for t in tokens[:3] if several.engine.step_many({0: t, 1: t}, "fast")]), expected[1][:3])
        done = 3
        while done < len(tokens):
            n = len(several.engine.step_fast(tokens[done:done + 9], seq=0))
            assert np.array_equal(np.array([several.logits(i) for i in range(n)]), expected[0][done:done + n])
            done += n
        assert several.engine.stats().kv_read < one.engine.stats().kv_read
        one.close(), several.close()


# ---- several tokens of one sequence ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", ["sketch", "frozen"], indirect=True)
def test_several_tokens_take_the_steps_they_would_take_one_by_one(opened, prompts, params):
    together, apart, distances = opened(prompts), opened(prompts), []
    tokens, done = np.random.default_rng(6).integers(0, 256, 60).tolist(), 0
    while done < len(tokens):
        if apart.peek(tokens[done])[0] == "slow":
            assert took(together.step(tokens[done], "slow")) == took(apart.step(tokens[done], "slow"))
            done += 1
            continue
        infos = together.engine.step_fast(tokens[done:done + 5])
        for i, info in enumerate(infos):
            assert took(info)[2:] == took(apart.step(tokens[done + i], "fast"))[2:] and (info.kind, info.reason) == ("fast", "")
            distances.append(np.abs(together.logits(i) - apart.logits()).max())
        done += len(infos)
    assert near(distances)
    assert together.engine.stats().n_fast == apart.engine.stats().n_fast > 40
    assert together.engine.stats().kv_read == pytest.approx(apart.engine.stats().kv_read, rel=1e-4)


@pytest.mark.parametrize("params", ["sketch", "frozen"], indirect=True)
def test_guesses_that_are_taken_back_leave_nothing(opened, prompts):
    plain, guessed = opened(prompts), opened(prompts)
    n = len(guessed.engine.step_fast([5, 6, 7, 8]))
    guessed.engine.rollback(n - 1)
    plain.step(5, "fast")
    for token in (9, 10, 11):
        assert took(guessed.step(token)) == took(plain.step(token))
        assert np.abs(guessed.logits() - plain.logits()).max() < CLOSE


@pytest.mark.parametrize("params", ["window", "oracle"], indirect=True)
def test_policies_whose_window_slides_take_one_token_at_a_time(opened, prompts):
    from sfi_local.errors import ArgumentError

    with pytest.raises(ArgumentError, match="sketch and frozen"):
        opened(prompts).engine.step_fast([1, 2])


def test_a_pass_needs_a_support_and_room(opened, prompts, params):
    from sfi_local.errors import ArgumentError, ContextFullError, NoSupportError

    if params.policy not in ("sketch", "frozen"):
        pytest.skip("takes one token at a time")
    context = opened(prompts)
    for wrong in ([], [-1], [10**6]):
        with pytest.raises(ArgumentError):
            context.engine.step_fast(wrong)
    context.engine.invalidate(0)
    with pytest.raises(NoSupportError):
        context.engine.step_fast([1, 2], seq=0)
    context.engine.prefill([1] * (510 - len(prompts[0])), seq=0)
    assert len(context.engine.step_fast([1], seq=0)) == 1
    with pytest.raises(ContextFullError):
        context.engine.step_fast([1, 2], seq=0)


@pytest.mark.parametrize("n_layer", [12, 24])
def test_a_model_of_any_number_of_layers_gets_its_codes(native, open_context, tmp_path, prompts, n_layer):
    """The scheduler of a side graph counts tensors that are not its own: with 24 layers there was no room for them."""
    from support.contexts import load_weights
    from support.tiny_model import write_tiny

    from sfi_local import SfiParams

    with load_weights(native, write_tiny(tmp_path / "deep.gguf", n_layer=n_layer)) as weights:
        context = open_context(weights, SfiParams(n_selected=24, n_recent=32), n_ctx=512)
        context.prefill(prompts[0])
        assert context.step(1).kind == "fast"
        context.close()


def test_a_step_of_all_uses_the_graph_of_the_last_one_again(opened, prompts):
    context = opened(prompts)
    for token in range(3):
        context.engine.step_many({0: token, 1: token, 2: token}, "fast")
    before = context.n_reused()
    for token in range(5):
        context.engine.step_many({0: token, 1: token, 2: token}, "fast")
    assert context.n_reused() - before >= 4  # a sketch may code cells between two


def test_dense_steps_go_with_fast_ones(open_context, tiny_weights, prompts):
    from sfi_local import SfiParams

    context = open_context(tiny_weights, SfiParams.of("sketch", n_recent=32, n_selected=24, auto_depth=150), n_seq=2, n_ctx=512)
    context.prefill(prompts[0], seq=0)
    context.prefill(prompts[1][:50], seq=1)
    assert [info.kind for info in context.engine.step_many({0: 1, 1: 1})] == ["fast", "dense"]


def test_what_cannot_be_a_step_of_all_changes_nothing(opened, prompts):
    from sfi_local.errors import ArgumentError, ContextFullError, NoSupportError

    context = opened(prompts)
    before = [bytes(context.state(seq)) for seq in range(3)]
    for wrong in ({}, {3: 1}, {-1: 1}, {0: 1, 1: 10**6}):
        with pytest.raises(ArgumentError):
            context.engine.step_many(wrong)
    context.engine.invalidate(1)
    with pytest.raises(NoSupportError):
        context.engine.step_many({0: 1, 1: 1}, "fast")
    assert [bytes(context.state(seq)) for seq in range(3)] == before
    context.engine.prefill([1] * (512 - len(prompts[0])), seq=0)
    with pytest.raises(ContextFullError):
        context.engine.step_many({0: 1, 1: 1})


@pytest.mark.parametrize("params", ["sketch", "frozen"], indirect=True)
def test_a_step_that_stops_is_taken_by_no_sequence(opened, prompts):
    """Sequences 2 and 0 are computed one after the other: it may stop when the first has been."""
    from sfi_local.errors import AbortedError

    context = opened(prompts)
    llama, ends = context.llama, lambda: [llama.llama_memory_seq_pos_max(context.memory, seq) for seq in range(3)]
    before, n_stopped = ends(), 0
    for least in range(0, 400, 7):
        asked = []
        stop = llama.ggml_abort_callback(lambda user: asked.append(1) or len(asked) > least)
        llama.llama_set_abort_callback(context.address, stop, None)
        try:
            context.engine.step_many({2: 1, 0: 1})
        except AbortedError:  # also where it stopped what a slow step makes for fast ones
            n_stopped += 1
            assert ends() == before
        else:
            break
    llama.llama_set_abort_callback(context.address, llama.ggml_abort_callback(), None)
    assert n_stopped > 2 and ends() == [before[0] + 1, before[1], before[2] + 1]
    assert context.engine.step_many({0: 2, 1: 2, 2: 2})


def test_a_sequence_is_not_there_twice(opened, prompts):
    from sfi_local.binding.library import open_library

    context, native = opened(prompts), open_library()
    twice = native.ffi.new("struct sfi_next[]", [(0, 1), (0, 2)])
    assert native.lib.sfi_step_many(context.engine._handle(), twice, 2, 0, native.ffi.NULL) == native.lib.SFI_ERR_ARGUMENT
    assert "twice" in native.ffi.string(native.lib.sfi_last_error()).decode()

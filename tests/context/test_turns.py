"""Sequences that take turns, one step each, share the graph: nothing of it depends on which sequence it is but where it looks, and
nothing of fast steps on how long it is."""

import pytest
from support.contexts import load_weights, write_sliding

PAIRS = 10  # of steps, with fewer cells than would need another graph


@pytest.fixture(params=["sketch", "frozen", "window", "oracle", "portable"])
def params(request, small, monkeypatch):
    from sfi_local import SfiParams

    monkeypatch.setenv("SFI_PORTABLE_PATH", str(int(request.param == "portable")))
    if request.param == "sketch":
        return SfiParams.of("sketch", n_sink=4, n_recent=32, n_selected=24)
    return small.replace(policy=request.param if request.param != "portable" else "frozen", max_span=64)


def filled(open_context, weights, params, prompts, lengths=(150, 140, 130), **settings):
    context = open_context(weights, params, n_seq=3, n_ctx=2048, **settings)
    for seq in (0, 1, 2):
        context.prefill((prompts[seq] * 6)[:lengths[seq]], seq=seq)
    for seq in (0, 1, 2):
        context.step(1, seq=seq)
    return context


def check_turns(open_context, weights, params, prompts, kind="fast", order=(2, 0), **settings):
    def step(context, token, seq):
        info = context.step(token, kind, seq)
        return info.kind, info.pos, info.depth, info.n_cells, info.tail_mass, context.logits().tobytes()

    turns, alone = (filled(open_context, weights, params, prompts, **settings) for _ in "ab")
    before, taken = turns.n_reused(), [(token, seq) for token in range(PAIRS) for seq in order]
    results = [step(turns, *one) for one in taken]
    assert turns.n_reused() - before >= len(taken) - 1  # the first is of another kind
    assert dict(zip(taken, results)) == {(token, seq): step(alone, token, seq) for seq in order for token in range(PAIRS)}


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_fast_steps_that_alternate_use_one_graph(open_context, tiny_weights, params, prompts, kv):
    check_turns(open_context, tiny_weights, params, prompts, kv=kv)


def test_three_sequences_take_turns(open_context, tiny_weights, params, prompts):
    check_turns(open_context, tiny_weights, params, prompts, order=(1, 2, 0))


@pytest.mark.parametrize("params", ["sketch", "frozen", "window", "portable"], indirect=True)
@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_so_do_those_of_any_length(open_context, tiny_weights, params, prompts, kv):
    check_turns(open_context, tiny_weights, params, prompts, lengths=(1020, 300, 250), kv=kv)


@pytest.mark.parametrize("kind", ["dense", "slow"])
def test_other_steps_of_equal_length_do_as_well(open_context, tiny_weights, params, prompts, kind):
    check_turns(open_context, tiny_weights, params, prompts, kind)


def test_layers_with_a_sliding_window_look_at_their_own_cache(native, open_context, params, prompts, tmp_path):
    with load_weights(native, write_sliding(tmp_path / "sliding.gguf")) as weights:
        check_turns(open_context, weights, params, prompts)
        check_turns(open_context, weights, params, prompts, swa_full=True)

"""Mode exact where the text itself drafts: what repeats is kept, what does not is left alone, and every ending finds the cache right."""

import random

import pytest
from support.replay import Given, Replay, interrupted

from sfi_local import Sampling, SfiParams, Tally, load
from sfi_local.errors import DecodeError
from sfi_local.runtime import exact, ties
from sfi_local.runtime.exact import generate_exact
from sfi_local.runtime.generate import generate
from sfi_local.runtime.slot import Slot
from sfi_local.runtime.ties import Noise

RNG = random.Random(1)
RANDOM = [RNG.randrange(10, 250) for _ in range(900)]
TEXT = RANDOM[:300]
FROZEN = SfiParams.of("frozen", n_sink=4, n_recent=32, n_selected=64, max_span=32, auto_depth=1)
SKETCH = SfiParams(n_sink=2, n_recent=32, n_selected=8, auto_depth=1)
LATER = SKETCH.replace(auto_depth=4000)  # no fast step is possible before


@pytest.fixture(scope="module", params=[FROZEN, SKETCH, LATER], ids=["frozen", "sketch", "not yet deep"])
def model(tiny, request):
    with load(tiny, mode="exact", n_ctx=1024, n_threads=1, params=request.param, cache=False) as one:
        one.open_session(1, 1)
        one.vocabulary.is_end = lambda token: token == 5
        yield one


@pytest.fixture
def slot(model):
    model.slot.cut(0)
    model.slot.costs = Given()
    return model.slot


def run(slot, model, prompt, sampler, n, **options):
    tally = Tally()
    for step in generate_exact(slot, model.vocabulary, prompt, sampler, n, **options):
        tally.add(step)
    return tally


def greedy(slot, model, prompt, n):
    """By dense steps."""
    return [step.token for step in generate(slot, model.vocabulary, prompt, Sampling(temp=0).chain(), n, schedule=lambda *_: "dense")]


def test_what_repeats_is_drafted_and_kept(slot, model):
    """All of a span at once, longer and longer; the cache holds it, and what comes next is what dense steps give."""
    slot.engine and slot.engine.reset_stats()
    tally = run(slot, model, TEXT + TEXT[:20], Replay(TEXT[20:250]), 230)
    drafted, kept = tally.drafted("ngram")
    assert tally.tokens == TEXT[20:250]
    assert 180 < kept == drafted < 230 and len(tally.spans) < 20
    lengths = [span.n_drafted for span in tally.spans if span.n_drafted]
    assert slot.params.refreshes or lengths[:-2] == sorted(lengths[:-2]) and lengths[0] >= 5 and max(lengths[:4]) >= 23
    assert tally.reasons["ngram"] == kept and tally.reasons["verify"] == len(tally.spans)
    assert slot.tokens == TEXT + TEXT[:249] and slot.n_drafted == 0
    mine = run(slot, model, TEXT + TEXT[:250], Sampling(temp=0).chain(), 20).tokens
    slot.cut(0)
    assert mine == greedy(slot, model, TEXT + TEXT[:250], 20)


def test_what_does_not_repeat_is_not_drafted(slot, model):
    slot.costs = Given(passes=0.4)
    tally = run(slot, model, RANDOM[:300], Replay(RANDOM[300:800]), 500)
    assert tally.tokens == RANDOM[300:800] and tally.drafted("ngram")[0] < 10 and tally.steps["dense"] + tally.steps["slow"] > 480


def test_where_passes_are_too_dear_nothing_is_drafted(slot, model):
    slot.costs = Given(passes=1.1)
    tally = run(slot, model, TEXT + TEXT[:20], Replay(TEXT[20:250]), 230)
    assert tally.spans == [] and tally.tokens == TEXT[20:250]


def test_of_a_changed_copy_most_is_kept(slot, model):
    changed = [token if i % 17 else 251 for i, token in enumerate(TEXT)]
    tally = run(slot, model, TEXT + changed[:20], Replay(changed[20:250]), 230)
    assert tally.tokens == changed[20:250] and tally.drafted("ngram")[1] > 150
    assert slot.tokens == TEXT + changed[:249]


@pytest.mark.parametrize("temp", [0, 0.8])
def test_with_the_same_seed_it_is_dense_decoding(slot, model, temp):
    """Of a prompt in which what dense decoding gives stands already, as nearly as a model of random weights will have it."""
    draw = lambda: Sampling(temp=temp, seed=3).chain()
    first = [step.token for step in generate(slot, model.vocabulary, TEXT, draw(), 40, schedule=lambda *_: "dense")]
    for prompt in (TEXT, TEXT + first + TEXT, [7, 8, 9] * 60):
        slot.cut(0)
        dense = [step.token for step in generate(slot, model.vocabulary, prompt, draw(), 60, schedule=lambda *_: "dense")]
        for draft in (None, 1, 7):
            slot.cut(0)
            assert run(slot, model, prompt, draw(), 60, draft=draft).tokens == dense


def test_the_end_of_an_answer_ends_it_within_a_span(slot, model):
    text = [*TEXT[:100], 5, *TEXT[101:200]]
    tally = run(slot, model, text + TEXT[:20], Replay(text[20:]), 200)
    assert tally.tokens == text[20:101] and tally.finish == "end"


def test_the_end_of_the_context_ends_it_within_a_span(slot, model):
    text = (TEXT * 4)[:1000]
    tally = run(slot, model, text, Replay((TEXT * 5)[1000:]), None)
    assert tally.finish == "context" and len(tally.tokens) == 1024 - 1000 + 1 and tally.drafted("ngram")[1] > 10
    assert tally.tokens == (TEXT * 5)[1000:1025] and len(slot.tokens) == 1024


@pytest.mark.parametrize("n", [1, 2, 3, 9, 40])
def test_n_is_kept_within_a_span(slot, model, n):
    tally = run(slot, model, TEXT + TEXT[:20], Replay(TEXT[20:]), n)
    assert tally.tokens == TEXT[20:20 + n] and tally.finish == "length" and slot.tokens == TEXT + TEXT[:20 + n - 1]


@pytest.mark.parametrize("params", [FROZEN, SKETCH], ids=["frozen", "sketch"])
def test_a_context_that_grows_keeps_what_is_sure(tiny, params):
    with load(tiny, mode="exact", n_ctx=512, n_threads=1, params=params, cache=False) as one:
        slot = one.open_session(1, 1)
        slot.costs, slot.n_limit = Given(), 1024
        tally = run(slot, one, TEXT + TEXT[:150], Replay(TEXT[150:] + TEXT), 250)
        assert slot.n_ctx == 1024 and tally.tokens == (TEXT[150:] + TEXT)[:250] and tally.drafted("ngram")[1] > 150
        assert slot.tokens == TEXT + TEXT + TEXT[:99]


@pytest.mark.parametrize("method, when", [("verify", 0), ("verify", 2), ("rollback", 0), ("rollback", 2), ("step", 0)])
def test_ctrl_c_at_any_point_leaves_nothing_wrong_behind(slot, model, monkeypatch, method, when):
    broken = [token if i % 13 else 251 for i, token in enumerate(TEXT)]  # so that drafts are wrong, too
    slot.costs.dense *= method != "step"  # else it is measured first
    with monkeypatch.context() as patch:
        patch.setattr(Slot, method, interrupted(method, when))
        with pytest.raises(KeyboardInterrupt):
            run(slot, model, TEXT + broken[:20], Replay(broken[20:250]), 230)
    mine = run(slot, model, TEXT + broken[:60], Sampling(temp=0).chain(), 20).tokens
    assert slot.tokens == TEXT + broken[:60] + mine[:19]
    slot.cut(0)
    assert mine == greedy(slot, model, TEXT + broken[:60], 20)


def test_a_pass_that_fails_leaves_nothing_behind(slot, model, monkeypatch):
    def fail(*_):
        raise DecodeError("It failed.")

    real, calls = slot.engine.verify, iter(range(100))
    monkeypatch.setattr(slot.engine, "verify", lambda *args: (real if next(calls) < 2 else fail)(*args))
    with pytest.raises(DecodeError):
        run(slot, model, TEXT + TEXT[:20], Replay(TEXT[20:250]), 230)
    monkeypatch.undo()
    n = len(slot.tokens)
    assert 320 < n < 500 and slot.tokens == (TEXT + TEXT)[:n] and slot.n_drafted == 0
    assert run(slot, model, (TEXT + TEXT)[:n], Sampling(temp=0).chain(), 20).tokens == (slot.cut(0), greedy(slot, model, (TEXT + TEXT)[:n], 20))[1]


def test_a_long_pass_that_is_not_as_dense_steps_is_taken_back(slot, model, monkeypatch):
    """As if kernels rounded otherwise from 8 tokens on: no longer pass gives a token, and text and cache are right."""
    def logits(context, row):
        values = ties_logits(context, row)
        return values.round(2) + bool(sizes and sizes[-1] > 7 and row >= 0)  # short ones are equal, whatever the kernels

    sizes, ties_logits = [], ties.logits
    real = slot.engine.verify
    monkeypatch.setattr(ties, "logits", logits)
    monkeypatch.setattr(slot.engine, "verify", lambda tokens, *more: (sizes.append(len(tokens)), real(tokens, *more))[1])
    slot.noise = Noise()
    tally = run(slot, model, TEXT + TEXT[:20], Replay(TEXT[20:150]), 130)
    assert tally.tokens == TEXT[20:150] and slot.tokens == TEXT + TEXT[:149]
    assert sum(n > 7 for n in sizes) == 1 and slot.noise.limit == 7
    mine = run(slot, model, TEXT + TEXT[:150], Sampling(temp=0).chain(), 20).tokens
    slot.noise = Noise()
    slot.cut(0)
    assert mine == greedy(slot, model, TEXT + TEXT[:150], 20)


def test_a_draft_that_is_not_what_is_drawn_is_never_given(slot, model, monkeypatch):
    """Drafts are put wrong on purpose: nothing of them is seen but the time they take."""
    real = exact.Ngrams.draft
    monkeypatch.setattr(exact.Ngrams, "draft", lambda self, n: [token + 1 if i % 3 == 2 else token for i, token in enumerate(real(self, n))])
    tally = run(slot, model, TEXT + TEXT[:20], Replay(TEXT[20:250]), 230)
    assert tally.tokens == TEXT[20:250] and slot.tokens == TEXT + TEXT[:249] and max(span.n_accepted for span in tally.spans) == 2

"""Mode sfi where a text repeats itself: several fast steps in one pass give what single ones give, and leave nothing of wrong guesses."""

import random

import pytest
from support.replay import Given, Replay

from sfi_local import Sampling, SfiParams, load
from sfi_local.errors import DecodeError
from sfi_local.runtime.ahead import MAX_GUESSES
from sfi_local.runtime.generate import generate

RNG = random.Random(2)
RANDOM = [RNG.randrange(10, 250) for _ in range(900)]
TEXT = RANDOM[:300]


@pytest.fixture(scope="module", params=["sfi", "auto"])
def model(tiny, request):
    with load(tiny, mode=request.param, n_ctx=1024, n_threads=1, params=SfiParams(n_sink=2, n_recent=256, n_selected=64, auto_depth=1), cache=False) as one:
        one.open_session(1, 1)
        one.vocabulary.is_end = lambda token: token == 5
        yield one


@pytest.fixture
def slot(model, monkeypatch):
    model.slot.cut(0)
    model.slot.fast_costs = Given(longest=16)
    model.slot.passes = []
    do = model.slot.try_fast
    monkeypatch.setattr(model.slot, "try_fast", lambda tokens: model.slot.passes.append(do(tokens)) or model.slot.passes[-1])
    return model.slot


def run(slot, model, prompt, sampler, n, **options):
    return [step.token for step in generate(slot, model.vocabulary, prompt, sampler, n, **{"guess": True, **options})]


def test_what_repeats_takes_few_passes(slot, model):
    assert run(slot, model, TEXT + TEXT[:20], Replay(TEXT[20:250]), 230) == TEXT[20:250]
    assert sum(map(len, slot.passes)) > 150 and len(slot.passes) < 40 and max(map(len, slot.passes)) <= MAX_GUESSES + 1
    assert slot.tokens == TEXT + TEXT[:249] and slot.n_drafted == 0
    assert {info.kind for infos in slot.passes for info in infos} == {"fast"}


def test_what_does_not_repeat_takes_single_steps(slot, model):
    slot.fast_costs = Given(0.4, 16)
    assert run(slot, model, RANDOM[:300], Replay(RANDOM[300:700]), 400) == RANDOM[300:700]
    assert sum(map(len, slot.passes)) < 20


def test_where_a_pass_is_too_dear_none_is_taken(slot, model):
    slot.fast_costs = Given(1.1, 16)
    assert run(slot, model, TEXT + TEXT[:20], Replay(TEXT[20:200]), 180) == TEXT[20:200] and slot.passes == []


def test_nobody_guesses_who_was_not_asked_to_or_has_a_schedule(slot, model):
    for options in ({"guess": False}, {"schedule": lambda *_: "fast"}):
        slot.cut(0)
        assert run(slot, model, TEXT + TEXT[:20], Replay(TEXT[20:100]), 80, **options) == TEXT[20:100] and slot.passes == []


def test_wrong_guesses_are_taken_back(slot, model):
    changed = [token if i % 17 else 251 for i, token in enumerate(TEXT)]
    assert run(slot, model, TEXT + changed[:20], Replay(changed[20:250]), 230) == changed[20:250]
    assert slot.passes and slot.tokens == TEXT + changed[:249]


@pytest.mark.parametrize("temp", [0, 0.8])
def test_with_the_same_seed_it_is_what_single_steps_give(slot, model, temp):
    draw = lambda: Sampling(temp=temp, seed=3).chain()
    for prompt in (TEXT, [7, 8, 9] * 60):
        slot.cut(0)
        single = run(slot, model, prompt, draw(), 60, guess=False)
        slot.cut(0)
        assert run(slot, model, prompt, draw(), 60) == single


def test_the_answer_ends_where_it_would(slot, model):
    text = TEXT[:150] + [5] + TEXT[150:]
    assert run(slot, model, text + text[:20], Replay(text[20:]), None)[-1] == 5
    assert len(run(slot, model, TEXT + TEXT[:20], Replay(TEXT[20:]), 33)) == 33


def test_an_answer_that_is_left_leaves_no_guess(slot, model):
    steps = generate(slot, model.vocabulary, TEXT + TEXT[:20], Replay(TEXT[20:]), 100, guess=True)
    for _ in range(50):
        next(steps)
    steps.close()
    assert slot.n_drafted == 0 and slot.tokens[:320] == (TEXT + TEXT[:20]) and slot.tokens == (TEXT + TEXT)[:len(slot.tokens)]


def test_an_error_in_a_pass_leaves_the_sure_tokens(slot, model, monkeypatch):
    def fails(tokens, seq=0):
        raise DecodeError("broken")

    generated = generate(slot, model.vocabulary, TEXT + TEXT[:20], Replay(TEXT[20:]), 100, guess=True)
    next(generated)
    monkeypatch.setattr(slot.engine, "step_fast", fails)
    with pytest.raises(DecodeError):
        list(generated)
    assert slot.n_drafted == 0 and slot.tokens == (TEXT + TEXT)[:len(slot.tokens)] and len(slot.tokens) >= 320
    monkeypatch.undo()
    assert run(slot, model, TEXT + TEXT[:20], Replay(TEXT[20:60]), 40) == TEXT[20:60]


def test_the_end_of_the_context_ends_the_answer(slot, model):
    text = TEXT * 3 + TEXT[:100]
    tokens = run(slot, model, text, Replay(TEXT[100:] + TEXT), None)
    assert len(tokens) == 1024 - len(text) + 1 and slot.passes

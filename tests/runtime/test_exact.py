"""Mode exact gives what dense decoding gives, and survives every ending."""

import ctypes
import itertools
from collections import Counter

import numpy as np
import pytest
from support.replay import interrupted

from sfi_local import Sampling, SfiParams, Tally, load
from sfi_local.errors import ArgumentError, BusyError
from sfi_local.runtime.ngram import Ngrams
from sfi_local.runtime.slot import Slot
from sfi_local.runtime.ties import GROWTH, MARGIN, SHORT, STEPS, Noise

PROMPTS = ["The quick brown fox jumps over the lazy dog. " * 8, "A list: [1, 2, 3]; and more of it. " * 10, "1234567890, " * 25]
LITTLE = SfiParams.of("frozen", n_sink=2, n_recent=16, n_selected=8, max_span=32, auto_depth=1)   # drafts are mostly wrong
MUCH = SfiParams.of("frozen", n_sink=4, n_recent=64, n_selected=600, max_span=32, auto_depth=1)   # drafts are mostly right
SKETCH = SfiParams(n_sink=2, n_recent=16, n_selected=8, auto_depth=1)
GREEDY = Sampling(temp=0)


@pytest.fixture(scope="module")
def models(tiny):
    made = {}

    def get(mode, params=LITTLE, **options):
        key = (mode, params, *sorted(options.items()))
        if key not in made:
            made[key] = load(tiny, mode=mode, params=params, n_threads=1, **options)
        return made[key]

    yield get
    for model in made.values():
        model.close()


@pytest.fixture
def fast_alone(monkeypatch):
    """The text itself drafts nothing."""
    monkeypatch.setattr(Ngrams, "odds", lambda self, n: [])


def run(model, prompt=PROMPTS[0], n=40, **options):
    tally, items = Tally(), []
    options.setdefault("sampling", GREEDY)
    for step in model.generate(prompt, n=n, **options):
        tally.add(step)
        items.append(step)
    tally.items = items
    return tally


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("draft", [1, 3, 8, 16])
@pytest.mark.parametrize("params", [LITTLE, MUCH, LITTLE.replace(policy="window"), SKETCH], ids=["little", "much", "window", "sketch"])
def test_greedy_text_is_that_of_dense_decoding(models, prompt, draft, params, fast_alone):
    dense, exact = run(models("dense"), prompt), run(models("exact", params), prompt, draft=draft)
    assert exact.tokens == dense.tokens and exact.text == dense.text and exact.finish == dense.finish
    assert exact.n_accepted < exact.n_drafted if params != MUCH else exact.n_accepted > 0.8 * exact.n_drafted


@pytest.mark.parametrize("sampling", [dict(temp=0.8), dict(temp=1.5, top_k=0, top_p=1.0, min_p=0.0), dict(temp=1, top_k=5)])
@pytest.mark.parametrize("params", [LITTLE, MUCH], ids=["little", "much"])
def test_with_the_same_seed_sampled_text_is_that_of_dense_decoding(models, sampling, params):
    dense, exact, n_drafted = models("dense"), models("exact", params), 0
    dense.close_session(), exact.close_session()  # the same prefill for both: one of other batches rounds otherwise
    for seed in range(4):
        draw = Sampling(seed=seed, **sampling)
        expected, tally = run(dense, sampling=draw), run(exact, sampling=draw, draft=6)
        assert tally.tokens == expected.tokens
        n_drafted += tally.n_drafted
    assert n_drafted > 0


def test_sampled_tokens_have_the_distribution_of_dense_decoding(models):
    """The third token after a prompt, over 400 seeds; that of dense decoding is estimated with 400 others."""
    sampling = dict(temp=1.0, top_k=3, top_p=1.0, min_p=0.0)
    draw = lambda model, seeds, **options: Counter(
        tuple(run(model, n=3, sampling=Sampling(seed=s, **sampling), **options).tokens[1:]) for s in seeds)
    exact = draw(models("exact"), range(400), draft=2)
    dense = draw(models("dense"), range(1000, 1400))
    cells = [c for c in set(exact) | set(dense) if exact[c] + dense[c] >= 10]
    chi2 = sum((exact[c] - dense[c]) ** 2 / (exact[c] + dense[c]) for c in cells)
    assert len(cells) >= 4 and chi2 < len(cells) + 4 * (2 * len(cells)) ** 0.5


def test_the_stream_tells_what_was_done(models, fast_alone):
    exact = run(models("exact", MUCH), n=40, draft=5)
    first, *others = exact.items
    assert first.kind == "prefill" and {s.kind for s in others} <= {"fast", "slow", "dense"}
    assert all(s.reason == "" if s.kind == "fast" else s.reason in ("verify", "forced") for s in others)
    assert [s.pos for s in exact.items] == list(range(first.pos, first.pos + 40))
    assert all(bool(s.drafted_by) == (s.reason == "verify") for s in others)
    stats = models("exact", MUCH).session.engine.stats()
    assert (exact.reasons["verify"], exact.n_drafted) == (stats.n_verify, stats.n_fast)
    assert 0 < exact.steps["slow"] < stats.n_verify  # some passes ended with a refresh
    assert exact.steps["fast"] == exact.n_accepted < exact.n_drafted + 1
    assert stats.ms_verify + stats.ms_fast + stats.ms_dense == pytest.approx(exact.ms_steps, rel=1e-6)


def test_below_the_depth_where_fast_steps_can_pay_none_is_taken(models, fast_alone):
    tally = run(models("exact", LITTLE.replace(auto_depth=4000)))
    assert tally.steps == {"dense": 39} and tally.reasons == {"forced": 39}
    assert tally.tokens == run(models("dense")).tokens


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9])
def test_n_is_kept_within_a_span(models, n):
    tally = run(models("exact", MUCH), n=n, draft=6)
    assert tally.tokens == run(models("dense")).tokens[:n] and tally.finish == "length"


@pytest.mark.parametrize("at", [4, 9, 17])
def test_a_stop_text_ends_it_within_a_span(models, at):
    text = run(models("dense")).text
    stop = text[at:at + 3]
    tally = run(models("exact", MUCH), draft=8, stop=[stop])
    assert tally.text == text[:text.index(stop)] and tally.finish == "stop"
    assert run(models("exact", MUCH), draft=8).text == text


def test_the_end_of_an_answer_within_a_span_ends_it(models, monkeypatch):
    for mode in ("dense", "exact"):
        model = models(mode, MUCH)
        end = run(models("dense")).tokens[13]
        monkeypatch.setattr(model.vocabulary, "is_end", lambda token: token == end)
    dense, exact = run(models("dense", MUCH)), run(models("exact", MUCH), draft=8)
    assert exact.tokens == dense.tokens and exact.finish == dense.finish == "end" and exact.text == dense.text


@pytest.mark.parametrize("params", [LITTLE, MUCH], ids=["little", "much"])
def test_a_full_context_ends_it_where_it_ends_dense_decoding(tiny, params, monkeypatch):
    params = params.replace(n_selected=min(params.n_selected, 400))
    tallies = {}
    for mode, options in (("dense", {}), ("exact", {"draft": 8})):
        with load(tiny, mode=mode, n_ctx=512, n_threads=1, params=params) as model:
            monkeypatch.setattr(model.vocabulary, "is_end", lambda token: False)
            tallies[mode] = run(model, n=None, **options)
    assert tallies["exact"].tokens == tallies["dense"].tokens
    assert tallies["exact"].finish == tallies["dense"].finish == "context"


def test_a_second_turn_reuses_the_cache_and_equals_dense(models):
    def turns(model, **options):
        first = run(model, n=30, **options)
        prompt = model.prompt_tokens(PROMPTS[0]) + first.tokens + model.tokenize(" And then?")
        second = run(model, prompt, n=30, **options)
        return first.tokens, second.tokens, model.session.n_prefilled

    dense, exact = turns(models("dense")), turns(models("exact"), draft=5)
    assert exact[:2] == dense[:2] and exact[2] <= dense[2] == len(" And then?") + 1


@pytest.mark.parametrize("method, when", [("draft", 0), ("draft", 4), ("verify", 0), ("verify", 3), ("rollback", 2)])
def test_ctrl_c_at_any_point_leaves_no_draft_behind(models, monkeypatch, method, when):
    model, expected = models("exact"), run(models("dense")).tokens
    with monkeypatch.context() as patch:
        patch.setattr(Slot, method, interrupted(method, when))
        with pytest.raises(KeyboardInterrupt):
            run(model, draft=5)
    kept = model.prompt_tokens(PROMPTS[0]) + expected[:8]
    assert run(model, kept, n=32, draft=5).tokens == expected[8:]


def test_a_generator_that_is_left_leaves_no_draft_behind(models):
    model, expected = models("exact"), run(models("dense")).tokens
    for step in model.generate(PROMPTS[0], n=40, sampling=GREEDY, draft=5):
        if step.pos > 370:
            break
    assert run(model, draft=5).tokens == expected


def test_a_second_generation_is_refused_until_the_first_is_over(models):
    model = models("exact")
    first = model.generate(PROMPTS[0], n=20, sampling=GREEDY)
    begun = next(first)
    with pytest.raises(BusyError, match="cancel"):
        run(model, "Another prompt", n=3)
    rest = list(first)
    assert [begun, *rest][-1].finish == "length" and len(rest) == 19
    run(model, "Another prompt", n=3)


@pytest.mark.parametrize("mode, options", [("exact", {"draft": -1}), ("exact", {"draft": 33}), ("dense", {"draft": 4}),
                                           ("exact", {"schedule": lambda *_: "fast"})])
def test_options_that_the_mode_does_not_have_are_refused(models, mode, options):
    with pytest.raises(ArgumentError, match="mode exact"):
        run(models(mode), **options)


class Logits:
    """A context of one row."""

    def __init__(self, *values):
        self.values = np.array(values, np.float32)
        self.model, self.n_vocab = self, lambda: len(values)

    def get_logits_ith(self, row):
        return self.values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


class Draw:
    """A sampler whose next random number is known; None: it is greedy."""

    def __init__(self, number=None):
        self.number = number

    def clone(self):
        return Draw(self.number)

    def close(self):
        pass

    def sample(self, context, row=-1):
        if self.number is None:
            return int(context.values.argmax())
        order = np.argsort(-context.values, kind="stable")
        share = np.exp(context.values[order].astype(float))
        return int(order[np.searchsorted(share.cumsum() / share.sum(), self.number)])


@pytest.mark.parametrize("gap, tie", [(0.0, True), (0.99, True), (1.01, False)])
def test_a_greedy_tie_is_a_gap_below_the_margin(gap, tie):
    """gap: of the two most likely tokens, in margins"""
    noise, context = Noise(), Logits(1.0, 3.0, 3.0 - gap * MARGIN * 0.01)
    before, noise.largest, noise.settled = context.values.tolist(), 0.01, True
    assert noise.draw(context, 0, Draw()) == (1, tie) and context.values.tolist() == before
    noise.settled = False
    assert noise.draw(context, 0, Draw()) == (1, gap * MARGIN < MARGIN * GROWTH)
    noise.largest = 0.0
    assert noise.draw(context, 0, Draw()) == (1, False)


@pytest.mark.parametrize("number, tie", [(0.1, False), (0.485, True), (0.515, True), (0.65, False), (0.79, True), (0.9, False)])
def test_a_tie_of_sampled_tokens_is_a_random_number_near_the_border_of_two(number, tie):
    """Tokens of 0.5, 0.3 and 0.2: two equally likely ones are no tie, if the number lies far from where they meet."""
    noise, context = Noise(), Logits(*np.log([0.2, 0.5, 0.3]))
    noise.largest, noise.settled = 0.2 / MARGIN, True
    assert noise.draw(context, 0, Draw(number)) == (1 if number < 0.5 else 2 if number < 0.8 else 0, tie)


def test_noise_is_seen_by_drafting_and_is_little(models):
    """Over STEPS dense steps in a row, the drafts of the first span before them, where a batch rounds otherwise at all."""
    model = models("exact", MUCH)
    model.close_session()
    kinds = [step.kind for step in run(model, draft=4, n=40).items]
    noise = model.session.noise
    assert noise.largest < 1e-2 and not noise.wants_steps
    if noise.largest:
        longest = max(len(list(group)) for dense, group in itertools.groupby(kinds, "dense".__eq__) if dense)
        assert longest >= STEPS and kinds[:4].count("fast") and kinds[-10:].count("fast")


def test_what_dense_steps_gave_is_compared_once_and_only_in_a_row():
    noise, context = Noise(), Logits(1.0, 2.0)
    for depth in (7, 9, 10):
        noise.remember(context, depth)
    assert [noise.n_steps(depth) for depth in (9, 10, 11)] == [0, 2, 0]
    assert [noise.n_again(10, 4), noise.n_again(11, 4)] == [1, 0]
    context.values += 0.25
    noise.compare(context, 2, 4)
    assert (noise.largest, noise.n_steps(10), noise.wants_steps) == (0.25, 0, True)
    for depth in range(100, 100 + 2 * STEPS):
        noise.remember(context, depth)
    depth = 99 + 2 * STEPS
    assert noise.n_steps(depth) == noise.n_again(depth, 4) == STEPS
    noise.compare(context, STEPS, 4)
    assert (noise.largest, noise.wants_steps) == (0.25, False)
    noise.remember(context, depth + 1)
    assert [noise.n_again(depth + 1, n) for n in (4, STEPS + 4, STEPS + 5)] == [0, 0, 1]  # few, and where a batch is longer than any before


def test_where_long_batches_alone_differ_they_are_not_taken():
    noise, context = Noise(), Logits(1.0, 2.0)
    assert noise.most(5, 32) == 0  # nothing to compare it with
    noise.remember(context, 5)
    assert noise.most(5, 32) == 32 and noise.n_again(5, 32) == 1
    context.values += 0.25
    assert not noise.compare(context, 1, 32)
    noise.remember(context, 6), noise.remember(context, 7)
    assert noise.most(7, 32) == SHORT and [noise.n_again(7, n) for n in (3, SHORT)] == [1, 0]
    assert noise.compare(context, 1, 3) and (noise.looked, noise.largest, noise.limit) == (4, 0.0, SHORT)
    assert noise.most(9, 32) == 4  # after a prefill, as long as was looked at


def test_where_short_batches_differ_too_the_longest_are_taken():
    noise, context = Noise(), Logits(1.0, 2.0)
    for n in (31, 4):
        noise.remember(context, 5)
        context.values += 0.25
        assert noise.compare(context, 1, n) == (n < SHORT)
    assert (noise.largest, noise.limit, noise.wants_steps) == (0.25, 0, True) and noise.most(9, 32) == 32


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temp=0.8, seed=3)], ids=["greedy", "sampled"])
def test_dense_steps_between_spans_can_be_ties_too(models, sampling):
    """Their K and V come from batches; with noise as large as this everything is a tie."""
    model = models("exact", MUCH)
    model.close_session()
    run(model, n=2)
    model.session.noise.largest = 1e6
    assert all(run(model, n=20, draft=0, sampling=sampling).ties[1:])
    model.close_session()


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_slowfastllama_decodes_exactly_what_it_decodes_densely(tiny, temperature):
    from sfi_local import SlowFastLlama

    def answer(mode):
        llm = SlowFastLlama(str(tiny), mode=mode, n_ctx=1024, n_threads=1, sfi_params=MUCH.replace(auto_depth=1))
        choice = llm.create_completion(PROMPTS[0], max_tokens=60, temperature=temperature, seed=7, repeat_penalty=1.2)["choices"][0]
        n_drafted = llm.steps.n_verify
        llm.close()
        return choice["text"], n_drafted

    (dense, none), (exact, some) = answer("dense"), answer("exact")
    assert dense == exact and none == 0 < some


def test_slowfastllama_refuses_what_exact_decoding_cannot_give(tiny):
    from sfi_local import SlowFastLlama

    with pytest.raises(ArgumentError, match="logprobs"):
        SlowFastLlama(str(tiny), mode="exact", logits_all=True)


def test_the_command_line_decodes_exactly_and_says_so(cli, tiny):
    common = ("run", str(tiny), "-f", "-", "--temp", "0", "-n", "30", "--raw", "--set", "policy=frozen,n_selected=16,n_recent=32")
    text = PROMPTS[0]
    dense, exact = cli(*common, "--mode", "dense", input=text), cli(*common, "--mode", "exact", "--set", "draft=4", "--verbose", input=text)
    assert exact.returncode == 0 and exact.stdout == dense.stdout
    assert b"drafted " in exact.stderr and b"ties 0" in exact.stderr
    refused = cli(*common, "--mode", "sfi", "--set", "draft=4", input=text)
    assert refused.returncode == 2 and b"--mode exact" in refused.stderr

"""The generator: one stream whose items tell the truth, in every mode, and a session that survives every ending."""

import signal
import threading

import pytest

from sfi_local import Message, Sampling, SfiParams, Tally, load
from sfi_local.errors import ArgumentError, BusyError, DetachedError, InputError, ModelFileError

PROMPT = "The quick brown fox jumps over the lazy dog. " * 12
SMALL = SfiParams.of("frozen", n_recent=32, n_selected=40, max_span=12, min_span=2)
GREEDY = Sampling(temp=0)


@pytest.fixture(scope="module")
def models(tiny):
    made = {}

    def get(mode="sfi", **options):
        key = (mode, *sorted(options))
        if key not in made:
            options.setdefault("params", SMALL)
            made[key] = load(tiny, mode=mode, n_threads=1, **options)
        return made[key]

    yield get
    for model in made.values():
        model.close()


def run(model, prompt=PROMPT, n=40, **options):
    options.setdefault("sampling", GREEDY)
    return list(model.generate(prompt, n=n, **options))


@pytest.mark.parametrize("mode, kinds", [("sfi", {"slow", "fast"}), ("dense", {"dense"}), ("stock", {"stock"}),
                                         ("auto", {"slow", "fast"})])
def test_the_first_item_is_of_prefill_and_the_others_of_the_mode(models, mode, kinds):
    steps = run(models(mode))
    assert steps[0].kind == "prefill" and {s.kind for s in steps[1:]} == kinds
    assert all(bool(s.reason) == (s.kind in ("slow", "dense")) for s in steps)
    assert [s.pos for s in steps] == list(range(steps[0].pos, steps[0].pos + len(steps)))
    assert (steps[-1].finish, {s.finish for s in steps[:-1]}) == ("length", {""})


def test_every_step_is_counted_by_the_engine_too(models):
    model, tally = models("sfi"), Tally()
    for step in model.generate(PROMPT, n=40, sampling=GREEDY):
        tally.add(step)
    stats = model.session.engine.stats()
    assert (tally.steps["slow"], tally.steps["fast"]) == (stats.n_slow, stats.n_fast)
    assert dict(tally.reasons) == stats.reasons


def test_the_text_is_that_of_the_tokens(models):
    model = models("sfi")
    steps = run(model)
    assert "".join(s.text for s in steps) == model.detokenize([s.token for s in steps if s.finish != "end"])


def test_generating_again_gives_the_same_tokens_and_computes_only_what_is_new(models):
    model = models("dense")
    first = [s.token for s in run(model)]
    assert [s.token for s in run(model)] == first
    assert model.session.n_prefilled == 1
    run(model, PROMPT + "More.")
    assert model.session.n_prefilled == len("More.")


def test_a_seed_decides_the_draw(models):
    draw = [[s.token for s in run(models("dense"), sampling=Sampling(temp=1.0, seed=seed))] for seed in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]


def test_generation_ends_before_a_stop_text(models):
    model = models("dense")
    text = "".join(s.text for s in run(model))
    stop = text[10:12]
    steps = run(model, stop=[stop])
    assert "".join(s.text for s in steps) == text[:text.index(stop)]
    assert steps[-1].finish == "stop"


def test_a_full_context_ends_the_answer(tiny):
    with load(tiny, mode="sfi", n_ctx=560, n_threads=1, params=SMALL) as model:
        steps = run(model, n=None)
        assert steps[-1].finish == "context" and len(steps) == 560 - steps[0].depth + 1
        with pytest.raises(InputError, match="560"):
            run(model, "x" * 700)
        assert run(model, "y" * 100)[0].depth == 100


def test_a_context_grows_with_the_conversation(tiny):
    with load(tiny, mode="dense", n_threads=1) as model:
        run(model, "a" * 100, n=4)
        assert model.session.n_ctx == model.n_ctx_limit == 4096


def test_messages_stand_in_the_chat_template(models):
    model = models("dense")
    tokens = model.prompt_tokens([{"role": "user", "content": "Hi <|im_end|>"}])
    special = model.tokenize("<|im_end|>", special=True)
    assert len(special) == 1 and tokens.count(special[0]) == 1
    assert model.prompt_tokens([Message("user", ["Hi <|im_end|>"])]) == tokens


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_refused(models, prompt):
    with pytest.raises(InputError, match="empty"):
        run(models("dense"), prompt)


@pytest.mark.parametrize("options", [{"mode": "fast"}, {"n_ctx": 0}, {"n_threads": 1000}, {"type_k": "q5_0"},
                                     {"params": SfiParams.of("frozen", n_selected=0)}])
def test_options_out_of_range_are_refused_before_the_model_is_read(options):
    with pytest.raises(ArgumentError):
        load("does-not-matter.gguf", **options)


def test_sampling_out_of_range_is_refused(models):
    for change in ({"temp": -1}, {"top_p": 2}, {"min_p": -0.1}, {"top_k": -1}, {"seed": -1}):
        with pytest.raises(ArgumentError):
            run(models("dense"), sampling=Sampling(**change))


def test_a_typed_budget_is_refused_and_the_default_one_is_made_smaller(tiny):
    with load(tiny, mode="sfi", n_ctx=1024, n_threads=1, params=SfiParams.of("frozen")) as model:
        with pytest.raises(ArgumentError, match="2308 cells"):
            run(model)
    with load(tiny, mode="sfi", n_ctx=320, n_threads=1) as model:
        run(model, prompt="Name three rivers.", n=2)
        assert model.session.params.budget == 320 and "320" in model.unread_notes()[0]


def test_progress_begins_with_nothing_and_ends_with_everything_that_is_new(models):
    model, told = models("dense"), []
    model.close_session()
    run(model, progress=lambda done, total: told.append((done, total)))
    (_, total), n = told[0], told[-1][0]
    assert told[0][0] == 0 and n == total > 0 and told == sorted(told)


def test_ctrl_c_in_prefill_stops_it_and_leaves_a_usable_session(models):
    model = models("dense")
    model.close_session()

    def interrupt(done, total):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(model, progress=interrupt)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run(model)[-1].finish == "length"


def test_ctrl_c_between_steps_leaves_a_usable_session(models):
    model, seen = models("sfi"), []
    with pytest.raises(KeyboardInterrupt):
        for step in model.generate(PROMPT, n=40, sampling=GREEDY):
            seen.append(step.token)
            if len(seen) == 5:
                raise KeyboardInterrupt
    assert [s.token for s in run(model)][:5] == seen


def test_a_model_may_be_used_from_another_thread(models):
    result = []
    thread = threading.Thread(target=lambda: result.append(run(models("dense"))))
    thread.start()
    thread.join()
    assert [s.token for s in result[0]] == [s.token for s in run(models("dense"))]


def test_a_second_generation_is_refused_until_the_first_is_over(models):
    model = models("dense")
    first = model.generate(PROMPT, n=20, sampling=GREEDY)
    begun = next(first)
    with pytest.raises(BusyError, match="cancel"):
        run(model, "Another prompt", n=3)
    rest = list(first)
    assert [begun, *rest][-1].finish == "length" and len(rest) == 19
    run(model, "Another prompt", n=3)


@pytest.mark.parametrize("mode", ["dense", "stock"])
def test_a_closed_session_ends_its_generation(models, mode):
    first = models(mode).generate(PROMPT, n=20, sampling=GREEDY)
    next(first)
    models(mode).close_session()
    with pytest.raises(DetachedError):
        next(first)


@pytest.mark.parametrize("architecture", ["bert", "t5", "llada"])
def test_a_model_that_does_not_generate_is_refused(tmp_path, architecture):
    from support.tiny_model import write_tiny

    with pytest.raises(ModelFileError, match="does not generate"):
        load(write_tiny(tmp_path / "encoder.gguf", architecture=architecture))


def test_a_model_llama_cpp_does_not_know_is_a_sentence(tmp_path):
    from support.tiny_model import write_tiny

    with pytest.raises(ModelFileError, match="unknown model architecture"):
        load(write_tiny(tmp_path / "odd.gguf", architecture="oddball"))

"""SlowFastLlama: programs written for llama-cpp-python run slow-fast with one changed import."""

import gc
import pickle

import pytest

pytestmark = pytest.mark.usefixtures("native")

from support.stacks import on_a_small_stack  # noqa: E402
from support.tiny_model import write_tiny  # noqa: E402

from sfi_local import SfiParams, SlowFastLlama  # noqa: E402
from sfi_local.binding.context import logits  # noqa: E402
from sfi_local.errors import ArgumentError, BusyError, DetachedError, InputError, ModelFileError  # noqa: E402
from sfi_local.tuning import auto_depth  # noqa: E402
from sfi_local.tuning.tolerance import Setting, remember  # noqa: E402

SMALL = SfiParams.of("frozen", n_recent=32, n_selected=40, max_span=12, min_span=2)
PROMPT = "The quick brown fox jumps over the lazy dog. " * 12


@pytest.fixture
def llama(tiny):
    from sfi_local import SlowFastLlama

    made = []

    def make(**options):
        options = {"mode": "sfi", "n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "sfi_params": SMALL, **options}
        made.append(SlowFastLlama(str(tiny), **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def complete(llm, prompt=PROMPT, n=30, **options):
    return llm.create_completion(prompt, max_tokens=n, temperature=0, **options)["choices"][0]["text"]


def test_completion_takes_slow_and_fast_steps(llama):
    llm = llama()
    complete(llm)
    assert llm.steps.n_fast > 15 and llm.steps.n_slow >= 1 and llm.why_stock == ""
    assert llm.last_step.kind in ("slow", "fast")


def test_dense_equals_the_class_it_replaces(llama, tiny):
    from llama_cpp import Llama

    theirs = Llama(str(tiny), n_ctx=1024, n_threads=1, flash_attn=True, verbose=False)
    assert complete(llama(mode="dense"), n=12) == complete(theirs, n=12)
    theirs.close()


def test_a_budget_of_everything_equals_dense(llama):
    assert complete(llama(sfi_params=SfiParams.of("frozen", n_selected=700))) == complete(llama(mode="dense"))


def test_a_prompt_that_continues_reuses_the_cache_and_steps_stay_fast(llama):
    llm = llama()
    complete(llm)
    llm.reset_steps()
    complete(llm, PROMPT + "And then")
    assert llm.steps.n_prefill < 40 and llm.steps.n_fast > 15


def test_streaming_chat_gives_the_text_of_the_whole_answer(llama):
    from llama_cpp import LlamaGrammar

    def chat(**options):
        letters = LlamaGrammar.from_string('root ::= [a-z ]{25}', verbose=False)  # llama-cpp-python streams whole characters
        messages = [{"role": "system", "content": PROMPT}, {"role": "user", "content": "What does the fox do?"}]
        return llama().create_chat_completion(messages, max_tokens=30, temperature=0, grammar=letters, **options)

    whole = chat()["choices"][0]["message"]["content"]
    assert len(whole) == 25
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chat(stream=True)) == whole


def test_a_grammar_is_obeyed_on_fast_steps(llama):
    from llama_cpp import LlamaGrammar

    llm = llama()
    grammar = LlamaGrammar.from_string('root ::= ("yes " | "no "){8}', verbose=False)
    text = complete(llm, n=60, grammar=grammar)
    assert set(text.split()) <= {"yes", "no"} and len(text.split()) == 8
    assert llm.steps.n_fast > 5


@pytest.mark.parametrize("prompt", [PROMPT[:45], PROMPT])
def test_logits_of_every_token_come_from_slow_and_fast_steps_too(llama, tiny, prompt):
    from llama_cpp import Llama

    llm = llama(logits_all=True, sfi_params=SfiParams.of("frozen", n_selected=700))  # everything: equal to dense
    theirs = Llama(str(tiny), n_ctx=1024, n_threads=1, flash_attn=True, logits_all=True, verbose=False)
    mine, other = (one.create_completion(prompt, max_tokens=4, temperature=0, logprobs=2, echo=True)["choices"][0]["logprobs"]
                   for one in (llm, theirs))
    assert mine["tokens"] == other["tokens"] and llm.why_stock == "" and llm.steps.n_fast > 0
    assert [x for x in mine["token_logprobs"] if x] == pytest.approx([x for x in other["token_logprobs"] if x], abs=0.1)
    theirs.close()


@pytest.mark.parametrize("params", [SMALL, SfiParams.of("sketch", n_recent=32, n_selected=40)])
def test_a_saved_state_goes_on_with_a_fast_step(llama, params):
    llm, other = llama(sfi_params=params), llama(sfi_params=params, n_ctx=1280)
    complete(llm, n=5)
    state = pickle.loads(pickle.dumps(llm.save_state()))
    other.load_state(state)
    for one in (llm, other):
        one.eval([65])
        assert one.last_step.kind == "fast"
    assert logits(llm._ctx, -1).tolist() == logits(other._ctx, -1).tolist()


def test_a_cache_of_llama_cpp_python_goes_on_with_a_fast_step(llama):
    from llama_cpp import LlamaRAMCache

    llm = llama(sfi_params=SMALL)
    llm.set_cache(LlamaRAMCache())
    first, other = [[start + i * i % 97 for i in range(200)] for start in (10, 120)]
    for prompt in (first, other):
        llm.create_completion(prompt, max_tokens=5, temperature=0)
    llm.reset_steps()
    llm.create_completion(first, max_tokens=5, temperature=0)
    assert llm.steps.n_prefill == 1 and llm.steps.n_slow == 0 and llm.steps.n_fast > 0  # the last token, for its logits


def test_a_state_of_llama_cpp_python_decodes_on(llama):
    llm = llama()
    complete(llm, n=5)
    state = llm.save_state()
    del state.sfi_state
    llm.reset()
    llm.load_state(state)
    llm.eval([65])
    assert llm.last_step.kind == "slow"


def test_what_cannot_be_meant_is_refused(tiny, tmp_path):
    from sfi_local import SlowFastLlama

    with pytest.raises(ArgumentError, match="embedding"):
        SlowFastLlama(str(tiny), embedding=True)
    with pytest.raises(ArgumentError, match="mode"):
        SlowFastLlama(str(tiny), mode="quick")
    with pytest.raises(ModelFileError):
        SlowFastLlama(str(tmp_path / "none.gguf"))


# ---- what is measured once, as by load -------------------------------------------------------------------------------

TIMES = [auto_depth.Timing(100, 6.0, 6.0, 5.8), auto_depth.Timing(200, 7.0, 7.0, 5.8)]
DEPTH = auto_depth.break_even(TIMES, SMALL)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A cache of its own, and measurements that take no time; a list of the calls."""
    calls = []
    monkeypatch.delenv(auto_depth.ENV, raising=False)
    monkeypatch.setenv("SFI_LOCAL_CACHE", str(tmp_path))
    monkeypatch.setattr(auto_depth, "measure", lambda model, params, *types: calls.append((params.budget, types)) or TIMES)
    return calls


def test_auto_begins_where_it_was_measured_to_pay_and_load_knows_it(llama, measured, tiny):
    from sfi_local import Sampling, load

    llm, again = llama(mode="auto"), llama(mode="auto")
    assert llm.engine.params == SMALL.replace(auto_depth=DEPTH) == again.engine.params and 76 < DEPTH < 200
    assert (llm.auto_found, again.auto_found, measured) == ("measured", "measured before", [(76, ("f16", "f16"))])
    assert f"pays from a depth of {DEPTH} tokens" in llm.notes[0] and not again.notes
    with load(tiny, n_threads=1, params=SMALL) as model:
        list(model.generate("x" * 100, n=2, sampling=Sampling(temp=0)))
        assert model.auto_found == "measured before"
    llm.eval([65] * (DEPTH - 5))
    kinds = [(llm.eval([65]), llm.last_step.kind)[1] for _ in range(20)]
    assert set(kinds[:5]) == {"dense"} and "fast" in kinds[5:] and "dense" not in kinds[6:]


@pytest.mark.parametrize("options, depth", [
    ({"sfi_params": SMALL.replace(auto_depth=333)}, 333), ({"n_ctx": 256, "sfi_params": SMALL.replace(n_selected=220)}, 512),
    ({"mode": "sfi"}, 0), ({"mode": "dense"}, 0)], ids=["given", "short", "sfi", "dense"])
def test_nothing_is_measured_where_it_decides_nothing(llama, measured, options, depth):
    llm = llama(**{"mode": "auto", **options})
    assert (llm.engine.params.auto_depth, llm.auto_found, llm.notes, measured) == (depth, "", [], [])


def test_the_types_of_k_and_v_are_measured_each(llama, measured):
    llama(mode="auto", type_k=8, type_v=8)
    assert measured == [(76, ("q8_0", "q8_0"))]


def test_the_environment_overrules_a_measurement(llama, measured, monkeypatch):
    monkeypatch.setenv(auto_depth.ENV, "123")
    assert llama(mode="auto").engine.params.auto_depth == 123 and not measured


def test_a_calibrated_tolerance_is_taken_and_what_was_given_is_kept(llama, measured, tiny):
    given, options = SfiParams(n_selected=40, tolerance=0.3), {"n_ctx": 512, "sfi_params": None}
    with pytest.raises(InputError, match="sfi-local calibrate"):
        llama(quality="floor", **options)
    remember(tiny, "f16", SfiParams(), 0.005, [Setting(4e-3, 0.02, 0.1), Setting(1e-3, 0.004, 0.2), Setting(1e-4, 0.001, 0.3)])
    tolerance = lambda **more: llama(**{**options, **more}).engine.params.tolerance
    assert tolerance() == tolerance(mode="auto") == tolerance(quality="floor") == 1e-3 and tolerance(quality=0.03) == 4e-3
    assert tolerance(sfi_params=given) == 0.3 and tolerance(sfi_params=given, quality=0.002) == 1e-4
    assert "No calibrated tolerance" in llama(quality=1e-9, **options).notes[0]
    copy = pickle.loads(pickle.dumps(llama(quality=0.03, **options)))
    assert copy.engine.params.tolerance == 4e-3
    copy.close()


def test_another_thread_is_refused(llama):
    import threading

    llm, errors = llama(), []

    def intrude():
        try:
            llm.engine.step(65)
        except BusyError as error:
            errors.append(error)

    def progress(done, total):
        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()

    llm.engine.prefill(llm.tokenize(PROMPT.encode()), progress=progress)
    assert errors


def test_it_can_be_pickled(llama):
    copy = pickle.loads(pickle.dumps(llama()))
    assert copy.mode == "sfi" and copy.engine.params.n_selected == 40
    copy.close()


def test_it_can_be_dropped_without_being_closed(llama, tiny):
    from sfi_local import SlowFastLlama

    SlowFastLlama(str(tiny), n_ctx=512, n_threads=1)
    gc.collect()


@pytest.mark.parametrize("stream", [False, True])
def test_chat_on_the_real_model(smollm2, stream):
    from sfi_local import SlowFastLlama as Llama

    llm = Llama(str(smollm2), n_ctx=2048, mode="sfi", sfi_params=SfiParams.of("frozen", n_recent=64, n_selected=128))
    answer = llm.create_chat_completion(
        [{"role": "user", "content": PROMPT * 2 + "\nWhich animal jumps?"}], max_tokens=24, temperature=0, stream=stream)
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in answer) if stream else (
        answer["choices"][0]["message"]["content"])
    assert "fox" in text.lower() and llm.steps.n_fast > 3
    llm.close()


def test_a_long_run_is_tokenised_on_a_small_stack(native, tmp_path):
    with_regex = write_tiny(tmp_path / "o200k.gguf", pre="gpt-4o")
    llm = SlowFastLlama(str(with_regex), n_ctx=512, mode="dense", n_threads=1)
    assert len(on_a_small_stack(lambda: llm.tokenize(b"A" * 20_000, add_bos=False))) == 20_000
    llm.close()
    with pytest.raises(DetachedError):
        llm.tokenize(b"Hello")

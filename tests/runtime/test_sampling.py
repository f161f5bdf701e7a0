"""Samplers: each has its effect, in every mode and in both classes, survives a clone, and what cannot be meant is refused."""

import math

import numpy as np
import pytest

from sfi_local import Sampling, SfiParams, load
from sfi_local.errors import ArgumentError, DecodeError, ModelFileError
from sfi_local.runtime.sampling import MAX_SEED

pytestmark = pytest.mark.usefixtures("native")

PROMPT = "The quick brown fox jumps over the lazy dog. " * 8
EVERYTHING = SfiParams.of("frozen", n_sink=4, n_recent=64, n_selected=600, max_span=32, auto_depth=1)
SAMPLERS = {
    "plain": {}, "repeat": {"repeat_penalty": 1.5}, "presence": {"presence_penalty": 3.0}, "frequency": {"frequency_penalty": 2.0},
    "dry": {"dry": 5.0, "dry_allowed_length": 1}, "xtc": {"xtc_probability": 1.0, "xtc_threshold": 0.02}, "typical": {"typical_p": 0.3},
    "sigma": {"top_n_sigma": 0.7}, "mirostat": {"mirostat": 1}, "mirostat 2": {"mirostat": 2}, "bias": {"logit_bias": {65: 50.0}},
    "grammar": {"grammar": 'root ::= "yes" [a-d]{20}'}, "schema": {"json_schema": {"type": "object", "properties": {"n": {"type": "integer"}}}},
}


@pytest.fixture(scope="module")
def models(tiny):
    made = {mode: load(tiny, mode=mode, n_threads=1, n_ctx=1024, params=EVERYTHING) for mode in ("dense", "exact", "stock")}
    yield made
    for model in made.values():
        model.close()


def run(model, n=30, prompt=PROMPT, **options):
    return list(model.generate(prompt, n=n, **options))


def tokens(steps):
    return [step.token for step in steps]


@pytest.mark.parametrize("name", SAMPLERS)
def test_exact_decoding_draws_what_dense_decoding_draws(models, name):
    sampling = Sampling(temp=1.0, seed=3, **SAMPLERS[name])
    dense, exact = (run(models[mode], sampling=sampling, **({"draft": 6} if mode == "exact" else {})) for mode in ("dense", "exact"))
    by_steps = [step for step in exact if step.drafted_by == "fast"]  # what the text drafts may all be wrong
    assert tokens(dense) == tokens(exact) and (any(step.n_drafted for step in exact) or len(exact) < 8)
    assert not by_steps or any(step.n_accepted for step in by_steps)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "plain"])
def test_each_changes_what_is_drawn(models, name):
    draw = lambda more: tokens(run(models["dense"], sampling=Sampling(temp=1.0, top_k=0, top_p=1, min_p=0, seed=5, **more)))
    assert draw(SAMPLERS[name]) != draw({})


@pytest.mark.parametrize("mode", ["dense", "exact", "stock"])
def test_a_grammar_and_a_schema_are_obeyed(models, mode):
    text = "".join(step.text for step in run(models[mode], sampling=Sampling(temp=0, grammar=SAMPLERS["grammar"]["grammar"])))
    assert text.startswith("yes") and set(text[3:]) <= set("abcd") and len(text) == 23
    steps = run(models[mode], n=40, sampling=Sampling(temp=0, logit_bias={ord("}") : 20.0}, **SAMPLERS["schema"]))
    assert "".join(step.text for step in steps).strip().startswith("{") and steps[-1].finish in ("end", "length")


def test_a_grammar_that_is_done_ends_the_answer(models):
    steps = run(models["dense"], sampling=Sampling(temp=0, grammar='root ::= "no"'))
    assert ("".join(step.text for step in steps), steps[-1].finish) == ("no", "end")


@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_a_draw_that_nothing_allows_is_a_sentence(models, mode):
    forbid = lambda tokens, logits: np.full_like(logits, -math.inf)
    with pytest.raises(DecodeError, match="forbids each"):
        run(models[mode], sampling=Sampling(temp=0), processors=[forbid])
    assert len(run(models[mode], n=3, sampling=Sampling(temp=0))) == 3


@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_processors_see_the_tokens_so_far_and_their_errors_come_out(models, mode):
    seen = []

    def only_letters(so_far, logits):
        seen.append(list(so_far))
        allowed = np.full_like(logits, -math.inf)
        allowed[97:123] = logits[97:123]
        return allowed

    steps = run(models[mode], n=20, sampling=Sampling(temp=0), processors=[only_letters])
    drawn, prompt = tokens(steps), models[mode].prompt_tokens(PROMPT)
    assert all(97 <= token < 123 for token in drawn) and seen[0] == prompt
    assert prompt + drawn[:-1] in seen

    def fail(so_far, logits):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(models[mode], sampling=Sampling(temp=0), processors=[fail])
    assert tokens(run(models[mode], n=5, sampling=Sampling(temp=0)))


@pytest.mark.parametrize("mode", ["dense", "exact", "stock"])
def test_logprobs_are_those_of_the_model_alone(models, mode):
    steps = run(models[mode], n=12, sampling=Sampling(temp=0, logit_bias={65: 100.0}), logprobs=3)
    assert {step.token for step in steps} == {65}  # drawn against the model
    for step in steps:
        assert len(step.top) == 3 and step.logprob <= step.top[0][1] <= 0
        assert sorted(step.top, key=lambda pair: -pair[1]) == list(step.top)
    assert all(step.logprob is None for step in run(models[mode], n=3, sampling=Sampling(temp=0)))
    greedy = run(models[mode], n=5, sampling=Sampling(temp=0), logprobs=1)
    assert all((step.token, step.logprob) == step.top[0] for step in greedy)


def test_penalties_count_the_prompt(models):
    prompt = [65, 66] * 100
    draw = lambda **more: tokens(run(models["dense"], n=1, prompt=prompt, sampling=Sampling(temp=0, **more)))[0]
    assert draw(presence_penalty=100.0, logit_bias={65: 60.0}) != 65 == draw(logit_bias={65: 60.0})


@pytest.mark.parametrize("wrong", [
    {"temp": -1}, {"temp": math.nan}, {"top_p": 2}, {"min_p": -0.1}, {"top_k": -1}, {"top_k": 1.5}, {"top_k": 2**31}, {"seed": -1},
    {"seed": 2**32 - 1}, {"seed": "1"}, {"repeat_penalty": 0}, {"repeat_penalty": math.inf}, {"presence_penalty": math.nan},
    {"penalty_last_n": -2}, {"dry": -1}, {"xtc_probability": 2}, {"typical_p": 1.1}, {"mirostat": 3}, {"logit_bias": {"a": 1}},
    {"logit_bias": {10**6: 1.0}}, {"logit_bias": {1: math.nan}}, {"grammar": "root ::= ("}, {"grammar": ""}, {"grammar": "x ::= \"a\""},
    {"grammar": "root ::= root \"a\""}, {"grammar": "root ::= \"\0\""}, {"json_schema": "{"}, {"json_schema": {"$ref": "http://x/y"}},
    {"grammar": "root ::= [a]", "json_schema": {}}], ids=str)
def test_what_cannot_be_meant_is_refused_at_the_call(models, wrong):
    with pytest.raises(ArgumentError):
        models["dense"].generate(PROMPT, sampling=Sampling(**wrong))


def test_the_largest_seed_gives_the_same_draws_again(models):
    draw = lambda: tokens(run(models["dense"], sampling=Sampling(temp=2, top_k=0, top_p=1, min_p=0, seed=MAX_SEED)))
    assert draw() == draw()


# ---- SlowFastLlama ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def llama(tiny):
    from sfi_local import SlowFastLlama

    made = {}

    def get(mode):
        if mode not in made:
            made[mode] = SlowFastLlama(str(tiny), mode=mode, n_ctx=1024, n_threads=1, sfi_params=EVERYTHING)
        return made[mode]

    yield get
    for one in made.values():
        one.close()


@pytest.mark.parametrize("options, samplers", [
    ({}, {}), ({"repeat_penalty": 1.5}, {}), ({"mirostat_mode": 2}, {}), ({"logit_bias": {65: 3.0}}, {}), ({"typical_p": 0.4}, {}),
    ({}, {"dry": 3.0}), ({}, {"xtc_probability": 0.5, "xtc_threshold": 0.02}), ({}, {"top_n_sigma": 1.0})], ids=str)
def test_llama_s_samplers_in_mode_exact_draw_what_they_draw_in_mode_dense(llama, options, samplers):
    def draw(mode):
        one = llama(mode)
        one.samplers = samplers
        answer = one.create_completion(PROMPT, max_tokens=30, temperature=1.0, seed=3, **options)
        one.samplers = {}
        return answer["choices"][0]["text"]

    assert draw("dense") == draw("exact")


def test_llama_s_processors_and_bias_work_together(llama):
    """llama-cpp-python drops both then."""
    from llama_cpp import LogitsProcessorList

    def letters(tokens, logits):
        out = np.full_like(logits, -math.inf)
        out[97:123] = logits[97:123]
        return out

    answer = llama("dense").create_completion(PROMPT, max_tokens=8, temperature=0, logits_processor=LogitsProcessorList([letters]),
                                              logit_bias={"120": 200.0})
    assert answer["choices"][0]["text"] == "x" * 8


def test_llama_refuses_what_cannot_be_meant(llama):
    from llama_cpp import LlamaGrammar

    one = llama("dense")
    for options in ({"grammar": LlamaGrammar.from_string("root ::= (", verbose=False)}, {"top_p": 3.0}, {"temperature": math.nan},
                    {"logit_bias": {10**6: 1.0}}):
        with pytest.raises(ArgumentError):
            one.create_completion(PROMPT, max_tokens=3, **{"temperature": 0, **options})
    one.samplers = {"drry": 1}
    with pytest.raises(ArgumentError, match="drry"):
        one.create_completion(PROMPT, max_tokens=3)
    one.samplers = {}
    assert one.create_completion(PROMPT, max_tokens=3, temperature=0)["choices"][0]["text"] is not None


# ---- LoRA ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny):
    """A LoRA adapter of rank 4 for the values of the tiny model's first layer."""
    import gguf

    path, rng = tmp_path_factory.mktemp("lora") / "adapter.gguf", np.random.default_rng(5)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 16.0)
    writer.add_tensor("blk.0.attn_v.weight.lora_a", rng.standard_normal((4, 128), dtype=np.float32))
    writer.add_tensor("blk.0.attn_v.weight.lora_b", rng.standard_normal((64, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_lora_adapter_works_in_both_classes_and_in_mode_exact(tiny, adapter):
    from sfi_local import SlowFastLlama

    def draw(mode, lora):
        with load(tiny, mode=mode, n_threads=1, n_ctx=1024, params=EVERYTHING, lora=lora) as model:
            return tokens(run(model, sampling=Sampling(temp=0)))

    one = SlowFastLlama(str(tiny), mode="dense", n_ctx=1024, n_threads=1, lora_path=str(adapter))
    mine = list(zip(range(30), one.generate(one.tokenize(PROMPT.encode()), temp=0)))
    one.close()
    plain, adapted = draw("dense", ()), draw("dense", adapter)
    assert plain != adapted == draw("exact", adapter) == [token for _, token in mine]
    assert draw("dense", [(adapter, 0.0)]) == plain


def test_what_is_no_adapter_is_refused(tiny, tmp_path):
    for wrong in (tiny, tmp_path / "none.gguf"):
        with pytest.raises(ModelFileError, match="LoRA"):
            load(tiny, lora=wrong)

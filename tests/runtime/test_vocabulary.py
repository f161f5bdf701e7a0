"""Any text of any length is tokenised on any thread; a prompt has the tokens of the text that the template renders."""

import threading
import time

import pytest
from support import pin
from support.stacks import on_a_small_stack
from support.vocabularies import vocabulary_of, write_bytes, write_sentencepiece

from sfi_local.errors import InputError
from sfi_local.runtime import long_text
from sfi_local.runtime.template import ChatTemplate, Message

SOURCE = "{{ bos_token }}{% for m in messages %}[I]{{ m.content }}[/I]{{ eos_token }}{% endfor %}"
VOCABULARIES = ("llama-spm", "phi-3", "llama-bpe", "gpt-2")

# one of each splitter that is a regex of the C++ library, and three that are not
PRE_TOKENIZERS = ("gpt-4o", "tekken", "deepseek-llm", "deepseek-coder", "deepseek-v3", "falcon", "seed-coder", "exaone-moe", "minicpm5", "grok-2",
                  "afmoe", "bailingmoe", "chameleon", "bloom", "viking", "jais-2", "tiny_aya", "superbpe", "talkie", "default", "youtu",
                  "granite-embed-multi-97m", "ufakzeka", "laguna", "spark2_5", "llama-bpe", "qwen2", "gpt-2")
RUNS = {"letters": "A", "dashes": "-", "blanks": " ", "lines": "\n", "digits": "1", "han": "中", "marks": "e\u0301", "parted": "a "}


def runs(n):
    return ["".join(what * (n // len(what))) for what in RUNS.values()]


@pytest.fixture(params=VOCABULARIES)
def vocabulary(request, native, tmp_path):
    data = pin.files("models", ".gguf").get(f"ggml-vocab-{request.param}.gguf")
    if data is None:
        pytest.skip(pin.WHY_NOT)
    (tmp_path / "v.gguf").write_bytes(data)
    return vocabulary_of(tmp_path / "v.gguf")


def template_of(v, source=SOURCE):
    return ChatTemplate(source, v.bos_text, v.eos_text, v.add_bos, v.tokenize, vocabulary=v)


def spelled(v, tokens):
    names = {t: v.spelled(t)[0] for t in set(tokens)}
    return b"".join(names[t] for t in tokens).decode()


# ---- prompts -----------------------------------------------------------------------------------------------------------

def test_a_prompt_has_the_tokens_of_the_rendered_text(vocabulary):
    v, t = vocabulary, template_of(vocabulary)
    rendered = t._render([{"role": "user", "content": "The report.\n\nWhat?"}])
    bos = v.add_bos and not rendered.startswith(v.bos_text or "\0")
    assert t.tokens([Message("user", ["The report.", "\n\nWhat?"])]) == v.tokenize(rendered, bos, True)


def test_a_sentencepiece_prompt_gets_no_spaces_of_its_own(native, tmp_path):
    v = vocabulary_of(write_sentencepiece(tmp_path / "v.gguf"))
    tokens = template_of(v).tokens([Message("user", ["The report.", "\n\nWhat?"])])
    assert spelled(v, tokens) == "<s> [I]The report.\n\nWhat?[/I]</s>"
    assert tokens == v.tokenize("<s>[I]The report.\n\nWhat?[/I]</s>", False, True)


def test_names_of_special_tokens_in_a_content_are_harmless(vocabulary):
    v, t = vocabulary, template_of(vocabulary)
    names = sorted(v._control_names)
    evil = " ".join(f"x{name}y" for name in names[:300])
    special = set(v.tokenize("".join(names), False, True))
    plain, tokens = (t.tokens([Message("user", [text])]) for text in ("x", evil))
    assert [x for x in tokens if x in special] == [x for x in plain if x in special]
    assert evil in spelled(v, tokens)


@pytest.mark.parametrize("n", [10, 30_000])  # short contents are asked about one by one, for long ones all names are collected
def test_a_special_name_in_a_long_content_too(vocabulary, n):
    v, t = vocabulary, template_of(vocabulary)
    text = "word " * (n // 5) + v.eos_text + " end"
    tokens = t.tokens([Message("user", [text])])
    assert tokens.count(v.tokenize(v.eos_text, False, True)[0]) == 1 + 2 * (v.bos_text == v.eos_text) - (v.bos_text == v.eos_text)


def test_an_answer_goes_on_with_its_tokens(vocabulary):
    v, t = vocabulary, template_of(vocabulary)
    first = t.tokens([Message("user", ["Hi"])])
    answer = v.tokenize("An", False) + v.tokenize("swer", False)  # not as the whole text is tokenised
    second = t.tokens([Message("user", ["Hi"]), Message("assistant", [answer]), Message("user", ["Bye"])])
    assert second[:len(first) + len(answer)] == first + answer
    assert spelled(v, second[len(first) + len(answer):]) .replace("> [", ">[") == f"[/I]{v.eos_text}[I]Bye[/I]{v.eos_text}"


def test_a_text_goes_on_without_a_space(vocabulary):
    v = vocabulary
    last = v.tokenize("word")[-1]
    assert spelled(v, v.continued("more words", last)) == "more words"


@pytest.mark.parametrize("text", ["\ud800", "ab\udcff"])
def test_halves_of_surrogate_pairs_are_refused(native, tmp_path, text):
    with pytest.raises(InputError, match="surrogate"):
        vocabulary_of(write_bytes(tmp_path / "v.gguf")).tokenize(text)


# ---- long runs ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_runs_are_tokenised_on_a_small_stack(native, tmp_path, pre):
    v = vocabulary_of(write_bytes(tmp_path / "v.gguf", pre))
    for text in runs(6_000):
        tokens = on_a_small_stack(lambda: v.tokenize(text))
        assert spelled(v, tokens) == text


@pytest.mark.parametrize("pre, what", [("gpt-4o", "A"), ("gpt-4o", " "), ("exaone-moe", "a "), ("superbpe", "1")])
def test_runs_of_200000_characters_are_tokenised(native, tmp_path, pre, what):
    v = vocabulary_of(write_bytes(tmp_path / "v.gguf", pre))
    for text in [what * (200_000 // len(what))]:
        assert spelled(v, v.tokenize(text)) == text


def test_a_longer_run_is_cut_and_special_tokens_in_it_are_not(native, tmp_path):
    v = vocabulary_of(write_bytes(tmp_path / "v.gguf", "gpt-4o"))
    text = "-" * (long_text.MAX_RUN - 20) + "<|im_end|>" + "-" * long_text.MAX_RUN + "<|im_end|>" * 3
    tokens = v.tokenize(text, special=True)
    assert spelled(v, tokens) == text and tokens.count(v.tokenize("<|im_end|>", special=True)[0]) == 4


@pytest.mark.parametrize("slow_digits", [False, True])
@pytest.mark.parametrize("text", ["", "a" * 10, "a b " * 200_000, "x" * 450_001, "1" * 700, "ab " * 10 + "1" * 1001 + " " * 250_000])
def test_cutting_loses_nothing_and_leaves_no_long_run(text, slow_digits):
    pieces = long_text.cut(text, slow_digits)
    assert "".join(pieces) == text
    for piece in pieces:
        assert not list(long_text._long(long_text._RUNS, piece, long_text.MAX_RUN))
        assert not slow_digits or not list(long_text._long((long_text._DIGITS,), piece, long_text.MAX_DIGITS))


@pytest.mark.parametrize("run", ["x" * 199_990, " " * 199_990, "a " * 99_990, "1" * 300, "word " * 40_000])
def test_looking_for_runs_takes_no_longer_where_they_are_nearly_too_long(run):
    text = f"{run} - {run} - " * (400_000 // len(run))
    start = time.process_time()
    assert long_text.cut(text, slow_digits=True) == [text]
    assert time.process_time() - start < 5


def test_an_error_on_the_other_stack_is_raised_here():
    with pytest.raises(ZeroDivisionError):
        long_text.with_stack_for(10_000, lambda: 1 // 0)
    assert long_text.with_stack_for(10_000, lambda: 5) == 5


def test_a_host_that_sets_the_size_of_stacks_keeps_it():
    before = threading.stack_size(1 << 20)
    try:
        long_text.with_stack_for(10_000, lambda: None)
        assert threading.stack_size() == 1 << 20
    finally:
        threading.stack_size(before)


@pytest.mark.parametrize("data", [b"Hello <|im_end|> there", b"\xff\xfe broken \xc3", "é".encode() * 400, b""])
@pytest.mark.parametrize("special", [False, True])
def test_bytes_are_tokenised_as_llama_cpp_python_does_it(vocabulary, data, special):
    for add_special in (False, True):
        assert vocabulary.tokenize_bytes(data, add_special, special) == vocabulary.weights.tokenize(data, add_special, special)

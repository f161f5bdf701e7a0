"""Conversations: each turn computes only what is new, and ends of every kind leave it whole."""

import json

import pytest

from sfi_local import Sampling, SfiParams, load
from sfi_local.errors import AbortedError, ArgumentError, DetachedError, InputError

pytestmark = pytest.mark.usefixtures("native")

GREEDY = Sampling(temp=0)
SMALL = SfiParams.of("frozen", n_sink=4, n_recent=32, n_selected=40, max_span=12, min_span=2)


@pytest.fixture
def model(tiny):
    with load(tiny, mode="dense", n_threads=1, params=SMALL) as model:
        yield model


@pytest.fixture
def chat(model):
    return model.chat(system="Be brief.", sampling=GREEDY, n=12)


def said(steps):
    return [step.token for step in steps]


def test_a_second_question_computes_only_what_is_new(chat, model):
    first = said(chat.ask("Name three rivers. " * 20))
    second = said(chat.ask("And lakes?"))
    assert model.slot.n_prefilled < 60 < len(model.slot.tokens)
    assert [m.role for m in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert first[:11] == chat.messages[2].parts[0][:11] and second


def test_it_is_the_conversation_that_its_messages_are(chat, model):
    said(chat.ask("Name three rivers."))
    tokens = model.prompt_tokens([*chat.messages, *model.chat().messages])
    answer = said(chat.ask("And lakes?"))
    assert said(model.generate(chat.messages[:4], n=12, sampling=GREEDY)) == answer and tokens


def test_an_answer_that_is_left_or_cancelled_stays_as_far_as_it_came(chat, model):
    for step in chat.ask("Name three rivers."):
        if len(chat.messages[-1].parts[0]) == 4:
            break
    assert len(chat.messages[-1].parts[0]) == 4
    with pytest.raises(AbortedError):
        for step in chat.ask("And lakes?"):
            chat.cancel()
    assert [m.role for m in chat.messages[-2:]] == ["user", "assistant"] and len(chat.messages[-1].parts[0]) == 1
    assert said(chat.ask("And seas?"))


@pytest.mark.parametrize("question, options, error", [("", {}, InputError), ("  ", {}, InputError), (None, {}, InputError),
                                                      ("x" * 9000, {}, InputError), ("x", {"n": 0}, ArgumentError),
                                                      ("x", {"sampling": Sampling(temp=-1)}, ArgumentError)])
def test_what_cannot_be_asked_is_refused_at_the_call_and_changes_nothing(chat, question, options, error):
    said(chat.ask("Name three rivers."))
    before = list(chat.messages)
    with pytest.raises(error):
        chat.ask(question, **options)
    assert chat.messages == before


def test_one_that_fails_before_its_first_token_leaves_it_as_it_was(chat):
    def fail(done, total):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        said(chat.ask("Name three rivers. " * 40, progress=fail))
    assert [m.role for m in chat.messages] == ["system"]


def test_saved_and_restored_it_goes_on(chat, model):
    said(chat.ask("Name three rivers."))
    saved = json.loads(json.dumps(chat.save()))
    expected = said(chat.ask("And lakes?"))
    other = model.chat(sampling=GREEDY, n=12)
    other.restore(saved)
    assert said(other.ask("And lakes?")) == expected
    for wrong in ([{}], [{"role": "user", "parts": [[10**6]]}], [1], [{"role": "cat", "parts": ["x"]}]):
        with pytest.raises(ArgumentError, match="save"):
            other.restore(wrong)


def test_tools_reach_the_chat_template(model, monkeypatch):
    template = "{% for t in tools or [] %}{{ t.name }};{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
    monkeypatch.setitem(model.file.metadata, "tokenizer.chat_template", template)
    message = [{"role": "user", "content": "hi"}]
    assert model.detokenize(model.prompt_tokens(message, [{"name": "weather"}])) == "weather;hi"
    assert model.detokenize(model.prompt_tokens(message)) == "hi"


def test_a_closed_model_says_so(tiny):
    model = load(tiny, mode="dense", n_threads=1)
    chat = model.chat()
    model.close()
    for call in (lambda: chat.ask("x"), model.chat, lambda: model.complete("x"), lambda: model.generate("x"), lambda: model.tokenize("x"),
                 lambda: model.detokenize([65]), lambda: model.vocabulary.is_end(3), lambda: model.prompt_tokens([{"role": "user", "content": "x"}])):
        with pytest.raises(DetachedError, match="closed"):
            call()
    model.close()
    model.cancel()
    assert model.stats().n_ctx == 0

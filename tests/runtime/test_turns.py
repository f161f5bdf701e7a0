"""A conversation with a model that thinks: each turn computes only what is new, in every mode with the same tokens."""

import pytest
from support.tiny_model import write_tiny

import sfi_local
from sfi_local.runtime.sampling import Sampling
from sfi_local.runtime.template import Message
from sfi_local.runtime.thoughts import ANSWER, THOUGHT, TokenThoughts

THINKER = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
           "<|im_start|>assistant\n<think>\n")


@pytest.fixture(scope="module")
def thinker(tmp_path_factory, native):
    return write_tiny(tmp_path_factory.mktemp("model") / "thinker.gguf", template=THINKER)


def turns(path, mode, **options):
    """[(prompt, tokens of the answer, how many tokens were read, thought, answer)] of three turns."""
    out, messages = [], []
    with sfi_local.load(str(path), mode=mode, n_threads=1, n_ctx=1024) as model:
        model.set_template(**options)
        for question in ("One?", "Two?", "Three?"):
            messages.append(Message("user", [question]))
            prompt = model.template.tokens(messages)
            told, found, tokens = TokenThoughts(model.template.thoughts(prompt), model.vocabulary), [], []
            for step in model.generate(prompt, n=40, sampling=Sampling(temp=0), think_budget=8):
                tokens.append(step.token)
                found += told.push(step.token, step.text, bool(step.finish))
            messages.append(Message("assistant", [tokens[:-1] if step.finish == "end" else tokens]))
            out.append((prompt, tokens, model.session.n_prefilled, *("".join(t for k, t in found if k == kind) for kind in (THOUGHT, ANSWER))))
    return out


def test_each_turn_reads_only_what_is_new(thinker):
    done = turns(thinker, "dense")
    for (before, answer, *_), (prompt, _, n_read, _, _) in zip(done, done[1:]):
        assert prompt[:len(before) + len(answer)] == before + answer
        assert n_read <= len(prompt) - len(before) - len(answer) + 1  # the last token of an answer is in no cache
    assert all(thought and answer for *_, thought, answer in done)


def test_a_budget_gives_the_same_tokens_in_mode_exact(thinker):
    assert [tokens for _, tokens, *_ in turns(thinker, "exact")] == [tokens for _, tokens, *_ in turns(thinker, "dense")]


def test_dropped_thoughts_are_not_in_the_prompt(thinker):
    kept, dropped = (turns(thinker, "dense", keep_thoughts=keep)[-1][0] for keep in (True, False))
    assert len(dropped) < len(kept)

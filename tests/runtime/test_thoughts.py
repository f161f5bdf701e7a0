"""Thoughts are told apart from answers, wherever the stream is cut, in every family of formats."""

import re

import pytest

from sfi_local.runtime.thoughts import ANSWER, OTHERS, TAGS, THOUGHT, ThoughtBudget, ThoughtStream, TokenThoughts, formats_of

HARMONY, TO_SELF, SOLAR, KIMI = OTHERS[1:]

# (prompt's end, formats, output with control tokens in braces, thought, answer)
CASES = {
    "a plain answer": ("assistant\n", TAGS, "  Hello <b>, a <think> later is text.", "", "  Hello <b>, a <think> later is text."),
    "tags": ("assistant\n", TAGS, "\n<think>\nhm < 3\n</think>\n\nYes.\n", "hm < 3\n", "Yes.\n"),
    "control tags": ("assistant\n", TAGS, "{[THINK]}hm{[/THINK]}Yes.", "hm", "Yes."),
    "an empty thought": ("assistant\n", TAGS, "<think>\n\n</think>\n\nYes.", "", "Yes."),
    "opened by the prompt": ("assistant\n<think>\n", TAGS, "hm\n</think>\n\nYes.", "hm\n", "Yes."),
    "closed by the prompt": ("<think>\n\n</think>\n\n", TAGS, "Yes. </think>", "", "Yes. </think>"),
    "never closed": ("<think>\n", TAGS, "hm, </thin", "hm, </thin", ""),
    "begins like a tag": ("", TAGS, "<thi", "", "<thi"),
    "longer tag": ("", TAGS, "<think:opensource>a</think>b</think:opensource>c", "a</think>b", "c"),
    "gemma": ("model\n", TAGS, "{<|channel>}thought\nhm\n{<channel|>}Yes.", "hm\n", "Yes."),
    "channels": ("hi{<|end|>}{<|start|>}assistant", OTHERS[1:2] + TAGS,
                 "{<|channel|>}analysis{<|message|>}hm{<|end|>}{<|start|>}assistant{<|channel|>}final{<|message|>}Yes.{<|return|>}", "hm", "Yes."),
    "two analyses and a preamble": (
        "{<|start|>}assistant", (HARMONY,), "{<|channel|>}analysis{<|message|>}a{<|end|>}{<|start|>}assistant{<|channel|>}commentary{<|message|>}b{<|end|>}"
        "{<|start|>}assistant{<|channel|>}analysis{<|message|>}c{<|end|>}{<|start|>}assistant{<|channel|>}final{<|message|>}d", "a\n\nc", "b\n\nd"),
    "no channel after all": ("{<|start|>}assistant", (HARMONY,), "Hello\nthere", "", "Hello\nthere"),
    "a short answer without a channel": ("{<|start|>}assistant", (HARMONY,), "Hello", "", "Hello"),
    "cut in a header": ("{<|start|>}assistant", (HARMONY,), "{<|channel|>}analysis{<|message|>}hm{<|end|>}{<|start|>}assis", "hm", ""),
    "to oneself": ("{<|start|>}assistant", (TO_SELF,), " to=self{<|message|>}hm{<|eom|>}{<|start|>}assistant to=user{<|message|>}Yes.{<|eot|>}", "hm", "Yes."),
    "solar": ("{<|begin|>}assistant", (SOLAR,), "{<|think|>}hm{<|end|>}{<|begin|>}assistant{<|content|>}Yes.", "hm", "Yes."),
    "kimi": ('{<|open|>}message role="assistant"{<|sep|>}{<|open|>}think{<|sep|>}', (KIMI,),
             "hm{<|close|>}think{<|sep|>}{<|open|>}response{<|sep|>}Yes.{<|close|>}response{<|sep|>}", "hm", "Yes."),
    "kimi without a thought": ('{<|open|>}message role="assistant"{<|sep|>}{<|open|>}response{<|sep|>}', (KIMI,), "Yes.", "", "Yes."),
    "other control tokens are not seen": ("", TAGS, "<think>a{<s>}b</think>c{<|x|>}d", "ab", "cd"),
}


def pieces(output, split):
    """(text, control) of an output; text in pieces of ``split`` characters."""
    for part in re.split(r"(\{[^}]*\})", output):
        if part.startswith("{"):
            yield part[1:-1], True
        else:
            yield from ((part[i:i + split], False) for i in range(0, len(part), split))


def told_apart(stream, parts):
    found = [item for text, control in parts for item in stream.push(text, control)] + stream.finish()
    return {kind: "".join(text for k, text in found if k == kind) for kind in (THOUGHT, ANSWER)}


@pytest.mark.parametrize("name", CASES)
def test_thought_and_answer_whatever_the_pieces(name):
    prompt, formats, output, thought, answer = CASES[name]
    for split in (1, 2, 3, 5, 7, 1000):
        stream = ThoughtStream(re.sub("[{}]", "", prompt), formats)
        assert told_apart(stream, pieces(output, split)) == {THOUGHT: thought, ANSWER: answer}, split


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "{" not in case[2]])
def test_cut_in_two_at_every_place(name):
    prompt, formats, output, thought, answer = CASES[name]
    for at in range(len(output) + 1):
        stream = ThoughtStream(re.sub("[{}]", "", prompt), formats)
        assert told_apart(stream, [(output[:at], False), (output[at:], False)]) == {THOUGHT: thought, ANSWER: answer}, at


def test_what_is_sure_is_not_held_back():
    stream = ThoughtStream("<think>")
    assert stream.push("hm, ") == [(THOUGHT, "hm, ")]
    assert stream.push("</thi") == []
    assert stream.push("nk>\n\n") == []
    assert stream.push("Yes") == [(ANSWER, "Yes")]


def test_a_stream_knows_that_it_is_inside_a_thought():
    stream = ThoughtStream("assistant\n")
    assert not stream.inside
    stream.push("<think>hm")
    assert stream.inside and stream.format.close == "</think>"
    stream.push("</think>")
    assert not stream.inside


def test_no_mark_is_the_beginning_of_another():
    marks = [f.open for f in TAGS] + [f.close for f in TAGS]
    assert not [(a, b) for a in marks for b in marks if a != b and b.startswith(a)]


def test_formats_in_a_template_come_first():
    assert formats_of("... [THINK] ...")[0].close == "[/THINK]"
    assert formats_of(None) == TAGS
    assert HARMONY in formats_of("<|start|>assistant<|channel|>analysis<|message|>") and HARMONY not in formats_of("<think>")


@pytest.mark.parametrize("f", [*TAGS, *OTHERS], ids=lambda f: f.close)
def test_the_lead_of_a_format_ends_its_thought(f):
    stream = ThoughtStream(f.open or {HARMONY: "<|start|>assistant<|channel|>analysis<|message|>", TO_SELF: "<|start|>assistant to=self<|message|>",
                                      SOLAR: "<|begin|>assistant<|think|>", KIMI: "<|open|>think<|sep|>"}[f], (f,))
    assert stream.inside
    stream.push(f.lead)
    assert stream.push("Yes") == [(ANSWER, "Yes")]


# ---- tokens ------------------------------------------------------------------------------------------------------------

class Letters:
    """A vocabulary of characters; token 0 is named <s> and has no text."""

    def spelled(self, token):
        return (chr(token).encode(), False) if token else (b"<s>", True)

    def tokenize(self, text, add_bos=False, special=False):
        return list(map(ord, text))


class Drawn:
    """Draws the characters of a text, one after the other."""

    def __init__(self, text):
        self.left = list(map(ord, text))

    def sample(self, context, row=-1):
        return self.left.pop(0)

    def clone(self):
        return Drawn("".join(map(chr, self.left)))

    def close(self):
        self.left = None


def test_tokens_are_told_apart_and_names_are_not_shown():
    told = TokenThoughts(ThoughtStream("<think>"), Letters())
    found = [item for i, token in enumerate([*map(ord, "hm</think>"), 0, *map(ord, "Yes")])
             for item in told.push(token, chr(token) if token else "", last=i == 13)]
    assert "".join(text for kind, text in found if kind == ANSWER) == "Yes"
    assert "".join(text for kind, text in found if kind == THOUGHT) == "hm"


@pytest.mark.parametrize("prompt, output, n, drawn", [
    ("<think>", "abcdef", 3, "abc\n</think>\n\ndef"),
    ("<think>", "abcdef", 0, "\n</think>\n\nabcdef"),
    ("<think>", "ab</think>cd", 20, "ab</think>cd"),
    ("", "abcdef", 0, "abcdef"),
    ("", "<think>abcdef", 2, "<think>ab\n</think>\n\ncdef"),
    ("", "<think>abcdef", 0, "<think>\n</think>\n\nabcdef"),
])
def test_a_budget_ends_a_thought(prompt, output, n, drawn):
    sampler = ThoughtBudget(Drawn(output), ThoughtStream(prompt), Letters(), n)
    assert "".join(chr(sampler.sample(None)) for _ in drawn) == drawn


def test_a_clone_draws_the_same_and_leaves_the_first_alone():
    sampler = ThoughtBudget(Drawn("abcdef"), ThoughtStream("<think>"), Letters(), 3)
    for i in range(8):  # in the thought, and in the middle of what ends it
        clone = sampler.clone()
        ahead = [clone.sample(None, 0) for _ in range(12 - i)]
        assert [sampler.clone().sample(None, 0)] == ahead[:1]
        assert sampler.sample(None, 0) == ahead[0]

"""Thoughts told apart from answers, in a stream of text. Pure.

Models write what they think before they answer, each family between marks of its own: tags around the thought, or
channels, messages with a header that says what they are. The generation prompt of a template may have opened the
thought already, or have closed it.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

THOUGHT, ANSWER = "thought", "answer"
_START, _HEADER = "start", "header"   # nothing but blanks so far; between two messages, or in the header of one

TAIL = 200        # characters of a prompt that say whether it opened a thought
MAX_ROLE = 20     # characters between two marks of one header
MAX_HEADER = 80   # characters without a mark after which a header is none


@dataclass(frozen=True)
class Format:
    """How a family of models marks a thought.

    open:  begins one where an answer would begin; "" where headers do
    close: ends it
    lead:  what is fed to a model to make it answer: the close, and what stands before an answer
    starts, ends: of a message, in the families that have headers
    heads: the end of a header
    name:  what the header of a thought has in it
    """

    open: str
    close: str
    lead: str
    starts: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    name: str = ""

    def is_in(self, source: str) -> bool:
        """Whether a chat template writes thoughts like this."""
        return all(sign in source for sign in ((self.open,) if self.open else (*self.starts, *self.heads, self.name)))


def _tags(opening: str, close: str, before: str = "\n", after: str = "\n\n") -> Format:
    return Format(opening, close, before + close + after)


TAGS = (
    _tags("<think>", "</think>"),
    _tags("<thought>", "</thought>"),
    _tags("<thinking>", "</thinking>"),
    _tags("<reasoning>", "</reasoning>"),
    _tags("<seed:think>", "</seed:think>", "", ""),
    _tags("<mm:think>", "</mm:think>", "", ""),
    _tags("<think:opensource>", "</think:opensource>", "", ""),
    _tags("[THINK]", "[/THINK]", "", ""),
    _tags("◁think▷", "◁/think▷"),
    _tags("<|START_THINKING|>", "<|END_THINKING|>", "", ""),
    _tags("<|inner_prefix|>", "<|inner_suffix|>", "", ""),
    _tags("<|begin_of_thought|>", "<|end_of_thought|>"),
    _tags("<|channel>thought", "<channel|>"),
    _tags("<unused94>thought", "<unused95>"),
)
OTHERS = (  # taken only where the chat template shows them
    _tags("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]", after="\n"),
    Format("", "<|end|>", "<|end|><|start|>assistant<|channel|>final<|message|>", name="analysis",
           starts=("<|start|>", "<|channel|>"), ends=("<|end|>", "<|return|>", "<|call|>"), heads=("<|message|>",)),
    Format("", "<|eom|>", "<|eom|><|start|>assistant to=user<|message|>", name="to=self",
           starts=("<|start|>",), ends=("<|eom|>", "<|eot|>"), heads=("<|message|>",)),
    Format("", "<|end|>", "<|end|><|begin|>assistant<|content|>", name="<|think|>",
           starts=("<|begin|>",), ends=("<|end|>",), heads=("<|think|>", "<|content|>")),
    Format("", "<|close|>think<|sep|>", "<|close|>think<|sep|><|open|>response<|sep|>", name="think",
           starts=("<|open|>",), ends=("<|close|>", "<|end_of_msg|>"), heads=("<|sep|>",)),
)


def formats_of(source: str | None) -> tuple[Format, ...]:
    """The formats that a model with this chat template may write, those in the template first."""
    shown = tuple(f for f in (*OTHERS, *TAGS) if f.is_in(source or ""))
    return shown + tuple(f for f in TAGS if f not in shown)


class ThoughtStream:
    """Text in, thoughts and answers out, each piece as soon as it is sure what it is.

    prompt:  the end of the prompt, special tokens spelled; it may have opened or closed the thought
    formats: how thoughts may be marked
    inside:  whether the text so far ends in a thought
    format:  the one that was met; None: none yet
    """

    def __init__(self, prompt: str = "", formats: tuple[Format, ...] = TAGS):
        self.formats = formats
        self.format: Format | None = None
        self._state = _START
        self._held, self._seen = "", ""   # text that is not decided yet; of each character whether it is to be seen: "+" or "-"
        self._header, self._plain = "", ""  # of the header so far: all of it; its text after the last mark
        self._marked = False              # whether the output had a mark of a header
        self._begun = dict.fromkeys((THOUGHT, ANSWER), False)  # whether there was text of a kind
        self._fresh, self._break = False, ""  # whether blanks are dropped; what stands before the next text of a kind
        self._begin_after(prompt[-TAIL:])

    @property
    def inside(self) -> bool:
        return self._state == THOUGHT

    def push(self, text: str, control: bool = False) -> list[tuple[str, str]]:
        """[("thought" or "answer", text)] that became sure. control: the text is the name of a token that has no text."""
        self._held += text
        self._seen += ("-" if control else "+") * len(text)
        out: list[tuple[str, str]] = []
        while self._advance(out):
            pass
        return out

    def finish(self) -> list[tuple[str, str]]:
        """What is left at the end of the text."""
        if self._state == _HEADER:
            self._no_header() if not self._marked else self._take(len(self._held))
        kind = THOUGHT if self.inside else ANSWER
        left = self._release(len(self._held), kind)
        return [(kind, left)] if left else []

    def _advance(self, out: list[tuple[str, str]]) -> bool:
        """Decide about the text up to the next mark, and take the mark; False where nothing more can be decided."""
        marks = self._marks()
        at, mark = _first(self._held, marks)
        n = len(self._held) - _partial(self._held, marks) if mark is None else at
        if self._state == _START and self._held[:n].strip():
            self._state = ANSWER
            return True
        if self._state == _HEADER and not self._is_header(self._held[:n]):
            self._no_header()
            return True
        if self._state == _HEADER:
            text = self._take(n)
            self._header, self._plain = self._header + text, self._plain + text
        elif self._state != _START:
            if text := self._release(n, self._state):
                out.append((self._state, text))
        elif mark is not None:
            self._take(n)  # blanks before a thought
        if mark is None:
            return False
        self._take(len(mark))
        self._enter(mark, marks[mark])
        return True

    def _marks(self) -> dict[str, Format]:
        """The marks that mean something now, and the format they belong to."""
        if self._state == _START:
            return {mark: f for f in reversed(self.formats) for mark in ((f.open,) if f.open else f.starts)}
        f = self.format
        if f is None or (f.open and self._state == ANSWER):
            return {}
        if f.open:
            return {f.close: f}
        return dict.fromkeys(f.starts + f.ends + (f.heads if self._state == _HEADER else ()), f)

    def _enter(self, mark: str, f: Format) -> None:
        """What a mark makes of the text after it."""
        self.format = f
        if f.open:
            self._become(THOUGHT if mark == f.open else ANSWER)
            return
        header = self._header if self._state == _HEADER and mark not in f.ends else ""
        self._state, self._header, self._plain, self._marked = _HEADER, header + mark, "", True
        if mark in f.heads:
            if any(start in self._header for start in f.starts):
                self._become(THOUGHT if f.name in self._header else ANSWER)
            self._header = ""

    def _become(self, kind: str) -> None:
        self._state, self._fresh, self._break = kind, True, "\n\n" if self._begun[kind] else ""

    def _is_header(self, text: str) -> bool:
        return len(self._plain) + len(text) <= MAX_HEADER and "\n" not in self._plain + text

    def _no_header(self) -> None:
        """What was taken for a header is an answer."""
        self._held, self._seen = self._plain + self._held, "+" * len(self._plain) + self._seen
        self._state, self._header, self._plain = ANSWER, "", ""

    def _take(self, n: int) -> str:
        """Remove n characters; returns those that are to be seen."""
        text = "".join(c for c, seen in zip(self._held[:n], self._seen) if seen == "+")
        self._held, self._seen = self._held[n:], self._seen[n:]
        return text

    def _release(self, n: int, kind: str) -> str:
        text = self._take(n)
        if self._fresh:
            text = text.lstrip()
            if not text:
                return ""
            text, self._fresh = self._break + text, False
        self._begun[kind] |= bool(text)
        return text

    def _begin_after(self, prompt: str) -> None:
        """The state that the end of a prompt leaves."""
        for f in self.formats:
            if not f.open:
                self._begin_in_header(prompt, f)
            elif prompt.rstrip().endswith((f.open, f.close)):
                self._enter(f.open if prompt.rstrip().endswith(f.open) else f.close, f)
            if self.format:
                return

    def _begin_in_header(self, prompt: str, f: Format) -> None:
        at = max(prompt.rfind(start) for start in f.starts)
        if at < 0:
            return
        while 0 <= (earlier := max(prompt.rfind(start, 0, at) for start in f.starts)) and at - earlier < MAX_ROLE:
            at = earlier  # the first mark of the header
        self.format, self._state = f, _HEADER
        self.push(prompt[at:])
        self._held = self._seen = self._plain = ""
        self._marked = False
        self._begun = dict.fromkeys(self._begun, False)


def _first(text: str, marks: dict[str, Format]) -> tuple[int, str | None]:
    """(place, mark) of the first mark in a text, of two at one place the longer."""
    found = [(at, -len(mark), mark) for mark in marks if (at := text.find(mark)) >= 0]
    return (min(found)[0], min(found)[2]) if found else (-1, None)


def _partial(text: str, marks: dict[str, Format]) -> int:
    """Length of the longest end of a text that may become a mark."""
    longest = max((len(mark) for mark in marks), default=0)
    for n in range(min(longest - 1, len(text)), 0, -1):
        if any(mark.startswith(text[-n:]) for mark in marks):
            return n
    return 0


class TokenThoughts:
    """A ThoughtStream that is given the tokens of an answer.

    vocabulary: has spelled(token)
    """

    def __init__(self, stream: ThoughtStream, vocabulary: Any):
        self.stream, self._vocabulary = stream, vocabulary

    def push(self, token: int, text: str, last: bool) -> list[tuple[str, str]]:
        """What became sure with a token and the text that became final with it, see Step; all that is left with the last."""
        name, is_name = self._vocabulary.spelled(token)
        found = self.stream.push(text)
        if is_name and not last:
            found += self.stream.push(name.decode(errors="replace"), control=True)
        return found + self.stream.finish() if last else found


class ThoughtBudget:
    """A sampler that ends a thought after n tokens: then it draws what makes the model answer.

    sampler: draws all other tokens; vocabulary: has spelled(token) and tokenize()
    """

    def __init__(self, sampler: Any, stream: ThoughtStream, vocabulary: Any, n: int):
        self._sampler, self._stream, self._vocabulary, self._n = sampler, stream, vocabulary, n
        self._lead: list[int] = []  # what is to be drawn next

    def sample(self, *place: Any) -> int:
        """The next token; place: whose logits, as the sampler takes it."""
        if self._stream.inside and not self._lead and self._n <= 0:
            self._lead = self._vocabulary.tokenize(self._stream.format.lead, special=True)
        token = self._lead.pop(0) if self._lead else self._sampler.sample(*place)
        self._n -= self._stream.inside
        name, is_name = self._vocabulary.spelled(token)
        self._stream.push(name.decode(errors="replace"), control=is_name)
        return token

    def clone(self) -> "ThoughtBudget":
        """A copy that draws the same, random numbers included."""
        clone = ThoughtBudget(self._sampler.clone(), deepcopy(self._stream), self._vocabulary, self._n)
        clone._lead = list(self._lead)
        return clone

    def close(self) -> None:
        """Free the sampler."""
        self._sampler.close()

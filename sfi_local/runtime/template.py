"""From messages to tokens, as the model's own chat template says.

The template is given the contents themselves, so that it can look at them, trim them, move them; what it renders is
tokenised as one text. Where a content has the text of a special token in it, a guard inside that text, found again in
what was rendered, parts it, so that it stays harmless text whatever the template does with it.

An answer that is still in the cache goes on from there: its tokens as they were sampled, after the prompt that it
answered, and then what the template writes between an answer and the next one. So turn 2 continues turn 1 whatever a
template does with earlier answers.
"""

from __future__ import annotations

import codecs
import json
import re
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Callable, Iterable, Protocol, Sequence

from sfi_local.errors import InputError, Remedy
from sfi_local.runtime.thoughts import ANSWER, TAIL, THOUGHT, ThoughtStream, formats_of

# (text, add_bos, special) -> token ids
Tokenize = Callable[[str, bool, bool], list[int]]

RAW = Remedy("give a text by {}, without the template", "complete()")
_PROBE = "Qz system text zQ"  # is in no template
_RESERVED = ("messages", "bos_token", "eos_token", "add_generation_prompt", "raise_exception", "strftime_now")

# variable of a template that switches thoughts: (off, on)
_SWITCHES = {"enable_thinking": (False, True), "thinking": (False, True), "reasoning": (False, True),
             "thinking_option": ("off", "on"), "thinking_mode": ("disabled", "enabled"), "thinking_budget": (0, -1)}
_EFFORTS = ("reasoning_effort", "reasoning_strength")  # these have degrees
_LEAST_EFFORTS = ("no_think", "none", "minimal")       # the least one that is in the template, else "low"
_WORDS = ("/no_think", "/think")                       # in a message


@dataclass
class Message:
    """One message of a conversation.

    role:    "system", "user" or "assistant", and what else a template knows, such as "tool"
    parts:   its content in pieces; text, or token ids where the exact tokens matter (an answer that is in the cache)
    thought: what was thought before the content, where that is known apart
    extra:   further fields for the template, as JSON knows them: tool_calls, tool_call_id, name
    """

    role: str
    parts: list[str | list[int]] = field(default_factory=list)
    thought: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def is_text(self) -> bool:
        return all(isinstance(part, str) for part in self.parts)


class Spelling(Protocol):
    """What a template asks of a vocabulary; see Vocabulary."""

    def continued(self, text: str, last: int, special: bool) -> list[int]: ...
    def structure(self, source: str, contents: Sequence[str]) -> re.Pattern: ...
    def spelled(self, token: int) -> tuple[bytes, bool]: ...


class ChatTemplate:
    """The chat template in a model's metadata; without one, contents are joined as they are (base models).

    source:     the Jinja text, or None; bos, eos: text of these tokens
    vocabulary: what the tokens mean; None: not known, then answers must be text where a template moves contents
    arguments:  variables of the template
    think:      switch thoughts on or off, however the template does it; None: as the template does
    keep_thoughts: earlier answers stay as they are in the cache; False: as the template has them, most often without thoughts
    note:       called with sentences about what was decided on the caller's behalf
    """

    def __init__(self, source: str | None, bos: str, eos: str, add_bos: bool, tokenize: Tokenize, *,
                 vocabulary: Spelling | None = None, arguments: dict[str, Any] | None = None, think: bool | None = None,
                 keep_thoughts: bool = True, note: Callable[[str], None] = lambda sentence: None):
        self.source, self.bos, self.eos, self.add_bos = source, bos, eos, add_bos
        self.formats = formats_of(source)
        self._tokenize, self._vocabulary, self._note = tokenize, vocabulary, note
        self._given, self._think, self._keep_thoughts = dict(arguments or {}), think, keep_thoughts
        _check_names(self._given)

    def tokens(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation that ends where the assistant's answer begins.

        Raises InputError if the template refuses the messages.
        """
        self._tell_unused()
        return self._tokens(self._placed(self._with_word(list(messages))))

    def thoughts(self, prompt: Sequence[int]) -> ThoughtStream:
        """Tells thoughts from the answer to a prompt."""
        return ThoughtStream(self._spell(prompt[-TAIL:]), self.formats)

    # ---- from messages to tokens ----

    def _tokens(self, messages: list[Message]) -> list[int]:
        at = max((i for i, m in enumerate(messages) if m.role == "assistant" and not m.is_text), default=None)
        if at is None:
            return self._whole(messages)
        before, answer = self._tokens(messages[:at]), self._joined(messages[at])
        thought = self._thought_and_answer(before, answer)[0]
        if not self._keep_thoughts and thought:
            return self._whole(self._as_text(messages))
        between = self._between(messages, at, before, answer)
        return self._whole(self._as_text(messages)) if between is None else before + answer + between

    def _whole(self, messages: list[Message]) -> list[int]:
        """Everything as the template renders it."""
        contents = self._contents(messages)
        rendered = self._render([contents.of(m) for m in messages])
        if not contents.complete(rendered):
            return self._whole(self._as_text(messages))
        bos = self.add_bos and not (self.bos and rendered.startswith(self.bos))
        return self._tokens_of(contents.pieces(rendered), self._tokenize("", bos, True) if bos else [])

    def _between(self, messages: list[Message], at: int, before: list[int], answer: list[int]) -> list[int] | None:
        """What the template writes after an answer, up to where the next one begins; None: it does not go on from there."""
        contents = self._contents(messages)
        end = contents.mark([])
        rendered = self._render([{"role": m.role, "content": end} if i == at else contents.of(m) for i, m in enumerate(messages)])
        if rendered.count(end) != 1:
            return None
        rendered = rendered.partition(end)[2]
        unclosed = self._unclosed(before, answer)
        return self._tokens_of(contents.pieces(unclosed + rendered), [], (before + answer)[-1:])

    def _tokens_of(self, pieces: Iterable[str | list[int]], out: list[int], last: Sequence[int] = ()) -> list[int]:
        """Tokens after those in ``out``; last: the token before, where out is empty."""
        for piece in pieces:
            if not isinstance(piece, str):
                out += piece
            elif piece and (out or last):
                out += self._continued(piece, (out or last)[-1])
            elif piece:
                out += self._tokenize(piece, False, True)
        return out

    def _continued(self, text: str, last: int) -> list[int]:
        return self._vocabulary.continued(text, last, True) if self._vocabulary else self._tokenize(text, False, True)

    def _joined(self, message: Message) -> list[int]:
        return [t for part in message.parts for t in (self._tokenize(part, False, False) if isinstance(part, str) else part)]

    # ---- thoughts ----

    def _thought_and_answer(self, before: list[int], answer: list[int]) -> tuple[str, str]:
        stream = self.thoughts(before)
        found = [item for text, control in self._spelling(answer) for item in stream.push(text, control)] + stream.finish()
        thought, text = ("".join(text for kind, text in found if kind == wanted) for wanted in (THOUGHT, ANSWER))
        return thought.strip(), text

    def _unclosed(self, before: list[int], answer: list[int]) -> str:
        """What closes a thought that an answer ended in, so that the history has no half of one."""
        stream = self.thoughts(before)
        for text, control in self._spelling(answer):
            stream.push(text, control)
        return "\n" + stream.format.close if stream.inside and stream.format.open else ""

    def _as_text(self, messages: list[Message]) -> list[Message]:
        """Answers as text, thoughts apart. Raises InputError where nothing is known of the tokens."""
        if self._vocabulary is None:
            raise InputError("This model's chat template rearranges messages, so a chat cannot go on", Remedy("ask one question at "
                             "a time"), RAW)
        out: list[Message] = []
        for i, m in enumerate(messages):
            if m.role == "assistant" and not m.is_text:
                thought, text = self._thought_and_answer(self._tokens(messages[:i]), self._joined(m))
                out.append(Message(m.role, [text], thought, m.extra))
            else:
                out.append(Message(m.role, [p if isinstance(p, str) else self._spell(p) for p in m.parts], m.thought, m.extra))
        return out

    def _spell(self, tokens: Sequence[int]) -> str:
        return "".join(text for text, _ in self._spelling(tokens))

    def _spelling(self, tokens: Sequence[int]) -> Iterable[tuple[str, bool]]:
        """(text, whether it is the name of a token without text) of tokens."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens if self._vocabulary else ():
            data, control = self._vocabulary.spelled(token)
            yield decoder.decode(data), control

    # ---- rendering ----

    def _contents(self, messages: list[Message]) -> "_Contents":
        texts = _texts(messages)
        special = self._vocabulary.structure(self.source or "", texts) if self._vocabulary else _LOOKS_SPECIAL
        return _Contents(messages, self.source or "", special, tuple(tag for f in self.formats for tag in (f.open, f.close)))

    def _render(self, messages: list[dict[str, Any]]) -> str:
        if self.source is None:
            return "\n\n".join(m["content"] for m in messages)
        try:
            rendered = self._compiled.render(messages=messages, bos_token=self.bos, eos_token=self.eos, **{**_GIVEN, **self._arguments})
        except Exception as error:  # templates raise what they like
            raise InputError(f"The model's chat template refuses these messages ({error})", Remedy("leave out {}", "system"),
                             RAW) from None
        return rendered + self._closed_thought(rendered)

    @property
    def _compiled(self) -> Any:
        return _compiled(self.source or "")

    # ---- switches, and what a template does not have ----

    @property
    def variables(self) -> frozenset[str]:
        """Names that the template reads and does not set."""
        return _variables(self.source or "")

    @cached_property
    def _arguments(self) -> dict[str, Any]:
        if self._think is None:
            return self._given
        switches = {name: on if self._think else off for name, (off, on) in _SWITCHES.items() if name in self.variables}
        if not switches:
            least = next((word for word in _LEAST_EFFORTS if re.search(rf"['\"]{word}['\"]", self.source or "")), "low")
            switches = {name: "high" if self._think else least for name in _EFFORTS if name in self.variables}
        return {**switches, **self._given}

    @property
    def _needs_word(self) -> bool:
        return self._think is not None and not (set(self._arguments) - set(self._given)) and _WORDS[0] in (self.source or "")

    def _with_word(self, messages: list[Message]) -> list[Message]:
        """The system text with the word that switches thoughts, where a template wants one."""
        if not self._needs_word:
            return messages
        word = _WORDS[bool(self._think)]
        if messages and messages[0].role == "system":
            return [Message("system", [*messages[0].parts, "\n" + word]), *messages[1:]]
        return [Message("system", [word]), *messages]

    def _closed_thought(self, rendered: str) -> str:
        """An empty thought, or the end of the one that the template began, where thoughts are off and it has no switch."""
        if self._think is not False or self._needs_word or set(self._arguments) - set(self._given):
            return ""
        stream = ThoughtStream(rendered[-TAIL:], self.formats)
        if stream.format or not self.formats[0].is_in(self.source or ""):
            return stream.format.lead if stream.inside else ""
        return self.formats[0].open and self.formats[0].open + self.formats[0].lead

    @cached_property
    def _places_system(self) -> bool:
        """Whether a system text reaches the prompt."""
        try:
            return _PROBE in self._render([{"role": "system", "content": _PROBE}, {"role": "user", "content": "?"}])
        except InputError:
            return False

    def _placed(self, messages: list[Message]) -> list[Message]:
        """The messages, the system text before the first question where the template has no place for one."""
        if self.source is None or not messages or messages[0].role != "system" or self._places_system:
            return messages
        self._note("The model's chat template has no place for a system text: it stands before the first message.")
        system, rest = messages[0], messages[1:] or [Message("user")]
        return [Message(rest[0].role, [*system.parts, *(["\n\n", *rest[0].parts] if rest[0].parts else [])]), *rest[1:]]

    def _tell_unused(self) -> None:
        if self.source is None:
            self._note("This model has no chat template: the text is given to it as it is, to go on with.")
        for name in sorted(set(self._given) - self.variables):
            self._note(f"The model's chat template does not know {name}, which changes nothing.")
        if self._think is not None and not (set(self._arguments) - set(self._given) or self._needs_word
                                            or (not self._think and self.formats[0].is_in(self.source or ""))):
            self._note(f"The model's chat template has no switch for thoughts: asking for {'them' if self._think else 'none'} changes nothing.")


@lru_cache(maxsize=128)  # parsing takes longer than rendering
def _compiled(source: str) -> Any:
    """A jinja2.Template. Raises InputError."""
    try:
        return _environment().from_string(source)
    except Exception as error:  # of Jinja
        raise InputError(f"The model's chat template cannot be read ({error})", RAW) from None


def prepare(source: str) -> None:
    """Compile a chat template that is going to be used. A mistake in it is told then."""
    try:
        _compiled(source)
    except InputError:
        pass


@lru_cache(maxsize=128)
def _variables(source: str) -> frozenset[str]:
    from jinja2 import meta

    _compiled(source)
    return frozenset(meta.find_undeclared_variables(_environment().parse(source))) - set(_RESERVED)


@lru_cache(maxsize=1)
def _environment() -> Any:
    """Jinja as Hugging Face's templates expect it: blocks without their line ends, loop controls, ``generation`` blocks that pass, and
    JSON that is not escaped for HTML. A template is a stranger's program, so it runs in the sandbox."""
    from jinja2 import ext, sandbox

    class Generation(ext.Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, Generation])
    environment.filters["tojson"] = _to_json
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
             sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)


def _refuse(message: str) -> None:
    raise ValueError(message)


# what every template may use beside the messages
_GIVEN: dict[str, Any] = {"add_generation_prompt": True, "functions": None, "function_call": None, "tools": None, "tool_choice": None,
                          "raise_exception": _refuse, "strftime_now": _now}


_LOOKS_SPECIAL = re.compile(r"<\|[^|\s]+\|>")  # where no vocabulary says what is


def _texts(messages: Sequence[Message]) -> list[str]:
    """Every text that the messages bring."""
    return [part for m in messages for part in (*m.parts, m.thought, *_strings(m.extra)) if isinstance(part, str)]


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, (dict, list)):
        for inner in (*value.keys(), *value.values()) if isinstance(value, dict) else value:
            yield from _strings(inner)
    elif isinstance(value, str):
        yield value


class _Contents:
    """Contents as a template is given them: text of special tokens with a guard in it, token ids as marks.

    special: matches the text of special tokens; tags: such texts that an answer may have
    """

    def __init__(self, messages: Sequence[Message], source: str, special: re.Pattern, tags: tuple[str, ...]):
        texts = [source, *_texts(messages)]
        unused = (c for c in map(chr, range(0xE000, 0xF8FF)) if not any(c in text for text in texts))
        self._guard, self._mark = next(unused), next(unused)
        self._special, self._tags = special, tags
        self._tokens: list[list[int]] = []

    def of(self, message: Message) -> dict[str, Any]:
        keep = self._tags if message.role == "assistant" else ()
        parts = (self._guarded(part, keep) if isinstance(part, str) else self.mark(part) for part in self._merged(message.parts))
        thought = {"reasoning_content": self._guarded(message.thought, ())} if message.thought else {}
        return {"role": message.role, "content": "".join(parts), **thought, **self._all_guarded(message.extra)}

    def mark(self, tokens: list[int]) -> str:
        self._tokens.append(tokens)
        return f"{self._mark}{len(self._tokens) - 1}{self._mark}"

    def complete(self, rendered: str) -> bool:
        """Whether every mark is there once."""
        return all(rendered.count(f"{self._mark}{i}{self._mark}") == 1 for i in range(len(self._tokens)))

    def pieces(self, rendered: str) -> Iterable[str | list[int]]:
        """What is to be tokenised by itself, and token ids, in order."""
        for i, piece in enumerate(rendered.split(self._mark)):
            if i % 2:
                yield self._tokens[int(piece)]
            else:
                yield from piece.split(self._guard)

    def _merged(self, parts: Sequence[str | list[int]]) -> Iterable[str | list[int]]:
        """The parts, neighbouring texts as one, for the text of a special token may reach over two."""
        text = ""
        for part in parts:
            if isinstance(part, str):
                text += part
                continue
            yield from filter(None, (text, part))
            text = ""
        yield text

    def _all_guarded(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {self._all_guarded(key): self._all_guarded(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._all_guarded(inner) for inner in value]
        return self._guarded(value, ()) if isinstance(value, str) else value

    def _guarded(self, text: str, keep: tuple[str, ...]) -> str:
        return self._special.sub(lambda m: m[0] if m[0] in keep else m[0][0] + self._guard + m[0][1:], text)


def _check_names(arguments: dict[str, Any]) -> None:
    for name in arguments:
        if name in _RESERVED or not name.isidentifier():
            raise InputError(f"{name!r} is no variable of a chat template that can be set: give another name.")


class Head(Protocol):
    """A text whose beginning can be had without the rest; see text_input.Source."""

    whole: bool

    def head(self, n: int) -> str: ...


def fit_document(document: Head, build: Callable[[str], list[int]], tokenize: Callable[[str], list[int]],
                 text_of: Callable[[Sequence[int]], str], limit: int, refuse: Callable[[str], InputError], may_cut: bool) -> list[int]:
    """The tokens of a prompt with a document in it, of which its head is taken where all of it makes more than limit tokens.

    build:   the prompt's tokens with a text in the document's place; text_of: the text of tokens
    refuse:  makes the refusal of a prompt of so many tokens
    may_cut: False: refuse instead
    No more of the document is read and tokenised than may be taken, and a little. Raises InputError.
    """
    n_rest = len(build(""))
    if n_rest >= limit:
        raise refuse(str(n_rest))
    n = max(0, limit - max(n_rest, _beside(document.head(_SAMPLE)[:_SAMPLE], build, tokenize)))
    text, tokens = beginning(document, tokenize, n, may_cut)
    is_all = is_whole(document, text)
    whole = build(text) if is_all and len(tokens) <= n + _BORDER else None
    if whole and len(whole) <= limit:
        return whole
    if not may_cut:
        raise refuse(str(len(whole) if whole else n_rest + len(tokens)) + ("" if is_all else " or more"))
    while True:
        built = build(_head(text, text_of(tokens[:n])))
        if len(built) <= limit or n == 0:
            return built
        n = max(0, n - (len(built) - limit))


def beginning(document: Head, tokenize: Callable[[str], list[int]], n: int, may_cut: bool) -> tuple[str, list[int]]:
    """(text, its tokens) of as much of a document as gives more than n tokens, and of no more than a little above; or all of it.

    may_cut: False: of all that was read of it, so that more can be said about its length
    """
    size = 6 * max(1, n)
    while True:
        text = document.head(size)
        if may_cut:
            text = text[:size]  # a source reads larger pieces than this
        tokens = tokenize(text)
        if len(tokens) > n or is_whole(document, text):
            return text, tokens
        size = 3 * len(text)


def is_whole(document: Head, text: str) -> bool:
    """Whether a head of a document is all of it."""
    return document.whole and len(text) == len(document.head(len(text) + 1))


def _beside(text: str, build: Callable[[str], list[int]], tokenize: Callable[[str], list[int]]) -> int:
    """Tokens of a prompt beside those of a text in it: told by a short one, so that a long one seldom has to be tokenised twice."""
    return len(build(text)) - len(tokenize(text))


_SAMPLE = 200  # characters
_BORDER = 8  # tokens that a text may have less in its place than by itself


def _head(text: str, start: str) -> str:
    """What a text has of its own first tokens' text, which may begin with a space more and end in half a character."""
    start = start.rstrip("\ufffd")
    return next((s for s in (start, start[1:]) if text.startswith(s)), text[:len(start)])


def too_long(n: int | str, n_ctx: int) -> InputError:
    """The refusal of a prompt of n tokens in a context of n_ctx."""
    return InputError(f"The prompt has {n} tokens and the context {n_ctx}", Remedy("take {}", "the head of the text"), Remedy("shorten it"),
                      Remedy("use a model with a longer context"))

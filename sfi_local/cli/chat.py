"""A conversation on the terminal; the KV cache is kept, so each turn computes only what is new."""

from __future__ import annotations

import os
import random
import sys
from dataclasses import dataclass, replace
from typing import Any, Sequence

from sfi_local.cli import saved_chat
from sfi_local.cli.ask import Lines, lines
from sfi_local.cli.chat_commands import help_text, parse
from sfi_local.cli.options import SAMPLERS
from sfi_local.cli.progress import Progress, erase_drawn
from sfi_local.cli.report import short_statistics, statistics
from sfi_local.cli.spelling import spelled
from sfi_local.cli.stream import Screen, stream
from sfi_local.cli.terminal import tell, tell_notes
from sfi_local.cli.text_input import Source, open_text
from sfi_local.cli.thinking import no_answer
from sfi_local.cli.turns import fit
from sfi_local.cli.window import height_of, width_of
from sfi_local.errors import InputError, SfiError
from sfi_local.fields import meant
from sfi_local.fields import parse as parse_fields
from sfi_local.runtime.sampling import Sampling
from sfi_local.runtime.step import Tally
from sfi_local.runtime.template import Message, beginning, is_whole

HELLO = "A pasted text is one message; end a line with \\ to write another. /help lists the commands."
# field of the request: (its type, how None is shown); beside the samplers
SETTINGS = {"temp": (float, ""), "seed": (int, "random"), "n": (int, "no limit")}
SHOWN = ("top_k", "top_p", "min_p")  # samplers that /set shows unasked
THINK = {"on": True, "off": False}
ROOMY = 20   # rows
ROOM = 1024  # tokens that an answer finds room for, or a quarter of the context


def chat(request: Any) -> None:
    """Read, answer, repeat. Ctrl-C twice where nothing is typed leaves with KeyboardInterrupt."""
    document = None if request.file is None else open_text(request.file)
    with request.load() as model:
        tell(HELLO)
        talk = Chat(model, request, lines(not request.no_history))
        if document is not None:
            talk.take(request.file, document)
        talk.run()


@dataclass(frozen=True)
class Document:
    """A text that the next message is about, or its head."""

    name: str
    text: str


class Chat:
    """messages: a system message or none, then questions and answers by turns
    documents: what is read with the next message
    """

    def __init__(self, model: Any, request: Any, lines: Lines):
        self.model, self.request, self._lines = model, request, lines
        self.messages: list[Message] = [] if request.system is None else [Message("system", [request.system])]
        self.documents: list[Document] = []
        self._marked, self._stats = request.marks(), ""

    def run(self) -> None:
        """Until the user leaves."""
        warned = False
        while True:
            try:
                text = self._lines.ask()
                warned = False
                self.do(text)
            except EOFError:
                sys.stderr.write("\n")
                return
            except Leave:
                return
            except SfiError as error:
                tell(error.told(spelled))
            except KeyboardInterrupt:
                if warned:
                    raise
                warned = True
                tell("Ctrl-C again leaves.")

    def do(self, text: str) -> None:
        """A command or a message. Raises SfiError, and Leave."""
        if command := parse(text):
            getattr(self, f"do_{command[0].name}")(command[1])
        elif text.strip():
            self.ask(text.strip())

    # ---- a turn ------------------------------------------------------------------------------------------------------

    def ask(self, text: str) -> None:
        """A question and its answer; one that fails leaves the conversation as it was. Raises SfiError."""
        parts: list[str | list[int]] = [*self._document_parts(), text]
        if answered := self._answer([*self.messages, Message("user", parts)]):
            self.messages, self.documents = answered, []

    def _answer(self, messages: list[Message], seed_offset: int = 0) -> list[Message] | None:
        """The conversation with the answer to its last message, which is shown; None where it was stopped before it began."""
        room = self._room()
        kept, n_dropped = fit(messages, self._count, self.model.n_ctx_limit - room, self.model.n_ctx_limit - 2 * room)
        if n_dropped:
            tell(f"The context is full: the {'oldest turn is' if n_dropped == 1 else f'{n_dropped} oldest turns are'} forgotten.")
        tally, reading = Tally(), Progress("reading", "tokens", "preparing")
        try:
            tokens = self.model.template.tokens(kept)
            tally.n_prompt = len(tokens)
            space()
            screen = Screen(self._marked, self.request.thinking.hidden)
            stream(self.model, tokens, self.request, self._sampling(seed_offset), tally, reading, screen)
        except KeyboardInterrupt:
            if not tally.tokens:
                tell(f"Stopped after {reading.done:.0f} of {reading.total:.0f} tokens; they are kept." if reading.done else "Stopped.")
                return None
        finally:
            reading.close()
        self._note_statistics(tally)
        return [*kept, Message("assistant", [tally.tokens[:-1] if tally.finish == "end" else tally.tokens])]

    def _note_statistics(self, tally: Tally) -> None:
        self._stats = statistics(self.model, tally)
        if why := no_answer(tally):
            tell(why)
        if not self.request.quiet:
            tell(short_statistics(self.model, tally, width_of(sys.stderr) - 1), dim=True)
        space()

    def _count(self, messages: Sequence[Message]) -> int:
        return len(self.model.template.tokens(messages))

    def _room(self) -> int:
        """Tokens that an answer must find room for."""
        quarter = self.model.n_ctx_limit // 4
        return min(quarter, self.request.n_limit or ROOM)

    def _sampling(self, seed_offset: int) -> Any:
        sampling = self.request.sampling()
        return replace(sampling, seed=(sampling.seed + seed_offset) % 2**32)

    # ---- documents ---------------------------------------------------------------------------------------------------

    def take(self, name: str, source: Source) -> None:
        """Keep a text for the next message, its head if the request allows that. Raises InputError."""
        if source.is_blank():
            raise InputError(f"{name} is empty: give a file with text.")
        head, n = self._fitted(name, source)
        self.documents.append(Document(name, head))
        cut = "" if source.whole and len(head) == len(source.head()) else ", its head"
        tell(f"{os.path.basename(name)}: {n} tokens{cut}, read with your next message.")

    def _document_parts(self) -> list[str]:
        return [part for d in self.documents for part in (d.text, "\n\n")]

    def _fitted(self, name: str, source: Source) -> tuple[str, int]:
        """(what of a document is taken, its tokens); no more of it is read than that, and a little"""
        system = [m for m in self.messages[:1] if m.role == "system"]
        n_rest = self._count([*system, Message("user", [*self._document_parts(), "\n\n"])])
        limit = min(self.model.n_ctx_limit - self._room(), self.request.max_prompt_tokens or self.model.n_ctx_limit)
        may_cut = self.request.truncate or self.request.max_prompt_tokens is not None
        text, tokens = beginning(source, self.model.tokenize, max(0, limit - n_rest), may_cut)
        if is_whole(source, text) and n_rest + len(tokens) <= limit:
            return text, len(tokens)
        if not may_cut:
            raise InputError(f"{name} has {len(tokens)} tokens{'' if source.whole else ' or more'}, and there is room for "
                             f"{max(0, limit - n_rest)} in the context of {self.model.n_ctx_limit}: start with --truncate "
                             f"to talk about its head, or take a model with a longer context.")
        head = tokens[:max(0, limit - n_rest)]
        return self.model.detokenize(head).rstrip("\ufffd"), len(head)  # it may end in half of a character

    # ---- commands ----------------------------------------------------------------------------------------------------

    def do_help(self, _: str) -> None:
        tell(help_text(width_of(sys.stderr) - 1))

    def do_new(self, _: str) -> None:
        self.messages, self.documents = [m for m in self.messages[:1] if m.role == "system"], []
        tell("A new conversation.")

    def do_read(self, path: str) -> None:
        if path == "-":
            raise InputError("/read needs the name of a file: what comes from the terminal can be pasted into a message.")
        self.take(path, open_text(os.path.expanduser(path)))

    def do_regen(self, _: str) -> None:
        if not self.messages or self.messages[-1].role != "assistant":
            raise InputError("There is no answer yet: ask something first.")
        if self.request.temp == 0:
            tell("With temp 0 an answer comes out the same again: /set temp=0.8 lets it differ.")
        if answered := self._answer(self.messages[:-1], random.randrange(1, 2**31)):
            self.messages = answered

    def do_system(self, text: str) -> None:
        now = [m for m in self.messages[:1] if m.role == "system"]
        if not text:
            tell("".join(map(str, now[0].parts)) if now else "There is no system message: /system TEXT sets one.")
            return
        new = [] if text == "-" else [Message("system", [text])]
        self._count([*new, Message("user", ["x"])])  # a template may refuse it
        self.messages = [*new, *self.messages[len(now):]]
        tell("The system message is set; the conversation is read anew." if new else "There is no system message now.")

    def do_set(self, text: str) -> None:
        if text:
            self.request = changed(self.request, text)
        samplers = {**{name: getattr(Sampling, name) for name in SHOWN}, **self.request.samplers}
        tell(", ".join([*(f"{name} {shown(getattr(self.request, name), none)}" for name, (_, none) in SETTINGS.items()),
                        *(f"{name} {shown(value, '')}" for name, value in samplers.items())]))

    def do_think(self, text: str) -> None:
        """... for the answers that follow; without a word: say how it is."""
        if text not in ("", *THINK):
            raise InputError(f"/think {text} is not understood: write /think on or /think off.")
        if text:
            self.request = replace(self.request, thinking=replace(self.request.thinking, think=THINK[text]))
            self.request.thinking.apply(self.model)
            self._count([Message("user", ["x"])])  # notes what the template does not have
        think = self.request.thinking.think
        tell_notes(self.model)
        tell(f"Thoughts are {'as the template has them' if think is None else 'on' if think else 'off'}"
             f"{', and hidden' if self.request.thinking.hidden else ''}.")

    def do_tokens(self, _: str) -> None:
        n = self._count(self.messages) if self.messages else 0
        tell(f"{n} of {self.model.n_ctx_limit} tokens: {turns(self.messages)}"
             f"{', a system message' if self.messages and self.messages[0].role == 'system' else ''}.")

    def do_stats(self, _: str) -> None:
        tell(self._stats or "There is no answer yet: ask something first.")

    def do_save(self, path: str) -> None:
        if not any(m.role == "assistant" for m in self.messages):
            raise InputError("There is nothing to save yet: ask something first.")
        saved_chat.save(os.path.expanduser(path), self.model.name, self.messages, self.model.detokenize)
        tell(f"Saved in {path}.")

    def do_load(self, path: str) -> None:
        messages, exact = saved_chat.load(os.path.expanduser(path), self.model.name, self.model.vocabulary.n_vocab, self.model.detokenize)
        if messages[-1].role != "assistant":
            raise InputError(f"{path} ends with a question that has no answer: it is no conversation that /save wrote.")
        self.messages, self.documents = messages, []
        tell(f"{self._count(messages)} tokens of {turns(messages)}, read with your next message."
             f"{'' if exact else ' They are of another model: its texts are taken.'}")

    def do_quit(self, _: str) -> None:
        raise Leave


class Leave(Exception):
    """The user has said so."""


def turns(messages: Sequence[Message]) -> str:
    """``1 turn``, ``2 turns``"""
    n = sum(m.role == "assistant" for m in messages)
    return f"{n} turn{'' if n == 1 else 's'}"


def space() -> None:
    """An empty line between a question and its answer, where the window has room for one."""
    erase_drawn()
    if sys.stderr.isatty() and height_of(sys.stderr) >= ROOMY:
        sys.stderr.write("\n")


def changed(request: Any, text: str) -> Any:
    """The request with KEY=VALUE. Raises InputError."""
    key, sign, value = (piece.strip() for piece in text.partition("="))
    name = key.lower().replace("-", "_")
    if name not in (*SETTINGS, *SAMPLERS):
        raise InputError(f"There is no setting {key!r}:{meant(name, (*SETTINGS, *SAMPLERS))} There are {', '.join((*SETTINGS, *SAMPLERS))}.")
    if not sign or not value:
        raise InputError(f"/set {key} needs a value: write e.g. /set {name}=1.")
    if name in SAMPLERS:
        new = replace(request, samplers={**request.samplers, **parse_fields(f"{name}={value}", SAMPLERS, "/set")})
    else:
        new = replace(request, **{name: _setting(name, value)})
    new.sampling().validate()
    if new.n == 0 or new.n is not None and new.n < -1:
        raise InputError(f"n is {new.n}: give 1 or more, or -1 for no limit.")
    return new


def _setting(name: str, text: str) -> Any:
    kind, none = SETTINGS[name]
    try:
        return None if none and text == none else kind(text)
    except ValueError:
        raise InputError(f"{text!r} is no number: write e.g. /set {name}=1.") from None


def shown(value: Any, none: str) -> str:
    return none if value is None or value == -1 and none else f"{value:g}" if isinstance(value, float) else str(value)

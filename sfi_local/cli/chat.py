"""A conversation on the terminal; the KV cache is kept, so each turn computes only what is new."""

from __future__ import annotations

import sys
from typing import Any

from sfi_local.cli.report import statistics
from sfi_local.cli.terminal import progress, say, show, tell_notes
from sfi_local.cli.text_input import from_argument
from sfi_local.errors import SfiError
from sfi_local.runtime.step import Tally
from sfi_local.runtime.template import Message

HELP = "Chat: /new starts anew, /quit or Ctrl-D leaves, Ctrl-C stops an answer."


def chat(request: Any) -> None:
    """Read, answer, repeat. Ctrl-C at the prompt leaves with KeyboardInterrupt."""
    _enable_line_editing()
    with request.load() as model:
        say(HELP)
        marked = request.marks()
        conversation = _opening(request)
        while (text := _read()) is not None:
            if text == "/new":
                conversation = _opening(request)
            elif text:
                _turn(model, request, conversation, text, marked)


def _turn(model: Any, request: Any, conversation: list, text: str, marked: bool) -> None:
    """One question and its answer; a failed one leaves the conversation as it was."""
    conversation.append(Message("user", [text]))
    try:
        tally = _answer(model, request, conversation, marked)
    except SfiError as error:
        conversation.pop()
        say(f"{error} /new starts a new conversation.")
        return
    if not tally.tokens:  # interrupted before the answer began
        conversation.pop()
        return
    conversation.append(Message("assistant", [tally.tokens[:-1] if tally.finish == "end" else tally.tokens]))
    say(statistics(model, tally))


def _answer(model: Any, request: Any, conversation: list, marked: bool) -> Any:
    """Stream an answer, its tokens marked by the kind of their step if so wished; Ctrl-C ends it early."""
    tokens = model.template.tokens(conversation)
    tally = Tally(n_prompt=len(tokens))
    try:
        with progress("prefill", "tokens") as prefill:
            for step in model.generate(tokens, n=request.n_limit, sampling=request.sampling(), stop=request.stop,
                                       draft=request.draft, progress=prefill):
                prefill.close()
                tell_notes(model)
                tally.add(step)
                show(step, marked)
    except KeyboardInterrupt:
        pass
    tally.n_prefilled = model.session.n_prefilled if model.session else 0
    sys.stdout.write("\n")
    sys.stdout.flush()
    return tally


def _opening(request: Any) -> list:
    return [] if request.system is None else [Message("system", [request.system])]


def _read() -> str | None:
    """A line typed by the user; "" if it is no text, None at the end."""
    try:
        if not sys.stdout.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        text = from_argument(input("> " if sys.stdout.isatty() else ""), "the line").strip()
    except EOFError:
        sys.stderr.write("\n")
        return None
    except (UnicodeDecodeError, SfiError):
        say("That line is not UTF-8 text without NUL bytes: type it again.")
        return ""
    return None if text in ("/quit", "/exit") else text


def _enable_line_editing() -> None:
    try:
        import readline  # noqa: F401  (its import gives input() editing and history)
    except ImportError:
        return

"""What the commands show beside their result: sentences and progress on stderr, and marks on the tokens of an answer."""

from __future__ import annotations

import os
import sys
from textwrap import fill
from typing import Any, Iterable

import click

from sfi_local.cli.progress import erase_drawn
from sfi_local.cli.window import can_redraw, width_of
from sfi_local.runtime.modes import mode_of
from sfi_local.store.pull import resolve

RESET, DIM = "\x1b[0m", "\x1b[2m"
# kind of step: (escape sequence, how the legend names it where it cannot show it)
MARKS = {"prefill": ("\x1b[36m", "cyan"), "slow": ("\x1b[1;33m", "bold yellow"), "fast": ("", "plain"),
         "dense": ("\x1b[35m", "magenta"), "stock": ("\x1b[34m", "blue")}


def say(sentence: str) -> None:
    """One line on stderr."""
    erase_drawn()
    click.echo(f"sfi-local: {sentence}", err=True)


def tell(text: str, dim: bool = False) -> None:
    """Text of a conversation on stderr, on a terminal in whole words; dim: less visible than the answer"""
    erase_drawn()
    if sys.stderr.isatty():
        width = width_of(sys.stderr) - 1
        text = "\n".join(fill(line, width, break_long_words=False, break_on_hyphens=False) for line in text.split("\n"))
    click.echo(f"{DIM}{text}{RESET}" if dim and styled(sys.stderr) else text, err=True)


def styled(stream: Any) -> bool:
    """Whether a stream is a terminal that can show styles, and its user wants them."""
    return can_redraw(stream) and not os.environ.get("NO_COLOR")


def resolve_noted(name: str, report_bytes: Any) -> Any:
    """The file of a model; a fetch is announced on stderr."""
    return resolve(name, report_bytes, say)


def tell_notes(model: Any) -> None:
    """Say on stderr, once, what was decided on the user's behalf."""
    for sentence in model.unread_notes():
        say(sentence)


def mark(text: str, kind: str) -> str:
    """The text in the style of a kind of step; kinds without one stay plain."""
    style = MARKS.get(kind, ("", ""))[0]
    return f"{style}{text}{RESET}" if style and text else text


def marks_wanted(when: str) -> bool:
    """Whether tokens on stdout are to be marked. when: ``auto`` (a terminal that can, and no NO_COLOR), ``always``, ``never``"""
    if when != "auto":
        return when == "always"
    return styled(sys.stdout)


def tell_marks(mode: str) -> None:
    """The legend, on stderr: the kinds of step that a mode can have, each in its own style."""
    kinds = ("prefill", *mode_of(mode).kinds)
    say(f"each token shows the step it came from: {', '.join(_legend(kinds, sys.stderr.isatty()))}")


def _legend(kinds: Iterable[str], styled: bool) -> list[str]:
    return [mark(kind, kind) if styled else f"{kind} {MARKS[kind][1]}" for kind in kinds]

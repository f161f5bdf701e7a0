"""What the commands show beside their result: sentences and progress on stderr, and marks on the tokens of an answer."""

from __future__ import annotations

import os
import sys
from typing import Any, Iterable

import click

from sfi_local.cli.progress import Progress
from sfi_local.store.pull import resolve

RESET = "\x1b[0m"
# kind of step: (escape sequence, how the legend names it where it cannot show it)
MARKS = {"prefill": ("\x1b[36m", "cyan"), "slow": ("\x1b[1;33m", "bold yellow"), "fast": ("", "plain"),
         "dense": ("\x1b[35m", "magenta"), "stock": ("\x1b[34m", "blue")}
KINDS_OF_MODE = {"sfi": ("prefill", "slow", "fast"), "dense": ("prefill", "dense"), "stock": ("prefill", "stock")}


def say(sentence: str) -> None:
    """One line on stderr."""
    click.echo(f"sfi-local: {sentence}", err=True)


def progress(label: str, unit: str) -> Any:
    return Progress(label, unit)


def resolve_noted(name: str, report_bytes: Any) -> Any:
    """The file of a model; a fetch is announced on stderr."""
    return resolve(name, report_bytes, say)


def tell_notes(model: Any) -> None:
    """Say on stderr, once, what was decided on the user's behalf."""
    for sentence in model.unread_notes():
        say(sentence)


def show(step: Any, marked: bool) -> None:
    """Write a step's text to stdout at once, marked by the kind of the step if so wished."""
    sys.stdout.write(mark(step.text, step.kind) if marked else step.text)
    sys.stdout.flush()


def mark(text: str, kind: str) -> str:
    """The text in the style of a kind of step; kinds without one stay plain."""
    style = MARKS.get(kind, ("", ""))[0]
    return f"{style}{text}{RESET}" if style and text else text


def marks_wanted(when: str) -> bool:
    """Whether tokens on stdout are to be marked. when: ``auto`` (a terminal that can, and no NO_COLOR), ``always``, ``never``"""
    if when != "auto":
        return when == "always"
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")


def tell_marks(mode: str) -> None:
    """The legend, on stderr: the kinds of step that a mode can have, each in its own style."""
    kinds = KINDS_OF_MODE.get(mode, tuple(MARKS))
    say(f"each token shows the step it came from: {', '.join(_legend(kinds, sys.stderr.isatty()))}")


def _legend(kinds: Iterable[str], styled: bool) -> list[str]:
    return [mark(kind, kind) if styled else f"{kind} {MARKS[kind][1]}" for kind in kinds]

"""An answer on its way to the screen: progress while the prompt is read, then the text as it comes, thoughts apart."""

from __future__ import annotations

import os
import sys
import time
from contextlib import closing
from functools import partial
from typing import Any, Callable, Sequence

from sfi_local.cli.progress import Progress
from sfi_local.cli.terminal import DIM, RESET, mark, styled, tell_notes
from sfi_local.cli.window import width_of
from sfi_local.cli.wrap import Wrapper
from sfi_local.runtime.step import Step, Tally
from sfi_local.runtime.thoughts import THOUGHT, TokenThoughts

_IMPORTED = time.perf_counter()


class Text:
    """Text that is written to a stream as it comes, in whole words where that is a terminal."""

    def __init__(self, stream: Any):
        self._stream, self.last = stream, ""
        self._wrapper = Wrapper(partial(width_of, stream)) if stream.isatty() else None

    def push(self, text: str, paint: Callable[[str], str]) -> None:
        if text:
            self._write(self._wrapper.push(text, paint) if self._wrapper else paint(text))
            self.last = text

    def end(self) -> None:
        """The last word, and a newline where there is none."""
        self._write((self._wrapper.end() if self._wrapper else "") + ("" if self.last.endswith("\n") else "\n"))

    def _write(self, text: str) -> None:
        if text:
            self._stream.write(text)
            self._stream.flush()


class Screen:
    """Answers on stdout, thoughts dim on stderr; marked by the kind of their steps if so wished.

    hidden: thoughts are not shown
    """

    def __init__(self, marked: bool, hidden: bool = False):
        self._marked, self._hidden = marked, hidden
        self._answer, self._thought = Text(sys.stdout), Text(sys.stderr)
        self._kind = ""

    def show(self, pieces: Sequence[tuple[str, str]], kind: str) -> None:
        """Pieces of a ThoughtStream, and the kind of their step."""
        for what, text in pieces:
            if what == THOUGHT and self._hidden:
                continue
            if self._kind == THOUGHT != what:
                self._end_thought()
            self._kind = what
            paint: Callable[[str], str] = partial(mark, kind=kind) if self._marked else str
            if what == THOUGHT:
                self._thought.push(text, dim if styled(sys.stderr) and not self._marked else paint)
            else:
                self._answer.push(text, paint)

    def end(self) -> None:
        """The last word, and a newline where there is none."""
        if self._kind == THOUGHT:
            self._end_thought()
        if self._answer.last or not self._thought.last:
            self._answer.end()

    def _end_thought(self) -> None:
        self._thought.end()
        sys.stderr.write("\n")
        sys.stderr.flush()


def dim(text: str) -> str:
    """The text less visible than an answer."""
    return f"{DIM}{text}{RESET}" if text.strip() else text


def stream(model: Any, tokens: Sequence[int], request: Any, sampling: Any, tally: Tally, reading: Progress,
           screen: Screen | None) -> None:
    """Generate into a tally; what was counted and shown stays whole when Ctrl-C ends it.

    screen: None: nothing is shown
    """
    thoughts = TokenThoughts(model.template.thoughts(tokens), model.vocabulary)
    try:
        with reading, closing(model.generate(tokens, n=request.n_limit, sampling=sampling, stop=request.stop, draft=request.draft,
                                             progress=reading, think_budget=request.thinking.budget)) as steps:
            for step in steps:
                if not tally.tokens:
                    tally.s_first = since_start()
                    reading.close()
                    tell_notes(model)
                tally.add(step)
                _tell_apart(thoughts, step, tally, screen)
    finally:
        tally.in_thought = thoughts.stream.inside
        if model.session:
            tally.n_prefilled, tally.cached_from, tally.why_read = model.session.n_prefilled, model.session.cached_from, model.session.why_read
        if screen and tally.tokens:
            screen.end()


def _tell_apart(thoughts: TokenThoughts, step: Step, tally: Tally, screen: Screen | None) -> None:
    pieces = thoughts.push(step.token, step.text, bool(step.finish))
    for what, text in pieces:
        (tally.thoughts if what == THOUGHT else tally.answers).append(text)
    if screen:
        screen.show(pieces, step.kind)


def since_start() -> float:
    """Seconds since this process began; where the system does not say, since this module was imported."""
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as stat, open("/proc/uptime", encoding="ascii") as uptime:
            ticks = int(stat.read().rpartition(")")[2].split()[19])
            return float(uptime.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return time.perf_counter() - _IMPORTED

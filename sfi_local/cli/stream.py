"""An answer on its way to the screen: progress while the prompt is read, then the text as it comes."""

from __future__ import annotations

import sys
from contextlib import closing
from functools import partial
from typing import Any, Callable, Sequence

from sfi_local.cli.progress import Progress
from sfi_local.cli.terminal import mark, tell_notes
from sfi_local.cli.window import width_of
from sfi_local.cli.wrap import Wrapper
from sfi_local.runtime.step import Step, Tally


class Screen:
    """The text of steps on stdout, in whole words where that is a terminal; marked by the kind of the step if so wished."""

    def __init__(self, marked: bool):
        self._marked, self._last = marked, "\n"
        self._wrapper = Wrapper(partial(width_of, sys.stdout)) if sys.stdout.isatty() else None

    def show(self, step: Step) -> None:
        paint: Callable[[str], str] = partial(mark, kind=step.kind) if self._marked else str
        self._write(self._wrapper.push(step.text, paint) if self._wrapper else paint(step.text))
        self._last = step.text or self._last

    def end(self) -> None:
        """The last word, and a newline where there is none."""
        self._write((self._wrapper.end() if self._wrapper else "") + ("" if self._last.endswith("\n") else "\n"))

    def _write(self, text: str) -> None:
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()


def stream(model: Any, tokens: Sequence[int], request: Any, sampling: Any, tally: Tally, reading: Progress,
           screen: Screen | None) -> None:
    """Generate into a tally; what was counted and shown stays whole when Ctrl-C ends it.

    screen: None: nothing is shown
    """
    try:
        with reading, closing(model.generate(tokens, n=request.n_limit, sampling=sampling, stop=request.stop, draft=request.draft,
                                             progress=reading)) as steps:
            for step in steps:
                if not tally.tokens:
                    reading.close()
                    tell_notes(model)
                tally.add(step)
                if screen:
                    screen.show(step)
    finally:
        tally.n_prefilled = model.session.n_prefilled if model.session else 0
        if screen and tally.tokens:
            screen.end()

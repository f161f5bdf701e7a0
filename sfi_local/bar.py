"""The progress bar of a measurement, on stderr; it leaves nothing behind."""

from __future__ import annotations

import sys
from typing import Any

import click


class Bar:
    """A bar of n_runs parts; plain lines where stderr is no terminal."""

    def __init__(self, n_runs: int):
        self._total, self._live, self._said, self._bar = n_runs, sys.stderr.isatty(), "", None

    def __enter__(self) -> "Bar":
        if self._live:
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("loading", total=self._total)
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """What is going on, ``case: detail``; in plain lines only where the case changes."""
        if self._bar:
            self._bar.update(self._task, description=text)
        elif text.partition(":")[0] != self._said:
            self._said = text.partition(":")[0]
            click.echo(f"sfi-local: measuring {self._said}", err=True)

    def advance(self) -> None:
        """One part is done."""
        if self._bar:
            self._bar.advance(self._task)

    def filling(self, n_done: int, n_total: int) -> None:
        """A prefill is going on."""
        if self._bar:
            self._bar.update(self._task, description=f"prefill {n_done} of {n_total}")
